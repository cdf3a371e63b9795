"""Pictures of the layouts, made by them: `python -m dpo_fast.report.layout_pictures docs/pictures/layouts`.

Each shows two small pairs as a layout places them, and which position attends to which.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo_fast.data.layouts import LAYOUTS, Layout, Placement, Scored
from dpo_fast.report.frame import write as text_at
from dpo_fast.report.still import standalone

# Prompt, chosen answer, rejected answer. The last token of an answer predicts nothing and is left out.
PAIRS = (
    ("What is 2 + 2 ?", "It is 4 .", "It is five , I think ."),
    ("Name a fruit", "An apple .", "A car ."),
)
CELL_WIDE, CELL_HIGH, DOT = 36, 22, 7
WIDTH = 920
TONES = {"prompt": "#8a919c", "chosen": "#2f86d0", "rejected": "#d9722b", "both": "#2a9d6f"}


def layout_picture(layout: Layout) -> str:
    """The SVG of one layout."""
    words: list[str] = []
    sequences = [_scored(prompt, answer, words) for prompt, *answers in PAIRS for answer in answers]
    placement = layout.place(sequences, -1)
    kinds = _kinds(placement, sequences)
    cells, high = _rows(placement, kinds, words)
    matrix_top = high + 34
    seen = _seen(placement)
    matrix, matrix_high = _matrix(seen, kinds, matrix_top)
    total = len(kinds)
    title = f"{layout.name}: {total} positions, {seen.sum()} pairs of them in attention"
    content = text_at(8, 16, title, "title") + cells + matrix + _legend(matrix_top, total)
    return standalone(layout.name, WIDTH, matrix_top + max(matrix_high, 90) + 8, content)


def _scored(prompt: str, answer: str, words: list[str]) -> Scored:
    """Words are tokens; an id is a word's place in `words`."""
    for word in f"{prompt} {answer}".split():
        if word not in words:
            words.append(word)
    ids = [words.index(word) for word in f"{prompt} {answer}".split()]
    return Scored(np.array(ids[:-1]), len(prompt.split()))


def _kinds(placement: Placement, sequences: Sequence[Scored]) -> list[str]:
    """Of every position: prompt, chosen, rejected, both, or nothing for padding."""
    kinds = [""] * placement.input_ids.numel()
    for number, (path, sequence) in enumerate(zip(placement.paths, sequences)):
        for place, position in enumerate(path):
            kind = "prompt" if place < sequence.start else ("chosen", "rejected")[number % 2]
            kinds[position] = "both" if kinds[position] not in ("", kind) else kind
    return kinds


def _rows(placement: Placement, kinds: Sequence[str], words: Sequence[str]) -> tuple[str, float]:
    """The rows of input_ids as cells, broken where they are too long; and where they end."""
    parts, top = [], 28.0
    across = (WIDTH - 16) // CELL_WIDE
    width = placement.input_ids.shape[1]
    for row, ids in enumerate(placement.input_ids.tolist()):
        for column, token in enumerate(ids):
            line, place = divmod(column, across)
            x, y = 8 + place * CELL_WIDE, top + line * (CELL_HIGH + 2)
            parts.append(
                _cell(x, y, kinds[row * width + column], words[token] if token >= 0 else "")
            )
        top += ((width - 1) // across + 1) * (CELL_HIGH + 2) + 4
    return "".join(parts), top


def _cell(x: float, y: float, kind: str, word: str) -> str:
    look = (
        f'fill="{TONES[kind]}" fill-opacity="0.3"' if kind else 'fill="none" stroke-dasharray="2 2"'
    )
    box = f'width="{CELL_WIDE - 2}" height="{CELL_HIGH}"'
    square = f'<rect x="{x}" y="{y:g}" {box} rx="3" stroke="{TONES[kind or "prompt"]}" {look}/>'
    return square + text_at(x + CELL_WIDE / 2 - 1, y + 15, word, "word", "middle")


def _seen(placement: Placement) -> np.ndarray:
    """bool [N, N]: the first position attends to the second: both are of one sequence, in this order."""
    seen = np.zeros((placement.input_ids.numel(),) * 2, dtype=bool)
    for path in placement.paths:
        for place, position in enumerate(path):
            seen[position, path[: place + 1]] = True
    return seen


def _matrix(seen: np.ndarray, kinds: Sequence[str], top: float) -> tuple[str, float]:
    """Which position (down) attends to which (across), and the height of it."""
    size = len(kinds) * DOT
    frame = (
        f'<rect x="8" y="{top:g}" width="{size}" height="{size}" fill="none" stroke="#8a919c" '
        'stroke-opacity="0.5"/>'
    )
    dots = [
        f'<rect x="{8 + column * DOT}" y="{top + row * DOT:g}" width="{DOT - 1}" height="{DOT - 1}" '
        f'fill="{TONES[kinds[row]]}"/>'
        for row, column in zip(*np.nonzero(seen))
    ]
    head = text_at(8, top - 8, "who attends (down) to whom (across)", "hint")
    return head + frame + "".join(dots), size


def _legend(top: float, positions: int) -> str:
    names = {
        "prompt": "prompt",
        "chosen": "chosen answer",
        "rejected": "rejected answer",
        "both": "what both answers begin with",
        "": "padding",
    }
    x = 8 + positions * DOT + 28
    parts = []
    for number, (kind, label) in enumerate(names.items()):
        y = top + number * (CELL_HIGH - 3)
        look = (
            f'fill="{TONES[kind]}" fill-opacity="0.3"'
            if kind
            else 'fill="none" stroke-dasharray="2 2"'
        )
        parts.append(
            f'<rect x="{x}" y="{y:g}" width="14" height="14" rx="3" '
            f'stroke="{TONES[kind or "prompt"]}" {look}/>' + text_at(x + 22, y + 11, label, "key")
        )
    return "".join(parts)


def write(folder: Path) -> list[Path]:
    """Write the picture of every layout of the table into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, layout in LAYOUTS.items():
        (folder / f"{name}.svg").write_text(layout_picture(layout), encoding="utf-8")
    return [folder / f"{name}.svg" for name in LAYOUTS]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
