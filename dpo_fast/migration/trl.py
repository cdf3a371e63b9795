"""TRL: a YAML or JSON file of DPOConfig and its siblings, or the command that starts `trl dpo`."""

from __future__ import annotations

import re
from pathlib import Path

from dpo_fast.errors import UserError
from dpo_fast.losses import LOSSES
from dpo_fast.migration.arguments import finish_training
from dpo_fast.migration.draft import Draft
from dpo_fast.migration.losses import put_losses, put_option
from dpo_fast.migration.option import Lost, flag, listed
from dpo_fast.migration.sizes import put_lengths, put_lora, put_quantised
from dpo_fast.migration.trl_data import put_data
from dpo_fast.migration.trl_grpo import finish_grpo, put_prompts
from dpo_fast.migration.trl_options import TABLES, attention

ELSEWHERE = {
    "reward": "reward models are not trained here; dpo-fast judge scores with one (docs/ROUNDS.md)"
}


SIGNS = {  # options that one trainer alone has
    "grpo": (
        "num_generations",
        "reward_funcs",
        "scale_rewards",
        "importance_sampling_level",
        "epsilon",
    ),
    "reward": ("center_rewards_coefficient",),
    "kto": ("desirable_weight", "undesirable_weight"),
    "cpo": ("cpo_alpha", "simpo_gamma"),
    "sft": (
        *("assistant_only_loss", "completion_only_loss", "packing", "dataset_text_field"),
        "max_seq_length",
    ),
}


OF_LOSS = (  # the same names there and here
    *("beta", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting"),
    *("discopop_tau", "desirable_weight", "undesirable_weight", "cpo_alpha", "simpo_gamma"),
    *("label_smoothing", "reference_free"),
)


SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # TRL's losses on pairs that smooth labels


OF_CPO = {"sigmoid": "cpo", "simpo": "simpo"}


# Trainers by what the name of a script holds: the first of these.
IN_NAMES = ("online_dpo", "grpo", "orpo", "cpo", "kto", "dpo", "sft")


def started(start: str, words: list[str]) -> str | None:
    """The trainer of a command: the word behind `trl`, or what the script is called after."""
    if start == "trl":
        return words[0] if words else None
    name = re.sub(r"\.py$", "", start).rpartition(".")[2].lower()
    return next((each for each in IN_NAMES if each in name), None)


def _called(place: str) -> str | None:
    """The trainer that a file, or else its folder, is called after, if it is one alone."""
    known = {*TABLES, *ELSEWHERE}
    words = known & set(re.split(r"[^a-z]+", Path(place).stem.lower()))
    words = words or known & {Path(place).parent.name.lower()}
    return words.pop() if len(words) == 1 else None


def trainer_of(given: dict, asked: str | None, place: str) -> str:
    """Which of TRL's trainers a file is for: by what is asked, by its options, by its name.

    Raises:
        UserError: it has no counterpart.
    """
    signs = next((n for n, own in SIGNS.items() if set(own) & set(given)), None)
    found = asked or signs or _called(place) or "dpo"
    if found == "dpo" and asked is None and listed(given.get("loss_type")) in (["kto"], ["simpo"]):
        found = {"kto": "kto", "simpo": "cpo"}[listed(given["loss_type"])[0]]
    if found in ELSEWHERE:
        told = "" if asked or signs else ", by its name (--method dpo if it is not)"
        raise UserError(f"{place} is for TRL's {found}{told}: {ELSEWHERE[found]}")
    if found not in TABLES:
        raise UserError(
            f"{place} is for TRL's {found}, which has no counterpart here: for --method choose from "
            f"{', '.join(TABLES)}"
        )
    return found


def finish(draft: Draft, trainer: str) -> None:
    """All that is read together with something else."""
    if not draft.has("model_name_or_path"):
        raise draft.missing("model", "model_name_or_path")
    if flag(draft["dataset_streaming"]) or flag(draft["streaming"]):
        draft.put("data.streaming", True, "dataset_streaming", "streaming")
    put_prompts(draft) if trainer == "grpo" else put_data(draft)
    finish_training(draft)
    _model(draft)
    _lora(draft)
    for bits in (4, 8):
        if flag(draft[f"load_in_{bits}bit"]):
            kind = ("bnb_4bit_quant_type", str(draft["bnb_4bit_quant_type"]))
            double = ("use_bnb_nested_quant", flag(draft["use_bnb_nested_quant"]))
            put_quantised(draft, bits, kind, double, f"load_in_{bits}bit")
    if trainer == "grpo":
        finish_grpo(draft)
        return
    _lengths(draft)
    {"dpo": _dpo, "kto": _kto, "cpo": _cpo, "orpo": _orpo, "sft": _sft}[trainer](draft)
    if trainer in ("dpo", "kto"):
        _reference(draft)


def _model(draft: Draft) -> None:
    for name, value in dict(draft["model_init_kwargs"] or {}).items():
        place = f"model_init_kwargs.{name}"
        if name == "attn_implementation":
            try:
                draft.put("model.attention", attention(value), "model_init_kwargs")
            except Lost as error:
                draft.lose(place, str(error))
        elif name in ("revision", "trust_remote_code"):
            draft.put(f"model.{name}", value, "model_init_kwargs")
        elif name in ("dtype", "torch_dtype"):
            _dtype(draft, place, value)
        elif name == "use_cache":
            draft.spare(place, "no key-value cache is kept in training")
        else:
            draft.lose(place, "models are loaded without further arguments")
    for name in ("dtype", "torch_dtype"):
        if draft.has(name):
            _dtype(draft, name, draft[name])


def _dtype(draft: Draft, name: str, value: str) -> None:
    """The dtype that weights are loaded in: with bf16 AdamW's copy is fp32 here, whatever it is there."""
    low = str(value).removeprefix("torch.") in ("bfloat16", "float16")
    if low:
        draft.put("model.dtype", "bf16", "bf16" if draft.has("bf16") else name)
        draft.lose(
            name,
            "weights are bf16, and AdamW keeps a copy in fp32 beside them: more exact, 4 bytes more each",
        )
    else:
        draft.spare(
            name, "AdamW's copy of the weights is fp32; model.dtype is that of forward and backward"
        )


def _lora(draft: Draft) -> None:
    own = [name for name in draft.given if name.startswith("lora_")]
    if not flag(draft["use_peft"]):
        for name in own:
            draft.spare(name, "use_peft is not set")
        return
    names = {"r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    names |= {
        "target_parameters": "lora_target_parameters",
        "modules_to_save": "lora_modules_to_save",
    }
    values = {key: (name, draft[name]) for key, name in names.items()}
    values |= {key: (key, flag(draft[key]) or None) for key in ("use_rslora", "use_dora")}
    targets = draft["lora_target_modules"]
    put_lora(draft, values, ("lora_target_modules", targets))
    if draft["lora_target_parameters"] and not listed(targets):
        draft.keys.pop("model.lora.target_modules")
    draft.went("use_peft", "model.lora")


def _lengths(draft: Draft) -> None:
    older = "max_seq_length" in draft.given and "max_length" not in draft.given
    name = "max_seq_length" if older else "max_length"
    put_lengths(draft, name, draft[name], "max_prompt_length")
    if draft[name] is None:
        return
    mode = draft["truncation_mode"] if "truncation_mode" in draft.options else "keep_start"
    draft.put(
        "data.truncation", mode, "truncation_mode" if "truncation_mode" in draft.options else name
    )
    if mode == "keep_end":
        draft.note(
            "TRL's keep_end drops the first tokens of prompt and completion together. Here "
            "the prompt loses "
            "its start, and a completion that is longer than data.max_length its end."
        )


def _put_options(draft: Draft, losses: list[str]) -> None:
    for name in OF_LOSS:
        if name in draft.options and name != "label_smoothing":
            put_option(draft, losses, name, draft[name], name)


def _dpo(draft: Draft) -> None:
    losses = [str(each) for each in listed(draft["loss_type"])]
    unknown = [each for each in losses if each not in LOSSES]
    if unknown:
        raise draft.fault(
            "loss_type", f"{', '.join(unknown)} is no loss here; docs/LOSSES.md has them"
        )
    weights = listed(draft["loss_weights"]) or [1.0] * len(losses)
    if len(weights) != len(losses):
        raise draft.fault("loss_weights", f"{len(losses)} losses need as many weights")
    shares = dict(zip(losses, map(float, weights)))
    names = ["loss_type", "loss_weights"]
    if draft["rpo_alpha"] is not None:
        shares["sft"] = float(draft["rpo_alpha"])
        names.append("rpo_alpha")
    put_losses(draft, shares, *names)
    _put_options(draft, losses)
    if "loss.ld_alpha" in draft.keys and not flag(draft["sync_ref_model"]):
        draft.put(
            "reference.per_token", True, "ld_alpha", comment="ld_alpha weights its tokens, too"
        )
    smoothing = float(draft["label_smoothing"])
    if set(losses) & set(SMOOTHED):
        put_option(draft, losses, "label_smoothing", smoothing, "label_smoothing")
    elif smoothing:
        draft.lose(
            "label_smoothing",
            f"TRL's {', '.join(losses)} ignore it. For cDPO set loss.label_smoothing, which "
            f"sigmoid uses here",
        )


def _kto(draft: Draft) -> None:
    name = str(draft["loss_type"])
    if name not in ("kto", "apo_zero_unpaired"):
        raise draft.fault("loss_type", "KTOTrainer has kto and apo_zero_unpaired")
    put_losses(draft, {name: 1.0}, "loss_type", comment="KTOTrainer")
    _put_options(draft, [name])


def _cpo(draft: Draft) -> None:
    theirs = str(draft["loss_type"])
    if theirs not in OF_CPO:
        raise draft.fault(
            "loss_type", f"CPOTrainer's {theirs} is not there; it has {', '.join(OF_CPO)}"
        )
    name, alpha = OF_CPO[theirs], float(draft["cpo_alpha"])
    shares = {name: 1.0}
    if name == "simpo" and alpha:
        shares["sft"] = alpha
        draft.put("loss.weights", [1.0, alpha], "cpo_alpha")
    put_losses(
        draft,
        shares,
        "loss_type",
        *(["cpo_alpha"] if name == "simpo" else []),
        comment="CPOTrainer",
    )
    _put_options(draft, [name])
    put_option(draft, [name], "label_smoothing", float(draft["label_smoothing"]), "label_smoothing")


def _orpo(draft: Draft) -> None:
    put_losses(draft, {"orpo": 1.0}, comment="ORPOTrainer")
    _put_options(draft, ["orpo"])


def _sft(draft: Draft) -> None:
    name = str(draft["loss_type"])
    if name not in ("nll", "chunked_nll"):
        raise draft.fault("loss_type", "nll is the loss of SFT here; others are not there")
    put_losses(draft, {"sft": 1.0}, "loss_type", comment="SFTTrainer")
    scored = "assistant" if flag(draft["assistant_only_loss"]) else "all"
    draft.put("data.scored", scored, "assistant_only_loss")
    if scored == "all":
        draft.note(
            "SFTTrainer scores every token of a conversation, questions too. Here the words before the "
            "assistant's first are never scored; data.scored=assistant leaves out all other questions."
        )
    if draft["dataset_text_field"] != "text":
        columns = {"text": str(draft["dataset_text_field"])}
        draft.put("data.columns", columns, "dataset_text_field")


def _reference(draft: Draft) -> None:
    streamed = "data.streaming" in draft.keys
    if streamed and not flag(draft["sync_ref_model"]) and not flag(draft["reference_free"]):
        # A table of a stream cannot be stored beforehand; the numbers are the same.
        provider = "adapter_off" if flag(draft["use_peft"]) else "frozen"
        draft.put("reference.provider", provider, "dataset_streaming", "streaming")
        return
    if flag(draft["sync_ref_model"]):
        draft.put("reference.provider", "ema", "sync_ref_model")
        draft.put(
            "reference.mixup_alpha", float(draft["ref_model_mixup_alpha"]), "ref_model_mixup_alpha"
        )
        draft.put(
            "reference.sync_steps", int(draft["ref_model_sync_steps"]), "ref_model_sync_steps"
        )
        return
    for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
        if name in draft.given:
            draft.spare(name, "sync_ref_model is not set")
    if draft.has("precompute_ref_log_probs"):
        draft.spare(
            "precompute_ref_log_probs", "the reference is stored by default: the same numbers, once"
        )
    names = [str(each) for each in listed(draft["loss_type"])]
    if draft.has("reference_free") and flag(draft["reference_free"]):
        return
    if any(LOSSES[name].needs_reference for name in names):
        draft.note(
            "TRL scores the reference in every step. Here it is scored once before training and stored "
            "(KTO: in every step); the numbers are the same."
        )
