"""A dry run: it does all that comes before the first step, and a later run does not notice it."""

import hashlib
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from tests.support import ranks
from tests.support.metrics import series
from tests.support.models import changed, run_tree, write_model, write_pairs

pytestmark = pytest.mark.processes


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder but for the stored reference, by its hash."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and "reference" not in file.parts
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opening")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 20)
    tree = run_tree(folder, max_steps=2, save_steps=1)
    return changed(tree, folder / "run", data={"eval_rows": 4}, parallel={"zero_stage": 0})


def test_a_dry_run_checks_all_and_leaves_the_reference_alone(tree):
    group, folder = ranks.group(1), Path(tree["train"]["output_dir"])
    before = len(group.said())
    group.do("dry_run", tree)
    said = group.said()[before:]
    assert not content(folder) and (folder / "reference").is_dir()
    for words in ("memory of a rank, roughly: ", "head torch: ", "step 0: loss 0.693", "dry run: "):
        assert words in said, words
    assert "eval step" not in said and "step 1 of" not in said and "\x1b" not in said
    group.do("train", [tree])
    assert max(series(folder)) == 2 and (folder / "final").is_dir()
    there, before = content(folder), len(group.said())
    for options in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": True}):
        group.do("dry_run", changed(tree, folder, train=options))
    assert content(folder) == there
    said = group.said()[before:]
    assert "checkpoint-2 fits" in said and "computing the reference" not in said
    # The run has ended: no step comes, unless it is made longer.
    assert "the run ended after step 2 of 2" in said and "train.max_steps" in said
    first, ended = said.split("the run ended")
    assert "the next step would have" in first and "next step" not in ended
    before, longer = len(group.said()), {"resume_from_checkpoint": True, "max_steps": 3}
    group.do("dry_run", changed(tree, folder, train=longer))
    said = group.said()[before:]
    assert "go on after step 2" in said and "the next step would have" in said


def test_two_ranks_rehearse_together(tree):
    case = changed(tree, Path(tree["train"]["output_dir"]).with_name("two"))
    ranks.group(2).do("dry_run", case)
    assert not content(Path(case["train"]["output_dir"]))
