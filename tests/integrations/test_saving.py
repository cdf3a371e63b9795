"""What `save_model` of the trainers writes: all that the model's checkpoint holds."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    TrainingArguments,
)

from dpo_fast.integrations.transformers import PreferenceTrainer
from tests.support.checkpoints import tensors_of, write_checkpoint

ROWS = [{"prompt": "Say", "chosen": " yes", "rejected": " no"}] * 4
IDS = torch.arange(5, 25)[None]
OPTIONS = {
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2, "save_steps": 1,
    "per_device_train_batch_size": 2, "learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The text model is loaded as a part of it, without what sees images."""
    return write_checkpoint(tmp_path_factory.mktemp("whole") / "in", "qwen3.5, image and text")


def trainer_of(kind, source, output, model=None, **options):
    model = AutoModelForCausalLM.from_pretrained(source) if model is None else model
    common = {
        "train_dataset": Dataset.from_list(ROWS),
        "processing_class": AutoTokenizer.from_pretrained(source),
    }
    reference = AutoModelForCausalLM.from_pretrained(source)
    if kind == "ours":
        args = TrainingArguments(str(output), **OPTIONS | options)
        # The model has dropout, which rows that sequences share cannot have.
        return PreferenceTrainer(model, args, reference=reference, layout="padded", **common)
    trl = pytest.importorskip("dpo_fast.integrations.trl")
    from trl import DPOConfig

    args = DPOConfig(str(output), **OPTIONS | {"gradient_checkpointing": False, "bf16": False})
    return trl.DPOTrainer(model, reference, args, **common)


@pytest.mark.parametrize("kind", ["ours", "trl"])
def test_what_the_text_model_lacks_is_saved_as_well(kind, source, tmp_path):
    trainer = trainer_of(kind, source, tmp_path / "run")
    trainer.model.config.use_cache = False
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert {k: (v.dtype, v.shape) for k, v in after.items()} == {
        k: (v.dtype, v.shape) for k, v in before.items()
    }
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "visual" in name}
    configs = [
        json.loads((each / "config.json").read_text()) for each in (source, tmp_path / "out")
    ]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    assert configs[1]["text_config"]["use_cache"] is False
    assert configs[0]["vision_config"] == configs[1]["vision_config"]
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert not list(tmp_path.glob("*.partial"))
    whole, found = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not found["missing_keys"]
    with torch.no_grad():
        trained = trainer.model.eval()
        expected = trained(input_ids=IDS, use_cache=False).logits
        logits = whole.eval()(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(logits, expected)


def test_a_folder_to_resume_from_has_the_names_of_the_class(source, tmp_path):
    trainer_of("ours", source, tmp_path / "run").train()
    last = tmp_path / "run" / "checkpoint-2"
    assert len(tensors_of(last)) < len(tensors_of(source))
    again = trainer_of("ours", source, tmp_path / "run", max_steps=3, num_train_epochs=3)
    again.train(resume_from_checkpoint=str(last))
    assert again.state.global_step == 3


def test_a_model_with_fewer_layers_is_saved_as_it_is(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source)
    del model.model.layers[1]
    model.config.num_hidden_layers, model.config.layer_types = 1, model.config.layer_types[:1]
    trainer = trainer_of("ours", source, tmp_path / "run", model)
    with pytest.warns(UserWarning, match="was changed after it was loaded"):
        trainer.save_model(str(tmp_path / "out"))
    assert not any("visual" in name for name in tensors_of(tmp_path / "out"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
