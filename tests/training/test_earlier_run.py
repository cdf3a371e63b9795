"""What an earlier run left in the output folder, and options that need it."""

from pathlib import Path

import pytest

from dpo_fast import UserError
from dpo_fast.training.config import build_config
from dpo_fast.training.earlier_run import check_earlier_run, make_room

NEEDED = {
    "model.path": "checkpoint-6/model",
    "model.tokenizer": "final",
    "model.adapters.sft": "final",
    "reference.path": "final",
    "train.optimizer_from": "checkpoint-6",
}


def run_in(folder: Path) -> None:
    """The files that a run leaves, as far as their names tell."""
    for name in (
        *("checkpoint-6/state.json", "checkpoint-6/model/config.json", "final/config.json"),
        *(
            "final/adapter_config.json",
            "latest",
            "best.json",
            "eval-examples.json",
            "metrics.jsonl",
        ),
        *(
            "generations.jsonl",
            "nonfinite-step-7.json",
            "replay-step-7.json",
            "merged_base/config.json",
        ),
        *("reference/train-1/part-0.parquet", "notes.txt"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


@pytest.mark.parametrize("option", NEEDED)
def test_a_run_does_not_overwrite_what_it_needs_itself(option, tmp_path):
    run_in(tmp_path)
    tree = {"model": {"path": "m", "lora": {}}, "data": {"train": "rows.jsonl"}}
    tree["train"] = {"output_dir": str(tmp_path), "overwrite_output_dir": True}
    section, *names, last = option.split(".")
    place = tree.setdefault(section, {})
    for name in names:
        place = place.setdefault(name, {})
    place[last] = str(tmp_path / NEEDED[option])
    if option == "model.path":
        del tree["model"]["lora"]  # the folder would be read for its adapter
    with pytest.raises(
        UserError, match=f"{option}=.* is of the run that train.overwrite_output_dir"
    ):
        check_earlier_run(build_config(tree, "run.yaml"))
    tree["train"]["output_dir"] = str(tmp_path / "other")
    check_earlier_run(build_config(tree, "run.yaml"))


def test_nothing_is_left_that_would_be_taken_for_the_new_runs(tmp_path):
    """What serves any run stays: references, a merged base, and files of other hands."""
    run_in(tmp_path)
    make_room(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"metrics-earlier.jsonl", "merged_base", "reference", "notes.txt"}
