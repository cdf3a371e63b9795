"""Activations counted without numbers: what is kept, made again, moved or cut."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from dpo_fast.models import ScoringModel
from dpo_fast.models.config import LoraSection
from dpo_fast.models.lora import add_lora
from dpo_fast.ops.linear_logp.plan import plan
from dpo_fast.training import activations
from dpo_fast.training.activations import Shape, count, mask_bytes
from tests.support.architectures import ARCHITECTURES, make
from tests.support.paths import ROOT

D, LAYERS = 32, 2  # of tests/support/architectures.py


def model(name: str = "llama", lora: bool = False, dtype=torch.float32, **sizes):
    def made() -> ScoringModel:
        with torch.device("meta"):
            scoring = ScoringModel(make(name, **sizes)).to(dtype)
            if lora:
                add_lora(scoring, LoraSection(r=2))
        return scoring

    return made


def head(tokens: int, needs_head: bool = True):
    return plan(tokens, 97, D, torch.float32, workspace_bytes=1 << 12, needs_head=needs_head)


def counted(tokens: int = 512, name: str = "llama", on_cpu: bool = True, **options):
    sizes, lora = options.pop("sizes", {}), options.pop("lora", False)
    shape = Shape(2, tokens // 2, True, tokens, on_cpu)
    return count(model(name, lora, **sizes), shape, head(tokens), **{"recomputed": True} | options)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_counted(name, on_cpu):
    kept = counted(64, name, on_cpu, recomputed=False)
    again = counted(64, name, on_cpu)
    assert kept.kept > again.kept > 64 * D * 2 and kept.host == again.host == 0
    assert min(again.layer, again.head) > 0


def test_experts_are_counted_in_every_dtype():
    """A half of the bytes in bf16, routers aside, which compute in fp32."""
    shape = Shape(2, 256, True, 512, True)
    made = [model("mixtral, experts", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    whole, half = (count(each, shape, head(512), recomputed=False).kept for each in made)
    assert 0.45 < half / whole < 0.6


def test_what_is_kept_is_the_input_of_every_layer():
    """And of the final norm, of positions and tables: with one layer more the rest is the same."""
    fewer, more = (counted(sizes={"num_hidden_layers": layers}) for layers in (2, 3))
    assert more.kept - fewer.kept == 512 * D * 4
    assert more.layer == fewer.layer and more.head == fewer.head


def test_offloaded_inputs_are_in_the_other_memory():
    here, there = counted(), counted(offload=True)
    assert there.host == LAYERS * 512 * D * 4
    assert here.kept - there.kept == there.host


def test_of_many_layers_three_are_counted(monkeypatch):
    sizes = {"num_hidden_layers": 7}
    few = counted(sizes=sizes, tile_tokens=64)
    runs = []
    whole = activations._count
    monkeypatch.setattr(activations, "_count", lambda *a: runs.append(1) or whole(*a))
    monkeypatch.setattr(activations, "_alike", lambda _: False)
    assert counted(sizes=sizes, tile_tokens=64) == few and len(runs) == 1


def test_growth_is_linear_in_the_tokens():
    for options in ({}, {"tile_tokens": 64}, {"recomputed": False}, {"lora": True}):
        sizes = [counted(tokens, **options) for tokens in (512, 1024, 1536)]
        for name in ("kept", "layer", "head"):
            first, second, third = (getattr(each, name) for each in sizes)
            assert abs((third - second) - (second - first)) <= 0.01 * third, (options, name)


def test_tiles_leave_the_width_of_the_mlp_out():
    wide = {"intermediate_size": 640}
    whole, cut = counted(1024, sizes=wide), counted(1024, sizes=wide, tile_tokens=64)
    assert whole.layer - cut.layer > 2 * 1024 * 640 * 4


def test_the_mask_of_a_padded_batch():
    assert mask_bytes(Shape(2, 100, True, 200, True), 4) == 0
    assert mask_bytes(Shape(2, 100, False, 200, False), 2) == 2 * 100 * 100
    assert mask_bytes(Shape(2, 100, False, 200, True), 4) == 5 * 2 * 100 * 100


@pytest.mark.parametrize("name", ["llama", "gemma2, caps and windows", "gpt-oss, sinks"])
def test_eager_attention_keeps_scores_of_all_heads(name):
    """Its activations grow with the square of the length: the softmax of each layer, at the least."""

    def kept(length: int) -> int:
        shape = Shape(2, length, False, 2 * length, True, eager=True)
        assert mask_bytes(shape, 4) == 0
        made = model(name, max_position_embeddings=4096)
        return count(made, shape, head(2 * length), recomputed=False).kept

    short, middle, long = (kept(length) for length in (256, 512, 768))
    scores = 2 * 4 * 256**2 * 2  # of sequences and heads, in bf16, which experts are counted in
    assert (long - middle) - (middle - short) >= LAYERS * 2 * scores


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", ["recomputed", "recomputed, tiles"])
def test_a_step_takes_what_the_plan_says(name, tmp_path):
    """Peak memory of a fresh process, 8,192 tokens; benchmarks/memory.py goes on to 32,768."""
    from benchmarks.memory import ALLOCATOR

    command = [sys.executable, "-m", "benchmarks.memory", "--one", str(tmp_path), name]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **ALLOCATOR)
    result = subprocess.run(
        [*command, "--tokens", "8192"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert row["tokens"] == 8192
    # Beside the activations a fresh process takes some MiB of its own, which tiles leave in sight.
    assert row["planned"] == pytest.approx(row["measured"], rel=0.1, abs=16)
