"""The dtype of a model on the machine of a run. No test goes by the CPU that it runs on."""

import pytest
import torch
from pydantic import ValidationError

pytest.importorskip("transformers")

from dpo_fast.models import precision
from dpo_fast.models.config import ModelSection
from dpo_fast.ops.cpu import Verdict


@pytest.fixture(params=["gpu", "fast", "slow"])
def machine(request, monkeypatch):
    verdict = Verdict(request.param == "fast", "this CPU is odd")
    monkeypatch.setattr(precision, "half_products", lambda dtype: verdict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param == "gpu")
    return request.param


def test_auto_takes_what_is_fast(machine):
    choice = precision.choose_dtype("auto")
    name, reason = choice.name, choice.reason
    assert name == ("fp32" if machine == "slow" else "bf16")
    assert reason == ("the run is on a GPU" if machine == "gpu" else "this CPU is odd")
    section = ModelSection(path="org/name")
    assert section.dtype == "auto" and section.precision == name
    assert section.torch_dtype == (torch.float32 if machine == "slow" else torch.bfloat16)


def test_a_name_is_honoured(machine):
    for name in ("bf16", "fp32"):
        section = ModelSection(path="org/name", dtype=name)
        assert section.precision == precision.choose_dtype(name).name == name
    told = precision.choose_dtype("bf16").reason
    assert ("slow here, because this CPU is odd" in told) == (machine == "slow")
    assert precision.choose_dtype("fp32").reason == "asked for by name"
    with pytest.raises(ValidationError, match="auto"):
        ModelSection(path="org/name", dtype="fp16")
