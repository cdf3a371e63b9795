"""The schedules of `linear_logp` in PyTorch: the fast path on a CPU, and correct on any device.

Logits are made tile by tile, [token_chunk, vocab_block], in fp32. Backward keeps E = exp(z - m)
against a row offset m, and its sum l, so that p = E / l and

    dL/dz_tv = c_t (1[v = y_t] - p_tv) = s_t E'_tv,   s = -c / l,   E' = E with E_ty - l at the target
    dH = diag(s) (E' W)        dW = E'^T (diag(s) H)        db = E'^T s

are plain products on E' (c = dL/dlogp). A soft cap multiplies E' by its slope.

m starts as the larger of the target's own logit and the first tile's row maximum. It moves only when a
later logit exceeds it by SLACK; then what the row has kept is rescaled. logp is exact either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dpo_fast.ops.eager import head_options
from dpo_fast.ops.linear_logp.call import HeadCall
from dpo_fast.ops.linear_logp.plan import HeadPlan
from dpo_fast.ops.linear_logp.row_sums import (
    RowSums,
    finite_offset,
    joined,
    patch_targets,
    softcap_slope,
)
from dpo_fast.ops.linear_logp.vocab_shard import VocabShard

SLACK = 40.0  # exp(40) V, and its square, stay far from the end of fp32's range
LOWEST = -1e30  # stands in for a row maximum of -inf (masked vocabulary), which would make NaN


class _Tiles:
    """The logits of some rows, one vocabulary block at a time, in fp32 (fp64 for fp64)."""

    def __init__(self, call: HeadCall, buffer: Tensor, rows: slice) -> None:
        options = call.options
        self.weight, self.bias, self.plan = call.weight_VD, call.bias, call.plan
        self.softcap, self.temperature = options.softcap, options.temperature
        self.precision = torch.promote_types(call.hidden_TD.dtype, torch.float32)
        # The temperature acts after a soft cap. Without one both factors act on the hidden rows.
        self.factor = options.logit_scale / (1.0 if self.softcap else options.temperature)
        chunk = call.hidden_TD[rows].to(self.precision)
        self.rows = chunk * self.factor if self.factor != 1.0 else chunk
        self.buffer = buffer

    def blocks(self) -> Iterator[slice]:
        return vocab_blocks(self.plan, self.weight.shape[0])

    def logits(self, block: slice) -> Tensor:
        """Logits of one block, in the buffer: a fresh tile would cost its page faults every time."""
        columns = block.stop - block.start
        out = self.buffer[: len(self.rows) * columns].view(-1, columns)
        torch.mm(self.rows, self.weight[block].to(self.precision).t(), out=out)
        if self.bias is not None:
            out.add_(self.bias[block].to(self.precision), alpha=self.factor)
        if self.softcap:
            out.div_(self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return out

    def target_logits(self, targets: Tensor) -> Tensor:
        """About z_ty, before any tile; -1e30 where another shard has the target."""
        inside, columns = in_block(targets, slice(0, len(self.weight)))
        rows = self.rows if len(inside) == len(targets) else self.rows[inside]
        z = (rows * self.weight[columns]).sum(-1)
        if self.bias is not None:
            z = z + self.bias[columns].to(self.precision) * self.factor
        if self.softcap:
            z = head_options(z, 1.0, self.softcap, self.temperature)
        return self.rows.new_full(targets.shape, LOWEST).index_copy(0, inside, z)

    def mean_logits(self, weight_D: Tensor, bias: Tensor | float) -> Tensor:
        return self.rows @ weight_D + bias * self.factor


class _OnlineSums:
    """Online sums of rows against the moving offset m: l = sum exp(z - m), and sums for extras.

    linear: the sums of logits are known without a pass.
    """

    def __init__(self, targets: Tensor, extras: tuple, offset: Tensor, linear: bool) -> None:
        self.targets, self.extras, self.linear, self.offset = targets, extras, linear, offset
        zeros = lambda: offset.new_zeros(len(targets))  # noqa: E731
        self.maximum, self.target = zeros().fill_(-torch.inf), zeros().fill_(-torch.inf)
        self.total, self.weighted, self.squares, self.logits = zeros(), zeros(), zeros(), zeros()

    def shift(self, z: Tensor, block: slice) -> tuple[Tensor, Tensor] | None:
        """z -= m in place.

        Returns the rows whose offset moved and their factors exp(m_old - m_new), or None.
        """
        maximum = z.amax(-1)
        rows, columns = in_block(self.targets, block)
        self.target[rows] = z[rows, columns]
        if "mean_logit" in self.extras and not self.linear:
            self.logits += z.sum(-1)
        moved = None
        if block.start == 0:
            self.offset = torch.maximum(self.offset, maximum)
        elif len(rows := (maximum > self.offset + SLACK).nonzero().squeeze(1)):
            step = self.offset[rows] - maximum[rows]
            moved = rows, step.exp()
            self.offset[rows] = maximum[rows]
            self.weighted[rows] += step.clamp_min(LOWEST) * self.total[rows]
            self.weighted[rows] *= moved[1]
            self.total[rows] *= moved[1]
            self.squares[rows] *= moved[1].square()
        self.maximum = torch.maximum(self.maximum, maximum)
        z.sub_(self.offset.unsqueeze(-1))
        return moved

    def add(self, z: Tensor, out: Tensor) -> Tensor:
        """out = exp(z), summed. `z` holds shifted logits and may be `out`."""
        shifted = z.clamp_min(-1e4) if "entropy" in self.extras else None  # 0 * -inf would be NaN
        torch.exp(z, out=out)
        self.total += out.sum(-1)
        if "log_sum_p2" in self.extras:
            self.squares += _row_dot(out, out)
        if shifted is not None:
            self.weighted += shifted.mul_(out).sum(-1)
        return out

    def done(self) -> RowSums:
        optional = {
            name: getattr(self, name) if extra in self.extras else None
            for name, extra in (
                ("weighted", "entropy"),
                ("squares", "log_sum_p2"),
                ("logits", "mean_logit"),
            )
        }
        shift = self.target - self.offset
        return RowSums(self.offset, self.maximum, shift, self.total, top=self.target, **optional)


def tile_buffer(plan: HeadPlan, like: Tensor) -> Tensor:
    return like.new_empty(plan.token_chunk * plan.vocab_block)


def token_chunks(plan: HeadPlan, first: int, T: int) -> list[slice]:
    starts = range(first, T, plan.token_chunk)
    return [slice(start, min(start + plan.token_chunk, T)) for start in starts]


def vocab_blocks(plan: HeadPlan, V: int) -> Iterator[slice]:
    for first in range(0, V, plan.vocab_block):
        yield slice(first, min(first + plan.vocab_block, V))


def in_block(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Rows whose target lies in the block, and its column there."""
    inside = ((targets >= block.start) & (targets < block.stop)).nonzero().squeeze(1)
    return inside, targets[inside] - block.start


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)  # torch's sum is pairwise; a batched product would add up in order


def forward(call: HeadCall, extras: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As `op.Schedules.forward`."""
    plan, (T, D), V = call.plan, call.hidden_TD.shape, len(call.weight_VD)
    frozen = plan.schedule == "frozen"
    kept_TV = call.hidden_TD.new_empty(plan.kept_tokens, V)
    direction_TD = call.hidden_TD.new_empty(T if frozen else 0, D)
    precision = torch.promote_types(call.hidden_TD.dtype, torch.float32)
    buffer = tile_buffer(plan, call.hidden_TD.new_empty(0, dtype=precision))
    mean = None
    if "mean_logit" in extras and not call.options.softcap:
        mean = _mean_column(call, precision)
    parts = []
    for rows in token_chunks(plan, 0, T) or [slice(0, 0)]:
        tiles, targets_T = _Tiles(call, buffer, rows), call.targets_T[rows]
        offset_T = tiles.target_logits(targets_T).clamp_min(LOWEST)
        online = _OnlineSums(targets_T, extras, offset_T, linear=mean is not None)
        if mean is not None:
            online.logits = tiles.mean_logits(*mean) * V
        if frozen:
            parts.append(_direction(call, tiles, online, direction_TD[rows]))
        else:
            parts.append(_keep(call, tiles, online, kept_TV[rows]))
    sums = joined(parts)
    outputs = sums.outputs(call.vocabulary, extras)
    if plan.schedule == "logps":
        return outputs, {}
    if frozen:
        return outputs, {"direction": direction_TD}
    return outputs, {"kept": kept_TV, "total": sums.total, "offset": sums.offset}


def _mean_column(call: HeadCall, precision: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """Means over the vocabulary of the weight, [D], and of the bias.

    Without a soft cap the mean logit is their logit, and needs no pass over tiles.
    """
    V = len(call.weight_VD)
    # Block by block, because a sum in another dtype copies its input whole.
    blocks = vocab_blocks(call.plan, V)
    column_D = sum(call.weight_VD[block].to(precision).sum(0) for block in blocks) / V
    return column_D, 0.0 if call.bias is None else call.bias.mean(dtype=precision)


def _over(sums: RowSums, shard: VocabShard | None, scaled: Tensor) -> RowSums:
    """Sums over all shards, against the maximum of the whole row. The rows of `scaled` move with it."""
    if shard is None:
        return sums
    common = sums.rebased(finite_offset(shard.maximum(sums.maximum)))
    scaled *= (sums.offset - common.offset).exp()[: len(scaled), None]
    return common.over(shard)


def _keep(call: HeadCall, tiles: _Tiles, online: _OnlineSums, kept_TV: Tensor) -> RowSums:
    """One pass over the vocabulary. Writes E' for the first len(kept_TV) rows of the chunk."""
    n = len(kept_TV)
    direct = n == len(tiles.rows) and kept_TV.dtype == tiles.precision  # no rounding, no copy
    for block in tiles.blocks():
        z = tiles.logits(block)
        slope = softcap_slope(z[:n], call.options) if n else None
        if (moved := online.shift(z, block)) is not None:
            changed, factor = (x[moved[0] < n] for x in moved)
            before = kept_TV[changed, : block.start] * factor[:, None]
            kept_TV[changed, : block.start] = before.to(kept_TV.dtype)
        e = online.add(z, kept_TV[:, block] if direct else z)[:n]
        if slope is not None:
            e = e.mul_(slope)
        if n and not direct:
            kept_TV[:, block] = e
    sums = _over(online.done(), call.shard, kept_TV)
    slope = softcap_slope(sums.top, call.options)
    patch_targets(kept_TV, sums, online.targets, slope, call.shard)
    return sums


def _direction(call: HeadCall, tiles: _Tiles, online: _OnlineSums, out_TD: Tensor) -> RowSums:
    """u_t = slope_y w_y - sum_v p_tv slope_v w_v, so that dH = c u: no second pass is needed."""
    weight, options = call.weight_VD, call.options
    # Sums of exponentials that are not normalised yet leave the range of fp16.
    dtype = tiles.precision if out_TD.dtype == torch.float16 else out_TD.dtype
    direction = tiles.rows.new_zeros(out_TD.shape)
    for block in tiles.blocks():
        z = tiles.logits(block)
        slope = softcap_slope(z, options)
        if (moved := online.shift(z, block)) is not None:
            direction[moved[0]] *= moved[1][:, None]
        e = online.add(z, z)
        if slope is not None:
            e = e.mul_(slope)
        direction += e.to(dtype) @ weight[block].to(dtype)
    sums = _over(online.done(), call.shard, direction)
    inside, columns = in_block(online.targets, slice(0, len(weight)))
    gathered = weight[columns].to(tiles.precision)
    slope = softcap_slope(sums.top[inside], options)
    direction.div_(-sums.total[:, None])
    direction[inside] += gathered if slope is None else gathered * slope[:, None]
    out_TD.copy_(direction.mul_(options.factor))
    return sums


def backward(
    call: HeadCall, grad_T: Tensor, saved: dict[str, Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `op.Schedules.backward`."""
    needs_hidden, needs_weight, needs_bias = needs
    hidden_TD, weight_VD, kept_TV = call.hidden_TD, call.weight_VD, saved["kept"]
    T, K = len(hidden_TD), len(kept_TV)
    scale_T = -grad_T / saved["total"] * call.options.factor
    scaled_TD = (hidden_TD[:K] * scale_T[:K, None]).to(kept_TV.dtype)
    dH = hidden_TD.new_zeros(hidden_TD.shape) if needs_hidden else None
    if needs_hidden and K:
        dH[:K] = (kept_TV @ weight_VD) * scale_T[:K, None]
    dW = kept_TV.t() @ scaled_TD if needs_weight else None
    db = torch.empty_like(call.bias) if needs_bias else None
    if needs_bias or K < T:
        _add_tiles(_Recompute(call, saved, scale_T), dH, dW, db, kept_TV)
    return dH, dW, db


def _add_tiles(recompute: _Recompute, dH, dW, db, kept_TV: Tensor) -> None:
    """Add recomputed tiles to the gradients. db is written whole.

    Vocabulary outside, tokens inside: sums over chunks are one block of fp32, not a whole [V, D].
    """
    call, scale_T, K = recompute.call, recompute.scale_T, len(kept_TV)
    precision = scale_T.dtype
    hidden_sum = None if dH is None else torch.zeros_like(dH[K:], dtype=precision)
    for block in vocab_blocks(call.plan, len(call.weight_VD)):
        weight_sum = None if dW is None else dW[block].to(precision)
        if db is not None:
            bias_sum = kept_TV[:, block].to(precision).t() @ scale_T[:K]
        for rows, g in recompute.tiles(block):
            if db is not None:
                bias_sum += g.sum(0)
            g = g.to(call.hidden_TD.dtype)
            if dH is not None:
                hidden_sum[rows.start - K : rows.stop - K] += g @ call.weight_VD[block]
            if dW is not None:
                weight_sum += g.t() @ call.hidden_TD[rows]
        if dW is not None:
            dW[block] = weight_sum
        if db is not None:
            db[block] = bias_sum
    if dH is not None:
        dH[K:] = hidden_sum


class _Recompute:
    """Gradient tiles of the tokens that were not kept, from their logits made again."""

    def __init__(self, call: HeadCall, saved: dict[str, Tensor], scale_T: Tensor) -> None:
        self.call, self.scale_T = call, scale_T
        self.total_T, self.offset_T = saved["total"], saved["offset"]
        buffer = tile_buffer(call.plan, self.total_T)
        chunks = token_chunks(call.plan, call.plan.kept_tokens, len(call.hidden_TD))
        self.chunks = [(rows, _Tiles(call, buffer, rows)) for rows in chunks]

    def tiles(self, block: slice) -> Iterator[tuple[slice, Tensor]]:
        """(rows, dL/d(h.w + b)), the latter as s E' from the forward pass's offset and sum.

        With logits near 1e4 their log-sum-exp has lost the digits that exp(z - lse) needs.
        """
        for rows, tiles in self.chunks:
            z = tiles.logits(block)
            slope = softcap_slope(z, self.call.options)
            z.sub_(self.offset_T[rows, None]).exp_()
            inside, columns = in_block(self.call.targets_T[rows], block)
            z[inside, columns] -= self.total_T[rows][inside]
            if slope is not None:
                z.mul_(slope)
            yield rows, z.mul_(self.scale_T[rows, None])
