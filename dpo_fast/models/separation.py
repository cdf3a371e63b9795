"""A trial of the loaded model: sequences that share a row must not hear of each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dpo_fast.data.batch import collate_trees
from dpo_fast.errors import UserError
from dpo_fast.models.scoring import forward_arguments

# Rows of one product come out alike whatever the other rows hold; experts that get other rows may round
# differently. What leaks through a layer moves log-probs by far more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@torch.no_grad()
def check_separation(
    scorer: Callable[..., Mapping[str, Tensor]],
    layout: str,
    vocabulary: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Score two trees, then again with other tokens in one completion; all else must stay as it was.

    scorer: a `ScoringModel` or an engine round one. It finds what no configuration tells: layers that
    carry something along the row (recurrence, convolution, attention of their own). Collective where
    weights are sharded.

    Raises:
        UserError: the scores of an untouched sequence moved.
    """
    tokens = torch.randint(vocabulary, (18,), generator=torch.Generator().manual_seed(0)).tolist()
    other = [(token + 1) % vocabulary for token in tokens]

    def scores(first: list[int]) -> Tensor:
        trees = [(tokens[:3], [first, tokens[7:10]]), (tokens[10:13], [tokens[13:16], tokens[15:]])]
        batch = collate_trees(trees, layout).to(device)
        return scorer(**forward_arguments(batch))["logp"]

    before, after = scores(tokens[3:7]), scores(other[3:7])
    moved = (after - before)[4:].abs().max().item()
    if not moved <= TOLERANCE[dtype]:
        raise UserError(
            f"train.layout={layout} cannot be honoured: another completion in the row moved the "
            f"log-probs of untouched ones by {moved:.2g}, so some layer of this model mixes tokens "
            "by other means than its attention. Set train.layout=padded"
        )
