"""Which rows of hidden states are scored, and in which order, from labels as models take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.ops.integers import as_int64

BATCH_ORDERS = ("concatenated", "interleaved")


class ScoredRows(NamedTuple):
    """int64, sequence after sequence.

    rows_T: rows of the flattened hidden states.
    targets_T: the token that each predicts.
    lengths_S: scored tokens of each sequence.
    labels_T: place of the target in the flattened labels.
    """

    rows_T: Tensor
    targets_T: Tensor
    lengths_S: Tensor
    labels_T: Tensor


def check_order(batch_order: str) -> None:
    """Raises ValueError for an order that is not known."""
    if batch_order not in BATCH_ORDERS:
        raise ValueError(f"batch_order={batch_order!r}: choose from {', '.join(BATCH_ORDERS)}")


def pair_order(S: int, batch_order: str, device: torch.device) -> Tensor:
    """[S]: places in the batch of the chosen and the rejected sequence of pair 0, of pair 1, ...

    batch_order: `concatenated`, all chosen sequences and then all rejected ones (TRL, Liger); or
        `interleaved`, in turn.

    Raises:
        ValueError: another order, or an odd number of sequences.
    """
    check_order(batch_order)
    if S % 2:
        raise ValueError(
            f"{S} sequences are no pairs; give `desirable` where they are unpaired, `scores` and "
            "`counts` where they are groups"
        )
    order_S = torch.arange(S, device=device)
    return order_S if batch_order == "interleaved" else order_S.view(2, -1).t().flatten()


def scored_rows(
    labels: Tensor,
    lengths_S: Tensor | None = None,
    *,
    sequence_ids_N: Tensor | None = None,
    order_S: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
) -> ScoredRows:
    """The rows whose label is not `ignore_index`, sequences in the order of `order_S`.

    Args:
        labels: integers of any dtype [S, L], or packed [N] with one of
        lengths_S: integers [S], packed rows of each sequence, ignored ones included, one sequence after the
            other;
        sequence_ids_N: integers, the sequence of each packed row, from 0 on, in any order; an ignored
            row may have -1.
        shift: labels[s, l] is token l itself, as Hugging Face models take it, and position l - 1 predicts
            it. Otherwise position l predicts labels[s, l].

    Raises:
        ValueError: shapes that do not fit, or packed labels to shift.
    """
    labels = as_int64(labels, "labels")
    sequence_N, S = _sequences(labels, lengths_S, sequence_ids_N, shift)
    if shift:
        last = labels.new_full((len(labels), 1), ignore_index)
        labels = torch.cat([labels[:, 1:], last], 1)
    targets_N = labels.reshape(-1)
    rows_T = (targets_N != ignore_index).nonzero().squeeze(1)
    sequence_T = sequence_N[rows_T]
    if sequence_ids_N is not None and (sequence_T < 0).any():
        raise ValueError("sequence_ids below 0 mark rows that are not scored; some such rows are")
    if order_S is not None:
        sequence_T = order_S.argsort()[sequence_T]
    if order_S is not None or sequence_ids_N is not None:
        sequence_T, by_place = sequence_T.sort(stable=True)
        rows_T = rows_T[by_place]
    # bincount would do, but for a compiler its length is unknown.
    ones_T = torch.ones_like(sequence_T)
    lengths_S = sequence_T.new_zeros(S).index_add(0, sequence_T, ones_T)
    return ScoredRows(rows_T, targets_N[rows_T], lengths_S, rows_T + shift)


def masked_labels(labels: Tensor, mask: Tensor, ignore_index: int) -> Tensor:
    """Labels with `ignore_index` outside the mask.

    Raises:
        ValueError: a mask of another shape, or not of bool.
    """
    if mask.dtype != torch.bool or mask.shape != labels.shape:
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; expected torch.bool {tuple(labels.shape)}, true "
            "where a label is scored"
        )
    return labels.masked_fill(~mask, ignore_index)


def check_shift(labels: Tensor, input_ids: Tensor, shift: bool, ignore_index: int) -> None:
    """Compare labels with the tokens that go into the model. Waits for a GPU.

    Raises:
        ValueError: another shape; labels that are the tokens themselves where `shift` is False; or the next
            tokens where it is True.
    """
    if input_ids.shape != labels.shape:
        raise ValueError(
            f"input_ids are {tuple(input_ids.shape)}; expected {tuple(labels.shape)}, as labels"
        )
    here, after = labels == input_ids, labels[..., :-1] == input_ids[..., 1:]
    scored = labels != ignore_index
    unshifted = bool((here | ~scored).all() & scored.any())
    shifted = bool((after | ~scored[..., :-1]).all() & scored[..., :-1].any())
    if unshifted and not shifted and not shift:
        raise ValueError(
            "labels are the tokens of input_ids themselves, so each would be scored where it is read: pass "
            "shift=True to the module, or labels that are shifted: position l predicts labels[s, l]"
        )
    if shifted and not unshifted and shift:
        raise ValueError(
            "labels are the next tokens of input_ids already, and shift=True would shift them again: leave "
            "it out"
        )


def sequence_count(labels: Tensor, lengths_S: Tensor | None, sequence_ids_N: Tensor | None) -> int:
    """How many sequences there are."""
    if sequence_ids_N is not None:
        return int(sequence_ids_N.max()) + 1 if len(sequence_ids_N) else 0
    return len(labels) if lengths_S is None else len(lengths_S)


def _sequences(
    labels: Tensor, lengths_S: Tensor | None, sequence_ids_N: Tensor | None, shift: bool
) -> tuple[Tensor, int]:
    """The sequence of each row, [N], and the number of sequences."""
    if labels.dim() not in (1, 2):
        raise ValueError(f"labels are {tuple(labels.shape)}; expected [S, L], or [N] with lengths")
    told = [x for x in (lengths_S, sequence_ids_N) if x is not None]
    if len(told) != (labels.dim() == 1):
        raise ValueError(
            "lengths or sequence_ids, one of them, belong to packed labels [N], and packed labels need "
            f"them; got labels {tuple(labels.shape)} and {len(told)} of the two"
        )
    if not told:
        S, L = labels.shape
        return torch.arange(S, device=labels.device).repeat_interleave(L), S
    if shift:
        raise ValueError(
            "shift=True concerns labels [S, L]: give packed rows the token that each predicts"
        )
    S = sequence_count(labels, lengths_S, sequence_ids_N)
    if sequence_ids_N is not None:
        if sequence_ids_N.shape != labels.shape:
            raise ValueError(
                f"sequence_ids are {tuple(sequence_ids_N.shape)}; expected {tuple(labels.shape)}, the "
                "sequence of each packed row"
            )
        return as_int64(sequence_ids_N, "sequence_ids"), S
    lengths_S = as_int64(lengths_S, "lengths")
    if lengths_S.dim() != 1 or lengths_S.sum() != len(labels):
        raise ValueError(
            f"lengths are {tuple(lengths_S.shape)}; expected [S] that add up to the {len(labels)} packed "
            "rows"
        )
    return torch.arange(S, device=labels.device).repeat_interleave(lengths_S), S
