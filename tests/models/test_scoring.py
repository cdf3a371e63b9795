"""The scoring model against transformers' own logits, for architectures that treat them differently."""

import pytest
import torch
from safetensors.torch import save_file

transformers = pytest.importorskip("transformers")

from dpo_fast.data.batch import collate, collate_trees
from dpo_fast.errors import UserError
from dpo_fast.models import (
    Architecture,
    ScoringModel,
    architecture_of,
    choose_attention,
    choose_layout,
    load_model,
    read_architecture,
)
from dpo_fast.models.attention import NAMES
from dpo_fast.models.config import ModelSection
from dpo_fast.models.scoring import forward_arguments
from tests.support.architectures import ARCHITECTURES, SIZES, TREES, alone, make, slopes

PAIRS = [
    {"prompt_ids": [1, 5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 2]},
    {"prompt_ids": [1, 90], "chosen_ids": [11, 2], "rejected_ids": [12, 13, 14, 15, 2]},
]
CPU = torch.device("cpu")
PLAIN = Architecture("Plain", None, softcap=False, sinks=False)
CAPPED = Architecture("Capped", None, softcap=True, sinks=False)
SUNK = Architecture("Sunk", None, softcap=False, sinks=True)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padded_scores_are_those_of_the_models_own_logits(name):
    model = make(name)
    parameters = list(model.parameters())
    expected = alone(model)
    gradients = slopes(expected, parameters)
    scores = ScoringModel(model)(**forward_arguments(collate_trees(TREES, "padded")))["logp"]
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=2e-5)
    for a, b in zip(gradients, slopes(scores, parameters)):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("config_name", "reason"),
    [
        ("xLSTMConfig", "carry state"),
        ("OpenAIGPTConfig", "AttentionInterface"),
        ("FalconConfig", "AttentionInterface"),
        ("RwkvConfig", "carry state"),
    ],
)
def test_architectures_that_cannot_be_packed_are_refused(config_name, reason, tmp_path):
    changes = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 97}
    if config_name == "OpenAIGPTConfig":
        changes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97}
    if config_name == "FalconConfig":
        changes |= {"num_attention_heads": 4, "alibi": True}
    if config_name == "xLSTMConfig":
        changes |= {"num_heads": 4}
    config = getattr(transformers, config_name)(**changes)
    config.save_pretrained(tmp_path)
    save_file({"any": torch.zeros(1)}, tmp_path / "model.safetensors")  # no weight is read
    architecture = read_architecture(ModelSection(path=str(tmp_path)))
    for layout in ("packed", "shared_prefix"):
        with pytest.raises(
            UserError, match=rf"train.layout={layout} .*{reason}.* train.layout=pad"
        ):
            choose_layout(layout, architecture)
    chosen = choose_layout("auto", architecture)
    assert chosen.name == "padded" and reason in chosen.reason


def test_attention_models_share_prefixes():
    for name in ARCHITECTURES:
        architecture = architecture_of(make(name))
        assert choose_layout("auto", architecture).name == "shared_prefix"
        assert architecture.softcap == ("caps" in name) and architecture.sinks == ("sinks" in name)
        assert choose_layout("packed", architecture).name == "packed"


@pytest.mark.parametrize(
    ("config_name", "reason"),
    [("NemotronConfig", "does not get the keywords"), ("DogeConfig", "has a mask of its own")],
)
def test_attention_that_cannot_share_rows_is_found_before_weights_are_read(
    config_name, reason, monkeypatch
):
    monkeypatch.setattr("dpo_fast.models.handed.LAYERS", {})  # as a family that nobody knows
    config = getattr(transformers, config_name)(**SIZES)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    architecture = architecture_of(model)
    assert reason in architecture.obstacle
    assert choose_layout("auto", architecture).name == "padded"
    assert model.config._attn_implementation == "sdpa"


def test_a_model_without_positions_scores_padded():
    """Bloom knows places by a slope of its own and takes no position_ids."""
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=97)
    torch.manual_seed(0)
    model = transformers.BloomForCausalLM(config).eval()
    pair = PAIRS[1]
    ids = torch.tensor([pair["prompt_ids"] + pair["chosen_ids"]])
    logp = model(ids).logits[0].log_softmax(-1)
    expected = logp[1:-1].gather(1, ids[0, 2:, None]).squeeze(1)
    scores = ScoringModel(model)(**forward_arguments(collate(PAIRS, "padded")))["logp"]
    torch.testing.assert_close(scores[5:7], expected, rtol=1e-5, atol=1e-5)


ELSEWHERE = {  # models with attention of their own or none, and one whose decoder lies below another head
    "BloomConfig": {"n_layer": 2, "n_head": 4},
    "GPTJConfig": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "CodeGenConfig": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "MptConfig": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "MambaConfig": {"num_hidden_layers": 2},
    "NemotronConfig": SIZES,
    "DogeConfig": SIZES,
    "Llama4TextConfig": SIZES
    | {"num_local_experts": 2, "intermediate_size_mlp": 40, "head_dim": 8},
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_by_default_they_load_and_score_as_their_own_logits(name, tmp_path):
    sizes = {"vocab_size": 97, "hidden_size": 32} | ELSEWHERE[name]
    config = getattr(transformers, name)(**sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    expected = alone(model)
    section = ModelSection(path=str(tmp_path), dtype="fp32")
    architecture = read_architecture(section)
    layout = choose_layout("auto", architecture).name
    attention = choose_attention("auto", layout, CPU, torch.float32, architecture).name
    scoring = load_model(section, attention=attention).eval()
    batch = collate_trees(TREES, layout)
    with torch.no_grad():
        scores = scoring(**forward_arguments(batch))["logp"]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    trained = {name for name, p in scoring.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in scoring.named_parameters()}
    if not architecture.sdpa and layout == "padded":
        with pytest.raises(UserError, match="attention=sdpa does not serve .* set .*eager"):
            choose_attention("sdpa", layout, CPU, torch.float32, architecture)


def test_the_model_still_generates():
    model = make("llama", "sdpa")
    expected = model.generate(torch.tensor([[1, 5]]), max_new_tokens=4, do_sample=False)
    ScoringModel(model)
    got = model.generate(torch.tensor([[1, 5]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(got, expected)


def test_extras_come_with_the_scores():
    scoring = ScoringModel(make("llama", "sdpa"))
    batch = collate(PAIRS, "padded")
    scores = scoring(**forward_arguments(batch), extras=("entropy", "is_top1"))
    assert set(scores) == {"logp", "entropy", "is_top1"}
    assert all(len(value) == len(batch.rows_T) for value in scores.values())


@pytest.mark.parametrize(
    ("requested", "layout", "architecture", "expected"),
    [
        ("auto", "padded", PLAIN, "sdpa"),
        ("auto", "padded", CAPPED, "eager"),
        ("auto", "padded", SUNK, "eager"),
        ("eager", "padded", CAPPED, "eager"),
        ("auto", "packed", SUNK, NAMES["sdpa"]),
        ("sdpa", "shared_prefix", CAPPED, NAMES["sdpa"]),
    ],
)
def test_attention_on_a_cpu(requested, layout, architecture, expected):
    chosen = choose_attention(requested, layout, CPU, torch.float32, architecture)
    assert chosen.name == expected and chosen.reason


@pytest.mark.parametrize(
    ("requested", "layout", "device", "dtype", "architecture", "reason"),
    [
        ("eager", "packed", "cpu", torch.float32, PLAIN, "apart: set train.layout=padded"),
        ("flash_attention_2", "padded", "cpu", torch.float32, PLAIN, "does not run on a CPU"),
        ("flex_attention", "padded", "cpu", torch.float32, PLAIN, "does not train on a CPU"),
        ("flash_attention_2", "packed", "cpu", torch.bfloat16, PLAIN, "on a CPU: use auto or sdpa"),
        ("flex_attention", "packed", "cpu", torch.float32, PLAIN, "on a CPU: use auto or sdpa"),
        ("varlen", "shared_prefix", "cuda", torch.float32, PLAIN, "bf16 only: set model.dtype"),
        ("varlen", "shared_prefix", "cuda", torch.bfloat16, CAPPED, "soft-capped scores: set"),
        ("varlen", "packed", "cuda", torch.bfloat16, SUNK, "sinks: set model.attention=auto"),
        ("varlen", "padded", "cuda", torch.bfloat16, PLAIN, "set train.layout=packed"),
        ("flash_attention_2", "packed", "cuda", torch.bfloat16, SUNK, "sinks: set"),
        ("flash_attention_3", "packed", "cuda", torch.bfloat16, PLAIN, "needs flash-attn 3"),
        ("sdpa", "padded", "cpu", torch.float32, CAPPED, "would leave out the soft cap"),
    ],
)
def test_attention_that_cannot_be_honoured(requested, layout, device, dtype, architecture, reason):
    with pytest.raises(UserError, match=f"model.attention={requested} .*{reason}"):
        choose_attention(requested, layout, torch.device(device), dtype, architecture)


@pytest.mark.parametrize(
    ("dtype", "architecture", "expected"),
    [
        (torch.float32, PLAIN, "flex_attention"),
        (torch.bfloat16, SUNK, "flex_attention"),
        (torch.bfloat16, PLAIN, "varlen"),
    ],
)
def test_attention_on_a_gpu_without_flash_attn(dtype, architecture, expected, monkeypatch):
    from dpo_fast.models import architecture as module

    monkeypatch.setattr(module, "is_flash_attn_2_available", lambda: False)
    chosen = choose_attention("auto", "packed", torch.device("cuda"), dtype, architecture)
    assert chosen.name == NAMES[expected]
