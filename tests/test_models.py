"""The scoring model against transformers' own logits, for architectures that treat them differently."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from dpo_fast.data.layouts import collate
from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel, check_packing, choose_attention
from dpo_fast.models.attention import PACKED
from dpo_fast.models.scoring import forward_arguments

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "phi3": ("Phi3Config", {}),
    "phi, bias in the head": ("PhiConfig", {}),
    "gemma2, soft cap": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 0.7}),
    "cohere, logit scale": ("CohereConfig", {"logit_scale": 0.3}),
    "granite, logits scaling": ("GraniteConfig", {"logits_scaling": 3.0}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
}
PAIRS = [
    {"prompt_ids": [1, 5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 2]},
    {"prompt_ids": [1, 90], "chosen_ids": [11, 2], "rejected_ids": [12, 13, 14, 15, 2]},
]


def make(name: str, attention: str):
    config_name, changes = ARCHITECTURES[name]
    config = getattr(transformers, config_name)(**(SIZES | changes))
    for dropout in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():  # sharp logits, and a bias that is not zero
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_the_models_own_logits(name, layout):
    if name.startswith("gemma2") and layout == "packed":
        with pytest.raises(UserError, match="soft cap"):
            model = ScoringModel(make(name, PACKED).eval())
            model(**forward_arguments(collate(PAIRS, layout)))
        return
    attention = "eager" if layout == "padded" else PACKED
    model = make(name, attention).eval()
    expected = []
    for pair in PAIRS:
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([pair["prompt_ids"] + pair[side]])
            logp = model(ids, use_cache=False).logits[0].log_softmax(-1)
            start = len(pair["prompt_ids"])
            expected.append(logp[start - 1 : -1].gather(1, ids[0, start:, None]).squeeze(1))
    expected = torch.cat(expected)
    gradients = torch.autograd.grad(
        expected.sum(), list(model.parameters()), allow_unused=True, retain_graph=True
    )
    scoring = ScoringModel(model)
    scores = scoring(**forward_arguments(collate(PAIRS, layout)))["logp"]
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=2e-5)
    again = torch.autograd.grad(scores.sum(), list(model.parameters()), allow_unused=True)
    for a, b in zip(gradients, again):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def test_packed_sequences_do_not_see_each_other():
    """Changing one sequence leaves the scores of the others bitwise alone."""
    scoring = ScoringModel(make("llama", PACKED).eval())
    other = [PAIRS[0], {**PAIRS[1], "chosen_ids": [50, 51]}]
    a, b = (
        scoring(**forward_arguments(collate(pairs, "packed")))["logp"] for pairs in (PAIRS, other)
    )
    kept = [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    torch.testing.assert_close(a[kept], b[kept], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(a[5:7], b[5:7], atol=1e-3)


def test_sliding_window_is_refused_when_it_matters():
    config = transformers.MistralConfig(**(SIZES | {"sliding_window": 4}))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    with pytest.raises(UserError, match=r"sliding window of 4 .* train.layout=padded"):
        ScoringModel(model)(**forward_arguments(collate(PAIRS, "packed")))


@pytest.mark.parametrize(
    ("config_name", "reason"),
    [
        ("MambaConfig", "carry state"),
        ("JambaConfig", "carry state"),
        ("Lfm2Config", "carry state"),
        ("BloomConfig", "AttentionInterface"),
        ("GPTJConfig", "AttentionInterface"),
        ("RwkvConfig", "carry state"),
    ],
)
def test_architectures_that_cannot_be_packed_are_refused(config_name, reason):
    changes = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 97}
    if config_name == "GPTJConfig":
        changes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 97}
    if config_name == "Lfm2Config":
        changes["layer_types"] = ["conv", "full_attention"]
    config = getattr(transformers, config_name)(**changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=rf"train.layout=packed .*{reason}.* train.layout=padded"):
        check_packing(model)


def test_attention_models_can_be_packed():
    for name in ARCHITECTURES:
        check_packing(make(name, "eager"))


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


def test_the_model_still_generates():
    model = make("llama", "sdpa").eval()
    expected = model.generate(torch.tensor([[1, 5]]), max_new_tokens=4, do_sample=False)
    ScoringModel(model)
    got = model.generate(torch.tensor([[1, 5]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(got, expected)


def test_extras_come_with_the_scores():
    scoring = ScoringModel(make("llama", "sdpa").eval())
    batch = collate(PAIRS, "padded")
    scores = scoring(**forward_arguments(batch), extras=("entropy", "is_top1"))
    assert set(scores) == {"logp", "entropy", "is_top1"}
    assert all(len(value) == len(batch.rows_T) for value in scores.values())


@pytest.mark.parametrize(
    ("requested", "layout", "expected"),
    [
        ("auto", "padded", "sdpa"),
        ("eager", "padded", "eager"),
        ("auto", "packed", PACKED),
        ("sdpa", "packed", PACKED),
    ],
)
def test_attention_on_a_cpu(requested, layout, expected):
    assert choose_attention(requested, layout, torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("requested", "layout"), [("eager", "packed"), ("flash_attention_2", "padded")]
)
def test_attention_that_cannot_be_honoured(requested, layout):
    with pytest.raises(UserError, match=f"model.attention={requested}"):
        choose_attention(requested, layout, torch.device("cpu"))
