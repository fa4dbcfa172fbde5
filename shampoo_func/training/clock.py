"""The refresh clock on the host, for loops with a static `refresh` argument."""

from __future__ import annotations

from shampoo_func.errors import RefreshError, check_count
from shampoo_func.types import Transformation

__all__ = ["refresh_due"]


def refresh_due(tx: Transformation, step: int) -> bool:
    """Return whether update number `step` recomputes the roots.

    Passing the answer to `update(..., refresh=...)` gives a compiled loop exactly two graphs,
    and needs no synchronisation with a device.

    Args:
        tx: The transformation, a whole chain for instance.
        step: The number of the update, from 1.

    Returns:
        False for a transformation that has nothing to refresh.

    Raises:
        RefreshError: If stages refresh by different policies, so that one answer cannot serve
            all; give them one policy, or pass `refresh=None`.

    Example:
        >>> from shampoo_func.recipes import shampoo
        >>> tx = shampoo(1e-2, refresh_every=3, start=4)
        >>> [step for step in range(1, 10) if refresh_due(tx, step)]
        [4, 6, 9]
    """
    check_count("step", step)
    answers = {bool(policy.due(step)) for policy in tx.refresh_policies}
    if len(tx.refresh_policies) > 1:
        listed = ", ".join(str(policy) for policy in sorted(tx.refresh_policies, key=str))
        raise RefreshError(
            f"the stages refresh by different policies ({listed}); give them the same "
            "refresh_every and start, or pass refresh=None to decide from the state."
        )
    return answers == {True}
