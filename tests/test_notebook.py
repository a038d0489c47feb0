"""The notebook runs from top to bottom in a fresh kernel, and what it prints is what its text claims."""

import os
import re
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "ten-minutes.ipynb"


@pytest.fixture(scope="module")
def printed() -> str:
    """What the cells print, one after the other."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    from jupyter_client import KernelManager
    from jupyter_client.kernelspec import KernelSpec

    # this very interpreter, whatever kernels are installed
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager = KernelManager(transport="ipc" if os.name == "posix" else "tcp")
    manager._kernel_spec = KernelSpec(argv=command, display_name="Python 3", language="python")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    done = nbclient.NotebookClient(notebook, km=manager, timeout=300).execute()
    return "".join(o.get("text", "") for cell in done.cells for o in cell.get("outputs", []))


@pytest.mark.long
def test_equal_things_are_equal_to_rounding(printed):
    differences = [float(text) for text in re.findall(r"greatest difference: (\S+)", printed)]
    assert len(differences) == 4 and max(differences) < 1e-10 and any(differences)


@pytest.mark.long
def test_both_networks_learn(printed):
    found = re.findall(r"(\w+-20): loss ([\d.]+) in the first five steps, ([\d.]+) in the last", printed)
    assert [name for name, _, _ in found] == ["ResNet-20", "DSNet-20"]
    assert all(float(last) < 0.8 * float(first) for _, first, last in found)


@pytest.mark.long
def test_it_is_stored_without_outputs():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert '"outputs": []' in text and not re.search(r'"outputs": \[\s*\{', text)
