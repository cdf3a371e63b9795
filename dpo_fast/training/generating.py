"""The policy as `generate` of transformers needs it, in the middle of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from dpo_fast.models import ScoringModel, load_model
from dpo_fast.models.architecture import architecture_of, choose_attention
from dpo_fast.models.decoder import attention_of_parts, kept_attention
from dpo_fast.training.prepare import Run


@contextlib.contextmanager
def generating(run: Run) -> Iterator[ScoringModel]:
    """The policy with whole weights, and attention for padded batches. Collective.

    What is drawn inside does not count for the run: the state of the generators is put back.

    Below ZeRO-3 it is the model that is trained. At ZeRO-3 each rank loads a whole copy of the model
    for the time, and the trained weights are gathered into it one after the other.
    """
    device = run.engine.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        causal_lm, dtype = run.model.causal_lm, run.config.model.torch_dtype
        architecture = architecture_of(causal_lm)
        attention = choose_attention("auto", "padded", device, dtype, architecture).name
        if run.config.zero_stage == 3:
            yield _copy(run, attention)
        else:
            with kept_attention(causal_lm):
                causal_lm.set_attn_implementation(attention_of_parts(causal_lm.config, attention))
                yield run.model


def _copy(run: Run, attention: str) -> ScoringModel:
    """A whole model with the weights of the policy. Collective."""
    import deepspeed

    copy = load_model(run.config.model, attention=attention, **run.config.train.head)
    copy = copy.to(run.engine.device)
    own = dict(copy.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in run.model.named_parameters():
            if value.requires_grad:
                with deepspeed.zero.GatheredParameters([value]):
                    own[name].copy_(value)
    return copy.requires_grad_(False).eval()
