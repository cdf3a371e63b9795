"""Model, tokenizer and data that do not belong together."""

from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("deepspeed")

from dpo_fast.errors import UserError
from dpo_fast.models import precision
from dpo_fast.ops.cpu import Verdict
from dpo_fast.ops.dispatch import Choice
from dpo_fast.training import fit
from dpo_fast.training.config import build_config
from dpo_fast.training.engine import deepspeed_config
from dpo_fast.training.fit import check_positions, check_vocabulary
from tests.support.models import run_tree, write_groups, write_model


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
        model._is_stateful = section.path.endswith("far")  # as RWKV
        return model

    monkeypatch.setattr(fit, "load_skeleton", load_skeleton)
    choices = fit.check_run(config)
    assert read == [str(tmp_path / name) for name in ("model", "near", "far")]
    assert choices.layout.name == "padded" and "carry state" in choices.layout.reason
    assert [choices.attention_of(model).name for model in config.second_models] == ["sdpa"] * 2
    train = config.train.model_copy(update={"layout": "packed"})
    with pytest.raises(UserError, match="train.layout=packed cannot be honoured"):
        fit.check_run(config.model_copy(update={"train": train}))


@pytest.mark.parametrize("fast", [False, True])
def test_the_dtype_is_chosen_and_told(tmp_path, monkeypatch, fast):
    """auto becomes a name in what is written, so that a run goes on in the dtype that it began with."""
    write_model(tmp_path / "model")
    verdict = Verdict(fast, "this CPU is odd")
    monkeypatch.setattr(precision, "half_products", lambda dtype: verdict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tree, lines = run_tree(tmp_path), []
    del tree["model"]["dtype"]
    config = build_config(tree, "tree")
    assert config.resolved()["model"]["dtype"] == "auto"
    choices = fit.check_run(config)
    monkeypatch.setattr(fit, "say", lines.append)
    choices.tell()
    name = "bf16" if fast else "fp32"
    assert lines[0] == f"dtype {name}: this CPU is odd"
    assert choices.applied(config).resolved()["model"]["dtype"] == name
    assert fit.load_skeletons(config)[None].dtype == config.model.torch_dtype
    engine = deepspeed_config(config, world_size=1, accumulation=1)
    assert engine["bf16"]["enabled"] == fast
    tree["model"]["dtype"] = "bf16"
    named = fit.check_run(build_config(tree, "tree")).dtype
    assert named.name == "bf16" and ("slow here" in named.reason) == (not fast)


def test_ranks_that_choose_different_dtypes_are_stopped(monkeypatch):
    choices = fit.Choices(Choice("fp32", ""), Choice("packed", ""), {None: Choice("sdpa", "")})
    monkeypatch.setattr(fit.distributed, "any_rank", lambda flag: True)
    with pytest.raises(UserError, match="model.dtype=auto means bf16 on some ranks .* name one"):
        choices.tell()
