"""Preference training by transformers' `Trainer`, with its arguments, callbacks and launchers."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.kinds import PAIRS
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.errors import UserError
from dpo_fast.integrations.arguments import (
    check_arguments,
    in_words_of_trainers,
    objective_of,
    stop_ids,
)
from dpo_fast.integrations.collator import IDS, NUMBERS, PreferenceCollator
from dpo_fast.integrations.forward import add_forward
from dpo_fast.integrations.fsdp import prepare_fsdp, shard_frozen
from dpo_fast.integrations.rows import token_rows, token_sets, with_lengths
from dpo_fast.integrations.saving import WholeFolders
from dpo_fast.losses import Objective, Totals
from dpo_fast.models import recurrent
from dpo_fast.models.adapters import as_started, keep_frozen_copy, why_not
from dpo_fast.models.architecture import architecture_of, choose_attention, choose_layout
from dpo_fast.models.by_sequence import serve_by_sequence
from dpo_fast.models.decoder import kept_attention
from dpo_fast.models.handed import serve_handed
from dpo_fast.models.own_losses import check_no_balance, check_own_losses
from dpo_fast.models.scoring import fuse_head, scoring_forward, scoring_head
from dpo_fast.models.separation import check_separation
from dpo_fast.modules.metrics import METRIC_EXTRAS
from dpo_fast.references.providers import (
    AdapterOffReference,
    ColumnReference,
    FrozenReference,
    NoReference,
)
from dpo_fast.training.loss_pass import LossPass
from dpo_fast.training.metrics import MetricSums

__all__ = ["PreferenceCollator", "PreferenceTrainer"]


class PreferenceTrainer(WholeFolders, transformers.Trainer):
    """`transformers.Trainer` for pairs of completions.

    The loss is divided by the counts of the whole global batch, over micro-batches and ranks, so it
    does not depend on `gradient_accumulation_steps`. `Trainer` writes the checkpoints: plain Hugging
    Face folders, or the adapter alone for a `PeftModel`. `save_model` also writes what the checkpoint
    holds beside this model (`saving.py`). Dropout stays as the model has it.

    Args:
        model: causal LM, or a `PeftModel` round one. Its `lm_head` becomes a `FusedHead` over the
            same weights. Where the layout puts sequences into one row, its attention becomes one for
            such rows; calls of the model by others, such as `generate`, have its own.
        args: `TrainingArguments`.
        objective: the losses, as an `Objective`, a name such as "simpo" or several names; those that look
            at the whole global batch at once are refused.
        reference: a frozen model to compare with. Left out, the reference is the columns
            `reference_chosen_logps` and `reference_rejected_logps` of the data; or for a
            `PeftModel` without them a frozen copy of its adapter as it is now, under the name "ref",
            as in TRL. An adapter "ref" that it has already is taken for the reference.
        layout: a name of the table of layouts, or `auto`: the last of them that the model allows.
        train_dataset, eval_dataset: map-style. Rows of texts or messages, in any form of pairs of
            docs/FORMATS.md, are tokenised here as `dpo-fast train` does it; or rows of token ids, as
            `PreferenceCollator` takes them.
        processing_class: the tokenizer. Rows of token ids need none.
        data_options: how rows are tokenised, options of the section `data` by name: max_length,
            columns, ...
        kwargs: any other argument of `Trainer`.

    Raises:
        UserError: an argument that cannot be honoured.
    """

    loss_is_scaled_for_ga = True  # see `_get_num_items_in_batch`

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: transformers.TrainingArguments,
        *,
        objective: Objective | str | Sequence[str] = Objective(),  # noqa: B008 (frozen)
        reference: PreTrainedModel | None = None,
        layout: str = "auto",
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        data_options: Mapping | None = None,
        **kwargs,
    ) -> None:
        objective = objective_of(objective)
        check_arguments(model, args, objective, layout, kwargs)
        causal_lm = _causal_lm(model)
        tokenise = functools.partial(
            token_rows,
            tokenizer=processing_class,
            options=data_options,
            eos_ids=stop_ids(causal_lm),
        )
        train_dataset, eval_dataset = token_sets(train_dataset, eval_dataset, tokenise)
        check_own_losses(causal_lm.config)
        remedy = "set model.config.output_router_logits = False, or train with dpo-fast train"
        check_no_balance(causal_lm.config, remedy)
        with in_words_of_trainers():
            self.layout = choose_layout(layout, architecture_of(causal_lm)).name
        dtype = torch.bfloat16 if args.bf16 else causal_lm.dtype
        columns = _shared_columns(train_dataset, eval_dataset, objective)
        _check_reference(model, objective, reference, columns)
        live = objective.needs_reference and reference is None
        _prepare_adapters(model, live and PAIRS.reference_columns[0] not in columns)
        for each in (model, reference):
            if each is not None:
                _prepare(_causal_lm(each), self.layout, args.device, dtype)
        self._unproven = dtype
        vocabulary = causal_lm.get_input_embeddings().num_embeddings
        pad_id = getattr(processing_class, "pad_token_id", None) or 0
        super().__init__(
            model=model,
            args=args,
            data_collator=PreferenceCollator(self.layout, pad_id, vocabulary),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if args.n_gpu > 1:
            raise UserError(
                f"{args.n_gpu} GPUs in this process: start one process per GPU with torchrun or "
                "accelerate, with DDP, FSDP2 or DeepSpeed ZeRO"
            )
        prepare_fsdp(self)
        self.loss_pass = LossPass(objective, METRIC_EXTRAS)
        self.reference = self._make_reference(reference, columns)
        self._sums = {mode: MetricSums(args.device) for mode in ("train", "eval")}

    def _make_reference(self, model: PreTrainedModel | None, columns: list[str]):
        if model is not None:
            model.requires_grad_(False).eval()
            if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
                placed = _gathered(model)
            elif self.is_fsdp_enabled:
                placed = shard_frozen(self.accelerator, model)
            else:
                placed = self.accelerator.prepare_model(model, evaluation_mode=True)
            return FrozenReference(functools.partial(placed, scored=True))
        if PAIRS.reference_columns[0] in columns:
            return ColumnReference()
        if self.loss_pass.objective.needs_reference:
            scorer = functools.partial(self.model, scored=True)
            return AdapterOffReference(scorer, functools.partial(as_started, self.model))
        return NoReference()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's share of the global loss.

        num_items_in_batch: `Totals` of the global batch; in evaluation None, for this batch alone.
        """
        batch: ScoredBatch = inputs["batch"].to(self.args.device)
        if self._unproven:
            self._prove_separation(model)
        reference = self.loss_pass.reference(self.reference, batch)
        token_outputs = self.loss_pass.token_outputs(functools.partial(model, scored=True), batch)
        totals = num_items_in_batch or _totals(batch.num_examples, batch.chosen_tokens)
        result = self.loss_pass.loss(token_outputs, reference, batch, totals)
        self._sums["train" if model.training else "eval"].add(result, token_outputs, batch)
        # DDP and DeepSpeed average gradients over ranks, and the loss is divided by global counts.
        ranks = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = result.loss * ranks
        return (loss, result) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict], device) -> Totals:
        """Counts of a global batch, over its micro-batches and over ranks."""
        batches = [sample["batch"] for sample in batch_samples]
        counts = [sum(b.num_examples for b in batches), sum(b.chosen_tokens for b in batches)]
        counts = self.accelerator.reduce(torch.tensor(counts, device=device), "sum")
        return _totals(*counts.tolist())

    def _prove_separation(self, model) -> None:
        """Runs before the first batch: a sharded model has its weights in the engine alone."""
        training = model.training
        model.eval()
        vocabulary = _causal_lm(self.model).config.get_text_config().vocab_size
        scorer = functools.partial(model, scored=True)
        with in_words_of_trainers():
            check_separation(scorer, self.layout, vocabulary, self.args.device, self._unproven)
        model.train(training)
        self._unproven = None

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone: logits are never made."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of `MetricSums`, means since the last call."""
        prefix = next((key[: -len("loss")] for key in logs if key.endswith("_loss")), "")
        sums = self._sums["train" if prefix in ("", "train_") else "eval"]
        if sums.values:
            metrics = {name: value for name, value in sums.read().items() if name != "loss"}
            for name in ("num_tokens", "examples"):  # ranks that share a model have the same ones
                metrics[name] //= self.get_tp_size()
            logs |= {f"{prefix}{name}": value for name, value in metrics.items()}
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(self._for_sampler(dataset))

    def _get_eval_sampler(self, eval_dataset):
        return super()._get_eval_sampler(self._for_sampler(eval_dataset))

    def _for_sampler(self, dataset):
        by_length = self.args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        return with_lengths(dataset, self.processing_class) if by_length and dataset else dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*IDS, *PAIRS.scored, *NUMBERS]


def _totals(pairs: int, chosen_tokens: int) -> Totals:
    return Totals(pairs, chosen_tokens, 2 * pairs)


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _gathered(model: PreTrainedModel) -> nn.Module:
    """An engine round a model that was loaded under ZeRO-3, whose weights are sharded."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,  # no batch is ever given to it, but it wants one
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": model.dtype is torch.bfloat16},
    }
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.eval()
    return engine


def _columns(dataset, objective: Objective) -> list[str]:
    """The float columns of the data. Raises UserError for one that would not be used."""
    if not len(dataset):
        raise UserError("a data set of the trainer has no rows; leave it out, or fill it")
    row = dataset[0]
    present = [name for name in NUMBERS if row.get(name) is not None]
    used = {*objective.columns, *PAIRS.reference_columns}
    idle = [name for name in present if name not in used]
    if idle:
        raise UserError(
            f"the data have the columns {', '.join(idle)}, which losses {objective.names} do not use; "
            "remove them"
        )
    if missing := sorted(objective.needed_columns - set(present)):
        raise UserError(f"losses {objective.names} need the columns {', '.join(missing)}")
    return present


def _shared_columns(train_dataset, eval_dataset, objective: Objective) -> list[str]:
    """The float columns of the training data; evaluation data must have the same reference."""
    if train_dataset is None:
        return []
    columns = _columns(train_dataset, objective)
    several = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    for name, each in several.items():
        if each is not None:
            _check_alike(name, _columns(each, objective), columns)
    return columns


def _check_alike(name: str, columns: list[str], trained: list[str]) -> None:
    """Raises UserError unless one reference serves training and evaluation."""
    for column in PAIRS.reference_columns:
        if (column in columns) != (column in trained):
            where = "eval_dataset" + (f"[{name!r}]" if name else "")
            have, not_ = ("train_dataset", where) if column in trained else (where, "train_dataset")
            raise UserError(
                f"{have} has the column {column} and {not_} does not: give it to both, or to neither"
            )


def _check_reference(model, objective: Objective, reference, columns: list[str]) -> None:
    """Raises UserError unless there is one reference, if the losses need any."""
    stored = [name for name in PAIRS.reference_columns if name in columns]
    both = " and ".join(PAIRS.reference_columns)
    if reference is not None and not isinstance(reference, nn.Module):
        raise UserError(
            f"reference={reference!r}: expected a model, AutoModelForCausalLM.from_pretrained(...)"
        )
    if reference is not None and _causal_lm(reference) is _causal_lm(model):
        raise UserError(
            "reference is the model that is trained, and would be frozen: pass another one, "
            "copy.deepcopy(model), say"
        )
    if len(stored) == 1:
        raise UserError(f"the data have the column {stored[0]} alone; give {both}")
    if stored and reference is not None:
        raise UserError(
            f"reference={type(reference).__name__} and the columns {both} are two references; leave one "
            "out"
        )
    live = reference is not None or hasattr(model, "peft_config")
    if objective.needs_reference and not (stored or live):
        raise UserError(
            f"losses {objective.names} compare with a reference: pass reference=model, or data with the "
            f"columns {both}"
        )
    if stored and objective.needs_reference_tokens:
        raise UserError(
            "ld_alpha and token_clamp need the reference's tokens, and the data have sums: pass "
            "reference=model, or set ld_reference=False"
        )


def _prepare_adapters(model: nn.Module, frozen_copy: bool) -> None:
    """Check a `PeftModel`, and keep its adapter as it is now where that is the reference."""
    if not hasattr(model, "peft_config"):
        return
    obstacle = why_not(model.peft_config[model.active_adapter])
    if obstacle:
        raise UserError(f"the adapter {model.active_adapter} cannot be trained here: {obstacle}")
    if frozen_copy:
        keep_frozen_copy(model)


def _prepare(model: PreTrainedModel, layout: str, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model the fused head, `model(scored=True, ...)` and the attention of the layout."""
    own = shared = model.config._attn_implementation
    if LAYOUTS[layout].shares_rows:
        shared = choose_attention("auto", layout, device, dtype, architecture_of(model)).name
        model.set_attn_implementation(shared)
        recurrent.serve(model)
        serve_by_sequence(model)
        serve_handed(model)
    fuse_head(model)
    score = functools.partial(_score, attention=shared)
    add_forward(model, "scored", score, functools.partial(_with_attention, name=own))


@contextlib.contextmanager
def _with_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """A context in which a model has its own attention, which knows no rows of several sequences."""
    if name == model.config._attn_implementation:
        yield
        return
    with kept_attention(model):
        model.set_attn_implementation(name)
        yield


def _score(model: PreTrainedModel, attention: str | None = None, **kwargs) -> dict[str, Tensor]:
    """`scoring_forward`, without the arguments that peft adds, all None.

    attention: that the layout needs; None is the one that the model has.
    """
    if (
        attention and model.config._attn_implementation != attention
    ):  # set by another since, to generate say
        model.set_attn_implementation(attention)
    scoring_head(model)
    names = inspect.signature(scoring_forward).parameters
    return scoring_forward(model, **{name: kwargs[name] for name in names if name in kwargs})
