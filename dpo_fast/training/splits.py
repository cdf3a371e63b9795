"""The examples of a run as batches: a stored data set (`Split`) or a stream (`StreamSplit`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from dpo_fast.data.batch import ScoredBatch, collate
from dpo_fast.data.dataset import Dataset
from dpo_fast.data.grouping import SamePrompt
from dpo_fast.data.images.ahead import Ahead
from dpo_fast.data.kinds import COMPLETIONS, GROUPS, ExampleLengths
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.data.mismatched import mismatched, mismatched_lengths, partners
from dpo_fast.data.packing import Costs
from dpo_fast.data.sampler import BatchSampler, Sampler, TokenSampler
from dpo_fast.data.stream import Chunk, ExampleStream
from dpo_fast.losses import Totals
from dpo_fast.training import data_ranks
from dpo_fast.training.console import say

Examples = Dataset | Chunk


@dataclass
class Split:
    """Examples of one kind, and how their batches are made.

    columns: columns of numbers that go into batches.
    mismatched_length: tokens that a prompt and a mismatched completion may have together; the completion
        is cut to that. None if no loss wants mismatched completions.
    steps: that a run takes of it; None: every example may be asked for.
    """

    name: str
    examples: Examples
    sampler: BatchSampler
    layout: str
    pad_id: int
    columns: tuple[str, ...] = ()
    mismatched_length: int | None = None
    steps: range | None = None

    @functools.cached_property
    def lengths(self) -> ExampleLengths:
        """Tokens of every prompt and of its answers."""
        return self.examples.lengths

    @functools.cached_property
    def costs(self) -> Costs:
        """Tokens that each example takes in the layout; at most so many, unless they are a budget's."""
        if isinstance(self.sampler, TokenSampler):
            return self.sampler.costs
        return LAYOUTS[self.layout].costs(self.lengths)

    @functools.cached_property
    def same_prompt(self) -> SamePrompt:
        """What brings examples of one prompt together, whether the sampler does it or not."""
        return self.sampler.same_prompt or SamePrompt.of(self.examples, self.layout)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, mismatched ones included."""
        prompt_P, answer_P = self.lengths.prompt_P, self.lengths.longest_P
        if self.mismatched_length is None:
            return int((prompt_P + answer_P).max())
        return min(self.mismatched_length, int(prompt_P.max() + answer_P.max()))

    def totals(self, indices: list[int]) -> Totals:
        """Counts of a global batch. Every rank knows all lengths, so none is communicated."""
        lengths = self.lengths.take(indices)
        if not indices:  # train.skip_rows names all of them: the loss is 0
            return Totals(1, 1, 1, 1)
        sequences, tokens = len(lengths.scored_S), int(lengths.scored_S.sum())
        if self.examples.kind.single:
            scored_S = lengths.scored_S
            if self.examples.kind == COMPLETIONS:
                scored_S = scored_S[self.examples.labels[indices]]
            chosen = max(int(scored_S.sum()), 1)  # of undesirable ones alone the sft term is 0
            return Totals(0, chosen, sequences, tokens)
        chosen = 0 if self.examples.kind == GROUPS else int(lengths.scored_S[::2].sum())
        return Totals(len(indices), chosen, sequences, tokens)

    def batches(self, step: int) -> Iterator[ScoredBatch]:
        """This rank's micro-batches of a step, tokens on the CPU."""
        rank = data_ranks.data_rank()
        places = self.sampler.micro_batches(step, rank)
        if self.examples.images is None:
            yield from map(self._batch, places)
            return
        last = (step + 1) % self.sampler.steps_per_epoch == 0
        after = None if last else self.sampler.micro_batches(step + 1, rank)[0]
        yield from self._ahead.batches(places, after)

    @functools.cached_property
    def _ahead(self) -> Ahead[ScoredBatch]:
        return Ahead(self._batch)

    def _batch(self, indices: list[int]) -> ScoredBatch:
        return self.collate([self.examples[i] for i in indices], indices, self.columns)

    def collate(
        self, examples: list[dict], indices: list[int], columns: tuple[str, ...] = ()
    ) -> ScoredBatch:
        """Lay out examples of the data, or some made of them. indices: their places in the data."""
        return collate(
            examples,
            self.layout,
            pad_id=self.pad_id,
            indices=indices,
            columns=columns,
            kind=self.examples.kind,
            images=self.examples.images,
        )

    def mismatched(self, indices: list[int]) -> Iterator[ScoredBatch]:
        """This rank's share of a global batch with mismatched completions (`data/mismatched.py`).

        Every example gets the completion of the one before it. Every rank has the same number of batches,
        and none if no loss wants them.
        """
        if self.mismatched_length is None:
            return
        grouped = self.sampler.same_prompt
        prompts = None if grouped is None else grouped.prompts_P[indices].tolist()
        pairs, world = partners(indices, len(self.examples), prompts), data_ranks.data_ranks()
        batches = self._mismatched_batches(pairs)
        for first in range(0, len(batches), world):
            mine = dict(enumerate(batches[first : first + world])).get(data_ranks.data_rank(), [])
            joined = [
                mismatched(
                    self.examples[index],
                    self.examples[other],
                    self.examples.kind,
                    self.mismatched_length,
                )
                for index, other in mine
            ]
            yield self.collate(joined, [index for index, _ in mine])

    def _mismatched_batches(self, pairs: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Micro-batches of all ranks, as large as the sampler's.

        An example that exceeds the budget with its foreign completion has one of its own.
        """
        if isinstance(self.sampler, Sampler):
            size = self.sampler.micro_batch_size
            return [pairs[start : start + size] for start in range(0, len(pairs), size)]
        lengths = mismatched_lengths(self.lengths, pairs, self.mismatched_length)
        costs = LAYOUTS[self.layout].costs(lengths)
        budget = max(self.sampler.budget, int(costs.alone_P.max()))
        bins = costs.bins(budget, range(len(pairs)))
        return [[pairs[place] for place in places] for places in bins]

    def all_batches(self) -> Iterator[ScoredBatch]:
        """This rank's batches of one pass; every rank has the same number."""
        for step in range(self.sampler.steps_per_epoch):
            yield from self.batches(step)

    def at(self, step: int) -> tuple[Split, int]:
        """The split that a step belongs to, and the step's number in it: a stream has several."""
        return self, step

    def examples_of(self, step: int) -> int:
        """How many examples a step has, on all ranks together."""
        return len(self.sampler.global_batch(step))

    def epochs(self, step: int) -> float:
        """Passes over the data after so many steps."""
        return step / self.sampler.steps_per_epoch

    def must_fit(self) -> dict:
        """What a resumed run must share with the old one."""
        mixture = self.examples.mixture
        shares = {} if mixture is None else {"mixture": mixture.identity()}
        return {"data": self.examples.fingerprint} | shares

    def position(self, step: int) -> dict:
        """What `seek` needs of a checkpoint before `step`: nothing, as batches follow from the step."""
        return {}

    def seek(self, state: dict) -> None:
        """Go to where a checkpoint was written. state: the content of its state.json."""


class StreamSplit:
    """A stream as one split after the other, for the trainer like one `Split`. Making it reads a chunk.

    Steps must be asked for in order. While one chunk is trained on, a thread reads the next. Every rank
    reads the whole stream, so every rank knows the counts of a global batch.

    stream: at its beginning.
    make: a chunk to a split, given the accumulation of the first split (None for the first itself).
    last: steps of the run; a chunk behind them is not read.
    """

    name = "train"

    def __init__(
        self, stream: ExampleStream, make: Callable[[Chunk, int | None], Split], last: int
    ) -> None:
        self.stream, self.make, self.last = stream, make, last
        self.key = stream.key  # read here, because the thread uses the tokenizer later
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

    def examples_of(self, step: int) -> int:
        """As of a `Split`. The step is the latest that was asked for."""
        return self.part.examples_of(step - self.begin)

    def epochs(self, step: int) -> float | None:
        """None: a stream does not know how long a pass is."""
        return None

    def must_fit(self) -> dict:
        return {"data": self.key, "stream_buffer": self.stream.config.stream_buffer}

    def position(self, step: int) -> dict:
        chunk = self.examples
        place = {"chunk": chunk.number, "row": chunk.row, "step": step - self.begin}
        return {"stream": place | ({"sources": chunk.sources} if chunk.sources else {})}

    def seek(self, state: dict) -> None:
        place = state["stream"]
        self.begin = state["step"] - place["step"]
        if place["chunk"] != self.examples.number:
            self.stream.seek(place["chunk"], place["row"], place.get("sources", ()))
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
