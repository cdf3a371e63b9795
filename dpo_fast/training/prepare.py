"""From a configuration to everything a run needs: data, model, engine, reference."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel, load_model, load_tokenizer
from dpo_fast.models.layers import check_layers, checkpoint_layers
from dpo_fast.models.load import DTYPES, check_model_path, is_folder, load_skeleton
from dpo_fast.models.separation import check_separation
from dpo_fast.ops.dispatch import choose_implementation
from dpo_fast.references import EmaReference
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import find_checkpoint
from dpo_fast.training.config import RunConfig, check_batch_sizes
from dpo_fast.training.console import say
from dpo_fast.training.engine import build_engine, deepspeed_config, shard_while_loading
from dpo_fast.training.fit import check_positions, check_vocabulary, choose
from dpo_fast.training.load_data import load_split
from dpo_fast.training.loss_pass import EXTRAS, LossPass, Statistics
from dpo_fast.training.references import build_old, build_references
from dpo_fast.training.splits import Split


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
    old: dict[str, object]
    loss_pass: LossPass
    statistics: Statistics
    total_steps: int

    def loss_and_reference(self, split: str) -> tuple[LossPass, object]:
        """How the loss of a split's batches comes about, and its reference."""
        return replace(self.loss_pass, old=self.old[split]), self.references[split]

    @property
    def stateful(self) -> dict[str, object]:
        """What changes with the run beside the engine, by the name it has in checkpoints."""
        reference = self.references["train"]
        followed = {"reference": reference} if isinstance(reference, EmaReference) else {}
        return followed | ({"statistics": self.statistics} if self.statistics.names else {})


def check(config: RunConfig) -> None:
    """What can be told without a process group, a tokenizer or a weight. Raises UserError."""
    check_batch_sizes(config, distributed.world_size())
    check_model_path(config.model.path)
    if config.model.tokenizer is not None:
        is_folder(config.model.tokenizer, "model.tokenizer")
    if config.reference.path is not None:
        check_model_path(config.reference.path, "reference.path")
    if config.reference.old_path is not None:
        check_model_path(config.reference.old_path, "reference.old_path")
    device = distributed.device()
    choose(config)
    check_layers(config.model, load_skeleton(config.model), device)
    if config.reference.path is not None:
        second = config.reference_model
        check_layers(second, load_skeleton(second, "reference.path"), device)
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
    choices = choose(config)
    config = choices.applied(config)
    say(f"layout {choices.layout.name}: {choices.layout.reason}")
    say(f"attention {choices.attention.name}: {choices.attention.reason}")
    tokenizer = load_tokenizer(config.model)
    train = load_split(config, tokenizer, "train", shuffle=True)
    held_out = (
        load_split(config, tokenizer, "eval", shuffle=False) if config.data.has_eval else None
    )
    total_steps = config.train.max_steps or train.sampler.steps(config.train.num_train_epochs)
    ds_config = deepspeed_config(config, world, train.sampler.accumulation)
    torch.manual_seed(config.train.seed)
    keep_alive = shard_while_loading(config, ds_config)
    head = {
        "implementation": config.train.implementation,
        "workspace_bytes": config.train.workspace_bytes,
    }
    model = load_model(config.model, attention=choices.attention.name, **head)
    check_vocabulary(model, tokenizer)
    splits = [split for split in (train, held_out) if split is not None]
    check_positions(model, splits)
    if wants_checkpointing(config, model):
        checkpoint_layers(model.causal_lm, config.model.checkpoint_layers)
    engine = build_engine(config, model, ds_config, total_steps)
    check_separation(
        engine, config.train.layout, len(tokenizer), engine.device, DTYPES[config.model.dtype]
    )
    references = build_references(
        config, engine, model, splits, choices.reference_attention.name, head, ds_config
    )
    old = build_old(config, engine, references, splits, head, ds_config)
    del keep_alive
    loss_pass = LossPass(
        config.loss.objective,
        EXTRAS if config.log.token_metrics else (),
        config.train.implementation,
    )
    statistics = Statistics(loss_pass.objective.statistics, engine.device)
    return Run(
        config,
        tokenizer,
        train,
        held_out,
        engine,
        model,
        references,
        old,
        loss_pass,
        statistics,
        total_steps,
    )


def wants_checkpointing(config: RunConfig, model: ScoringModel) -> bool:
    if config.model.checkpoint_layers is not None:
        return True
    if config.model.gradient_checkpointing is not None:
        return config.model.gradient_checkpointing
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()) > 1e9
