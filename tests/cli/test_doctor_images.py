"""What the doctor says of a model that takes images."""

import json

from dpo_fast.cli.doctor_images import image_processing
from dpo_fast.cli.doctor_run import decisions, look
from dpo_fast.training.config import build_config
from tests.support.image_rows import QWEN, write_qwen
from tests.support.models import run_tree, write_model


def told(folder, **data):
    tree = run_tree(folder)
    tree["data"] = tree["data"] | data
    return {row.what: row[1:] for row in decisions(look(build_config(tree, "tree")))}.get("images")


def test_images_are_told_for_models_that_take_them(tmp_path):
    write_model(tmp_path / "model")
    assert told(tmp_path) is None
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    tokenizer = write_qwen(tmp_path / "model")
    token = tokenizer.convert_tokens_to_ids(QWEN[2])
    config |= {"vocab_size": len(tokenizer), "image_token_id": token}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    value, origin, why = told(tmp_path)
    assert (value, origin) == ("Qwen3VLProcessor", "default")
    assert "rows may have images: 54 tokens for 640x480, " in why
    value, origin, why = told(tmp_path, images_kwargs={"max_pixels": 1024})
    assert origin == "option" and "12 tokens for 640x480" in why
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    tree = build_config(run_tree(tmp_path), "tree")
    assert image_processing(tree).name == "none"
