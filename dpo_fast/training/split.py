"""The rows of a run, and how their batches are made: a stored data set, or a stream of small ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.config import CHAT_COLUMNS
from dpo_fast.data.dataset import Dataset, load_pairs
from dpo_fast.data.kinds import COMPLETIONS, GROUPS
from dpo_fast.data.layouts import collate
from dpo_fast.data.lengths import RowLengths
from dpo_fast.data.mismatched import mismatched, mismatched_lengths, partners
from dpo_fast.data.packing import row_costs
from dpo_fast.data.sampler import BatchSampler, Sampler, TokenSampler
from dpo_fast.data.stream import Chunk, PairStream
from dpo_fast.errors import UserError
from dpo_fast.losses import LOSSES, Totals
from dpo_fast.training import distributed
from dpo_fast.training.columns import used_columns
from dpo_fast.training.config import RunConfig
from dpo_fast.training.progress import say

Rows = Dataset | Chunk


@dataclass
class Split:
    """One set of rows, and how its batches are made. mismatched_length: to how many tokens mismatched
    completions are cut together with their prompts; None where no loss wants such."""

    name: str
    pairs: Rows
    sampler: BatchSampler
    layout: str
    pad_id: int
    columns: tuple[str, ...] = ()
    mismatched_length: int | None = None

    @functools.cached_property
    def lengths(self) -> RowLengths:
        """Tokens of every prompt and of its answers."""
        return self.pairs.lengths

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, mismatched ones included."""
        prompt_R, answer_R = self.lengths.prompt_R, self.lengths.longest_R
        if self.mismatched_length is None:
            return int((prompt_R + answer_R).max())
        return min(self.mismatched_length, int(prompt_R.max() + answer_R.max()))

    def totals(self, rows: list[int]) -> Totals:
        """Counts of a global batch. Every rank knows them from the data: nothing is communicated."""
        lengths = self.lengths.take(rows)
        sequences, tokens = len(lengths.answers_A), int(lengths.answers_A.sum())
        if self.pairs.kind == COMPLETIONS:
            return Totals(0, 0, sequences, tokens)
        chosen = 0 if self.pairs.kind == GROUPS else int(lengths.answers_A[::2].sum())
        return Totals(len(rows), chosen, sequences, tokens)

    def batches(self, step: int) -> Iterator[ScoredBatch]:
        """This rank's micro-batches of a step, tokens on the CPU."""
        for rows in self.sampler.micro_batches(step, distributed.rank()):
            yield self.collate([self.pairs[row] for row in rows], rows, self.columns)

    def collate(
        self, rows: list[dict], indices: list[int], columns: tuple[str, ...] = ()
    ) -> ScoredBatch:
        """Rows of the data, or like them, in the split's layout."""
        return collate(
            rows, self.layout, pad_id=self.pad_id, indices=indices, columns=columns,
            kind=self.pairs.kind,
        )  # fmt: skip

    def mismatched(self, rows: list[int]) -> Iterator[ScoredBatch]:
        """This rank's share of a global batch in which every row has the completion of the one before it
        (`data/mismatched.py`): as many batches as every other rank has. None where no loss wants them."""
        if self.mismatched_length is None:
            return
        others, world = partners(rows, len(self.pairs)), distributed.world_size()
        plan = self._mismatched_plan(others)
        for first in range(0, len(plan), world):
            mine = dict(enumerate(plan[first : first + world])).get(distributed.rank(), [])
            joined = [
                mismatched(
                    self.pairs[row],
                    self.pairs[others[row]],
                    self.pairs.kind,
                    self.mismatched_length,
                )
                for row in mine
            ]
            yield self.collate(joined, mine)

    def _mismatched_plan(self, others: dict[int, int]) -> list[list[int]]:
        """Micro-batches of rows, as large as those of the sampler. A row that takes more than the budget
        together with its foreign completion has one of its own."""
        rows = list(others)
        if isinstance(self.sampler, Sampler):
            size = self.sampler.micro_pairs
            return [rows[start : start + size] for start in range(0, len(rows), size)]
        lengths = mismatched_lengths(self.lengths, others, self.mismatched_length)
        costs = row_costs(lengths, self.layout)
        budget = max(self.sampler.budget, int(costs.alone_I.max()))
        return [[rows[item] for item in items] for items in costs.bins(budget, range(len(rows)))]

    def all_batches(self) -> Iterator[ScoredBatch]:
        """This rank's share of one pass, the same number of batches on every rank."""
        for step in range(self.sampler.steps_per_epoch):
            yield from self.batches(step)

    def at(self, step: int) -> tuple[Split, int]:
        """The set of pairs that a step belongs to, and the step's number in it: itself."""
        return self, step

    def epochs(self, step: int) -> float:
        """Passes over the data after so many steps."""
        return step / self.sampler.steps_per_epoch

    def must_fit(self) -> dict:
        """What a resumed run must share with the old one."""
        return {"data": self.pairs.fingerprint}

    def position(self, step: int) -> dict:
        """What a checkpoint before `step` must hold for `seek`: nothing."""
        return {}

    def seek(self, state: dict) -> None:
        """Go to where a checkpoint was written, given its state."""


class StreamSplit:
    """A stream as one split after the other; asked by the trainer for what it asks a `Split`.

    stream: at its beginning. make: a chunk to a split, given the accumulation of the first one (None
    for the first itself). last: steps of the run. Steps must be asked for in order. While one chunk is
    trained on, a thread reads the next. Every rank reads the whole stream, so that every rank knows the
    counts of a global batch.
    """

    name = "train"

    def __init__(
        self, stream: PairStream, make: Callable[[Chunk, int | None], Split], last: int
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
    def pairs(self) -> Chunk:
        return self.part.pairs

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
        chunk = self.pairs
        place = {"chunk": chunk.number, "row": chunk.row, "step": step - self.begin}
        return {"stream": place}

    def seek(self, state: dict) -> None:
        place = state["stream"]
        self.begin = state["step"] - place["step"]
        if place["chunk"] != self.pairs.number:
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


def load_split(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, name: str, shuffle: bool
) -> Split | StreamSplit:
    """Read, check and tokenise a split (`train` or `eval`), or find it done; or begin a stream."""
    if name == "train" and config.data.streaming:
        return open_stream(config, tokenizer)
    pairs = distributed.main_first(
        f"data/{name}", lambda: load_pairs(config.data, tokenizer, split=name)
    )
    split = make_split(config, tokenizer, name, pairs, shuffle)
    if shuffle:
        tell_size(split.sampler)
    return split


def open_stream(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> StreamSplit:
    """The stream of data.train at its beginning, its first chunk read."""

    def make(chunk: Chunk, accumulation: int | None) -> Split:
        return make_split(config, tokenizer, "train", chunk, True, chunk.number, accumulation)

    stream = StreamSplit(PairStream(config.data, tokenizer), make, config.train.max_steps)
    tell_size(stream.sampler)
    return stream


def make_split(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, name: str, pairs: Rows,
    shuffle: bool, epoch: int = 0, accumulation: int | None = None,
) -> Split:  # fmt: skip
    """Rows with the sampler that the options ask for. Without shuffling every step is one micro-batch
    a rank. epoch: number of the first; accumulation: of a TokenSampler, if it is not to choose.

    Raises:
        UserError: rows of a kind that the loss or the reference cannot take, columns that the loss does
            not use or lacks, or a row that is larger than train.tokens_per_batch.
    """
    check_kind(config, name, pairs)
    check_renamed(config, name, pairs)
    columns = used_columns(config, pairs.extras, pairs.kind)
    train, world = config.train, distributed.world_size()
    if train.tokens_per_batch is None:
        size = train.global_pairs if shuffle else train.micro_pairs * world
        sampler = Sampler(len(pairs), size, train.micro_pairs, world, train.seed, shuffle, epoch)
    else:
        costs = row_costs(pairs.lengths, train.layout)
        check_budget(train.tokens_per_batch, train.layout, costs.alone_I, pairs)
        sampler = TokenSampler(
            costs, train.tokens_per_batch, train.global_pairs, world, train.seed, shuffle, epoch,
            accumulation if shuffle else 1,
        )  # fmt: skip
    wants_mismatched = "kl" in config.loss.objective.statistics
    return Split(
        name, pairs, sampler, train.layout, tokenizer.pad_token_id, columns,
        config.data.max_length if wants_mismatched else None,
    )  # fmt: skip


def check_kind(config: RunConfig, name: str, rows: Rows) -> None:
    """Raises UserError if what the rows are does not go with the run."""
    objective, where = (
        config.loss.objective,
        f"data.{name} holds {rows.kind.name}, the first {rows.where(0)}",
    )
    names = ", ".join(config.loss.names)
    if objective.grouped and rows.kind != GROUPS:
        raise UserError(
            f"loss.type={names} goes by the scores of several completions of a prompt, but {where}; give "
            "rows with completions and scores, or choose another loss"
        )
    if rows.kind == GROUPS and not objective.grouped:
        groups = " or ".join(spec.name for spec in LOSSES.values() if spec.grouped)
        raise UserError(
            f"loss.type={names} does not go by scores, but {where}; set loss.type to {groups}, or give "
            "pairs"
        )
    if rows.kind == COMPLETIONS and objective.paired:
        paired = ", ".join(spec.name for spec in objective.specs if spec.paired)
        single = " or ".join(spec.name for spec in LOSSES.values() if spec.rows == "completions")
        raise UserError(
            f"loss.type={paired} compares the two answers of a pair, but {where}; set loss.type to "
            f"{single}, or give pairs"
        )
    if rows.kind == GROUPS and config.reference_provider == "columns":
        raise UserError(
            f"reference.provider=columns takes sums of pairs or completions, but {where}; set "
            "reference.provider to cached, frozen or adapter_off"
        )
    if "kl" in objective.statistics and len(rows) < 2:
        raise UserError(
            f"loss.type={names} estimates kl from completions of other rows, but data.{name} has one row, "
            f"{rows.where(0)}; give it two or more"
        )


def check_renamed(config: RunConfig, name: str, rows: Rows) -> None:
    """Raises UserError if data.columns renames what rows of this kind do not have."""
    kind = rows.kind
    known = ("prompt", *kind.answers, *sorted(kind.judges), *kind.numbers)
    for ours, theirs in config.data.columns.items():
        if ours not in (*known, *CHAT_COLUMNS):
            raise UserError(
                f"data.columns.{ours}={theirs!r} is not used: data.{name} holds {kind.name}, the first "
                f"{rows.where(0)}, whose columns are {', '.join(known)}; remove it, or set data.format"
            )


def check_budget(budget: int, layout: str, alone_I: np.ndarray, pairs: Rows) -> None:
    """Raises UserError unless every row fits into a micro-batch of its own."""
    longest = int(alone_I.argmax())
    if alone_I[longest] > budget:
        raise UserError(
            f"train.tokens_per_batch={budget} does not hold {pairs.where(longest)}, which takes "
            f"{alone_I[longest]} tokens in the layout {layout}; set it to {alone_I[longest]} or more, or "
            "lower data.max_length"
        )


def tell_size(sampler: BatchSampler) -> None:
    """One line about what a step has, where the tokens decide it."""
    if isinstance(sampler, TokenSampler):
        say(
            f"train.tokens_per_batch={sampler.budget}: micro-batches are {sampler.fill:.1%} full; "
            f"{sampler.accumulation} of them on each rank are a step of {sampler.pairs_per_step:.1f} pairs "
            f"on average (train.global_pairs={sampler.global_pairs})"
        )
