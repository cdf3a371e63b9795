"""Runs of tokens that see each other both ways, as those of an image do, in every form of the plan."""

import pytest
import torch

from dpo_fast.models import attention_sdpa
from dpo_fast.models.attention import BACKENDS, pytorch_kernel, varlen
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.attention_sdpa import MASK_ELEMENTS, sdpa
from tests.support.attention import RULES, Largest, definition, inputs, results

CPU = torch.device("cpu")
SPANS = ((300, 0, -1), (170, 280, 0), (50, 450, 1), (33, 100, 0), (290, 0, -1))
RUNS = ((0, 7), (100, 240), (310, 311), (320, 470), (480, 520), (553, 843))


def visible(plan: AttentionPlan, window: int | None) -> torch.Tensor:
    """Bool [N, N] by the definition: before it in its sequence, or in its run, and not far behind."""
    size = sum(own for own, *_ in plan.spans)
    sees, paths, start = torch.zeros(size, size, dtype=torch.bool), [], 0
    for own, prefix, parent in plan.spans:
        before = paths[parent][:prefix] if prefix else []
        paths.append([*before, *range(start, start + own)])
        for place in range(prefix, prefix + own):
            low = 0 if window is None else max(0, place - window + 1)
            sees[paths[-1][place], paths[-1][low : place + 1]] = True
        start += own
    for first, end in plan.runs:
        behind = torch.arange(first, end)[:, None] - torch.arange(first, end)
        sees[first:end, first:end] |= True if window is None else behind < window
    return sees


@pytest.mark.parametrize("window", [None, 1, 40, 1000])
def test_every_form_of_the_plan_says_the_same(window):
    """Segments with their masks, calls of a kernel, and FlexAttention's rule, against the definition."""
    plan = AttentionPlan(SPANS, CPU, runs=RUNS)
    expected = visible(plan, window)
    assert (expected & ~visible(AttentionPlan(SPANS, CPU), window)).any()
    places, seen = torch.arange(len(expected)), torch.zeros_like(expected)
    start, paths = 0, []
    for segment in plan.segments:
        own = torch.arange(start, start + segment.queries)
        paths.append(torch.cat([paths[segment.parent][: segment.prefix], own]) if start else own)
        seen[own[:, None], paths[-1]] = plan.mask(segment, window)
        start += segment.queries
    assert torch.equal(seen, expected)
    rule = plan.block_mask(window).mask_mod
    assert torch.equal(rule(0, 0, places[:, None], places), expected)


def kernel(q, k, v, layout, *, scale, window, softcap, sinks):
    """As flash-attention documents it: aligned at the end, its window to the left, causal or not."""
    outputs = []
    for q0, q1, k0, k1 in zip(*(o.tolist() for x in layout[1:3] for o in (x[:-1], x[1:]))):
        i = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None]
        j = torch.arange(k1 - k0)
        mask = torch.ones(len(i), len(j), dtype=torch.bool) if layout.both_ways else j <= i
        mask = mask & (True if window is None else j > i - window)
        parts = (x[a:b].transpose(0, 1) for x, a, b in ((q, q0, q1), (k, k0, k1), (v, k0, k1)))
        out = torch.nn.functional.scaled_dot_product_attention(
            *parts, attn_mask=mask, scale=scale, enable_gqa=True
        )
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 40])
def test_the_varlen_calls_give_the_definitions_numbers(window):
    plan = AttentionPlan(SPANS, CPU, runs=RUNS)
    leaves = inputs("grouped", len(plan.ends), torch.float64, False)
    options = {"window": window}
    got = results(lambda *a, **o: varlen(kernel, *a, **o), plan, leaves, options)
    for mine, true in zip(got, results(definition, plan, leaves, options), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)
    assert [call.both_ways for call in plan.varlen_calls] == [True, False]


@pytest.mark.parametrize("rule", RULES)
def test_sdpa_gives_the_definitions_numbers(rule, monkeypatch):
    """Whole, and in blocks of a few queries that cut runs."""
    plan, options = AttentionPlan(SPANS, CPU, runs=RUNS), RULES[rule]
    leaves = inputs("grouped", len(plan.ends), torch.float64, "sinks" in options)
    expected = results(definition, plan, leaves, options)
    error = 2e-5 if {"softcap", "sinks"} & set(options) else 1e-10
    for elements, block in ((MASK_ELEMENTS, 256), (1 << 14, 64)):
        monkeypatch.setattr(attention_sdpa, "MASK_ELEMENTS", elements)
        monkeypatch.setattr(attention_sdpa, "BLOCK", block)
        for got, true in zip(results(sdpa, plan, leaves, options), expected, strict=True):
            torch.testing.assert_close(got, true, rtol=error, atol=error)


@pytest.mark.parametrize("rule", ["causal", "wide window", "cap"])
def test_nothing_is_of_the_rows_size_squared(rule):
    plan = AttentionPlan(
        ((6000, 0, -1), (3000, 6000, 0)), torch.device("meta"), runs=((100, 700), (800, 4000))
    )
    leaves = inputs("grouped", 9000, torch.float32, False)
    leaves = [x.detach().to("meta").requires_grad_() for x in leaves]
    options = {"scale": 0.3, "window": None, "softcap": None, "sinks": None} | RULES[rule]
    with Largest() as largest:
        sdpa(plan, *leaves, **options).sum().backward()
    assert largest.elements <= 2 * MASK_ELEMENTS


def test_runs_may_be_for_layers_with_windows_only():
    plan = AttentionPlan(SPANS, CPU, runs=RUNS, runs_in_windows=True)
    assert plan.of_layer(8) is plan
    assert plan.of_layer(None).runs == () and plan.of_layer(None) is plan.of_layer(None)
    everywhere = AttentionPlan(SPANS, CPU, runs=RUNS)
    assert everywhere.of_layer(None) is everywhere


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention", "varlen"])
def test_on_a_gpu_every_backend_gives_the_definitions_numbers(backend, window):
    device = torch.device("cuda")
    plan = AttentionPlan(SPANS, device, runs=RUNS)
    leaves = inputs("grouped", len(plan.ends), torch.bfloat16, False)
    leaves = [x.detach().to(device).requires_grad_() for x in leaves]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = results(definition, plan, exact, {"window": window})
    compute = BACKENDS[backend]
    assert backend != "varlen" or compute.args[0] is pytorch_kernel
    for got, true in zip(results(compute, plan, leaves, {"window": window}), expected, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=0.05, atol=0.05)
