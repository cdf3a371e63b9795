"""Keys of a draft that other keys leave without a meaning, or that cannot stand beside them here."""

from __future__ import annotations

from dpo_fast.migration.draft import Draft

WARM_UP = ("train.warmup_ratio", "train.warmup_steps")
STREAM = ("data.streaming", "data.stream_buffer")
# Keys that need evaluation data, and those that need evaluations while training.
EVALUATING = ("train.eval_steps",)
COMPARING = (
    *("train.load_best_model_at_end", "train.metric_for_best_model", "train.greater_is_better"),
    *("train.early_stopping_patience", "train.early_stopping_threshold"),
)
WHOLE = "a base of 4 or 8 bits stays whole on every rank"


def settle(draft: Draft) -> None:
    """Take such keys out, and say what becomes of their options."""
    _training(draft)
    _memory(draft)
    if not {"data.eval", "data.eval_rows"} & set(draft.keys):
        told = "there is nothing to evaluate on: set data.eval or data.eval_rows, then it"
        _take_out(draft, EVALUATING, told)
    if "train.eval_steps" not in draft.keys:
        told = "checkpoints are compared by evaluations: set train.eval_steps, then it"
        _take_out(draft, COMPARING, told)


def _training(draft: Draft) -> None:
    if _value(draft, "train.lr_scheduler_type") == "constant":
        for key in WARM_UP:
            if draft.keys.pop(key, None) is not None:
                for name in draft.options_of(key):
                    draft.spare(name, "constant has no warm-up, there either")
    if "data.streaming" in draft.keys and "train.max_steps" not in draft.keys:
        for name in draft.moved("data.streaming", "data.streaming"):
            if name in draft.given:
                draft.lose(name, "a stream needs train.max_steps, there too: set both")
        for key in STREAM:
            draft.keys.pop(key, None)


def _memory(draft: Draft) -> None:
    offloaded = _value(draft, "model.activation_offloading")
    if offloaded and _value(draft, "model.gradient_checkpointing") is False:
        told = "model.activation_offloading moves what recomputed layers keep, and turns it on"
        _take_out(draft, ("model.gradient_checkpointing",), told)
    if _value(draft, "model.use_liger_kernel") and _value(draft, "model.torch_compile"):
        _take_out(draft, ("model.torch_compile",), "model.use_liger_kernel fuses the same layers")
    if not any(key.startswith("model.quantization.") for key in draft.keys):
        return
    _take_out(draft, ("parallel.offload_parameters",), WHOLE)
    if _value(draft, "parallel.zero_stage") == 3:
        names = draft.moved("parallel.zero_stage", "parallel.zero_stage")
        draft.put("parallel.zero_stage", 2, *names, comment="3 there")
        draft.note(f"parallel.zero_stage: {WHOLE}, so 2 stands in the place of 3.")


def _value(draft: Draft, key: str) -> object:
    entry = draft.keys.get(key)
    return None if entry is None else entry.value


def _take_out(draft: Draft, keys: tuple[str, ...], why: str) -> None:
    for key in keys:
        if draft.keys.pop(key, None) is not None:
            for name in draft.options_of(key):
                draft.lose(name, why)
