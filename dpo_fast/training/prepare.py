"""From a configuration to everything a run needs: data, model, engine, reference."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.dataset import PairDataset, load_pairs
from dpo_fast.data.layouts import collate
from dpo_fast.data.sampler import Sampler
from dpo_fast.errors import UserError
from dpo_fast.losses import Totals
from dpo_fast.models import (
    ScoringModel,
    check_packing,
    choose_attention,
    load_model,
    load_tokenizer,
)
from dpo_fast.models.load import DTYPES, check_model_path, is_folder
from dpo_fast.ops.implementation import choose_implementation
from dpo_fast.references import (
    AdapterOffReference,
    CachedReference,
    FrozenReference,
    NoReference,
    compute_table,
)
from dpo_fast.references.cached import key_of, load_table, model_digest, save_table
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import find_checkpoint
from dpo_fast.training.config import RunConfig, check_batch_sizes
from dpo_fast.training.engine import build_engine, build_reference_engine, deepspeed_config
from dpo_fast.training.progress import say, track


@dataclass
class Split:
    """One set of pairs, and how its batches are made."""

    name: str
    pairs: PairDataset
    sampler: Sampler
    layout: str
    pad_id: int

    @functools.cached_property
    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens of every prompt, chosen and rejected answer."""
        return self.pairs.lengths

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        answers = np.maximum(self.lengths["chosen"], self.lengths["rejected"])
        return int((self.lengths["prompt"] + answers).max())

    def totals(self, rows: list[int]) -> Totals:
        """Counts of a global batch. Every rank knows them from the data: nothing is communicated."""
        return Totals(len(rows), int(self.lengths["chosen"][rows].sum()))

    def batches(self, step: int) -> Iterator[ScoredBatch]:
        """This rank's micro-batches of a step, tokens on the CPU."""
        for rows in self.sampler.micro_batches(step, distributed.rank()):
            pairs = [self.pairs[row] for row in rows]
            yield collate(pairs, self.layout, pad_id=self.pad_id, indices=rows)

    def all_batches(self) -> Iterator[ScoredBatch]:
        """This rank's share of one pass, the same number of batches on every rank."""
        for step in range(self.sampler.steps_per_epoch):
            yield from self.batches(step)


def load_split(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, name: str, shuffle: bool
) -> Split:
    """Read, check and tokenise a split (`train` or `eval`), or find it done."""
    pairs = distributed.main_first(
        f"data/{name}", lambda: load_pairs(config.data, tokenizer, split=name)
    )
    refuse_columns(pairs)
    world = distributed.world_size()
    size = config.train.global_pairs if shuffle else config.train.micro_pairs * world
    sampler = Sampler(len(pairs), size, config.train.micro_pairs, world, config.train.seed, shuffle)
    return Split(name, pairs, sampler, config.train.layout, tokenizer.pad_token_id)


def refuse_columns(pairs: PairDataset) -> None:
    """Per-pair columns would change the loss; a loss that does not use them must not ignore them."""
    if pairs.extras:
        raise UserError(
            f"the data has the columns {', '.join(pairs.extras)}, which no loss here uses yet; rename "
            "or remove them in the data, or map them away with data.columns"
        )


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
