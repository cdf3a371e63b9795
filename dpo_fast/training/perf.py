"""How long parts of a step take. On a GPU by events, which wait for nothing until they are read.

Floating-point operations of a step, and how many this device does in a second: perf/mfu.
"""

from __future__ import annotations

import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.models import ScoringModel


def peak_memory(device: torch.device) -> float:
    """GiB that the process held at most since it began: on a GPU of the device, else of the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (2**30 if sys.platform == "darwin" else 2**20)


class Clock:
    """Adds up the milliseconds between `begin` and `end` of each name."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}

    def begin(self, name: str) -> None:
        self._open[name] = self._now()

    def end(self, name: str) -> None:
        """Without a `begin` before it nothing is added."""
        if (start := self._open.pop(name, None)) is not None:
            self.spans.append((name, start, self._now()))

    @contextmanager
    def time(self, name: str):
        self.begin(name)
        yield
        self.end(name)

    def read(self) -> dict[str, float]:
        """Milliseconds since the last reading, by name. Waits for the device."""
        if self.spans and self.on_gpu:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, start, end in self.spans:
            spent = start.elapsed_time(end) if self.on_gpu else 1000 * (end - start)
            sums[name] = sums.get(name, 0.0) + spent
        self.spans = []
        return sums

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def watch_head(head: nn.Module, clock: Clock, name: str = "perf/head_ms") -> None:
    """Time the forward of a `FusedHead` that is trained through, and its backward: from the gradient of its
    log-probabilities to that of its hidden states. Scoring without gradients is not counted."""

    def before(module, arguments) -> None:
        if torch.is_grad_enabled() and len(arguments) > 1:
            clock.begin(name)

    def after(module, arguments, output) -> None:
        if not (isinstance(output, dict) and torch.is_grad_enabled()):
            return
        clock.end(name)
        hidden, logp = arguments[0], output["logp"]
        if hidden.requires_grad and logp.requires_grad:
            logp.register_hook(lambda grad: _then(clock.begin, name))
            hidden.register_hook(lambda grad: _then(clock.end, name))

    head.register_forward_pre_hook(before)
    head.register_forward_hook(after)


def _then(act, name: str) -> Tensor | None:
    """For a hook of a gradient, which leaves it as it is."""
    act(name)


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
