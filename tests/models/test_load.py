"""What is read beside the weights."""

import base64
import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_fast.data.batch import collate_trees
from dpo_fast.data.config import DataConfig
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.errors import UserError
from dpo_fast.models import end_of_turn_ids, load, load_model, load_tokenizer
from dpo_fast.models.checkpoint import check_weights
from dpo_fast.models.config import ModelSection
from dpo_fast.models.experts import DRAWING
from dpo_fast.models.scoring import forward_arguments
from tests.support.architectures import TREES
from tests.support.damage import Planted
from tests.support.mixtures import mixture
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

    def from_pretrained(mistral_format=None, **options):
        plain = mistral_format is False or not common
        return original(**options) if plain else MistralCommonBackend()

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


def planted(folder, name: str) -> None:
    """The weights of a model folder as a pickle that would run code, under this name."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors | {"planted": Planted(folder / "ran")}, folder / name)
    if "-of-" in name:
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_a_pickle_in_a_model_folder_is_told_and_does_not_run(tmp_path, name):
    folder = write_model(tmp_path / "model")
    planted(folder, name)
    said = f"{name} is damaged, or holds Python objects beside tensors, which could run code"
    with pytest.raises(UserError, match=said):
        load.load_skeleton(ModelSection(path=str(folder)))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(folder)})
    )
    torch.save({"a": Planted(tmp_path / "ran")}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin is damaged, or holds Python objects"):
        check_weights(str(adapter))
    assert not list(tmp_path.rglob("ran"))
    torch.load(adapter / "adapter_model.bin", weights_only=False)
    assert list(tmp_path.rglob("ran")), "the pickle would not have run: nothing was tested"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-100], "no whole safetensors file: it has"),
        (lambda content: content.replace(b'"dtype"', b'"dtyqe"', 1), "a tensor has no dtype"),
        (lambda content: b"\xff" * 8 + content[8:], "it is shorter than its header"),
    ],
)
def test_damaged_weights_are_told(tmp_path, damage, said):
    file = write_model(tmp_path / "model") / "model.safetensors"
    check_weights(str(file.parent))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=said):
        load.load_skeleton(ModelSection(path=str(file.parent)))


def test_a_skeleton_is_whole_where_another_model_is_loaded_at_zero_3(tmp_path):
    """As the reference of an evaluation in bf16 is: its fp32 buffers are looked up in its skeleton."""
    from transformers.integrations import HfDeepSpeedConfig

    folder = write_model(tmp_path / "model")
    lives = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    assert lives.is_zero3() and load.is_deepspeed_zero3_enabled()
    found = load.load_skeleton(ModelSection(path=str(folder)))
    assert load.is_deepspeed_zero3_enabled()  # and the other model's loading goes on as before
    assert found.lm_head.weight.is_meta and not hasattr(found.lm_head.weight, "ds_id")


def test_a_checkpoint_without_some_weights_is_no_model(tmp_path):
    """transformers would fill them with random numbers, and say so in a table that nobody reads."""
    folder = write_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    section = ModelSection(path=str(folder), dtype="fp32")
    for kept, told in (
        ({k: v for k, v in tensors.items() if k != "lm_head.weight"}, "1 of .*lm_head.weight,"),
        ({f"policy.{k}": v for k, v in tensors.items()}, "21 of .*lm_head.weight, model.embed"),
    ):
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"model.path={folder}: the files lack {told}"):
            load_model(section, attention="eager")


def test_a_tied_head_need_not_be_stored(tmp_path):
    folder = write_model(tmp_path / "model", tied=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_model(ModelSection(path=str(folder), dtype="fp32"), attention="eager")


def test_experts_are_not_drawn_in_training(tmp_path):
    """PhiMoE's routers draw experts at random in training: two passes over the same tokens would differ."""
    mixture("phimoe").save_pretrained(tmp_path)
    scoring = load_model(ModelSection(path=str(tmp_path), dtype="fp32"), attention="eager")
    batch = forward_arguments(collate_trees(TREES, "padded"))
    evaluated = scoring.eval()(**batch)["logp"]
    for model in (scoring.train(), copy.deepcopy(scoring).train()):
        assert torch.equal(model(**batch)["logp"], evaluated)
        assert model.training and model.causal_lm.model.layers[0].training
    routers = [module for module in scoring.modules() if type(module).__name__ in DRAWING]
    assert len(routers) == 2 and not any(each.training for each in routers)
