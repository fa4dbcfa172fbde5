"""The torch.optim shell on a mesh equals the shell of one process."""

from __future__ import annotations

import pytest
import sharding_shell_cases as cases
import workers


@pytest.mark.parametrize(("world", "mode"), [(2, "ddp"), (2, "fsdp"), (4, "hsdp"), (4, "fsdp_tp")])
@pytest.mark.parametrize("made", ["as_optimizer", "named"])
def test_shell_on_a_mesh(world: int, mode: str, made: str) -> None:
    """Backward, step, zero_grad and a scheduler: parameters are those of one process."""
    assert max(workers.pool(world).run(cases.train_shell, mode, made)) < 1e-9


@pytest.mark.parametrize(("world", "mode"), [(2, "ddp"), (2, "fsdp"), (4, "fsdp_tp")])
def test_state_dict_goes_on_where_it_was(world: int, mode: str) -> None:
    """Saved by every rank, loaded into a new optimizer of a new model: the same run."""
    assert max(workers.pool(world).run(cases.resume_shell, mode)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_compiled_shell(mode: str) -> None:
    """The whole step of the shell, collectives included, in two graphs."""
    answers = workers.pool(2).run(cases.compiled_shell, mode)
    assert max(error for error, _ in answers) < 1e-9
    assert {graphs for _, graphs in answers} == {2}


def test_param_groups_and_frozen_parameters() -> None:
    """Groups with options of their own, one parameter frozen, one without a gradient."""
    assert max(workers.pool(2).run(cases.grouped_shell)) < 1e-9


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_root_that_keeps_failing_is_an_error_on_every_rank(mode: str) -> None:
    """One block is not finite: its owner names it, and no rank waits for another."""
    answers = workers.pool(2).outcomes(cases.failing_shell, mode)
    assert [own.kind for own in answers] == ["RootFailureError"] * 2
    messages = sorted(own.message for own in answers)
    assert "of a block of another rank" in messages[0]
    assert "of parameter '0.weight', block of shape" in messages[1]
    assert max(workers.pool(2).run(cases.train_shell, mode, "named")) < 1e-9
