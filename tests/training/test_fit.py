"""Model, tokenizer and data that do not belong together."""

from types import SimpleNamespace

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("deepspeed")

from dpo_fast.errors import UserError
from dpo_fast.training.fit import check_positions, check_vocabulary


def model(config):
    return SimpleNamespace(causal_lm=SimpleNamespace(config=config))


def longest(tokens: int):
    return [SimpleNamespace(longest=tokens)]


def test_more_tokens_than_positions():
    llama = model(transformers.LlamaConfig(max_position_embeddings=64))
    check_positions(llama, longest(64))
    with pytest.raises(UserError, match="65 tokens, .* 64 positions .* data.max_length=64"):
        check_positions(llama, [*longest(3), *longest(65)])


def test_longrope_is_refused_where_it_would_make_log_probs_depend_on_the_batch():
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32,
        "rope_theta": 1e4,
    }
    phi = model(
        transformers.Phi3Config(
            hidden_size=32,
            num_attention_heads=4,
            max_position_embeddings=64,
            rope_parameters=rope,
            original_max_position_embeddings=32,
            pad_token_id=0,
        )
    )
    check_positions(phi, longest(32))
    with pytest.raises(UserError, match="33 tokens; beyond 32 .* data.max_length=32"):
        check_positions(phi, longest(33))


def test_a_tokenizer_larger_than_the_vocabulary():
    llama = model(transformers.LlamaConfig(vocab_size=10))
    check_vocabulary(llama, range(10))
    with pytest.raises(UserError, match="11 tokens, the model a vocabulary of 10"):
        check_vocabulary(llama, range(11))


@pytest.mark.parametrize("option", ["reference.path", "reference.old_path"])
def test_a_second_model_is_held_to_the_same(monkeypatch, option):
    from dpo_fast.references import ReferenceModel
    from dpo_fast.training import references

    second = model(transformers.LlamaConfig(vocab_size=10, max_position_embeddings=64))
    monkeypatch.setattr(references, "load_reference_engine", lambda *_: second)
    monkeypatch.setattr(references, "load_tokenizer", lambda _: range(tokens))
    config, named = SimpleNamespace(model=None), ReferenceModel("second", option)

    def load(length: int):
        return references.load_second_model(config, None, {}, "cpu", longest(length), named)

    tokens = 10
    assert load(64) is second
    with pytest.raises(UserError, match="64 positions"):
        load(65)
    tokens = 11
    with pytest.raises(UserError, match=f"vocabulary of 10.*check {option} and"):
        load(64)


def test_every_model_is_read_once_and_one_layout_serves_all(monkeypatch, tmp_path):
    """The policy, the reference and what wrote the completions, of which the last shares no rows."""
    from dpo_fast.training import fit
    from dpo_fast.training.config import build_config
    from tests.support.models import run_tree, write_groups, write_model

    for name in ("model", "near", "far"):
        write_model(tmp_path / name)
    write_groups(tmp_path / "pairs.jsonl", 4)
    reference = {"provider": "frozen"} | {
        option: str(tmp_path / name) for option, name in (("path", "near"), ("old_path", "far"))
    }
    grpo = {"type": "grpo", "grpo_beta": 0.1}
    config = build_config(run_tree(tmp_path) | {"loss": grpo, "reference": reference}, "tree")
    read, load = [], fit.load_skeleton

    def load_skeleton(section, *option):
        read.append(section.path)
        model = load(section, *option)
        model._supports_attention_backend = not section.path.endswith("far")
        return model

    monkeypatch.setattr(fit, "load_skeleton", load_skeleton)
    choices = fit.check_run(config)
    assert read == [str(tmp_path / name) for name in ("model", "near", "far")]
    assert choices.layout.name == "padded" and "AttentionInterface" in choices.layout.reason
    assert [choices.attention_of(model).name for model in config.second_models] == ["sdpa"] * 2
    train = config.train.model_copy(update={"layout": "packed"})
    with pytest.raises(UserError, match="train.layout=packed cannot be honoured"):
        fit.check_run(config.model_copy(update={"train": train}))
