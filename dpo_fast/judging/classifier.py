"""Sequence classifiers of transformers, whole or as an adapter, with a head that is trained."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from dpo_fast.durable import first_line
from dpo_fast.errors import UserError
from dpo_fast.judging.config import JudgeSection
from dpo_fast.models.checkpoint import (
    adapter_file,
    base_of,
    check_model_path,
    is_adapter,
    read_header,
)
from dpo_fast.models.config import ModelSection
from dpo_fast.models.hub import source
from dpo_fast.models.load import tokenizer_path, transformers_tokenizer
from dpo_fast.models.precision import DTYPES, choose_dtype

HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AssertionError)


def load_classifier(section: JudgeSection) -> torch.nn.Module:
    """The model of judge.path. Raises UserError, also where its head is not trained."""
    path = section.path
    check_model_path(path, "judge.path")
    where = source(base_of(path, "judge.path"))
    options = {"trust_remote_code": section.trust_remote_code}
    labels = adapter_labels(path) if is_adapter(path) else None
    try:
        changed = {} if labels is None else {"num_labels": labels}
        config = AutoConfig.from_pretrained(**where, **options, **changed)
        model, about = AutoModelForSequenceClassification.from_pretrained(
            **where,
            config=config,
            dtype=DTYPES[choose_dtype(section.dtype).name],
            output_loading_info=True,
            **options,
        )
        if is_adapter(path):
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, path).merge_and_unload()
    except ERRORS as error:
        raise UserError(
            f"judge.path={path}: the model cannot be loaded: {first_line(error)}"
        ) from error
    if (missing := sorted(about["missing_keys"])) and labels is None:
        kind = ", ".join(config.architectures or ["a model"])
        raise UserError(
            f"judge.path={path} is no reward model: it is of {kind}, and without {missing[0]} its scores "
            "would be random. Name a sequence classifier; for a chat model as judge there is type openai"
        )
    return model


def adapter_labels(path: str) -> int | None:
    """The labels of the head that an adapter brings; None if it brings none."""
    file = adapter_file(path, "judge.path")
    if file.suffix != ".safetensors":
        names = {
            name: tuple(each.shape) for name, each in torch.load(file, weights_only=True).items()
        }
    else:
        names = {name: tuple(each["shape"]) for name, each in read_header(file)[1].items()}
    return next((shape[0] for name, shape in names.items() if name.endswith(HEADS)), None)


def classifier_tokenizer(section: JudgeSection) -> PreTrainedTokenizerBase:
    """The tokenizer of judge.path, which cuts texts at their beginning. Raises UserError."""
    path = section.path
    try:
        where = tokenizer_path(ModelSection(path=path))
        tokenizer = transformers_tokenizer(where, section.trust_remote_code)
    except ERRORS as error:
        raise UserError(
            f"judge.path={path}: no tokenizer can be loaded: {first_line(error)}"
        ) from error
    tokenizer.truncation_side = "left"
    return tokenizer


def label_of(config: Any, label: int | str | None) -> int:
    """The column of the logits. Raises UserError."""
    names = [str(config.id2label.get(index, index)) for index in range(config.num_labels)]
    if label is None and config.num_labels == 1:
        return 0
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and 0 <= label < config.num_labels:
        return label
    told = ", ".join(names)
    if label is None:
        raise UserError(
            f"the classifier has {len(names)} labels: {told}; name one with judge.label"
        )
    raise UserError(f"judge.label={label!r}: expected one of {told}, or its number from 0")
