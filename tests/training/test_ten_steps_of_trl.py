"""Ten steps of our trainer and of TRL's own, from the same weights over the same pairs: the same losses."""

import json

import pytest

pytest.importorskip("trl")

import trl
from datasets import Dataset
from transformers import AutoTokenizer

from dpo_fast.data.sampler import Sampler
from tests.support import ranks
from tests.support.metrics import series
from tests.support.models import run_tree, write_model, write_pairs

pytestmark = [pytest.mark.processes, pytest.mark.peers]

STEPS, PAIRS, SEED, LEARNING_RATE, EPSILON = 10, 8, 42, 1e-3, 1e-3
LOSSES = {"sigmoid": {}, "ipo": {}, "hinge": {}, "robust": {"label_smoothing": 0.1}, "apo_zero": {}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ten")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", count=32)
    return folder


@pytest.fixture(scope="module")
def ours(place) -> dict[str, list[float]]:
    """All runs: the losses of their steps, by name."""
    trees = []
    for name, options in LOSSES.items():
        tree = run_tree(
            place,
            output_dir=str(place / name),
            global_batch_size=PAIRS,
            micro_batch_size=4,
            seed=SEED,
            max_steps=STEPS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            adam_epsilon=EPSILON,
        )
        trees.append(tree | {"loss": {"type": name, "beta": 0.1} | options})
    ranks.train(trees)
    return {name: list(series(place / name).values()) for name in LOSSES}


def in_our_order(place) -> Dataset:
    """The pairs as our trainer takes them, one step's after the other's."""
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    sampler = Sampler(len(rows), PAIRS, PAIRS, 1, SEED, True, 0)
    order = [row for step in range(STEPS) for row in sampler.global_batch(step)]
    assert order[: len(rows)] != sorted(order[: len(rows)])
    return Dataset.from_list([rows[row] for row in order])


@pytest.mark.parametrize("name", LOSSES)
def test_ten_steps_of_trl_are_ten_of_ours(name, ours, place, tmp_path):
    args = trl.DPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=PAIRS,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        adam_epsilon=EPSILON,
        gradient_checkpointing=False,
        loss_type=name,
        beta=0.1,
        **LOSSES[name],
    )
    trainer = trl.DPOTrainer(
        model=str(place / "model"),
        args=args,
        train_dataset=in_our_order(place),
        processing_class=AutoTokenizer.from_pretrained(place / "model"),
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == STEPS
    assert abs(theirs[0] - theirs[-1]) > 0.01  # ten steps of something
    assert ours[name] == pytest.approx(theirs, abs=1e-4, rel=1e-4)
