"""The options of OpenRLHF's `train_dpo`, `train_sft` and `train_kto`.

They are called here as up to its version 0.9, and `NAMES` has what they are called since.
"""

from __future__ import annotations

from dpo_fast.migration.arguments_table import above_zero
from dpo_fast.migration.option import Option, flag, joint, lost, needless, older, same, table

NAMES = {
    "pretrain": "model.model_name_or_path",
    "ref_pretrain": "ref.model_name_or_path",
    "ref_offload": "ref.offload",
    "save_path": "ckpt.output_dir",
    "save_steps": "ckpt.save_steps",
    "save_hf_ckpt": "ckpt.save_hf",
    "disable_ds_ckpt": "ckpt.disable_ds",
    "ckpt_path": "ckpt.path",
    "max_ckpt_num": "ckpt.max_num",
    "max_ckpt_mem": "ckpt.max_mem",
    "load_checkpoint": "ckpt.load_enable",
    "logging_steps": "logger.logging_steps",
    "use_wandb": "logger.wandb.key",
    "wandb_org": "logger.wandb.org",
    "wandb_group": "logger.wandb.group",
    "wandb_project": "logger.wandb.project",
    "wandb_run_name": "logger.wandb.run_name",
    "use_tensorboard": "logger.tensorboard_dir",
    "eval_steps": "eval.steps",
    "eval_dataset": "eval.dataset",
    "eval_split": "eval.split",
    "micro_train_batch_size": "train.micro_batch_size",
    "train_batch_size": "train.batch_size",
    "seed": "train.seed",
    "full_determinism": "train.full_determinism_enable",
    "max_epochs": "train.max_epochs",
    "gradient_checkpointing": "model.gradient_checkpointing_enable",
    "gradient_checkpointing_use_reentrant": "model.gradient_checkpointing_reentrant",
    "beta": "model.beta",
    "ipo": "model.ipo_enable",
    "label_smoothing": "model.label_smoothing",
    "aux_loss_coef": "model.aux_loss_coef",
    "nll_loss_coef": "model.nll_loss_coef",
    "pretrain_mode": "model.pretrain_mode_enable",
    "learning_rate": "adam.lr",
    "adam_betas": "adam.betas",
    "adam_eps": "adam.eps",
    "l2": "adam.weight_decay",
    "use_ds_universal_ckpt": "ds.use_universal_ckpt",
    "deepcompile": "ds.deepcompile",
    "zero_stage": "ds.zero_stage",
    "param_dtype": "ds.param_dtype",
    "zpg": "ds.zpg",
    "adam_offload": "ds.adam_offload",
    "attn_implementation": "ds.attn_implementation",
    "experts_implementation": "ds.experts_implementation",
    "use_liger_kernel": "ds.use_liger_kernel",
    "grad_accum_dtype": "ds.grad_accum_dtype",
    "overlap_comm": "ds.overlap_comm",
    "ds_tensor_parallel_size": "ds.tensor_parallel_size",
    "ring_attn_size": "ds.ring_attn_size",
    "ring_head_stride": "ds.ring_attn_head_stride",
    "load_in_4bit": "ds.load_in_4bit",
    "lora_rank": "ds.lora.rank",
    "lora_alpha": "ds.lora.alpha",
    "lora_dropout": "ds.lora.dropout",
    "target_modules": "ds.lora.target_modules",
    "packing_samples": "ds.packing_samples",
    **{
        name: f"data.{name}"
        for name in (
            *("dataset", "dataset_probs", "dataset_split", "max_samples", "max_len", "multiturn"),
            *("prompt_key", "chosen_key", "rejected_key", "input_key", "output_key", "label_key"),
            *("input_template", "apply_chat_template", "tokenizer_chat_template"),
            *("disable_fast_tokenizer", "dataloader_num_workers"),
        )
    },
}
TEMPLATE = "User: {}\nAssistant: "
SHARED = [
    same("pretrain", None, "model.path"),
    same("save_path", "./ckpt", "train.output_dir", "the model goes to its folder final/"),
    same("save_steps", -1, "train.save_steps", convert=above_zero),
    same("logging_steps", 1, "log.logging_steps", convert=int),
    joint("eval_steps", -1, "train.eval_steps"),
    same("max_ckpt_num", 3, "train.save_total_limit", convert=int),
    same("save_hf_ckpt", False, "train.save_model", convert=flag),
    same("micro_train_batch_size", 8, "train.micro_batch_size", convert=int),
    same("train_batch_size", 128, "train.global_batch_size", convert=int),
    same("load_checkpoint", False, "train.resume_from_checkpoint", convert=flag),
    same("max_norm", 1.0, "train.max_grad_norm", convert=float),
    same("gradient_checkpointing", False, "model.gradient_checkpointing", convert=flag),
    same("seed", 42, "train.seed"),
    same("zero_stage", 2, "parallel.zero_stage", convert=int),
    joint("param_dtype", "bf16", "model.dtype", "fp16: bf16 in its place"),
    same("learning_rate", 1e-5, "train.learning_rate", convert=float),
    same("lr_warmup_ratio", 0.03, "train.warmup_ratio", convert=float),
    joint("lr_scheduler", "cosine_with_min_lr", "train.lr_scheduler_type"),
    joint("min_lr_ratio", 0.1, "train.lr_scheduler_kwargs", "min_lr_rate"),
    joint("zpg", 1, "parallel.zero_hpz_partition_size"),
    joint("adam_offload", False, "parallel.offload_optimizer"),
    same("use_liger_kernel", False, "model.use_liger_kernel", convert=flag),
    same("max_epochs", 1, "train.num_train_epochs", convert=float),
    same("l2", 0.0, "train.weight_decay", "of matrices alone", convert=float),
    joint("aux_loss_coef", 0, "model.router_aux_loss_coef"),
    joint("adam_betas", (0.9, 0.95), "train.adam_beta1, train.adam_beta2"),
    same("adam_eps", 1e-8, "train.adam_epsilon", convert=float),
    joint(
        "ring_attn_size",
        1,
        "parallel.sequence_parallel",
        "Ulysses, which splits heads, in place of a ring",
    ),
    joint("lora_rank", 0, "model.lora.r"),
    joint("lora_alpha", 16, "model.lora.alpha"),
    joint("lora_dropout", 0, "model.lora.dropout"),
    joint("target_modules", "all-linear", "model.lora.target_modules"),
    joint("dataset", None, "data.train"),
    joint("dataset_probs", None, "data.train", "weights of the sources"),
    joint("dataset_split", "train", "data.train"),
    joint("eval_dataset", None, "data.eval"),
    joint("eval_split", "test", "data.eval"),
    joint("max_samples", 1000000, "data.max_rows"),
    joint(
        "apply_chat_template", False, "data.apply_chat_template", "messages always go through it"
    ),
    *lost(
        "write it into a Jinja file, and name that in data.chat_template",
        tokenizer_chat_template=None,
    ),
    joint("max_len", 512, "data.max_length"),
    Option(
        "use_wandb",
        None,
        "log.report_to",
        "the key itself belongs to WANDB_API_KEY",
        joint=True,
        secret=True,
    ),
    same("wandb_run_name", None, "log.run_name"),
    joint("use_tensorboard", None, "log.report_to"),
    joint("wandb_project", "openrlhf_train_dpo", "log.project", "with use_wandb"),
    joint("wandb_group", None, "log.group", "with use_wandb"),
    *lost("set W&B's own variable WANDB_ENTITY", wandb_org=None),
    joint("load_in_4bit", False, "model.quantization.load_in_4bit"),
    *lost(
        "tensors are not split over ranks; ZeRO 3 and parallel.sequence_parallel are",
        ds_tensor_parallel_size=1,
    ),
    *lost("DeepSpeed compiles nothing here; model.torch_compile does", deepcompile=False),
    *lost("runs here are exact without it, but for kernels of CUDA", full_determinism=False),
    *lost("models and data come from the Hugging Face hub", use_ms=False),
    *lost("the optimiser is AdamW", optim="adam"),
    *needless(
        "of Muon",
        **{"muon.lr": 0.02, "muon.momentum": 0.95, "muon.ns_steps": 5},
        **{"muon.nesterov": True, "muon.no_nesterov": False},
    ),
    *lost(
        "auto chooses the attention; model.attention names one",
        attn_implementation="flash_attention_2",
    ),
    *lost("experts are computed as transformers does by itself", experts_implementation=None),
    *needless(
        "rows are packed by train.layout; batches count rows, there too", packing_samples=False
    ),
    *needless("gradients are summed in fp32", grad_accum_dtype=None),
    *needless(
        "ZeRO overlaps its exchanges on a GPU", overlap_comm=False, disable_trace_cache=False
    ),
    *needless("recomputation is never reentrant", gradient_checkpointing_use_reentrant=False),
    *needless("of ring attention", ring_head_stride=1),
    *needless(
        "checkpoints lie in train.output_dir, and train.save_total_limit counts them",
        ckpt_path="./ckpt/checkpoints_dpo",
        max_ckpt_mem=1e8,
        use_ds_universal_ckpt=False,
    ),
    *lost("checkpoints always hold the states that a run goes on from", disable_ds_ckpt=False),
    *needless("the tokenizer is the model's own", disable_fast_tokenizer=False),
    *needless("rows are tokenised once, by data.workers", dataloader_num_workers=0),
    *needless("launchers set it", local_rank=-1),
    *older(
        joint("bf16", False, "model.dtype"),
        *needless("auto takes a varlen kernel where sequences share a row", flash_attn=False),
        joint("train_split", "train", "data.train", "dataset_split, as it was called"),
        same("torch_compile", False, "model.torch_compile", convert=flag),
    ),
]
TEXTS = (
    "texts go to the model as they stand: write the template into the rows, or use a chat template"
)
REFERENCE = needless(
    "the policy's reference is stored, and no second model is held", ref_offload=False
)
DPO = [
    joint("ref_pretrain", None, "reference.path"),
    joint("beta", 0.1, "loss.beta"),
    joint("ipo", False, "loss.type", "ipo on sums: loss.length_average=false"),
    joint("label_smoothing", 0.0, "loss.label_smoothing"),
    joint("nll_loss_coef", 0, "loss.type", "sft with this weight, over tokens in place of rows"),
    joint("prompt_key", None, "data.columns"),
    joint("chosen_key", "chosen", "data.columns"),
    joint("rejected_key", "rejected", "data.columns"),
    *lost(TEXTS, input_template=None),
    *REFERENCE,
]
ANSWERS = [
    joint("input_key", "input", "data.columns", "messages, prompt or text"),
    joint("output_key", None, "data.columns", "completion"),
    *lost(f"without a chat template, also at its default: {TEXTS}", input_template=TEMPLATE),
    joint("max_len", 2048, "data.max_length"),
]
SFT = [
    *ANSWERS,
    same("learning_rate", 5e-6, "train.learning_rate", convert=float),
    same("max_epochs", 2, "train.num_train_epochs", convert=float),
    joint("pretrain_mode", False, "data.format", "text: every token of a row is scored"),
    joint("multiturn", False, "data.scored", "every answer; without it the last alone"),
    joint("eval_split", "train", "data.eval"),
    joint("wandb_project", "openrlhf_train_sft", "log.project", "with use_wandb"),
    *needless("checkpoints lie in train.output_dir", ckpt_path="./ckpt/checkpoints_sft"),
]
KTO = [
    *ANSWERS,
    same("pretrain", "bigscience/bloomz-1b7", "model.path"),
    joint("label_key", "label", "data.columns"),
    joint("beta", 0.01, "loss.beta"),
    joint("desirable_loss_weight", 1.0, "loss.desirable_weight"),
    joint("undesirable_loss_weight", 1.0, "loss.undesirable_weight"),
    *needless("checkpoints lie in train.output_dir", ckpt_path="./ckpt/checkpoints_kto"),
    *REFERENCE,
]
TABLES = {"dpo": table(SHARED, DPO), "sft": table(SHARED, SFT), "kto": table(SHARED, KTO)}
