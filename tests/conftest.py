"""What has to be settled before torch or a kernel is imported.

Triton runs in its interpreter. One thread a process: models here are tiny, files run in parallel, and
threads that wait for each other on busy cores take ten milliseconds for a product of microseconds.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

# The same examples in every CI run: a failure there should be the change's, not the draw's.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


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
