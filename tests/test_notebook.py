"""The teaching notebook runs and shows what it says; so do the pages of the documentation."""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import shampoo_func as sf

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "compose_a_chain.ipynb"
PAGES = sorted((ROOT / "docs").glob("*.md"))
SECONDS = 60
PICTURES = 3

# Appended to the notebook: runs of the sweep that it has not repeated itself, alone.
CHECK = """
import json
others = [1, 4, 6]
alone = [float(final_loss(float(rate))) for rate in rates[others]]
print(json.dumps({"swept": swept["Shampoo"][others].tolist(), "alone": alone}))
"""


@pytest.fixture(scope="module")
def executed() -> Any:
    """The notebook with a last cell of ours, after a fresh kernel of this interpreter ran it."""
    with warnings.catch_warnings():
        # Jupyter's own packages warn about their paths, their event loops and each other
        for category in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
            warnings.filterwarnings("ignore", category=category)
        nbclient = importlib.import_module("nbclient")
        nbformat = importlib.import_module("nbformat")
        importlib.import_module("ipykernel")
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        notebook.cells.append(nbformat.v4.new_code_cell(CHECK))
        end = time.monotonic() + SECONDS
        client = nbclient.NotebookClient(
            notebook,
            km=this_interpreter(),
            timeout_func=lambda cell: max(1, round(end - time.monotonic())),
            resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        )
        client.execute(env=environment())
        del client
        gc.collect()  # sockets are closed, and complain, here rather than in some other test
    return notebook


def this_interpreter() -> Any:
    """A kernel manager for this interpreter, whatever kernels are installed on the machine."""
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    class OwnKernel(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=command, display_name="this interpreter", language="python")

    return AsyncKernelManager(kernel_spec_manager=OwnKernel())


def environment() -> dict[str, str]:
    """The environment with this checkout on the path, and the notebook's own backend."""
    variables = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    paths = [str(ROOT), *filter(None, [variables.get("PYTHONPATH")])]
    return {**variables, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def outputs(notebook: Any) -> list[Any]:
    """Everything that the cells put out, in order."""
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.slow
def test_every_cell_runs(executed: Any) -> None:
    """No cell fails or warns, and every cell of code has run."""
    kinds = [output.output_type for output in outputs(executed)]
    assert "error" not in kinds
    said = [output.text for output in outputs(executed) if output.get("name") == "stderr"]
    assert [text for text in said if "Warning" in text] == []
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_pictures(executed: Any) -> None:
    """The spectra, the loss curves and the sweep are drawn."""
    found = [output for output in outputs(executed) if "image/png" in output.get("data", {})]
    assert len(found) >= PICTURES


@pytest.mark.slow
def test_sweep_equals_separate_runs(executed: Any) -> None:
    """Each run of the one vmapped call has the loss of that run alone."""
    result = json.loads(outputs(executed)[-1].text)
    assert len(result["swept"]) == len(result["alone"]) == 3
    assert result["swept"] == pytest.approx(result["alone"], rel=1e-6)


def test_committed_without_outputs() -> None:
    """The file holds no outputs and no counts: they come from running it."""
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert cells
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code on a page runs, from top to bottom; what it would compile, it runs eagerly."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look themselves up
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(code, page.name, "exec"), module.__dict__)


def test_reference_is_complete() -> None:
    """Every public name has its place on the page of the API."""
    page = (ROOT / "docs" / "api.md").read_text()
    shown = set(re.findall(r"^::: shampoo_func\.(?:\w+\.)*(\w+)$", page, re.MULTILINE))
    assert set(sf.__all__) - {"__version__"} - shown == set()
