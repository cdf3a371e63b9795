"""Computing the stored reference of a split: all ranks score, rank 0 writes, and it may be interrupted."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.cache import tokenizer_hash
from dpo_fast.data.packing import row_costs
from dpo_fast.errors import Interrupted, UserError
from dpo_fast.models import load_tokenizer
from dpo_fast.references.compute import length_batches, part_table, score_part
from dpo_fast.references.store import Request
from dpo_fast.references.writing import Unfinished
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.progress import progress_bar, say
from dpo_fast.training.split import Split

T = TypeVar("T")


class ReferenceInterrupted(Interrupted):
    """SIGINT or SIGTERM came while a reference was computed; the parts that are done are kept."""

    def __init__(self, folder: Path) -> None:
        Exception.__init__(
            self,
            f"interrupted; the finished parts of the reference {folder} are kept: the same command "
            "goes on after them",
        )
        self.folder = folder


def compute_reference(
    scorer, config: RunConfig, split: Split, request: Request, folder: Path, device
) -> None:
    """Score a split part by part and store it in `folder`. Collective. Parts that are there are kept.

    Raises:
        UserError: the folder was begun for something else, is in use or cannot be written; a
            log-probability is not finite.
        Interrupted: after SIGINT or SIGTERM.
    """
    unfinished = Unfinished(folder, request.manifest, split.examples)
    costs = row_costs(split.lengths, split.layout)
    size = (config.train.micro_batch_size, config.train.tokens_per_batch)
    was_training = getattr(scorer, "training", False)
    scorer.eval()
    try:
        missing, parts = from_main(unfinished.begin), unfinished.parts
        say(
            f"computing the reference log-probs of {len(split.examples)} {split.examples.kind.name} "
            f"({split.name}), once: {len(parts) - len(missing)} of {len(parts)} parts are there"
        )
        plans = {index: length_batches(parts[index], costs, *size) for index in missing}
        _score_parts(scorer, split, unfinished, plans, request.per_token, device)
        from_main(lambda: unfinished.finish(_information(config, split)))
    finally:
        unfinished.close()
        scorer.train(was_training)


def _score_parts(
    scorer,
    split: Split,
    unfinished: Unfinished,
    plans: dict[int, list[list[int]]],
    per_token: bool,
    device,
) -> None:
    """Score and write the parts of `plans`, each given by its batches of rows."""
    rounds = sum(-(-len(plan) // distributed.world_size()) for plan in plans.values())
    description = f"reference log-probs ({split.name})"
    with stop_signals() as asked, progress_bar(description, rounds) as advance:

        def until_asked(batches: Iterable[ScoredBatch]) -> Iterator[ScoredBatch]:
            for batch in batches:
                if asked():
                    raise ReferenceInterrupted(unfinished.final)
                yield batch
                advance()

        for index, plan in plans.items():
            rows = unfinished.parts[index]
            lengths = split.lengths.take(rows)
            batches = until_asked(_rank_batches(split, plan))
            values_T = score_part(scorer, batches, rows, lengths, device)
            part = (values_T, lengths, split.examples, rows, per_token)
            from_main(lambda index=index, part=part: unfinished.write(index, part_table(*part)))
        if asked():
            raise ReferenceInterrupted(unfinished.final)


def _rank_batches(split: Split, plan: list[list[int]]) -> Iterator[ScoredBatch]:
    """This rank's batches of a part: as many as every other rank has, the last perhaps empty."""
    world = distributed.world_size()
    for first in range(0, len(plan), world):
        rows = dict(enumerate(plan[first : first + world])).get(distributed.rank(), [])
        yield split.collate([split.examples[row] for row in rows], rows)


def _information(config: RunConfig, split: Split) -> dict:
    """What a manifest tells of how its values came about. None of it has to match."""
    return {
        "split": split.name,
        "model_path": config.reference.path or config.model.path,
        "tokenizer": tokenizer_hash(load_tokenizer(config.model)),
        "layout": split.layout,
        "world_size": distributed.world_size(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def from_main(work: Callable[[], T]) -> T:
    """What rank 0 finds or does, on every rank: seen from elsewhere, folders may look different.

    Its UserError is raised on every rank too, so that none waits for it.
    """
    if distributed.world_size() == 1:
        return work()
    outcome: list = [None, None]
    if distributed.is_main():
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
    torch.distributed.broadcast_object_list(outcome, src=0)
    result, message = outcome
    if message is not None:
        raise UserError(message)
    return result


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields asked(), collective: whether SIGINT or SIGTERM has come to any rank."""
    seen: list[int] = []

    def note(number, frame) -> None:
        if seen and number == signal.SIGINT:  # the second Ctrl-C means now
            raise KeyboardInterrupt
        seen.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: distributed.any_rank(bool(seen))[0]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
