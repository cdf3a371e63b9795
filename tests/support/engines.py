"""An engine that is nothing but what checkpoints ask of one."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_fast.training import distributed


class Engine:
    """Saves and loads one file. broken: what loading raises. more: a state beside the weights."""

    device = torch.device("cpu")

    def __init__(self, broken: Exception | None = None, weights: Tensor | None = None) -> None:
        self.broken, self.more = broken, {}
        self.weights = torch.arange(64.0) if weights is None else weights
        self.file = f"model-{distributed.rank()}.pt"

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        self.checkpoint_engine.makedirs(f"{folder}/{tag}", exist_ok=True)
        self.checkpoint_engine.save(
            {"weights": self.weights, **self.more}, f"{folder}/{tag}/{self.file}"
        )

    def load_checkpoint(self, folder: str, tag: str):
        if self.broken:
            raise self.broken
        self.more = self.checkpoint_engine.load(f"{folder}/{tag}/{self.file}")
        self.weights = self.more.pop("weights")
        return folder, {}
