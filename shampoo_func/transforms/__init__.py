"""Transformations: stages, wrappers and combinators with optax's grammar."""

from shampoo_func.transforms.accumulate import Accumulate, AccumulateState, accumulate
from shampoo_func.transforms.averaging import (
    PrimalAveraging,
    PrimalAveragingState,
    primal_averaging,
)
from shampoo_func.transforms.averaging_schedule_free import (
    ScheduleFree,
    ScheduleFreeState,
    schedule_free,
)
from shampoo_func.transforms.averaging_weights import (
    WeightEma,
    WeightEmaState,
    WeightLawa,
    WeightLawaState,
    weight_ema,
    weight_lawa,
)
from shampoo_func.transforms.base import Averaging
from shampoo_func.transforms.blocked import Blocked, blocked
from shampoo_func.transforms.chain import Chain, chain
from shampoo_func.transforms.clipping import (
    Clip,
    ClipByGlobalNorm,
    clip,
    clip_by_global_norm,
    global_norm,
)
from shampoo_func.transforms.decay import AddDecayedWeights, add_decayed_weights
from shampoo_func.transforms.dtensor_state import state_as_dtensors, state_from_dtensors
from shampoo_func.transforms.evaluate import eval_params
from shampoo_func.transforms.failures import check_failures
from shampoo_func.transforms.finite import ApplyIfFinite, ApplyIfFiniteState, apply_if_finite
from shampoo_func.transforms.hyperparams import (
    WithHyperparams,
    WithHyperparamsState,
    with_hyperparams,
)
from shampoo_func.transforms.inspect import BlockView, parameter_state
from shampoo_func.transforms.joined_schedules import (
    join_schedules,
    warmup_cosine_decay_schedule,
    warmup_stable_decay_schedule,
)
from shampoo_func.transforms.masks import check_masks
from shampoo_func.transforms.memory import state_bytes
from shampoo_func.transforms.momentum import Ema, EmaState, Trace, TraceState, ema, trace
from shampoo_func.transforms.named import (
    scale_by_adam,
    scale_by_rms,
    scale_by_rss,
    scale_by_shampoo,
)
from shampoo_func.transforms.partition import Masked, Partition, masked, partition
from shampoo_func.transforms.policies import (
    Adaptive,
    Every,
    Policy,
    Probabilistic,
    adaptive,
    every,
    probabilistic,
)
from shampoo_func.transforms.precondition import Precondition, PreconditionState, precondition
from shampoo_func.transforms.report import StateReport, state_report
from shampoo_func.transforms.scaling import (
    Identity,
    Scale,
    ScaleByLearningRate,
    ScaleBySchedule,
    ScheduleState,
    identity,
    scale,
    scale_by_learning_rate,
    scale_by_schedule,
)
from shampoo_func.transforms.schedules import (
    constant_schedule,
    cosine_decay_schedule,
    linear_schedule,
    piecewise_constant_schedule,
)
from shampoo_func.transforms.sharded import sharded, shardings, with_sharding
from shampoo_func.transforms.staggered import Staggered, staggered

__all__ = [
    "Accumulate",
    "AccumulateState",
    "Adaptive",
    "AddDecayedWeights",
    "ApplyIfFinite",
    "ApplyIfFiniteState",
    "Averaging",
    "BlockView",
    "Blocked",
    "Chain",
    "Clip",
    "ClipByGlobalNorm",
    "Ema",
    "EmaState",
    "Every",
    "Identity",
    "Masked",
    "Partition",
    "Policy",
    "Precondition",
    "PreconditionState",
    "PrimalAveraging",
    "PrimalAveragingState",
    "Probabilistic",
    "Scale",
    "ScaleByLearningRate",
    "ScaleBySchedule",
    "ScheduleFree",
    "ScheduleFreeState",
    "ScheduleState",
    "Staggered",
    "StateReport",
    "Trace",
    "TraceState",
    "WeightEma",
    "WeightEmaState",
    "WeightLawa",
    "WeightLawaState",
    "WithHyperparams",
    "WithHyperparamsState",
    "accumulate",
    "adaptive",
    "add_decayed_weights",
    "apply_if_finite",
    "blocked",
    "chain",
    "check_failures",
    "check_masks",
    "clip",
    "clip_by_global_norm",
    "constant_schedule",
    "cosine_decay_schedule",
    "ema",
    "eval_params",
    "every",
    "global_norm",
    "identity",
    "join_schedules",
    "linear_schedule",
    "masked",
    "parameter_state",
    "partition",
    "piecewise_constant_schedule",
    "precondition",
    "primal_averaging",
    "probabilistic",
    "scale",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_schedule",
    "scale_by_shampoo",
    "schedule_free",
    "sharded",
    "shardings",
    "staggered",
    "state_as_dtensors",
    "state_bytes",
    "state_from_dtensors",
    "state_report",
    "trace",
    "warmup_cosine_decay_schedule",
    "warmup_stable_decay_schedule",
    "weight_ema",
    "weight_lawa",
    "with_hyperparams",
    "with_sharding",
]
