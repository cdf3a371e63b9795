"""A step that was not finite, looked at after the fact: once more, row by row, with a look at every layer.

Every row is a micro-batch of its own. Nothing is updated: DeepSpeed is told that the step goes on after the
last row. The gradients that it has then are of no use, so a run ends, or asks for no gradients (`scores`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.losses import Preference
from dpo_fast.training import data_ranks, distributed
from dpo_fast.training.finite import Place
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.prepare import Run
from dpo_fast.training.step import coupled_step, train_step


@dataclass
class Row:
    """One row of the batch.

    where: its file and line.
    columns: its numbers, such as weight.
    loss: its share in the loss of the batch.
    logps, rewards: of every answer.
    output: the first module whose output was not finite, if any.
    gradient: the first parameter whose gradient was not finite; backward begins at the loss.
    largest: of its gradient, the largest element.
    shares_loss: whether the loss is one of the whole batch, which compares all its rows.
    """

    where: str
    columns: dict[str, float]
    loss: float
    logps: list[float]
    rewards: list[float]
    output: str | None = None
    gradient: str | None = None
    largest: float = 0.0
    shares_loss: bool = False

    @property
    def fault(self) -> str | None:
        """What of it was not finite first, in words; None if all is."""
        if not _finite(self.logps):
            at = f", and the first such output is that of {self.output}" if self.output else ""
            return f"log-probs that are {_odd(self.logps)}{at}"
        if not _finite(self.rewards):
            return f"rewards that are {_odd(self.rewards)} though its log-probs are finite"
        if not self.shares_loss and not _finite([self.loss]):
            columns = ", ".join(f"{name} {value:g}" for name, value in self.columns.items())
            columns = f", with {columns}" if columns else ""
            return f"a loss that is {_odd([self.loss])}{columns}"
        if self.gradient is None or not _finite([self.loss]):  # such a loss makes any gradient NaN
            return None
        return f"a gradient of {self.gradient} that is not"

    def as_json(self) -> dict[str, Any]:
        """Values that are not finite as text, since JSON has none."""
        return _without_odd(asdict(self)) | {"fault": self.fault}


def _finite(values: list[float]) -> bool:
    return bool(torch.tensor(values, dtype=torch.float64).isfinite().all())


def _odd(values: list[float]) -> str:
    return " and ".join(sorted({str(value) for value in values if not _finite([value])}))


def _without_odd(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_odd(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_odd(each) for each in value]
    return str(value) if isinstance(value, float) and not _finite([value]) else value


def examine(run: Run, place: Place) -> list[Row]:
    """All rows of a step, those of rank 0 first. Collective. The engine cannot go on training after it.

    A coupled loss has one value for the whole batch, and a row has an equal part of it.
    """
    split, number, engine = place.split, place.number, run.engine
    indices = split.sampler.global_batch(number)
    mine = sum(split.sampler.micro_batches(number, data_ranks.data_rank()), [])
    alone = [[index] for index in mine]
    alone += [[]] * (int(distributed.largest(len(mine))) - len(mine))  # ranks keep step
    batches = [
        split.collate([split.examples[i] for i in each], each, split.columns) for each in alone
    ]
    loss_pass, provider = run.loss_and_reference("train")
    run.statistics.begin_step(engine, split.mismatched(indices), loss_pass, provider)
    engine.set_gradient_accumulation_boundary(False)
    with Layers(run.model.causal_lm).watched() as layers:
        rows = Rows(place, layers, loss_pass.objective.coupled)
        arguments = (
            engine,
            batches,
            loss_pass,
            provider,
            split.totals(indices),
            rows,
            run.statistics,
        )
        if loss_pass.objective.coupled:
            coupled_step(*arguments, indices)
        else:
            train_step(*arguments)
    return one_of_each(distributed.gathered(rows.found), run.model.causal_lm)


def one_of_each(of_ranks: list[list[Row]], model: nn.Module) -> list[Row]:
    """The rows of all ranks; of those that share a row, what any of them saw first.

    A module comes before those behind it in the model, and a gradient after them.
    """
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    shared, rows = len(of_ranks) // data_ranks.data_ranks(), []
    for first in range(0, len(of_ranks), shared):
        for same in zip(*of_ranks[first : first + shared]):
            outputs = [row.output for row in same if row.output in modules]
            gradients = [row.gradient for row in same if row.gradient in parameters]
            seen = {
                "output": min(outputs, key=modules.index) if outputs else same[0].output,
                "gradient": max(gradients, key=parameters.index) if gradients else same[0].gradient,
                "largest": max(row.largest for row in same),
            }
            rows.append(replace(same[0], **seen))
    return rows


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Without warnings, such as torch's that a look for NaN is slow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def where_nan(run: Run, place: Place, row: Row) -> str:
    """What torch's anomaly detection says of the backward pass of a row alone. On one rank."""
    split, number = place.split, place.number
    (index,) = list(split.examples.named([row.where]))[:1]
    batch = split.collate([split.examples[index]], [index], split.columns).to(run.engine.device)
    loss_pass, provider = run.loss_and_reference("train")
    totals = split.totals(split.sampler.global_batch(number))
    run.engine.set_gradient_accumulation_boundary(False)
    try:
        with _unwarned(), torch.autograd.detect_anomaly(check_nan=True):
            outputs = loss_pass.token_outputs(run.engine, batch)
            reference = loss_pass.reference(provider, batch)
            loss = loss_pass.loss(outputs, reference, batch, totals, run.statistics.values).loss
            run.engine.backward(loss, scale_wrt_gas=False)
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return "no function of the backward pass made a nan"


class Rows(MetricSums):
    """What `train_step` adds, kept row by row. `found`: of this rank."""

    def __init__(self, place: Place, layers: Layers, coupled: bool) -> None:
        super().__init__(distributed.device())
        self.coupled = coupled
        self.examples, self.layers = place.split.examples, layers
        self.found: list[Row] = []

    def add(
        self, result: Preference, token_outputs: Mapping[str, Tensor], batch: ScoredBatch
    ) -> None:
        output, gradient, largest = self.layers.take()
        if not batch.num_examples:
            return
        (index,) = batch.indices_P.tolist()
        columns = {name: float(value.flatten()[0]) for name, value in batch.columns.items()}
        self.found.append(
            Row(
                self.examples.where(index),
                columns,
                result.loss.item(),
                result.logps_S.tolist(),
                result.rewards_S.tolist(),
                output,
                gradient,
                largest,
                self.coupled,
            )
        )


@dataclass
class Layers:
    """Sees the first module of a forward, and the first parameter of a backward, that is not finite."""

    model: nn.Module
    output: str | None = None
    gradient: str | None = None
    largest: float = 0.0
    _handles: list = field(default_factory=list)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Layers]:
        """Inside, every module and every trained parameter is looked at. That waits for the device."""
        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_hook(self._output_of(name)))
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._gradient_of(name)))
        try:
            yield self
        finally:
            for handle in self._handles:
                handle.remove()

    def take(self) -> tuple[str | None, str | None, float]:
        """The names, and the largest element of a gradient, since the last call."""
        found = self.output, self.gradient, self.largest
        self.output, self.gradient, self.largest = None, None, 0.0
        return found

    def _output_of(self, name: str):
        def look(module, arguments, output) -> None:
            if self.output is None and not all(map(finite, tensors_in(output))):
                self.output = name or "the model"

        return look

    def _gradient_of(self, name: str):
        def look(gradient: Tensor) -> None:
            if gradient.numel():
                self.largest = max(self.largest, gradient.abs().max().item())
            if self.gradient is None and not finite(gradient):
                self.gradient = name

        return look


def finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of what a module returns."""
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
