"""What is read beside the weights."""

import base64
import json

import pytest

from dpo_fast.data.config import DataConfig
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.errors import UserError
from dpo_fast.models import end_of_turn_ids, load, load_tokenizer
from dpo_fast.models.config import ModelSection
from tests.support.models import write_model
from tests.support.tokenizers import EOS, IM_END


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        ([EOS, IM_END], EOS, [EOS, IM_END]),
        (IM_END, EOS, [IM_END]),
        (None, [EOS, IM_END], [EOS, IM_END]),
        (None, EOS, [EOS]),
        (None, None, []),
    ],
)
def test_ids_at_which_the_model_stops(tmp_path, generation, config, expected):
    folder = write_model(tmp_path / "model")
    for name, ids in (("generation_config.json", generation), ("config.json", config)):
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(tree | {"eos_token_id": ids}))
    assert end_of_turn_ids(ModelSection(path=str(folder))) == expected
    (folder / "generation_config.json").unlink()
    fallback = [config] if isinstance(config, int) else config or []
    assert end_of_turn_ids(ModelSection(path=str(folder))) == fallback


def test_no_model_there_leaves_the_error_to_the_loader(tmp_path):
    assert end_of_turn_ids(ModelSection(path=str(tmp_path))) == []


class MistralCommonBackend:
    """What transformers gives for a Mistral folder where the package mistral-common is installed."""


@pytest.mark.parametrize("common", [False, True])
def test_mistral_tokenizers_come_in_the_form_of_transformers(tmp_path, monkeypatch, common):
    section = ModelSection(path=str(write_model(tmp_path / "model")))
    (tmp_path / "model" / "tekken.json").write_text("{}")
    original = load.AutoTokenizer.from_pretrained

    def from_pretrained(path, mistral_format=None, **options):
        plain = mistral_format is False or not common
        return original(path, **options) if plain else MistralCommonBackend()

    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", from_pretrained)
    tokenizer = load_tokenizer(section)
    assert tokenizer("ab")["input_ids"] == original(section.path)("ab")["input_ids"]


def test_a_tokenizer_of_mistral_common_names_the_remedy():
    with pytest.raises(UserError, match="mistral-common.*mistral_format=False"):
        RowTokeniser(MistralCommonBackend(), DataConfig(train="f"))


def test_a_folder_with_mistrals_vocabulary_alone(tmp_path):
    folder = write_model(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
    tokens = [bytes([byte]) for byte in range(256)]
    tekken = {
        "config": {
            "pattern": "[a-z]+| ?[^ ]",
            "num_vocab_tokens": 256,
            "default_vocab_size": 256 + len(special),
            "default_num_special_tokens": len(special),
            "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate(tokens)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True}
            for rank, token in enumerate(special)
        ],
    }
    (folder / "tekken.json").write_text(json.dumps(tekken))
    tokenizer = load_tokenizer(ModelSection(path=str(folder)))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    ids = tokenizer("[INST]ab[/INST]", add_special_tokens=False)["input_ids"]
    assert ids == [3, 97 + len(special), 98 + len(special), 4]
