"""Which rows of hidden states are scored, from labels in the shape that models use."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BATCH_ORDERS = ("concatenated", "interleaved")


class ScoredRows(NamedTuple):
    """rows_T: rows of the flattened hidden states; targets_T: what each predicts; labels_T: place of that
    in the flattened labels; int64 [T], sequence after sequence. lengths_S: int64 [S]."""

    rows_T: Tensor
    targets_T: Tensor
    lengths_S: Tensor
    labels_T: Tensor


def pair_order(S: int, batch_order: str, device: torch.device) -> Tensor:
    """[S]: which sequence of the batch is the chosen one of pair 0, its rejected one, the next, ...

    concatenated: all chosen sequences, then all rejected ones (TRL, Liger). interleaved: in turn.

    Raises:
        ValueError: an odd number of sequences.
    """
    if S % 2:
        raise ValueError(
            f"{S} sequences are no pairs; give `good` where they are unpaired, `scores` and "
            "`counts` where they are groups"
        )
    order_S = torch.arange(S, device=device)
    return order_S if batch_order == "interleaved" else order_S.view(2, -1).t().flatten()


def scored_rows(
    labels: Tensor,
    lengths_S: Tensor | None = None,
    *,
    order_S: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
) -> ScoredRows:
    """The rows whose label is not `ignore_index`, sequences in the order of `order_S`.

    Args:
        labels: int64 [B, L], a sequence per row; or [N], sequences packed one after the other.
        lengths_S: int64 [S], packed rows of each sequence, ignored ones included.
        shift: labels[b, l] is token l itself, as Hugging Face models take it, and row l - 1 predicts
            it. Otherwise row l predicts labels[b, l].

    Raises:
        ValueError: shapes that do not fit, or packed labels to shift.
    """
    sequence_N, S = _sequences(labels, lengths_S, shift)
    if shift:
        last = labels.new_full((len(labels), 1), ignore_index)
        labels = torch.cat([labels[:, 1:], last], 1)
    targets_N = labels.reshape(-1)
    rows_T = (targets_N != ignore_index).nonzero().squeeze(1)
    sequence_T = sequence_N[rows_T]
    if order_S is not None:
        place_S = order_S.argsort()
        sequence_T, by_place = place_S[sequence_T].sort(stable=True)
        rows_T = rows_T[by_place]
    lengths_S = torch.bincount(sequence_T, minlength=S)
    return ScoredRows(rows_T, targets_N[rows_T], lengths_S, rows_T + shift)


def _sequences(labels: Tensor, lengths_S: Tensor | None, shift: bool) -> tuple[Tensor, int]:
    """The sequence of each row, [N], and the number of sequences."""
    if labels.dtype != torch.int64 or labels.dim() not in (1, 2):
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}; expected torch.int64 [B, L], or [N] "
            "with lengths"
        )
    if (labels.dim() == 1) != (lengths_S is not None):
        raise ValueError(
            "lengths belong to packed labels [N], and packed labels need them; got labels "
            f"{tuple(labels.shape)} and {'no ' if lengths_S is None else ''}lengths"
        )
    if lengths_S is None:
        B, L = labels.shape
        return torch.arange(B, device=labels.device).repeat_interleave(L), B
    if shift:
        raise ValueError(
            "shift=True concerns labels [B, L]: give packed rows the token that each predicts"
        )
    if lengths_S.dtype != torch.int64 or lengths_S.dim() != 1 or lengths_S.sum() != len(labels):
        raise ValueError(
            f"lengths are {lengths_S.dtype} {tuple(lengths_S.shape)}; expected torch.int64 [S] that "
            f"add up to the {len(labels)} packed rows"
        )
    S = len(lengths_S)
    return torch.arange(S, device=labels.device).repeat_interleave(lengths_S), S
