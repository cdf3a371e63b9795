"""The options of TRL's configurations and of its command line."""

from __future__ import annotations

from dpo_fast.migration.arguments_table import TRAINING
from dpo_fast.migration.option import Lost, Option, flag, joint, lost, needless, older, same, table
from dpo_fast.migration.trl_grpo_options import GRPO

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def attention(name: str) -> str:
    """transformers' name of an attention. Raises Lost."""
    if name not in ATTENTION:
        raise Lost(f"not an attention that runs here; auto chooses one of {', '.join(ATTENTION)}")
    return name


def _revision(name: str) -> str | None:
    return None if name == "main" else name


def _workers(number) -> int:
    return max(int(number), 1)


# What all of TRL's configurations change in TrainingArguments.
SHARED = [
    same("learning_rate", 1e-6, "train.learning_rate", convert=float),
    same("gradient_checkpointing", True, "model.gradient_checkpointing", convert=flag),
    joint(
        "bf16", None, "model.dtype", "where it is left out: bf16 where the machine is fast with it"
    ),
    joint("logging_steps", 10, "log.logging_steps"),
    joint(
        "model_init_kwargs",
        None,
        "model",
        "attn_implementation, dtype, revision, trust_remote_code",
    ),
    same("trust_remote_code", False, "model.trust_remote_code", convert=flag),
    *lost("no dropout runs in training but that of adapters", disable_dropout=True),
]
ROWS = [
    same("dataset_num_proc", None, "data.workers", convert=_workers),
    joint("max_length", 1024, "data.max_length, data.max_prompt_length"),
]
MODEL = [
    same("model_name_or_path", None, "model.path"),
    same("model_revision", "main", "model.revision", convert=_revision),
    joint(
        "dtype",
        "float32",
        "model.dtype",
        "beside bf16 the dtype of the weights that AdamW keeps: fp32",
    ),
    same("attn_implementation", None, "model.attention", convert=attention),
    joint("use_peft", False, "model.lora"),
    joint("lora_r", 16, "model.lora.r"),
    joint("lora_alpha", 32, "model.lora.alpha"),
    joint("lora_dropout", 0.05, "model.lora.dropout"),
    joint(
        "lora_target_modules", None, "model.lora.target_modules", "none: those that peft chooses"
    ),
    joint("lora_target_parameters", None, "model.lora.target_parameters"),
    joint("lora_modules_to_save", None, "model.lora.modules_to_save"),
    *needless("the task is always CAUSAL_LM", lora_task_type="CAUSAL_LM"),
    joint("use_rslora", False, "model.lora.use_rslora"),
    joint("use_dora", False, "model.lora.use_dora"),
    joint("load_in_8bit", False, "model.quantization.load_in_8bit"),
    joint("load_in_4bit", False, "model.quantization.load_in_4bit"),
    joint("bnb_4bit_quant_type", "nf4", "model.quantization.bnb_4bit_quant_type"),
    joint("use_bnb_nested_quant", False, "model.quantization.bnb_4bit_use_double_quant"),
    *lost("4 bits are stored as bytes", bnb_4bit_quant_storage=None),
    *older(joint("torch_dtype", None, "model.dtype", "dtype, as it was called")),
]
SCRIPT = [
    Option(
        "env",
        note="variables of the environment: set them where the run is started",
        lost=True,
        secret=True,
    ),
    joint("dataset_name", None, "data.train"),
    joint("dataset_config", None, "data.train", "as name:config/split"),
    joint("dataset_train_split", "train", "data.train", "as name:split"),
    joint("dataset_test_split", "test", "data.eval", "with eval_strategy alone"),
    joint("dataset_streaming", False, "data.streaming"),
    *needless("DeepSpeed takes the place of DDP", ignore_bias_buffers=False),
    joint("datasets", [], "data.train", "fraction is weight here; columns are chosen by name"),
    joint("streaming", False, "data.streaming"),
    joint("test_split_size", None, "data.eval_rows", "a share is counted where the rows are here"),
]
HANDBOOK = older(  # of the alignment handbook's scripts, which many recipes are written for
    joint("dataset_mixture", None, "data.train, data.eval_rows", "of the alignment handbook"),
    joint("dataset_mixer", None, "data.train", "of the alignment handbook, as it was called"),
    joint("dataset_splits", None, "data.train, data.eval", "of the alignment handbook"),
    joint("dataset_configs", None, "data.train", "of the alignment handbook"),
    same("preprocessing_num_workers", None, "data.workers", convert=_workers),
    Option(
        "use_flash_attention_2",
        note="model.attention: auto takes a varlen kernel where sequences share a row",
    ),
    *lost(
        "the tokenizer's stands in its place: write it into a Jinja file, and name that in "
        "data.chat_template",
        chat_template=None,
    ),
    *lost("the chat template writes what is in the rows", auto_insert_empty_system_msg=True),
)
REFERENCE = [
    joint(
        "precompute_ref_log_probs",
        False,
        "reference.provider",
        "always, and stored: the same numbers",
    ),
    *needless(
        "the reference takes batches of train.micro_batch_size", precompute_ref_batch_size=None
    ),
    joint("sync_ref_model", False, "reference.provider", "ema"),
    joint("ref_model_mixup_alpha", 0.6, "reference.mixup_alpha"),
    joint("ref_model_sync_steps", 512, "reference.sync_steps"),
]
PADDING = needless("layouts other than padded have no padding", pad_to_multiple_of="auto")
ACTIVATIONS = [same("activation_offloading", False, "model.activation_offloading", convert=flag)]
ROUTERS = [same("router_aux_loss_coef", None, "model.router_aux_loss_coef", convert=float)]
COMPLETIONS = "data.max_length bounds prompt and completion together"
WANDB = older(
    *lost("set log.project", wandb_project=None),
    *lost("set log.group", wandb_run_group=None),
    *lost("set W&B's own variable WANDB_ENTITY", wandb_entity=None),
)
PROMPTS = older(joint("max_prompt_length", None, "data.max_prompt_length"))
DPO = [
    joint("loss_type", ["sigmoid"], "loss.type", "the same names, in docs/LOSSES.md"),
    joint("loss_weights", None, "loss.weights"),
    joint("beta", 0.1, "loss.beta"),
    joint(
        "label_smoothing",
        0.0,
        "loss.label_smoothing",
        "TRL's sigmoid has none: cDPO is sigmoid with it here",
    ),
    joint("ld_alpha", None, "loss.ld_alpha"),
    joint("f_divergence_type", "reverse_kl", "loss.f_divergence_type"),
    joint("f_alpha_divergence_coef", 0.5, "loss.f_alpha_divergence_coef"),
    joint("use_weighting", False, "loss.use_weighting"),
    joint("discopop_tau", 0.05, "loss.discopop_tau"),
    joint("truncation_mode", "keep_start", "data.truncation"),
    *needless(
        "packed and shared_prefix, the layouts by default, have no padding", padding_free=False
    ),
    *lost("the tokenizer's own pad token counts for nothing: no loss sees padding", pad_token=None),
    *older(
        *lost(COMPLETIONS, max_completion_length=None),
        joint("rpo_alpha", None, "loss.type", "sigmoid and sft, with this weight"),
        joint("reference_free", False, "loss.reference_free"),
        *needless(
            "no logits are made, and padding counts for nothing",
            use_logits_to_keep=False,
            label_pad_token_id=-100,
            padding_value=None,
        ),
        *needless(
            "adapter_off is what peft's models have as a reference", force_use_ref_model=False
        ),
        *lost(
            "the adapter of model.path is the policy",
            model_adapter_name=None,
            ref_adapter_name=None,
        ),
        *lost("held-out prompts are answered by the section generate", generate_during_eval=False),
        *lost("tools come with the rows, in the column tools", tools=None),
        *needless("the head is ours, and makes no logits", use_liger_loss=False),
    ),
]
KTO = [
    *older(*lost(COMPLETIONS, max_completion_length=None)),
    joint("loss_type", "kto", "loss.type"),
    joint("beta", 0.1, "loss.beta"),
    joint("desirable_weight", 1.0, "loss.desirable_weight"),
    joint("undesirable_weight", 1.0, "loss.undesirable_weight"),
    Option(
        "train_sampling_strategy",
        "sequential",
        note="the kl is of completions of other rows of the batch, whatever their order",
    ),
]
CPO = [
    joint(
        "loss_type", "sigmoid", "loss.type", "sigmoid is cpo; simpo is simpo and sft, by cpo_alpha"
    ),
    joint("beta", 0.1, "loss.beta"),
    joint("label_smoothing", 0.0, "loss.label_smoothing"),
    joint("cpo_alpha", 1.0, "loss.cpo_alpha"),
    joint("simpo_gamma", 0.5, "loss.simpo_gamma"),
    *lost("AlphaPO is not there", alpha=0.0),
    *lost(COMPLETIONS, max_completion_length=None),
    *lost("held-out prompts are answered by the section generate", generate_during_eval=False),
    *lost("models are decoders", is_encoder_decoder=None),
]
ORPO = [
    *lost(COMPLETIONS, max_completion_length=None),
    joint("beta", 0.1, "loss.beta", "lambda of the paper, on the odds ratio"),
    *needless("padding counts for nothing", padding_value=None),
    *lost("held-out prompts are answered by the section generate", generate_during_eval=False),
    *lost("models are decoders", is_encoder_decoder=None),
]
PACKS = (
    "batches there count packs of max_length tokens, and here train.global_batch_size counts rows: "
    "multiply it by the rows of a pack; layouts have no padding by themselves"
)


def _template(path: str) -> str:
    if not str(path).endswith((".jinja", ".j2")):
        raise Lost("data.chat_template takes a Jinja file: the chat_template.jinja of that model")
    return path


SFT = [
    same("learning_rate", 2e-5, "train.learning_rate", convert=float),
    joint("loss_type", "nll", "loss.type"),
    joint("truncation_mode", "keep_start", "data.truncation"),
    joint("assistant_only_loss", False, "data.scored", "all turns behind the first question"),
    joint("dataset_text_field", "text", "data.columns"),
    same("chat_template_path", None, "data.chat_template", convert=_template),
    Option(
        "completion_only_loss",
        note="of prompt and completion the completion is scored, of a text all",
        lost=True,
        harmless=(True,),
    ),
    *lost(PACKS, packing=False),
    *needless(
        "packed, the layout by default, has no padding",
        packing_strategy="bfd",
        padding_free=False,
        eval_packing=None,
    ),
    *needless("rows are drawn at random, by train.seed", shuffle_dataset=False),
    *lost("rows are tokenised as docs/FORMATS.md says", dataset_kwargs=None),
    *lost("tokens are those of the model's tokenizer: change it there", eos_token=None),
    *lost("the tokenizer's own pad token counts for nothing: no loss sees padding", pad_token=None),
    *older(
        joint("max_seq_length", None, "data.max_length", "max_length, as it was called"),
        *needless("no dropout runs in training but that of adapters", disable_dropout=False),
        *needless("rows are tokenised once, and kept", dataset_batch_size=1000),
        *needless("packs are not estimated", num_of_sequences=1024, chars_per_token=3.6),
    ),
]
COMMON = (TRAINING, SHARED, MODEL, SCRIPT, WANDB)
ALL = (*COMMON, ROWS, HANDBOOK, PROMPTS)
TABLES = {
    "dpo": table(*ALL, REFERENCE, PADDING, ACTIVATIONS, ROUTERS, DPO),
    "kto": table(*ALL, REFERENCE, PADDING, ACTIVATIONS, ROUTERS, KTO),
    "cpo": table(*ALL, CPO),
    "orpo": table(*ALL, ORPO),
    "sft": table(*ALL, PADDING, ACTIVATIONS, ROUTERS, SFT),
    "grpo": table(*COMMON, PADDING, ROUTERS, GRPO),
}
