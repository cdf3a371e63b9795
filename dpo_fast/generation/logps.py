"""Log-probs of completions under the model that wrote them, on the ids that `train` makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dpo_fast.data.batch import collate
from dpo_fast.data.config import IMAGES
from dpo_fast.data.images.known import KnownImages
from dpo_fast.data.kinds import COMPLETIONS
from dpo_fast.errors import UserError
from dpo_fast.generation.encode import Tokens
from dpo_fast.models.scoring import ScoringModel, forward_arguments

POSITIONS = 16384  # of a forward, at most, unless one sequence alone has more
LAYOUT = "padded"  # which every architecture allows, with the attention that `generate` has


def batches_by_length(lengths: Sequence[int], positions: int = POSITIONS) -> list[list[int]]:
    """Places of sequences in batches, from the longest to the shortest."""
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > positions:
            batches.append([])
        batches[-1].append(place)
    return batches


@torch.no_grad()
def score(
    scoring: ScoringModel,
    sequences: Sequence[Tokens],
    pad_id: int,
    images: KnownImages | None = None,
) -> list[np.ndarray]:
    """Log-probs of the scored tokens of each sequence: temperature 1, the whole vocabulary, fp32.

    images: those of the prompts.

    Raises:
        UserError: one is not finite.
    """
    # Those of one prompt become neighbours in the batch; `indices_P` says where they went.
    examples, load = [_example(each, images) for each in sequences], images and images.loader
    batch = collate(examples, LAYOUT, pad_id=pad_id, kind=COMPLETIONS, images=load)
    places = batch.indices_P.tolist()
    logp_T = scoring(**forward_arguments(batch.to(scoring.causal_lm.device)))["logp"].float().cpu()
    if not logp_T.isfinite().all():
        raise UserError(
            "log-probs of completions are not finite under the model that wrote them; look at the model "
            "and at model.dtype"
        )
    parts = logp_T.split(batch.lengths_S.tolist())
    found: list[Any] = [None] * len(sequences)
    for place, part in zip(places, parts):
        found[place] = part.numpy()
    return found


def _example(sequence: Tokens, images: KnownImages | None) -> Mapping[str, Any]:
    among = images.among([*sequence.prompt_ids, *sequence.answer_ids]) if images else []
    return {
        IMAGES: among,
        "prompt_ids": sequence.prompt_ids,
        "completion_ids": sequence.answer_ids,
        "completion_scored": sequence.scored,
        "label": True,
    }
