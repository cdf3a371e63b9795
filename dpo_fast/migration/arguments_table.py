"""transformers' TrainingArguments, option by option: TRL and LLaMA-Factory share them."""

from __future__ import annotations

from typing import Any

from dpo_fast.migration.option import Option, flag, joint, lost, needless, older, same

# Names of AdamW that differ in the code that computes it, and are nothing that one chooses here.
SAME_ADAMW = ("adamw_hf", "adamw_apex_fused", "adamw_torch_xla", "adamw_torch_npu_fused")


FOUND = "dpo_fast finds it out by itself"


LONGEST_WAIT = 43_200  # minutes, of parallel.timeout_minutes


def above_zero(value: Any) -> int | None:
    """A number that means nothing where it is not above 0."""
    number = int(value)
    return number if number > 0 else None


def _resume(value: Any) -> bool | str:
    text = str(value).lower()
    return text == "true" if text in ("true", "false") else str(value)


def _minutes(seconds: Any) -> float:
    return min(float(seconds) / 60, LONGEST_WAIT)


TRAINING: list[Option] = [
    same("output_dir", "trainer_output", "train.output_dir", "the model goes to its folder final/"),
    same("num_train_epochs", 3.0, "train.num_train_epochs", convert=float),
    same("max_steps", -1, "train.max_steps", convert=above_zero),
    same("learning_rate", 5e-5, "train.learning_rate", convert=float),
    same("lr_scheduler_type", "linear", "train.lr_scheduler_type"),
    same("lr_scheduler_kwargs", None, "train.lr_scheduler_kwargs"),
    joint(
        "optim",
        "adamw_torch_fused",
        "train.optim",
        "AdamW alone, in torch's forms and bitsandbytes'",
    ),
    same("weight_decay", 0.0, "train.weight_decay", convert=float),
    same("adam_beta1", 0.9, "train.adam_beta1", convert=float),
    same("adam_beta2", 0.999, "train.adam_beta2", convert=float),
    same("adam_epsilon", 1e-8, "train.adam_epsilon", convert=float),
    same("max_grad_norm", 1.0, "train.max_grad_norm", convert=float),
    same("seed", 42, "train.seed", "the order of the rows is another all the same"),
    same("run_name", None, "log.run_name"),
    same("resume_from_checkpoint", None, "train.resume_from_checkpoint", convert=_resume),
    same("torch_compile", False, "model.torch_compile", convert=flag),
    same(
        "use_liger_kernel",
        False,
        "model.use_liger_kernel",
        "layers of the model alone: the head and the losses are ours",
        convert=flag,
    ),
    same("gradient_checkpointing", False, "model.gradient_checkpointing", convert=flag),
    same("metric_for_best_model", None, "train.metric_for_best_model"),
    same("greater_is_better", None, "train.greater_is_better", convert=flag),
    same("load_best_model_at_end", False, "train.load_best_model_at_end", convert=flag),
    same("ddp_timeout", 1800, "parallel.timeout_minutes", "seconds there", convert=_minutes),
    same("save_total_limit", None, "train.save_total_limit", "none: all stay", convert=int),
    joint("per_device_train_batch_size", 8, "train.micro_batch_size, train.global_batch_size"),
    joint("gradient_accumulation_steps", 1, "train.global_batch_size"),
    joint("warmup_steps", 0, "train.warmup_steps", "below 1 it is a share: train.warmup_ratio"),
    joint("bf16", False, "model.dtype", "weights too; AdamW keeps a copy in fp32"),
    joint("fp16", False, "model.dtype", "bf16 in its place, which needs no loss scaling"),
    joint("logging_strategy", "steps", "log.logging_steps"),
    joint("logging_steps", 500, "log.logging_steps"),
    joint("eval_strategy", "no", "data.eval, train.eval_steps", "no: the start and the end"),
    joint("eval_steps", None, "train.eval_steps"),
    joint("save_strategy", "steps", "train.save_steps"),
    joint("save_steps", 500, "train.save_steps"),
    joint("save_only_model", False, "train.save_model", "a checkpoint has AdamW's states as well"),
    joint("report_to", "none", "log.report_to"),
    joint("push_to_hub", False, "train.push_to_hub"),
    joint("hub_model_id", None, "train.hub_model_id", "the name of train.output_dir without it"),
    joint("hub_private_repo", None, "train.hub_private_repo"),
    joint("hub_revision", None, "train.hub_revision"),
    joint("hub_strategy", "every_save", "train.hub_strategy", "end is the default here"),
    *needless("a checkpoint waits until the one before is uploaded", hub_always_push=False),
    Option("hub_token", note="set HF_TOKEN, or `hf auth login`: no key has it", secret=True),
    joint("deepspeed", None, "parallel", "its ZeRO stage, offloads and tuned sizes"),
    joint("fsdp", None, "parallel.zero_stage", "ZeRO stage 3, which shards the same things"),
    joint("fsdp_config", None, "parallel.zero_stage"),
    *lost(
        "steps are of rows that train.seed shuffles; there is no seed for it alone", data_seed=None
    ),
    *lost("noise on embeddings is not there", neftune_noise_alpha=None),
    *lost("it smooths over the vocabulary, which no loss here does", label_smoothing_factor=0.0),
    *lost("AdamW has no further arguments", optim_args=None, optim_target_modules=None),
    *lost(
        "layers are compiled with torch.compile's defaults",
        torch_compile_backend=None,
        torch_compile_mode=None,
    ),
    *lost("its kernels are chosen by liger-kernel itself", liger_kernel_config=None),
    *lost(
        "the batch size stays as it is; dpo-fast doctor reckons memory", auto_find_batch_size=False
    ),
    *lost("evaluations begin at the start", eval_delay=0),
    *lost("runs here are exact without it, but for kernels of CUDA", full_determinism=False),
    *lost("a machine without a GPU trains on its CPU", use_cpu=False),
    *lost("accelerate is not used", accelerator_config=None, parallelism_config=None),
    *lost("the last, smaller batch of an epoch is trained as well", dataloader_drop_last=False),
    *lost("a resumed run goes on exactly where it ended", ignore_data_skip=False),
    *lost("batches are drawn at random, by train.seed", train_sampling_strategy="random"),
    joint("project", "huggingface", "log.project", "of trackio alone, there"),
    *lost(
        "trackio's own variables hold: TRACKIO_SPACE_ID, TRACKIO_BUCKET_ID",
        trackio_space_id=None,
        trackio_bucket_id=None,
        trackio_static_space_id=None,
    ),
    *needless(
        "evaluations take batches of train.micro_batch_size, which changes no value",
        per_device_eval_batch_size=8,
        eval_accumulation_steps=None,
        batch_eval_metrics=False,
        eval_do_concat_batches=True,
        eval_use_gather_object=False,
        prediction_loss_only=False,
        include_for_metrics=[],
    ),
    *needless(
        "a run evaluates before its first step wherever it has evaluation data", eval_on_start=False
    ),
    *needless("the first step is always logged", logging_first_step=False),
    *needless(
        "the loss of the whole global batch is divided once, by its rows or tokens",
        average_tokens_across_devices=True,
    ),
    *needless(
        "no loader stands between data and training: rows are tokenised once, by data.workers",
        dataloader_num_workers=0,
        dataloader_pin_memory=True,
        dataloader_persistent_workers=False,
        dataloader_prefetch_factor=None,
        dataloader_multiprocessing_context=None,
        dataloader_in_order=True,
        remove_unused_columns=True,
        label_names=None,
        length_column_name="length",
    ),
    *needless(
        "DeepSpeed takes the place of DDP",
        ddp_find_unused_parameters=None,
        ddp_bucket_cap_mb=None,
        ddp_broadcast_buffers=None,
        ddp_static_graph=None,
        ddp_backend=None,
        local_rank=-1,
    ),
    *needless(
        "recomputation is always by torch's non-reentrant checkpoints, which change no value",
        gradient_checkpointing_kwargs=None,
        activation_checkpointing=None,
        activation_checkpointing_kwargs=None,
    ),
    *needless(
        "it changes how fast products of fp32 are, and PyTorch's own setting holds",
        tf32=None,
        bf16_full_eval=False,
        fp16_full_eval=False,
    ),
    *needless("no key-value cache is kept in training", use_cache=False),
    *needless("memory is not fragmented by logits", torch_empty_cache_steps=None),
    *needless(
        "what a run prints is `--quiet` or not; a loss that is not finite ends it (train.nonfinite)",
        log_on_each_node=True,
        logging_nan_inf_filter=True,
        include_num_input_tokens_seen="no",
        log_level="passive",
        log_level_replica="warning",
        disable_tqdm=None,
        debug="",
        skip_memory_metrics=True,
    ),
    *needless(
        "checkpoints are whole for every rank; signals end a run with one",
        save_on_each_node=False,
        enable_jit_checkpoint=False,
        restore_callback_states_from_checkpoint=False,
    ),
    *needless("the command says what is done", do_train=False, do_eval=False, do_predict=False),
    *older(
        same("warmup_ratio", 0.0, "train.warmup_ratio"),
        joint(
            "evaluation_strategy",
            None,
            "data.eval, train.eval_steps",
            "eval_strategy, as it was called",
        ),
        *needless("micro-batches are filled with rows of like lengths", group_by_length=False),
        *needless("the report and metrics.jsonl lie in train.output_dir", logging_dir=None),
        *needless("models are always safetensors", save_safetensors=True),
        *needless(FOUND, no_cuda=False, fp16_opt_level="O1", half_precision_backend="auto"),
        joint("overwrite_output_dir", False, "train.overwrite_output_dir"),
        joint("push_to_hub_model_id", None, "train.hub_model_id", "hub_model_id, as it was called"),
        joint("push_to_hub_organization", None, "train.hub_model_id"),
        Option(
            "push_to_hub_token", note="set HF_TOKEN, or `hf auth login`: no key has it", secret=True
        ),
    ),
]
