"""The notebooks of docs/notebooks, run in a kernel of their own.

    python -m tests.support.notebooks  # runs them, and stores what they show

It needs nbclient and ipykernel, installed or in the folder that the variable NBCLIENT names.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path

from tests.support.paths import ROOT

FOLDER = ROOT / "docs/notebooks"
NAMES = ("first_run.ipynb", "own_loss.ipynb")
LIMIT = 300  # seconds that a cell may take, on cores that others use
LIBRARIES = [os.environ["NBCLIENT"]] if "NBCLIENT" in os.environ else []
# Behind everything else, so that nothing of the folder hides what is installed.
KERNEL = (
    f"import sys; sys.path += {LIBRARIES}; from ipykernel import kernelapp as app; "
    "app.launch_new_instance()"
)
sys.path += LIBRARIES


def run(folder: Path, names: tuple[str, ...] = NAMES) -> dict:
    """Notebooks with what they show in a run, by name. One kernel runs all, emptied before each.

    folder: where they run, and write to.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    return asyncio.run(_run(folder, names))


async def _run(folder: Path, names: tuple[str, ...]) -> dict:
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    with tempfile.TemporaryDirectory() as own:
        spec = Path(own) / "kernels/own/kernel.json"
        spec.parent.mkdir(parents=True)
        argv = [sys.executable, "-c", KERNEL, "-f", "{connection_file}"]
        spec.write_text(json.dumps({"argv": argv, "display_name": "own", "language": "python"}))
        specs = KernelSpecManager(kernel_dirs=[str(spec.parents[1])], ensure_native_kernel=False)
        manager = AsyncKernelManager(kernel_name="own", kernel_spec_manager=specs)
        manager.connection_file = f"{own}/connection.json"
        try:
            return {name: await _executed(manager, name, folder, own) for name in names}
        finally:
            if manager.has_kernel:
                await manager.shutdown_kernel()


async def _executed(manager, name: str, folder: Path, own: str):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / name, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=LIMIT,
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": own}
    environment.setdefault("OMP_NUM_THREADS", "1")  # threads wait for each other on busy cores
    environment.pop("MPLBACKEND", None)
    await client.async_execute(env=environment)
    del notebook.cells[0]
    return notebook


def shown(notebook) -> str:
    """All that a notebook's cells show as text."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found.append(output.get("text") or output.get("data", {}).get("text/plain") or "")
    return "\n".join(found)


def stored(notebook):
    """As it is kept: what libraries write to standard error names folders and changes with every run."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells, 1):
        cell.execution_count = number
        cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
    return notebook


if __name__ == "__main__":
    import nbformat

    with tempfile.TemporaryDirectory() as scratch:
        for name, notebook in run(Path(scratch)).items():
            nbformat.write(stored(notebook), FOLDER / name)
