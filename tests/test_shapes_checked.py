"""The rooms of tensors under run-time shape checks, in sessions of their own.

jaxtyping's hook wraps every function of `linalg` and `blocks`, which full-graph compilation does
not see through; so it is never installed in the session that runs the other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOMS = ("shampoo_func.linalg", "shampoo_func.blocks")

PRELUDE = f"""
from jaxtyping import TypeCheckError, install_import_hook
with install_import_hook({ROOMS!r}, "beartype.beartype"):
    import shampoo_func as sf
    from shampoo_func import blocks, linalg, torch_optim  # rooms are imported when first used
import torch
"""

RIGHT = """
for shape in ((3, 3), (2, 3, 3), (2, 5, 3, 3)):
    for make in (
        sf.auto_root, sf.chebyshev_root, sf.cholesky_root, sf.eigh_root,
        sf.higher_order_newton_root, sf.newton_db_root, sf.newton_root, sf.newton_schulz_root,
    ):
        assert make()(torch.eye(3).expand(shape), 0.5).value.shape == shape
cutoff = sf.PseudoInverse().cutoff(torch.ones(2, 3))
assert cutoff.shape == (2, 1)
for shape in ((4,), (4, 3), (2, 3, 4)):
    block, stack = torch.randn(shape), torch.randn(5, *shape)
    for tensor in (block, stack):
        for dim, size in enumerate(shape):
            gram = linalg.gram(tensor, dim, len(shape))
            assert gram.shape[-2:] == (size, size)
            assert linalg.multiply(tensor, gram, dim, len(shape)).shape == tensor.shape
params = {"a": torch.randn(5, 3), "b": torch.randn(4), "c": torch.randn(2, 3, 4), "d": None}
params["d"] = torch.randn(())
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    own = {name: leaf.to(dtype) for name, leaf in params.items()}
    tx = sf.shampoo(0.1, block_size=3, refresh_every=1)
    updates, state = tx.update(own, tx.init(own), own)
    missing = {**own, "a": None}
    updates, state = tx.update(missing, state, own)
    for shape in ((3, 3), (2, 3), (2, 4, 3)):
        for method in (sf.newton_schulz_polar(), sf.polar_express(), sf.svd_polar()):
            assert method(torch.ones(shape, dtype=dtype)).shape == shape
            torch.func.vmap(method)(torch.ones(2, *shape, dtype=dtype))
    torch.func.vmap(lambda leaf: sf.eigh_root()(leaf, 0.5).value)(torch.eye(3).expand(2, 3, 3))
"""

WRONG = {
    "root of a rectangle": "sf.eigh_root()(torch.ones(2, 3), 0.5)",
    "root of a vector": "sf.eigh_root()(torch.ones(3), 0.5)",
    "root of integers": "sf.eigh_root()(torch.ones(3, 3, dtype=torch.int64), 0.5)",
    "polar factor of a vector": "sf.svd_polar()(torch.ones(3))",
    "iteration of integers": "sf.newton_schulz_polar()(torch.ones(3, 3, dtype=torch.int64))",
    "cutoff of a number": "sf.PseudoInverse().cutoff(torch.tensor(1.0))",
    "product with a rectangle": "linalg.multiply(torch.ones(1, 2, 3), torch.ones(1, 3, 2), 1, 2)",
    "product of integers": (
        "linalg.multiply(torch.ones(1, 2, 3, dtype=torch.int64), torch.eye(3)[None], 1, 2)"
    ),
    "Gram matrix of integers": "linalg.gram(torch.ones(1, 2, 3, dtype=torch.int64), 0, 2)",
    "Gram matrix along a name": "linalg.gram(torch.ones(1, 2, 3), 'rows', 2)",
    "stack without blocks": (
        "blocks.scatter(sf.blocked(sf.trace(0.9)).plan(torch.ones(2)),"
        " {'2': torch.tensor(1.0)}, [torch.ones(2)])"
    ),
    "stack of integers": (
        "blocks.scatter(sf.blocked(sf.trace(0.9)).plan(torch.ones(2)),"
        " {'2': torch.ones(1, 2, dtype=torch.int64)}, [torch.ones(2)])"
    ),
}

# Answers with the names of the calls that were let through.
ASK_ALL = f"""
let_through = []
for name, call in {WRONG!r}.items():
    try:
        eval(call)
    except TypeCheckError:
        continue
    except Exception:
        pass
    let_through.append(name)
print(";".join(let_through))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python at the root of the project, on one thread."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
        check=False,
    )


@pytest.fixture(scope="module")
def let_through() -> set[str]:
    """The wrongly shaped calls that raise no shape error under the hook."""
    done = python("-c", PRELUDE + ASK_ALL)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.strip().split(";"))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shape_is_caught(name: str, let_through: set[str]) -> None:
    """A call with a wrong shape or dtype does not get past the annotations."""
    assert name not in let_through


def test_right_shapes_pass() -> None:
    """Roots, Gram matrices, products and a whole update satisfy every annotation."""
    done = python("-W", "error", "-c", PRELUDE + RIGHT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_block_tests_pass_under_shape_checks() -> None:
    """The random trees of test_blocks.py satisfy every annotation."""
    hook = f"--jaxtyping-packages={','.join(ROOMS)},beartype.beartype"
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", hook, "tests/test_blocks.py")
    assert done.returncode == 0, done.stdout + done.stderr
