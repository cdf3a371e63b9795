"""Contenders of the loss head that take their process down, for `bench kernels --contenders`."""

import functools
import os
import signal
import time

from benchmarks.kernels.case import Contender
from benchmarks.kernels.linear_logp import OPERATION

BEFORE_TIMES = 1  # calls without memory: the check


def crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs() -> None:
    time.sleep(3600)


def breaks() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def build(fault, calls: int, case, inputs):
    """A right contender that has a fault after so many calls in its process."""
    right = next(c for c in OPERATION.contenders if c.name == "materialised").build(case, inputs)

    def call():
        nonlocal calls
        calls -= 1
        if calls < 0:
            fault()
        return right()

    return call


def contender(name: str, fault, calls: int = 0, **options) -> Contender:
    return Contender(name, functools.partial(build, fault, calls), modes=("trainable",), **options)


CONTENDERS = {
    "linear_logp": (
        contender("fine", hangs, 1_000_000),
        contender("crashes", crashes),
        contender("hangs", hangs, ours=True),
        contender("breaks the device", breaks),
        contender("crashes later", crashes, BEFORE_TIMES),
        contender("fine too", hangs, 1_000_000),
    )
}
