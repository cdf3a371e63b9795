"""Pictures of the losses, made of the table: `python -m dpo_fast.report.loss_curves docs/pictures/losses`.

Each picture has the loss of one pair (completion, group) over its reward margin, and the slope of that
curve. The numbers come from the functions that train, in fp64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_fast.errors import UserError
from dpo_fast.losses import LOSSES, LossOptions
from dpo_fast.losses.custom import known_names, spec_of
from dpo_fast.losses.logps import GroupLogps, PairLogps, SequenceLogps
from dpo_fast.losses.spec import LossSpec
from dpo_fast.report.still import Line, picture

POINTS = 121  # of a curve
TOKENS = 100  # scored tokens of each answer
NATS = -2.0  # log-prob of a token under the reference
REWARDS = (-5.0, 5.0)
# How a margin may come about: (log-ratio of the chosen answer, of the rejected one) over the margin.
MOVES: dict[str, tuple[float, float]] = {
    "both move apart": (0.5, -0.5),
    "only the chosen moves": (1.0, 0.0),
    "only the rejected moves": (0.0, -1.0),
}


@dataclass(frozen=True)
class Plot:
    """What of a loss is drawn.

    options: those of the common settings for it, where the defaults are not.
    reach: first and last value across.
    top: the highest value of the loss that is drawn; None: all of it.
    note: the settings in words, below the title.
    beside: other curves of it by their label: options that differ, or the column `soft_label`.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    reach: tuple[float, float] = REWARDS
    top: float | None = None
    note: str = ""
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


PLOTS: dict[str, Plot] = {
    "sigmoid": Plot(beside={"label_smoothing 0.1": {"label_smoothing": 0.1}}),
    "ipo": Plot(reach=(-1, 2), note="per token; the margin wanted is 0.5 whatever beta is"),
    "robust": Plot({"label_smoothing": 0.1}, note="label_smoothing 0.1"),
    "exo_pair": Plot({"label_smoothing": 1e-3}, note="label_smoothing 0.001"),
    "sppo_hard": Plot(reach=(-1, 2)),
    "aot": Plot(note="a batch of one pair"),
    "aot_unpaired": Plot(note="a batch of one pair"),
    "discopop": Plot(reach=(-1, 3), top=4.0),
    "sigmoid_norm": Plot({"beta": 5.0}, note="beta 5, per token"),
    "soft": Plot(
        note="by the column soft_label",
        beside={"1.0": {"soft_label": 1.0}, "0.8": {"soft_label": 0.8}, "0.5": {"soft_label": 0.5}},
    ),
    "dpop": Plot(reach=(-1, 5), top=6.0, note="dpop_lambda 50"),
    "sft": Plot(reach=(-2, 2), note="per token, beside the reward of the chosen answer"),
    "simpo": Plot(
        {"beta": 2.0, "simpo_gamma": 1.0}, note="beta 2, simpo_gamma 1, per token; dotted: gamma"
    ),
    "cpo": Plot(note="cpo_alpha 1; an answer of 100 tokens"),
    "orpo": Plot(reach=(-0.15, 0.15), note="per token"),
    "slic": Plot(reach=(-0.5, 0.5), note="slic_delta 1, slic_lambda 0.1"),
    "grpo": Plot(reach=(-0.8, 0.8), note="one token; epsilon 0.2"),
    "dapo": Plot(
        {"epsilon_high": 0.28}, (-0.8, 0.8), note="one token; epsilon 0.2, epsilon_high 0.28"
    ),
}
ACROSS = {
    "pairs": "reward margin (rewards/margins)",
    "completions": "reward",
    "groups": "reward margin between neighbours in the ranking",
}


def loss_picture(loss: str | LossSpec, plot: Plot | None = None) -> str:
    """The SVG of one loss: its value and its slope over the margin.

    loss: an entry of the table, or what `loss.type` takes: the name of a loss, of one that was registered,
        or `my_losses.py:my_loss`.

    Raises:
        UserError: there is no such loss.
    """
    spec = spec_of(loss) if isinstance(loss, str) else loss
    if spec is None:
        raise UserError(f"there is no loss {loss!r}: choose from {', '.join(known_names())}")
    plot = PLOTS.get(spec.name, Plot()) if plot is None else plot
    across = "log of the probability ratio" if spec.by_token else ACROSS[spec.kind]
    return picture(spec.name, plot.note, across, curves(spec, plot), plot.top)


def curves(spec: LossSpec, plot: Plot) -> list[Line]:
    """The lines of a picture: (across, value, slope), fp64 [POINTS] each."""
    options = LossOptions(**plot.options)
    x = torch.linspace(*plot.reach, POINTS, dtype=torch.float64, requires_grad=True)
    functions = _KINDS[spec.kind](spec, options, plot)
    lines = []
    for label, function in functions.items():
        value = function(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
        lines.append(Line(label, x.tolist(), value.tolist(), slope.tolist()))
    return _distinct(lines)


def _distinct(lines: list[Line]) -> list[Line]:
    """One line without a label where all are the same: the loss sees the margin alone."""
    first = lines[0]
    same = all(max(abs(a - b) for a, b in zip(first.values, line.values)) < 1e-9 for line in lines)
    return [replace(first, label="")] if same else lines


Function = Callable[[Tensor], Tensor]


def _pairs(spec: LossSpec, options: LossOptions, plot: Plot) -> dict[str, Function]:
    """One function for each way in which the margin may come about, or for each of `beside`."""
    if plot.beside:
        move = MOVES["both move apart"]
        return {
            label: _pair_function(spec, _changed(options, changes), move, changes.get("soft_label"))
            for label, changes in {**_plain(plot), **plot.beside}.items()
        }
    return {label: _pair_function(spec, options, move) for label, move in MOVES.items()}


def _plain(plot: Plot) -> dict[str, dict[str, Any]]:
    """The curve of the settings themselves, unless the others stand for it."""
    columns = any("soft_label" in changes for changes in plot.beside.values())
    return {} if columns else {"as it is": {}}


def _changed(options: LossOptions, changes: Mapping[str, Any]) -> LossOptions:
    return replace(options, **{k: v for k, v in changes.items() if k != "soft_label"})


def _pair_function(
    spec: LossSpec, options: LossOptions, move: tuple[float, float], soft_label: float | None = None
) -> Function:
    def value(x: Tensor) -> Tensor:
        # A reward is beta times a log-ratio, or its mean over tokens where the loss takes that.
        sums = x / options.beta * (TOKENS if spec.divides(options) else 1)
        start = torch.full_like(x, NATS * TOKENS)
        tokens = torch.full_like(x, TOKENS)
        chosen, rejected = start + move[0] * sums, start + move[1] * sums
        reference = start if spec.needs_reference else None
        label = None if soft_label is None else torch.full_like(x, soft_label)
        pairs = PairLogps(chosen, rejected, tokens, tokens, reference, reference, soft_label=label)
        values = spec.function(pairs, options)
        if spec.normaliser == "chosen_tokens":
            values = values / TOKENS
        return values - spec.sft(options) * chosen / TOKENS

    # A loss that compares the pairs of a batch with one another sees one pair at a time.
    return value if not spec.coupled else lambda x: torch.cat([value(each) for each in x.split(1)])


def _completions(spec: LossSpec, options: LossOptions, plot: Plot) -> dict[str, Function]:
    def function(desirable: bool) -> Function:
        def value(x: Tensor) -> Tensor:
            start = torch.full_like(x, NATS * TOKENS)
            tokens, kind = (
                torch.full_like(x, TOKENS),
                torch.full_like(x, desirable, dtype=torch.bool),
            )
            answers = SequenceLogps(start + x / options.beta, tokens, kind, start)
            return spec.function(answers, options)

        return value

    return {"desirable": function(True), "undesirable": function(False)}


def _groups(spec: LossSpec, options: LossOptions, plot: Plot) -> dict[str, Function]:
    if spec.by_token:
        return {"score above the mean": _token(spec, options, 0), "below": _token(spec, options, 1)}
    ranks = {"2 answers": [1, 0], "4 in order": [3, 2, 1, 0], "1 good, 3 bad": [1, 0, 0, 0]}
    return {label: _ranking(spec, options, scores) for label, scores in ranks.items()}


def _ranking(spec: LossSpec, options: LossOptions, scores: list[int]) -> Function:
    """A group whose rewards lie as far apart as its scores, times the margin."""

    def one(x: Tensor) -> Tensor:
        scores_S = torch.tensor(scores, dtype=x.dtype)
        logps_S = scores_S * x / options.beta
        tokens_S = torch.full_like(scores_S, TOKENS)
        group = GroupLogps(logps_S, tokens_S, scores_S, torch.tensor([len(scores)]), 0 * scores_S)
        return spec.function(group, options).sum().reshape(1)

    return lambda x: torch.cat([one(each) for each in x.split(1)])


def _token(spec: LossSpec, options: LossOptions, place: int) -> Function:
    """Two answers of a token each, of which that at `place` moves away from the model that wrote it."""

    def one(x: Tensor) -> Tensor:
        moves = torch.eye(2, dtype=x.dtype)[place] * x
        old = torch.full((2,), NATS, dtype=x.dtype)
        lengths, counts = torch.tensor([1, 1]), torch.tensor([2])
        scores = torch.tensor([1.0, 0.0], dtype=x.dtype)
        group = GroupLogps(old + moves, lengths, scores, counts, None, old + moves, old, None)
        return spec.function(group, options)[place].reshape(1)

    return lambda x: torch.cat([one(each) for each in x.split(1)])


_KINDS = {"pairs": _pairs, "completions": _completions, "groups": _groups}


def compared_picture() -> str:
    """Losses on pairs over one another."""
    lines = []
    for name in ("sigmoid", "hinge", "apo_zero", "discopop"):
        (line, *_) = curves(LOSSES[name], Plot(reach=(-3, 3)))
        lines.append(replace(line, label=name))
    return picture("four losses", "beta 0.1, both answers move apart", ACROSS["pairs"], lines)


def write(folder: Path) -> list[Path]:
    """Write the picture of every loss of the table into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: loss_picture(spec) for name, spec in LOSSES.items()}
    pictures["compared"] = compared_picture()
    for name, content in pictures.items():
        (folder / f"{name}.svg").write_text(content, encoding="utf-8")
    return [folder / f"{name}.svg" for name in pictures]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
