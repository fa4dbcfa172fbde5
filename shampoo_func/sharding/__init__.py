"""Blocks shared by the ranks of a mesh: owners, storages, transports. Only here are collectives."""

from shampoo_func.sharding.batched import check_not_batched
from shampoo_func.sharding.check import check_plan
from shampoo_func.sharding.costs import Cost, byte_cost, cubic_cost
from shampoo_func.sharding.counting import CountCollectives
from shampoo_func.sharding.dtensors import (
    as_local,
    from_shards,
    kinds_of,
    stored_like,
    to_shards,
    whole_norms,
    wrapped,
)
from shampoo_func.sharding.exchange import Exchange, Here, LocalExchange, OwnedExchange, Request
from shampoo_func.sharding.plan import ShardPlan, balance, plan_shards
from shampoo_func.sharding.refresh import RefreshExchange, SharedRefresh, Shares
from shampoo_func.sharding.settings import Cut, Sharding, sharding
from shampoo_func.sharding.shards import ShardLocalExchange
from shampoo_func.sharding.transports import (
    Transport,
    all_gather,
    all_to_all,
    automatic,
    reduce_scatter,
    refresh_sharded,
    shard_local,
)

__all__ = [
    "Cost",
    "CountCollectives",
    "Cut",
    "Exchange",
    "Here",
    "LocalExchange",
    "OwnedExchange",
    "RefreshExchange",
    "Request",
    "ShardLocalExchange",
    "ShardPlan",
    "Sharding",
    "SharedRefresh",
    "Shares",
    "Transport",
    "all_gather",
    "all_to_all",
    "as_local",
    "automatic",
    "balance",
    "byte_cost",
    "check_not_batched",
    "check_plan",
    "cubic_cost",
    "from_shards",
    "kinds_of",
    "plan_shards",
    "reduce_scatter",
    "refresh_sharded",
    "shard_local",
    "sharding",
    "stored_like",
    "to_shards",
    "whole_norms",
    "wrapped",
]
