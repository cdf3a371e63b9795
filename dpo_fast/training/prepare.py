"""From a configuration to everything a run needs: data, model, engine, reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel, load_model, load_tokenizer
from dpo_fast.models.layers import checkpoint_layers
from dpo_fast.models.merge import check_merges
from dpo_fast.models.separation import check_separation
from dpo_fast.modules.metrics import METRIC_EXTRAS
from dpo_fast.training import data_ranks, distributed
from dpo_fast.training.balance import Routing
from dpo_fast.training.best import Best
from dpo_fast.training.code_sources import sources_of
from dpo_fast.training.config import RunConfig
from dpo_fast.training.engine import build_engine, deepspeed_config, shard_while_loading
from dpo_fast.training.finite import Guard, check_loaded
from dpo_fast.training.first_batches import check_before_pass
from dpo_fast.training.fit import Choices, check_positions, check_vocabulary, choose
from dpo_fast.training.images import check_images, share_tower, with_images
from dpo_fast.training.load_data import load_split
from dpo_fast.training.loss_pass import LossPass, Statistics
from dpo_fast.training.merge import merged_first
from dpo_fast.training.references import build_old, build_references, load_second_model
from dpo_fast.training.saver import Saver
from dpo_fast.training.schedule import check_schedule
from dpo_fast.training.splits import Split
from dpo_fast.training.summary import skeletons_beside, tell_data, tell_memory, tell_model
from dpo_fast.training.watch import check_kind_of_findings
from dpo_fast.training.weights import identities


@dataclass
class Plan:
    """What a run is, known before its model is loaded.

    weights: the identity of each model, by the option that names it.
    """

    config: RunConfig
    train: Split
    total_steps: int
    weights: dict[str, str]


@dataclass
class Run(Plan):
    """What `train` works with.

    references: the provider of each split, by the split's name.
    old: for each split log-probs under the model that wrote its completions; None if no loss asks.
    saver: writes the checkpoints.
    best: which checkpoint is the best, and whether the run ends early.
    code: where losses, sampler and callbacks are from that are not ours (`code_sources.py`).
    """

    tokenizer: PreTrainedTokenizerBase
    eval: Split | None
    engine: object
    model: ScoringModel
    references: dict[str, object]
    old: dict[str, object]
    loss_pass: LossPass
    statistics: Statistics
    guard: Guard
    saver: Saver
    best: Best
    code: dict[str, dict[str, str]]

    def loss_and_reference(self, split: str) -> tuple[LossPass, object]:
        """The loss pass of a split's batches, and the provider of their reference."""
        return replace(self.loss_pass, old=self.old[split]), self.references[split]

    @property
    def stateful(self) -> dict[str, object]:
        """What changes with the run beside the engine, by the name it has in checkpoints."""
        follows = self.config.reference_spec.follows
        followed = {"reference": self.references["train"]} if follows else {}
        return followed | ({"statistics": self.statistics} if self.statistics.names else {})


def prepare(
    config: RunConfig,
    choices: Choices | None = None,
    check: Callable[[Plan], None] | None = None,
    first_step: int = 0,
) -> Run:
    """Build a run in order, what is cheap first. Collective: every rank calls it.

    choices: what `check_run` returned; they are made here if it has not been called.
    check: of what the run is, before its model is loaded and a reference is computed; raises UserError.
    first_step: that will be taken, counted from 0: the reference of those before it is not asked for.

    Raises:
        UserError: data, model or options that do not fit, before any weight is loaded if possible.
    """
    choices = choose(config) if choices is None else choices
    config = choices.applied(config)
    choices.tell()
    config = merged_first(config)
    tokenizer = load_tokenizer(config.model)
    splits = [load_split(config, tokenizer, "train", shuffle=True)]
    if config.data.has_eval:
        splits.append(load_split(config, tokenizer, "eval", shuffle=False))
    train, config = splits[0], with_images(config, splits)
    check_kind_of_findings(config, train.examples.kind)
    total_steps = config.train.max_steps or train.sampler.steps(config.train.num_train_epochs)
    check_total(config, total_steps)
    if isinstance(train, Split):
        train.steps = range(min(first_step, total_steps), total_steps)
    weights = identities(config)
    if check is not None:
        check(Plan(config, train, total_steps, weights))
    tell_data(config, splits, total_steps)
    ds_config = deepspeed_config(config, distributed.world_size(), train.sampler.accumulation)
    torch.manual_seed(config.train.seed)
    beside = skeletons_beside(config)
    with shard_while_loading(config, ds_config):
        model = load_policy(config, choices, tokenizer, splits)
        if config.train.merge_lora:
            check_merges(model.model, "train.merge_lora=true cannot be honoured")
        tell_model(model)
        tell_memory(config, model, beside)
        engine = build_engine(config, model, ds_config, total_steps)
        dtype = config.model.torch_dtype
        check_separation(engine, config.train.layout, len(tokenizer), engine.device, dtype)
        check_images(engine, splits)
        load = partial(load_second_model, config, choices, ds_config, engine.device, splits)
        extras = METRIC_EXTRAS if config.log.token_metrics else ()
        routing = Routing(config.model.router_aux_loss_coef or 0.0) if model.routers.count else None
        loss_pass = LossPass(
            config.loss.objective, extras, config.train.implementation, routing=routing
        )
        before = partial(check_before_pass, config, engine, train, loss_pass)
        references = build_references(config, engine, model, splits, load, before)
        old = build_old(config, engine, references, splits, load, before)
    return Run(
        config=config,
        tokenizer=tokenizer,
        train=train,
        eval=splits[1] if config.data.has_eval else None,
        engine=engine,
        model=model,
        references=references,
        old=old,
        loss_pass=loss_pass,
        statistics=Statistics(loss_pass.objective.statistics, engine.device),
        guard=Guard(engine, config.train.nonfinite_limit),
        total_steps=total_steps,
        weights=weights,
        saver=Saver.of(config),
        best=Best(config),
        code=sources_of(config),
    )


def check_total(config: RunConfig, total_steps: int) -> None:
    """Raises UserError if the schedule of the learning rate does not fit the length of the run."""
    try:
        check_schedule(config.train.schedule, config.learning_rate, total_steps)
    except ValueError as error:
        raise UserError(str(error)) from None


def load_policy(
    config: RunConfig,
    choices: Choices,
    tokenizer: PreTrainedTokenizerBase,
    splits: list[Split],
    keep_start: bool = True,
) -> ScoringModel:
    """The model that is trained. Raises UserError if it does not fit the tokenizer or the data.

    keep_start: an adapter that goes on is compared with what it was, if it is with the policy's own.
    """
    spec = config.reference_spec
    model = load_model(
        config.model,
        attention=choices.attention.name,
        keep_start=spec.needs_adapters and keep_start,
        follows=spec.needs_adapters and spec.follows,
        **config.train.head,
    )
    model.group = data_ranks.sequence_group()
    check_loaded(model.causal_lm, config.model.path, "model.path")
    check_vocabulary(model, tokenizer)
    check_positions(model, splits)
    share_tower(config, model)
    if wants_checkpointing(config, model):
        checkpoint_layers(
            model.causal_lm, config.model.checkpoint_layers, config.model.activation_offloading
        )
    return model


def wants_checkpointing(config: RunConfig, model: ScoringModel) -> bool:
    """Whether activations are recomputed in the backward pass."""
    if config.model.checkpoint_layers is not None or config.model.activation_offloading:
        return True
    if config.model.gradient_checkpointing is not None:
        return config.model.gradient_checkpointing
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()) > 1e9
