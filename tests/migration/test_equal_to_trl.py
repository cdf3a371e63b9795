"""One file, TRL's trainer with it and ours with what it was turned into: the same losses, step by step."""

import json

import pytest
import yaml

pytest.importorskip("trl")

import trl
from datasets import Dataset
from transformers import AutoTokenizer

from dpo_fast.migration.importers import import_file
from tests.support import ranks
from tests.support.metrics import series
from tests.support.models import write_model, write_pairs

pytestmark = [pytest.mark.processes, pytest.mark.peers]

PAIRS = 16
THEIRS = {  # a batch holds all pairs, so their order is nothing; rows of 40 tokens and more are cut
    "output_dir": "run",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 4,
    "learning_rate": "1e-2",
    "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
    "adam_epsilon": "1e-3",
    "weight_decay": 0.1,
    "beta": 0.2,
    "loss_type": "hinge",
    "max_length": 40,
    "bf16": False,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
}


def test_the_same_losses(tmp_path):
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", count=PAIRS)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert max(len(row["prompt"] + row["chosen"]) for row in rows) > 45
    places = {"model_name_or_path": f"{tmp_path}/model", "dataset_name": f"{tmp_path}/pairs.jsonl"}
    file = tmp_path / "trl.yaml"
    file.write_text(yaml.safe_dump(THEIRS | places | {"output_dir": f"{tmp_path}/ours"}))
    ranks.train([import_file("trl", file).tree()])

    options = THEIRS | {"output_dir": f"{tmp_path}/theirs", "use_cpu": True, "disable_tqdm": True}
    options |= {name: float(options[name]) for name in ("learning_rate", "adam_epsilon")}
    trainer = trl.DPOTrainer(
        model=f"{tmp_path}/model",
        args=trl.DPOConfig(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    ours = list(series(tmp_path / "ours").values())
    assert len(ours) == len(theirs) == 4 and ours[-1] < 0.9 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-4)
