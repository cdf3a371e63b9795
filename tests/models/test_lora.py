"""New adapters by every option of `model.lora`: log-probs and gradients as peft itself gives them."""

import copy
import json
import math
from functools import cache

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("deepspeed")

from pydantic import ValidationError

from dpo_fast.data.batch import collate_trees
from dpo_fast.errors import UserError
from dpo_fast.models.attention import NAMES
from dpo_fast.models.config import LoraSection, ModelSection
from dpo_fast.models.lora import add_lora
from dpo_fast.models.scoring import ScoringModel, forward_arguments
from dpo_fast.training.export import gather_trained, save_adapter
from tests.support import hybrids
from tests.support.architectures import TREES, alone, make, slopes

RENAMED = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
CASES = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, fast": {"init_lora_weights": "pissa_niter_8"},
    "pissa, rslora, patterns": {
        "init_lora_weights": "pissa",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.1.mlp.down_proj": 3},
    },
    "olora": {"init_lora_weights": "olora"},
    "patterns": {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["layers.0.mlp.down_proj", "q_proj"]},
    "excluded by expression": {"exclude_modules": r".*\.0\.self_attn\..*"},
    "bias": {"bias": "lora_only"},
    "tokens": {"trainable_token_indices": [7, 8]},
}
TAKES = [name for name in CASES if name.startswith(("pissa", "olora"))]
# gpt2 has its weights transposed. peft's OLoRA fails there, and ours has no peer.
TRANSPOSED = ("dora", "pissa", "layers", "excluded by expression")
PLACES = [("qwen2, tied", name) for name in CASES if name != "tokens"]
PLACES += [*(("gpt2", name) for name in TRANSPOSED), ("llama", "tokens")]


@cache
def made(architecture: str):
    return make(architecture, attention="sdpa")


@pytest.fixture(params=["qwen2, tied", "gpt2"])
def base(request):
    return made(request.param)


def spelt(base, options: dict) -> dict:
    """Options with the names that gpt2 has for the same modules."""
    if base.config.model_type != "gpt2":
        return options
    text = json.dumps(options)
    names = {"q_proj": "c_attn", "k_proj": "c_attn", "layers": "h", "up_proj": "c_fc"}
    for old, new in (names | {"down_proj": "c_proj", "self_attn": "attn"}).items():
        text = text.replace(old, new)
    kept = text.replace('"h_to_transform"', '"layers_to_transform"')
    return json.loads(kept)


def peft_config(options: dict):
    options = {"target_modules": "all-linear"} | options
    options |= {"r": 4, "alpha": 6, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{RENAMED.get(name, name): value for name, value in options.items()})


def adapted(base, options: dict, **more) -> ScoringModel:
    scoring = ScoringModel(copy.deepcopy(base))
    add_lora(scoring, LoraSection(r=4, alpha=6, **options), **more)
    return scoring.eval()


def logps(scoring, layout="padded"):
    return scoring(**forward_arguments(collate_trees(TREES, layout)))["logp"]


def trained_of(model) -> dict:
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name.removeprefix("model."): p for name, p in own.items()}


def moved(model) -> None:
    """As after some steps: every trained parameter is somewhere else, by its name."""
    for index, (_, parameter) in enumerate(sorted(trained_of(model).items())):
        draw = torch.Generator().manual_seed(index)
        parameter.data.add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)


@pytest.mark.parametrize(("architecture", "name"), PLACES)
def test_log_probs_and_gradients_are_those_of_peft(architecture, name):
    base = made(architecture)
    options = spelt(base, CASES[name])
    ours = adapted(base, options)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(options)).eval()
    own = trained_of(ours)
    assert own.keys() == trained_of(theirs).keys() and own
    with torch.no_grad():
        torch.testing.assert_close(logps(ours), alone(base), rtol=0, atol=2e-5)
        for key, parameter in trained_of(theirs).items():
            if name in ("pissa", "pissa, rslora, patterns", "olora"):
                torch.testing.assert_close(own[key], parameter, rtol=0, atol=1e-5)
            own[key].data.copy_(parameter.data)
        for taken in (n for n, _ in ours.model.named_parameters() if ".taken." in n):
            start = own[taken.replace(".taken.", ".default.")]
            sign = -1 if "lora_B" in taken else 1
            ours.model.get_parameter(taken).data.copy_(sign * start)
        moved(ours)
        moved(theirs)
    expected = alone(theirs)
    assert (expected - alone(base)).abs().max() > 0.01
    wanted = slopes(expected, trained_of(theirs).values())
    for layout in ("padded", "packed", "shared_prefix"):
        ours.causal_lm.set_attn_implementation("sdpa" if layout == "padded" else NAMES["sdpa"])
        found = logps(ours, layout)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        for key, ours_, theirs_ in zip(own, slopes(found, own.values()), wanted):
            torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", TAKES)
def test_with_its_adapters_off_the_model_is_the_base_bit_for_bit(base, name):
    options = {n: v for n, v in CASES[name].items() if not n.endswith("_pattern")}
    before = logps(ScoringModel(copy.deepcopy(base)))
    scoring = adapted(base, options)
    trained = trained_of(scoring).keys()
    with torch.no_grad():
        moved(scoring)
        with scoring.as_started():
            assert torch.equal(logps(scoring), before)
        assert (logps(scoring) - before).abs().max() > 0.01
    assert trained_of(scoring).keys() == trained and not any(".taken." in n for n in trained)


@pytest.mark.parametrize("name", ["plain", "dora", "pissa", "rslora"])
def test_a_copy_that_follows_is_the_adapter_as_it_was(base, name):
    scoring = adapted(base, CASES[name], keep_copy=True)
    before = logps(scoring)
    with torch.no_grad():
        moved(scoring)
        with scoring.as_started():
            assert torch.equal(logps(scoring), before)
    assert all(".default." in key for key in trained_of(scoring))


def test_the_default_targets_go_with_layers(base):
    """peft takes layers with a list of names only."""
    scoring = adapted(base, {"layers_to_transform": 1})
    layers = {name.split(".lora_")[0] for name in trained_of(scoring)}
    assert len(layers) == (4 if base.config.model_type == "gpt2" else 7)
    assert all(".1." in name for name in layers)


STARTS = {
    "plain": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora, followed": {"init_lora_weights": "olora"},
    "whole": {"modules_to_save": ["norm"], "use_dora": True},
}


@pytest.mark.parametrize("name", STARTS)
def test_a_model_in_bf16_starts_as_its_reference_bit_for_bit(name):
    """And what is trained has one dtype: DeepSpeed's stage 3 takes no two."""
    scoring = ScoringModel(make("llama", attention="sdpa").to(torch.bfloat16))
    before = logps(scoring)
    add_lora(scoring, LoraSection(r=4, **STARTS[name]), keep_copy="followed" in name)
    assert torch.equal(logps(scoring), before)
    with scoring.as_started():
        assert torch.equal(logps(scoring), before)
    assert {p.dtype for p in trained_of(scoring).values()} == {torch.bfloat16}


def refused(options: dict, base) -> str:
    with pytest.raises((UserError, ValidationError)) as error:
        adapted(base, options)
    return str(error.value)


def test_what_cannot_be_honoured_is_refused_by_name(base):
    assert "rank_pattern: q_prj means no module" in refused({"rank_pattern": {"q_prj": 4}}, base)
    assert "exclude_modules=mpl: the model has no" in refused({"exclude_modules": ["mpl"]}, base)
    assert "by its whole name" in refused({"exclude_modules": "mlp"}, base)
    assert "layers 0 to 1" in refused({"layers_to_transform": [1, 2]}, base)
    assert "layers_pattern=h is not used" in refused({"layers_pattern": "h"}, base)
    expression = {"layers_to_transform": [1], "target_modules": ".*mlp.*"}
    assert "is a regular expression" in refused(expression, base)
    assert "needs a pass over data" in refused({"init_lora_weights": "eva"}, base)
    assert "quantises itself" in refused({"init_lora_weights": "loftq"}, base)
    assert "init_lora_weights=false" in refused({"init_lora_weights": False}, base)
    assert "there is no such start" in refused({"init_lora_weights": "pisa"}, base)
    assert "no such start" in refused({"init_lora_weights": "pissa_niter_0"}, base)
    both = {"use_dora": True, "init_lora_weights": "pissa"}
    assert "choose one" in refused(both, base)
    odd = {"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 3}}
    assert "needs even ranks" in refused(odd, base)
    if base.config.tie_word_embeddings:
        told = refused({"trainable_token_indices": [3]}, base)
        assert "trainable_token_indices=[3]: the head of" in told and "modules_to_save" in told
    embeddings = base.get_input_embeddings()
    name = next(n for n, m in base.named_modules() if m is embeddings).split(".")[-1]
    told = refused({"init_lora_weights": "olora", "target_modules": [name]}, base)
    assert "is for linear layers" in told


def test_a_module_inside_another_is_not_trained_whole_twice():
    """peft makes such an adapter and fails to save it, after the run. LFM2 has a conv inside a conv."""
    base = hybrids.make("lfm2")
    told = refused({"modules_to_save": ["conv"]}, base)
    assert "model.layers.0.conv.conv inside model.layers.0.conv too" in told
    adapted(base, {"modules_to_save": ["layers.0.conv"], "target_modules": ["q_proj"]})
    both = {"modules_to_save": ["mlp", "up_proj"], "target_modules": ["q_proj"]}
    assert "mlp.up_proj inside model.layers.0.mlp too" in refused(both, made("llama"))


def test_modules_with_stored_buffers_are_not_trained_whole():
    """peft wants them in the adapter, which has trained tensors alone: a KeyError after the run."""
    whole = {"modules_to_save": ["self_attn"], "target_modules": ["up_proj"]}
    told = refused(whole, hybrids.make("minimax"))
    assert "modules_to_save=self_attn: such modules hold" in told and "slope_rate" in told


@pytest.mark.parametrize(("architecture", "name"), PLACES)
def test_the_export_is_the_adapter_on_the_base(architecture, name, tmp_path):
    """As plain peft loads it; of PiSSA on the base as it was."""
    base = made(architecture)
    scoring = adapted(base, spelt(base, CASES[name]))
    with torch.no_grad():
        moved(scoring)
        if CASES[name].get("bias"):
            for key, parameter in scoring.named_parameters():
                assert parameter.requires_grad or not key.endswith("base_layer.bias")
        save_adapter(scoring, gather_trained(scoring.model), tmp_path)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(alone(again), logps(scoring), rtol=0, atol=1e-5)
        config = again.peft_config["default"]
        takes = name in TAKES
        assert config.r == (8 if takes else 4)
        if name == "pissa, rslora, patterns":
            assert config.lora_alpha == pytest.approx(6 * math.sqrt(2))
        merged = again.merge_and_unload()
        torch.testing.assert_close(alone(merged), logps(scoring), rtol=0, atol=2e-5)


def test_new_adapters_begin_alike_however_many_numbers_loading_draws(tmp_path, monkeypatch):
    """As where ZeRO-3 makes a model whole before it reads it."""
    from dpo_fast.models import load
    from tests.support.models import write_model

    section = ModelSection(path=str(write_model(tmp_path / "model")), lora={"r": 2})
    plain, found = load._load_causal_lm, []

    def drawing(*arguments):
        model = plain(*arguments)
        torch.rand(7)
        return model

    for loads in (plain, drawing):
        monkeypatch.setattr(load, "_load_causal_lm", loads)
        torch.manual_seed(3)
        weights = load.load_model(section, attention="eager").named_parameters()
        found.append(next(weight for name, weight in weights if "lora_A" in name))
    assert torch.equal(*found)
