"""The schedules of triton.py with row sums, exponentials and gradient tiles from csrc, for sm_90a.

sm_90a is H100 and H200. bf16 alone, no bias, no soft cap, rows at multiples of 16 bytes; anything else is
refused by name. `auto` takes them for small heads, where an H100 showed them to be the faster ones, if they
are built: csrc/README.md has the numbers.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_fast.errors import UnavailableError
from dpo_fast.ops.linear_logp import cuda_extension, triton
from dpo_fast.ops.linear_logp.call import HeadCall
from dpo_fast.ops.linear_logp.triton import Products

SUMS = {"entropy": "weighted", "log_sum_p2": "squares"}  # extra: the sum it needs
# Tiles of tokens. With more of them than this, clusters of two pay even if one tile stands idle.
MANY_TILES = 8
# Hidden sizes up to this are served faster than by Triton: the loop over D is short there, and ping-pong
# hides the epilogue. On an H100: 0.94 to 1.06 x the bare products at D 896, Triton 1.06 to 1.13; at D 4096
# 1.00 to 1.08 and 0.99 to 1.06.
SMALL = 1024


def forward(call: HeadCall, extras: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As `op.Schedules.forward`.

    Raises:
        UnavailableError: something that these kernels do not serve, with its name and value.
    """
    refuse(call)
    return triton.forward(call, extras, PRODUCTS)


def backward(
    call: HeadCall, grad_T: Tensor, saved: dict[str, Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `op.Schedules.backward`."""
    return triton.backward(call, grad_T, saved, needs, PRODUCTS)


def refuse(call: HeadCall) -> None:
    """Raises UnavailableError for what the kernels do not serve."""
    wrong = why_not_served(call.hidden_TD, call.weight_VD, call.bias, call.options.softcap)
    if wrong:
        raise UnavailableError(
            f"implementation='cuda' cannot run linear_logp here: {wrong}; use implementation='triton'"
        )


def why_not_served(
    hidden_TD: Tensor, weight_VD: Tensor, bias: Tensor | None, softcap: float | None
) -> str | None:
    """What of a call these kernels do not serve; None if they serve it."""
    if bias is not None:
        return f"bias of {len(bias)} elements: a bias is not served"
    if softcap:
        return f"softcap={softcap}: a soft cap is not served"
    if hidden_TD.dtype != torch.bfloat16:
        return f"hidden is {hidden_TD.dtype}: torch.bfloat16 alone is served"
    return _why_not_described("hidden", hidden_TD) or _why_not_described("weight", weight_VD)


def serves_small(
    hidden_TD: Tensor, weight_VD: Tensor, bias: Tensor | None, softcap: float | None
) -> bool:
    """Whether this is a head for which `auto` prefers these kernels."""
    fits = hidden_TD.is_cuda and hidden_TD.shape[1] <= SMALL
    return fits and why_not_served(hidden_TD, weight_VD, bias, softcap) is None


def _why_not_described(name: str, x: Tensor) -> str | None:
    """Why TMA cannot address the rows of x."""
    rows, columns = x.shape
    apart = x.stride(0) if rows > 1 else columns  # torch may give a single row any stride
    aligned = apart >= columns and apart % 8 == 0 and x.data_ptr() % 16 == 0
    if not x.numel() or (x.stride(1) == 1 and aligned):
        return None
    return (
        f"{name} {tuple(x.shape)} with strides {x.stride()} at address {x.data_ptr():#x} needs contiguous "
        "rows at multiples of 16 bytes (a hidden size that is a multiple of 8)"
    )


@functools.cache
def sizes() -> dict[str, int]:
    """kBlockT and the other sizes, from the header that the kernels are compiled with."""
    header = (cuda_extension.SOURCES / "linear_logp_sm90.h").read_text()
    return {n: int(v) for n, v in re.findall(r"^constexpr int (k\w+) = (\d+);", header, re.M)}


@dataclass(frozen=True)
class Launch:
    """The grid of one launch.

    cluster: blocks that share a tile of the weight, one tile of tokens each.
    blocks: of the persistent grid.
    units_t: units of `cluster` tiles of tokens.
    tiles_v: tiles of the vocabulary.

    A cluster takes every (blocks / cluster)-th pair of unit and tile. Every tile of V is summed by itself,
    so few tokens fill a device too, and a token's bits do not depend on T.
    """

    cluster: int
    blocks: int
    units_t: int
    tiles_v: int

    @property
    def tokens_per_unit(self) -> int:
        return self.cluster * sizes()["kBlockT"]


def plan_launch(T: int, V: int, multiprocessors: int) -> Launch:
    """The grid for T and V of 1 or more.

    Clusters of two, unless there is one multiprocessor, or the tiles of tokens are few and odd in number:
    then one of them would be idle.
    """
    tiles_t, tiles_v = -(-T // sizes()["kBlockT"]), -(-V // sizes()["kBlockV"])
    paired = tiles_t % 2 == 0 or tiles_t > MANY_TILES
    cluster = 2 if paired and multiprocessors > 1 else 1
    units_t = -(-tiles_t // cluster)
    blocks = min(units_t * tiles_v, multiprocessors // cluster) * cluster
    return Launch(cluster, blocks, units_t, tiles_v)


def repair_flags(wrong_T: Tensor, launch: Launch) -> Tensor:
    """[1 + units_t] int8: whether any row is wrong, and whether each unit has one. On the device."""
    room = launch.units_t * launch.tokens_per_unit - len(wrong_T)
    units = torch.nn.functional.pad(wrong_T, (0, room)).view(launch.units_t, -1).any(1)
    return torch.cat([wrong_T.any()[None], units]).to(torch.int8)


@dataclass(frozen=True)
class RowPass:
    """A pass over a block of tokens that has been launched.

    sums: as of `dpo_fast.kernels.linear_logp.RowPass`.
    """

    sums: dict[str, Tensor]
    settled: bool = False
    _launch: Launch | None = None
    _run: Callable | None = None

    def repair(self, wrong_T: Tensor) -> None:
        """Do again the units that hold rows which `wrong_T` (bool) marks, against the offsets as they are
        now. Their other rows come out with the same bits. Waits for nothing."""
        if self._run is not None:
            self._run(repair=repair_flags(wrong_T, self._launch))


def row_pass(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: None,
    targets_T: Tensor,
    *,
    options: dict,
    extras: tuple[str, ...] = (),
    offset_T: Tensor | None = None,
    kept_TV: Tensor | None = None,
    score_T: Tensor | None = None,
    largest_shift: float | None = None,
) -> RowPass:
    """Launch the pass over a block of tokens; with `kept_TV` it stores their exponentials.

    The twin of `dpo_fast.kernels.linear_logp.RowPass`, which explains the arguments. `score_T` is not
    needed: a target's score is that of its tile, where one row in a thousand branches off to it.
    `largest_shift` is left to the caller: nothing is settled here.
    """
    T, V = len(hidden_TD), len(weight_VD)
    new = lambda *shape: hidden_TD.new_empty(shape, dtype=torch.float32)  # noqa: E731
    names = [SUMS[name] for name in extras if name in SUMS]
    computed = ("weighted", "squares") if names else ()  # both or neither
    sums = {name: new(T) for name in ("maximum", "total", *computed)}
    sums |= {"offset": new(T) if offset_T is None else offset_T, "shift": new(T)}
    wanted = {name: x for name, x in sums.items() if name not in computed or name in names}
    if "is_top1" in extras:
        wanted["top"] = new(T)
    if T == 0:
        return RowPass(wanted)
    score_T = new(T).fill_(-torch.inf)  # stays so where the target is not among these columns
    launch = plan_launch(T, V, _multiprocessors(hidden_TD.device))
    run = functools.partial(
        cuda_extension.operations().rows,
        hidden_TD,
        weight_VD,
        targets_T,
        _factor(options),
        offset=sums["offset"],
        kept=kept_TV,
        partials=new(2 + len(computed), launch.tiles_v, T),
        score=score_T,
        shift=sums["shift"],
        maximum=sums["maximum"],
        total=sums["total"],
        weighted=sums.get("weighted"),
        squares=sums.get("squares"),
        cluster=launch.cluster,
        blocks=launch.blocks,
    )
    run(repair=None)
    if "top" in wanted:
        torch.mul(score_T, abs(_factor(options)) / math.log(2), out=wanted["top"])
    return RowPass(wanted, _launch=launch, _run=run)


def gradient_tile(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: None,
    targets_T: Tensor,
    offset_T: Tensor,
    hit_T: Tensor,
    per_p_T: Tensor,
    out_TV: Tensor,
    *,
    options: dict,
    first_column: int = 0,
    column_sums: bool = False,
) -> None:
    """The twin of `dpo_fast.kernels.gradient_tile.gradient_tile`. Column sums belong to a bias: none."""
    launch = plan_launch(len(hidden_TD), len(weight_VD), _multiprocessors(hidden_TD.device))
    cuda_extension.operations().gradient(
        hidden_TD,
        weight_VD,
        targets_T,
        _factor(options),
        offset_T,
        hit_T,
        per_p_T,
        first_column,
        out_TV,
        launch.cluster,
        launch.blocks,
    )


PRODUCTS = Products(row_pass, gradient_tile)


def _factor(options: dict) -> float:
    return options["logit_scale"] / options["temperature"]


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
