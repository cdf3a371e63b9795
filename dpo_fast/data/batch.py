"""Examples of token ids to `ScoredBatch`, the one batch type.

The head sees the same vectors in every layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from dpo_fast.data.image_batch import ImageBatch
from dpo_fast.data.images.laid import Distinct, ImageLoader, lay_images, numbered
from dpo_fast.data.kinds import GROUPS, PAIRS, Kind
from dpo_fast.data.layouts import LAYOUTS, Scored
from dpo_fast.data.tree import Spans
from dpo_fast.wording import quoted


@dataclass(frozen=True)
class ScoredBatch:
    """P examples with S sequences, a prompt with one completion each, in one forward.

    Of pairs, sequence 2p is the chosen one of pair p and 2p + 1 the rejected one.

    input_ids, position_ids: int64 [B, L].
    attention_mask: int64 [B, L]; None where `spans` are given.
    spans: (own, prefix, parent) of the branches along the one row (B = 1): tokens of the branch; tokens
        before them, which are the first ones of the sequence of another branch; the place of that
        branch, -1 for none. None where `attention_mask` is given.
    rows_U: int64, row of the flattened [B * L] hidden states that makes prediction u.
    targets_U: int64, the token that it predicts. No prediction is there twice.
    predictions_T: int64, the prediction of scored token t. The tokens of a sequence are contiguous in T.
    lengths_S: int64, scored tokens of each sequence.
    copies_N: int64 [B * L], sequences that each token is part of; 0 of padding.
    indices_P: int64, places of the examples in the data set, on the host.
    tokens: tokens of the data, every sequence whole.
    padding: positions of input_ids that are padding.
    attended_pairs: (query, key) pairs that attention computes.
    columns: further columns of the data by name, fp32 [P].
    desirable_S: bool, labels of completions (P is S), true for demonstrations; None for other kinds.
    scores_S: fp32, scores of the completions of groups; None for other kinds.
    counts_P: int64, completions of each group; None for other kinds.
    images: of the prompts; None where no example of the batch has any.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    spans: Spans | None
    rows_U: Tensor
    targets_U: Tensor
    predictions_T: Tensor
    lengths_S: Tensor
    copies_N: Tensor
    indices_P: Tensor
    tokens: int
    padding: int
    attended_pairs: int
    columns: dict[str, Tensor] = field(default_factory=dict)
    desirable_S: Tensor | None = None
    scores_S: Tensor | None = None
    counts_P: Tensor | None = None
    images: ImageBatch | None = None

    @property
    def num_examples(self) -> int:
        return len(self.indices_P)

    @property
    def rows_T(self) -> Tensor:
        """The row that predicts each scored token, int64."""
        return self.rows_U[self.predictions_T]

    @property
    def targets_T(self) -> Tensor:
        """The scored tokens, int64."""
        return self.targets_U[self.predictions_T]

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
        images = self.images and self.images.to(device)
        return replace(self, **tensors, columns=columns, images=images)


def collate(
    examples: Sequence[Mapping],
    layout: str,
    *,
    pad_id: int = 0,
    indices: Sequence[int] | None = None,
    columns: Sequence[str] = (),
    kind: Kind = PAIRS,
    images: ImageLoader | None = None,
) -> ScoredBatch:
    """Lay out examples of one kind.

    Examples may share prompts and answers: the layout sends no sequence through the backbone twice. No
    examples at all give one padding token and nothing scored.

    Args:
        examples: with the lists of int `prompt_ids` and, by kind, `chosen_ids` and `rejected_ids`;
            `completion_ids`, with the bool `label` of completions that have one; or
            `completions_ids`, a list of lists, and the floats `scores`. Lists of bool `chosen_scored`
            and so on say which tokens of an answer are scored; without them all are.
        layout: a name of the table of layouts.
        pad_id: fills padding; nothing attends to it.
        indices: places of the examples in the data set; by default 0, 1, ...
        columns: names of further keys, floats, that become columns of the batch.
        images: makes the pixel values of examples with the key `images`.

    Raises:
        ValueError: an unknown layout, or a sequence without prompt or completion.
    """
    for example in examples:
        _check(example, kind)
    indices = range(len(examples)) if indices is None else indices
    flags = [each for example in examples for each in kind.answer_flags(example)]
    distinct = Distinct()
    laid = [numbered(example, kind, distinct) for example in examples]
    trees = [(example["prompt_ids"], kind.answer_ids(example)) for example in laid]
    batch = collate_trees(trees, layout, pad_id=pad_id, indices=indices, flags=flags)
    input_ids, seen = lay_images(batch.input_ids, distinct, images)
    batch = replace(batch, input_ids=input_ids, images=seen)
    values = {name: torch.tensor([each[name] for each in examples]).float() for name in columns}
    return replace(batch, columns=values, **_labels(examples, kind))


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


def _labels(examples: Sequence[Mapping], kind: Kind) -> dict[str, Tensor]:
    """The fields of `ScoredBatch` that say how good the answers are."""
    if kind.single:  # a demonstration is as a completion that is desirable
        labels = [each.get("label", True) for each in examples]
        return {"desirable_S": torch.tensor(labels, dtype=torch.bool)}
    if kind == GROUPS:
        scores = [score for each in examples for score in each["scores"]]
        counts = [len(each["scores"]) for each in examples]
        return {
            "scores_S": torch.tensor(scores).float(),
            "counts_P": torch.tensor(counts, dtype=torch.int64),
        }
    return {}


def collate_trees(
    trees: Sequence[tuple[list[int], list[list[int]]]],
    layout: str,
    *,
    pad_id: int = 0,
    indices: Sequence[int] | None = None,
    flags: Sequence[Sequence[bool] | None] | None = None,
) -> ScoredBatch:
    """Lay out (prompt, completions), any number of completions each; sequences in that order.

    flags: for each completion, which of its tokens are scored; None where all are.

    Raises:
        ValueError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: choose from {', '.join(LAYOUTS)}")
    indices = range(len(trees)) if indices is None else indices
    answers = [np.asarray(each, dtype=np.int64) for _, group in trees for each in group]
    prompts = [np.asarray(prompt, dtype=np.int64) for prompt, _ in trees]
    before = [prompt for prompt, (_, group) in zip(prompts, trees) for _ in group]
    sequences = [
        Scored(np.concatenate([prompt, answer[:-1]]), len(prompt))
        for prompt, answer in zip(before, answers)
    ]
    table = LAYOUTS[layout]
    decided = vars(table.place(sequences, pad_id) if sequences else table.nothing(pad_id)).copy()
    paths = decided.pop("paths")
    size, nowhere = decided["input_ids"].numel(), np.zeros(0, dtype=np.int64)
    copies_N = np.bincount(np.concatenate([nowhere, *paths]), minlength=size)
    rows = [path[each.start - 1 :] for path, each in zip(paths, sequences)]
    if flags is not None:
        told = [slice(None) if each is None else np.array(each, dtype=bool) for each in flags]
        rows = [row[each] for row, each in zip(rows, told)]
        answers = [answer[each] for answer, each in zip(answers, told)]
    return ScoredBatch(
        **decided,
        **_predictions(rows, answers),
        lengths_S=torch.tensor([len(each) for each in answers], dtype=torch.int64),
        copies_N=torch.from_numpy(copies_N),
        indices_P=torch.tensor(list(indices), dtype=torch.int64),
        tokens=sum(len(each.ids) + 1 for each in sequences),
    )


def _predictions(rows: list[np.ndarray], targets: list[np.ndarray]) -> dict[str, Tensor]:
    """Predictions in the order of their first coming. rows, targets: of the tokens of each sequence."""
    nothing = np.zeros(0, dtype=np.int64)
    rows_T, targets_T = np.concatenate([nothing, *rows]), np.concatenate([nothing, *targets])
    keys_T = rows_T * (int(targets_T.max(initial=0)) + 1) + targets_T
    _, first_U, places_T = np.unique(keys_T, return_index=True, return_inverse=True)
    order = first_U.argsort()
    chosen, place_U = first_U[order], np.empty_like(order)
    place_U[order] = np.arange(len(order))
    return {
        "rows_U": torch.from_numpy(rows_T[chosen]),
        "targets_U": torch.from_numpy(targets_T[chosen]),
        "predictions_T": torch.from_numpy(place_U[places_T]),
    }
