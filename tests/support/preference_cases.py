"""Jobs of ranks: two steps of `PreferenceTrainer` over eight pairs, by DDP or DeepSpeed.

A case names a reference, or an adapter that is trained further and is its own reference.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dpo_fast.integrations.transformers import PreferenceTrainer
from dpo_fast.losses import LossOptions, Objective
from dpo_fast.training import distributed
from tests.support.models import LIKE_SGD


def forget() -> None:
    """accelerate's states are one to a process, and here come several trainers."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    PartialState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def write_losses(cases: dict[str, dict], file: str) -> None:
    """The losses of the cases, by name, to a file."""
    found = {}
    try:
        for name, case in cases.items():
            forget()
            found[name] = losses(case, Path(file).with_suffix(".run"))
    finally:
        forget()
    if distributed.is_main():
        Path(file).write_text(json.dumps(found))


def losses(case: dict, output: Path) -> list[float]:
    model, reference = AutoModelForCausalLM.from_pretrained(case["model"]), None
    args = arguments(case["stage"], output)
    if "adapter" in case:
        model = PeftModel.from_pretrained(model, case["adapter"], is_trainable=True)
    else:
        reference = AutoModelForCausalLM.from_pretrained(case["reference"])
    trainer = PreferenceTrainer(
        model,
        args,
        objective=Objective(("sigmoid", "sft"), (1.0, 0.5), LossOptions(beta=0.3)),
        reference=reference,
        train_dataset=case["rows"][:8],
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def arguments(stage: int | None, output: Path) -> TrainingArguments:
    """stage: of ZeRO; None for DDP."""
    adam = {"lr": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    zero = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": adam},
    }
    return TrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        max_steps=2,
        num_train_epochs=2,
        lr_scheduler_type="constant",
        **LIKE_SGD,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=4 // distributed.world_size(),
        gradient_accumulation_steps=2,
        deepspeed=zero if stage else None,
    )
