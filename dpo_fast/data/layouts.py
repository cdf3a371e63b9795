"""Layouts: pairs of token ids to a `ScoredBatch`. `padded` pads to the longest, `packed` concatenates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch

LAYOUTS = ("padded", "packed")


def collate(
    pairs: Sequence[dict], layout: str, *, pad_id: int = 0, indices: Sequence[int] | None = None
) -> ScoredBatch:
    """Lay out pairs with keys `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int).

    No pairs at all give one padding token and nothing scored, so that a rank without work still
    takes part in every collective.

    Raises:
        ValueError: an unknown layout, or a sequence without prompt or completion.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: choose from {', '.join(LAYOUTS)}")
    indices = range(len(pairs)) if indices is None else indices
    sequences, starts = [], []
    for pair in pairs:
        for side in ("chosen_ids", "rejected_ids"):
            if not len(pair["prompt_ids"]) or not len(pair[side]):
                raise ValueError(f"a pair has an empty prompt or empty {side}: {pair}")
            sequences.append([*pair["prompt_ids"], *pair[side]])
            starts.append(len(pair["prompt_ids"]))
    if not sequences:
        return _nothing(pad_id, layout)
    lengths = [len(sequence) for sequence in sequences]
    width = max(lengths) if layout == "padded" else None
    offsets = _offsets(lengths, width)
    # Token j of a sequence is predicted by its row j - 1.
    rows = [
        torch.arange(offset + start - 1, offset + length - 1)
        for offset, start, length in zip(offsets, starts, lengths)
    ]
    targets = [torch.tensor(ids[start:]) for ids, start in zip(sequences, starts)]
    place = _padded if layout == "padded" else _packed
    return ScoredBatch(
        **place(sequences, lengths, pad_id),
        rows_T=torch.cat(rows),
        targets_T=torch.cat(targets),
        lengths_S=torch.tensor([len(target) for target in targets]),
        indices_P=torch.tensor(list(indices), dtype=torch.int64),
        tokens=sum(lengths),
    )


def _offsets(lengths: list[int], width: int | None) -> list[int]:
    if width is not None:
        return [index * width for index in range(len(lengths))]
    return [0, *torch.tensor(lengths).cumsum(0).tolist()[:-1]]


def _padded(sequences: list[list[int]], lengths: list[int], pad_id: int) -> dict:
    """Right padding, so that positions are those of the sequence alone."""
    width = max(lengths)
    input_ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    positions = torch.arange(width).expand(len(sequences), -1).contiguous()
    return {
        "input_ids": input_ids,
        "position_ids": positions,
        "attention_mask": mask,
        "segments": None,
    }


def _packed(sequences: list[list[int]], lengths: list[int], pad_id: int) -> dict:
    """One row, positions starting anew with every sequence."""
    tokens: Tensor = torch.tensor([token for sequence in sequences for token in sequence])
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {
        "input_ids": tokens[None],
        "position_ids": positions[None],
        "attention_mask": None,
        "segments": tuple(lengths),
    }


def _nothing(pad_id: int, layout: str) -> ScoredBatch:
    empty = torch.zeros(0, dtype=torch.int64)
    packed = layout == "packed"
    return ScoredBatch(
        input_ids=torch.full((1, 1), pad_id),
        position_ids=torch.zeros(1, 1, dtype=torch.int64),
        attention_mask=None if packed else torch.ones(1, 1, dtype=torch.int64),
        segments=(1,) if packed else None,
        rows_T=empty,
        targets_T=empty,
        lengths_S=empty,
        indices_P=empty,
        tokens=0,
    )
