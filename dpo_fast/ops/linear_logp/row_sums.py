"""Sums of each row of logits over the vocabulary, and the outputs that follow from them.

`ProductSum`: sums of matrix products, fp32 between the terms and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dpo_fast.ops.linear_logp.call import HeadOptions
from dpo_fast.ops.linear_logp.vocab_shard import VocabShard


def finite_offset(maximum_T: Tensor) -> Tensor:
    """The maximum as an offset; 0 for a row of -inf, whose exponentials would be NaN against itself."""
    return torch.where(maximum_T == -torch.inf, 0.0, maximum_T)


def softcap_slope(logits: Tensor, options: HeadOptions) -> Tensor | None:
    """1 - tanh^2 from capped logits; None without a soft cap."""
    if not options.softcap:
        return None
    return 1 - (logits * (options.temperature / options.softcap)).square()


@dataclass(frozen=True)
class RowSums:
    """Sums of each row against its offset m, [T] each, in fp32 (fp64 for fp64 inputs).

    offset: m.
    maximum: max z.
    target: the target's logit; 0 where another shard has it.
    total: sum exp(z - m).
    weighted: sum exp(z - m) (z - m), squares: sum exp(z - m)^2, logits: sum z; None unless an extra
        needs them.
    """

    offset: Tensor
    maximum: Tensor
    target: Tensor
    total: Tensor
    weighted: Tensor | None = None
    squares: Tensor | None = None
    logits: Tensor | None = None

    def rebased(self, offset: Tensor) -> RowSums:
        """The same sums against another offset."""
        step = self.offset - offset
        factor = step.exp()
        weighted, squares = self.weighted, self.squares
        if weighted is not None:
            # A row that summed nothing has no place on the scale: 0, not 0 * inf.
            moved = torch.where(self.total > 0, step * self.total, 0.0)
            weighted = factor * (weighted + moved)
        if squares is not None:
            squares = factor.square() * squares
        return replace(
            self, offset=offset, total=factor * self.total, weighted=weighted, squares=squares
        )

    def over(self, shard: VocabShard | None) -> RowSums:
        """Sums over the whole vocabulary, from shards whose offsets are equal."""
        if shard is None:
            return self
        names = [f.name for f in fields(self)[2:] if getattr(self, f.name) is not None]
        stacked = shard.sum(torch.stack([getattr(self, name) for name in names]))
        return replace(self, maximum=shard.maximum(self.maximum), **dict(zip(names, stacked)))

    def outputs(self, V: int, extras: tuple[str, ...]) -> dict[str, Tensor]:
        """logp and the extras. Not target - lse: near 1e4 the sum m + log total loses small digits."""
        log_total = self.total.log()
        values = {"logp": self.target - self.offset - log_total}
        definitions = {
            "entropy": lambda: log_total - self.weighted / self.total,
            "log_sum_p2": lambda: self.squares.log() - 2 * log_total,
            "mean_logit": lambda: self.logits / V,
            "is_top1": lambda: self.target >= self.maximum,
        }
        return values | {name: definitions[name]() for name in extras}


def patch_targets(
    kept_TV: Tensor,
    sums: RowSums,
    targets_T: Tensor,
    options: HeadOptions,
    shard: VocabShard | None,
) -> None:
    """E' = E - total at each target's column, times the cap's slope, formed in full precision and
    rounded once.

    Then dL/dz = -c / total E'. `kept_TV` holds the first rows of `sums`.
    """
    K, V = kept_TV.shape
    target = sums.target[:K]
    patch = (target - sums.offset[:K]).exp() - sums.total[:K]
    slope = softcap_slope(target, options)
    patch = (patch if slope is None else patch * slope).to(kept_TV.dtype)
    rows, columns = torch.arange(K, device=kept_TV.device), targets_T[:K]
    if shard is not None:  # a target of another shard changes nothing here
        inside = (columns >= 0) & (columns < V)
        columns = columns.clamp(0, V - 1)
        patch = torch.where(inside, patch, kept_TV[rows, columns])
    # Not scatter_, which copies a low-precision tensor whole on a CPU.
    kept_TV[rows, columns] = patch


def joined(parts: list[RowSums]) -> RowSums:
    """The sums of consecutive blocks of tokens as one."""
    if len(parts) == 1:
        return parts[0]
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(RowSums)}
    return RowSums(**{n: None if v[0] is None else torch.cat(v) for n, v in columns.items()})


def product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 from operands of 16 or 32 bits."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # products on a CPU have no fp32 output for 16-bit inputs


class ProductSum:
    """out = sum of a_i @ b_i over a known number of terms.

    A single term goes to `out` directly, and so do all terms in fp32. Otherwise an fp32 sum is held
    until the last term.

    residual: the sum lives in `out` and in a second tensor of its dtype with what rounding took away
        (16 bits of mantissa for bf16). Half the memory, one more pass over the sum per term.
    """

    def __init__(self, out: Tensor, terms: int, residual: bool = False) -> None:
        self.out, self.terms, self.seen, self.total, self.rest = out, terms, 0, None, None
        self.residual = residual and out.dtype != torch.float32

    def add(self, a: Tensor, b: Tensor) -> None:
        self.seen += 1
        if self.terms == 1:
            torch.mm(a, b, out=self.out)
        elif self.out.dtype == torch.float32:
            torch.mm(a, b, out=self.out) if self.seen == 1 else self.out.addmm_(a, b)
        elif self.residual:
            total = product_fp32(a, b)
            if self.seen > 1:
                total += self.out
                total += self.rest
            self.out.copy_(total)
            if self.seen < self.terms:
                self.rest = torch.empty_like(self.out) if self.rest is None else self.rest
                self.rest.copy_(total.sub_(self.out))
        else:
            self._add_fp32(a, b)

    def _add_fp32(self, a: Tensor, b: Tensor) -> None:
        if self.total is None:
            self.total = product_fp32(a, b)
        elif a.is_cuda:
            torch.addmm(self.total, a, b, out_dtype=torch.float32, out=self.total)
        else:
            self.total += product_fp32(a, b)
        if self.seen == self.terms:
            self.out.copy_(self.total)
            self.total = None
