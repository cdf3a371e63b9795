"""The one batch type. Layouts differ in how tokens are laid out; the head always sees the same vectors.

Layouts: rows of token ids to a `ScoredBatch`.

padded          [prompt chosen] and [prompt rejected], a row each, padded to the longest
packed          the same sequences one after the other in one row
shared_prefix   [prompt | chosen | rejected]: the prompt once, its completions side by side

The last token of a sequence predicts nothing, so it does not go through the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from dpo_fast.data.kinds import COMPLETIONS, GROUPS, PAIRS, Kind


@dataclass(frozen=True)
class ScoredBatch:
    """Sequences of P pairs, 2p the chosen and 2p + 1 the rejected one, in one forward.

    input_ids, position_ids: [B, L] int64; attention_mask: [B, L] int64, or None where `spans` (B = 1)
    tells attention what belongs together: along L lie trees, each a trunk (the prompt) and the branches
    that continue it (completions), of the lengths (trunk, branch, ...). Branches do not see each other.
    rows_T: row of the flattened [B * L] hidden states that predicts scored token t; targets_T: that
    token; lengths_S: scored tokens of each sequence. Sequences are contiguous in T.
    indices_P: rows of the data set, int64. tokens: tokens of the data, every sequence whole; padding:
    positions of input_ids that are padding; attended_pairs: half of the pairs of positions that see each other,
    as attention has to work for. columns: of the data, fp32 [P] each, by name.
    desirable_S: bool [S]; given, rows are completions that are desirable or undesirable by themselves, and P is S.
    counts_P: int64; given, rows are groups of so many completions, of which scores_S, fp32, are the scores.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    spans: tuple[tuple[int, ...], ...] | None
    rows_T: Tensor
    targets_T: Tensor
    lengths_S: Tensor
    indices_P: Tensor
    tokens: int
    padding: int
    attended_pairs: int
    columns: dict[str, Tensor] = field(default_factory=dict)
    desirable_S: Tensor | None = None
    scores_S: Tensor | None = None
    counts_P: Tensor | None = None

    @property
    def num_examples(self) -> int:
        return len(self.indices_P)

    @property
    def chosen_tokens(self) -> int:
        return int(self.lengths_S[0::2].sum())

    @property
    def padding_fraction(self) -> float:
        return self.padding / self.input_ids.numel()

    def to(self, device: torch.device | str) -> ScoredBatch:
        """On another device, all but indices_P: tables on the host are looked up by them, and to ask a GPU
        for them would wait for all that it has to do."""
        tensors = {
            each.name: value.to(device, non_blocking=True)
            for each in fields(self)
            if each.name != "indices_P" and isinstance(value := getattr(self, each.name), Tensor)
        }
        columns = {name: column.to(device) for name, column in self.columns.items()}
        return replace(self, **tensors, columns=columns)


LAYOUTS = ("padded", "packed", "shared_prefix")


def collate(
    rows: Sequence[dict],
    layout: str,
    *,
    pad_id: int = 0,
    indices: Sequence[int] | None = None,
    columns: Sequence[str] = (),
    kind: Kind = PAIRS,
) -> ScoredBatch:
    """Lay out pairs with keys `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int); completions
    with `prompt_ids`, `completion_ids` and the bool `label`; or groups with `prompt_ids`, `completions_ids`
    (lists of lists) and the floats `scores`.

    columns: names of further keys, floats, that go into the batch's columns. Completions of one prompt
    come one after the other, in all that the batch holds, so that they can share it.

    No rows at all give one padding token and nothing scored, so that a rank without work still
    takes part in every collective.

    Raises:
        ValueError: an unknown layout, or a sequence without prompt or completion.
    """
    for row in rows:
        for name in kind.ids:
            texts = row[name] if kind.many and name != "prompt_ids" else [row[name]]
            if not all(map(len, texts)):
                raise ValueError(f"{kind.one} has an empty {name}: {row}")
    indices = list(range(len(rows)) if indices is None else indices)
    trees, order = _by_prompt(rows) if kind == COMPLETIONS else _by_row(rows, kind)
    batch = collate_trees(trees, layout, pad_id=pad_id, indices=[indices[i] for i in order])
    values = {name: torch.tensor([rows[i][name] for i in order]).float() for name in columns}
    judged = {}
    if kind == COMPLETIONS:
        judged["desirable_S"] = torch.tensor([rows[i]["label"] for i in order], dtype=torch.bool)
    elif kind == GROUPS:
        judged["scores_S"] = torch.tensor(
            [score for row in rows for score in row["scores"]]
        ).float()
        judged["counts_P"] = torch.tensor([len(row["scores"]) for row in rows], dtype=torch.int64)
    return replace(batch, columns=values, **judged)


def _by_row(rows: Sequence[dict], kind: Kind) -> tuple[list, range]:
    """A group for each row, and the order of rows."""
    return [(row["prompt_ids"], kind.answer_ids(row)) for row in rows], range(len(rows))


def _by_prompt(rows: Sequence[dict]) -> tuple[list, list[int]]:
    """A group for each prompt, with the completions of all its rows, and the order of rows in that."""
    places: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(tuple(row["prompt_ids"]), []).append(index)
    trees = [
        (rows[mine[0]]["prompt_ids"], [rows[index]["completion_ids"] for index in mine])
        for mine in places.values()
    ]
    return trees, [index for mine in places.values() for index in mine]


def collate_trees(
    trees: Sequence[tuple[list[int], list[list[int]]]],
    layout: str,
    *,
    pad_id: int = 0,
    indices: Sequence[int] | None = None,
) -> ScoredBatch:
    """Lay out (prompt, completions), any number of completions each; sequences in that order.

    Raises:
        ValueError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: choose from {', '.join(LAYOUTS)}")
    indices = range(len(trees)) if indices is None else indices
    completions = [completion for _, group in trees for completion in group]
    prompts = [prompt for prompt, group in trees for _ in group]
    place = {"padded": _padded, "packed": _packed, "shared_prefix": _shared_prefix}[layout]
    places, rows = place(trees, pad_id) if trees else (_nothing(pad_id, layout), [])
    empty = np.zeros(0, dtype=np.int64)
    return ScoredBatch(
        **places,
        rows_T=torch.from_numpy(np.concatenate([empty, *rows])),
        targets_T=torch.from_numpy(np.concatenate([empty, *completions]).astype(np.int64)),
        lengths_S=torch.tensor([len(c) for c in completions], dtype=torch.int64),
        indices_P=torch.tensor(list(indices), dtype=torch.int64),
        tokens=sum(map(len, prompts)) + sum(map(len, completions)),
    )


def _padded(trees, pad_id: int) -> tuple[dict, list[np.ndarray]]:
    """Right padding, so that positions are those of the sequence alone."""
    sequences = [[*prompt, *c[:-1]] for prompt, group in trees for c in group]
    starts = [len(prompt) for prompt, group in trees for _ in group]
    lengths = [len(sequence) for sequence in sequences]
    width = max(lengths)
    input_ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    places = {
        "input_ids": input_ids,
        "position_ids": torch.arange(width).expand(len(sequences), -1).contiguous(),
        "attention_mask": mask,
        "spans": None,
        "padding": input_ids.numel() - sum(lengths),
        "attended_pairs": sum(length**2 for length in lengths) // 2,
    }
    spans = zip(range(0, width * len(sequences), width), starts, lengths)
    return places, [np.arange(row + start - 1, row + length) for row, start, length in spans]


def _packed(trees, pad_id: int) -> tuple[dict, list[np.ndarray]]:
    """Nothing is shared where every completion has a prompt of its own."""
    alone = [(prompt, [completion]) for prompt, group in trees for completion in group]
    return _shared_prefix(alone, pad_id)


def _shared_prefix(trees, pad_id: int) -> tuple[dict, list[np.ndarray]]:
    """One row; the completions of a prompt all go on from its last position and its last row."""
    ids, positions, lengths, rows, offset = [], [], [], [], 0
    for prompt, completions in trees:
        start = len(prompt)
        last = offset + start - 1
        ids.append(prompt)
        positions.append(np.arange(start))
        offset += start
        for completion in completions:
            size = len(completion) - 1
            ids.append(completion[:-1])
            positions.append(np.arange(start, start + size))
            rows.append(np.concatenate([[last], np.arange(offset, offset + size)]))
            offset += size
        lengths.append((start, *(len(completion) - 1 for completion in completions)))
    places = {
        "input_ids": torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
        "position_ids": torch.from_numpy(np.concatenate(positions))[None],
        "attention_mask": None,
        "spans": tuple(lengths),
        "padding": 0,
        "attended_pairs": sum(map(_attended_pairs, lengths)),
    }
    return places, rows


def _attended_pairs(group: tuple[int, ...]) -> int:
    """Half of a square for the trunk and for each branch; every branch also sees all of the trunk."""
    trunk, *branches = group
    return (trunk**2 + sum(branch**2 for branch in branches)) // 2 + trunk * sum(branches)


def _nothing(pad_id: int, layout: str) -> dict:
    padded = layout == "padded"
    return {
        "input_ids": torch.full((1, 1), pad_id),
        "position_ids": torch.zeros(1, 1, dtype=torch.int64),
        "attention_mask": torch.ones(1, 1, dtype=torch.int64) if padded else None,
        "spans": None if padded else ((1,),),
        "padding": 1,
        "attended_pairs": 0,
    }
