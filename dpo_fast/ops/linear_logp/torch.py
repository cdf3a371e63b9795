"""The schedules of `linear_logp` in PyTorch: the fast path on a CPU, and correct on any device.

Logits are made tile by tile, [token_chunk, vocab_block], in fp32. What is kept for backward is
E = exp(z - m) against a row offset m, with its sum l, so that p = E / l and

    dL/dz_tv = c_t (1[v = y_t] - p_tv) = s_t E'_tv,   s = -c / l,   E' = E with E_ty - l at the target
    dH = diag(s) (E' W)        dW = E'^T (diag(s) H)        db = E'^T s

are plain products on E' (c = dL/dlogp). A soft cap multiplies E' by its slope. `m` starts as the larger
of the target's own logit and the first tile's row maximum, and moves only when a later logit exceeds
it by SLACK; then what that row has kept is rescaled. The log-probability is exact either way.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dpo_fast.ops.eager import head_options
from dpo_fast.ops.linear_logp.plan import HeadPlan
from dpo_fast.ops.linear_logp.row_sums import (
    RowSums,
    finite_offset,
    joined,
    patch_targets,
    softcap_slope,
)

SLACK = 40.0  # exp(40) V, and its square, stay far from the end of fp32's range
LOWEST = -1e30  # stands in for a row maximum of -inf (masked vocabulary), which would make NaN


class _Tiles:
    """The logits of rows [start, stop), one vocabulary block at a time, in fp32 (fp64 for fp64)."""

    def __init__(self, hidden_TD, weight_VD, bias, options, plan: HeadPlan, buffer: Tensor, rows):
        self.weight, self.bias, self.plan, self.softcap = weight_VD, bias, plan, options.softcap
        self.precision = torch.promote_types(hidden_TD.dtype, torch.float32)
        self.temperature = options.temperature
        # With a cap the temperature acts after it, without one both factors act on the hidden rows.
        self.factor = options.logit_scale / (1.0 if self.softcap else options.temperature)
        self.slope_factor = (
            options.logit_scale / options.temperature
        )  # dz/d(h.w), cap's slope apart
        chunk = hidden_TD[rows].to(self.precision)
        self.rows = chunk * self.factor if self.factor != 1.0 else chunk
        self.buffer = buffer

    def blocks(self):
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
    """Online sums of rows against the moving offset m: l = sum exp(z - m), and what extras need."""

    def __init__(self, targets: Tensor, extras: tuple, offset: Tensor, linear: bool):
        self.targets, self.extras, self.linear, self.offset = targets, extras, linear, offset
        zeros = lambda: offset.new_zeros(len(targets))  # noqa: E731
        self.maximum, self.target = zeros().fill_(-torch.inf), zeros()
        self.total, self.weighted, self.squares, self.logits = zeros(), zeros(), zeros(), zeros()

    def shift(self, z: Tensor, block: slice) -> tuple[Tensor, Tensor] | None:
        """z -= m in place. Returns the rows whose offset moved, and their factors exp(m_old - m_new);
        None if none did."""
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
        return RowSums(self.offset, self.maximum, self.target, self.total, **optional)


def tile_buffer(plan: HeadPlan, like: Tensor) -> Tensor:
    return like.new_empty(plan.token_chunk * plan.vocab_block)


def token_chunks(plan: HeadPlan, first: int, T: int) -> list[slice]:
    starts = range(first, T, plan.token_chunk)
    return [slice(start, min(start + plan.token_chunk, T)) for start in starts]


def vocab_blocks(plan: HeadPlan, V: int):
    for first in range(0, V, plan.vocab_block):
        yield slice(first, min(first + plan.vocab_block, V))


def in_block(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Rows whose target lies in the block, and its column there."""
    inside = ((targets >= block.start) & (targets < block.stop)).nonzero().squeeze(1)
    return inside, targets[inside] - block.start


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)  # torch's sum is pairwise; a batched product would add up in order


def forward(hidden_TD, weight_VD, bias, targets_T, options, extras, plan: HeadPlan, shard):
    """Returns {name: [T]} for logp and the extras, and what backward needs, by name."""
    (T, D), V = hidden_TD.shape, shard.vocab if shard else weight_VD.shape[0]
    precision = torch.promote_types(hidden_TD.dtype, torch.float32)
    kept_KV = hidden_TD.new_empty(plan.kept_tokens, weight_VD.shape[0])
    direction_TD = hidden_TD.new_empty(T if plan.schedule == "frozen" else 0, D)
    buffer = tile_buffer(plan, hidden_TD.new_empty(0, dtype=precision))
    # Without a soft cap the mean logit is the logit of the mean column: no pass over tiles.
    mean = None
    if "mean_logit" in extras and not options.softcap:
        # Block by block, because a sum in another dtype copies its input whole.
        blocks = vocab_blocks(plan, len(weight_VD))
        column = sum(weight_VD[block].to(precision).sum(0) for block in blocks) / len(weight_VD)
        mean = column, 0.0 if bias is None else bias.mean(dtype=precision)
    parts = []
    for rows in token_chunks(plan, 0, T) or [slice(0, 0)]:
        tiles = _Tiles(hidden_TD, weight_VD, bias, options, plan, buffer, rows)
        offset = tiles.target_logits(targets_T[rows]).clamp_min(LOWEST)
        online = _OnlineSums(targets_T[rows], extras, offset, linear=mean is not None)
        if mean is not None:
            online.logits = tiles.mean_logits(*mean) * len(weight_VD)
        if plan.schedule == "frozen":
            parts.append(_direction(tiles, online, direction_TD[rows], options, shard))
            continue
        kept = kept_KV[rows]
        _keep(tiles, online, kept, options)
        sums = online.done()
        if shard is not None:
            sums = _over(sums, shard, kept)
        patch_targets(kept, sums, targets_T[rows], options, shard)
        parts.append(sums)
    sums = joined(parts)
    outputs = sums.outputs(V, extras)
    if plan.schedule == "logps":
        return outputs, {}
    if plan.schedule == "frozen":
        return outputs, {"direction": direction_TD}
    return outputs, {"kept": kept_KV, "total": sums.total, "offset": sums.offset}


def _over(sums: RowSums, shard, scaled: Tensor) -> RowSums:
    """Sums over all shards, against the maximum of the whole row; `scaled` rows move with the offset."""
    common = sums.rebased(finite_offset(shard.maximum(sums.maximum)))
    scaled *= (sums.offset - common.offset).exp()[: len(scaled), None]
    return common.over(shard)


def _keep(tiles: _Tiles, online: _OnlineSums, kept: Tensor, options) -> None:
    """One pass over the vocabulary; writes E for the first len(kept) rows of the chunk."""
    n = len(kept)
    direct = n == len(tiles.rows) and kept.dtype == tiles.precision  # no rounding, no copy
    for block in tiles.blocks():
        z = tiles.logits(block)
        slope = softcap_slope(z[:n], options) if n else None
        if (moved := online.shift(z, block)) is not None:
            changed, factor = (x[moved[0] < n] for x in moved)
            kept[changed, : block.start] = (kept[changed, : block.start] * factor[:, None]).to(
                kept.dtype
            )
        e = online.add(z, kept[:, block] if direct else z)[:n]
        if slope is not None:
            e = e.mul_(slope)
        if n and not direct:
            kept[:, block] = e


def _direction(tiles: _Tiles, online: _OnlineSums, out: Tensor, options, shard) -> RowSums:
    """u_t = slope_y w_y - sum_v p_tv slope_v w_v, so that dH = c u: no second pass is needed."""
    weight = tiles.weight
    # Sums of exponentials that are not normalised yet leave the range of fp16.
    dtype = tiles.precision if out.dtype == torch.float16 else out.dtype
    direction = tiles.rows.new_zeros(out.shape)
    for block in tiles.blocks():
        z = tiles.logits(block)
        slope = softcap_slope(z, options)
        if (moved := online.shift(z, block)) is not None:
            direction[moved[0]] *= moved[1][:, None]
        e = online.add(z, z)
        if slope is not None:
            e = e.mul_(slope)
        direction += e.to(dtype) @ weight[block].to(dtype)
    sums = online.done()
    if shard is not None:
        sums = _over(sums, shard, direction)
    inside, columns = in_block(online.targets, slice(0, len(weight)))
    gathered = weight[columns].to(tiles.precision)
    slope = softcap_slope(sums.target[inside], options)
    direction.div_(-sums.total[:, None])
    direction[inside] += gathered if slope is None else gathered * slope[:, None]
    out.copy_(direction.mul_(tiles.slope_factor))
    return sums


def backward(grad_T, hidden_TD, weight_VD, bias, targets_T, options, plan, saved, needs):
    """Returns (dH, dW, db), each None where `needs` says that nothing asks for it."""
    if plan.schedule == "frozen":
        direction_TD = saved["direction"]
        return (direction_TD * grad_T[:, None]).to(direction_TD.dtype), None, None
    needs_hidden, needs_weight, needs_bias = needs
    T, K = len(hidden_TD), plan.kept_tokens
    precision = torch.promote_types(hidden_TD.dtype, torch.float32)
    kept_KV = saved["kept"]
    scale_T = -grad_T / saved["total"] * (options.logit_scale / options.temperature)
    scale_K = scale_T[:K]
    scaled_KD = (hidden_TD[:K] * scale_K[:, None]).to(kept_KV.dtype)
    hidden_grad = hidden_TD.new_zeros(T, weight_VD.shape[1]) if needs_hidden else None
    if needs_hidden and K:
        hidden_grad[:K] = (kept_KV @ weight_VD) * scale_K[:, None]
    weight_grad = kept_KV.t() @ scaled_KD if needs_weight else None
    if K == T and not needs_bias:
        return hidden_grad, weight_grad, None
    bias_grad = torch.empty_like(bias) if needs_bias else None
    rest = _Recompute(hidden_TD, weight_VD, bias, targets_T, options, plan, saved, scale_T)
    hidden_sum = torch.zeros_like(hidden_TD[K:], dtype=precision) if needs_hidden else None
    # Vocabulary outside, tokens inside: sums over chunks are one block of fp32, not a whole [V, D].
    for block in vocab_blocks(plan, weight_VD.shape[0]):
        weight_sum = weight_grad[block].to(precision) if needs_weight else None
        bias_sum = kept_KV[:, block].to(precision).t() @ scale_K if needs_bias else None
        for rows, g in rest.tiles(block):
            if needs_bias:
                bias_sum += g.sum(0)
            g = g.to(hidden_TD.dtype)
            if needs_hidden:
                hidden_sum[rows.start - K : rows.stop - K] += g @ weight_VD[block]
            if needs_weight:
                weight_sum += g.t() @ hidden_TD[rows]
        if needs_weight:
            weight_grad[block] = weight_sum
        if needs_bias:
            bias_grad[block] = bias_sum
    if needs_hidden:
        hidden_grad[K:] = hidden_sum
    return hidden_grad, weight_grad, bias_grad


class _Recompute:
    """Gradient tiles of the tokens that were not kept, from their logits made again."""

    def __init__(self, hidden_TD, weight_VD, bias, targets_T, options, plan, saved, scale_T):
        self.targets, self.scale, self.options = targets_T, scale_T, options
        self.total, self.offset = saved["total"], saved["offset"]
        buffer = tile_buffer(plan, self.total)
        make = partial(_Tiles, hidden_TD, weight_VD, bias, options, plan, buffer)
        chunks = token_chunks(plan, plan.kept_tokens, len(hidden_TD))
        self.chunks = [(rows, make(rows)) for rows in chunks]

    def tiles(self, block: slice):
        """Yields (rows, dL/d(h.w + b)), the latter as s E' from the offset and sum of the forward: with
        logits near 1e4 their log-sum-exp has lost the digits that exp(z - lse) needs."""
        for rows, tiles in self.chunks:
            z = tiles.logits(block)
            slope = softcap_slope(z, self.options)
            z.sub_(self.offset[rows, None]).exp_()
            inside, columns = in_block(self.targets[rows], block)
            z[inside, columns] -= self.total[rows][inside]
            if slope is not None:
                z.mul_(slope)
            yield rows, z.mul_(self.scale[rows, None])
