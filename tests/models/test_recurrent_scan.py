"""Mamba-2's scan along a row of trees, against the recurrence step by step, and what kernels may not do."""

import inspect
import sys

import pytest
import torch
from torch.nn.functional import softplus

pytest.importorskip("transformers")
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from dpo_fast.data.batch import collate_trees
from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel, recurrent
from dpo_fast.models.adapter_targets import layers_never_called
from dpo_fast.models.attention import NAMES
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.config import LoraSection
from dpo_fast.models.lora import add_lora
from dpo_fast.models.recurrent import serve, served
from dpo_fast.models.recurrent.ssd import chunk_scan
from dpo_fast.models.recurrent.told import FUNCTIONS as TOLD_FUNCTIONS
from dpo_fast.models.recurrent.unfolded import sequences_of
from dpo_fast.models.scoring import forward_arguments
from tests.support.hybrids import CPU, make

HEADS, DIM, GROUPS, STATE = 4, 3, 2, 5
# Forks inside a branch and at its end, branches of one token, a segment of more than two chunks of 64,
# and one that goes on though it is shorter than others of its level.
SPANS = ((150, 0, -1), (4, 150, 0), (1, 20, 0), (9, 154, 1), (70, 152, 1), (3, 0, -1), (5, 3, 5))
TREES = [([5, 6], [[8, 9, 2], [8, 3, 2], [2]]), ([1, 90, 4], [[11, 2]])]


def _rows(size, generator):
    def draw(*shape):
        return torch.randn(1, size, *shape, generator=generator)

    return [draw(HEADS, DIM), draw(HEADS), draw(GROUPS, STATE), draw(GROUPS, STATE)]


def _step_by_step(x, dt, b, c, *, A, D, dt_bias, dt_limit):
    """The recurrence of a sequence, [L, ...] each."""
    dt = softplus(dt + dt_bias).clamp(*dt_limit)
    b, c = (each.repeat_interleave(HEADS // GROUPS, 1) for each in (b, c))
    state, outputs = torch.zeros(HEADS, DIM, STATE), []
    for i in range(len(x)):
        written = dt[i, :, None, None] * x[i, :, :, None] * b[i, :, None, :]
        state = (dt[i] * A).exp()[:, None, None] * state + written
        outputs.append((state * c[i, :, None, :]).sum(-1) + D[:, None] * x[i])
    return torch.stack(outputs)


def test_a_scan_of_trees_is_the_recurrence_of_every_sequence_step_by_step():
    generator = torch.Generator().manual_seed(0)
    plan = AttentionPlan(SPANS, CPU)
    size = sum(own for own, *_ in SPANS)
    rows = [each.requires_grad_() for each in _rows(size, generator)]
    weights = {
        "A": -torch.rand(HEADS, generator=generator).requires_grad_(),
        "D": torch.randn(HEADS, generator=generator).requires_grad_(),
        "dt_bias": torch.randn(HEADS, generator=generator).requires_grad_(),
    }
    limit = {"dt_limit": (0.3, 1.1)}  # no step of the layer is zero, and some are cut at both ends
    output = chunk_scan(
        plan,
        modeling_mamba2.mamba2_chunk_scan,
        rows[0],
        rows[1],
        weights["A"],
        *rows[2:],
        chunk_size=32,
        D=weights["D"],
        dt_bias=weights["dt_bias"],
        dt_softplus=True,
        z=None,
        initial_states=None,
        **limit,
    )
    sequences = sequences_of(SPANS, CPU)
    lengths = [21, 163, 222, 8]
    assert sequences.tokens.shape == (4, 222) and output.shape == (1, size, HEADS, DIM)
    paths = [tokens[:length] for tokens, length in zip(sequences.tokens, lengths)]
    expected = torch.cat([
        _step_by_step(*(each[0, path] for each in rows), **weights, **limit) for path in paths
    ])  # fmt: skip
    found = torch.cat([output[0, path] for path in paths])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    inputs = [*rows, *weights.values()]
    gradients = [torch.autograd.grad(each.sin().sum(), inputs) for each in (found, expected)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_sequences_hold_every_token_once_and_only_whole_ones():
    tokens, places = sequences_of(SPANS, CPU)
    assert torch.equal(tokens.flatten()[places], torch.arange(len(places)))
    assert tokens[0, :21].tolist() == [*range(20), 154] and not tokens[0, 21:].any()
    assert tokens[1, :163].tolist() == [*range(154), *range(155, 164)]
    assert tokens[3, :8].tolist() == [*range(234, 242)]


def test_states_from_outside_are_no_matter_of_a_row():
    plan, rows = AttentionPlan(SPANS, CPU), _rows(242, torch.Generator())
    with pytest.raises(ValueError, match="begins anew"):
        chunk_scan(plan, None, *rows[:2], None, *rows[2:], 16, return_final_states=True)


@pytest.mark.parametrize(
    ("name", "module", "fused"),
    [
        ("mamba2", modeling_mamba2, "mamba2_split_conv1d_scan_combined"),
        ("mamba", modeling_mamba, "mamba_inner_fn"),
    ],
)
def test_the_kernel_for_a_whole_layer_computes_no_row_of_trees(name, module, fused, monkeypatch):
    model = make(name, NAMES["sdpa"]).train()
    called = []
    monkeypatch.setattr(module, fused, lambda *a, **k: called.append(1))
    scoring = ScoringModel(model)  # puts ours round it
    scoring(**forward_arguments(collate_trees(TREES, "shared_prefix")))
    assert not called
    scoring(**forward_arguments(collate_trees(TREES, "padded")))
    assert len(called) == 3


def test_serving_twice_is_serving_once():
    model = make("lfm2")
    serve(model)
    once = vars(sys.modules[type(model).__module__])["causal_conv1d_fn"]
    serve(model)
    assert vars(sys.modules[type(model).__module__])["causal_conv1d_fn"] is once
    mixers = [type(each).__name__ for each in model.modules() if served(each)]
    assert mixers == ["Lfm2ShortConv"] * 2


def _as_kernels_has_it(func):
    """The module that the package kernels makes of a function of transformers, where it is installed."""

    class Func(torch.nn.Module):
        def forward(self, *arguments, **options):
            return func(*arguments, **options)

    Func.forward.__signature__ = inspect.signature(func)
    return Func()


@pytest.mark.parametrize("name", ["qwen3-next", "granite-hybrid", "lfm2", "jamba"])
def test_functions_that_are_modules_are_served(name, monkeypatch):
    model = make(name)
    mixer = next(each for each in model.modules() if served(each))
    functions = vars(recurrent.module_of(type(mixer)))
    for each in (recurrent.FUNCTIONS | TOLD_FUNCTIONS).keys() & functions.keys():
        plain = getattr(functions[each], "original", functions[each])
        monkeypatch.setitem(functions, each, _as_kernels_has_it(plain))
    scoring = ScoringModel(model)
    with torch.no_grad():
        expected = scoring(**forward_arguments(collate_trees(TREES, "padded")))["logp"]
        model.set_attn_implementation(NAMES["sdpa"])
        found = scoring(**forward_arguments(collate_trees(TREES, "shared_prefix")))["logp"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "never"),
    [
        ("granite-hybrid", {"conv1d", "out_proj"}),
        ("nemotron-h", {"conv1d", "out_proj"}),
        ("falcon-h1", {"conv1d", "out_proj"}),
        ("jamba", {"conv1d", "dt_proj"}),
        ("lfm2", {"conv"}),
    ],
)
def test_adapters_leave_layers_out_that_are_never_called(name, never):
    """peft refuses them in some models, and trains adapters that do nothing in others."""
    model = make(name, NAMES["sdpa"])
    assert {each.split(".")[-1] for each in layers_never_called(model)} == never
    with pytest.raises(
        UserError, match=rf"target_modules=.*{min(never)}.* pass by adapters on them"
    ):
        add_lora(ScoringModel(model), LoraSection(target_modules=["in_proj", min(never)]))
    scoring = ScoringModel(make(name, NAMES["sdpa"]))
    add_lora(scoring, LoraSection(r=2))
    trained = {key: each for key, each in scoring.named_parameters() if each.requires_grad}
    assert any("in_proj" in key for key in trained)
    assert not any(each in key for key in trained for each in ("conv1d", *never) if each != "conv")
    for key, each in trained.items():
        if "lora_B" in key:
            torch.nn.init.normal_(each, std=0.1)
    scoring(**forward_arguments(collate_trees(TREES, "shared_prefix")))["logp"].sum().backward()
    idle = [key for key, each in trained.items() if each.grad is None or not each.grad.any()]
    assert [key for key in idle if "expert" not in key] == []


def test_a_decoder_that_adds_up_in_fp32_scores_in_bf16():
    model = make("mamba2").bfloat16()
    ids = torch.tensor([[5, 6, 8, 9, 2]])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[0, 1:-1].log_softmax(-1)
        scores = ScoringModel(model)(**forward_arguments(collate_trees(TREES[:1], "padded")))[
            "logp"
        ]
    expected = expected.gather(1, ids[0, 2:, None]).squeeze(1)
    torch.testing.assert_close(scores[:3], expected, rtol=0, atol=0.05)
