"""The second half of sampling: every distinct sequence is scored once, on all ranks."""

from __future__ import annotations

import numpy as np
import torch

from dpo_fast.errors import UserError
from dpo_fast.generation.encode import PromptCodec, Tokens
from dpo_fast.generation.logps import batches_by_length, score
from dpo_fast.models.scoring import ScoringModel
from dpo_fast.rounds.sample_folder import SampleFolder, pack_logps
from dpo_fast.rounds.sampler_model import Sampler
from dpo_fast.training import distributed
from dpo_fast.training.console import progress_bar


def score_completions(folder: SampleFolder, sampler: Sampler) -> None:
    """Score the completions that no rank has scored. Collective.

    Those that `train` could not use, as empty ones, have no log-prob.
    """
    distinct = {each.digest: each.tokens for each in folder.completions() if each.tokens}
    digests, sequences = list(distinct), list(distinct.values())
    journal = folder.journal("logps")
    done = journal.numbers()
    lengths = [len(each.prompt_ids) + len(each.answer_ids) for each in sequences]
    batches = batches_by_length(lengths)
    left = [number for number in range(len(batches)) if number not in done]
    own = left[distributed.rank() :: distributed.world_size()]
    distributed.barrier()  # nobody appends before all have read
    if own:
        scoring, codec = sampler.scoring, sampler.codec
        with progress_bar("log-probs", len(own)) as advance:
            for number in own:
                values = _scored(scoring, [sequences[place] for place in batches[number]], codec)
                named = zip((digests[place] for place in batches[number]), values)
                journal.append(number, [[key.hex(), pack_logps(each)] for key, each in named])
                advance()
        journal.close()
    distributed.await_all("scored")


def _scored(scoring: ScoringModel, sequences: list[Tokens], codec: PromptCodec) -> list[np.ndarray]:
    try:
        return score(scoring, sequences, codec.tokenizer.pad_token_id, codec.images)
    except torch.OutOfMemoryError:
        longest = max(len(each.prompt_ids) + len(each.answer_ids) for each in sequences)
        raise UserError(
            f"not enough memory to score {len(sequences)} completions of up to {longest} tokens; with "
            "sample.logps=false they are not scored here"
        ) from None
