"""The reference of a run: which provider, and the stored table, found or computed."""

from __future__ import annotations

from pathlib import Path

import torch

from dpo_fast.data.sampler import Sampler
from dpo_fast.models import load_model
from dpo_fast.references import (
    AdapterOffReference,
    CachedReference,
    FrozenReference,
    NoReference,
    compute_table,
)
from dpo_fast.references.cached import key_of, load_table, model_digest, save_table
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.engine import build_reference_engine
from dpo_fast.training.progress import say, track
from dpo_fast.training.split import Split


def build_references(config, engine, model, splits, attention, head, ds_config) -> dict:
    """A reference for each split, under its name."""
    provider = config.reference_provider
    if provider == "none":
        return {split.name: NoReference() for split in splits}
    if provider == "adapter_off":
        return {s.name: AdapterOffReference(engine, model.adapter_off) for s in splits}
    path = config.reference.path

    def second_model():
        section = config.model.model_copy(update={"path": path or config.model.path, "lora": None})
        option = "reference.path" if path else "model.path"
        loaded = load_model(section, attention=attention, option=option, **head)
        return build_reference_engine(config, loaded.to(engine.device), ds_config)

    if provider == "frozen":
        frozen = FrozenReference(second_model())
        return {split.name: frozen for split in splits}
    scorer = second_model if path else lambda: engine
    return cached_references(config, scorer, engine.device, splits)


def cached_references(config: RunConfig, make_scorer, device, splits: list[Split]) -> dict:
    """Load what is stored and fits; compute and store the rest."""
    references, scorer = {}, None
    for split in splits:
        manifest = {
            "format": 1,
            "model": model_digest(config.reference.path or config.model.path),
            "data": split.pairs.fingerprint,
            "rows": len(split.pairs),
            "dtype": config.model.dtype,
        }
        root = config.reference.cache_dir
        default = Path(config.train.output_dir) / "reference" / f"{split.name}-{key_of(manifest)}"
        folder = Path(root) / split.name if root else default
        table = load_table(folder, manifest)
        # All ranks read before any computes: one that saw the folder appear would not take part.
        distributed.barrier()
        if table is None:
            scorer = scorer or make_scorer()
            table = compute_reference(scorer, split, device)
            if distributed.is_main():
                folder.parent.mkdir(parents=True, exist_ok=True)
                save_table(folder, table, manifest)
            distributed.barrier()
        references[split.name] = CachedReference(table.to(device))
    return references


def compute_reference(scorer, split: Split, device) -> torch.Tensor:
    """Reference log-probabilities of a whole split, [rows, 2] fp32; every rank scores its share."""
    world = distributed.world_size()
    say(f"computing the reference log-probs of {len(split.pairs)} pairs ({split.name}), once")
    micro = split.sampler.micro_pairs
    ordered = Sampler(len(split.pairs), micro * world, micro, world, shuffle=False)
    walk = Split(split.name, split.pairs, ordered, split.layout, split.pad_id)
    was_training = getattr(scorer, "training", False)
    scorer.eval()
    batches = track(
        walk.all_batches(), f"reference log-probs ({split.name})", ordered.steps_per_epoch
    )
    table = compute_table(scorer, (batch.to(device) for batch in batches), len(split.pairs))
    scorer.train(was_training)
    return table
