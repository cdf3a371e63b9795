"""The references of a run: its second models loaded, its providers built, what is stored computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dpo_fast.errors import UserError
from dpo_fast.models import load_model, load_tokenizer
from dpo_fast.models.separation import check_separation
from dpo_fast.references import ReferenceModel
from dpo_fast.references.table import Materials, alternatives
from dpo_fast.training import data_ranks, distributed, signals
from dpo_fast.training.config import RunConfig
from dpo_fast.training.engine import (
    build_reference_engine,
    deepspeed_config,
    engines_released,
    reference_config,
    shard_while_loading,
)
from dpo_fast.training.finite import check_loaded
from dpo_fast.training.first_batches import check_twice
from dpo_fast.training.fit import Choices, check_positions, check_run, check_vocabulary
from dpo_fast.training.images import check_images, share_tower, with_images
from dpo_fast.training.load_data import load_split
from dpo_fast.training.merge import merged_first
from dpo_fast.training.precompute import (
    Before,
    StoredReference,
    cached_references,
    nothing,
    store_references,
)
from dpo_fast.training.splits import Split

Load = Callable[[ReferenceModel], object]  # gives the model as a scorer


def load_second_model(
    config: RunConfig,
    choices: Choices,
    ds_config: dict,
    device,
    splits: list[Split],
    model: ReferenceModel,
):
    """A model that is not trained, as a frozen scorer. Raises UserError if it cannot score the splits."""
    scorer = load_reference_engine(config, choices, ds_config, device, model)
    scoring = getattr(scorer, "module", scorer)
    check_vocabulary(scoring, load_tokenizer(config.model), model.named_by)
    check_positions(scoring, splits)
    check_images(scorer, splits)
    return scorer


def load_reference_engine(
    config: RunConfig, choices: Choices, ds_config: dict, device, model: ReferenceModel
):
    """The model without adapters, sharded at stage 3."""
    ds_config = reference_config(config, ds_config)
    with shard_while_loading(config, ds_config):
        scoring = load_model(
            model.section(config.model),
            attention=choices.attention_of(model).name,
            option=model.named_by,
            **config.train.head,
        )
    scoring.group = data_ranks.sequence_group()
    check_loaded(scoring.causal_lm, model.path or config.model.path, model.named_by)
    scoring.requires_grad_(False)
    share_tower(config, scoring)
    scorer = build_reference_engine(config, scoring.to(device), ds_config)
    vocabulary = scoring.causal_lm.config.get_text_config().vocab_size
    dtype = config.model.torch_dtype
    check_separation(scorer, config.train.layout, vocabulary, device, dtype)
    return scorer


def build_references(
    config: RunConfig, engine, policy, splits: list[Split], load: Load, before: Before = nothing
) -> dict:
    """The reference of each split, by the split's name.

    before: called with a scorer before it computes log-probs of all examples (`check_before_pass`).
    """
    model = config.reference.model
    scorer = _scorer(model, engine, load)
    materials = Materials(
        section=config.reference,
        kinds={split.name: split.examples.kind for split in splits},
        engine=engine,
        policy=policy,
        second_model=lambda: load(model),
        stored=lambda: cached_references(config, model, scorer, engine.device, splits, before),
    )
    return config.reference_spec.build(materials)


def build_old(
    config: RunConfig,
    engine,
    references: dict,
    splits: list[Split],
    load: Load,
    before: Before = nothing,
) -> dict:
    """For each split its stored log-probs under the model that wrote its completions; None if no loss asks.

    The stored reference serves if it is of the same model and has every token.
    """
    model = config.old_model
    if model is None:
        return dict.fromkeys(references)
    if model == config.reference.model:
        return references
    scorer = _scorer(model, engine, load)
    if "train" in references:  # an evaluation alone has nothing to check it on
        before = partial(before, provider=references["train"])
    return cached_references(config, model, scorer, engine.device, splits, before)


def _scorer(model: ReferenceModel, engine, load: Load) -> Callable:
    """What gives the model that a store is computed with: the policy as it starts, or the one named."""
    return partial(load, model) if model.path else lambda: engine


def store_beforehand(config: RunConfig) -> list[StoredReference]:
    """`dpo-fast reference`: find or compute all that a run stores, without training. Collective.

    All rows of the data are scored, in the order of training. No model is loaded where all of it is there.

    Raises:
        UserError: the run stores no reference, or something does not fit.
        Interrupted: after a signal; the parts that are done are kept.
    """
    check_stores(config)
    config = without_training(config)
    choices = check_run(config)
    kept = "what is done is kept: the same command goes on after it"
    with signals.stop_at_once(kept), engines_released():
        return _store_beforehand(config, choices)


def _store_beforehand(config: RunConfig, choices: Choices) -> list[StoredReference]:
    data_ranks.join(config.parallel)
    choices.tell()
    config = merged_first(choices.applied(config))
    tokenizer, device = load_tokenizer(config.model), distributed.device()
    names = ("train", "eval") if config.data.has_eval else ("train",)
    splits = [load_split(config, tokenizer, name, name == "train", trains=False) for name in names]
    config = with_images(config, splits)
    ds_config = deepspeed_config(config, distributed.world_size(), accumulation=1)
    load = partial(load_second_model, config, choices, ds_config, device, splits)
    return [
        stored
        for model in config.stored_models
        for stored in store_references(
            config,
            model,
            partial(load, model),
            device,
            splits,
            partial(check_twice, config, splits[0], model.path or config.model.path),
        )
    ]


def check_stores(config: RunConfig) -> None:
    """Raises UserError unless the run stores something."""
    if config.stored_models:
        return
    provider, losses = config.reference_provider, ", ".join(config.loss.names)
    stores = alternatives(lambda spec: spec.stores)
    if "provider" in config.reference.model_fields_set:
        raise UserError(
            f"reference.provider={provider} stores nothing; `dpo-fast reference` needs "
            f"reference.provider={stores}"
        )
    if config.reference_spec.compares:
        raise UserError(
            f"loss.type={losses} reads its reference from a model (reference.provider={provider}), so "
            "there is nothing to store"
        )
    raise UserError(
        f"loss.type={losses} compares with no reference, so there is nothing to compute; set "
        f"reference.provider={stores} to store one all the same"
    )


def without_training(config: RunConfig) -> RunConfig:
    """The configuration without what concerns updates, so that any number of ranks may compute."""
    examples = (config.train.micro_batch_size or 1) * distributed.world_size()
    updates = {"global_batch_size": examples, "resume_from_checkpoint": False}
    train = config.train.model_copy(update=updates)
    log = config.log.model_copy(update={"report_to": []})
    return config.model_copy(update={"train": train, "log": log})
