"""The log-probs of a part of a data set, scored by all ranks together, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow
import torch
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.dataset import Dataset
from dpo_fast.data.grouping import SamePrompt
from dpo_fast.data.kinds import ExampleLengths
from dpo_fast.data.packing import Costs
from dpo_fast.errors import UserError
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.ops.segments import sum_sequences
from dpo_fast.references.artefact import names_of
from dpo_fast.references.providers import Scorer


def length_batches(
    rows: Iterable[int],
    costs: Costs,
    batch_size: int | None,
    tokens: int | None = None,
    same_prompt: SamePrompt | None = None,
) -> list[list[int]]:
    """Examples in batches of `batch_size`, or of at most `tokens`, from the longest to the shortest.

    Examples of like length share a batch: there is little padding, and ranks take about as long. Those of
    one prompt stand together, so that what they have in common is computed once. The batches do not
    depend on the number of ranks, and so the values do not either.

    costs: tokens that each example of the data set takes in the layout.
    """
    ordered = sorted(rows, key=lambda row: (-costs.alone_P[row], row))
    if same_prompt is not None:
        longest: dict[int, int] = {}  # of each prompt the place of its longest example
        for place, prompt in enumerate(same_prompt.prompts_P[ordered].tolist()):
            longest.setdefault(prompt, place)
        ordered.sort(key=lambda row: longest[int(same_prompt.prompts_P[row])])
    if tokens is not None and same_prompt is not None:
        return same_prompt.bins(tokens, ordered)[0]
    if tokens is not None:
        return costs.bins(tokens, ordered)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


@torch.no_grad()
def score_part(
    scorer: Scorer,
    batches: Iterable[ScoredBatch],
    rows: Sequence[int] | np.ndarray,
    lengths: ExampleLengths,
    device,
) -> Tensor:
    """This rank's share of the log-probabilities of a part's scored tokens, fp32 [T] on `device`.

    Tokens of other ranks' batches are 0. The batches of all ranks hold every example once, so the
    shares add up to the part, exactly. Collective if the model is sharded.

    batches: this rank's, as many as every other rank has.
    rows: places of the part's examples in the data set, ascending.
    lengths: of these examples.
    """
    row_tokens = torch.from_numpy(lengths.scored_P)
    ends = row_tokens.cumsum(0)
    values_T = torch.zeros(int(row_tokens.sum()), device=device)
    for batch in batches:
        local = np.searchsorted(rows, batch.indices_P.numpy()).tolist()
        places = [torch.arange(ends[row] - row_tokens[row], ends[row]) for row in local]
        batch = batch.to(device)
        logp_T = scorer(**forward_arguments(batch))["logp"].float()
        if places:
            values_T[torch.cat(places).to(device)] = logp_T
    return values_T


def part_table(
    values_T: Tensor,
    lengths: ExampleLengths,
    examples: Dataset,
    rows: Sequence[int] | np.ndarray,
    per_token: bool,
) -> pyarrow.Table:
    """A part as `artefact.py` describes it, with a row for each example.

    values_T: log-probs of all scored tokens of the part, fp32.
    lengths: of the part's examples.
    rows: their places in the data set.

    Raises:
        UserError: the sum of an answer is not finite.
    """
    kind, lengths_S = examples.kind, torch.from_numpy(lengths.scored_S)
    sums_S = sum_sequences(values_T, lengths_S)
    if not sums_S.isfinite().all():
        finite_P = np.logical_and.reduceat(sums_S.isfinite().numpy(), lengths.starts_P)
        bad = (~finite_P).nonzero()[0].tolist()
        raise UserError(
            f"the reference log-probs of {len(bad)} {kind.name} are not finite, the first "
            f"{examples.where(int(rows[bad[0]]))}; look at the reference model and at model.dtype"
        )
    columns = {
        "digest": examples.digests.take(pyarrow.array(rows, pyarrow.int64())),
        "where": pyarrow.array([examples.where(int(row)) for row in rows], pyarrow.string()),
    }
    told = {"logps": sums_S.numpy(), "tokens": lengths.scored_S.astype(np.int32)}
    if per_token:
        told["token_logps"] = _lists(values_T.numpy(), lengths.scored_S)
    for what, values_S in told.items():
        for name, column in zip(names_of(kind, what), _by_answer(pyarrow.array(values_S), lengths)):
            columns[name] = column
    return pyarrow.table(columns)


def _by_answer(values_S: pyarrow.Array, lengths: ExampleLengths) -> list[pyarrow.Array]:
    """A column for each answer; for groups one column of lists."""
    if lengths.kind.many:
        return [_lists(values_S, lengths.counts_P)]
    count = len(lengths.kind.answers)
    return [
        values_S.take(pyarrow.array(range(side, len(values_S), count))) for side in range(count)
    ]


def _lists(values, sizes: np.ndarray) -> pyarrow.ListArray:
    """Consecutive values as lists of these sizes."""
    ends = np.concatenate([[0], sizes.cumsum()]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(ends, values)
