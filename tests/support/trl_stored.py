"""A job of one rank: our TRL trainer under ZeRO-3 for one model after the other, with stored references."""

import json
from pathlib import Path

import trl
from datasets import Dataset
from transformers import AutoTokenizer

from dpo_fast.integrations.trl import DPOTrainer
from tests.support.preference_cases import forget

ADAM = {"lr": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": ADAM},
}


def first_loss(folder: Path, model: str) -> float:
    args = trl.DPOConfig(
        output_dir=str(folder / "run"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=4,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        precompute_ref_log_probs=True,
        deepspeed=ZERO,
    )
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_json(
            str(folder / "pairs.jsonl"), cache_dir=str(folder / "cache")
        ),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def write_first_losses(folder: str, models: list[str]) -> None:
    """The losses of the first steps, to `losses.json`. The models share one data set and one cache."""
    losses = []
    try:
        for model in models:
            forget()
            losses.append(first_loss(Path(folder), model))
    finally:
        forget()
    (Path(folder) / "losses.json").write_text(json.dumps(losses))
