"""A stream as a split: asked by the trainer for what it asks a `Split`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from dpo_fast.data.sampler import BatchSampler
from dpo_fast.data.stream import Chunk, ExampleStream
from dpo_fast.training.progress import say
from dpo_fast.training.split import Split


class StreamSplit:
    """A stream as one split after the other; asked by the trainer for what it asks a `Split`.

    stream: at its beginning. make: a chunk to a split, given the accumulation of the first one (None
    for the first itself). last: steps of the run. Steps must be asked for in order. While one chunk is
    trained on, a thread reads the next. Every rank reads the whole stream, so that every rank knows the
    counts of a global batch.
    """

    name = "train"

    def __init__(
        self, stream: ExampleStream, make: Callable[[Chunk, int | None], Split], last: int
    ) -> None:
        self.stream, self.make, self.last = stream, make, last
        self.key = stream.key  # now: later the thread has the tokenizer
        self.accumulation: int | None = None
        self.begin = 0  # step with which the chunk begins
        self.part = self._use(stream.read())
        self.accumulation = self.part.sampler.accumulation
        self.reader = ThreadPoolExecutor(1)
        self.coming: Future[Chunk] | None = None

    @property
    def examples(self) -> Chunk:
        return self.part.examples

    @property
    def sampler(self) -> BatchSampler:
        return self.part.sampler

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that may come."""
        return self.stream.config.max_length

    def at(self, step: int) -> tuple[Split, int]:
        """The split of the step's chunk, and the step's number in it. Raises UserError."""
        while step >= self._end:
            chunk = self.coming.result() if self.coming else self.stream.read()
            self.begin, self.coming = self._end, None
            self.part = self._use(chunk)
        if self.coming is None and self._end < self.last:
            self.coming = self.reader.submit(self.stream.read)
        return self.part, step - self.begin

    def epochs(self, step: int) -> float | None:
        """How long a pass is, a stream does not know."""
        return None

    def must_fit(self) -> dict:
        return {"data": self.key, "stream_buffer": self.stream.config.stream_buffer}

    def position(self, step: int) -> dict:
        chunk = self.examples
        place = {"chunk": chunk.number, "row": chunk.row, "step": step - self.begin}
        return {"stream": place}

    def seek(self, state: dict) -> None:
        place = state["stream"]
        self.begin = state["step"] - place["step"]
        if place["chunk"] != self.examples.number:
            self.stream.seek(place["chunk"], place["row"])
            self.part = self._use(self.stream.read())

    @property
    def _end(self) -> int:
        return self.begin + self.part.sampler.steps_per_epoch

    def _use(self, chunk: Chunk) -> Split:
        report = chunk.report
        unused = report.bad.total + report.dropped.total
        if unused:
            say(
                f"chunk {chunk.number + 1} of the stream: {report.rows_read} rows read so far, "
                f"{report.bad.total} of them bad, {report.dropped.total} dropped"
            )
        return self.make(chunk, self.accumulation)
