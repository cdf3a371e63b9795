"""How much memory a block takes at its peak."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


def peak() -> int:
    """MiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@contextmanager
def grown(mib: int) -> Iterator[None]:
    """The block may raise the peak of this process by so much. What ran before only makes room."""
    before = peak()
    yield
    assert peak() - before <= mib, f"{peak() - before} MiB more; {mib} are allowed"
