"""A run that goes from two ranks to one and back, each time at another ZeRO stage, is as it was."""

import pytest

pytest.importorskip("deepspeed")

from safetensors.torch import load_file

from tests.support import ranks
from tests.support.faults import SLOW
from tests.support.metrics import series
from tests.support.models import (
    changed,
    run_tree,
    write_completions,
    write_groups,
    write_model,
    write_pairs,
)

pytestmark = pytest.mark.processes
STEPS = 6  # two on each number of ranks
OFFLOADED = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
CASES = {  # sections of the run; the options of `parallel` on 2, 1 and 2 ranks
    "offload": ({}, [OFFLOADED, {"zero_stage": 2, "offload_optimizer": True}, {"zero_stage": 1}]),
    "lora": (
        {"model": {"lora": {"r": 2, "alpha": 4}}, "reference": {"provider": "adapter_off"}},
        [{"zero_stage": 3}, {"zero_stage": 0}, {"zero_stage": 2}],
    ),
    "a moving reference": (
        {"reference": {"provider": "ema", "mixup_alpha": 0.5, "sync_steps": 2}},
        [{"zero_stage": 3}, {"zero_stage": 0}, {"zero_stage": 2}],
    ),
    "kto": (
        {"data": {"train": "completions.jsonl"}, "loss": {"type": "kto"}},
        [{"zero_stage": 1}, {"zero_stage": 3}, {"zero_stage": 0}],
    ),
    "bco, by tokens": (
        {
            "loss": {"type": "bco"},
            "train": {
                "micro_batch_size": None,
                "tokens_per_batch": 128,
                "layout": "packed",
                "global_batch_size": 9,
            },
        },
        [{"zero_stage": 2}, {"zero_stage": 1}, {"zero_stage": 3}],
    ),
    "groups, all pairs at once": (
        {"data": {"train": "groups.jsonl"}, "loss": {"type": "plackett_luce"}},
        [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3, "zero_hpz_partition_size": 2}],
    ),
    "aot, a mixture": (
        {
            "loss": {"type": "aot"},
            "data": {
                "train": [{"path": "pairs.jsonl", "weight": 2}, {"path": "more.jsonl", "weight": 1}]
            },
        },
        [{"zero_stage": 3}, {"zero_stage": 1}, {"zero_stage": 3}],
    ),
}

if SLOW.args[0]:  # a sample, as long as not all are asked for
    CASES = {name: CASES[name] for name in ("offload", "kto", "groups, all pairs at once")}


def at(folder, value):
    """Paths of data in the folder."""
    if isinstance(value, list):
        return [each | {"path": str(folder / each["path"])} for each in value]
    return str(folder / value)


def run_of(folder, name: str, output: str, parallel: dict, **train) -> dict:
    sections = {key: dict(options) for key, options in CASES[name][0].items()}
    base = run_tree(folder, max_steps=STEPS, micro_batch_size=2, save_steps=2, save_total_limit=9)
    base["model"] |= sections.pop("model", {})
    base["data"] |= {key: at(folder, value) for key, value in sections.pop("data", {}).items()}
    base["train"] |= {"save_model": False} | sections.pop("train", {}) | train
    return changed(base, folder / output, parallel=parallel, **sections)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every case twice: on two ranks all the way, and by way of one."""
    folder = tmp_path_factory.mktemp("elastic")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 20)
    write_pairs(folder / "more.jsonl", 12, seed=1)
    write_completions(folder / "completions.jsonl", 24)
    write_groups(folder / "groups.jsonl", 16)
    whole = [run_of(folder, name, f"{name}/whole", CASES[name][1][0]) for name in CASES]
    ranks.train(whole, 2)
    before = {name: folder / name / "whole" / "checkpoint-2" for name in CASES}
    for part, count in ((1, 1), (2, 2)):
        trees = []
        for name, (_, parallels) in CASES.items():
            until = 2 * part + 2
            going_on = {"resume_from_checkpoint": str(before[name])}
            trees.append(run_of(folder, name, f"{name}/{part}", parallels[part], **going_on))
            before[name] = folder / name / str(part) / f"checkpoint-{until}"
        ranks.train(trees, count)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_are_those_of_the_undisturbed_run(runs, name):
    whole, through = runs / name / "whole", {}
    for part, steps in ((1, (3, 4)), (2, (5, 6))):
        found = series(runs / name / str(part))
        through |= {step: found[step] for step in steps}
    undisturbed = series(whole)
    assert through == pytest.approx({step: undisturbed[step] for step in through}, abs=1e-6)
    file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    first, second = (load_file(place / "final" / file) for place in (whole, runs / name / "2"))
    assert first.keys() == second.keys()
    assert max((first[key] - second[key]).abs().max().item() for key in first) < 2e-6
