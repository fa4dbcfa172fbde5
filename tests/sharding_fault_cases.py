"""What the ranks of a pool do in `test_sharding_faults.py`: functions of `(rank, world, ...)`."""

from __future__ import annotations

from typing import Any

import sharding_cases as cases
import torch
import torch.distributed as dist

import shampoo_func as sf

BLOCK = "state/chain/embedding/b0_0/precondition/preconditioner/direction"


def bad_block(
    rank: int, world: int, storage: str, shared: bool, bad: float
) -> tuple[float, bool | None]:
    """Return how far all is from one process, and whether the block kept its roots, if here."""
    shape, own, grad = cases.STORAGES[storage]
    mesh = cases.mesh_of(shape, world)
    options: dict[str, Any] = {"transport": sf.refresh_sharded()} if shared else {}
    alone, tx = cases.grafted(), cases.grafted(mesh=mesh, **options)
    wanted = cases.random_tree(cases.SHAPES, 0)
    found = {name: cases.stored(leaf, mesh, own) for name, leaf in wanted.items()}
    states: list[Any] = [alone.init(wanted), tx.init(found)]
    before: dict[str, torch.Tensor] = {}
    for step in range(1, 5):  # refreshes at 2 and 4
        grads = cases.random_tree(cases.SHAPES, step)
        if step == 4:
            grads["embedding"][0, 0] = bad
            before = sf.to_state_dict(tx, states[1], found)
        updates, states[0] = alone.update(grads, states[0], wanted)
        wanted = sf.apply_updates(wanted, updates)
        local = {name: cases.stored(leaf, mesh, grad) for name, leaf in grads.items()}
        updates, states[1] = tx.update(local, states[1], found)
        found = sf.apply_updates(found, updates)
    reference = sf.to_state_dict(alone, states[0], wanted)
    after = sf.to_state_dict(tx, states[1], found)
    worst = 0.0
    for key, value in after.items():
        if "/preconditioner/" in key:
            torch.testing.assert_close(
                value, reference[key], rtol=1e-9, atol=1e-9, equal_nan=True, msg=key
            )
    for name, whole in wanted.items():
        kinds = cases.fitting(own, whole.ndim)
        mine = cases._local(found[name])
        part = cases.local_of(whole, mesh, kinds) if own else whole
        assert torch.equal(mine.isfinite(), part.isfinite()), name
        gap = (mine - part)[mine.isfinite()].abs()
        worst = max(worst, gap.max().item() if gap.numel() else 0.0)
    if f"{BLOCK}/roots/0" not in after:
        return worst, None
    roots = [f"{BLOCK}/roots/{dim}" for dim in range(2)]
    assert int(after[f"{BLOCK}/failures"]) == 1
    return worst, all(torch.equal(before[key], after[key]) for key in roots)


def failing(rank: int, world: int) -> str:
    """Refresh a block that is not finite, and look for failures."""
    mesh = cases.mesh_of((-1,), world)
    tx = cases.grafted(mesh=mesh)
    params = cases.random_tree(cases.SHAPES, 0)
    params["embedding"][0, 0] = torch.nan
    _, state = tx.update(params, tx.init(params), params, refresh=True)
    sf.check_failures(tx, state, params, limit=0)
    return "no error"


def masks(rank: int, world: int, differ: bool) -> int:
    """Check gradients of which some are None, on one rank others."""
    mesh = cases.mesh_of((-1,), world)
    tx = cases.grafted(mesh=mesh)
    grads: dict[str, Any] = cases.random_tree(cases.SHAPES, 0)
    grads["gain"] = None
    if differ and rank == 1:
        grads["row"] = None
    sf.check_masks(tx, grads)
    return 0


def no_group(rank: int, world: int) -> list[str]:
    """Go on after the process group has been destroyed."""
    mesh = cases.mesh_of((-1,), world)
    tx = cases.grafted(mesh=mesh)
    params = cases.random_tree(cases.SHAPES, 0)
    state = tx.init(params)
    dist.destroy_process_group()
    seen = []
    for call in (
        lambda: tx.update(params, state, params),
        lambda: tx.init(params),
        lambda: sf.sharded(sf.shampoo(0.1), mesh),
    ):
        try:
            call()
        except Exception as error:
            seen.append(type(error).__name__)
    return seen
