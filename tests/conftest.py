"""What has to be settled before torch or a kernel is imported, and what holds for every test.

Triton runs in its interpreter. One thread a process: models here are tiny, files run in parallel,
and threads that wait for each other on busy cores take ten milliseconds for a product of
microseconds. A terminal has 100 columns and no colour, wherever the tests run.

What is imported and collected stays to the end, and is millions of objects: Python's search for garbage
passes them over.
"""

import gc
import os

gc.disable()  # until the tests begin

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
# Names like org/model are of nothing; without a network the hub's client looks for 25 seconds.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("FORCE_COLOR", None)

import signal
import subprocess
import sys

# A folder with bitsandbytes, unpacked, where it is not installed. transformers looks once.
if os.environ.get("BITSANDBYTES"):
    sys.path.append(os.environ["BITSANDBYTES"])

import hypothesis
import pytest
import torch

from benchmarks import interpreter
from tests.support import ranks
from tests.support.device import DEVICE, ON_A_GPU
from tests.support.paths import ROOT

interpreter.hasten()

# The same examples in every CI run: a failure there should be the change's, not the draw's.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


# Under nohup every process that a test starts would ignore SIGHUP, as it should.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# A file is run by one worker. The longest come first, so that the workers end together.
LONGEST = (
    "benchmarks/test_gpu.py",
    "kernels/test_aot.py",
    "training/test_step.py",
    "training/test_loop.py",
    "benchmarks/test_kernels.py",
    "csrc/test_linear_logp_sm90.py",
    "ops/test_compiled.py",
    "ops/test_linear_logp.py",
    "models/test_layers.py",
    "benchmarks/test_isolation.py",
    "rounds/test_sample.py",
    "losses/test_custom.py",
)


def pytest_collection_modifyitems(items):
    place = {ROOT / "tests" / name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    gc.freeze()
    gc.enable()


class Popen(subprocess.Popen):
    """Starts no Python for a test that does not say so: `make check` counts on the marker."""

    test: pytest.Item | None = None

    def __init__(self, args, *rest, **options) -> None:
        first = args if isinstance(args, str) else str(next(iter(args)))
        test = Popen.test
        if first == sys.executable and test and not test.get_closest_marker("processes"):
            pytest.fail(f"{test.nodeid} starts {args}: mark it `processes`")
        super().__init__(args, *rest, **options)


subprocess.Popen = Popen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    Popen.test = item
    try:
        return (yield)
    finally:
        Popen.test = None


OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module", autouse=True)
def leaves_no_ranks():
    """A run in a test's own process leaves neither a group nor the variables of a rank to other files."""
    yield
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    left = [name for name in OF_A_RANK if os.environ.pop(name, None) is not None]
    if group:
        torch.distributed.destroy_process_group()  # so that later files are not blamed
    assert not group and not left, (
        f"process group: {group}, variables: {left}. Train by tests.support.here or tests.support.ranks"
    )


def pytest_sessionfinish():
    for group in ranks.GROUPS.values():
        group.end()


@pytest.fixture(scope="module")
def on_the_device():
    """DEVICE is the default: see tests/support/device.py."""
    with DEVICE:
        # PyTorch looks up once which functions obey: before `poison` puts others in their places.
        assert torch.empty(0).is_cuda == ON_A_GPU
        yield


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
