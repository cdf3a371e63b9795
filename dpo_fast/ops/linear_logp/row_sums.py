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

    Logits, offsets and their distances are in units of `unit` nats: 1 for PyTorch, ln 2 for kernels,
    which take powers of two. They become nats once, in `outputs`. Here exp is of a distance in nats.

    offset: m.
    maximum: max z.
    shift: the target's logit less m; -inf where another shard has it. A distance, because near 1e4 the
        logit and m would each be rounded by 3e-4 nats.
    total: sum exp(z - m).
    weighted: sum exp(z - m) (z - m), squares: sum exp(2 (z - m)), logits: sum z in nats; None unless an
        extra needs them.
    top: the target's logit as `maximum` saw it; -inf where another shard has it, None unless needed.
    logp: in nats, where kernels have made it already.
    """

    offset: Tensor
    maximum: Tensor
    shift: Tensor
    total: Tensor
    weighted: Tensor | None = None
    squares: Tensor | None = None
    logits: Tensor | None = None
    top: Tensor | None = None
    logp: Tensor | None = None
    unit: float = 1.0

    def rebased(self, offset: Tensor) -> RowSums:
        """The same sums against another offset."""
        step = self.offset - offset
        factor = (self.unit * step).exp()
        weighted, squares = self.weighted, self.squares
        if weighted is not None:
            # A row that summed nothing has no place on the scale: 0, not 0 * inf.
            moved = torch.where(self.total > 0, step * self.total, 0.0)
            weighted = factor * (weighted + moved)
        if squares is not None:
            squares = factor.square() * squares
        return replace(
            self,
            offset=offset,
            shift=self.shift + step,
            total=factor * self.total,
            weighted=weighted,
            squares=squares,
            logp=None,
        )

    def over(self, shard: VocabShard | None) -> RowSums:
        """Sums over the whole vocabulary, from shards whose offsets are equal."""
        if shard is None:
            return self
        values = {"logp": None}
        added, largest = ("total", "weighted", "squares", "logits"), ("maximum", "shift", "top")
        for names, reduced in ((added, shard.sum), (largest, shard.maximum)):
            names = [name for name in names if getattr(self, name) is not None]
            values |= zip(names, reduced(torch.stack([getattr(self, name) for name in names])))
        return replace(self, **values)

    def outputs(self, V: int, extras: tuple[str, ...]) -> dict[str, Tensor]:
        """logp and the extras. Not target - lse: near 1e4 the sum m + log total loses small digits.

        The target's logit may come from another product than the sums, and rounding could lift logp above
        0: it is held there.
        """
        logp = self.logp
        if logp is None:
            logp = (self.unit * self.shift - self.total.log()).clamp(max=0.0)
        values = {"logp": logp}
        definitions = {
            "entropy": lambda: self.total.log() - self.unit * self.weighted / self.total,
            "log_sum_p2": lambda: self.squares.log() - 2 * self.total.log(),
            "mean_logit": lambda: self.logits / V,
            "is_top1": lambda: self.top >= self.maximum,
        }
        return values | {name: definitions[name]() for name in extras}


def patch_targets(
    kept_TV: Tensor,
    sums: RowSums,
    targets_T: Tensor,
    slope_T: Tensor | None,
    shard: VocabShard | None,
) -> None:
    """E' = E - total at each target's column, formed in full precision and rounded once. Never above 0.

    Then dL/dz = -c / total E'. `kept_TV` holds the first rows of `sums`. slope_T: of the cap, at the
    targets, or None.
    """
    K, V = kept_TV.shape
    patch = ((sums.unit * sums.shift[:K]).exp() - sums.total[:K]).clamp(max=0.0)
    patch = (patch if slope_T is None else patch * slope_T[:K]).to(kept_TV.dtype)
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
    names = [f.name for f in fields(RowSums) if torch.is_tensor(getattr(parts[0], f.name))]
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], **columns)


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
