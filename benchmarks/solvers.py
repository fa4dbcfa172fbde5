"""Error and time of every inverse root solver: `python -m benchmarks.solvers --help`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shampoo_func as sf
from benchmarks.timing import Job, by_clock, interleave

__all__ = ["CASES", "SOLVERS", "main"]

# Damping relative to |A|_F: what each dtype can tell from zero, with room.
RIDGE = {torch.float32: 1e-6, torch.float64: 1e-12}
OFFSET = 1e-2
# Matrices per stack and timed rounds, by size.
STACKS = {32: (64, 15), 64: (32, 15), 128: (16, 9), 256: (4, 5), 512: (2, 3), 1024: (1, 1)}
# All matrices are tried at these sizes, and only the condition of 1e6 at the others: at n = 1024
# a Newton root takes seconds, and the whole run is to end within minutes.
ALL_CASES_AT = (32, 256)
EVERYWHERE = "condition 1e6"


def _with(make: Any, **options: Any) -> Callable[[float], Any]:
    return lambda epsilon: make(epsilon, **options)


SOLVERS: dict[str, Callable[[float], Any]] = {
    "eigh": _with(sf.eigh_root),
    "eigh in float64": _with(sf.eigh_root, compute_dtype=torch.float64),
    "newton": _with(sf.newton_root, relative_epsilon=0.0),
    "newton, 15 steps": _with(sf.newton_root, relative_epsilon=0.0, iterations=15),
    "higher-order newton": _with(sf.higher_order_newton_root, relative_epsilon=0.0),
    "newton-db": _with(sf.newton_db_root, relative_epsilon=0.0),
    "newton-schulz": _with(sf.newton_schulz_root, relative_epsilon=0.0),
    "newton-schulz, cans": _with(sf.newton_schulz_root, relative_epsilon=0.0, coefficients="cans"),
    "chebyshev, degree 40": _with(sf.chebyshev_root, offset=OFFSET, degree=40),
    "cholesky": _with(sf.cholesky_root, relative_epsilon=0.0),
}


def _spectra(size: int) -> dict[str, Tensor]:
    """Return the eigenvalues of every kind of matrix, float64 `[n]`."""

    def logarithmic(condition: float) -> Tensor:
        return torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size).double()

    clustered = torch.ones(size, dtype=torch.float64)
    clustered[size // 3 :] = 1e-2
    clustered[2 * size // 3 :] = 1e-4 * (1 + 1e-9 * torch.arange(size - 2 * size // 3))
    deficient = logarithmic(1e2)
    deficient[size // 4 :] = 0.0
    return {
        **{f"condition 1e{k}": logarithmic(10.0**k) for k in (2, 4, 6, 8, 10)},
        "rank n/4": deficient,
        "zero": torch.zeros(size, dtype=torch.float64),
        "clustered": clustered,
        "1e-30, condition 1e4": 1e-30 * logarithmic(1e4),
        "1e30, condition 1e4": 1e30 * logarithmic(1e4),
    }


CASES = tuple(_spectra(8))


@dataclass(frozen=True, slots=True)
class Problem:
    """A matrix, how it is damped, and what is known of it."""

    matrix: Tensor
    epsilon: float
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, case: str, size: int, dtype: torch.dtype) -> Problem:
        """Return a matrix of that kind, with eigenvectors that are the same for every kind."""
        generator = torch.Generator().manual_seed(size)
        noise = torch.randn(size, size, dtype=torch.float64, generator=generator)
        vectors, values = torch.linalg.qr(noise)[0], _spectra(size)[case]
        matrix = ((vectors * values) @ vectors.mT).to(dtype)
        if dtype == torch.float32:
            # what the rounding to float32 did to the matrix is no error of the solver
            values, vectors = torch.linalg.eigh(matrix.double())
        return cls(matrix, RIDGE[dtype] * (float(values.norm()) or 1.0), values, vectors)

    def root(self, exponent: float, ridge: float) -> Tensor:
        """Return (A + ridge I)^(-p) in float64."""
        powers = (self.values + ridge).pow(-exponent)
        return (self.vectors * powers) @ self.vectors.mT

    def error(self, name: str, exponent: float) -> float | None:
        """Return the relative error of a solver's root; None where it says that it failed."""
        value, residual, ok = SOLVERS[name](self.epsilon)(self.matrix, exponent)
        if not bool(torch.isfinite(value).all() & torch.isfinite(residual)) and bool(ok):
            raise RuntimeError(f"{name} returned a value that is not finite with ok set.")
        if not bool(ok):
            return None
        value, ridge = value.double(), self.epsilon
        if name == "cholesky":  # known but for a rotation, which is not in W^T W
            value, exponent = value.mT @ value, 1.0
        if name.startswith("chebyshev"):  # what it sets out to compute
            matrix = self.matrix.double() + ridge * torch.eye(len(value), dtype=torch.float64)
            largest = min(float(matrix.norm()), float(matrix.abs().sum(-1).amax()))
            ridge += OFFSET * largest
        expected = self.root(exponent, ridge)
        # both are divided first: squares of 1e30 are squares of what float64 has room for
        return float((value - expected).norm() / expected.norm())


def _exponents(name: str) -> tuple[float, ...]:
    return (0.5,) if name == "cholesky" else (0.5, 0.25)


def errors(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Measure the relative error of every solver on every matrix."""
    rows = []
    for size in sizes:
        cases = CASES if size in ALL_CASES_AT or size < min(ALL_CASES_AT) else (EVERYWHERE,)
        for dtype in RIDGE:
            for case in cases:
                problem = Problem.of(case, size, dtype)
                for name in SOLVERS:
                    if name == "eigh in float64" and dtype == torch.float64:
                        continue
                    # the slowest sizes have one exponent
                    for exponent in _exponents(name)[-1 if size > 512 else 0 :]:
                        row = {"n": size, "dtype": _name(dtype), "case": case, "solver": name}
                        error = problem.error(name, exponent)
                        rows.append({**row, "exponent": exponent, "error": error})
    return rows


def times(sizes: Sequence[int], rounds: int | None = None) -> list[dict[str, Any]]:
    """Time every solver on a stack of condition 1e6, in batched products of the same stack."""
    rows = []
    for size in sizes:
        count, usual = STACKS.get(size, (4, 9))
        for dtype in RIDGE:
            problem = Problem.of(EVERYWHERE, size, dtype)
            stack = problem.matrix.expand(count, size, size).contiguous()

            def product(number: int, stack: Tensor = stack) -> object:
                return stack @ stack

            jobs = [Job("product", "", product)]
            for name, make in SOLVERS.items():
                solver, exponent = make(problem.epsilon), _exponents(name)[-1]

                def solve(
                    number: int, solver: Any = solver, p: float = exponent, stack: Tensor = stack
                ) -> object:
                    return solver(stack, p)

                jobs.append(Job(name, "", solve))
            unit, *measured = interleave(
                jobs, rounds or usual, by_clock(time.thread_time), warmup=1
            )
            rows += [
                {
                    "n": size,
                    "batch": count,
                    "dtype": _name(dtype),
                    "solver": found.job.case,
                    "products": found.median / unit.median,
                    "ms_per_matrix": 1e3 * found.median / count,
                    "product_ms": 1e3 * unit.median / count,
                    "rounds": len(found.samples),
                }
                for found in measured
            ]
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(result: dict[str, Any]) -> str:
    """Return the tables in Markdown."""
    parts = [
        "# Inverse root solvers: time and error",
        f"{result['date']}, {result['machine']}, one thread, torch {result['torch']}. "
        "Written by `make bench-solvers`.",
        "## Time, in batched products of the same stack",
        "A^(-1/4) (`cholesky`: A^(-1/2)) of a stack of condition 1e6; medians of rounds in which "
        "every solver and the product run once; CPU time of the thread. In brackets "
        "milliseconds per matrix. Time budget: at n = 1024 one round, after one that warms up.",
    ]
    timed = result["times"]
    for dtype in map(_name, RIDGE):
        sizes = sorted({row["n"] for row in timed})
        cells = {
            (row["solver"], row["n"]): f"{row['products']:.3g} ({row['ms_per_matrix']:.3g})"
            for row in timed
            if row["dtype"] == dtype
        }
        units = {row["n"]: row["product_ms"] for row in timed if row["dtype"] == dtype}
        head = [dtype, *(f"n={n}: products (ms)" for n in sizes)]
        rows = [["one product", *(f"1 ({units[n]:.3g})" for n in sizes)]]
        rows += [[name, *(cells[name, n] for n in sizes)] for name in SOLVERS]
        parts.append(_table(head, rows))
    parts += [
        "## Relative error (Frobenius)",
        "Every matrix A has the ridge 1e-6 |A|_F in float32 and 1e-12 |A|_F in float64 (1e-6 "
        "and 1e-12 for the zero matrix), given as `epsilon`; errors are those of "
        "(A + ridge I)^(-p). In float32 the truth is the float64 eigendecomposition of the "
        "rounded matrix, in float64 the spectrum that the matrix was made from. `cholesky` is "
        f"compared by W^T W with the inverse, `chebyshev` with its own (A + {OFFSET} s I)^(-p). "
        "**not ok** means that the solver itself said so; a solver that returned a value that "
        "is not finite with its ok flag set would have ended the run. Newton-Schulz's "
        "coefficients are made for ridges of 1e-6 |A|_F, and 15 Newton steps for less than "
        "condition 1e6. Time budget: all kinds of matrices at n = 32 and 256, condition 1e6 at "
        "the other sizes, one exponent at n = 1024.",
    ]
    for (size, name, exponent), group in _grouped(result["errors"]).items():
        solvers = [solver for solver in SOLVERS if any(row["solver"] == solver for row in group)]
        found = {(row["case"], row["solver"]): row["error"] for row in group}
        cases = [case for case in CASES if any(row["case"] == case for row in group)]
        body = [[solver, *(_shown(found[case, solver]) for case in cases)] for solver in solvers]
        parts.append(f"### n = {size}, {name}, A^(-{exponent})")
        parts.append(_table(["", *cases], body))
    return "\n\n".join(parts) + "\n"


def _shown(error: float | None) -> str:
    return "not ok" if error is None else f"{error:.0e}"


def _grouped(rows: list[dict[str, Any]]) -> dict[tuple[int, str, float], list[dict[str, Any]]]:
    groups: dict[tuple[int, str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["n"], row["dtype"], row["exponent"]), []).append(row)
    return groups


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and write them as Markdown and JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solvers", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 128, 256, 512, 1024])
    parser.add_argument("--rounds", type=int, help="timed rounds, instead of 1 to 15 by size")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU",
        "torch": torch.__version__,
        "times": times(options.sizes, options.rounds),
        "errors": errors(options.sizes),
    }
    text = report(result)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "solvers.md").write_text(text)
    (options.output / "solvers.json").write_text(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
