"""SDPA over segments: the definition's numbers, and nothing of the size of the row squared."""

import pytest
import torch

from dpo_fast.models import attention_sdpa
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.attention_sdpa import MASK_ELEMENTS, sdpa
from tests.support.attention import FORMS, RULES, Largest, definition, inputs, results

CPU = torch.device("cpu")
TREE = ((300, 0, -1), (170, 300, 0), (50, 450, 1), (33, 100, 0), (90, 0, -1))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_the_definitions_numbers(form, rule, monkeypatch):
    """Whole, and in blocks of a few queries. Written-out scores are fp32 inside, the others exact."""
    plan, options = AttentionPlan(TREE, CPU), RULES[rule]
    leaves = inputs(form, sum(own for own, *_ in TREE), torch.float64, "sinks" in options)
    expected = results(definition, plan, leaves, options)
    error = 2e-5 if {"softcap", "sinks"} & set(options) else 1e-10
    for elements in (MASK_ELEMENTS, 1 << 14):
        monkeypatch.setattr(attention_sdpa, "MASK_ELEMENTS", elements)
        for got, true in zip(results(sdpa, plan, leaves, options), expected, strict=True):
            torch.testing.assert_close(got, true, rtol=error, atol=error)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", ["grouped", "short values", "long values"])
def test_nothing_is_of_the_rows_size_squared(form, rule):
    """Shapes alone, on the meta device: prompts of 6,000 tokens and answers of 3,000."""
    spans = ((6000, 0, -1), (3000, 6000, 0), (3000, 6000, 0))
    plan = AttentionPlan(spans, torch.device("meta"))
    leaves = inputs(form, 12_000, torch.float32, "sinks" in RULES[rule])
    leaves = [x.detach().to("meta").requires_grad_() for x in leaves]
    q, k, v, *sinks = leaves
    options = {"scale": 0.3, "window": None, "softcap": None} | RULES[rule]
    options["sinks"] = sinks[0] if sinks else None
    with Largest() as largest:
        sdpa(plan, q, k, v, **options).sum().backward()
    assert largest.elements <= 2 * MASK_ELEMENTS
