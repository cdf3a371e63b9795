"""What an evaluation leaves of every example: the numbers that were logged, texts only where allowed."""

import importlib.metadata
import json
import math

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.data.kinds import PAIRS, ExampleLengths
from dpo_fast.report import write_comparison, write_report
from dpo_fast.training.eval_examples import MOST_CHARACTERS, MOST_ROWS, EvalTable, record_examples
from dpo_fast.training.run_facts import BINS, histograms, record_start
from tests.support import ranks
from tests.support.metrics import lines_of
from tests.support.models import (
    changed,
    run_tree,
    write_completions,
    write_groups,
    write_model,
    write_pairs,
)

DATA = {"pairs": write_pairs, "completions": write_completions, "groups": write_groups}
LOSSES = {"pairs": "sigmoid", "completions": "apo_zero_unpaired", "groups": "plackett_luce"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The files of three kinds of data on one rank, and of pairs on two without texts."""
    folder = tmp_path_factory.mktemp("examples")
    write_model(folder / "model")
    base = run_tree(folder, max_steps=2, micro_batch_size=2)
    base["parallel"] = {"zero_stage": 0}
    trees = {}
    for kind, write in DATA.items():
        file = write(folder / f"{kind}.jsonl", 20)
        data = {"train": str(file), "eval_rows": 7}
        trees[kind] = changed(base, folder / kind, data=data, loss={"type": LOSSES[kind]})
    ranks.train(list(trees.values()))
    trees["two"] = changed(trees["pairs"], folder / "two", log={"eval_texts": 0})
    ranks.train([trees["two"]], ranks=2)
    read = lambda name, file: json.loads((folder / name / file).read_text())  # noqa: E731
    return {
        name: (read(name, "eval-examples.json"), lines_of(path)[-1], read(name, "run.json"), path)
        for name in trees
        for path in (folder / name,)
    }


def column(found: dict, name: str) -> list:
    place = found["fields"].index(name)
    return [row[place] for row in found["rows"]]


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["pairs", "two", "groups"])
def test_margins_are_those_that_were_logged(runs, kind):
    found, logged, *_ = runs[kind]
    margins, rewards = column(found, "margin"), column(found, "reward")
    assert found["step"] == 2 and found["examples"] == 7 == len(margins) + found["without_margin"]
    assert margins == sorted(margins) and len(set(margins)) > 2
    if kind == "groups":  # the logged means are over answers, and groups have one or two of a side
        assert sum(rewards) / len(rewards) == pytest.approx(logged["eval_rewards/chosen"], abs=0.5)
        return
    assert sorted(column(found, "index")) == list(range(7))
    assert sum(margins) / 7 == pytest.approx(logged["eval_rewards/margins"], rel=1e-4)
    assert sum(rewards) / 7 == pytest.approx(logged["eval_rewards/chosen"], rel=1e-4)
    assert sum(m > 0 for m in margins) / 7 == pytest.approx(logged["eval_rewards/accuracies"])


@pytest.mark.processes
def test_completions_lie_on_the_side_of_their_label(runs):
    found, logged, *_ = runs["completions"]
    good = [row for row in column(found, "reward") if row is not None]
    bad = [row for row in column(found, "other_reward") if row is not None]
    assert len(good) + len(bad) == 7 and good and bad
    assert sum(good) / len(good) == pytest.approx(logged["eval_rewards/chosen"], rel=1e-4)
    assert sum(bad) / len(bad) == pytest.approx(logged["eval_rewards/rejected"], rel=1e-4)
    for text in found["least"]:
        assert ("chosen" in text) != ("rejected" in text)


@pytest.mark.processes
def test_two_ranks_see_what_one_sees_and_keep_no_text(runs):
    one, two = runs["pairs"][0], runs["two"][0]
    assert column(two, "margin") == pytest.approx(column(one, "margin"), abs=1e-4)
    assert column(two, "tokens") == column(one, "tokens")
    assert len(one["least"]) == 4 and len(one["greatest"]) == 3  # none twice
    assert two["least"] == two["greatest"] == []
    first = one["greatest"][0]
    assert first["index"] == column(one, "index")[-1] and "pairs.jsonl:" in first["where"]
    assert " or " in first["prompt"] and first["chosen"][0].isdigit()


@pytest.mark.processes
def test_a_run_says_where_it_ran(runs):
    (start,) = runs["two"][2]["starts"]
    assert start["step"] == 0 and start["ranks"] == 2
    assert start["versions"]["torch"] == importlib.metadata.version("torch")
    lengths = runs["pairs"][2]["lengths"]
    assert {name: sum(each["counts"]) for name, each in lengths.items()} == dict.fromkeys(
        ("prompt", "chosen", "rejected"), 13
    )


@pytest.mark.processes
def test_the_report_reads_what_runs_write(runs):
    folders = {kind: runs[kind][-1] for kind in DATA}
    for kind, folder in folders.items():
        page = write_report(folder).read_text()
        assert f"Rewards of held-out {kind}" in page and f"Worst and best {kind}" in page
        assert "Machine and versions" in page and "Answer length" in page
    page = write_comparison([folders["pairs"], runs["two"][-1]]).read_text()
    assert 'aria-label="Margins of held-out pairs"' in page and "<code>log.eval_texts" in page
    assert "<td>ranks</td><td>1</td><td>2</td>" in page


class Examples:
    kind = PAIRS

    def __getitem__(self, index: int) -> dict:
        return {"prompt_ids": [index], "chosen_ids": [0] * 9000, "rejected_ids": [1]}

    def where(self, index: int) -> str:
        return f"file:{index}"


class Words:
    """A tokenizer whose every token is its number."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Split:
    examples = Examples()


def recorded(folder, table: EvalTable, texts: int) -> dict:
    record_examples(table, Split(), Words(), folder, 5, texts)
    return json.loads((folder / "eval-examples.json").read_text())


def test_the_file_stays_small_and_holds_no_nan(tmp_path):
    table = EvalTable(3 * MOST_ROWS, torch.device("cpu"))
    table.sums[0, 0] = torch.randn(3 * MOST_ROWS, generator=torch.Generator().manual_seed(0))
    table.sums[:, 2] = 1
    table.sums[1, 0, 4] = math.nan
    found = recorded(tmp_path, table, texts=2)
    assert found["without_margin"] == 1 and MOST_ROWS / 2 < len(found["rows"]) <= MOST_ROWS
    margins = column(found, "margin")
    assert sum(margins) / len(margins) == pytest.approx(table.sums[0, 0].mean().item(), abs=0.01)
    assert len(found["least"]) == len(found["greatest"]) == 2
    text = found["least"][0]["chosen"]
    assert "characters ...]" in text and len(text) < MOST_CHARACTERS + 60
    assert (tmp_path / "eval-examples.json").stat().st_size < 80 * MOST_ROWS


def test_a_resumed_run_adds_a_start_and_a_new_one_forgets(tmp_path):
    lengths = ExampleLengths.of(
        [{"prompt_ids": [1] * n, "chosen_ids": [1] * 3, "rejected_ids": [1] * 500} for n in (1, 9)],
        PAIRS,
    )
    steps = []
    for step in (0, 40, 80, 0):
        record_start(tmp_path, step, lengths)
        starts = json.loads((tmp_path / "run.json").read_text())["starts"]
        steps.append([start["step"] for start in starts])
    assert steps == [[0], [0, 40], [0, 40, 80], [0]]
    (tmp_path / "run.json").write_text("{")
    record_start(tmp_path, 40, lengths)  # a damaged one stops no run
    found = histograms(lengths)
    assert found["chosen"]["width"] == found["rejected"]["width"] == 13 > found["prompt"]["width"]
    assert found["chosen"]["counts"][0] == 2 and found["rejected"]["counts"][500 // 13] == 2
    assert len(found["prompt"]["counts"]) == BINS + 1
