"""Statistics and gradient tiles of z = cap(logit_scale * (h W^T + b)) / temperature.

`statistics` reduces each row of z to its log-sum-exp and a few sums, `gradient_tile` recomputes a
tile of z and writes dL/d(h.w + b) for it. Both consume the fp32 accumulator of the product, so a
logit is never rounded and never stored.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SPLITS = 32  # programs along V per token tile; the partial sums take 12 bytes * 32 a token
MERGE_TOKENS = 128


@dataclass(frozen=True)
class TileConfig:
    """Sizes of one launch. `group_t` token tiles share their weight columns in the L2 cache."""

    block_t: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group_t: int = 16


# Keyed by (architecture, D bin, V bin), never by T, which changes with every batch. With a small D
# the inner loop is short and the epilogue weighs more: smaller tiles let two programs share an SM,
# one in its product while the other is in its epilogue. A small V has few columns to spread.
HALF_CONFIGS = {
    ("sm_80", "small", "small"): TileConfig(128, 64, 32, 4, 4),
    ("sm_80", "small", "large"): TileConfig(128, 128, 32, 8, 4),
    ("sm_80", "large", "small"): TileConfig(128, 128, 32, 8, 4),
    ("sm_80", "large", "large"): TileConfig(128, 128, 64, 8, 3),
    ("sm_90", "small", "small"): TileConfig(128, 128, 64, 8, 3),
    ("sm_90", "small", "large"): TileConfig(128, 128, 64, 8, 3),
    ("sm_90", "large", "small"): TileConfig(128, 128, 64, 8, 4),
    ("sm_90", "large", "large"): TileConfig(128, 256, 64, 8, 3),
    ("sm_100", "small", "small"): TileConfig(128, 128, 64, 8, 3),
    ("sm_100", "small", "large"): TileConfig(128, 128, 64, 8, 3),
    ("sm_100", "large", "small"): TileConfig(128, 128, 64, 8, 4),
    ("sm_100", "large", "large"): TileConfig(128, 128, 64, 8, 4),
}
OTHER_HALF = TileConfig(64, 128, 32, 4, 3)  # 36 KiB: fits sm_86, sm_89, sm_120 and others
RICH_HALF = TileConfig(128, 64, 64, 8, 3)  # bias, soft cap and extras spill registers above this
FLOAT = TileConfig(64, 64, 16, 4, 3)  # fp32 products in full precision use no tensor cores
INTERPRETER = TileConfig(16, 32, 32, 1, 1, group_t=2)


def config_for(arch: str, dtype: torch.dtype, D: int, V: int, *, rich: bool = False) -> TileConfig:
    """The shipped configuration. `arch`: "sm_90" or the like, "interpreter". `rich`: any option."""
    if arch == "interpreter":
        return INTERPRETER
    if dtype == torch.float32:
        return FLOAT
    if rich:
        return RICH_HALF if arch.startswith("sm_") else OTHER_HALF
    bins = ("small" if D <= 1024 else "large", "small" if V <= 32768 else "large")
    return HALF_CONFIGS.get((arch, *bins), OTHER_HALF)


def arch_of(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter" if device.type == "cpu" else device.type
    if torch.version.hip is not None:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return "sm_100" if major == 10 else f"sm_{major}{minor}"


def on_device(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def interpretable(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """On a CPU bf16 as fp32, the same values: the interpreter multiplies the bit patterns of bf16
    and truncates where a device rounds. Anything else unchanged."""
    narrow = lambda x: x is not None and x.dtype == torch.bfloat16 and not x.is_cuda  # noqa: E731
    return tuple(x.float() if narrow(x) else x for x in tensors)


def split_columns(V: int, block_v: int) -> int:
    """Columns of one split. A function of V alone: a row's sums do not depend on its batch."""
    return triton.cdiv(triton.cdiv(V, MAX_SPLITS), block_v) * block_v


@triton.jit
def _grouped(pid, tiles_t, tiles_v, GROUP_T: tl.constexpr):
    """Token tiles vary fastest within a group, so that running programs share both operands."""
    first = pid // (GROUP_T * tiles_v) * GROUP_T
    size = tl.minimum(tiles_t - first, GROUP_T)
    inside = pid % (GROUP_T * tiles_v)
    return first + inside % size, inside // size


@triton.jit
def _product(
    hidden_ptr, weight_ptr, offs_t, offs_v, T, V, D,
    stride_ht, stride_hd, stride_wv, stride_wd,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h W^T of one tile. Rows past the end read the last row instead: no mask on the hot loads."""
    rows = tl.minimum(offs_t, T - 1).to(tl.int64)
    columns = tl.minimum(offs_v, V - 1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    along_d = offs_d.to(tl.int64)
    h_ptrs = hidden_ptr + rows[:, None] * stride_ht + along_d[None, :] * stride_hd
    w_ptrs = weight_ptr + columns[None, :] * stride_wv + along_d[:, None] * stride_wd
    acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            h = tl.load(h_ptrs)
            w = tl.load(w_ptrs)
        else:
            mask_d = offs_d < D - start
            h = tl.load(h_ptrs, mask=mask_d[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_d[:, None], other=0.0)
        acc = tl.dot(h, w, acc, input_precision=PRECISION)
        h_ptrs += BLOCK_D * stride_hd
        w_ptrs += BLOCK_D * stride_wd
    return acc


@triton.jit
def _logits(
    acc, bias_ptr, offs_v, mask_v, factor, cap_in, cap_out,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, WITH_SLOPE: tl.constexpr,
):  # fmt: skip
    """Logits and the cap's slope. z = factor (acc + b), or cap_out tanh(cap_in (acc + b))."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    slope = 1.0
    if HAS_CAP:
        x = acc * cap_in
        # exp of a non-positive number never overflows; the slope 1 - tanh^2 has no cancellation.
        e = tl.exp(-2.0 * tl.abs(x))
        magnitude = (1.0 - e) / (1.0 + e)
        z = cap_out * tl.where(x < 0, -magnitude, magnitude)
        if WITH_SLOPE:
            slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    else:
        z = acc * factor
    return z, slope


@triton.jit
def _finite(maximum):
    """A row that has seen only -inf gets offset 0: exp(-inf - 0) is 0, exp(-inf + inf) is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _shift(maximum, offset):
    """maximum - offset, 0 for a row that has seen only -inf (its sums are 0)."""
    return tl.where(maximum == float("-inf"), 0.0, maximum - offset)


@triton.jit(do_not_specialize=["T"])
def statistics_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, partials_ptr, T, V, D,
    stride_ht, stride_hd, stride_wv, stride_wd, factor, cap_in, cap_out, columns_per_split, splits,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr,
    MEAN: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    """Online sums of BLOCK_T rows over one split, written to partials [plane, split, T]."""
    pid_t, pid_split = _grouped(tl.program_id(0), tl.cdiv(T, BLOCK_T), splits, GROUP_T)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    targets = tl.load(targets_ptr + offs_t, mask=mask_t, other=-1)
    maximum = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    target, weighted, squares, logits = total, total, total, total
    first = pid_split * columns_per_split
    for start in range(first, tl.minimum(first + columns_per_split, V), BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        acc = _product(
            hidden_ptr, weight_ptr, offs_t, offs_v, T, V, D, stride_ht, stride_hd, stride_wv,
            stride_wd, BLOCK_T, BLOCK_V, BLOCK_D, EVEN_D, PRECISION,
        )  # fmt: skip
        z, _ = _logits(
            acc, bias_ptr, offs_v, mask_v, factor, cap_in, cap_out, HAS_BIAS, HAS_CAP, False
        )
        target += tl.sum(tl.where(offs_v[None, :] == targets[:, None], z, 0.0), axis=1)
        if MEAN:
            logits += tl.sum(tl.where(mask_v[None, :], z, 0.0), axis=1)
        z = tl.where(mask_v[None, :], z, float("-inf"))
        previous, maximum = maximum, tl.maximum(maximum, tl.max(z, axis=1))
        offset = _finite(maximum)
        decay = tl.exp(previous - offset)
        z -= offset[:, None]
        e = tl.exp(z)
        if ENTROPY:
            fresh = tl.sum(tl.where(e > 0, e * z, 0.0), axis=1)
            weighted = decay * (weighted + _shift(previous, offset) * total) + fresh
        if SQUARES:
            squares = decay * decay * squares + tl.sum(e * e, axis=1)
        total = decay * total + tl.sum(e, axis=1)
    plane = splits * T.to(tl.int64)
    out_ptrs = partials_ptr + pid_split * T.to(tl.int64) + offs_t
    tl.store(out_ptrs, maximum, mask=mask_t)
    tl.store(out_ptrs + plane, total, mask=mask_t)
    tl.store(out_ptrs + 2 * plane, target, mask=mask_t)
    if ENTROPY:
        tl.store(out_ptrs + 3 * plane, weighted, mask=mask_t)
    if SQUARES:
        tl.store(out_ptrs + 4 * plane, squares, mask=mask_t)
    if MEAN:
        tl.store(out_ptrs + 5 * plane, logits, mask=mask_t)


@triton.jit(do_not_specialize=["T"])
def merge_kernel(
    partials_ptr, lse_ptr, logp_ptr, entropy_ptr, squares_ptr, mean_ptr, top1_ptr, T, V, splits,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Merge the splits of each row in a fixed order and finish every output."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    maximum = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    target, weighted, squares, logits = total, total, total, total
    plane = splits * T.to(tl.int64)
    for split in range(splits):
        in_ptrs = partials_ptr + split * T.to(tl.int64) + offs_t
        part_max = tl.load(in_ptrs, mask=mask_t, other=0.0)
        part_total = tl.load(in_ptrs + plane, mask=mask_t, other=0.0)
        target += tl.load(in_ptrs + 2 * plane, mask=mask_t, other=0.0)
        previous, maximum = maximum, tl.maximum(maximum, part_max)
        offset = _finite(maximum)
        decay, gain = tl.exp(previous - offset), tl.exp(part_max - offset)
        if ENTROPY:
            part = tl.load(in_ptrs + 3 * plane, mask=mask_t, other=0.0)
            part = gain * (part + _shift(part_max, offset) * part_total)
            weighted = decay * (weighted + _shift(previous, offset) * total) + part
        if SQUARES:
            part = tl.load(in_ptrs + 4 * plane, mask=mask_t, other=0.0)
            squares = decay * decay * squares + gain * gain * part
        if MEAN:
            logits += tl.load(in_ptrs + 5 * plane, mask=mask_t, other=0.0)
        total = decay * total + gain * part_total
    log_total = tl.log(total)
    tl.store(lse_ptr + offs_t, maximum + log_total, mask=mask_t)
    # Not target - lse: with logits near 1e4 the sum maximum + log_total has lost the small digits.
    tl.store(logp_ptr + offs_t, target - maximum - log_total, mask=mask_t)
    if ENTROPY:
        tl.store(entropy_ptr + offs_t, log_total - weighted / total, mask=mask_t)
    if SQUARES:
        tl.store(squares_ptr + offs_t, tl.log(squares) - 2.0 * log_total, mask=mask_t)
    if MEAN:
        tl.store(mean_ptr + offs_t, logits / V, mask=mask_t)
    if TOP1:
        tl.store(top1_ptr + offs_t, (target >= maximum).to(tl.int8), mask=mask_t)


@triton.jit(do_not_specialize=["T", "V", "first_column"])
def gradient_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, lse_ptr, grad_ptr, out_ptr, column_sum_ptr,
    T, V, D, stride_ht, stride_hd, stride_wv, stride_wd, stride_ot,
    factor, cap_in, cap_out, slope_factor, first_column,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, COLUMN_SUMS: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    """g = c (1[v = y] - exp(z - lse)) slope slope_factor of one tile, rounded once."""
    pid_t, pid_v = _grouped(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP_T)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_t, mask_v = offs_t < T, offs_v < V
    acc = _product(
        hidden_ptr, weight_ptr, offs_t, offs_v, T, V, D, stride_ht, stride_hd, stride_wv,
        stride_wd, BLOCK_T, BLOCK_V, BLOCK_D, EVEN_D, PRECISION,
    )  # fmt: skip
    z, slope = _logits(
        acc, bias_ptr, offs_v, mask_v, factor, cap_in, cap_out, HAS_BIAS, HAS_CAP, True
    )
    lse = tl.load(lse_ptr + offs_t, mask=mask_t, other=0.0)
    scale = tl.load(grad_ptr + offs_t, mask=mask_t, other=0.0) * slope_factor
    targets = tl.load(targets_ptr + offs_t, mask=mask_t, other=-1) - first_column
    hit = tl.where(offs_v[None, :] == targets[:, None], 1.0, 0.0)
    g = scale[:, None] * (hit - tl.exp(z - lse[:, None])) * slope
    if COLUMN_SUMS:
        sums = tl.sum(tl.where(mask_t[:, None], g, 0.0), axis=0)
        tl.store(column_sum_ptr + pid_t.to(tl.int64) * V + offs_v, sums, mask=mask_v)
    out_ptrs = out_ptr + offs_t.to(tl.int64)[:, None] * stride_ot + offs_v[None, :]
    mask = mask_t[:, None] & mask_v[None, :]
    tl.store(out_ptrs, g.to(out_ptr.dtype.element_ty), mask=mask)


def _check(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor) -> None:
    T, D = hidden_TD.shape
    if weight_VD.shape[1] != D or targets_T.shape != (T,) or targets_T.stride() not in ((1,), (0,)):
        raise ValueError(
            f"hidden {tuple(hidden_TD.shape)}, weight {tuple(weight_VD.shape)} and contiguous "
            f"targets {tuple(targets_T.shape)} do not fit"
        )
    if hidden_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden is {hidden_TD.dtype}: the kernels take fp32, bf16 and fp16")
    if hidden_TD.dtype != weight_VD.dtype or (bias_V is not None and not bias_V.is_contiguous()):
        raise ValueError("hidden and weight must share a dtype, and the bias must be contiguous")


def _common(hidden_TD, weight_VD, bias_V, logit_scale, softcap, temperature, config) -> dict:
    """Arguments that both products share."""
    D = hidden_TD.shape[1]
    return {
        "D": D,
        "stride_ht": hidden_TD.stride(0), "stride_hd": hidden_TD.stride(1),
        "stride_wv": weight_VD.stride(0), "stride_wd": weight_VD.stride(1),
        "factor": logit_scale / temperature,
        "cap_in": logit_scale / softcap if softcap else 0.0,
        "cap_out": softcap / temperature if softcap else 0.0,
        "HAS_BIAS": bias_V is not None, "HAS_CAP": bool(softcap),
        "EVEN_D": D % config.block_d == 0,
        "PRECISION": "ieee" if hidden_TD.dtype == torch.float32 else "tf32",
        "BLOCK_T": config.block_t, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d,
        "GROUP_T": config.group_t,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def statistics(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, *,
    logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0,
    extras: tuple[str, ...] = (), config: TileConfig | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """{name: [T]} in fp32 for logp, lse and the extras (`is_top1` is bool)."""
    _check(hidden_TD, weight_VD, bias_V, targets_T)
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    new = lambda *shape: hidden_TD.new_empty(shape, dtype=torch.float32)  # noqa: E731
    out = {name: new(T) for name in ("logp", "lse", *extras)}
    if "is_top1" in extras:
        out["is_top1"] = hidden_TD.new_empty(T, dtype=torch.bool)
    if T == 0:
        return out
    hidden_TD, weight_VD, bias_V = interpretable(hidden_TD, weight_VD, bias_V)
    rich = bias_V is not None or bool(softcap) or bool(extras)
    config = config or config_for(arch_of(hidden_TD.device), hidden_TD.dtype, D, V, rich=rich)
    columns = split_columns(V, config.block_v)
    splits = triton.cdiv(V, columns)
    flags = {"ENTROPY": "entropy", "SQUARES": "log_sum_p2", "MEAN": "mean_logit"}
    wanted = {flag: name in extras for flag, name in flags.items()}
    partials = new(6 if any(wanted.values()) else 3, splits, T)
    with on_device(hidden_TD):
        statistics_kernel[(triton.cdiv(T, config.block_t) * splits,)](
            hidden_ptr=hidden_TD, weight_ptr=weight_VD, bias_ptr=bias_V, targets_ptr=targets_T,
            partials_ptr=partials, T=T, V=V, columns_per_split=columns, splits=splits, **wanted,
            **_common(hidden_TD, weight_VD, bias_V, logit_scale, softcap, temperature, config),
        )  # fmt: skip
        merge_kernel[(triton.cdiv(T, MERGE_TOKENS),)](
            partials_ptr=partials, lse_ptr=out["lse"], logp_ptr=out["logp"],
            entropy_ptr=out.get("entropy"), squares_ptr=out.get("log_sum_p2"),
            mean_ptr=out.get("mean_logit"),
            top1_ptr=out["is_top1"].view(torch.int8) if "is_top1" in extras else None,
            T=T, V=V, splits=splits, TOP1="is_top1" in extras, BLOCK_T=MERGE_TOKENS,
            num_warps=4, **wanted,
        )  # fmt: skip
    return out


def gradient_tile(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor,
    lse_T: Tensor, grad_T: Tensor, out_TV: Tensor, *, first_column: int = 0,
    logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0,
    column_sums: bool = False, config: TileConfig | None = None,
) -> Tensor | None:  # fmt: skip
    """Write dL/d(h.w + b) to `out_TV` for the rows and columns given; their column sums in fp32.

    `weight_VD` and `bias_V` are the columns that start at `first_column` of the vocabulary. `lse_T`
    and `grad_T` = dL/dlogp are contiguous fp32. The sums are None unless asked for.
    """
    _check(hidden_TD, weight_VD, bias_V, targets_T)
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    rich = bias_V is not None or bool(softcap) or column_sums
    config = config or config_for(arch_of(hidden_TD.device), hidden_TD.dtype, D, V, rich=rich)
    hidden_TD, weight_VD, bias_V, g_TV = interpretable(hidden_TD, weight_VD, bias_V, out_TV)
    tiles_t = triton.cdiv(T, config.block_t)
    sums = hidden_TD.new_empty((tiles_t, V), dtype=torch.float32) if column_sums else None
    with on_device(hidden_TD):
        gradient_kernel[(tiles_t * triton.cdiv(V, config.block_v),)](
            hidden_ptr=hidden_TD, weight_ptr=weight_VD, bias_ptr=bias_V, targets_ptr=targets_T,
            lse_ptr=lse_T, grad_ptr=grad_T, out_ptr=g_TV, column_sum_ptr=sums, T=T, V=V,
            stride_ot=g_TV.stride(0), slope_factor=logit_scale / temperature,
            first_column=first_column, COLUMN_SUMS=column_sums,
            **_common(hidden_TD, weight_VD, bias_V, logit_scale, softcap, temperature, config),
        )  # fmt: skip
    if g_TV is not out_TV:
        out_TV.copy_(g_TV)
    return None if sums is None else sums.sum(0)
