"""MLPs and norms in tiles: the numbers of the whole, whatever is trained, kept or drawn."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from torch import nn

from dpo_fast.data.batch import collate_trees
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel
from dpo_fast.models.attention import NAMES
from dpo_fast.models.config import LoraSection, ModelSection
from dpo_fast.models.layers import checkpoint_layers, decoder_layers
from dpo_fast.models.lora import add_lora
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.models.tiles import _tile, check_tiles, tile_layers
from tests.support.architectures import ARCHITECTURES, TREES, make

EXPERTS = [
    name for name, (config, _) in ARCHITECTURES.items() if "expert" in name or "sinks" in name
]
EXPERTS += ["deepseek-v3, unequal head sizes"]
DENSE = [name for name in ARCHITECTURES if name not in EXPERTS]


def scoring(name: str, layout: str = "packed", lora: LoraSection | None = None) -> ScoringModel:
    """A model in training mode, the same each time."""
    torch.manual_seed(0)
    model = make(name).train()
    if LAYOUTS[layout].shares_rows:
        model.set_attn_implementation(NAMES["sdpa"])
    made = ScoringModel(model)
    if lora is not None:
        add_lora(made, lora)
        for key, weight in made.named_parameters():
            if "lora_B" in key:  # it starts at zero, where lora_A has no gradient
                nn.init.normal_(weight, std=0.1)
    return made


def step(model: ScoringModel, layout: str = "packed"):
    """Log-probs, and gradients by name."""
    model.zero_grad()
    logps = model(**forward_arguments(collate_trees(TREES, layout)))["logp"]
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same(got, expected) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    assert got[1].keys() == expected[1].keys()
    largest = max(g.abs().max() for g in expected[1].values())
    for name, gradient in expected[1].items():
        size = torch.maximum(gradient.abs().max(), largest * 1e-2)
        assert (got[1][name] - gradient).abs().max() <= 1e-5 * size, name


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", DENSE)
def test_the_numbers_of_the_whole(name, layout):
    model = scoring(name, layout)
    expected = step(model, layout)
    rows = []
    for layer in decoder_layers(model.causal_lm):
        first = next(each for each in layer.mlp.modules() if not list(each.children()))
        first.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[:-1].numel()))
    tile_layers(model.causal_lm, 5)
    assert_same(step(model, layout), expected)
    assert max(rows) <= (5 if layout == "packed" else 9)  # one token of each of nine rows
    with torch.no_grad():
        alone = model(**forward_arguments(collate_trees(TREES, layout)))["logp"]
    torch.testing.assert_close(alone, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True, "offloaded"])
@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"], ["q_proj"]])
def test_with_adapters_and_recomputed_layers(targets, checkpointed):
    """Adapters of MLPs alone: what goes into the first of them wants no gradient."""
    section = LoraSection(r=2, target_modules=targets)
    model = scoring("llama", lora=section)
    expected = step(model)
    tile_layers(model.causal_lm, 4)
    if checkpointed:
        checkpoint_layers(model.causal_lm, offload=checkpointed == "offloaded")
    assert_same(step(model), expected)


def test_dropout_of_adapters_is_drawn_again():
    """Gradients are those of the forward pass that was: its masks, tile by tile, kept by autograd."""
    section = LoraSection(r=2, dropout=0.5)
    results = []
    for tiled in (True, False):
        model = scoring("llama", lora=section)
        if tiled:
            tile_layers(model.causal_lm, 4)
        else:
            for layer in decoder_layers(model.causal_lm):
                layer.mlp.forward = in_pieces(layer.mlp.forward, 4)
        torch.manual_seed(1)
        results.append(step(model))
    assert_same(*results)


def in_pieces(function, size: int):
    return lambda x: torch.cat([function(piece) for piece in x.split(size, dim=1)], dim=1)


def test_gradients_of_weights_are_summed_in_fp32():
    """In bf16 over 512 tiles the sum stays as near to the exact one as that of a single product."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2
    )
    torch.manual_seed(0)
    mlp = LlamaMLP(config)
    x = torch.randn(1, 4096, 16) + 1
    grad = torch.ones_like(x)

    def gradient(module, dtype):
        module = copy.deepcopy(module).to(dtype)
        output = module(x.to(dtype))
        return torch.autograd.grad(output, module.gate_proj.weight, grad.to(dtype))[0].double()

    exact, whole = (gradient(mlp, dtype) for dtype in (torch.float64, torch.bfloat16))
    _tile(mlp, 8)
    tiled = gradient(mlp, torch.bfloat16)  # of the copy: a tile's forward goes with its module
    error = lambda found: ((found - exact).norm() / exact.norm()).item()  # noqa: E731
    assert error(tiled) <= 1.2 * error(whole)


def test_what_fills_no_tile_is_not_computed_again():
    model = scoring("llama")
    tile_layers(model.causal_lm, 1000)
    runs = []
    for layer in decoder_layers(model.causal_lm):
        layer.mlp.gate_proj.register_forward_pre_hook(lambda *_: runs.append(1))
    step(model)
    assert len(runs) == len(decoder_layers(model.causal_lm))


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_refused(name):
    section = ModelSection.model_construct(tiled_mlp=True)
    with pytest.raises(UserError, match="model.tiled_mlp=True cannot be honoured: the experts of"):
        check_tiles(section, make(name))
    check_tiles(ModelSection.model_construct(tiled_mlp=False), make(name))
    check_tiles(section, make("llama"))


def test_layers_without_an_mlp_of_their_own_are_refused():
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.OPTConfig(**sizes, vocab_size=64, word_embed_proj_dim=16)
    with pytest.raises(UserError, match="have no MLP in a module of its own"):
        check_tiles(ModelSection.model_construct(tiled_mlp=8), transformers.OPTForCausalLM(config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiled_mlp": 0}, "model.tiled_mlp=0: expected tokens in a tile"),
        ({"tiled_mlp": -3}, "model.tiled_mlp=-3: expected tokens in a tile"),
        ({"tiled_mlp": 8, "torch_compile": True}, "model.tiled_mlp=8 and model.torch_compile=true"),
        (
            {"activation_offloading": True, "gradient_checkpointing": False},
            "model.activation_offloading=true moves",
        ),
    ],
)
def test_values_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        ModelSection(path="model", **options)


def test_true_means_a_size():
    assert ModelSection(path="model", tiled_mlp=True).tile_tokens == 4096
    assert ModelSection(path="model", tiled_mlp=100).tile_tokens == 100
    assert ModelSection(path="model").tile_tokens is None
