"""Tasks of the LM evaluation harness (lm-eval) on a model folder, where that package is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.models.checkpoint import adapters_under, base_of, check_model_path, is_adapter
from dpo_fast.models.config import ModelSection
from dpo_fast.models.hub import split_revision
from dpo_fast.models.load import load_tokenizer
from dpo_fast.training.checkpoint_run import checkpoint_of
from dpo_fast.training.earlier_run import MODEL

MISSING = "lm-eval is not installed: pip install lm-eval, or leave --lm-eval out"


def evaluate_tasks(model: str, tasks: Sequence[str], limit: int | None = None) -> dict[str, Any]:
    """What lm-eval finds for these tasks: the metrics of each, by its name.

    model: a folder that from_pretrained loads, an adapter, a hub id, or a run's folder: the model it made.
    limit: examples of each task; None: all.

    Raises:
        UserError: lm-eval is not there, does not know a task, or fails; or there is no such model.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(MISSING)
    path = _model(model)
    import lm_eval

    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=",".join(f"{name}={value}" for name, value in _arguments(path).items()),
            tasks=list(tasks),
            batch_size="auto",
            limit=limit,
            apply_chat_template=bool(load_tokenizer(ModelSection(path=path)).chat_template),
        )
    except UserError:
        raise
    except Exception as error:  # of a library that has tasks and models of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--lm-eval {','.join(tasks)}: {reason:.1000}") from error
    return {task: _metrics(values) for task, values in found["results"].items()}


def _model(model: str) -> str:
    """The folder or hub id. Raises UserError for a checkpoint, which from_pretrained cannot load."""
    exported = Path(model).expanduser() / MODEL
    if exported.is_dir():
        return str(exported)
    if checkpoint_of(model) is not None and not (Path(model) / "config.json").is_file():
        raise UserError(
            f"{model} is a checkpoint of a run: write its model with dpo-fast export {model}, and name "
            "that folder"
        )
    check_model_path(model)
    return model


def _arguments(path: str) -> dict[str, str]:
    """What lm-eval's class `hf` is told of a model."""
    under = adapters_under(path)
    if under:
        raise UserError(
            f"{path} has the adapters {', '.join(under)} under another one, and lm-eval takes one alone: "
            f"merge them with dpo-fast export --merge {path}, and name that folder"
        )
    if is_adapter(path):
        return _located(base_of(path)) | {"peft": path}
    return _located(path)


def _located(path: str) -> dict[str, str]:
    name, revision = split_revision(path)
    return {"pretrained": name, **({"revision": revision} if revision else {}), "dtype": "auto"}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """`exact_match,strict-match: 0.5` as lm-eval names them, without texts."""
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}
