"""`dpo-fast bench train`: same losses or no time, rows with their evidence, shares that multiply."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.machine import Stopwatch
from benchmarks.train import measure, options, ours, results, trl
from benchmarks.train import run as command
from benchmarks.train.case import CONTENDERS, MODELS, ModelSizes, lengths_of, model_sizes, step_work
from benchmarks.train.lines import Lines
from benchmarks.train.measure import Result, check_losses
from benchmarks.train.pairs import draw_pairs, read_pairs
from benchmarks.train.results import COLUMNS
from dpo_fast.errors import UserError
from dpo_fast.models import load_tokenizer
from dpo_fast.training.config import build_config
from tests.support.paths import ROOT

HAS_TRL = importlib.util.find_spec("trl") is not None
HAS_PLOTS = importlib.util.find_spec("matplotlib") is not None
WRONG = "dpo_fast shared_prefix, cached"  # made so by the worker
CHOSEN = (
    "trl",
    "trl, precomputed, no checkpointing",
    "dpo_fast padded, cached",
    "dpo_fast packed, *",
    WRONG,
)


def of_the_run(test):
    """Marks a test of the one run of the command: a process, with TRL in it."""
    return pytest.mark.processes(pytest.mark.peers(pytest.mark.slow(test)))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One run of the command, with a contender made wrong: its rows by name, its output, its folder."""
    folder = tmp_path_factory.mktemp("bench")
    only = [word for name in CHOSEN for word in ("--only", name)]
    plots = ["--plots", str(folder)] if HAS_PLOTS else []
    file = folder / "train.csv"
    module = [sys.executable, "-m", "tests.support.workers.bench_train"]
    done = subprocess.run(
        [*module, "--quick", *only, "--csv", str(file), "--jsonl", str(lines_of(folder)), *plots],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )
    assert file.exists(), done.stderr
    return {row["impl"]: row for row in COLUMNS.read(file)}, done, folder


def lines_of(folder: Path) -> Path:
    return folder / "train.jsonl"


@of_the_run
def test_losses_agree_and_the_row_has_its_evidence(small):
    rows, done, folder = small
    assert [name for name in rows if name.startswith("dpo_fast")] == [
        "dpo_fast padded, cached",
        "dpo_fast packed, cached",
        "dpo_fast shared_prefix, cached",
        "dpo_fast packed, frozen",
    ]
    assert ("trl" in rows) == HAS_TRL
    missing = "missing: trl; trl, precomputed, no checkpointing: trl is not installed"
    assert (missing in done.stdout) != HAS_TRL
    for name, row in rows.items():
        assert list(row) == list(COLUMNS.names)
        assert row["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert row["torch"] == torch.__version__ and row["deepspeed"]
        assert row["commit"] and row["date"] and row["rounds"] == 2
        if name == WRONG:
            continue
        assert not row["note"]
        assert abs(row["last_loss"] - math.log(2)) > 2e-3  # else equal losses would say nothing
        assert row["loss_err"] < 1e-4
        assert 0 < row["s_p20"] <= row["s_p50"] <= row["s_p80"]
        rate = row["global_batch_size"] / row["s_p50"]
        assert row["pairs_per_s"] == pytest.approx(rate, rel=1e-4)
        assert 0 < row["mfu_once"] < row["mfu"] and row["peak_mib"] > 0
        assert 0 < row["head_share"] < 1
    assert rows["dpo_fast packed, frozen"]["reference_share"] > 0.1
    assert rows["dpo_fast packed, cached"]["reference_share"] < 0.1
    assert rows["dpo_fast packed, cached"]["reference_seconds"] > 0
    packed = [row["attention"] for row in rows.values() if row["layout"] == "packed"]
    assert set(packed) == {"dpo_fast_packed"}
    lines = [json.loads(line) for line in lines_of(folder).read_text().splitlines()]
    assert [line["impl"] for line in lines] == list(rows)
    assert [line["s_p50"] for line in lines] == [row["s_p50"] for row in rows.values()]
    if HAS_PLOTS:
        pictures = {path.name.split("_")[0] for path in folder.glob("*.svg")}
        assert pictures == {"pairs", "ingredients"}


@of_the_run
def test_a_contender_with_other_losses_has_no_time(small):
    rows, done, _ = small
    assert done.returncode == 1
    assert f"FAILED: {WRONG}: wrong: loss_err" in done.stderr and done.stderr.count("FAILED") == 1
    wrong = rows[WRONG]
    assert wrong["note"].startswith("wrong") and wrong["loss_err"] > 1e-3
    assert wrong["s_p50"] == wrong["pairs_per_s"] == wrong["mfu"] == wrong["head_share"] == ""


@of_the_run
def test_everybody_sees_the_same_tokens(small):
    """Our packed layout computes all but the last token of every sequence; padding comes on top."""
    rows, done, _ = small
    packed = rows["dpo_fast packed, cached"]
    sequences = 2 * packed["global_batch_size"]
    assert packed["data_tokens"] - sequences <= packed["computed_tokens"] <= packed["data_tokens"]
    assert rows["dpo_fast padded, cached"]["computed_tokens"] > 1.2 * packed["data_tokens"]
    if HAS_TRL:
        assert rows["trl"]["computed_tokens"] > 1.2 * packed["data_tokens"]
        assert "missing: trl, padding_free" not in done.stdout  # nobody asked for it
    assert "losses went from 0.693147 to" in done.stdout and "all together" in done.stdout


def result(name: str, *losses: float) -> Result:
    return Result(CONTENDERS[name], list(losses))


def test_losses_are_held_against_trl_and_the_first_against_ln_2():
    ln2 = math.log(2)
    found = [
        result("dpo_fast packed, cached", ln2, 0.6),
        result("trl", ln2, 0.6005),
        result("dpo_fast padded, cached", ln2, 0.602),
        result("trl, precomputed", 0.70, 0.6005),
        result("dpo_fast padded, frozen", ln2, math.nan),
    ]
    check_losses(found, "fp32")
    assert [bool(r.note) for r in found] == [False, False, True, True, True]
    assert [r.failed for r in found] == [False, False, True, True, True]
    found = [
        result("dpo_fast padded, cached", 0.5, 0.5),
        result("dpo_fast packed, cached", 0.5, 0.5),
    ]
    check_losses(found, "fp32")  # equal, and equally wrong
    assert all(r.failed for r in found)


def test_every_contender_reads_the_tokenizer_of_the_pairs(tmp_path):
    """Qwen's configuration has transformers take Qwen's tokenizer, which knows no word of ours."""
    chosen = ["--only", "dpo_fast packed, cached", "--model", "qwen2.5-0.5b", "--rounds", "1"]
    asked = command.parse([*chosen, "--global-batch-size", "8", "--max-length", "256"])
    pairs = command._pairs(asked)
    with pytest.MonkeyPatch.context() as patch:  # 0.5 billion weights would take seconds
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        small |= {"num_attention_heads": 2, "vocab_size": 8192}
        patch.setitem(MODELS, asked.model, MODELS[asked.model] | small)
        task, _ = command._task(asked, pairs, tmp_path)
    text = pairs.rows[0]["prompt"]
    for tokenizer in (load_tokenizer(config_of(task).model), trl._tokenizer(task)):
        assert tokenizer(text)["input_ids"] == pairs.rows[0]["prompt_ids"]


def config_of(task):
    return build_config(ours.tree(CONTENDERS["dpo_fast packed, cached"], task), "test")


class Runner:
    """A contender that takes steps of the losses given; an exception among them is raised."""

    reference_seconds, attention = None, "some"

    def __init__(self, losses: list) -> None:
        self.losses, self.computed = losses, dict.fromkeys(range(len(losses)), 1)

    def step(self, number: int) -> float:
        if isinstance(self.losses[number], Exception):
            raise self.losses[number]
        return self.losses[number]

    def close(self) -> None:
        raise RuntimeError("the device is gone")


def test_a_row_is_written_when_its_contender_is_done(tmp_path, monkeypatch):
    """One contender crashes in a round, one runs out of memory while it is built, none can be closed."""
    losses = {
        "trl": [math.log(2), 0.69, 0.68],
        "dpo_fast packed, cached": [math.log(2), 0.69, RuntimeError("illegal access")],
        "dpo_fast shared_prefix, cached": [torch.OutOfMemoryError()] * 3,
        "dpo_fast padded, frozen": [math.log(2), 0.69, 0.68],
    }
    known, told = [], []
    make = lambda contender, task: Runner(losses[contender.name])  # noqa: E731
    monkeypatch.setattr(measure.trl, "watch", lambda task: None)
    monkeypatch.setattr(measure.trl, "Trl", make)
    monkeypatch.setattr(measure.ours, "Ours", make)
    lines = Lines(
        tmp_path / "rows.jsonl", lambda found: [{"impl": r.contender.name} for r in found]
    )

    def done(found) -> None:
        lines(found)
        known.append([json.loads(line)["impl"] for line in lines.file.read_text().splitlines()])

    blocks = [[CONTENDERS[name]] for name in losses]
    case = SimpleNamespace(device="cpu", dtype="fp32", steps=3, stopwatch=Stopwatch("cpu"))
    found = measure.measure(case, measure.Lineup(blocks, False, told.append, done))
    assert known == [list(losses)[:count] for count in range(1, 5)]
    notes = ["", "failed: RuntimeError: illegal access", "out of memory", ""]
    assert [result.note for result in found] == notes
    assert [len(result.seconds) for result in found] == [1, 0, 0, 1]
    assert sum("the device is gone" in line for line in told) == 3  # one was never built


def timed(impl: str, seconds: float, head: float = 0.1, **more) -> dict:
    row = dict.fromkeys(COLUMNS.names, "")
    row |= {"impl": impl, "s_p50": seconds, "head_share": head, "layout": "padded"}
    return row | {"data_tokens": 100.0, "once_tokens": 50.0, "computed_tokens": 300.0} | more


def test_factors_multiply_to_the_whole():
    rows = [
        timed("trl", 30.0),
        timed("trl, no checkpointing", 24.0),
        timed("trl, precomputed, no checkpointing", 16.0, head=0.5),
        timed("dpo_fast padded, cached", 9.0, head=0.1),
        timed("dpo_fast packed, cached", 4.0, layout="packed"),
        timed("dpo_fast shared_prefix, cached", 2.5),
    ]
    found = results.ingredients(rows)
    assert (found[0].name, found[0].seconds) == ("trl", 30)
    assert math.prod(part.factor for part in found) == pytest.approx(30 / 2.5)
    by_name = {part.name: part for part in found}
    assert by_name["head"].factor == pytest.approx(16 / (16 - 8 + 0.9))
    assert by_name["no padding"].factor == 9 / 4 and by_name["no padding"].seconds == 4
    assert results.token_factors(rows) == {"padding": 3.0, "repeated prompts": 2.0}
    assert "all together" in results.factors(rows) and "12.00" in results.factors(rows)


def test_a_missing_contender_joins_its_neighbours():
    rows = [timed("trl", 30.0), timed("dpo_fast packed, cached", 4.0, layout="packed")]
    start, rest = results.ingredients(rows)
    assert start.seconds == 30 and rest.factor == 7.5
    assert "stored reference" in rest.name and "no padding" in rest.name
    assert results.ingredients(rows[1:]) == []


def test_work_counts_every_product():
    """A model's sizes as torch counts the flops of a forward pass; the work as sums over tokens."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    tree = dict(MODELS["quick"])
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(tree.pop("model_type"), **tree), attn_implementation="eager"
    )
    sizes, n = model_sizes(model), 24
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, n, dtype=torch.int64))
    counted = counter.get_total_flops()
    square = 2 * (sizes.layers * n + sizes.head * n) + 4 * sizes.attention * n * n
    rotary = counted - square  # a small product of positions and frequencies
    assert 0 <= rotary < 0.01 * counted

    lengths = np.array([[5, 3, 2], [1, 1, 4]])
    work = step_work(lengths, ModelSizes(0, layers=7, head=11, attention=13))
    assert (work.pairs, work.tokens, work.once, work.scored) == (2, 22, 16, 10)
    attended = sum((p + a) ** 2 for p, *answers in lengths for a in answers) / 2
    once = attended - sum(p * p for p, *_ in lengths) / 2
    assert work.flops == pytest.approx(6 * (7 * 22 + 11 * 10 + 26 * attended))
    assert work.flops_once == pytest.approx(6 * (7 * 16 + 11 * 10 + 26 * once))


def test_a_timed_function_inside_another_counts_for_the_outer_one():
    stopwatch = Stopwatch("cpu")
    head = stopwatch.timed(lambda: None, "head")
    stopwatch.timed(lambda: [head() for _ in range(3)], "reference")()
    assert set(stopwatch.take()) == {"reference"}
    head()
    assert set(stopwatch.take()) == {"head"} and stopwatch.take() == {}


def write(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_pairs_that_trainers_would_cut_differently_are_left_out(tmp_path):
    good = [
        {"prompt": f"\n\nHuman: {n} or?\n\nAssistant:", "chosen": f" {n} yes", "rejected": " no"}
        for n in range(30)
    ]
    chat = {
        "prompt": [{"role": "user", "content": "7 or?"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    merged = {"prompt": "0 o", "chosen": "r", "rejected": " no"}  # `or` is a token
    long = {"prompt": "a b " * 200, "chosen": " c", "rejected": " d"}
    empty = {"prompt": "x", "chosen": "", "rejected": "y"}
    file = write(tmp_path / "pairs.jsonl", [*good, chat, merged, long, empty])
    pairs = read_pairs(file, 1024, 64, 100)
    assert (
        len(pairs.rows) == 31 and "31 of 33 pairs" in pairs.origin and "1 bad rows" in pairs.origin
    )
    prompts = [row["prompt"] for row in pairs.rows]
    assert "\n\nHuman: 7 or?\n\nAssistant:" in prompts and "0 o" not in prompts
    eos = pairs.tokenizer.eos_token_id
    for row in pairs.rows:
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == eos
    with pytest.raises(UserError, match="no usable pair in it"):
        read_pairs(write(tmp_path / "bad.jsonl", [empty]), 1024, 64, 100)


def test_drawn_pairs_have_the_lengths_that_were_asked_for():
    lengths = lengths_of(draw_pairs(8192, 1024, 400, None).rows)
    assert np.median(lengths, axis=0) == pytest.approx([95, 29, 37], rel=0.15)
    P, C, R = lengths_of(draw_pairs(8192, 1024, 400, 4.0).rows).T
    assert np.allclose(P / ((C + R) / 2), 4, atol=0.3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--model tinny", "--model tinny: choose from tiny"),
        ("--rounds 0", "--rounds 0: expected a whole number"),
        ("--trl-batch 5", "--trl-batch 5 does not divide --global-batch-size 32; try 4"),
        ("--data x.jsonl --prompt-ratio 4", "--prompt-ratio 4 is about drawn pairs"),
        ("--liger", "--liger: its kernels are Triton's and need a GPU"),
        ("--prompt-ratio -1", "--prompt-ratio -1: expected a number greater than 0"),
        ("--prompt-ratio inf", "--prompt-ratio inf: expected a number greater than 0"),
        ("--quick --model tiny", "--quick chooses its own model"),
        ("--only trll", "--only 'trll' matches no contender; did you mean 'trl'?"),
        ("--only trl --skip trl", "leave no contender"),
        ("--dtype fp16", "--dtype fp16: choose from fp32, bf16"),
        ("--order sideways", "--order sideways: choose from side-by-side, one-by-one"),
        ("--zero-stage 4", "--zero-stage 4: choose from 0, 1, 2, 3"),
        ("--unknown", "--help lists the options"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_an_error(arguments, told, monkeypatch):
    monkeypatch.setattr(options, "interpreting", lambda: False)
    with pytest.raises(UserError) as caught:
        command.parse(arguments.split())
    assert told in str(caught.value)


def test_one_by_one_is_a_block_for_each():
    asked = ["--only", "trl*", "--skip", "*padding_free", "--order", "one-by-one"]
    blocks = command.parse(asked).blocks
    assert len(blocks) == 4 and all(len(block) == 1 for block in blocks)
