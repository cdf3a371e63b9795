"""Examples of token ids to `ScoredBatch`, the one batch type.

The head sees the same vectors in every layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from dpo_fast.data.kinds import COMPLETIONS, GROUPS, PAIRS, Kind
from dpo_fast.data.layouts import LAYOUTS, Trees
from dpo_fast.wording import quoted


@dataclass(frozen=True)
class ScoredBatch:
    """P examples with S sequences, a prompt with one completion each, in one forward.

    Of pairs, sequence 2p is the chosen one of pair p and 2p + 1 the rejected one.

    input_ids, position_ids: int64 [B, L].
    attention_mask: int64 [B, L]; None where `spans` are given.
    spans: lengths (trunk, branch, ...) of the trees along the one row (B = 1); None where
        `attention_mask` is given. A trunk is a prompt and its branches are completions, which do
        not see each other.
    rows_T: int64, row of the flattened [B * L] hidden states that predicts scored token t. The
        tokens of a sequence are contiguous in T.
    targets_T: int64, the scored tokens.
    lengths_S: int64, scored tokens of each sequence.
    indices_P: int64, places of the examples in the data set, on the host.
    tokens: tokens of the data, every sequence whole.
    padding: positions of input_ids that are padding.
    attended_pairs: (query, key) pairs that attention computes.
    columns: further columns of the data by name, fp32 [P].
    desirable_S: bool, labels of completions (P is S); None for other kinds.
    scores_S: fp32, scores of the completions of groups; None for other kinds.
    counts_P: int64, completions of each group; None for other kinds.
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
        """Scored tokens of the chosen completions; for pairs alone."""
        return int(self.lengths_S[0::2].sum())

    @property
    def padding_fraction(self) -> float:
        return self.padding / self.input_ids.numel()

    def to(self, device: torch.device | str) -> ScoredBatch:
        """The batch on another device.

        `indices_P` stays. It looks up tables on the host; reading it from a GPU would wait for all work
        there.
        """
        tensors = {
            each.name: value.to(device, non_blocking=True)
            for each in fields(self)
            if each.name != "indices_P" and isinstance(value := getattr(self, each.name), Tensor)
        }
        columns = {
            name: column.to(device, non_blocking=True) for name, column in self.columns.items()
        }
        return replace(self, **tensors, columns=columns)


def collate(
    examples: Sequence[Mapping],
    layout: str,
    *,
    pad_id: int = 0,
    indices: Sequence[int] | None = None,
    columns: Sequence[str] = (),
    kind: Kind = PAIRS,
) -> ScoredBatch:
    """Lay out examples of one kind.

    Completions that share a prompt come one after the other in the batch, so that a layout can lay
    out the prompt once. No examples at all give one padding token and nothing scored.

    Args:
        examples: with the lists of int `prompt_ids` and, by kind, `chosen_ids` and `rejected_ids`;
            `completion_ids` and the bool `label`; or `completions_ids`, a list of lists, and the
            floats `scores`. Lists of bool `chosen_scored` and so on say which tokens of an answer are
            scored; without them all are.
        layout: a name of the table of layouts.
        pad_id: fills padding; nothing attends to it.
        indices: places of the examples in the data set; by default 0, 1, ...
        columns: names of further keys, floats, that become columns of the batch.

    Raises:
        ValueError: an unknown layout, or a sequence without prompt or completion.
    """
    for example in examples:
        _check(example, kind)
    places = _by_prompt(examples) if kind == COMPLETIONS else range(len(examples))
    ordered = [examples[place] for place in places]
    indices = places if indices is None else [indices[place] for place in places]
    flags = [each for example in ordered for each in kind.answer_flags(example)]
    batch = collate_trees(_trees(ordered, kind), layout, pad_id=pad_id, indices=indices)
    batch = _only_scored(batch, flags)
    values = {name: torch.tensor([each[name] for each in ordered]).float() for name in columns}
    return replace(batch, columns=values, **_labels(ordered, kind))


def _check(example: Mapping, kind: Kind) -> None:
    for name in kind.ids:
        texts = example[name] if kind.many and name != "prompt_ids" else [example[name]]
        if not all(map(len, texts)):
            raise ValueError(f"{kind.one} has an empty {name}: {quoted(example, 300)}")
    for ids, flags in zip(kind.answer_ids(example), kind.answer_flags(example)):
        if flags is not None and len(flags) != len(ids):
            raise ValueError(
                f"{kind.one} has {len(ids)} tokens and {len(flags)} flags: {quoted(example, 300)}"
            )


def _only_scored(batch: ScoredBatch, flags: Sequence[Sequence[bool] | None]) -> ScoredBatch:
    """The batch without the rows and targets whose flag is False. None: all of a sequence stay."""
    if all(each is None for each in flags):
        return batch
    sizes = batch.lengths_S.tolist()
    kept = [
        np.ones(n, bool) if each is None else np.array(each, bool) for each, n in zip(flags, sizes)
    ]
    kept_T = torch.from_numpy(np.concatenate(kept))
    return replace(
        batch,
        rows_T=batch.rows_T[kept_T],
        targets_T=batch.targets_T[kept_T],
        lengths_S=torch.tensor([int(each.sum()) for each in kept]),
    )


def _by_prompt(completions: Sequence[Mapping]) -> list[int]:
    """Places of completions, those of one prompt together, in the order in which prompts first come."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, each in enumerate(completions):
        places.setdefault(tuple(each["prompt_ids"]), []).append(place)
    return [place for mine in places.values() for place in mine]


def _trees(examples: Sequence[Mapping], kind: Kind) -> Trees:
    """A tree for each example; completions of one prompt, which are neighbours, are one tree."""
    trees: list[tuple[list[int], list[list[int]]]] = []
    for example in examples:
        prompt, answers = example["prompt_ids"], kind.answer_ids(example)
        if kind == COMPLETIONS and trees and trees[-1][0] == prompt:
            trees[-1][1].extend(answers)
        else:
            trees.append((prompt, answers))
    return trees


def _labels(examples: Sequence[Mapping], kind: Kind) -> dict[str, Tensor]:
    """The fields of `ScoredBatch` that say how good the answers are."""
    if kind == COMPLETIONS:
        return {"desirable_S": torch.tensor([each["label"] for each in examples], dtype=torch.bool)}
    if kind == GROUPS:
        scores = [score for each in examples for score in each["scores"]]
        counts = [len(each["scores"]) for each in examples]
        return {
            "scores_S": torch.tensor(scores).float(),
            "counts_P": torch.tensor(counts, dtype=torch.int64),
        }
    return {}


def collate_trees(
    trees: Trees, layout: str, *, pad_id: int = 0, indices: Sequence[int] | None = None
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
    placement = LAYOUTS[layout].place(trees, pad_id) if trees else LAYOUTS[layout].nothing(pad_id)
    targets = np.concatenate([np.zeros(0, dtype=np.int64), *completions]).astype(np.int64)
    return ScoredBatch(
        **vars(placement),
        targets_T=torch.from_numpy(targets),
        lengths_S=torch.tensor([len(c) for c in completions], dtype=torch.int64),
        indices_P=torch.tensor(list(indices), dtype=torch.int64),
        tokens=sum(map(len, prompts)) + sum(map(len, completions)),
    )
