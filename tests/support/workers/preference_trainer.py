"""Two steps of `PreferenceTrainer` over eight pairs, on one rank or several. Started by a test.

The case names a reference, or an adapter that is trained further and is its own reference.
"""

import json
import os
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainingArguments

from dpo_fast.integrations.transformers import PreferenceTrainer
from dpo_fast.losses import LossOptions, Objective
from dpo_fast.training.distributed import leave_out_shm_comm
from tests.support.models import LIKE_SGD


def main() -> None:
    leave_out_shm_comm()
    folder = Path(sys.argv[1])
    case = json.loads((folder / "case.json").read_text())
    world = int(os.environ["WORLD_SIZE"])
    adam = {"lr": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    zero = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": case["stage"]},
        "optimizer": {"type": "AdamW", "params": adam},
    }
    args = TrainingArguments(
        output_dir=str(folder / "run"),
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
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=2,
        deepspeed=zero if case["stage"] else None,
    )
    model, reference = AutoModelForCausalLM.from_pretrained(case["model"]), None
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
    if args.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / "losses.json").write_text(json.dumps(losses))
    torch.distributed.barrier()
    # gloo's threads may still hold tensors when the interpreter is torn down, which then aborts.
    sys.stdout.flush()
    os._exit(0)


main()
