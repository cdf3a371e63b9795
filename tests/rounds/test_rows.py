"""Rounds of `iterate` that sample: what each is made with, what it takes over, how it may be broken off."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import yaml

from dpo_fast.errors import UserError
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.plan import Plan
from dpo_fast.rounds.progress import progress_of
from dpo_fast.training.config import build
from tests.support import ranks
from tests.support.faults import SLOW
from tests.support.metrics import series
from tests.support.models import run_tree, write_model, write_pairs

RULE = '''
def digits(prompt, completion, number):
    """What a random model writes has hardly ever the same sum."""
    return (sum(map(ord, completion)) + number) % 97
'''
FILES = ("samples.jsonl", "samples.logps.parquet", "scores.jsonl", "pairs.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    write_model(root / "model")
    write_pairs(root / "a.jsonl")
    rows = [{"prompt": f"{n}: {n * n} or {n + 7}? ", "number": n} for n in range(16)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "rules.py").write_text(RULE)
    return root


def tree_of(folder: Path, name: str, stages: list[dict], **sections) -> dict:
    run = run_tree(folder)
    del run["train"]["output_dir"], run["data"]["train"]
    made = {
        "sample": {"num_generations": 4, "max_new_tokens": 6, "top_k": 40},
        "judge": {"type": "rule", "function": f"{folder / 'rules.py'}:digits"},
        "pairs": {"unfinished": "keep", "only_length": "keep"},
    }
    return {"output_dir": str(folder / name), **run, **made, "stages": stages} | sections


def two_rounds(folder: Path, name: str) -> dict:
    prompts = str(folder / "prompts.jsonl")
    stages = [
        {"prompts": prompts, "rounds": 2, "optimizer": "fresh"},
        {"data": str(folder / "a.jsonl"), "reference": "start"},
        {"data": str(folder / "a.jsonl"), "reference": "start", "loss": "ipo"},
    ]
    return tree_of(folder, name, stages)


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    ranks.group(1).do("iterate", [two_rounds(folder, "whole")])
    return folder / "whole"


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def read_config(step: Path) -> dict:
    return yaml.safe_load((step / "train" / "config.yaml").read_text())


def manifest_of_reference(step: Path) -> dict:
    (folder,) = (step / "train" / "reference").iterdir()
    return read(folder / "_manifest.json")


def filled_from(step: Path) -> list[str] | None:
    """The files that all parts of a stage's reference were read from; None if it was computed."""
    (how,) = manifest_of_reference(step)["computed"]
    assert how["first_part"] == "part-00000.parquet"
    return how.get("filled_from")


@pytest.mark.processes
def test_every_round_samples_from_the_policy_before_it(folder, whole):
    made = [read(whole / name / "stage.json") for name in ("stage-1-round-1", "stage-1-round-2")]
    samples = [
        read(whole / f"stage-1-round-{number}" / "samples.manifest.json") for number in (1, 2)
    ]
    assert samples[0]["model"] == made[0]["made_with"]["models"]["model.path"]
    assert samples[1]["model"] == made[0]["identity"] != made[1]["identity"]
    assert [each["sample.seed"] for each in samples] == [0, 1]
    for step, record in zip(("stage-1-round-1", "stage-1-round-2"), made):
        assert set(record["files"]) == set(FILES)
        pairs = (whole / step / "pairs.jsonl").read_text().splitlines()
        assert record["rows"]["pairs"] == len(pairs) > 8
        assert series(whole / step / "train")[1] == pytest.approx(0.6931472, abs=1e-5)


@pytest.mark.processes
def test_no_log_prob_is_computed_twice(folder, whole):
    """The sampler's are those of the reference, and a stage takes over what an earlier one has stored."""
    for number in (1, 2):
        step = whole / f"stage-1-round-{number}"
        assert filled_from(step) == [str(step / "samples.logps.parquet")]
    second, third = (manifest_of_reference(whole / name) for name in ("stage-2", "stage-3"))
    assert second == third and filled_from(whole / "stage-2") is None
    parts = [
        next(whole.glob(f"{name}/train/reference/*/part-00000.parquet"))
        for name in ("stage-2", "stage-3")
    ]
    assert parts[0].samefile(parts[1])


@pytest.mark.processes
@pytest.mark.parametrize("first, more", [(2, 7), pytest.param(1, 1, marks=SLOW)])
def test_broken_off_anywhere_rounds_end_alike(folder, whole, first, more):
    name = f"cut-{first}"
    ranks.group(1).do("cut_off", two_rounds(folder, name), first, more, str(folder / "starts"))
    assert int((folder / "starts").read_text()) > 5
    for step in ("stage-1-round-1", "stage-1-round-2", "stage-2", "stage-3"):
        one, other = whole / step, folder / name / step
        model = Path("train", "final", "model.safetensors")
        assert (one / model).read_bytes() == (other / model).read_bytes(), step
        for file in ("pairs.jsonl", "scores.jsonl"):
            if (one / file).is_file():
                ours = (other / file).read_text().replace(name, "whole")
                assert ours == (one / file).read_text(), (step, file)


@pytest.mark.processes
def test_a_judge_that_fails_is_mended_and_the_round_goes_on(folder):
    rules = folder / "broken.py"
    rules.write_text("def digits(completion):\n    return 1 / 0\n")
    tree = tree_of(folder, "mended", [{"prompts": str(folder / "prompts.jsonl")}])
    tree["judge"]["function"] = f"{rules}:digits"
    file = folder / "message"
    ranks.group(1).do("not_iterated", tree, str(file))
    assert "stage-1-round-1: judge.type=rule failed 10 times" in file.read_text()
    samples = folder / "mended" / "stage-1-round-1" / "samples.jsonl"
    before = samples.stat().st_mtime_ns
    plan = Plan(build(RoundsConfig, tree, "case"), "case")
    assert progress_of(plan)[0].told == "samples.jsonl"
    rules.write_text(
        "def digits(completion):\n    return completion.count('a') + len(completion)\n"
    )
    ranks.group(1).do("iterate", [tree])
    assert samples.stat().st_mtime_ns == before
    told = progress_of(plan)[0].told
    assert told.startswith("mean score ") and " pairs, 2 steps, loss 0." in told, told
    rules.write_text("def digits(completion):\n    return len(completion)\n")
    ranks.group(1).do("not_iterated", tree, str(file))
    assert (
        "stages.0 is not what stage-1-round-1 was made with: sha256 of the judge"
        in file.read_text()
    )


@pytest.mark.processes
def test_what_rounds_were_made_with_is_named(folder, whole, tmp_path):
    def said(change) -> str:
        tree = copy.deepcopy(two_rounds(folder, "whole"))
        change(tree)
        ranks.group(1).do("not_iterated", tree, str(tmp_path / "message"))
        return (tmp_path / "message").read_text()

    made = "stages.0 is not what stage-1-round-1 was made with: "
    text = said(lambda tree: tree["sample"].update(temperature=0.7))
    assert f"{made}sample.temperature was 1.0 and is 0.7" in text
    text = said(lambda tree: tree["pairs"].update(strategy="all"))
    assert f"{made}pairs.strategy was 'best_worst' and is 'all'" in text
    other = tmp_path / "prompts.jsonl"
    other.write_text('{"prompt": "1 or 2? ", "number": 1}\n')
    text = said(lambda tree: tree["stages"][0].update(prompts=str(other)))
    assert f"{other} holds other data than it read" in text
    root = tmp_path / "copy"
    shutil.copytree(whole, root)
    pairs = root / "stage-1-round-2" / "pairs.jsonl"
    pairs.write_text(pairs.read_text().replace('"chosen": "', '"chosen": "x'))
    assert f"{pairs} was changed after stage-1-round-2 was made of it" in said(
        lambda t: t.update(output_dir=str(root))
    )


@pytest.mark.processes
def test_dno_and_losses_on_groups_make_rows_of_their_own(folder):
    prompts = str(folder / "prompts.jsonl")
    stages = [
        {"prompts": prompts, "loss": "soft", "pairs": {"strategy": "all", "soft_label": 0.05}},
        {"prompts": prompts, "loss": "plackett_luce", "optimizer": "carried"},
        {"prompts": prompts, "loss": "grpo", "start_from": "start"},
    ]
    ranks.group(1).do("iterate", [tree_of(folder, "kinds", stages)])
    rows = [
        json.loads((folder / "kinds" / name / "pairs.jsonl").read_text().splitlines()[0])
        for name in ("stage-1-round-1", "stage-2-round-1")
    ]
    step = folder / "kinds" / "stage-3-round-1"  # its answers are not of the model that it trains
    assert read_config(step)["reference"]["old_path"] == str(
        folder / "kinds" / "stage-2-round-1/train/final"
    )
    assert filled_from(step) == [str(step / "samples.logps.parquet")]
    assert 0.5 < rows[0]["soft_label"] < 1 and len(rows[1]["completions"]) == len(rows[1]["scores"])


@pytest.mark.processes
def test_two_ranks_and_adapters_go_through_rounds(folder):
    """ZeRO-3: sampling reads the adapter that the round before has exported."""
    stages = [{"prompts": str(folder / "prompts.jsonl"), "rounds": 2}]
    tree = tree_of(folder, "ranks", stages, parallel={"zero_stage": 3})
    tree["model"]["lora"] = {"r": 4, "alpha": 8}
    ranks.group(2).do("iterate", [tree])
    for number in (1, 2):
        step = folder / "ranks" / f"stage-1-round-{number}"
        assert series(step / "train")[1] == pytest.approx(0.6931472, abs=1e-5)
        assert filled_from(step)


@pytest.mark.parametrize(
    "sections, stage, message",
    [
        ({"judge": None}, {}, "stage-1-round-1: there is no section judge"),
        ({}, {"sample": {"top_q": 1}}, r"unknown key sample\.top_q; did you mean top_p"),
        ({}, {"judge": {"type": "command"}}, r"judge\.type=command needs judge\.command"),
        (
            {},
            {"pairs": {"strategy": "groups"}},
            r"pairs\.strategy=groups, but loss\.type=sigmoid learns from pairs; leave pairs.strategy out",
        ),
        ({"data": {"streaming": True}, "train": {"max_steps": 3}}, {}, "data.streaming=true"),
        (
            {},
            {"loss": "soft"},
            r"loss\.type=soft needs the column soft_label: set pairs.soft_label",
        ),
        (
            {},
            {"pairs": {"soft_label": 1.0}},
            "column soft_label, which loss.type=sigmoid does not use",
        ),
    ],
)
def test_what_a_stage_that_samples_cannot_have(folder, sections, stage, message):
    from dpo_fast.rounds.iterate import check_stages

    stages = [{"prompts": str(folder / "prompts.jsonl"), **stage}]
    tree = tree_of(folder, "none", stages) | sections
    with pytest.raises(UserError, match=message):
        check_stages(Plan(build(RoundsConfig, tree, "case"), "case"))


@pytest.mark.processes
@pytest.mark.parametrize(
    "data, stage, message",
    [
        ({}, {"prompts": "bad.jsonl"}, "bad.jsonl:1: missing field 'prompt'"),
        ({}, {"sample": {"max_new_tokens": 128}}, "leaves no room for a prompt"),
        ({}, {"judge": {"type": "implicit", "reference": "none"}}, "judge.reference=none: "),
        ({"eval": "a.jsonl"}, {"loss": "grpo"}, "data.eval holds pairs, the first "),
    ],
)
def test_what_a_later_stage_reads_is_looked_at_before_the_first(folder, data, stage, message):
    (folder / "bad.jsonl").write_text('{"a": 1}\n')
    stage = {"prompts": str(folder / stage.pop("prompts", "prompts.jsonl"))} | stage
    tree = tree_of(folder, "early", [{"data": str(folder / "a.jsonl"), "loss": "sft"}, stage])
    tree["data"] |= {name: str(folder / value) for name, value in data.items()}
    if data:
        del tree["stages"][0]
    file = folder / "message"
    ranks.group(1).do("not_iterated", tree, str(file))
    assert message in file.read_text()
    assert not (folder / "early").exists()


def test_every_step_draws_with_a_seed_of_its_own(folder):
    prompts = str(folder / "prompts.jsonl")
    tree = tree_of(folder, "seeds", [{"prompts": prompts, "rounds": 2}, {"prompts": prompts}])
    tree["sample"]["seed"] = 5
    tree["stages"][1] |= {"judge": {"type": "command", "command": "cat"}}
    plan = Plan(build(RoundsConfig, tree, "case"), "case")
    rounds = [plan.rounds(step) for step in plan.steps]
    assert [each.sample.seed for each in rounds] == [5, 6, 7]
    assert [each.judge.type for each in rounds] == ["rule", "rule", "command"]
