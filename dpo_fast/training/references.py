"""The reference of a run: which provider, and the stored one, found or computed by all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
from dpo_fast.references.cached import open_reference
from dpo_fast.references.identity import model_digest
from dpo_fast.references.store import Place, Request, default_place, find_stored, named_place
from dpo_fast.training.choices import choose
from dpo_fast.training.config import RunConfig
from dpo_fast.training.engine import build_reference_engine, reference_config, shard_while_loading
from dpo_fast.training.fit import check_positions, check_vocabulary
from dpo_fast.training.reference_parts import compute_reference, from_main
from dpo_fast.training.split import Split


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
    if config.train.layout != "padded":
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
