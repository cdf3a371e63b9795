"""Schedules of the learning rate: each of transformers' names is honoured exactly, or refused by name."""

import pytest
import torch
import yaml

pytest.importorskip("transformers")

from transformers import SchedulerType, get_scheduler

from dpo_fast.errors import UserError
from dpo_fast.training.config import build_config
from dpo_fast.training.prepare import check_total
from dpo_fast.training.schedule import FOLLOW_A_METRIC, build_schedule
from tests.support import ranks
from tests.support.metrics import series
from tests.support.models import run_tree, write_model, write_pairs

RATE, STEPS, WARM_UP = 1e-3, 40, 4
HONOURED = [  # name, numbers
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 0.25}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 100}),
    ("cosine_with_min_lr", {"min_lr": 1e-4}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.5}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 0.0, "warmup_lr_rate": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 10}),
    ("warmup_stable_decay", {"num_decay_steps": 10, "num_stable_steps": 26, "min_lr_ratio": 0.1}),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 9, "warmup_type": "cosine", "decay_type": "1-sqrt"},
    ),
]


def config(name: str, numbers: dict | None = None, **train):
    train = {"output_dir": "o", "learning_rate": RATE, "lr_scheduler_type": name} | train
    train |= {} if numbers is None else {"lr_scheduler_kwargs": numbers}
    return build_config(
        {"model": {"path": "m"}, "data": {"train": "t.jsonl"}, "train": train}, "run"
    )


def rates(make) -> list[float]:
    """The rate of every step, by an optimiser that takes them."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=RATE)
    schedule, found = make(optimizer), []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
@pytest.mark.parametrize(("name", "numbers"), HONOURED)
def test_the_rates_are_those_of_transformers(name, numbers):
    run = config(name, numbers, max_steps=STEPS)
    check_total(run, STEPS)
    ours = rates(lambda optimizer: build_schedule(run.train.schedule, optimizer, STEPS))
    theirs = rates(lambda optimizer: get_scheduler(name, optimizer, WARM_UP, STEPS, dict(numbers)))
    assert ours == theirs
    assert name == "constant" or len(set(ours)) > 3
    again = build_config(run.resolved(), "resolved")
    assert again.train.schedule == run.train.schedule


def test_every_name_is_honoured_or_refused():
    names = {each.value for each in SchedulerType}
    assert {name for name, _ in HONOURED} == names - set(FOLLOW_A_METRIC)
    for name in sorted(names & set(FOLLOW_A_METRIC)):
        with pytest.raises(UserError, match=f"lr_scheduler_type={name} cannot be honoured"):
            config(name)


@pytest.mark.parametrize("steps", [0, 7, STEPS])
def test_warm_up_by_steps_is_that_of_transformers(steps):
    run = config("cosine", warmup_steps=steps, max_steps=STEPS)
    ours = rates(lambda optimizer: build_schedule(run.train.schedule, optimizer, STEPS))
    assert ours == rates(lambda optimizer: get_scheduler("cosine", optimizer, steps, STEPS))
    again = build_config(run.resolved(), "resolved")
    assert again.train.schedule == run.train.schedule


REFUSED = {  # name, numbers, other options: what is said
    "none of two": ("cosine_with_min_lr", {}, {}, "One of min_lr or min_lr_rate"),
    "both of two": (
        "cosine_with_min_lr",
        {"min_lr": 0, "min_lr_rate": 0},
        {},
        "Only one of min_lr",
    ),
    "missing": (
        "warmup_stable_decay",
        None,
        {},
        "needs num_decay_steps: set train.lr_scheduler_kw",
    ),
    "misspelt": (
        "cosine_with_min_lr",
        {"min_rl": 0},
        {},
        "min_rl=0 is not used by .* mean min_lr?",
    ),
    "of another": (
        "linear",
        {"min_lr": 1e-5},
        {},
        "min_lr=1e-05 is not used by linear, which takes no",
    ),
    "ignored by transformers": ("constant", {"power": 2}, {}, "power=2 is not used by constant"),
    "our own": ("cosine", {"num_warmup_steps": 5}, {}, "train.warmup_ratio says how long"),
    "a position": ("cosine", {"last_epoch": 5}, {}, "train.resume_from_checkpoint goes on"),
    "above the peak": ("cosine_with_min_lr", {"min_lr": 0.1}, {}, "gives a rate of .* the peak"),
    "a share above 1": (
        "cosine_with_min_lr",
        {"min_lr_rate": 2},
        {},
        "gives a rate of .* the peak",
    ),
    "below 0": ("cosine_with_min_lr", {"min_lr": -1e-4}, {}, "gives a rate of 0 in"),
    "end above the peak": ("polynomial", {"lr_end": 1e-2}, {}, "must be smaller than initial lr"),
    "no number": ("polynomial", {"power": "high"}, {}, "power=high: expected a number"),
    "a flag": ("polynomial", {"power": True}, {}, "power=True: expected a number"),
    "no end": (
        "warmup_stable_decay",
        {"num_decay_steps": float("inf")},
        {},
        "num_decay_steps=inf: expected a finite number",
    ),
    "not a number": ("polynomial", {"power": ".nan"}, {}, "expected a number"),
    "no end of decay": ("polynomial", {"power": -1}, {}, "give no rate after 1000 steps"),
    "no word": (
        "warmup_stable_decay",
        {"num_decay_steps": 1, "decay_type": "exp"},
        {},
        "decay type",
    ),
    "a share of steps": (
        "warmup_stable_decay",
        {"num_decay_steps": 0.1},
        {},
        "whole number of steps",
    ),
    "negative steps": ("warmup_stable_decay", {"num_decay_steps": -1}, {}, "whole number of steps"),
    "too long": (
        "warmup_stable_decay",
        {"num_decay_steps": 37},
        {"max_steps": STEPS},
        "num_decay_steps=37 and 4 steps of warm-up .* more than the 40 steps",
    ),
    "stages of another length": (
        "warmup_stable_decay",
        {"num_decay_steps": 10, "num_stable_steps": 10},
        {"max_steps": STEPS},
        "are not the 40 steps of the run; leave num_stable_steps out",
    ),
    "warm-up of none": ("constant", None, {"warmup_ratio": 0.2}, "warmup_ratio=0.2 is not used by"),
    "steps of none": ("constant", None, {"warmup_steps": 3}, "warmup_steps=3 is not used by"),
    "steps and a share": (
        "cosine",
        None,
        {"warmup_steps": 3, "warmup_ratio": 0.2},
        "warmup_steps=3 and train.warmup_ratio=0.2 both say",
    ),
    "all warm-up": (
        "polynomial",
        None,
        {"warmup_ratio": 1.0, "max_steps": STEPS},
        "warmup_ratio=1.0 give no rate after 40 steps",
    ),
    "below the end of polynomial": ("polynomial", None, {"learning_rate": 1e-8}, "must be smaller"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_numbers_that_cannot_be_honoured_are_named(case):
    name, numbers, others, said = REFUSED[case]
    with pytest.raises(UserError, match=said):
        config(name, numbers, **others)


def test_what_only_the_length_of_the_run_shows_is_told_before_a_model_is_loaded():
    run = config("warmup_stable_decay", {"num_decay_steps": 37})
    check_total(run, 100)
    with pytest.raises(UserError, match="num_decay_steps=37 .* more than the 40 steps of the run"):
        check_total(run, 40)


def test_numbers_without_a_point_are_numbers():
    """YAML 1.1 reads 1e-7 as text; null is what is left out."""
    given = yaml.safe_load("{min_lr: 1e-4, min_lr_rate: null}")
    assert given["min_lr"] == "1e-4"
    assert config("cosine_with_min_lr", given).train.lr_scheduler_kwargs == {"min_lr": 1e-4}


@pytest.mark.parametrize("section", ["optimizer", "scheduler", "fp16", "amp"])
def test_what_deepspeed_would_not_honour_is_refused(section):
    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "train": {"output_dir": "o"}}
    with pytest.raises(UserError, match=f"parallel.deepspeed.{section} is not DeepSpeed's"):
        build_config(tree | {"parallel": {"deepspeed": {section: {"type": "Lamb"}}}}, "run")
    build_config(tree | {"parallel": {"deepspeed": {section: "auto"}}}, "run")


@pytest.mark.processes
def test_a_run_takes_these_rates(tmp_path):
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 8)
    options = {"lr_scheduler_kwargs": {"num_decay_steps": 4, "min_lr_ratio": 0.5}}
    tree = run_tree(
        tmp_path, max_steps=8, lr_scheduler_type="warmup_stable_decay", warmup_ratio=0.25, **options
    )
    ranks.train([tree | {"parallel": {"zero_stage": 0}}])
    shares = [series(tmp_path / "run", "learning_rate")[step] / 1e-3 for step in range(1, 9)]
    assert shares == pytest.approx([0.5, 0.75, 1, 1, 1, 0.9267767, 0.75, 0.5732233])
