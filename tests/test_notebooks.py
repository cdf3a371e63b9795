"""The notebooks of docs/notebooks run as they stand, in a kernel, and show what they say."""

import importlib.util
import json
import re

import pytest

from tests.support import notebooks

pytest.importorskip("deepspeed")
pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
KERNEL = all(importlib.util.find_spec(name) for name in ("nbclient", "ipykernel"))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(
    not KERNEL, reason="nbclient and ipykernel are not installed, and NBCLIENT names no folder"
)
def test_the_notebooks_run_and_show_what_they_say(tmp_path):
    pytest.importorskip("trl")
    done = notebooks.run(tmp_path)
    for name, notebook in done.items():
        shown = notebooks.shown(notebook)
        assert "Setting accelerator" not in shown and "<Figure size" in shown, name
        sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        assert not any(re.search(r"https?://|/tmp/|/home/", source) for source in sources)
    first = notebooks.shown(done["first_run.ipynb"])
    # Single words before, whole sentences after; and so the model that was saved.
    changed = re.findall(r"say\?': \('\w+', 'The (\w+) says \w+\.'\)", first)
    assert len(changed) == 8, first
    assert first.rstrip().endswith("'The cow says moo.'")
    own = notebooks.shown(done["own_loss.ipynb"])
    lines = re.findall(r"^(\d) +(\d\.\d+) +(\d\.\d+)$", own, re.M)
    assert len(lines) == 6
    for _, ours, theirs in lines:
        assert float(ours) == pytest.approx(float(theirs), abs=1e-5)
    assert float(lines[0][1]) > 4 * float(lines[-1][1]) > 0  # it was trained


def test_what_is_stored_is_of_a_run_and_names_no_machine():
    for name in notebooks.NAMES:
        file = notebooks.FOLDER / name
        cells = [c for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        assert any("image/png" in o.get("data", {}) for cell in cells for o in cell["outputs"])
        assert not any(o.get("name") == "stderr" for cell in cells for o in cell["outputs"])
        assert not re.search(r"/(tmp|root|home|work)/", file.read_text()), name
        assert len(file.read_bytes()) < 300_000
        links = re.findall(r"\]\(([^):#]+)\)", file.read_text())
        assert all((file.parent / link).exists() for link in links), name
