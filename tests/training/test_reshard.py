"""A checkpoint goes on with other ranks and other ZeRO stages: the same numbers, and the same run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from safetensors.torch import load_file

from dpo_fast.training.engine_states import MOMENTS, read_head, read_states
from dpo_fast.training.tensor_files import read_tree
from tests.support import ranks
from tests.support.metrics import series
from tests.support.models import changed, run_tree, write_model, write_pairs

pytestmark = pytest.mark.processes
STEPS, SAVED = 5, 3
# Ranks and stage of the run, and of those that load what the one before has saved.
ALL = [(1, 0), (2, 3), (1, 1), (2, 0), (1, 3), (2, 2), (1, 2), (2, 1), (1, 0)]
CHAINS = {
    "fp32": ({}, ALL),
    "bf16": ({"dtype": "bf16"}, [(2, 1), (1, 0), (2, 3), (1, 1), (1, 2), (2, 1), (2, 0)]),
    "lora": ({"lora": {"r": 2, "alpha": 4}}, [(2, 3), (1, 0), (2, 2), (1, 3)]),
    "tied": ({"path": "tied"}, [(2, 3), (1, 0)]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reshard")
    write_model(folder / "model")
    write_model(folder / "tied", tied=True)
    write_pairs(folder / "pairs.jsonl", 20)
    return folder


def tree_of(folder: Path, name: str, stage: int, **sections) -> dict:
    base = run_tree(folder, max_steps=STEPS, micro_batch_size=2, save_steps=SAVED)
    base["train"]["weight_decay"] = 0.1
    model = base["model"] | sections.pop("model", {})
    model["path"] = str(folder / Path(model["path"]).name)
    return changed(base, folder / name, parallel={"zero_stage": stage}, model=model, **sections)


def whole_states(checkpoint: Path, order: list[str]) -> dict[str, torch.Tensor]:
    """Weights, moments and step of every trained parameter."""
    head = read_head(checkpoint / "engine")
    states, found = read_states(checkpoint / "engine", head, order), {}
    assert states.names == set(order)
    for name, count in order.items():
        found[f"{name} fp32"] = states.fp32(name, count)
        found[f"{name} step"] = states.step(name)
        found |= {f"{name} {key}": states.moment(name, key, count) for key in MOMENTS}
    return found


def trained(folder: Path, model: dict) -> dict[str, int]:
    """Elements of every trained parameter, in the order of the optimiser."""
    from dpo_fast.models.skeleton import scoring_skeleton
    from dpo_fast.training.config import build_config
    from dpo_fast.training.engine import split_trained

    module = scoring_skeleton(build_config(tree_of(folder, "x", 0, model=model), "x").model)
    names = {id(p): name for name, p in module.named_parameters()}
    groups = split_trained(module.parameters())
    return {names[id(p)]: p.numel() for group in groups for p in group}


@pytest.mark.parametrize("name", CHAINS)
def test_states_are_the_same_bit_for_bit_and_losses_go_on(folder, name):
    model, ((count, stage), *links) = CHAINS[name]
    tree = tree_of(folder, name, stage, model=model)
    ranks.train([tree], count)
    before = folder / name / f"checkpoint-{SAVED}"
    order, losses = trained(folder, model), series(folder / name)
    first = whole_states(before, order)
    assert all(first[f"{each} step"] == SAVED for each in order)
    assert any(first[f"{each} exp_avg_sq"].max() > 0 for each in order)
    for number, (count, stage) in enumerate(links):
        place = f"{name}-{number}"
        going_on = {"resume_from_checkpoint": str(before), "save_steps": None}
        case = tree_of(folder, place, stage, model=model)
        case["train"] |= going_on
        ranks.group(count).do("resaved", case, STEPS - SAVED, str(folder / "losses"))
        before = folder / place / f"checkpoint-{SAVED}"
        found = whole_states(before, order)
        assert [key for key in first if not torch.equal(first[key], found[key])] == [], place
        told = json.loads((folder / "losses").read_text())
        expected = [losses[step] for step in range(SAVED + 1, STEPS + 1)]
        assert told == pytest.approx(expected, abs=2e-3 if name == "bf16" else 1e-6), place


def test_an_optimiser_in_bf16_is_carried_to_another_run(folder):
    """At stage 1, which one rank has in bf16."""
    model, once = {"dtype": "bf16"}, {"max_steps": 1, "save_steps": 1}
    first = tree_of(folder, "carried from", 1, model=model, train=once)
    second = tree_of(folder, "carried", 1, model=model, train=once)
    second["model"]["path"] = str(folder / "carried from" / "final")
    second["train"]["optimizer_from"] = str(folder / "carried from" / "checkpoint-1")
    ranks.train([first, second])
    states = whole_states(folder / "carried" / "checkpoint-1", trained(folder, model))
    assert {value.item() for name, value in states.items() if name.endswith("step")} == {2}


# Runs on so many ranks, which go on on another number of them. Stages are those that follow from the ranks.
RUNS = {"best": 1, "stream": 2, "ema": 2, "tokens": 1}


def run_of(folder: Path, name: str) -> dict:
    base = tree_of(folder, name, "auto")
    base["log"]["logging_steps"] = 2  # the checkpoint falls into an open window of metrics
    if name == "best":
        chosen = {"metric_for_best_model": "loss", "greater_is_better": True}
        chosen |= {"load_best_model_at_end": True, "async_save": True, "eval_steps": SAVED}
        return changed(base, folder / name, train=chosen, data={"eval_rows": 4})
    live = {"provider": "frozen"}
    if name == "stream":
        mixed = [
            {"path": str(folder / "pairs.jsonl"), "weight": 2},
            {"path": str(folder / "more.jsonl"), "weight": 1},
        ]
        data = {"train": mixed, "streaming": True, "stream_buffer": 12}
        return changed(base, folder / name, data=data, loss={"type": "bco"}, reference=live)
    if name == "tokens":
        tokens = {"micro_batch_size": None, "tokens_per_batch": 128, "layout": "packed"}
        tokens["global_batch_size"] = 9  # 6 micro-batches a step
        return changed(base, folder / name, train=tokens)
    ema = {"provider": "ema", "mixup_alpha": 0.5, "sync_steps": 2}
    return changed(base, folder / name, reference=ema)


@pytest.fixture(scope="module")
def runs(folder):
    """Every run in one go, and its second part on the other number of ranks in `... moved`."""
    write_pairs(folder / "more.jsonl", 12, seed=1)
    for count in (1, 2):
        ranks.train([run_of(folder, name) for name in RUNS if RUNS[name] == count], count)
    for count in (1, 2):
        cases = []
        for name in (name for name in RUNS if RUNS[name] != count):
            place = f"checkpoint-{SAVED}"
            shutil.copytree(folder / name / place, folder / f"{name} moved" / place)
            resume = {"resume_from_checkpoint": True}
            cases.append(changed(run_of(folder, name), folder / f"{name} moved", train=resume))
        ranks.train(cases, count)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_as_it_was(runs, name):
    whole, moved = runs / name, runs / f"{name} moved"
    for metric in ("loss", "rewards/margins", "grad_norm", "learning_rate", "num_tokens", "epoch"):
        before, after = series(whole, metric), series(moved, metric)
        assert sorted(after) == [step for step in sorted(before) if step > SAVED]
        assert after == pytest.approx({step: before[step] for step in after}, abs=2e-6), metric
    first, second = (load_file(place / "final" / "model.safetensors") for place in (whole, moved))
    assert all(torch.allclose(first[key], second[key], rtol=0, atol=2e-6) for key in first)
    if name == "best":  # the checkpoint of the other ranks
        assert all(torch.equal(first[key], second[key]) for key in first)
        told = json.loads((moved / "best.json").read_text())
        assert told == json.loads((whole / "best.json").read_text()) and told["step"] == SAVED
    last = json.loads((moved / f"checkpoint-{STEPS}" / "state.json").read_text())
    assert (last["world_size"], last["zero_stage"]) == {1: (2, 3), 2: (1, 0)}[RUNS[name]]


def test_a_reference_that_follows_goes_from_shards_and_back(runs, tmp_path):
    """By way of one rank, to the same files."""
    name, there = "ema", RUNS["ema"]
    before = runs / name / f"checkpoint-{SAVED}"
    for count in (3 - there, there):
        case = changed(run_of(runs, name), tmp_path / str(count))
        case["train"]["resume_from_checkpoint"] = str(before)
        ranks.group(count).do("resaved", case, 0, str(tmp_path / "losses"))
        before = tmp_path / str(count) / f"checkpoint-{SAVED}"
    for rank in range(there):
        first, second = (
            read_tree(place / f"checkpoint-{SAVED}" / f"rank-{rank}.pt")
            for place in (runs / name, tmp_path / str(there))
        )
        assert first["own"]["reference"].keys() == second["own"]["reference"].keys()
        for key, value in first["own"]["reference"].items():
            assert torch.equal(value, second["own"]["reference"][key]), key


def test_what_moved_is_told(runs):
    said = ranks.group(2).said()
    assert (
        "resumed on 2 ranks at ZeRO 3; the checkpoint is of 1 rank at ZeRO 0: from here on" in said
    )
    assert "by what dropout draws" not in said


def test_other_micro_batches_are_refused_with_a_size_that_fits(runs, tmp_path):
    place = tmp_path / f"checkpoint-{SAVED}"
    shutil.copytree(runs / "tokens" / place.name, place)
    going_on = {"resume_from_checkpoint": str(place), "global_batch_size": 4}
    case = changed(run_of(runs, "tokens"), tmp_path / "run", train=going_on)
    told = ranks.refusal(case, 2)
    assert "with train.global_batch_size=4 gives a step" in told
    size = int(re.search(r"set train.global_batch_size=(\d+), or resume on 1 rank", told)[1])
    case["train"]["global_batch_size"] = size
    ranks.train([case], 2)
    assert series(tmp_path / "run") == pytest.approx(series(runs / "tokens moved"), abs=2e-6)


def test_an_order_that_deepspeed_does_not_record_is_refused(runs, tmp_path):
    going_on = {"resume_from_checkpoint": str(runs / "best" / f"checkpoint-{SAVED}")}
    case = changed(run_of(runs, "best"), tmp_path / "run", train=going_on)
    zero = {"zero_optimization": {"round_robin_gradients": True}}
    case["parallel"] = {"zero_stage": 2, "deepspeed": zero}
    assert "zero_optimization.round_robin_gradients=true: " in ranks.refusal(case, 2)


def test_what_else_differs_is_refused_as_ever(runs, tmp_path):
    going_on = {"resume_from_checkpoint": str(runs / "best" / f"checkpoint-{SAVED}")}
    case = changed(run_of(runs, "best"), tmp_path / "run", train=going_on | {"learning_rate": 0.5})
    assert "train.learning_rate was 0.001 and is 0.5" in ranks.refusal(case, 2)


NATIVE = [(2, 0, "bf16"), (2, 1, "fp32"), (2, 2, "bf16"), (2, 3, "bf16"), (1, 0, "fp32")]


@pytest.mark.parametrize(("count", "stage", "dtype"), NATIVE)
def test_the_engine_is_as_deepspeed_loads_it(folder, count, stage, dtype, tmp_path):
    """Saved anew, the files are those that the engine itself saved: also hyperparameters and counters."""
    tree = tree_of(folder, f"native {count} {stage}", stage, model={"dtype": dtype})
    tree["train"] |= {"max_steps": SAVED, "save_model": False}
    ranks.train([tree], count)
    place = Path(tree["train"]["output_dir"]) / f"checkpoint-{SAVED}"
    case = changed(tree, tmp_path / "run", train={"resume_from_checkpoint": str(place)})
    ranks.group(count).do("resaved", case, 0, str(tmp_path / "losses"), True)
    files = sorted(file.name for file in (place / "engine").glob("*.pt"))
    assert len(files) == (1 if stage == 0 else count * (2 if stage == 3 else 1) + (stage < 3))
    for file in files:
        saved, again = (
            read_tree(folder / "engine" / file) for folder in (place, tmp_path / "run" / place.name)
        )
        assert differences(saved, again) == [], file


def differences(a, b, name: str = "") -> list[str]:
    """Where two trees of tensors and numbers differ."""
    if isinstance(a, dict) and a.keys() == b.keys():
        return [each for key in a for each in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [
            each for i, (x, y) in enumerate(zip(a, b)) for each in differences(x, y, f"{name}.{i}")
        ]
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    same = vars(a) == vars(b) if hasattr(a, "cur_scale") else a == b
    return [] if same else [f"{name}: {a} {b}"]
