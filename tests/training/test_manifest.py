"""A checkpoint that was altered is refused before anything of it is loaded, with what was altered."""

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.errors import UserError
from dpo_fast.training import manifest
from dpo_fast.training.checkpoints import check_whole, find_checkpoint
from tests.support import damage, ranks
from tests.support.models import changed, run_tree, write_model, write_pairs

SLOW = os.environ.get("DPO_FAST_SLOW") == "1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three steps, with a checkpoint of each; at every stage if there is time."""
    folder = tmp_path_factory.mktemp("altered")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 20)
    ranks.train(list(trees(folder).values()))
    return folder


def trees(folder: Path) -> dict[int, dict]:
    base = run_tree(folder, max_steps=3, micro_batch_size=2, save_steps=1, save_total_limit=3)
    base["model"]["dtype"] = "bf16"
    return {
        stage: changed(base, folder / f"zero{stage}", parallel={"zero_stage": stage})
        for stage in (range(4) if SLOW else (1,))
    }


@pytest.fixture
def run(folder, tmp_path):
    """A copy of the run at stage 1, which has files of every kind."""
    shutil.copytree(folder / "zero1", tmp_path / "run")
    return tmp_path / "run"


def refusal(root: Path) -> str:
    """What is said when a run shall go on from the latest checkpoint of a folder; empty if it may."""
    try:
        check_whole(find_checkpoint(True, str(root)))
    except UserError as error:
        return str(error)
    return ""


def check_altered(root: Path, name: str, kind: str, draw: random.Random) -> str:
    """Alter a file of the latest of three checkpoints.

    Returns:
        The refusal, or nothing if nothing changed.
    """
    folder = root / "checkpoint-3"
    before = (folder / name).read_bytes()
    damage.ALTERATIONS[kind](folder / name, root / "checkpoint-2" / name, draw)
    if (folder / name).is_file() and (folder / name).read_bytes() == before:
        return ""
    said = refusal(root)
    assert f"checkpoint-3 is damaged: {name}" in said, (kind, said)
    remedy = f"to go on as train.resume_from_checkpoint={root}/checkpoint-2"
    assert said.endswith(f"checkpoint-2 is whole: take {root}/checkpoint-2, {remedy}")
    assert len(said) < 1000 and not list(root.rglob("ran"))
    return said


@pytest.mark.processes
@pytest.mark.parametrize("kind", damage.ALTERATIONS)
def test_an_altered_file_is_named(run, kind):
    draw = random.Random(kind)
    assert not refusal(run)
    names = damage.files_of(run / "checkpoint-3")
    assert {manifest.NAME, "state.json", "rank-0.pt"} < set(names)
    name = draw.choice([name for name in names if not name.endswith(".py")])
    assert check_altered(run, name, kind, draw)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.skipif(not SLOW, reason="200 altered checkpoints: set DPO_FAST_SLOW=1")
def test_two_hundred_altered_checkpoints(folder, tmp_path):
    draw, counts = random.Random(0), Counter()
    while counts.total() < 200:
        root = tmp_path / f"run{counts.total()}"
        shutil.copytree(folder / f"zero{draw.randrange(4)}", root)
        kind = draw.choice(list(damage.ALTERATIONS))
        name = draw.choice(damage.files_of(root / "checkpoint-3"))
        counts[kind] += bool(check_altered(root, name, kind, draw))
        shutil.rmtree(root)
    print(f"altered checkpoints: {counts.total()} of {counts.total()} named: {dict(counts)}")


@pytest.mark.processes
def test_a_run_whose_checkpoint_lost_its_state_does_not_begin_again(folder, run):
    metrics = (run / "metrics.jsonl").read_bytes()
    (run / "checkpoint-3" / "state.json").unlink()
    tree = changed(trees(folder)[1], run)
    tree["train"]["resume_from_checkpoint"] = True
    said = ranks.refusal(tree)
    assert "checkpoint-3 is damaged: state.json is missing" in said and "checkpoint-2 is" in said
    assert (run / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.processes
def test_a_file_that_does_not_belong_to_it_is_named(run):
    extra = run / "checkpoint-3" / "engine" / "mp_rank_01_model_states.pt"
    shutil.copyfile(extra.with_name("mp_rank_00_model_states.pt"), extra)
    said = refusal(run)
    assert (
        "checkpoint-3 holds what the run did not write: engine/mp_rank_01_model_states.pt" in said
    )
    assert "move it away" in said and "is damaged" not in said
    extra.rename(run / "checkpoint-3" / ".DS_Store")  # as file managers leave
    assert refusal(run) == ""


@pytest.mark.processes
def test_a_checkpoint_under_the_name_of_another_step_is_told(run):
    shutil.rmtree(run / "checkpoint-3")
    (run / "checkpoint-2").rename(run / "checkpoint-3")
    said = refusal(run)
    assert (
        "checkpoint-3 is damaged: manifest.json is of step 2." in said
        and "checkpoint-1 is whole" in said
    )


@pytest.mark.processes
def test_a_latest_that_is_gone_is_told(run):
    shutil.rmtree(run / "checkpoint-3")
    said = refusal(run)
    assert "checkpoint-3 is damaged: the folder is gone" in said and "checkpoint-2 is whole" in said
    for step in (1, 2):
        (run / f"checkpoint-{step}" / "state.json").unlink()
    assert "no other checkpoint is whole: begin again" in refusal(run)


@pytest.mark.processes
def test_a_later_checkpoint_that_is_whole_is_named(run):
    (run / "checkpoint-1" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="checkpoint-1 is damaged: .* checkpoint-3 is whole: take"):
        check_whole(run / "checkpoint-1")


@pytest.mark.processes
def test_a_checkpoint_without_manifest_is_of_an_older_version(run):
    (run / "checkpoint-3" / manifest.NAME).unlink()
    assert "only that version can resume it" in refusal(run)


@pytest.mark.processes
def test_a_manifest_without_end_is_not_read(run):
    with (run / "checkpoint-3" / manifest.NAME).open("r+b") as file:
        file.truncate(1 << 40)
    assert "manifest.json is damaged: it has 1,099,511,627,776 bytes" in refusal(run)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["../outside.pt", "/etc/passwd"])
def test_a_manifest_names_files_of_its_folder_only(run, name):
    known = manifest.read_manifest(run / "checkpoint-3")
    planted = manifest.Manifest(known.run, 3, known.files | {name: manifest.Entry(1, "x")})
    manifest.write_manifest(run / "checkpoint-3", planted)
    assert f"{name!r} lies outside of the folder" in refusal(run)


def stages() -> list:
    """Stage 1 has files of every kind, and the others are for when there is time."""
    late = pytest.mark.skipif(not SLOW, reason="every stage: set DPO_FAST_SLOW=1")
    return [1, *(pytest.param(stage, marks=[pytest.mark.slow, late]) for stage in (0, 2, 3))]


@pytest.mark.processes
@pytest.mark.parametrize("stage", stages())
def test_no_pickle_runs_even_if_the_manifest_fits(folder, tmp_path, stage):
    """A manifest is no signature. Real loading, DeepSpeed's own included, makes tensors only."""
    names = [n for n in damage.files_of(folder / f"zero{stage}/checkpoint-2") if n.endswith(".pt")]
    assert len(names) == (2 if stage == 0 else 3)
    for name in names:
        root = tmp_path / name.replace("/", "-")
        shutil.copytree(folder / f"zero{stage}", root)
        damage.plant_with_manifest(root / "checkpoint-3", name, root / "ran")
        assert not refusal(root), "the manifest fits"
        tree = changed(trees(folder)[stage], root)
        tree["train"] |= {"resume_from_checkpoint": True, "max_steps": 3}
        said = ranks.refusal(tree)
        assert f"{name} cannot be read: it is damaged, or holds Python objects" in said
        assert not (root / "ran").exists()
        torch.load(root / "checkpoint-3" / name, weights_only=False)
        assert (root / "ran").exists(), "the pickle would not have run: nothing was tested"
