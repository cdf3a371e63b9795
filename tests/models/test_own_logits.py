"""The head scores what the model's own forward would make of its logits, or the model is refused."""

import contextlib

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

from dpo_fast.data.batch import collate_trees
from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel
from dpo_fast.models.decoder import decoder_of
from dpo_fast.models.load import auto_class
from dpo_fast.models.scoring import forward_arguments, head_options_of
from dpo_fast.models.separation import check_separation
from tests.support.architectures import ARCHITECTURES, SIZES, TREES, alone, make
from tests.support.families import config_of, tiny

# Models whose keys for it are their own.
OTHERS = {
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {"logits_soft_cap": 0.7, "lru_width": 32, "attention_window_size": 8, "head_dim": 8},
    )
}


class Scaled(LlamaForCausalLM):
    """As MiniCPM's own code: states are divided before the head."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 1.2
        return output


class Capped(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


class Cut(LlamaForCausalLM):
    """A head with more rows than the vocabulary has."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[..., :90]
        return output


class Shifted(LlamaForCausalLM):
    """A constant for all logits changes no probability."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 3
        return output


def small(cls):
    torch.manual_seed(0)
    return cls(transformers.LlamaConfig(**SIZES))


@pytest.mark.parametrize("name", OTHERS)
def test_other_keys_are_honoured(name):
    config, changes = OTHERS[name]
    config = getattr(transformers, config)(**(SIZES | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = alone(model)
    scores = ScoringModel(model)(**forward_arguments(collate_trees(TREES, "padded")))["logp"]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


WHOLE = {
    "aya_vision": ({"logit_scale": 0.25}, 1.0),
    "cohere2_vision": ({"logit_scale": 0.25}, 1.0),
    "inkling_text": ({"logits_mup_width_multiplier": 4.0}, 0.25),
    "cohere2": ({"logit_scale": 0.25}, 0.25),
    "hyperclovax": ({"logits_scaling": 0.25}, 0.25),
    "falcon_h1": ({"lm_head_multiplier": 0.25}, 0.25),
}


@pytest.mark.parametrize("family", WHOLE)
def test_the_code_of_the_model_decides_whether_a_key_counts(family):
    """Whole image-text models may leave out what the class of their text model does."""
    changes, scale = WHOLE[family]
    config = config_of(family)
    for key, value in changes.items():
        setattr(config.get_text_config(), key, value)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config)
    assert head_options_of(model).logit_scale == scale
    ScoringModel(model)


def test_layers_between_the_decoder_and_the_head_are_refused():
    """ModernBERT's decoder has some there, and its head is what `get_decoder` gives."""
    config = transformers.ModernBertDecoderConfig(**SIZES, cls_token_id=1, sep_token_id=2)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert decoder_of(model) is model.model
    with pytest.raises(UserError, match="does something to its logits"):
        ScoringModel(model)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("cpmant", "beside a longer sequence"),
        ("xlm", "more tokens behind it"),
        ("xlnet", "more tokens behind it"),
        ("kosmos-2", "places that the model finds for itself"),
        ("kosmos-2.5", "places that the model finds for itself"),
        ("prophetnet", "other states than its decoder's"),
        ("rembert", "states of size 32, and its head takes"),
        ("llama", None),
        ("bloom", None),
    ],
)
def test_what_is_no_causal_model_is_refused_before_it_is_trained(family, said):
    """In padded rows, where no other sequence is in the row."""
    refused = pytest.raises(UserError, match=said) if said else contextlib.nullcontext()
    with refused:
        scoring = ScoringModel(tiny(family))
        check_separation(scoring, "padded", 97, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [Scaled, Capped, Cut])
def test_what_is_not_known_is_refused(cls, dtype):
    with pytest.raises(UserError, match=f"{cls.__name__} does something to its logits"):
        ScoringModel(small(cls).to(dtype))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bf16_is_no_reason_to_refuse(name):
    ScoringModel(make(name).bfloat16())


def test_the_trial_leaves_the_model_as_it_was():
    model = small(Shifted).train()
    expected = model(torch.tensor([[1, 5, 7]])).logits
    ScoringModel(model)
    assert model.training and "forward" not in vars(model.get_decoder())
    assert torch.equal(model(torch.tensor([[1, 5, 7]])).logits, expected)


def test_a_forward_that_wants_more_than_ids_is_not_tried():
    class Demanding(LlamaForCausalLM):
        def forward(self, *args, pixels, **kwargs):
            return super().forward(*args, **kwargs)

    ScoringModel(small(Demanding))
