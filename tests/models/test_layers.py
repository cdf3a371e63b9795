"""Layer options change how layers run and where weights wait, never the numbers."""

import json
import math
import os
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

transformers = pytest.importorskip("transformers")

from dpo_fast.cli.launch import launch_command
from dpo_fast.data.batch import collate
from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel, layers, load_model
from dpo_fast.models.attention import NAMES
from dpo_fast.models.config import LoraSection, ModelSection
from dpo_fast.models.lora import add_lora
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.training.config import build_config
from tests.support.liger import interpret_liger
from tests.support.models import run_tree, write_model, write_pairs
from tests.support.paths import ROOT

CPU = torch.device("cpu")
LAYOUTS = {"padded": "sdpa", "packed": NAMES["sdpa"], "shared_prefix": NAMES["sdpa"]}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def make(name: str = "Llama", layout: str = "packed", lora: bool = False, **changes):
    """A `ScoringModel` in training mode, its layers not yet changed."""
    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=LAYOUTS[layout]
    )
    scoring = ScoringModel(model.train())
    if lora:
        add_lora(scoring, LoraSection(r=2))
        for weight_name, weight in scoring.named_parameters():
            if "lora_B" in weight_name:  # it starts at zero, where lora_A has no gradient
                torch.nn.init.normal_(weight, std=0.1)
    return scoring


def batch(layout: str, count: int, seed: int = 0):
    """Pairs of lengths that no other seed has."""
    draw = torch.Generator().manual_seed(seed)

    def ids():
        size = int(torch.randint(2, 12, (), generator=draw))
        return torch.randint(97, (size,), generator=draw).tolist()

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return collate([{name: ids() for name in names} for _ in range(count)], layout)


def step(scoring: ScoringModel, *batches) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Log-probabilities of every batch, and the gradient of their weighted sum."""
    scoring.zero_grad()
    scores = [scoring(**forward_arguments(each))["logp"] for each in batches]
    for values in scores:
        (values * torch.linspace(-1, 2, len(values))).sum().backward()
    gradients = {n: p.grad.clone() for n, p in scoring.named_parameters() if p.requires_grad}
    return [values.detach() for values in scores], gradients


def assert_same(got, expected) -> None:
    for a, b in zip(got[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error = (got[1][name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, (name, error)


# Activation checkpointing


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("choice", "chosen"), [(None, {0, 1, 2}), (2, {0, 1}), ([2], {2}), ([2, 0, 2], {0, 2})]
)
def test_the_chosen_layers_alone_are_computed_again(choice, chosen, lora):
    scoring, data = make(lora=lora), batch("packed", 3)
    expected = step(scoring, data)
    layers.checkpoint_layers(scoring.causal_lm, choice)
    runs = [0, 0, 0]

    def count(index):
        def hook(*_):
            runs[index] += 1

        return hook

    for index, layer in enumerate(layers.decoder_layers(scoring.causal_lm)):
        layer.mlp.register_forward_pre_hook(count(index))
    assert_same(step(scoring, data), expected)
    assert runs == [2 if index in chosen else 1 for index in range(3)]


@pytest.mark.parametrize("choice", [4, [0, 3]])
def test_a_layer_that_is_not_there_is_an_error(choice):
    with torch.device("meta"):
        model = make().causal_lm
    section = ModelSection(path="x", checkpoint_layers=choice)
    with pytest.raises(UserError, match=r"checkpoint_layers=.* has 3 decoder layers.*0 to 2"):
        layers.check_layers(section, model, CPU)


BAD_SECTIONS = {
    "not checkpointed": ({"checkpoint_layers": 1, "gradient_checkpointing": False}, "remove one"),
    "no layer": ({"checkpoint_layers": 0}, "checkpoint_layers=0: expected how many"),
    "empty": ({"checkpoint_layers": []}, r"checkpoint_layers=\[\]: expected how many"),
    "negative": ({"checkpoint_layers": [1, -1]}, "indices from 0"),
    "a flag": ({"checkpoint_layers": True}, "valid integer"),
    "both": ({"use_liger_kernel": True, "torch_compile": True}, "choose one"),
}


@pytest.mark.parametrize("what", BAD_SECTIONS)
def test_sections_that_contradict_themselves(what):
    options, message = BAD_SECTIONS[what]
    with pytest.raises(ValueError, match=message):
        ModelSection(path="x", **options)


# torch.compile


class Counter:
    """A backend that compiles with AOTAutograd alone, and counts."""

    def __init__(self):
        self.compiled = 0

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.compiled += 1
        return aot_eager(graph, inputs)


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield Counter()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "checkpointed", "lora"),
    [("shared_prefix", True, False), ("packed", False, True), ("padded", False, False)],
)
def test_compiled_layers_give_the_same_and_compile_once(counter, layout, checkpointed, lora):
    """Other lengths, other numbers of pairs, other plans: nothing is compiled again."""
    batches = [batch(layout, count, seed) for seed, count in enumerate((2, 3, 5, 2, 4))]
    scoring = make(layout=layout, lora=lora)
    expected = step(scoring, *batches)
    names = list(scoring.state_dict())
    if checkpointed:
        layers.checkpoint_layers(scoring.causal_lm)
    layers.compile_layers(scoring.causal_lm, counter)
    step(scoring, batches[0])
    first = counter.compiled
    # Kinds of blocks, the two sides of attention, the layer's two norms; never once per layer.
    assert 3 <= first <= (8 if lora else 6)
    assert_same(step(scoring, *batches), expected)
    assert counter.compiled == first
    assert list(scoring.state_dict()) == names


def test_compilation_needs_a_compiler_and_whole_layers(monkeypatch, tmp_path):
    section = ModelSection(path="x", torch_compile=True)
    layers.check_layers(section, make().causal_lm, CPU)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="model.torch_compile=true.*C\\+\\+ compiler"):
        layers.check_layers(section, make().causal_lm, CPU)
    tree = run_tree(tmp_path)
    tree["model"]["torch_compile"] = True
    with pytest.raises(UserError, match="model.torch_compile=true .*zero_stage=3.*=2 or less"):
        build_config(tree | {"parallel": {"zero_stage": 3}}, "tree")
    build_config(tree | {"parallel": {"zero_stage": 2}}, "tree")
    build_config(tree, "tree")


# liger-kernel


@pytest.fixture
def liger(monkeypatch):
    """Runs in the interpreter, and is taken back afterwards."""
    pytest.importorskip("liger_kernel")
    interpret_liger(monkeypatch.setattr)
    for name in ("llama", "qwen2"):
        module = getattr(transformers.models, name)
        module = getattr(module, f"modeling_{name}")
        monkeypatch.setattr(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)


@pytest.mark.peers
@pytest.mark.parametrize(("name", "lora"), [("Llama", False), ("Qwen2", False), ("Llama", True)])
def test_liger_layers_give_the_same(liger, name, lora):
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    data = batch("shared_prefix", 1)
    scoring = make(name, "shared_prefix", lora, num_hidden_layers=2)
    expected = step(scoring, data)
    forward, names = scoring.causal_lm.forward, list(scoring.state_dict())
    layers.use_liger_kernel(scoring.causal_lm)
    layer = layers.decoder_layers(scoring.causal_lm)[1]
    assert layer.input_layernorm.forward.__func__ is LigerRMSNorm.forward
    assert layer.mlp._get_name() == "LigerSwiGLUMLP"
    assert scoring.causal_lm.forward == forward
    assert_same(step(scoring, data), expected)
    assert list(scoring.state_dict()) == names
    untouched = make(name, "shared_prefix", num_hidden_layers=2)
    assert "Liger" not in repr(untouched), "models without the option got it too"


@pytest.mark.peers
def test_a_model_is_loaded_with_liger_layers(liger, tmp_path):
    path = str(write_model(tmp_path / "model"))
    data = batch("packed", 1)
    plain, fused = (
        load_model(
            ModelSection(path=path, dtype="fp32", use_liger_kernel=use), attention=LAYOUTS["packed"]
        )
        for use in (False, True)
    )
    assert "Liger" in repr(fused) and "Liger" not in repr(plain)
    assert_same(step(fused, data), step(plain, data))


def refused(name: str = "Llama", device: torch.device = CPU, **changes) -> str:
    with torch.device("meta"):
        model = make(name, "padded", **changes).causal_lm
    section = ModelSection(path="x", use_liger_kernel=True)
    with pytest.raises(UserError, match="model.use_liger_kernel=true cannot be honoured") as told:
        layers.check_layers(section, model, device)
    return str(told.value)


@pytest.mark.peers
def test_liger_is_refused_where_it_would_not_do(monkeypatch):
    pytest.importorskip("liger_kernel")
    assert "no layers for models of type phi:" in refused("Phi")
    assert "swiglu computes silu, the model's activation is gelu" in refused(hidden_act="gelu")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "need a GPU" in refused()
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: None)
    assert "pip install liger-kernel" in refused()


# Offload, a sharded reference, adapters off: whole steps on two ranks


def cases(folder: Path) -> dict[str, dict]:
    other = {"provider": "frozen", "path": str(folder / "reference-model")}
    itself = {"provider": "frozen"}
    adapters = {"provider": "adapter_off"}
    lora = {"lora": {"r": 2}}
    mlps = {"lora": {"r": 2, "target_modules": ["down_proj"]}}
    tiles = {"tiled_mlp": 16, "activation_offloading": True}
    zero = lambda stage, **options: {"zero_stage": stage, **options}  # noqa: E731
    both = {"offload_optimizer": True, "offload_parameters": True}
    sections = {
        "2": (zero(2), other, {}, "packed"),
        "2, optimizer": (zero(2, offload_optimizer=True), other, {}, "packed"),
        "3": (zero(3), other, {}, "packed"),
        "3, both": (zero(3, **both), other, {}, "packed"),
        "3, reference": (zero(3), other | {"offload": True}, {}, "packed"),
        "3, all but the reference": (zero(3, **both), other | {"offload": False}, {}, "packed"),
        "few, 3": (zero(3), other, {}, "packed"),
        "adapters, 3": (zero(3), adapters, lora, "packed"),
        "adapters, padded": (zero(3), adapters, lora, "padded"),
        "2, tiles": (zero(2), other, tiles, "packed"),
        "3, tiles": (zero(3), other, tiles, "packed"),
        "3, tiles kept": (zero(3), other, {"tiled_mlp": 40}, "packed"),
        "adapters, 3, tiles": (zero(3), adapters, lora | tiles, "packed"),
        "adapters of mlps": (zero(3), adapters, mlps, "packed"),
        "adapters of mlps, tiles": (zero(3), adapters, mlps | {"tiled_mlp": 16}, "packed"),
        "frozen copy": (zero(0), itself, lora, "packed"),
        # Last: liger's RoPE, here in the interpreter, stays for the rest of the process.
        "few, 3, liger": (zero(3), other, {"use_liger_kernel": True}, "packed"),
    }
    trees = {}
    for name, (parallel, reference, model, layout) in sections.items():
        tree = run_tree(folder, layout=layout, global_batch_size=4, micro_batch_size=2)
        tree["model"] |= model
        if name.startswith("few"):  # the interpreter is slow
            tree["data"]["train"] = str(folder / "few.jsonl")
            tree["train"] |= {"global_batch_size": 2, "micro_batch_size": 1}
        trees[name] = tree | {"parallel": parallel, "reference": reference}
    return trees


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What every case gave on each of two ranks."""
    pytest.importorskip("deepspeed")
    pytest.importorskip("liger_kernel")
    folder = tmp_path_factory.mktemp("layers")
    write_model(folder / "model", seed=0)
    write_model(folder / "reference-model", seed=1)
    write_pairs(folder / "pairs.jsonl", 8)
    few = [{"prompt": "?", "chosen": "yes", "rejected": sure} for sure in ("no", "n")]
    (folder / "few.jsonl").write_text("\n".join(map(json.dumps, few)))
    (folder / "cases.json").write_text(json.dumps(cases(folder)))
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    environment |= {"TRITON_INTERPRET": "1", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    command = [sys.executable, str(ROOT / "tests/support/workers/layers.py"), str(folder)]
    assert launch_command(2, command, environment) == 0
    assert not (folder / "extensions").exists(), "DeepSpeed compiled something"
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.peers
@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("2, optimizer", "2"),
        ("3", "2"),
        ("3, both", "2"),
        ("3, reference", "2"),
        ("3, all but the reference", "2"),
        ("few, 3, liger", "few, 3"),
    ],
)
def test_where_things_wait_does_not_change_the_losses(steps, name, plain):
    expected, got = steps[0][plain], steps[0][name]
    assert expected["losses"][0] != expected["losses"][1]
    assert got["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert got["reference"] == pytest.approx(expected["reference"], abs=1e-4)
    assert got["optimizer"] == "torch.optim.adamw"


@pytest.mark.peers
@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("2, tiles", "2"),
        ("3, tiles", "2"),
        ("3, tiles kept", "2"),
        ("adapters, 3, tiles", "adapters, 3"),
        ("adapters of mlps, tiles", "adapters of mlps"),
    ],
)
def test_tiles_do_not_change_what_is_learnt(steps, name, plain):
    """Ranks have rows of other lengths, and so other numbers of tiles. Adam moves by the rate, 1e-3."""
    expected, got = steps[0][plain], steps[0][name]
    assert got["losses"] == pytest.approx(expected["losses"], abs=1e-6)
    assert got["weights"] == pytest.approx(expected["weights"], abs=2e-6)


@pytest.mark.peers
@pytest.mark.processes
def test_what_is_offloaded_and_that_a_frozen_reference_is_sharded_at_stage_3(steps):
    for rank in steps:
        policies = {name: found["policy"] for name, found in rank.items() if found["policy"]}
        both = ["optimizer", "parameters"]
        assert policies == {
            "2, optimizer": ["optimizer"],
            "3, both": both,
            "3, all but the reference": both,
        }
        assert "held" not in rank["2"]
        for name in ("3", "3, reference"):
            assert all(held == math.ceil(whole / 2) for held, whole in rank[name]["held"])
        offloaded = {name for name, found in rank.items() if found.get("offloaded")}
        assert offloaded == {"3, both", "3, reference"}


def test_a_reference_is_loaded_to_where_it_waits(monkeypatch, tmp_path):
    """Weights are sharded while they load, so the place has to be known by then."""
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import deepspeed_config as in_force

    from dpo_fast.training import references
    from dpo_fast.training.engine import deepspeed_config

    seen = []

    def load(*_, **__):
        seen.append("offload_param" in in_force()["zero_optimization"])
        return MagicMock()

    monkeypatch.setattr(references, "load_model", load)
    monkeypatch.setattr(references, "build_reference_engine", lambda *_: None)
    monkeypatch.setattr(references, "check_separation", lambda *_: None)
    for policy, reference in ((False, True), (True, False), (True, None), (False, None)):
        tree = run_tree(tmp_path, layout="padded")
        tree["parallel"] = {"zero_stage": 3, "offload_parameters": policy}
        tree["reference"] = {"provider": "frozen", "offload": reference}
        config = build_config(tree, "tree")
        ds_config = deepspeed_config(config, 1, 1)
        model = config.reference.model
        references.load_reference_engine(config, MagicMock(), ds_config, CPU, model)
    assert seen == [True, False, True, False]


@pytest.mark.peers
@pytest.mark.processes
@pytest.mark.parametrize("name", ["adapters, 3", "adapters, padded"])
def test_adapters_off_is_a_frozen_copy(steps, name):
    """After updates, so that adapters are not nothing."""
    expected, got = steps[0]["frozen copy"], steps[0][name]
    assert got["reference"] == pytest.approx(expected["reference"], abs=1e-4)
    assert got["losses"] == pytest.approx(expected["losses"], abs=1e-5)


BAD_OFFLOADS = {
    "no second model": ({}, {"offload": True}, "reference.provider=cached there is no second"),
    "adapters": (
        {},
        {"offload": True, "provider": "adapter_off"},
        "reference.provider=adapter_off there is no second",
    ),
    "stage": (
        {"zero_stage": 2},
        {"offload": True, "provider": "frozen"},
        "needs parallel.zero_stage=3; it is 2",
    ),
}


@pytest.mark.parametrize("what", BAD_OFFLOADS)
def test_an_offload_that_cannot_be_honoured(what, tmp_path):
    parallel, reference, message = BAD_OFFLOADS[what]
    tree = run_tree(tmp_path) | {"parallel": parallel, "reference": reference}
    tree["model"]["lora"] = {"r": 2}
    with pytest.raises(UserError, match=message):
        build_config(tree, "tree")
