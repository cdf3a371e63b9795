"""LLaMA-Factory: its YAML or JSON, or the command that starts it, with data/dataset_info.json."""

from __future__ import annotations

from dpo_fast.errors import UserError
from dpo_fast.migration.arguments import finish_training
from dpo_fast.migration.draft import Draft
from dpo_fast.migration.llamafactory_options import TABLES
from dpo_fast.migration.losses import put_losses, put_option
from dpo_fast.migration.option import flag, listed
from dpo_fast.migration.sizes import put_lora, put_quantised

__all__ = ["TABLES", "finish", "stage_of"]
from dpo_fast.migration.llamafactory_data import put_data

STAGES = {
    "rm": "reward models are not trained here; dpo-fast judge scores with one (docs/ROUNDS.md)",
    "ppo": "there is no PPO; rounds of sampling and DPO are docs/ROUNDS.md",
    "pt": "there is no pre-training; for a run on texts set loss.type=sft and data.format=text",
}


PREFERENCES = ("sigmoid", "hinge", "ipo", "orpo", "simpo")


WITH_REFERENCE = ("sigmoid", "hinge", "ipo")


ATTENTION = {
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "sdpa": "sdpa",
    "disabled": "eager",
}


def stage_of(given: dict, asked: str | None, place: str) -> str:
    """The stage of a file. Raises UserError for one that is not done here."""
    if {"model", "train_dataset"} <= set(given) and "model_name_or_path" not in given:
        raise UserError(
            f"{place} is for LLaMA-Factory's v1 (USE_V1=1), whose files are not read: begin with "
            "`dpo-fast init`"
        )
    stage = asked or str(given.get("stage", "sft"))
    if stage in STAGES:
        raise UserError(f"{place}: stage={stage}: {STAGES[stage]}")
    if stage not in TABLES:
        raise UserError(f"{place}: stage={stage}: choose from {', '.join(TABLES)}")
    return stage


def finish(draft: Draft, stage: str) -> None:
    """All that is read together with something else."""
    if not draft.has("model_name_or_path"):
        raise draft.missing("model", "model_name_or_path")
    if "stage" in draft.given:
        draft.spare("stage", "it says which of the options are read")
    put_data(draft)
    finish_training(draft)
    _model(draft)
    _method(draft)
    if draft.has("quantization_bit"):
        kind = ("quantization_type", str(draft["quantization_type"]))
        double = ("double_quantization", flag(draft["double_quantization"]))
        put_quantised(draft, int(draft["quantization_bit"]), kind, double, "quantization_bit")
    {"dpo": _dpo, "kto": _kto, "sft": _sft}[stage](draft)
    if stage != "sft":
        _reference(draft, stage)


def _model(draft: Draft) -> None:
    if draft.has("model_revision") and draft["model_revision"] != "main":
        draft.put("model.revision", draft["model_revision"], "model_revision")
    adapters = listed(draft["adapter_name_or_path"])
    if len(adapters) > 1:
        raise draft.fault("adapter_name_or_path", "merge all but the last into the model first")
    if adapters:
        draft.put(
            "model.path",
            adapters[0],
            "adapter_name_or_path",
            comment="an adapter; it names its base",
        )
        draft.spare("model_name_or_path", "adapter_config.json of the adapter names its base")
        if flag(draft["create_new_adapter"]):
            draft.put("model.adapter", "merge", "create_new_adapter")
    name = str(draft["flash_attn"])
    if name in ATTENTION:
        draft.put("model.attention", ATTENTION[name], "flash_attn")
    recompute = not flag(draft["disable_gradient_checkpointing"])
    draft.put("model.gradient_checkpointing", recompute, "disable_gradient_checkpointing")
    if flag(draft["pure_bf16"]):
        draft.put("model.dtype", "bf16", "pure_bf16")


def _method(draft: Draft) -> None:
    kind = str(draft["finetuning_type"])
    own = [name for name in draft.given if name.startswith("lora_") or name == "additional_target"]
    if kind in ("freeze", "oft"):
        raise draft.fault("finetuning_type", "choose full or lora; others are not there")
    if kind == "full":
        draft.spare("finetuning_type", "the whole model, without a section lora")
        for name in own:
            draft.spare(name, "the whole model is trained")
        return
    if draft.has("adapter_name_or_path") and not flag(draft["create_new_adapter"]):
        for name in own:
            draft.spare(name, "the adapter that is trained further has its own")
        return
    rank = int(draft["lora_rank"])
    values = {
        "r": ("lora_rank", rank),
        "alpha": ("lora_alpha", int(draft["lora_alpha"] or 2 * rank)),
        "dropout": ("lora_dropout", float(draft["lora_dropout"])),
        "use_rslora": ("use_rslora", flag(draft["use_rslora"]) or None),
        "use_dora": ("use_dora", flag(draft["use_dora"]) or None),
        "init_lora_weights": ("pissa_init", _pissa(draft)),
        "modules_to_save": ("additional_target", listed(draft["additional_target"]) or None),
    }
    put_lora(draft, values, ("lora_target", draft["lora_target"]), ("all", "all-linear"))
    draft.went("finetuning_type", "model.lora")


def _pissa(draft: Draft) -> str | None:
    if not flag(draft["pissa_init"]):
        return None
    number = int(draft["pissa_iter"])
    return "pissa" if number < 1 else f"pissa_niter_{number}"


def _dpo(draft: Draft) -> None:
    name = str(draft["pref_loss"])
    if name not in PREFERENCES:
        raise draft.fault("pref_loss", f"choose from {', '.join(PREFERENCES)}")
    shares, names = {name: 1.0}, ["pref_loss"]
    bco = float(draft["pref_bco_weight"])
    if bco and name in WITH_REFERENCE:
        shares = {name: round(1 / (1 + bco), 6), "bco_pair": round(bco / (1 + bco), 6)}
        names.append("pref_bco_weight")
    _ftx(draft, shares, names)
    put_losses(draft, shares, *names)
    if bco and name not in WITH_REFERENCE:
        draft.spare(
            "pref_bco_weight", f"{name} has no reference, and does not use it, there either"
        )
    put_option(draft, [name], "beta", float(draft["pref_beta"]), "pref_beta")
    put_option(draft, [name], "simpo_gamma", float(draft["simpo_gamma"]), "simpo_gamma")
    smoothing = float(draft["dpo_label_smoothing"])
    put_option(draft, [name], "label_smoothing", smoothing, "dpo_label_smoothing")
    if draft.has("ld_alpha"):
        put_option(draft, list(shares), "ld_alpha", float(draft["ld_alpha"]), "ld_alpha")
        if "loss.ld_alpha" in draft.keys and name in WITH_REFERENCE:
            draft.put("loss.ld_reference", False, "ld_alpha")


def _ftx(draft: Draft, shares: dict[str, float], names: list[str]) -> None:
    """The SFT term beside a loss."""
    if weight := float(draft["pref_ftx"]):
        shares["sft"] = weight
        names.append("pref_ftx")
        draft.note(
            "pref_ftx: LLaMA-Factory's SFT term is a mean over the rows of their means over "
            "tokens; here it is "
            "one mean over the tokens of the global batch."
        )


def _kto(draft: Draft) -> None:
    shares, names = {"kto": 1.0}, ["stage"]
    _ftx(draft, shares, names)
    put_losses(draft, shares, *names, comment="stage: kto")
    for ours, theirs in (
        ("beta", "pref_beta"),
        ("desirable_weight", "kto_chosen_weight"),
        ("undesirable_weight", "kto_rejected_weight"),
    ):
        put_option(draft, ["kto"], ours, float(draft[theirs]), theirs)


def _sft(draft: Draft) -> None:
    put_losses(draft, {"sft": 1.0}, "stage", comment="stage: sft")


def _reference(draft: Draft, stage: str) -> None:
    if draft.has("ref_model"):
        provider = "frozen" if stage == "kto" else "cached"
        draft.put("reference.provider", provider, "ref_model")
        draft.put("reference.path", draft["ref_model"], "ref_model")
    elif stage == "kto" or str(draft["pref_loss"]) in WITH_REFERENCE:
        draft.note(
            "The reference is the model as it starts, there too. It is scored once and "
            "stored, where there it "
            "is scored in every step (KTO: here too)."
        )
