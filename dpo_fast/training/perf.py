"""What the `perf/` metrics are made of: times and operations of a step, memory and rate of the device."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.models import ScoringModel
from dpo_fast.models.decoder import decoder_of

HEAD = "perf/head_ms"
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
PRODUCT = {"cpu": (512, 4), "cuda": (8192, 10)}  # rows and columns of the square product, repeats


class Clock:
    """Adds up the milliseconds between `begin` and `end` of each name.

    On a GPU it records events, so nothing waits until `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self._intervals: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}

    def begin(self, name: str) -> None:
        self._open[name] = self._now()

    def end(self, name: str) -> None:
        """Nothing is added without a `begin` before."""
        if (start := self._open.pop(name, None)) is not None:
            self._intervals.append((name, start, self._now()))

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        self.begin(name)
        yield
        self.end(name)

    def read(self) -> dict[str, float]:
        """Milliseconds since the last reading, by name; waits for the device."""
        if self._intervals and self.on_gpu:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, start, end in self._intervals:
            spent = start.elapsed_time(end) if self.on_gpu else 1000 * (end - start)
            sums[name] = sums.get(name, 0.0) + spent
        self._intervals = []
        return sums

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def watch_head(head: nn.Module, clock: Clock) -> None:
    """Time forward and backward of a `FusedHead`. Scoring without gradients is not counted.

    The backward pass lasts from the gradient of the log-probabilities to that of the hidden states.
    """

    def before(module, arguments) -> None:
        if torch.is_grad_enabled() and len(arguments) > 1:
            clock.begin(HEAD)

    def after(module, arguments, output) -> None:
        if not (isinstance(output, dict) and torch.is_grad_enabled()):
            return
        clock.end(HEAD)
        hidden, logp = arguments[0], output["logp"]
        if hidden.requires_grad and logp.requires_grad:
            logp.register_hook(lambda grad: clock.begin(HEAD))
            hidden.register_hook(lambda grad: clock.end(HEAD))

    head.register_forward_pre_hook(before)
    head.register_forward_hook(after)


@dataclass(frozen=True)
class Work:
    """Floating-point operations of forward and backward.

    An element of a weight costs two operations forward, two for the gradient of its input and, if it is
    trained, two for its own. Recomputation, references and padding are not counted.

    per_token: of the layers, for a token of the backbone.
    per_scored: of the head, for a prediction.
    per_attended_pair: of attention, for two tokens one of which attends to the other.
    """

    per_token: float
    per_scored: float
    per_attended_pair: float

    def of(self, batch: ScoredBatch) -> float:
        """Operations for a batch. What sequences share counts once, as it is computed once."""
        tokens = batch.input_ids.numel() - batch.padding
        attended_pairs = self.per_attended_pair * batch.attended_pairs
        return self.per_token * tokens + self.per_scored * len(batch.targets_U) + attended_pairs


def work_of(model: ScoringModel) -> Work | None:
    """The operations of a model; None if its weights do not tell: experts, or no known attention."""
    causal_lm = model.causal_lm
    config, decoder = causal_lm.config.get_text_config(), decoder_of(causal_lm)
    heads = getattr(config, "num_attention_heads", None)
    if heads is None or any(getattr(config, name, None) for name in EXPERTS):
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    tables = {id(m.weight) for m in decoder.modules() if isinstance(m, nn.Embedding)}
    weights = [p for p in decoder.parameters() if id(p) not in tables and _dimensions(p) == 2]
    head = causal_lm.get_output_embeddings().weight
    # Two products, q k^T and p v, of two operations each; once forward and twice backward.
    per_attended_pair = 3 * 2 * 2 * config.num_hidden_layers * heads * width
    return Work(sum(map(_operations, weights)), _operations(head), per_attended_pair)


@torch.no_grad()
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that a device can do, from the fastest of several square matrix products."""
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


def peak_memory_gib(device: torch.device) -> float:
    """The most memory in GiB that the process has held: the GPU's if `device` is one, else the host's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (2**30 if sys.platform == "darwin" else 2**20)


def _operations(weight: nn.Parameter) -> int:
    size = getattr(weight, "ds_numel", weight.numel())  # of all ranks, where it is sharded
    return (6 if weight.requires_grad else 4) * size


def _dimensions(weight: nn.Parameter) -> int:
    return len(getattr(weight, "ds_shape", weight.shape))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
