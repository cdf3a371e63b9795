"""The arguments of `PreferenceTrainer`: what they may be, and what is said of others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import transformers
from torch import nn
from transformers import PreTrainedModel

from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.errors import UnavailableError, UserError
from dpo_fast.losses import Objective
from dpo_fast.modules.objective import make_objective

# Arguments of TRL's DPOTrainer and DPOConfig, and what they are here.
OF_TRL = {
    "ref_model": "reference=",
    "tokenizer": "processing_class=",
    "peft_config": "model=peft.get_peft_model(model, peft_config)",
    "loss_type": "objective=",
    "beta": "objective=Objective((name,), (1.0,), LossOptions(beta=...)) of dpo_fast.losses",
    **dict.fromkeys(("max_length", "max_prompt_length"), "data_options={'max_length': ...}"),
}
OLDEST = "5.19"  # whose Trainer can leave the division of losses to us


def objective_of(given: Objective | str | Sequence[str]) -> Objective:
    """The losses. Raises UserError for a name that is not known, or another object."""
    if isinstance(given, Objective):
        return given
    try:
        return make_objective(given, None, {})
    except (ValueError, TypeError) as error:
        raise UserError(
            f"objective={given!r}: {error}. Give a name, several, or "
            "Objective((name,), (1.0,), LossOptions(beta=0.1)) of dpo_fast.losses"
        ) from None


def stop_ids(model: PreTrainedModel) -> list[int]:
    """The ids at which the model stops generating."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


@contextlib.contextmanager
def in_words_of_trainers() -> Iterator[None]:
    """A context in which errors name a trainer's arguments, and no options of configuration files."""
    try:
        yield
    except UserError as error:
        if "train.layout" not in str(error):
            raise
        raise type(error)(str(error).replace("train.layout", "layout")) from error


def check_arguments(model, args, objective: Objective, layout: str, others: dict) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model={model!r}: expected a model: AutoModelForCausalLM.from_pretrained({model!r})"
            if isinstance(model, str)
            else f"model is a {type(model).__name__}; expected a causal language model"
        )
    if not isinstance(args, transformers.TrainingArguments):
        raise UserError(f"args is a {type(args).__name__}; expected transformers.TrainingArguments")
    foreign = [name for name in ("beta", "loss_type", "max_length") if hasattr(args, name)]
    if foreign:
        raise UserError(
            f"args is a {type(args).__name__}, whose {', '.join(foreign)} this trainer would not read: "
            "pass TrainingArguments, objective=Objective(...) and data_options={'max_length': ...}"
        )
    if layout not in ("auto", *LAYOUTS):
        raise UserError(f"layout={layout}: choose from auto, {', '.join(LAYOUTS)}")
    if not hasattr(transformers.Trainer, "loss_is_scaled_for_ga"):
        raise UnavailableError(
            f"transformers {transformers.__version__} divides every loss by the accumulation steps: "
            f"pip install 'transformers>={OLDEST}'"
        )
    if objective.grouped:
        raise UserError(
            f"losses {objective.names} take groups of scored completions; this trainer takes pairs: use "
            "dpo-fast train"
        )
    whole = [spec.name for spec in objective.specs if spec.coupled or spec.statistics]
    if whole:
        raise UserError(
            f"losses {whole} need the whole global batch at once, which Trainer never has: use "
            "dpo-fast train"
        )
    for name, here in OF_TRL.items():
        if name in others:
            raise UserError(f"{name}= is an argument of TRL's DPOTrainer; here it is {here}")
    for name in ("data_collator", "compute_metrics", "compute_loss_func", "model_init"):
        if others.get(name) is not None:
            raise UserError(f"{name} cannot be set: this trainer has its own collator and loss")
    if args.label_smoothing_factor:
        raise UserError(
            f"label_smoothing_factor={args.label_smoothing_factor} smooths over the vocabulary; set it "
            "to 0, and LossOptions.label_smoothing for labels of pairs"
        )
