"""`dpo-fast reference`: the stored reference of a configuration, without training."""

from __future__ import annotations

from dpo_fast.errors import UserError
from dpo_fast.models import load_tokenizer
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.engine import deepspeed_config
from dpo_fast.training.fit import choose
from dpo_fast.training.load_data import load_split
from dpo_fast.training.prepare import check
from dpo_fast.training.references import (
    StoredReference,
    load_second_model,
    old_config,
    store_references,
)


def precompute(config: RunConfig) -> list[StoredReference]:
    """Find or compute the reference of every split; no model is loaded where all is there. Collective.

    Raises:
        UserError: the run stores no reference, or something does not fit.
        Interrupted: after SIGINT or SIGTERM, while computing.
    """
    check_provider(config)
    config = without_training(config)
    check(config)
    distributed.init_distributed(config.parallel.timeout_minutes)
    config = choose(config).applied(config)
    tokenizer = load_tokenizer(config.model)
    names = ("train", "eval") if config.data.has_eval else ("train",)
    splits = [load_split(config, tokenizer, name, shuffle=False) for name in names]
    return [
        each
        for wanted in stored_configs(config)
        for each in store_references(
            wanted,
            lambda wanted=wanted: make_scorer(wanted, splits, _option(config, wanted)),
            distributed.device(),
            splits,
        )
    ]


def stored_configs(config: RunConfig) -> list[RunConfig]:
    """A configuration for each stored reference of a run: its own, and what wrote its completions."""
    old = old_config(config)
    own = [config] if config.reference_provider == "cached" else []
    return own + ([old] if old is not None and old != config else [])


def _option(config: RunConfig, wanted: RunConfig) -> str:
    """Which option of the run names the model of one of its stored references."""
    return "reference.path" if wanted == config else "reference.old_path"


def make_scorer(config: RunConfig, splits: list, option: str):
    """The reference model of a configuration, which `option` names, ready to score these splits."""
    head = {
        "implementation": config.train.implementation,
        "workspace_bytes": config.train.workspace_bytes,
    }
    ds_config = deepspeed_config(config, distributed.world_size(), accumulation=1)
    attention = choose(config, option).reference_attention.name
    return load_second_model(
        config, attention, head, ds_config, distributed.device(), splits, option
    )


def check_provider(config: RunConfig) -> None:
    """Raises UserError unless the run reads something from a folder."""
    provider = config.reference_provider
    if provider == "cached" or config.loss.objective.needs_old_tokens:
        return
    if "provider" in config.reference.model_fields_set:
        raise UserError(
            f"reference.provider={provider} stores nothing; `dpo-fast reference` needs "
            "reference.provider=cached"
        )
    if provider != "none":
        raise UserError(
            f"loss.type={', '.join(config.loss.names)} reads its reference from a model "
            f"(reference.provider={provider}), so there is nothing to store"
        )
    raise UserError(
        f"loss.type={', '.join(config.loss.names)} compares with no reference, so there is nothing to "
        "compute; set reference.provider=cached to store one all the same"
    )


def without_training(config: RunConfig) -> RunConfig:
    """The same without what concerns updates, so that any number of ranks may compute."""
    examples = (config.train.micro_batch_size or 1) * distributed.world_size()
    updates = {"global_batch_size": examples, "resume_from_checkpoint": False}
    train = config.train.model_copy(update=updates)
    log = config.log.model_copy(update={"report_to": []})
    return config.model_copy(update={"train": train, "log": log})
