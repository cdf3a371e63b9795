"""From a configuration to everything a run needs: data, model, engine, reference."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from dpo_fast.errors import UserError
from dpo_fast.models import (
    ScoringModel,
    check_packing,
    choose_attention,
    load_model,
    load_tokenizer,
)
from dpo_fast.models.load import DTYPES, check_model_path, is_folder
from dpo_fast.ops.implementation import choose_implementation
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import find_checkpoint
from dpo_fast.training.config import RunConfig, check_batch_sizes
from dpo_fast.training.engine import build_engine, deepspeed_config
from dpo_fast.training.references import build_references
from dpo_fast.training.split import Split, load_split


@dataclass
class Run:
    """What `train` works with."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    train: Split
    eval: Split | None
    engine: object
    model: ScoringModel
    references: dict[str, object]
    total_steps: int


def check(config: RunConfig) -> None:
    """What can be told without a process group, a tokenizer or a weight. Raises UserError."""
    check_batch_sizes(config, distributed.world_size())
    check_model_path(config.model.path)
    if config.model.tokenizer is not None:
        is_folder(config.model.tokenizer, "model.tokenizer")
    if config.reference.path is not None:
        check_model_path(config.reference.path, "reference.path")
    device = distributed.device()
    choose_attention(config.model.attention, config.train.layout, device)
    dtype = DTYPES[config.model.dtype]
    choose_implementation("linear_logp", device, dtype, config.train.implementation)
    for package in config.log.report_to:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"log.report_to={package}: the package is not installed; pip install {package}, or "
                "leave it out (metrics.jsonl is always written)"
            )
    find_checkpoint(config.train.resume_from_checkpoint, config.train.output_dir)


def prepare(config: RunConfig) -> Run:
    """Everything in order, the cheap first. Collective: every rank calls it.

    Raises:
        UserError: data, model or options that do not fit, before any weight is loaded if possible.
    """
    world = distributed.world_size()
    attention = choose_attention(config.model.attention, config.train.layout, distributed.device())
    tokenizer = load_tokenizer(config.model)
    train = load_split(config, tokenizer, "train", shuffle=True)
    held_out = (
        load_split(config, tokenizer, "eval", shuffle=False) if config.data.has_eval else None
    )
    total_steps = config.train.max_steps or max(
        round(config.train.num_train_epochs * train.sampler.steps_per_epoch), 1
    )
    ds_config = deepspeed_config(config, world, train.sampler.accumulation)
    torch.manual_seed(config.train.seed)
    keep_alive = shard_while_loading(config, ds_config)
    head = {
        "implementation": config.train.implementation,
        "workspace_bytes": config.train.workspace_bytes,
    }
    model = load_model(config.model, attention=attention, **head)
    check_vocabulary(model, tokenizer)
    if config.train.layout == "packed":
        check_packing(model.causal_lm)
    splits = [split for split in (train, held_out) if split is not None]
    check_positions(model, splits)
    if wants_checkpointing(config, model):
        model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    engine = build_engine(config, model, ds_config, total_steps)
    references = build_references(config, engine, model, splits, attention, head, ds_config)
    del keep_alive
    return Run(config, tokenizer, train, held_out, engine, model, references, total_steps)


def shard_while_loading(config: RunConfig, ds_config: dict):
    """At stage 3 transformers shards weights while it loads them, as long as this object lives."""
    if config.parallel.zero_stage < 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(ds_config)


def check_vocabulary(model: ScoringModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.causal_lm.config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model a vocabulary of {rows}: they do not "
            "belong together; check model.path and model.tokenizer"
        )


def check_positions(model: ScoringModel, splits: list[Split]) -> None:
    """Longer sequences than the model has positions for would index past a table, or mean nothing."""
    limit = getattr(model.causal_lm.config.get_text_config(), "max_position_embeddings", None)
    longest = max(split.longest for split in splits)
    if limit is not None and longest > limit:
        raise UserError(
            f"the longest sequence has {longest} tokens, but the model has {limit} positions "
            f"(max_position_embeddings); set data.max_length={limit} or less"
        )


def wants_checkpointing(config: RunConfig, model: ScoringModel) -> bool:
    if config.model.gradient_checkpointing is not None:
        return config.model.gradient_checkpointing
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()) > 1e9
