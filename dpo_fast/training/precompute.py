"""Computing the stored reference of a split. All ranks score, rank 0 writes, and it may be interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.dataset import tokenizer_hash
from dpo_fast.errors import Interrupted
from dpo_fast.models import load_tokenizer
from dpo_fast.references import CachedReference, ReferenceModel
from dpo_fast.references.artefact import Unfinished
from dpo_fast.references.cached import open_reference
from dpo_fast.references.compute import length_batches, part_table, score_part
from dpo_fast.references.providers import Scorer
from dpo_fast.references.store import Place, Request, default_place, find_stored, named_place
from dpo_fast.training import data_ranks, distributed, signals
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import progress_bar, say
from dpo_fast.training.engine import release, zero_config
from dpo_fast.training.splits import Split
from dpo_fast.training.weights import identity_of

Before = Callable[[Scorer], None]  # called with a model before it scores all examples


def nothing(scorer: Scorer) -> None:
    pass


@dataclass(frozen=True)
class StoredReference:
    """A split's stored reference.

    folders: together they hold every example of the split.
    seconds: how long computing took; None if it was there already.
    """

    split: Split
    folders: list[Path]
    seconds: float | None


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
        request = Request(
            split.name, split.examples, identity, weights_dtype(config), model.per_token, named_by
        )
        look = partial(
            distributed.from_main, partial(_look, model.cache_dir, config.train.output_dir, request)
        )
        place, folders = look()
        seconds = None
        while folders is None:
            if scorer is None:
                scorer = make_scorer()
                before(scorer)
            start = time.monotonic()
            if compute_reference(scorer, config, split, request, path, place.own, device):
                seconds, folders = time.monotonic() - start, [place.own]
            else:
                place, folders = look()
        results.append(StoredReference(split, folders, seconds))
    if model.path is not None:  # else it is the policy
        release(scorer)
    return results


def _look(
    cache_dir: str | None, output_dir: str, request: Request
) -> tuple[Place, list[Path] | None]:
    """Where the reference of a request belongs, and the folders that hold it, if any do."""
    if cache_dir is None:
        place = default_place(output_dir, request)
    else:
        place = named_place(cache_dir, request)
    return place, find_stored(place, request)


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
        )
        for each in stored
    }


def compute_reference(
    scorer, config: RunConfig, split: Split, request: Request, path: str, folder: Path, device
) -> bool:
    """Score a split part by part and store it in `folder`. Finished parts are kept. Collective.

    path: of the model that the scorer is of, for the manifest.

    Returns:
        False if another run has computed it: this one has waited for that.

    Raises:
        UserError: the folder was begun for something else or cannot be written; a log-probability is
            not finite.
        Interrupted: after a signal.
    """
    unfinished = Unfinished(folder, request.manifest, split.examples)
    size = (config.train.micro_batch_size, config.train.tokens_per_batch)
    was_training = getattr(scorer, "training", False)
    scorer.eval()
    try:
        wait = _Waiting(unfinished.final)
        missing = distributed.main_waits("reference", lambda: unfinished.begin(wait))
        if missing is None:
            return False
        parts = unfinished.parts
        found = len(parts) - len(missing)
        say(
            f"computing the reference log-probs of {len(split.examples)} {split.examples.kind.name} "
            f"({split.name}), once"
            + (f"; {found} of {len(parts)} parts are there already" if found else "")
        )
        order = (split.costs, *size, split.same_prompt)
        batches = {part: length_batches(parts[part], *order) for part in missing}
        _score_parts(scorer, split, unfinished, batches, request.per_token, device)
        distributed.from_main(lambda: unfinished.finish(_information(config, split, path)))
        return True
    finally:
        unfinished.close()
        scorer.train(was_training)


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
    unfinished: Unfinished,
    batches: dict[int, list[list[int]]],
    per_token: bool,
    device,
) -> None:
    """Score and write parts. batches: of all ranks, by the part's index; each lists its examples."""
    rounds = sum(-(-len(each) // data_ranks.data_ranks()) for each in batches.values())
    description = f"reference log-probs ({split.name})"
    kept = (
        f"the finished parts of the reference {unfinished.final} are kept: the same command goes on "
        "after them"
    )
    with signals.stop_signals(kept) as asked, progress_bar(description, rounds) as advance:
        try:
            for index, all_ranks in batches.items():
                rows = unfinished.parts[index]
                lengths = split.lengths.take(rows)
                own = signals.until(asked, _advancing(_rank_batches(split, all_ranks), advance))
                share_T = score_part(scorer, own, rows, lengths, device)
                values_T = data_ranks.sum_once(share_T).cpu()
                part = (values_T, lengths, split.examples, rows, per_token)
                distributed.from_main(
                    lambda index=index, part=part: unfinished.write(index, part_table(*part))
                )
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


def _information(config: RunConfig, split: Split, path: str) -> dict:
    """What a manifest records of how its values were computed. None of it has to match."""
    return {
        "split": split.name,
        "model_path": path,
        "tokenizer": tokenizer_hash(load_tokenizer(config.model)),
        "layout": split.layout,
        "world_size": distributed.world_size(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def weights_dtype(config: RunConfig) -> str:
    """The dtype of the weights that score, and how they are rounded on their way and in products."""
    rounded = zero_config(config).get("zero_quantized_weights") and distributed.world_size() > 1
    products = f", products in fp8 ({config.model.fp8})" if config.model.fp8 else ""
    return config.model.precision + (", gathered in 8 bits" if rounded else "") + products
