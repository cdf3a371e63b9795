"""Computing the stored reference of a split. All ranks score, rank 0 writes, and it may be interrupted.

A run scores what its steps will draw (`drawn.py`), `dpo-fast reference` all of the data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.dataset import tokenizer_hash
from dpo_fast.errors import Interrupted
from dpo_fast.models import load_tokenizer
from dpo_fast.models.adapter_path import GIVEN
from dpo_fast.references import CachedReference, ReferenceModel
from dpo_fast.references.artefact import Growing
from dpo_fast.references.blocks import blocks
from dpo_fast.references.cached import open_reference
from dpo_fast.references.compute import length_batches, part_table, score_part
from dpo_fast.references.providers import Scorer
from dpo_fast.references.store import Place, Request, Stored, default_place, look, named_place
from dpo_fast.training import data_ranks, distributed, signals
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import progress_bar, say
from dpo_fast.training.drawn import Drawn, drawn
from dpo_fast.training.engine import release, zero_config
from dpo_fast.training.splits import Split
from dpo_fast.training.weights import identity_of

Before = Callable[[Scorer], None]  # called with a model before it scores examples


def nothing(scorer: Scorer) -> None:
    pass


@dataclass(frozen=True)
class StoredReference:
    """A split's stored reference.

    folders: together they hold every example of the split that is asked for.
    asked: those examples.
    computed: how many were computed now.
    seconds: how long that took; None if they were there already.
    """

    split: Split
    folders: list[Path]
    asked: Drawn
    computed: int = 0
    seconds: float | None = None


def store_references(
    config: RunConfig,
    model: ReferenceModel,
    make_scorer: Callable,
    device,
    splits: list[Split],
    before: Before = nothing,
) -> list[StoredReference]:
    """Find a model's stored reference of each split, or compute it. Collective.

    make_scorer: loads the model. It is called once, and only if something is to be computed.
    before: called with the model once, before the first split is computed.

    Raises:
        UserError: what is stored is damaged or does not fit, or it cannot be written.
        Interrupted: after a signal, while computing.
    """
    path = model.path or config.model.path
    identity, named_by = identity_of(config, path), f"{model.named_by}={path}"
    scorer, results = None, []
    for split in splits:
        asked = drawn(split)
        request = Request(
            split.name,
            split.examples,
            identity,
            weights_dtype(config),
            model.per_token,
            named_by,
            asked.wanted_P,
        )
        find = partial(_find, model.cache_dir, config.train.output_dir, request)
        _, found = distributed.from_main(find)
        result = StoredReference(split, found.folders, asked)
        if found.lacks:
            if scorer is None:
                scorer = make_scorer()
                before(scorer)
            start = time.monotonic()
            count = compute_reference(scorer, config, split, request, path, find, asked, device)
            seconds = time.monotonic() - start if count else None
            _, found = distributed.from_main(find)
            result = StoredReference(split, found.folders, asked, count, seconds)
        results.append(result)
    if model.path is not None:  # else it is the policy
        release(scorer)
    return results


def _find(cache_dir: str | None, output_dir: str, request: Request) -> tuple[Place, Stored]:
    """Where the reference of a request belongs, and what is there of it."""
    if cache_dir is None:
        place = default_place(output_dir, request)
    else:
        place = named_place(cache_dir, request)
    return place, look(place, request)


def cached_references(
    config: RunConfig,
    model: ReferenceModel,
    make_scorer: Callable,
    device,
    splits: list[Split],
    before: Before = nothing,
) -> dict[str, CachedReference]:
    """The stored log-probs of a model, by the split's name. What is not there is computed first."""
    stored = store_references(config, model, make_scorer, device, splits, before)
    return {
        each.split.name: open_reference(
            each.folders,
            each.split.examples.digests,
            model.per_token,
            device,
            each.split.examples.kind,
            each.asked.wanted_P,
        )
        for each in stored
    }


def compute_reference(
    scorer,
    config: RunConfig,
    split: Split,
    request: Request,
    path: str,
    find: Callable[[], tuple[Place, Stored]],
    asked: Drawn,
    device,
) -> int:
    """Score block by block what is asked for of a split and not there. Finished parts are kept. Collective.

    path: of the model that the scorer is of, for the manifest.
    find: where the reference belongs, and what is there.

    Returns:
        How many examples were scored; 0 if another run has done it, and this one has waited for that.

    Raises:
        UserError: the folder was begun for something else or cannot be written; a log-probability is
            not finite.
        Interrupted: after a signal.
    """
    place, _ = distributed.from_main(find)
    growing = Growing(place.own, request.manifest, _facts(config, split, path))
    size = (config.train.micro_batch_size, config.train.tokens_per_batch)
    was_training = getattr(scorer, "training", False)
    scorer.eval()
    try:
        begin = partial(growing.begin, _how(split), _Waiting(place.own))
        distributed.main_waits("reference", begin)
        _, found = distributed.from_main(find)  # another run may have added to it
        parts = _parts(asked, found.absent_P)
        count, all_of = sum(map(len, parts)), len(split.examples)
        if not count:
            return 0
        there = int((~found.absent_P).sum())
        say(
            f"computing the reference log-probs of {count} "
            f"{f'of {all_of} ' if count < all_of else ''}{split.examples.kind.name} ({split.name}), once"
            + (f"; {there} are there already" if there else "")
        )
        order = (split.costs, *size, split.same_prompt)
        batches = [(rows, length_batches(rows.tolist(), *order)) for rows in parts]
        _score_parts(scorer, split, growing, batches, request.per_token, device)
        return count
    finally:
        growing.close()
        scorer.train(was_training)


def _parts(asked: Drawn, absent_P: np.ndarray) -> list[np.ndarray]:
    """The examples to score, block by block: of a block that lacks something wanted all that it lacks."""
    lacking_P = absent_P if asked.wanted_P is None else absent_P & asked.wanted_P
    touched = [rows for rows in blocks(asked.order_P) if lacking_P[rows].any()]
    return [rows[absent_P[rows]] for rows in touched]


class _Waiting:
    """Called while another run computes a reference: says so, at first and every minute, and sleeps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.turns = folder, 0

    def __call__(self) -> None:
        if self.turns % 60 == 0:
            say(f"another run computes the reference {self.folder}: waiting for it")
        self.turns += 1
        time.sleep(1.0)


def _score_parts(
    scorer,
    split: Split,
    growing: Growing,
    parts: list[tuple[np.ndarray, list[list[int]]]],
    per_token: bool,
    device,
) -> None:
    """Score and write parts. parts: the examples of each, and its batches of all ranks."""
    rounds = sum(-(-len(batches) // data_ranks.data_ranks()) for _, batches in parts)
    description = f"reference log-probs ({split.name})"
    kept = (
        f"the finished parts of the reference {growing.folder} are kept: the same command goes on "
        "after them"
    )
    with signals.stop_signals(kept) as asked, progress_bar(description, rounds) as advance:
        try:
            for rows, all_ranks in parts:
                lengths = split.lengths.take(rows)
                own = signals.until(asked, _advancing(_rank_batches(split, all_ranks), advance))
                share_T = score_part(scorer, own, rows, lengths, device)
                values_T = data_ranks.sum_once(share_T).cpu()
                part = (values_T, lengths, split.examples, rows, per_token)
                distributed.from_main(lambda part=part: growing.add(part_table(*part)))
            list(signals.until(asked, [None]))
        except signals.StopAsked:
            raise Interrupted(f"interrupted; {kept}") from None


def _advancing(batches: Iterator[ScoredBatch], advance: Callable) -> Iterator[ScoredBatch]:
    """Batches, and a move of the progress bar after each."""
    for batch in batches:
        yield batch
        advance()


def _rank_batches(split: Split, all_ranks: list[list[int]]) -> Iterator[ScoredBatch]:
    """This rank's batches of a part. Every rank has equally many; its last one may be empty."""
    world = data_ranks.data_ranks()
    for first in range(0, len(all_ranks), world):
        indices = dict(enumerate(all_ranks[first : first + world])).get(data_ranks.data_rank(), [])
        yield split.collate([split.examples[index] for index in indices], indices)


def _facts(config: RunConfig, split: Split, path: str) -> dict:
    """What a manifest records of the model as it was named. None of it has to match."""
    named = {"path": path}
    if (
        path == config.model.path
    ):  # which is a folder of the cache where an adapter was named beside it
        named = config.model.model_dump(include=set(GIVEN), exclude_none=True)
    return {
        "split": split.name,
        "model_path": named.pop("path"),
        **named,
        "tokenizer": tokenizer_hash(load_tokenizer(config.model)),
    }


def _how(split: Split) -> dict:
    """What a manifest records of how some of its parts were computed."""
    return {
        "layout": split.layout,
        "world_size": distributed.world_size(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def weights_dtype(config: RunConfig) -> str:
    """The dtype of the weights that score, and how they are rounded on their way and in products."""
    rounded = zero_config(config).get("zero_quantized_weights") and distributed.world_size() > 1
    products = f", products in fp8 ({config.model.fp8})" if config.model.fp8 else ""
    return config.model.precision + (", gathered in 8 bits" if rounded else "") + products
