"""The one batch type. Layouts differ in how tokens are laid out; the head always sees the same vectors."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


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
