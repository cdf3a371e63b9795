"""DeepSpeed's asynchronous files as plain reads and writes, for machines without libaio.

DeepSpeed compiles an extension for `nvme`. What it does with files and tensors around that is Python, and
runs here as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import numpy
import torch

LEAST = 1 << 10  # bytes that go to a file; DeepSpeed leaves out what is below a MiB


class Handle:
    """What the extension calls `aio_handle`: every call is done when it returns, and `wait` counts them."""

    def __init__(self, **options) -> None:
        self.done, self.locked = 0, set()

    def async_pread(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        read = numpy.fromfile(path, numpy.uint8, buffer.numel() * buffer.element_size())
        flat = buffer.view(torch.uint8)
        flat[: len(read)].copy_(torch.from_numpy(read))
        self.done += 1
        return 0

    def async_pwrite(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        buffer.detach().contiguous().view(torch.uint8).numpy().tofile(path)
        self.done += 1
        return 0

    def wait(self) -> int:
        done, self.done = self.done, 0
        return done

    def new_cpu_locked_tensor(self, count: int, like: torch.Tensor) -> torch.Tensor:
        made = torch.zeros(int(count), dtype=like.dtype)
        self.locked.add(made.untyped_storage().data_ptr())
        return made

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> None: ...

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.locked


@contextlib.contextmanager
def plain_files() -> Iterator[None]:
    """Inside, DeepSpeed's async_io is `Handle`, and small tensors go to files, too."""
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder
    from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_param_swapper

    places = (optimizer_utils, partitioned_param_swapper)
    before = [place.MIN_AIO_BYTES for place in places], AsyncIOBuilder.is_compatible
    load = AsyncIOBuilder.load
    AsyncIOBuilder.load = lambda self, verbose=False: SimpleNamespace(aio_handle=Handle)
    AsyncIOBuilder.is_compatible = lambda self, verbose=False: True
    for place in places:
        place.MIN_AIO_BYTES = LEAST
    try:
        yield
    finally:
        AsyncIOBuilder.load, AsyncIOBuilder.is_compatible = load, before[1]
        for place, value in zip(places, before[0]):
            place.MIN_AIO_BYTES = value
