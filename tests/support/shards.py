"""Two ranks, each with a slice of the head: every result must be that of the whole head."""

import itertools

import torch
import torch.distributed as dist

from dpo_fast.ops import eager, linear_logp
from dpo_fast.ops.linear_logp.call import EXTRAS
from dpo_fast.ops.linear_logp.vocab_shard import VocabShard

T, V, D, SPLIT = 21, 83, 24, 50  # uneven slices, no multiples of a tile


def make(dtype, peak: bool):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=g)
    weight = torch.randn(V, D, generator=g)
    if peak:  # a logit of 500 in the second slice alone: the first one's offsets are far off
        hidden[:, 0], weight[:, 0], weight[V - 2, 0] = 1.0, 0.0, 500.0
    targets = torch.randint(V, (T,), generator=g)
    targets[:4] = torch.tensor([0, SPLIT - 1, SPLIT, V - 1])
    bias = torch.randn(V, generator=g)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def run(hidden, weight, bias, targets, *, frozen, function=linear_logp, **options):
    """Outputs and gradients by name; the head's gradients are those of the rows given."""
    hidden = hidden.clone().requires_grad_()
    weight, bias = (x.clone().requires_grad_(not frozen) for x in (weight, bias))
    result = function(hidden, weight, targets, bias=bias, extras=EXTRAS, **options)
    result = result if isinstance(result, dict) else result._asdict()
    result["logp"].backward(torch.linspace(-1, 2, T).to(result["logp"].dtype))
    found = {name: value.detach().double() for name, value in result.items()}
    found["dH"] = hidden.grad.double()
    return found if frozen else found | {"dW": weight.grad.double(), "db": bias.grad.double()}


def compare_shards() -> None:
    """A job of two ranks (tests/support/workers/jobs.py)."""
    rank = dist.get_rank()
    mine = slice(0, SPLIT) if rank == 0 else slice(SPLIT, V)
    cases = itertools.product(
        ("torch", "triton"),
        (torch.float32, torch.bfloat16),
        (False, True),
        (False, True),
        (0, 1 << 20),
        (None, 6.0),
    )
    for implementation, dtype, peak, frozen, budget, softcap in cases:
        hidden, weight, bias, targets = make(dtype, peak)
        shard = VocabShard.of(weight[mine])
        assert (shard.first, shard.vocab, shard.largest) == (mine.start, V, SPLIT)
        got = run(
            hidden,
            weight[mine],
            bias[mine],
            targets,
            frozen=frozen,
            shard=shard,
            softcap=softcap,
            implementation=implementation,
            workspace_bytes=budget,
        )
        double = [x.double() for x in (hidden, weight, bias)]
        function = eager.linear_logp
        truth = run(*double, targets, frozen=frozen, softcap=softcap, function=function)
        same = run(hidden, weight, bias, targets, frozen=frozen, softcap=softcap, function=function)
        for name, value in truth.items():
            rows = mine if name in ("dW", "db") else slice(None)
            error = (got[name] - value[rows]).abs().max()
            # A nat is what log-probs and entropies are measured in, however near 0 they come out: the
            # eager form may be exact by luck of the processor's exp.
            size = value.abs().max() if name.startswith("d") else value.abs().max().clamp_min(1)
            allowed = 2 * (same[name] - value).abs().max() + 2e-6 * size
            if name.startswith("d") and dtype == torch.bfloat16:
                allowed = allowed + 2**-7 * value.abs().max()
            case = (implementation, dtype, peak, frozen, budget, softcap, name)
            assert error <= allowed + 1e-12, (case, error, allowed)
        # The same numbers on both ranks, bit for bit, where both hold them whole.
        for name in ("logp", "entropy", "dH"):
            other = got[name].clone()
            dist.broadcast(other, 0)
            assert torch.equal(other, got[name]), name
