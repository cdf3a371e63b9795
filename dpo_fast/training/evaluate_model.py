"""`dpo-fast evaluate`: the metrics of an evaluation in a run, of any model on any data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel, load_tokenizer
from dpo_fast.models.separation import check_separation
from dpo_fast.modules.metrics import METRIC_EXTRAS
from dpo_fast.training import data_ranks, distributed, signals
from dpo_fast.training.balance import Routing
from dpo_fast.training.checkpoint_run import check_start
from dpo_fast.training.checkpoint_weights import load_trained, read_on_main, trained_names
from dpo_fast.training.checkpoints import check_whole, read_state, still_there
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say, track
from dpo_fast.training.engine import (
    build_reference_engine,
    deepspeed_config,
    engines_released,
    shard_while_loading,
)
from dpo_fast.training.evaluate_options import Evaluation
from dpo_fast.training.fit import check_run
from dpo_fast.training.images import check_images, with_images
from dpo_fast.training.load_data import load_split
from dpo_fast.training.loss_pass import LossPass, Statistics
from dpo_fast.training.merge import merged_first
from dpo_fast.training.prepare import load_policy
from dpo_fast.training.references import (
    build_old,
    build_references,
    load_second_model,
    without_training,
)
from dpo_fast.training.splits import Split
from dpo_fast.training.step import evaluate
from dpo_fast.training.tensor_files import read_tree


class Scorer:
    """A model that is not trained, with what an evaluation asks of an engine."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device

    def __call__(self, *arguments, **options) -> dict[str, torch.Tensor]:
        return self.module(*arguments, **options)

    @property
    def training(self) -> bool:
        return self.module.training

    def eval(self) -> None:
        self.module.eval()

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)


def evaluate_model(asked: Evaluation) -> dict[str, Any]:
    """The metrics of a model, and what they are of. Collective.

    Raises:
        UserError: model, data and options do not fit.
        Interrupted: a signal came.
    """
    config, checkpoint = without_training(asked.config), asked.checkpoint
    choices = check_run(config)
    keeps = "an evaluation keeps nothing but the references that it stored"
    with signals.stop_at_once(keeps), still_there(checkpoint), engines_released():
        data_ranks.join(config.parallel)
        step = None if checkpoint is None else _checked(config, checkpoint)
        config = merged_first(choices.applied(config))
        tokenizer, device = load_tokenizer(config.model), distributed.device()
        split = load_split(config, tokenizer, "eval", shuffle=False)
        config = with_images(config, [split])
        say(f"evaluating on {len(split.examples):,} {split.examples.kind.name}")
        ds_config = deepspeed_config(config, distributed.world_size(), accumulation=1)
        torch.manual_seed(config.train.seed)
        with shard_while_loading(config, ds_config):
            # The reference of an adapter by itself is its base; of a run it is what the run began with.
            model = load_policy(config, choices, tokenizer, [split], checkpoint is not None)
            names = trained_names(model.model)
            state = {} if checkpoint is None else read_on_main(checkpoint, model.model)
            dtypes = distributed.from_main(
                lambda: {name: asked.dtype or state[name].dtype for name in names if state}
            )
            scorer = _scorer(config, model, dtypes, ds_config, device)
            dtype = config.model.torch_dtype
            check_separation(scorer, config.train.layout, len(tokenizer), device, dtype)
            check_images(scorer, [split])
            load = partial(load_second_model, config, choices, ds_config, device, [split])
            references = build_references(config, scorer, model, [split], load)
            old = build_old(config, scorer, references, [split], load)
        extras = METRIC_EXTRAS if config.log.token_metrics else ()
        routing = Routing() if model.routers.count else None
        loss_pass = LossPass(
            config.loss.objective, extras, config.train.implementation, old["eval"], routing
        )
        statistics = Statistics(loss_pass.objective.statistics, device)
        if checkpoint is not None:  # after the reference pass, which is of the weights of before
            load_trained(model.model, names, state)
            _load_more(config, checkpoint, references["eval"], statistics)
        metrics = measure(scorer, split, loss_pass, references["eval"], statistics)
    return _facts(asked, config, step, split) | {"metrics": metrics}


def measure(
    scorer, split: Split, loss_pass: LossPass, provider, statistics: Statistics
) -> dict[str, float]:
    """Metrics of a whole split. Collective."""
    indices = list(range(len(split.examples)))
    mismatched = split.mismatched(indices)
    values = statistics.estimate(scorer, mismatched, loss_pass, provider)
    batches = track(split.all_batches(), "evaluating", split.sampler.steps_per_epoch)
    return evaluate(scorer, batches, loss_pass, provider, split.totals(indices), values)


def _checked(config: RunConfig, checkpoint: Path) -> int:
    """The step of a checkpoint that is whole, and whose model is still what it began with. Collective."""
    check_whole(checkpoint)
    state = read_state(checkpoint)
    distributed.from_main(lambda: check_start(checkpoint, config, state))
    return state["step"]


def _scorer(
    config: RunConfig,
    model: ScoringModel,
    dtypes: Mapping[str, torch.dtype],
    ds_config: dict,
    device: torch.device,
):
    """The model frozen. dtypes: what the run had, by the names of what it trained."""
    if config.parallel.zero_stage == 3:
        return build_reference_engine(config, model.to(device), ds_config)
    own = dict(model.model.named_parameters(remove_duplicate=False))
    for name, dtype in dtypes.items():
        own[name].data = own[name].data.to(dtype)
    return Scorer(build_reference_engine(config, model.to(device), ds_config), device)


def _load_more(config: RunConfig, checkpoint: Path, provider, statistics: Statistics) -> None:
    """What changed in the run beside the policy: a reference that follows it, and statistics."""
    follows, rank = config.reference_spec.follows, distributed.rank()
    if not follows and not statistics.names:
        return
    sharded = follows and config.parallel.zero_stage == 3
    writers = len(list(checkpoint.glob("rank-*.pt")))
    if sharded and writers != distributed.world_size():
        raise UserError(
            f"reference.provider={config.reference_provider} follows the policy, and its parts in "
            f"{checkpoint} are of {writers} ranks: evaluate it with --nproc {writers}"
        )
    own = read_tree(checkpoint / f"rank-{rank if sharded else 0}.pt")["own"]
    if follows:
        provider.load_state_dict(own["reference"])
    if statistics.names:
        statistics.load_state_dict(own["statistics"])


def _facts(asked: Evaluation, config: RunConfig, step: int | None, split: Split) -> dict:
    checkpoint = asked.checkpoint
    spec, path = config.reference_spec, asked.began or config.reference.path
    entries = config.data.model_dump(mode="json")
    held_out = {} if config.data.eval_rows == 0 else {"rows_held_out": config.data.eval_rows}
    return {
        "model": str(checkpoint or config.model.told),
        "step": step,
        "data": entries["eval"] or entries["train"],
        **held_out,
        "examples": len(split.examples),
        "kind": split.examples.kind.name,
        "loss": list(config.loss.names),
        "reference": {
            "provider": spec.name,
            "path": path or (config.model.told if spec.scores else None),
        },
    }
