"""Computing the stored reference of a split: all ranks score, rank 0 writes, and it may be interrupted.

The reference of a run: which provider, and the stored one, found or computed by all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.dataset import tokenizer_hash
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.errors import Interrupted, UserError
from dpo_fast.models import load_model, load_tokenizer
from dpo_fast.models.load import DTYPES
from dpo_fast.models.separation import check_separation
from dpo_fast.references import (
    AdapterOffReference,
    CachedReference,
    ColumnReference,
    EmaReference,
    FrozenReference,
    NoReference,
)
from dpo_fast.references.artefact import Unfinished
from dpo_fast.references.cached import open_reference
from dpo_fast.references.compute import length_batches, part_table, score_part
from dpo_fast.references.store import (
    Place,
    Request,
    default_place,
    find_stored,
    model_digest,
    named_place,
)
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import progress_bar, say
from dpo_fast.training.engine import build_reference_engine, reference_config, shard_while_loading
from dpo_fast.training.fit import check_positions, check_vocabulary, choose
from dpo_fast.training.splits import Split

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
    costs = LAYOUTS[split.layout].costs(split.lengths)
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
    with distributed.stop_signals() as asked, progress_bar(description, rounds) as advance:

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
            share_T = score_part(scorer, batches, rows, lengths, device)
            values_T = distributed.all_sum(share_T).cpu()
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


def build_references(config, engine, model, splits, attention, head, ds_config) -> dict:
    """A reference for each split, under its name."""
    provider = config.reference_provider
    if provider == "none":
        return {split.name: NoReference() for split in splits}
    if provider == "columns":
        return {split.name: ColumnReference(split.examples.kind) for split in splits}
    if provider == "adapter_off":
        return {s.name: AdapterOffReference(engine, model.adapter_off) for s in splits}

    def second_model():
        return load_second_model(config, attention, head, ds_config, engine.device, splits)

    if provider == "ema":
        section = config.reference
        followed = EmaReference(second_model(), model, section.mixup_alpha, section.sync_steps)
        return {split.name: followed for split in splits}
    if provider == "frozen":
        frozen = FrozenReference(second_model())
        return {split.name: frozen for split in splits}
    scorer = second_model if config.reference.path else lambda: engine
    return cached_references(config, scorer, engine.device, splits)


def build_old(config, engine, references: dict, splits, head, ds_config) -> dict:
    """For each split what its completions were written with, under its name; None where no loss asks."""
    wanted = old_config(config)
    if wanted is None:
        return dict.fromkeys(references)
    if wanted == config:
        return references

    def second_model():
        option = "reference.old_path"
        attention = choose(wanted, option).reference_attention.name
        return load_second_model(wanted, attention, head, ds_config, engine.device, splits, option)

    scorer = second_model if wanted.reference.path else lambda: engine
    return cached_references(wanted, scorer, engine.device, splits)


def old_config(config: RunConfig) -> RunConfig | None:
    """The configuration of a run whose stored reference is what the completions were written with: this
    one where its own is that, else one beside it; None where no loss asks."""
    section = config.reference
    if not config.loss.objective.needs_old_tokens:
        return None
    if (
        config.reference_provider == "cached"
        and section.per_token
        and section.path == section.old_path
    ):
        return config
    changes = {"provider": "cached", "path": section.old_path, "cache_dir": None, "per_token": True}
    return config.model_copy(update={"reference": section.model_copy(update=changes)})


def load_second_model(
    config: RunConfig,
    attention: str,
    head: dict,
    ds_config: dict,
    device,
    splits: list[Split],
    option: str = "reference.path",
):
    """As `load_reference_engine`. Raises UserError if the model that `option` names cannot score them."""
    option = option if config.reference.path else "model.path"
    scorer = load_reference_engine(config, attention, head, ds_config, device, option)
    model = getattr(scorer, "module", scorer)
    check_vocabulary(model, load_tokenizer(config.model), option)
    check_positions(model, splits)
    return scorer


def load_reference_engine(
    config: RunConfig,
    attention: str,
    head: dict,
    ds_config: dict,
    device,
    option: str = "reference.path",
):
    """The reference model, without adapters: a frozen scorer, sharded at stage 3."""
    option = option if config.reference.path else "model.path"
    ds_config = reference_config(config, ds_config)
    keep_alive = shard_while_loading(config, ds_config)
    model = load_model(config.reference_model, attention=attention, option=option, **head)
    del keep_alive
    scorer = build_reference_engine(config, model.to(device), ds_config)
    vocabulary = model.causal_lm.config.get_text_config().vocab_size
    dtype = DTYPES[config.model.dtype]
    check_separation(scorer, config.train.layout, vocabulary, device, dtype)
    return scorer


def cached_references(
    config: RunConfig, make_scorer: Callable, device, splits: list[Split]
) -> dict[str, CachedReference]:
    """What is stored and fits, loaded; the rest is computed and stored first."""
    per_token = config.reference.per_token
    return {
        stored.split.name: open_reference(
            stored.folders,
            stored.split.examples.digests,
            per_token,
            device,
            stored.split.examples.kind,
        )
        for stored in store_references(config, make_scorer, device, splits)
    }


@dataclass(frozen=True)
class StoredReference:
    """Folders that hold a split's reference, and the seconds that computing took; None: it was there."""

    split: Split
    folders: list[Path]
    seconds: float | None


def store_references(
    config: RunConfig, make_scorer: Callable, device, splits: list[Split]
) -> list[StoredReference]:
    """Find the stored reference of each split, or compute it. Collective.

    make_scorer: gives the scorer; called once, and only if something is to be computed.

    Raises:
        UserError: what is stored is damaged or does not fit, or it cannot be written.
        Interrupted: after SIGINT or SIGTERM, while computing.
    """
    path = config.reference.path or config.model.path
    model = from_main(lambda: model_digest(path, config.model.trust_remote_code))
    scorer, results = None, []
    for split in splits:
        request = Request(
            split.name, split.examples, model, config.model.dtype, config.reference.per_token
        )
        place, folders = from_main(lambda request=request: _look(config, request))
        seconds = None
        if folders is None:
            scorer = scorer or make_scorer()
            start = time.monotonic()
            compute_reference(scorer, config, split, request, place.own, device)
            seconds, folders = time.monotonic() - start, [place.own]
        results.append(StoredReference(split, folders, seconds))
    return results


def _look(config: RunConfig, request: Request) -> tuple[Place, list[Path] | None]:
    """Where the reference of a request belongs, and the folders that hold it, if any do."""
    root = config.reference.cache_dir
    if root is None:
        place = default_place(config.train.output_dir, request)
    else:
        place = named_place(root, request)
    return place, find_stored(place, request)
