"""Runs that suffer from something, and what they say of it while they run; and one that is well."""

import json
import random
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from dpo_fast.report import write_report
from tests.support import ranks
from tests.support.metrics import lines_of, series
from tests.support.models import changed, run_tree, write_model

LIKELY, UNLIKELY = "yes, it is so", "no, it is not"


def write(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def pairs(count: int, seed: int, answers) -> list[dict]:
    """Rows with a prompt of their own; answers: the chosen and the rejected of each, by a generator."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        chosen, rejected = answers(draw, index)
        prompt = f"{index}: {draw.randrange(1000)} or {draw.randrange(1000)}? "
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def letters(draw, least: int = 6, most: int = 14) -> str:
    return "".join(draw.choice("abcdefgh") for _ in range(draw.randint(least, most)))


def noisy(draw, index):
    """Nine times of ten the answer with an x is the chosen one: something to learn, and no more."""
    marked, plain = (
        letters(draw) + "x" * draw.randint(1, 2),
        letters(draw) + "y" * draw.randint(1, 2),
    )
    return (marked, plain) if draw.random() < 0.8 else (plain, marked)


def alike(draw, index):
    """Long answers that differ in their last letter."""
    answer = letters(draw, 30, 30)
    return answer + "a", answer + "b"


def longer_mostly(draw, index):
    """The longer answer is the chosen one in 60 %, and nothing else tells them apart."""
    long, short = "a" * draw.randint(12, 16), "a" * draw.randint(4, 8)
    return (long, short) if draw.random() < 0.6 else (short, long)


def any_way(draw, index):
    return letters(draw), letters(draw)


def variants(folder: Path) -> dict[str, dict]:
    base = run_tree(
        folder, global_batch_size=8, learning_rate=3e-4, max_steps=32, lr_scheduler_type="constant"
    )
    base["parallel"] = {"zero_stage": 0}
    base["data"] |= {"train": write(folder / "noisy.jsonl", pairs(272, 0, noisy)), "eval_rows": 16}

    def data(name: str, rows: list[dict], **options) -> dict:
        return {"train": write(folder / f"{name}.jsonl", rows), "eval_rows": 0} | options

    swapped = [
        row | {"reference_chosen_logps": -1.0, "reference_rejected_logps": -1000.0}
        for row in pairs(64, 1, any_way)
    ]
    heavy = [row | {"weight": 1.0} for row in pairs(64, 2, any_way)]
    heavy[5]["weight"] = 1e5
    ill = pairs(70, 3, alike)
    ill += [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in ill[:9]]
    ill += ill[:20]
    long = [
        row | {"chosen": row["chosen"] + " and more of it" * 6} for row in pairs(60, 4, any_way)
    ]
    sections = {
        "well": {},
        "flat": {"train": {"learning_rate": 1e-9}, "data": data("flat", pairs(64, 5, any_way))},
        "rising": {"train": {"learning_rate": 1.0}, "data": data("rising", pairs(256, 5, any_way))},
        "by heart": {
            "train": {"learning_rate": 1e-2, "eval_steps": 8},
            "data": {"train": write(folder / "few.jsonl", pairs(32, 6, any_way)), "eval_rows": 16},
        },
        "opposite": {"data": data("swapped", swapped), "reference": {"provider": "columns"}},
        "easy": {
            "loss": {"beta": 0.5},
            "train": {"learning_rate": 1e-2},
            "data": data("easy", pairs(64, 7, lambda *_: (LIKELY, UNLIKELY))),
        },
        "displaced": {
            "train": {"learning_rate": 3e-3, "eval_steps": 16},
            "data": {"train": write(folder / "alike.jsonl", pairs(80, 8, alike)), "eval_rows": 16},
        },
        "spiky": {"data": data("heavy", heavy), "parallel": {"zero_stage": 1}},
        "drifting": {
            "train": {"learning_rate": 1e-3, "global_batch_size": 16},
            "data": data("drifting", pairs(512, 10, longer_mostly)),
        },
        "ill data": {
            "train": {"max_steps": 1},
            "data": data("ill", ill, eval=write(folder / "same.jsonl", ill[:10])),
        },
        "long": {"train": {"max_steps": 1}, "data": data("long", long, max_length=64)},
    }
    return {name: changed(base, folder / name, **options) for name, options in sections.items()}


# What each must tell; what it may tell besides.
EXPECTED = {
    "well": (set(), set()),
    "flat": ({"loss_flat"}, set()),
    "rising": (
        {"loss_rising", "entropy_collapse"},
        {"loss_flat", "margin_exploding", "gradient_spikes", "chosen_falling"},
    ),
    "by heart": ({"overfitting"}, {"always_chosen"}),
    "opposite": ({"always_rejected", "reference_mismatch"}, {"loss_flat"}),
    "easy": ({"always_chosen", "margin_exploding"}, {"chosen_falling"}),
    "displaced": ({"chosen_falling", "nearly_equal"}, {"always_chosen"}),
    "spiky": ({"gradient_spikes"}, {"loss_flat"}),
    "drifting": ({"length_drift"}, {"loss_flat"}),
    "ill data": ({"duplicates", "contradictory", "nearly_equal", "eval_in_train"}, set()),
    "long": ({"truncated", "length_shortcut"}, set()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("health")
    write_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    trees = variants(folder)
    ranks.train(list(trees.values()))
    return trees


def told(folder: Path) -> dict[str, int]:
    """The findings of a run, with the step at which each was told."""
    return {name: line["step"] for line in lines_of(folder) for name in line.get("health", ())}


@pytest.mark.processes
@pytest.mark.parametrize("name", EXPECTED)
def test_a_run_tells_what_it_suffers_from_and_nothing_else(folder, runs, name):
    must, may = EXPECTED[name]
    found = told(folder / name)
    assert must <= found.keys() <= must | may, found


@pytest.mark.processes
def test_findings_are_counted_and_told_again_in_the_report(folder, runs):
    counts = series(folder / "easy", "health/findings")
    assert counts[1] == 0 and counts[32] >= 2
    page = write_report(folder / "easy").read_text()
    assert "The margin explodes" in page and "the run said" not in page
    assert "the run said" not in write_report(folder / "well").read_text()


@pytest.mark.processes
def test_a_finding_stops_two_ranks_with_a_checkpoint_and_once_only(folder, runs):
    tree = changed(
        runs["flat"],
        folder / "stopped",
        train={"micro_batch_size": 2},
        health={"stop_on": ["loss_flat"]},
        log={"report_to": ["tensorboard"]},
    )
    two = ranks.group(2)
    two.do("stopped_by_health", tree)
    step = told(folder / "stopped")["loss_flat"]
    assert (folder / "stopped" / f"checkpoint-{step}").is_dir()
    assert not (folder / "stopped" / "final").exists() and max(series(folder / "stopped")) == step
    tree["train"]["resume_from_checkpoint"] = True
    two.do("train", [tree])
    assert (folder / "stopped" / "final").exists() and max(series(folder / "stopped")) == 32
    assert [line["step"] for line in lines_of(folder / "stopped") if "health" in line] == [step]
    assert told_to_tensorboard(folder / "stopped") == {"health/loss_flat"}


def told_to_tensorboard(run: Path) -> set[str]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(run / "tensorboard" / run.name))
    reader.Reload()
    tags = {tag.removesuffix("/text_summary") for tag in reader.Tags()["tensors"]}
    return {tag for tag in tags if tag.startswith("health/")}
