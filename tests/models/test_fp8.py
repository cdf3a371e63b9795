"""Products in fp8: which layers, when they are refused, and what they compute, emulated on a CPU.

torchao is on the path of these tests alone: peft imports it where it is, which takes seconds.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_fast.data.batch import collate_trees
from dpo_fast.errors import UserError
from dpo_fast.models import fp8, load_model
from dpo_fast.models.config import ModelSection
from dpo_fast.models.fp8 import check_fp8, fp8_layers
from dpo_fast.models.layers import checkpoint_layers, compile_layers
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.training.config import build_config
from dpo_fast.training.fit import check_recomputed
from dpo_fast.training.precompute import weights_dtype
from tests.support import tiny
from tests.support.architectures import TREES, make
from tests.support.faults import SLOW
from tests.support.models import run_tree, write_model, write_pairs
from tests.support.paths import ENVIRONMENT, ROOT

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FOLDER = os.environ.get("TORCHAO")
RECIPES = tuple(fp8.CAPABILITIES)
has_torchao = pytest.mark.skipif(
    FOLDER is None and importlib.util.find_spec("torchao") is None,
    reason="torchao is not installed, and TORCHAO names no folder with it",
)


@pytest.fixture(scope="module")
def torchao():
    """torchao where it is found, and products emulated.

    It stays on the path: peft asks once whether it is there, and imports it from then on.
    """
    if FOLDER is not None and FOLDER not in sys.path:
        sys.path.append(FOLDER)
    importlib.import_module("torchao.float8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fp8.EMULATE, "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 16)
    return folder


def section(folder, **options) -> ModelSection:
    return ModelSection(**({"path": str(folder / "model"), "dtype": "bf16"} | options))


def told(model, found: tuple[int, int] | None, monkeypatch, **options) -> str:
    """What an option is refused with on a GPU of this capability, or on a CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    with pytest.raises(UserError) as error:
        check_fp8(section_of(**options), model, CPU if found is None else GPU)
    return str(error.value)


def section_of(**options) -> ModelSection:
    return ModelSection(**({"path": "m", "dtype": "bf16", "fp8": "tensorwise"} | options))


def test_where_it_cannot_be_honoured_it_is_refused_by_name(monkeypatch):
    model, looked = make("llama"), importlib.util.find_spec
    monkeypatch.delenv(fp8.EMULATE, raising=False)
    there = {"torchao": None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: there[name] if name in there else looked(name)
    )
    assert "model.fp8=tensorwise cannot be honoured: torchao is not" in told(
        model, (9, 0), monkeypatch
    )
    there["torchao"] = True
    assert "need a GPU" in told(model, None, monkeypatch)
    assert "capability 8.9 (Hopper has 9.0), and this GPU has 8.0" in told(
        model, (8, 0), monkeypatch
    )
    rowwise = told(model, (8, 9), monkeypatch, fp8="rowwise")
    assert "9.0" in rowwise and "or set model.fp8=tensorwise" in rowwise
    assert "model.dtype is fp32: set model.dtype=bf16" in told(
        model, (9, 0), monkeypatch, dtype="fp32"
    )
    odd = make("llama", hidden_size=24, num_attention_heads=3, num_key_value_heads=3, head_dim=8)
    assert "no linear layer whose sides" in told(odd, (9, 0), monkeypatch)
    four = {"quantization": {"load_in_4bit": True}, "lora": {"r": 2}}
    assert "weights of this model are quantised" in told(model, (9, 0), monkeypatch, **four)
    check_fp8(section_of(fp8=None), model, CPU)
    for recipe in RECIPES:
        check_fp8(section_of(fp8=recipe), model, GPU)
    with pytest.raises(ValueError, match="tensorwise"):
        section_of(fp8="blockwise")
    assert (section_of(fp8=True).fp8, section_of(fp8=False).fp8) == ("tensorwise", None)


def test_zero_3_wants_layers_recomputed(tmp_path):
    def config(stage: int, **options):
        tree = run_tree(tmp_path) | {"parallel": {"zero_stage": stage}}
        tree["model"] |= {"fp8": "tensorwise"} | options
        return build_config(tree, "tree")

    check_recomputed(config(3))
    check_recomputed(config(3, gradient_checkpointing=True))
    check_recomputed(config(2, checkpoint_layers=1))
    for options in ({"gradient_checkpointing": False}, {"checkpoint_layers": [0]}):
        with pytest.raises(UserError, match=f"model.{next(iter(options))}=.*parallel.zero_stage=2"):
            check_recomputed(config(3, **options))


def test_only_products_inside_the_decoder_layers_are_chosen():
    plain = fp8_layers(make("llama", intermediate_size=44))
    assert len(plain) == 2 * 4, "no head, and no MLP of 44 columns"
    assert all(".self_attn." in name for name in plain)
    with torch.device("meta"):
        experts = AutoModelForCausalLM.from_config(tiny.tiny_config("qwen2_moe"))
        images = tiny.whole_class(tiny.tiny_config("gemma3")).from_config(
            tiny.tiny_config("gemma3")
        )
    names = fp8_layers(experts)
    assert any("shared_expert.up_proj" in name for name in names)
    assert not any(name.endswith("gate") for name in names)
    assert fp8_layers(images) and all(
        "language_model.layers" in name for name in fp8_layers(images)
    )


def test_a_stored_reference_is_of_the_same_products(tmp_path):
    tree = run_tree(tmp_path)
    tree["model"] |= {"dtype": "bf16", "fp8": "rowwise"}
    assert weights_dtype(build_config(tree, "tree")) == "bf16, products in fp8 (rowwise)"
    tree["model"]["fp8"] = None
    assert weights_dtype(build_config(tree, "tree")) == "bf16"


def score(scoring, weight: float = 1.0):
    """Log-probs of completions in one row of 37 tokens, and the gradients of their sum."""
    batch = collate_trees(TREES, "shared_prefix")
    logp = scoring(**forward_arguments(batch))["logp"]
    trained = {name: each for name, each in scoring.named_parameters() if each.requires_grad}
    found = torch.autograd.grad((logp * weight).sum(), list(trained.values()))
    return logp.detach(), dict(zip(trained, found))


def near(found: dict, expected: dict) -> float:
    """The distance of all gradients, as a share of their length."""
    pairs = [(found[name].float(), expected[name].float()) for name in expected]
    return (
        (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))
        .sqrt()
        .item()
    )


def load(folder, **options):
    """With weights small enough that rounding does not choose other tokens."""
    torch.manual_seed(0)
    scoring = load_model(section(folder, **options), attention="dpo_fast_packed")
    with torch.no_grad():
        for parameter in scoring.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.3)
    return scoring


@has_torchao
@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("recipe", RECIPES)
def test_log_probs_and_gradients_are_near_those_of_the_plain_products(recipe, folder):
    plain, rounded = load(folder), load(folder, fp8=recipe)
    assert dict(rounded.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    layer = rounded.causal_lm.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Float8Linear"
    assert type(rounded.causal_lm.lm_head) is type(plain.causal_lm.lm_head)
    (expected, slopes), (found, others) = score(plain), score(rounded)
    assert 0 < (found - expected).abs().max() < 0.1
    assert 0 < near(others, slopes) < 0.2
    checkpoint_layers(rounded.causal_lm)
    rounded.train()
    again, recomputed = score(rounded)
    assert torch.equal(again, found) and near(recomputed, others) == 0


@has_torchao
@pytest.mark.usefixtures("torchao")
def test_adapters_stand_on_products_in_fp8(folder):
    lora = {"r": 2, "alpha": 4, "target_modules": "all-linear"}
    plain, rounded = load(folder, lora=lora), load(folder, lora=lora, fp8="tensorwise")
    layer = rounded.causal_lm.model.layers[0].mlp.up_proj
    assert type(layer.base_layer).__name__ == "Float8Linear"
    assert type(layer.lora_A["default"]) is torch.nn.Linear
    with torch.no_grad():
        for scoring in (plain, rounded):
            for name, parameter in scoring.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.05)
    (expected, slopes), (found, others) = score(plain), score(rounded)
    assert slopes.keys() == others.keys() and all("lora_" in name for name in slopes)
    assert 0 < (found - expected).abs().max() < 0.5
    assert near(others, slopes) < 0.3


@has_torchao
@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("recipe", RECIPES)
def test_shapes_are_those_that_a_gpu_takes(recipe, monkeypatch):
    """PyTorch checks them without numbers: sides of 16, also along 37 tokens, for each of the products."""
    monkeypatch.setenv(fp8.EMULATE, "0")
    model = make("llama", intermediate_size=48).to(torch.bfloat16).to("meta")
    assert len(fp8.use_fp8(model, recipe)) == 14

    def try_layers() -> None:
        for module in filter(fp8.in_fp8, model.modules()):
            rows = torch.empty(1, 37, module.in_features, dtype=torch.bfloat16, device="meta")
            out = module(rows.requires_grad_())
            out.backward(torch.empty_like(out))
            assert module.weight.grad.shape == module.weight.shape
            assert rows.grad.shape == rows.shape

    try_layers()
    if recipe == "rowwise_with_gw_hp":  # the one along the tokens is in bf16
        return
    for module in filter(fp8.in_fp8, model.modules()):
        along = module.linear_mm_config.grad_weight._replace(pad_inner_dim=False)
        module.linear_mm_config = module.linear_mm_config._replace(grad_weight=along)
    with pytest.raises(RuntimeError, match="divisible by 16"):
        try_layers()


@has_torchao
@pytest.mark.slow
@pytest.mark.usefixtures("torchao")
def test_compiled_products_are_the_same():
    model = make("llama", num_hidden_layers=1).to(torch.bfloat16)
    fp8.use_fp8(model, "tensorwise")

    def run(tokens: int) -> list[torch.Tensor]:
        ids = torch.arange(tokens)[None]
        logits = model(input_ids=ids, use_cache=False).logits.float()
        return [
            logits.detach(),
            *torch.autograd.grad(logits.sin().sum(), model.model.layers.parameters()),
        ]

    plain = [run(tokens) for tokens in (37, 21)]
    compile_layers(model, backend="aot_eager")
    for tokens, expected in zip((37, 21), plain):
        assert all(map(torch.equal, run(tokens), expected))


@has_torchao
@SLOW
@pytest.mark.processes
@pytest.mark.slow
def test_two_ranks_train_sharded_and_export_plain_weights(folder):
    """In processes of their own, as `dpo-fast train` runs where torchao is installed."""
    tree = run_tree(folder, max_steps=2, micro_batch_size=2, learning_rate=3e-3)
    tree["model"] |= {"dtype": "bf16", "fp8": "tensorwise", "gradient_checkpointing": True}
    file = folder / "run.yaml"
    file.write_text(json.dumps(tree | {"parallel": {"zero_stage": 3}}))
    path = os.pathsep.join(filter(None, [str(ROOT), FOLDER]))
    variables = ENVIRONMENT | {"PYTHONPATH": path, fp8.EMULATE: "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dpo_fast", "train", str(file), "--nproc", "2"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in lines if "loss" in line]
    # Both log-probs are of the same products; only what shares a batch differs.
    assert losses[0] == pytest.approx(math.log(2), abs=0.05) and losses[1] < losses[0] - 0.1
    out = load_file(folder / "run" / "final" / "model.safetensors")
    assert out.keys() == load_file(folder / "model" / "model.safetensors").keys()
    assert {each.dtype for each in out.values()} == {torch.bfloat16}
