"""Attention of a row by its definition, its inputs and rules, and what an operation holds at most."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.itemsize)
        return made
