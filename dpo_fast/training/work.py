"""Floating-point operations of a step, and how many this device does in a second: perf/mfu."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.models import ScoringModel

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
PRODUCT = {"cpu": (512, 4), "cuda": (8192, 10)}  # rows and columns of the square product, repeats


@dataclass(frozen=True)
class Work:
    """Operations of forward and backward for each token of a layer stack and of a head, and for each pair
    of tokens of which one attends to the other.

    A weight takes part in a product of two operations forward, two for the gradient of its input and, if
    it is trained, two for its own. Recomputation, references and padding are no work.
    """

    per_token: float
    per_scored: float
    per_attended_pair: float

    def of(self, batch: ScoredBatch) -> float:
        """Of what goes through the model for a batch: shared prompts once."""
        tokens = batch.input_ids.numel() - batch.padding
        attended_pairs = self.per_attended_pair * batch.attended_pairs
        return self.per_token * tokens + self.per_scored * len(batch.targets_T) + attended_pairs


def work_of(model: ScoringModel) -> Work | None:
    """None for a model whose operations do not follow from its weights: experts, or no known attention."""
    causal_lm = model.causal_lm
    config, decoder = causal_lm.config.get_text_config(), causal_lm.get_decoder()
    heads = getattr(config, "num_attention_heads", None)
    if heads is None or any(getattr(config, name, None) for name in EXPERTS):
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    tables = {id(m.weight) for m in decoder.modules() if isinstance(m, nn.Embedding)}
    weights = [p for p in decoder.parameters() if id(p) not in tables and _dimensions(p) == 2]
    head = causal_lm.get_output_embeddings().weight
    # Scores and their sum over values, forward and twice backward.
    meeting = 3 * 2 * 2 * config.num_hidden_layers * heads * width
    return Work(sum(map(_operations, weights)), _operations(head), meeting)


def _operations(weight: nn.Parameter) -> int:
    size = getattr(weight, "ds_numel", weight.numel())  # of all ranks, where it is sharded
    return (6 if weight.requires_grad else 4) * size


def _dimensions(weight: nn.Parameter) -> int:
    return len(getattr(weight, "ds_shape", weight.shape))


@torch.no_grad()
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations in a second of the fastest of several square matrix products."""
    size, repeats = PRODUCT[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
