"""Numbers that are not finite: kept from the weights, counted, and the end of a run that has too many.

A step is not taken if its loss or its gradient is not finite on any rank. Weights and optimiser stay as
they are. The schedule of the learning rate moves on: the rate of a step follows from its number.

A loss that is not finite makes the gradient NaN (`backward_scale`), so the gradient alone decides. Where
DeepSpeed wraps the optimiser, it looks at the norm and leaves the step out. At ZeRO 0 in fp32 it does not
look, and `FiniteStep` does.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dpo_fast.errors import UserError
from dpo_fast.models.checkpoint import base_of, read_header, weight_files
from dpo_fast.training import distributed
from dpo_fast.training.console import say
from dpo_fast.training.finite_step import FiniteStep
from dpo_fast.training.splits import Split


def backward_scale(loss: Tensor, scale: float) -> Tensor:
    """What the loss is multiplied with before its backward pass: `scale`, or NaN if it is not finite."""
    return torch.where(loss.detach().isfinite(), scale, math.nan)


def watch_clipping(engine) -> None:
    """Keep the norm that DeepSpeed clips by and forgets."""
    from deepspeed.runtime.utils import clip_grad_norm_

    def clip() -> None:
        parameters = list(engine.module.parameters())
        norm = clip_grad_norm_(parameters, engine.gradient_clipping(), mpu=engine.mpu)
        engine.optimizer.norm = norm.squeeze()

    engine.optimizer.clipped = engine.gradient_clipping() > 0
    engine.clip_fp32_gradients = clip


def forget_gradients(optimizer) -> None:
    """Drop the gradients of a step that DeepSpeed left out.

    At ZeRO 1 and 2 with the optimiser in CPU memory it keeps them (0.19), and adds those of all later steps
    to them.
    """
    if getattr(optimizer, "cpu_offload", False):
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


@dataclass(frozen=True)
class Place:
    """A step, counted from 0, and the split and the number in it that it has: a stream has many splits."""

    step: int
    split: Split
    number: int

    @property
    def rows(self) -> list[str]:
        """File and line of every row of the global batch."""
        return [self.split.examples.where(i) for i in self.split.sampler.global_batch(self.number)]


def some(places: list[str], most: int = 8) -> str:
    """The first of them, and how many there are."""
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return ", ".join(places[:most]) + more


class Guard:
    """Sees which steps were not taken. `look` must be called after every step.

    engine: of DeepSpeed.
    limit: so many in a row end the run.
    count: steps left out since step 0; kept in checkpoints by DeepSpeed.
    """

    def __init__(self, engine, limit: int) -> None:
        self.engine, self.limit, self.in_a_row = engine, limit, 0
        self._unseen: deque[tuple[Place, Flag | bool]] = deque()
        if isinstance(engine.optimizer, FiniteStep):
            engine.optimizer.limit = limit
            watch_clipping(engine)

    @property
    def count(self) -> int:
        return self.engine.skipped_steps

    def after(self, place: Place) -> Tensor:
        """Enter the step that the engine has done. Returns whether it was left out, [] bool."""
        engine = self.engine
        if isinstance(engine.optimizer, FiniteStep):
            skipped = engine.optimizer.skipped
            engine._global_grad_norm = engine.optimizer.norm
            self._unseen.append((place, Flag(skipped) if skipped.is_cuda else bool(skipped)))
            return skipped
        if engine.optimizer.overflow:  # DeepSpeed has counted it, and held the schedule back
            engine.skipped_steps -= 1
            with (
                warnings.catch_warnings()
            ):  # of a schedule that moves before the first step is taken
                warnings.simplefilter("ignore")
                engine.lr_scheduler.step()
            forget_gradients(engine.optimizer)
        self._unseen.append((place, engine.optimizer.overflow))
        return torch.full((), engine.optimizer.overflow, device=engine.device)

    def look(self, ahead: int) -> Place | None:
        """Count the steps; the newest `ahead` may wait if only the device knows of them.

        Returns:
            The step at which the run must end: the last of `limit` in a row.
        """
        while self._unseen and (len(self._unseen) > ahead or isinstance(self._unseen[0][1], bool)):
            place, skipped = self._unseen.popleft()
            if not skipped:
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            self.engine.skipped_steps += 1
            if self.in_a_row >= self.limit:
                self._unseen.clear()  # none of them was taken
                return place
            say(
                f"step {place.step + 1} was not taken: its loss or its gradient is not finite. Its rows: "
                f"{some(place.rows)}",
                matters=True,
            )
        return None


class Flag:
    """A bool on its way from the device. It is waited for when it is asked for."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if value.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def __bool__(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.value)


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What this rank holds of every parameter, by name."""
    for name, parameter in model.named_parameters():
        yield name, getattr(parameter, "ds_tensor", parameter)


def check_loaded(model: nn.Module, path: str, option: str, alone: bool = False) -> None:
    """Raises UserError if a model came with weights that are not finite. Collective unless `alone`.

    path: its folder or hub id; option: that named it. alone: this rank has all of the model.
    """
    found = not_finite(weights_of(model))
    names = list(dict.fromkeys(found if alone else distributed.joined(found)))
    if names:
        plain = [name.replace(".base_layer", "") for name in names]
        told = [f"{name} in {file}" if (file := file_of(path, name)) else name for name in plain]
        raise UserError(
            f"{option}={path}: {len(names)} of its tensors have weights that are not finite (nan or inf): "
            f"{some(told, 4)}. The files are damaged, or its training diverged: name another model"
        )


def file_of(path: str, name: str) -> str | None:
    """The file of a model folder that holds a tensor; None if that cannot be told from the names."""
    try:
        for file in weight_files(Path(os.path.expanduser(base_of(path)))):
            if any(name.endswith(key) or key.endswith(name) for key in read_header(file)[1]):
                return file.name
    except UserError:  # a hub id, or weights in another form
        return None
    return None


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those that have a NaN or an infinity. Waits for the device once."""
    flags = [
        (name, torch.linalg.vector_norm(tensor.detach(), math.inf).isfinite())
        for name, tensor in tensors
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel()
    ]
    found = [(name, Flag(flag)) for name, flag in flags]
    return [name for name, finite in found if not finite]
