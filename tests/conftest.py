"""Triton runs in its interpreter here, which has to be settled before a kernel is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


def _poisoned(make):
    def wrapper(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture
def poison(monkeypatch):
    """torch.empty, empty_like and new_empty give NaN: an output that nobody wrote shows."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
