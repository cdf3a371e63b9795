"""Tokenizers and processors as files: images are treated as what was handed over says, or it is told."""

import pytest

pytest.importorskip("deepspeed")

from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from dpo_fast import PreferenceRun
from dpo_fast.api.processing import tokenizer_folder
from dpo_fast.data.images.processor import load_processor
from dpo_fast.errors import UserError
from tests.support.image_models import FAMILIES
from tests.support.image_rows import picture
from tests.support.image_runs import write_image_model


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    assert "gemma3" in FAMILIES
    return write_image_model(tmp_path_factory.mktemp("processing") / "gemma3", "gemma3")


@pytest.fixture(scope="module")
def rows():
    def row(index):
        asked = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": asked}]
        answers = [[{"role": "assistant", "content": each}] for each in ("a cat", "no idea")]
        names = ("prompt", "chosen", "rejected", "images")
        return dict(zip(names, (prompt, *answers, [picture(index)])))

    return [row(index) for index in range(4)]


def test_rows_as_trls_vision_trainer_takes_them_train_a_model_in_memory(gemma, rows, tmp_path):
    """A plain system text beside parts, images of Pillow's, and no processor: it lies with the model."""
    options = {"global_batch_size": 2, "max_length": 128, "train.max_steps": 1}
    losses = []
    for name, processing in (("own", None), ("tokenizer", AutoTokenizer.from_pretrained(gemma))):
        model = AutoModelForImageTextToText.from_pretrained(gemma)
        run = PreferenceRun(
            model,
            train_dataset=rows,
            processing_class=processing,
            output_dir=str(tmp_path / name),
            **options,
        )
        losses.append(run.train().metrics[-1]["loss"])
        assert AutoProcessor.from_pretrained(run.output_dir / "final").image_processor
    assert losses[0] == losses[1] == pytest.approx(0.6931, abs=1e-3)
    assert run.evaluate(rows[:2])["eval_loss"] > 0


def test_a_processor_beside_a_models_path_is_the_one_that_lies_there_or_is_refused(gemma, tmp_path):
    processor = AutoProcessor.from_pretrained(gemma)
    saved = tokenizer_folder(processor, tmp_path, str(gemma))
    assert (saved / "tokenizer.json").is_file() and not (saved / "processor_config.json").exists()
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(UserError, match=r"image_mean=\[0.1, 0.2, 0.3\].*set data.images_kwargs"):
        tokenizer_folder(processor, tmp_path, str(gemma))
    model = AutoModelForImageTextToText.from_pretrained(gemma)
    run = PreferenceRun(model, processing_class=processor, output_dir=str(tmp_path / "run"))
    path = run._path_of("model", model)
    own = load_processor(
        {"pretrained_model_name_or_path": path}, AutoTokenizer.from_pretrained(path), path
    )
    assert list(own.image_processor.image_mean) == [0.1, 0.2, 0.3]


def test_a_model_that_nobody_knows_a_tokenizer_of_is_told(gemma, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(gemma)
    for where, message in (("", "does not say where"), (str(tmp_path), "no tokenizer can be")):
        model.config._name_or_path = where
        run = PreferenceRun(model, output_dir=str(tmp_path / "run"))
        with pytest.raises(UserError, match=f"PreferenceRun: .*{message}.*processing_class"):
            run._path_of("model", model)
