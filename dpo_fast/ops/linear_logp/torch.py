"""The schedules of `linear_logp` in PyTorch: the fast path on a CPU, and correct on any device.

Logits are made tile by tile, [token_chunk, vocab_block], in fp32. Backward keeps E = exp(z - m)
against a row offset m, and its sum l, so that p = E / l and

    dL/dz_tv = c_t (1[v = y_t] - p_tv) = s_t E'_tv,   s = -c / l,   E' = E with E_ty - l at the target
    dH = diag(s) (E' W)        dW = E'^T (diag(s) H)        db = E'^T s

are plain products on E' (c = dL/dlogp). A soft cap multiplies E' by its slope.

Where the CPU is slow with 16-bit products (`plan.products` is fp32), E stays in 16 bits and is copied to
fp32 block by block, as the weight is. Backward has the vocabulary in its outer loop, so that a block of the
weight is copied once. Results differ between CPUs by rounding alone: products in fp32 are the more exact.

m starts as the larger of the target's own logit and the first tile's row maximum. It moves only when a
later logit exceeds it by SLACK; then what the row has kept is rescaled. logp is exact either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dpo_fast.ops import cpu
from dpo_fast.ops.linear_logp.call import HeadCall
from dpo_fast.ops.linear_logp.row_sums import (
    RowSums,
    finite_offset,
    joined,
    patch_targets,
    softcap_slope,
)
from dpo_fast.ops.linear_logp.torch_tiles import (
    LOWEST,
    LogitTiles,
    WeightBlocks,
    add_product,
    in_block,
    tile_buffer,
    token_chunks,
    vocab_blocks,
)
from dpo_fast.ops.linear_logp.vocab_shard import VocabShard

SLACK = 40.0  # exp(40) V, and its square, stay far from the end of fp32's range


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
    blocks = WeightBlocks(call, precision)
    mean = None
    if "mean_logit" in extras and not call.options.softcap:
        mean = _mean_column(call, precision)
    parts = []
    for rows in token_chunks(plan, 0, T) or [slice(0, 0)]:
        tiles, targets_T = LogitTiles(call, blocks, buffer, rows), call.targets_T[rows]
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


def _keep(call: HeadCall, tiles: LogitTiles, online: _OnlineSums, kept_TV: Tensor) -> RowSums:
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
        del z, e  # before the next tile: a product may have brought its own memory
    sums = _over(online.done(), call.shard, kept_TV)
    slope = softcap_slope(sums.top, call.options)
    patch_targets(kept_TV, sums, online.targets, slope, call.shard)
    return sums


def _direction(call: HeadCall, tiles: LogitTiles, online: _OnlineSums, out_TD: Tensor) -> RowSums:
    """u_t = slope_y w_y - sum_v p_tv slope_v w_v, so that dH = c u: no second pass is needed."""
    weight, options = call.weight_VD, call.options
    # Sums of exponentials that are not normalised yet leave the range of fp16.
    dtype = tiles.precision if out_TD.dtype == torch.float16 else call.plan.products
    blocks = tiles.precise_blocks if dtype == tiles.precision else WeightBlocks(call, dtype)
    direction = tiles.rows.new_zeros(out_TD.shape)
    for block in tiles.blocks():
        z = tiles.logits(block)
        slope = softcap_slope(z, options)
        if (moved := online.shift(z, block)) is not None:
            direction[moved[0]] *= moved[1][:, None]
        e = online.add(z, z)
        if slope is not None:
            e = e.mul_(slope)
        add_product(direction, e.to(dtype), blocks[block])
        del z, e
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
    scale_T = -grad_T / saved["total"] * call.options.factor
    # Rows of E' that are multiplied whole, as they lie.
    n = len(kept_TV) if kept_TV.dtype == call.plan.products else 0
    dH = hidden_TD.new_zeros(hidden_TD.shape) if needs_hidden else None
    dW = weight_VD.new_zeros(weight_VD.shape) if needs_weight else None
    if n:
        _whole(call, kept_TV, scale_T, dH, dW)
    db = torch.empty_like(call.bias) if needs_bias else None
    if needs_bias or n < len(hidden_TD):
        _add_tiles(_GradientTiles(call, saved, scale_T, n), dH, dW, db)
    return dH, dW, db


def _whole(call: HeadCall, kept_TV: Tensor, scale_T: Tensor, dH, dW) -> None:
    """The products of kept exponentials as they lie, into the gradients.

    oneDNN copies an operand that lies otherwise than it wants, so it gets a tile at a time: a copy of all
    exponentials would double the memory.
    """
    n, V = len(kept_TV), len(call.weight_VD)
    scaled_TD = (call.hidden_TD[:n] * scale_T[:n, None]).to(kept_TV.dtype)
    if not (kept_TV.dtype == torch.float32 and cpu.by_onednn()):
        if dH is not None:
            torch.mm(kept_TV, call.weight_VD, out=dH[:n])
        if dW is not None:
            torch.mm(kept_TV.t(), scaled_TD, out=dW)
    else:
        buffer = tile_buffer(call.plan, kept_TV)
        for block in vocab_blocks(call.plan, V):
            for rows in token_chunks(call.plan, 0, n):
                e = kept_TV[rows, block]
                tile = buffer[: e.numel()]
                if dH is not None:
                    dH[rows] += cpu.product(tile.view_as(e).copy_(e), call.weight_VD[block])
                if dW is not None:
                    dW[block] += cpu.product(tile.view_as(e.t()).copy_(e.t()), scaled_TD[rows])
    if dH is not None:
        dH[:n] *= scale_T[:n, None]


def _add_tiles(tiles: _GradientTiles, dH, dW, db) -> None:
    """Add tiles to the gradients. db is written whole.

    Vocabulary outside, tokens inside: sums over chunks are one block of fp32, not a whole [V, D].
    """
    call, precision = tiles.call, tiles.scale_T.dtype
    groups = tiles.groups()
    # One group leaves a block of the vocabulary once and for all. Of several the sums stay open.
    several = len(groups) > 1
    weight_total = dW.to(precision) if several and dW is not None else None
    bias_total = None
    if db is not None:
        blocks = vocab_blocks(call.plan, len(call.weight_VD))
        bias_total = torch.cat([tiles.whole_bias(block) for block in blocks])
    for group in groups:
        tiles.open(group)
        _add_group(tiles, group, dH, dW if weight_total is None else weight_total, bias_total)
    if weight_total is not None and weight_total is not dW:
        dW.copy_(weight_total)
    if db is not None:
        db.copy_(bias_total)


def _add_group(tiles: _GradientTiles, group: slice, dH, dW, bias_total) -> None:
    """Add the tiles of a group of tokens. dW and bias_total receive sums in their own dtype."""
    call, precision = tiles.call, tiles.scale_T.dtype
    weight_blocks = tiles.blocks_in(call.plan.products)
    hidden_sum = None
    if dH is not None:
        own = dH.dtype == precision  # and 0 so far
        hidden_sum = dH[group] if own else torch.zeros_like(dH[group], dtype=precision)
    for block in vocab_blocks(call.plan, len(call.weight_VD)):
        weight_sum = None if dW is None else dW[block].to(precision)
        for rows, g in tiles.of(block):
            if bias_total is not None:
                bias_total[block] += g.sum(0)
            g = g.to(call.plan.products)
            if dH is not None:
                inside = slice(rows.start - group.start, rows.stop - group.start)
                add_product(hidden_sum[inside], g, weight_blocks[block])
            if dW is not None:
                add_product(weight_sum, g.t(), call.hidden_TD[rows].to(g.dtype))
            del g
        if dW is not None and weight_sum.dtype != dW.dtype:
            dW[block] = weight_sum
    if dH is not None and hidden_sum.dtype != dH.dtype:
        dH[group] = hidden_sum


class _GradientTiles:
    """Tiles of dL/d(h.w + b) in fp32: from what was kept, or from logits made again.

    whole: the first rows have no tile, because their E' is multiplied whole.
    """

    def __init__(
        self, call: HeadCall, saved: dict[str, Tensor], scale_T: Tensor, whole: int
    ) -> None:
        self.call, self.scale_T, self.whole, self.kept_TV = call, scale_T, whole, saved["kept"]
        self.total_T, self.offset_T = saved["total"], saved["offset"]
        self.buffer = tile_buffer(call.plan, self.total_T)
        self.precise_blocks = WeightBlocks(call, self.total_T.dtype)
        self.kept: list[slice] = []
        self.rest: list[tuple[slice, LogitTiles]] = []

    def groups(self) -> list[slice]:
        """The tokens that have tiles, `plan.token_group` at a time; one empty group if there are none."""
        first, T = self.whole, len(self.call.hidden_TD)
        size = max(self.call.plan.token_group, 1)
        starts = range(first, T, size) or [first]
        return [slice(start, min(start + size, T)) for start in starts]

    def open(self, group: slice) -> None:
        """Go on with the tiles of this group. Hidden states in the precision of the logits are of one."""
        plan, K = self.call.plan, len(self.kept_TV)
        self.rest = []
        self.kept = token_chunks(plan, group.start, min(K, group.stop))
        for rows in token_chunks(plan, max(group.start, K), group.stop):
            self.rest.append((rows, LogitTiles(self.call, self.precise_blocks, self.buffer, rows)))

    def blocks_in(self, dtype: torch.dtype) -> WeightBlocks:
        own = dtype == self.total_T.dtype
        return self.precise_blocks if own else WeightBlocks(self.call, dtype)

    def of(self, block: slice) -> Iterator[tuple[slice, Tensor]]:
        """(rows, s E'). Each is overwritten by the next."""
        for rows in self.kept:
            kept = self.kept_TV[rows, block]
            e = self.buffer[: kept.numel()].view(kept.shape).copy_(kept)
            yield rows, e.mul_(self.scale_T[rows, None])
        for rows, tiles in self.rest:
            yield rows, self._again(rows, tiles, block)

    def _again(self, rows: slice, tiles: LogitTiles, block: slice) -> Tensor:
        """From the forward pass's offset and sum.

        With logits near 1e4 their log-sum-exp has lost the digits that exp(z - lse) needs.
        """
        z = tiles.logits(block)
        slope = softcap_slope(z, self.call.options)
        z.sub_(self.offset_T[rows, None]).exp_()
        inside, columns = in_block(self.call.targets_T[rows], block)
        z[inside, columns] -= self.total_T[rows][inside]
        if slope is not None:
            z.mul_(slope)
        return z.mul_(self.scale_T[rows, None])

    def whole_bias(self, block: slice) -> Tensor:
        """The gradient of a block of the bias from the rows that have no tile."""
        kept = self.kept_TV[: self.whole, block].to(self.scale_T.dtype)
        return kept.t() @ self.scale_T[: self.whole]
