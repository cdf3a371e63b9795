"""SDPA over segments: the definition's numbers, and nothing of the size of the row squared."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast.models import attention_sdpa
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.attention_sdpa import MASK_ELEMENTS, sdpa

CPU = torch.device("cpu")
TREE = ((300, 0, -1), (170, 300, 0), (50, 450, 1), (33, 100, 0), (90, 0, -1))
FORMS = {  # query heads, key heads, head sizes of queries and values
    "grouped": (4, 2, 16, 16),
    "one key head": (4, 1, 8, 8),
    "short values": (4, 4, 16, 8),
    "long values": (2, 2, 8, 16),
}
RULES = {
    "causal": {},
    "window": {"window": 4},
    "wide window": {"window": 280},
    "cap": {"softcap": 5.0},
    "cap and window": {"softcap": 5.0, "window": 40},
    "sinks": {"sinks": True},
    "sinks and window": {"sinks": True, "window": 40},
}


def definition(plan, q, k, v, *, scale, window, softcap, sinks):
    """Scores of every query and key, written out, segment by segment."""
    outputs, seen, first = [], {}, 0
    for place, segment in enumerate(plan.segments):
        rows = slice(first, first + segment.queries)
        first = rows.stop
        keys, values = k[:, :, rows], v[:, :, rows]
        if segment.prefix:
            before = [x[:, :, : segment.prefix] for x in seen[segment.parent]]
            keys, values = (torch.cat(both, 2) for both in zip(before, (keys, values)))
        seen[place] = keys, values
        times = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(times, 1) for x in (keys, values))
        scores = (q[:, :, rows] @ keys.transpose(2, 3)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~plan.mask(segment, window), -torch.inf)
        if sinks is not None:
            sink = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], -1)
        outputs.append(scores.softmax(-1)[..., : keys.shape[2]] @ values)
    return torch.cat(outputs, 2).transpose(1, 2)


def inputs(form: str, N: int, dtype: torch.dtype, sinks: bool) -> list[torch.Tensor]:
    heads, key_heads, dim, value_dim = FORMS[form]
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, heads, N, dim), (1, key_heads, N, dim), (1, key_heads, N, value_dim)]
    shapes += [(heads,)] if sinks else []
    made = (torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes)
    return [x.requires_grad_() for x in made]


def results(attention, plan, leaves, rule, grad=None):
    """Output and gradients."""
    q, k, v, *sinks = leaves
    options = {"scale": 0.3, "window": None, "softcap": None} | rule
    options["sinks"] = sinks[0] if sinks else None
    output = attention(plan, q, k, v, **options)
    grad = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).view(output.shape)
    return output, *torch.autograd.grad(output, leaves, grad)


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


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.itemsize)
        return made


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
