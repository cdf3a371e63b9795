"""The schedules of `linear_logp` with the first product in CUDA C++ (csrc), for sm_90a: H100, H200.

The schedules are those of triton.py; what differs is who makes row sums, exponentials and
gradient tiles. bf16 alone, no bias, no soft cap, rows at multiples of 16 bytes; anything else is
refused by name. The kernels compile and run in an emulation of the hardware (csrc/README.md says what that
shows). They have not run on a GPU, nor been timed: `auto` never chooses them.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_fast.errors import UnavailableError
from dpo_fast.ops.linear_logp import cuda_extension, triton
from dpo_fast.ops.linear_logp.triton import Products

SUMS = {"entropy": "weighted", "log_sum_p2": "squares"}  # extra: the sum it needs
MANY_TILES = 8  # beyond so many tiles of tokens a ninth that nobody needs is worth a cluster


def forward(hidden_TD, weight_VD, bias, targets_T, options, extras, plan, shard):
    """As `triton.forward`.

    Raises:
        UnavailableError: something that these kernels do not serve, with its name and value.
    """
    refuse(hidden_TD, weight_VD, bias, options)
    return triton.forward(
        hidden_TD, weight_VD, bias, targets_T, options, extras, plan, shard, PRODUCTS
    )


def backward(grad_T, hidden_TD, weight_VD, bias, targets_T, options, plan, saved, needs):
    """As `triton.backward`."""
    return triton.backward(
        grad_T, hidden_TD, weight_VD, bias, targets_T, options, plan, saved, needs, PRODUCTS
    )


def refuse(hidden_TD: Tensor, weight_VD: Tensor, bias: Tensor | None, options) -> None:
    """UnavailableError for what the kernels do not serve."""
    wrong = None
    if bias is not None:
        wrong = f"bias of {len(bias)} elements: a bias is not served"
    elif options.softcap:
        wrong = f"softcap={options.softcap}: a soft cap is not served"
    elif hidden_TD.dtype != torch.bfloat16:
        wrong = f"hidden is {hidden_TD.dtype}: torch.bfloat16 alone is served"
    for name, x in (("hidden", hidden_TD), ("weight", weight_VD)):
        wrong = wrong or _why_not_described(name, x)
    if wrong:
        raise UnavailableError(
            f"implementation='cuda' cannot run linear_logp here: {wrong}; use implementation='triton'"
        )


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

    cluster: blocks that share a tile of the weight, one tile of tokens each. blocks: of the persistent
    grid. units_t, tiles_v: units of `cluster` tiles of tokens, tiles of the vocabulary; a cluster takes
    every (blocks / cluster)-th pair of them. Every tile of V is summed by itself, whatever T is: the
    vocabulary is split, so that few tokens fill a device too, and a token's bits do not depend on T.
    """

    cluster: int
    blocks: int
    units_t: int
    tiles_v: int

    @property
    def tokens_per_unit(self) -> int:
        return self.cluster * sizes()["kBlockT"]


def plan_launch(T: int, V: int, multiprocessors: int) -> Launch:
    """For T and V of 1 or more. In clusters of two, unless an odd tile of tokens would leave one of few
    tiles idle, or there is one multiprocessor."""
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


class RowPass:
    """The row sums of one block of tokens, and with `kept_TV` their exponentials: the twin of
    `dpo_fast.kernels.linear_logp.RowPass`, which see for `sums` and the arguments."""

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: None,
        targets_T: Tensor,
        *,
        options: dict,
        extras: tuple[str, ...] = (),
        offset_T: Tensor | None = None,
        kept_TV: Tensor | None = None,
    ):
        T, V = len(hidden_TD), len(weight_VD)
        new = lambda *shape: hidden_TD.new_empty(shape, dtype=torch.float32)  # noqa: E731
        names = [SUMS[name] for name in extras if name in SUMS]
        computed = ("weighted", "squares") if names else ()  # both or neither
        sums = {name: new(T) for name in ("maximum", "total", *computed)}
        sums["target"] = hidden_TD.new_zeros(T, dtype=torch.float32)
        self.sums = {k: v for k, v in sums.items() if k not in computed or k in names}
        if T == 0:
            return
        self._launch = plan_launch(T, V, _multiprocessors(hidden_TD.device))
        partials = new(2 + len(computed), self._launch.tiles_v, T)
        self._run = functools.partial(
            cuda_extension.operations().rows,
            hidden_TD,
            weight_VD,
            targets_T,
            _factor(options),
            offset=offset_T,
            kept=kept_TV,
            partials=partials,
            target=sums["target"],
            maximum=sums["maximum"],
            total=sums["total"],
            weighted=sums.get("weighted"),
            squares=sums.get("squares"),
            cluster=self._launch.cluster,
            blocks=self._launch.blocks,
        )
        self._run(repair=None)

    def repair(self, wrong_T: Tensor) -> None:
        """Do again the units that hold rows that `wrong_T` (bool) marks, against the offsets as they are
        now; their other rows come out with the same bits. Waits for nothing."""
        if len(wrong_T):
            self._run(repair=repair_flags(wrong_T, self._launch))


def gradient_tile(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: None,
    targets_T: Tensor,
    offset_T: Tensor,
    hit_T: Tensor,
    scale_T: Tensor,
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
        scale_T,
        first_column,
        out_TV,
        launch.cluster,
        launch.blocks,
    )


PRODUCTS = Products(RowPass, gradient_tile)


def _factor(options: dict) -> float:
    return options["logit_scale"] / options["temperature"]


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
