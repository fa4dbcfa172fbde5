"""Functions that torch.compile calls itself instead of tracing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["constant_result"]

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_result(function: Function) -> Function:
    """Mark a function that is called while tracing; its result is a constant of the graph.

    What `torch.compiler.assume_constant_result` does, without importing the compiler, which takes
    longer than importing torch.

    Args:
        function: Of constants, not of tensors.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
