"""Batches with images are made while the one before them is trained on: decoding pixels takes a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class Ahead(Generic[Batch]):
    """Makes batches of examples in a thread, the next one too. make: of their places in the data."""

    def __init__(self, make: Callable[[list[int]], Batch]) -> None:
        self.make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._coming: tuple[list[int], Future[Batch]] | None = None

    def batches(self, places: Sequence[list[int]], after: list[int] | None) -> Iterator[Batch]:
        """The batches of these places, in order. after: of the batch that is asked for next, if known.

        Raises what `make` raises, for the batch whose turn it is.
        """
        for here, following in zip(places, [*places[1:], after]):
            batch = self._taken(here)
            if following is not None:
                self._coming = following, self._thread.submit(self.make, following)
            yield batch

    def _taken(self, places: list[int]) -> Batch:
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == places:
            return coming[1].result()
        if coming is not None:
            coming[1].cancel()  # what is asked for is another, as after a resumed run has gone back
        return self._thread.submit(self.make, places).result()
