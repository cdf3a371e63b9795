"""The pass over a block of tokens: launches of `rows_kernel` and `merge_kernel`, and what they give."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from dpo_fast.kernels.alike import Results
from dpo_fast.kernels.device import interpretable, launch, on_device
from dpo_fast.kernels.merge import MERGE_TILES, MERGE_TOKENS, merge_kernel
from dpo_fast.kernels.product import arguments, check
from dpo_fast.kernels.rows import rows_kernel
from dpo_fast.kernels.search import Run, choose_tile
from dpo_fast.kernels.target_product import target_scores
from dpo_fast.kernels.tiles import TileConfig, describable, programs, repair_config, say_layouts

SUMS = {  # extra: its sum
    "entropy": "weighted",
    "log_sum_p2": "squares",
    "mean_logit": "logits",
    "is_top1": "top",
}


class RowPass:
    """A pass over one block of tokens: row sums, and with `kept_TV` the exponentials.

    The constructor launches the kernels; `repair` launches them again.

    sums: by name, [T] fp32, logits and offsets in powers of two.
        offset: m; `offset_T` with `kept_TV`, else just above the maximum.
        maximum: of z.
        shift: the target's logit less m; -inf where the target is not among these columns.
        total: sum 2^(z - m).
        weighted, squares, logits, for the extras that need them: sum 2^(z - m) (z - m),
            sum 2^(2 (z - m)), and sum z in nats.
        logp: of the target, in nats.
        top, for is_top1: the target's logit from the product of its tile, which `maximum` is comparable
            with; -inf where the target is not among these columns.

    Args:
        hidden_TD, weight_VD: fp32, bf16 or fp16, any strides; bias_V: [V], contiguous, or None.
        targets_T: int64, contiguous; values outside 0..V-1 are no target of these columns.
        offset_T, kept_TV: row offsets m, fp32, and where to store 2^(z - m) times the cap's slope.
        score_T: `target_scores` of these tokens, where they are known already.
        largest_shift: given with `kept_TV`, rows whose maximum is further from their offset are done again
            at once, `offset_T` is updated, and E is patched to E' at the targets: `settled`.
    """

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        *,
        options: dict,
        extras: tuple[str, ...] = (),
        offset_T: Tensor | None = None,
        kept_TV: Tensor | None = None,
        score_T: Tensor | None = None,
        largest_shift: float | None = None,
        config: TileConfig | None = None,
    ):
        inputs = hidden_TD, weight_VD, bias_V, targets_T
        check(*inputs)
        say_layouts("row", hidden=hidden_TD, weight=weight_VD)
        self.targets, self.options, self.kept = targets_T, options, kept_TV
        operands = interpretable(hidden_TD, weight_VD, bias_V, kept_TV)
        self.hidden, self.weight, self.bias, self.store = operands
        self.score = target_scores(*inputs, options) if score_T is None else score_T
        self.largest_shift, self.settled = largest_shift, largest_shift is not None
        names = [SUMS[name] for name in extras if name in SUMS]
        given = {"kept_TV": kept_TV, "score_T": self.score, "largest_shift": largest_shift}

        def run(tile: TileConfig) -> Callable[[], Results]:
            own_T = None if offset_T is None else offset_T.clone()  # a repair writes it
            how = {"options": options, "extras": extras, "offset_T": own_T, "config": tile}
            return RowPass(*inputs, **how, **given).results

        self.config = config or self._choose(names, run)
        self._allocate(names, offset_T)
        if len(targets_T):
            self._launch(self.config, None)
            if self.settled:
                self._launch(repair_config(self.config), self.flags_T)

    def _choose(self, names: list[str], run: Run) -> TileConfig:
        capped = bool(self.options["softcap"])
        stored = () if self.store is None else (self.store,)
        return choose_tile(
            "rows",
            self.hidden.device,
            self.hidden.dtype,
            self.hidden.shape[1],
            len(self.weight),
            run,
            stores=bool(stored),
            entropy="weighted" in names,
            rich=self.bias is not None or capped or not {*names} <= {"weighted", "top"},
            described=describable(self.hidden, self.weight, *stored),
        )

    def _allocate(self, names: list[str], offset_T: Tensor | None) -> None:
        T, V = len(self.hidden), len(self.weight)
        new = lambda *shape: self.hidden.new_empty(shape, dtype=torch.float32)  # noqa: E731
        self.sums = {name: new(T) for name in ("maximum", "shift", "total", "logp", *names)}
        self.sums["offset"] = new(T) if offset_T is None else offset_T
        if "top" in names:
            self.sums["top"].fill_(-torch.inf)
        planes = {"ENTROPY": "weighted", "SQUARES": "squares", "MEAN": "logits"}
        self.flags = {flag: name in names for flag, name in planes.items()}
        self.even_v = V % self.config.block_v == 0
        self.tiles_v = triton.cdiv(V, self.config.block_v)
        self.partials = new(5 if any(self.flags.values()) else 2, self.tiles_v, T)
        self.flags_T = self.hidden.new_zeros(1 + T, dtype=torch.int32) if self.settled else None

    def results(self) -> Results:
        """What other tiles give as well, but for rounding: logits in powers of two, sums per total."""
        sums, total_T = self.sums, self.sums["total"]
        # Near 1e4 products in fp32 are off by 1e-3.
        size_T = 1 + sums["maximum"].abs().nan_to_num(0.0, 0.0, 0.0) / 256
        values = {name: (sums[name], size_T) for name in ("maximum", "logp", "top") if name in sums}
        values["log total"] = sums["offset"] + total_T.log2(), size_T
        if "weighted" in sums:
            values["entropy"] = total_T.log2() - sums["weighted"] / total_T, size_T
        if "squares" in sums:
            values["log sum p^2"] = sums["squares"].log2() - 2 * total_T.log2(), size_T
        if "logits" in sums:
            values["mean logit"] = sums["logits"] / len(self.weight), size_T
        return Results(values, self.kept, total_T)

    def repair(self, wrong_T: Tensor) -> None:
        """Do again the rows that `wrong_T` (bool) marks, against the offsets as they are now.

        Waits for nothing: the kernels look for such rows themselves, and return if there are none.
        """
        if len(wrong_T):
            flags = torch.cat([wrong_T.any()[None], wrong_T]).to(torch.int32)
            self._launch(repair_config(self.config), flags)

    def _launch(self, config: TileConfig, repair: Tensor | None) -> None:
        tiles = triton.cdiv(len(self.targets), config.block_t) * self.tiles_v
        operands = arguments(
            self.hidden, self.weight, self.bias, config, stored=self.store, options=self.options
        )
        operands["kept"], operands["stride_kt"] = operands.pop("stored"), operands.pop("stride_st")
        shared = {
            "T": len(self.targets),
            "V": len(self.weight),
            "targets_ptr": self.targets,
            "offset_ptr": self.sums["offset"],
            "partials_ptr": self.partials,
            "repair_ptr": repair,
            "KEEP": self.kept is not None,
            "REPAIR": repair is not None,
            **self.flags,
        }
        with on_device(self.hidden):
            launch(
                rows_kernel,
                (programs(config, tiles, self.hidden.device),),
                top_ptr=self.sums.get("top"),
                TOP1="top" in self.sums,
                EVEN_V=self.even_v,
                **operands,
                **shared,
            )
            frame = {name: operands[name] for name in ("scale", "HAS_CAP", "stride_kt")}
            self._merge(**frame, **shared)
        if self.store is not self.kept:
            self.kept.copy_(self.store)

    def _merge(self, **shared) -> None:
        launch(
            merge_kernel,
            (triton.cdiv(len(self.targets), MERGE_TOKENS),),
            maximum_ptr=self.sums["maximum"],
            total_ptr=self.sums["total"],
            weighted_ptr=self.sums.get("weighted"),
            squares_ptr=self.sums.get("squares"),
            logits_ptr=self.sums.get("logits"),
            score_ptr=self.score,
            shift_ptr=self.sums["shift"],
            logp_ptr=self.sums["logp"],
            kept_ptr=self.store if self.settled else None,
            flags_ptr=self.flags_T,
            largest_shift=self.largest_shift or 0.0,
            tiles_v=self.tiles_v,
            SETTLE=self.settled,
            BLOCK_T=MERGE_TOKENS,
            BLOCK_S=MERGE_TILES,
            num_warps=4,
            **shared,
        )
