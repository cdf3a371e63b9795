"""Images in every layout, against transformers' own forward of each sequence alone."""

import dataclasses
import functools

import pytest
import torch

transformers = pytest.importorskip("transformers")

from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel
from dpo_fast.models.architecture import architecture_of
from dpo_fast.models.attention import NAMES
from dpo_fast.models.config import ModelSection
from dpo_fast.models.decoder import attention_of_parts, decoder_of
from dpo_fast.models.layers import checkpoint_layers
from dpo_fast.models.load import auto_class
from dpo_fast.models.lora import add_lora
from dpo_fast.models.lora_section import LoraSection
from dpo_fast.models.parts import settle_parts
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.models.vision import Vision, why_no_images
from tests.support.architectures import assert_same, slopes
from tests.support.faults import SLOW
from tests.support.image_models import FAMILIES, START, TREES, alone, batch_of

MAIN = ("qwen3-vl", "gemma3")
RARE = ("cosmos3-edge", "got-ocr2", "hunyuan-vl")
ALL = [pytest.param(name, marks=SLOW if name in RARE else ()) for name in FAMILIES]


@functools.cache
def truth(name: str):
    """Log-probs and the gradient of every parameter by transformers itself."""
    family = FAMILIES[name]
    model = family.make()
    scores = alone(family, model)
    return scores.detach(), slopes(scores, trained(model))


def trained(model) -> list[torch.nn.Parameter]:
    """Without what a family never trains, as the biases of some routers."""
    return [each for each in model.parameters() if each.requires_grad]


def scoring_of(name: str, layout: str, **options) -> ScoringModel:
    """A model that sees images, with all of it trained unless the options of `model` say otherwise."""
    model = FAMILIES[name].make()
    if LAYOUTS[layout].shares_rows:
        model.set_attn_implementation(attention_of_parts(model.config, NAMES["sdpa"]))
    scoring = ScoringModel(model)
    whole = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
    settle_parts(scoring, ModelSection(path="model", images=True, **(whole | options)))
    return scoring


def logps(scoring: ScoringModel, batch) -> torch.Tensor:
    return scoring(**forward_arguments(batch))["logp"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL)
def test_a_batch_scores_like_every_sequence_alone(name, layout):
    """Prompts with none, one and two images, an image in two prompts: log-probs and every gradient."""
    architecture = architecture_of(FAMILIES[name].make())
    if not architecture.allows(LAYOUTS[layout]):
        pytest.skip(architecture.obstacle)
    scoring, (expected, slopes_of) = scoring_of(name, layout), truth(name)
    batch = batch_of(FAMILIES[name], layout)
    scores = logps(scoring, batch)
    error = 1e-4 if name == "qwen3.5" else 1e-5  # its recurrence rounds by more, alone too
    assert_same(scores, slopes(scores, trained(scoring)), expected, slopes_of, error)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tower_sees_every_image_once(layout):
    scoring, seen = scoring_of("gemma3", layout), []
    tower = scoring.vision.model.vision_tower
    tower.register_forward_hook(lambda m, i, o: seen.append(o.last_hidden_state.shape[0]))
    batch = batch_of(FAMILIES["gemma3"], layout)
    logps(scoring, batch)
    occurrences = {"padded": 11, "packed": 11, "shared_prefix": 4}
    assert seen == [3] and len(batch.images.order_I) == occurrences[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MAIN)
def test_activations_of_text_and_tower_are_recomputed(name, layout):
    scoring, (expected, slopes_of) = scoring_of(name, layout), truth(name)
    checkpoint_layers(scoring.causal_lm)
    scoring.train()
    scores = logps(scoring, batch_of(FAMILIES[name], layout))
    scores.sin().sum().backward()
    assert_same(scores, [p.grad for p in scoring.parameters()], expected, slopes_of)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MAIN)
def test_another_image_moves_its_own_sequences_and_no_others(name, layout):
    family, scoring = FAMILIES[name], scoring_of(name, layout)
    batch = batch_of(family, layout)
    images, first = batch.images, "image_grid_thw" in batch.images.inputs
    values = images.inputs["pixel_values"].clone()
    rows = int(images.inputs["image_grid_thw"][0].prod()) if first else 1
    values[:rows] += 1.0  # picture 1000, of the first tree
    other = dataclasses.replace(images, inputs=images.inputs | {"pixel_values": values})
    with torch.no_grad():
        before, after = (
            logps(scoring, each) for each in (batch, dataclasses.replace(batch, images=other))
        )
    of_first = sum(len(answer) for answer in TREES[0][1])
    assert (after - before)[:of_first].abs().min() > 1e-5
    torch.testing.assert_close(after[of_first:], before[of_first:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MAIN)
def test_a_trial_of_attention_leaves_each_part_its_own(name):
    scoring = scoring_of(name, "packed")
    batch = batch_of(FAMILIES[name], "packed")
    before = logps(scoring, batch)
    assert architecture_of(scoring.causal_lm).obstacle is None
    assert torch.equal(logps(scoring, batch), before)


@pytest.mark.parametrize("name", MAIN)
def test_texts_alone_do_not_reach_the_tower(name):
    trees, family = [TREES[1]], FAMILIES[name]
    scoring = scoring_of(name, "padded")
    scores = logps(scoring, batch_of(family, "padded", trees))
    torch.testing.assert_close(scores, alone(family, family.make(), trees), rtol=1e-5, atol=1e-5)
    gradients = slopes(scores, [*scoring.vision.tower.values(), *scoring.vision.projector.values()])
    assert all(each is None for each in gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MAIN)
def test_where_ranks_share_the_tower_texts_alone_run_it_too(name, layout):
    """With a blank image that no token stands for: the same numbers, and gradients of the tower, all 0."""
    trees, family = [TREES[1]], FAMILIES[name]
    scoring, blank = scoring_of(name, layout), family.picture(7).inputs
    batch = batch_of(family, layout, trees)
    before = logps(scoring, batch)
    scoring.vision.blank = blank
    after = logps(scoring, batch)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    tower = slopes(after, scoring.vision.tower.values())
    assert tower and all(each is not None and not each.any() for each in tower)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MAIN)
def test_adapters_are_on_the_text_model_alone(name, layout):
    """And score like peft's model alone; without them the model is the base again."""
    scoring = scoring_of(name, layout, freeze_vision_tower=True, freeze_multi_modal_projector=True)
    section = LoraSection(r=2)
    torch.manual_seed(0)
    add_lora(scoring, section)
    adapters = {n: p for n, p in scoring.named_parameters() if p.requires_grad}
    assert adapters and all("lora_" in n and ".language_model." in n for n in adapters)
    for each in adapters.values():
        torch.nn.init.normal_(each, std=0.1)
    family = FAMILIES[name]
    batch = batch_of(family, layout)
    scores = logps(scoring, batch)
    with torch.no_grad(), scoring.as_started():
        base = logps(scoring, batch)
    torch.testing.assert_close(base, truth(name)[0], rtol=1e-5, atol=1e-5)
    other, parameters = with_adapters(family, section, adapters)
    expected = alone(family, other)
    assert (expected - truth(name)[0]).abs().max() > 1e-2
    true = slopes(expected, [parameters[each] for each in adapters])
    assert_same(scores, slopes(scores, adapters.values()), expected, true)


def test_a_projector_is_saved_whole_beside_adapters_where_it_is_trained():
    section = LoraSection(r=2, modules_to_save=["multi_modal_projector"])
    with pytest.raises(UserError, match="model.freeze_multi_modal_projector=false"):
        add_lora(scoring_of("gemma3", "padded", freeze_multi_modal_projector=True), section)
    scoring = scoring_of("gemma3", "padded", freeze_vision_tower=True)
    add_lora(scoring, section)
    assert scoring.vision.trained
    beside = [name for name, each in scoring.named_parameters() if each.requires_grad]
    beside = [name for name in beside if ".language_model." not in name]
    assert beside and all(".modules_to_save." in name for name in beside)
    scores = logps(scoring, batch_of(FAMILIES["gemma3"], "padded"))
    found = slopes(scores, [p for n, p in scoring.named_parameters() if n in beside])
    assert all(each is not None and each.any() for each in found)


def with_adapters(family, section, adapters):
    """transformers' own model with the same adapters, and its parameters by name."""
    scoring = ScoringModel(family.make())
    settle_parts(scoring, ModelSection(path="model", images=True))
    add_lora(scoring, section)
    parameters = dict(scoring.named_parameters())
    for name, value in adapters.items():
        parameters[name].data.copy_(value.data)
    model, weight = scoring.causal_lm, scoring.causal_lm.get_output_embeddings().weight
    plain = torch.nn.Linear(*reversed(weight.shape), bias=False)
    plain.weight = weight
    model.set_output_embeddings(plain)
    return model, parameters


@pytest.mark.parametrize("name", ALL)
def test_options_freeze_the_tower_and_what_leads_from_it(name):
    scoring = scoring_of(
        name, "padded", freeze_vision_tower=True, freeze_multi_modal_projector=True
    )
    vision = scoring.vision
    inside = {id(p) for p in decoder_of(scoring.causal_lm).parameters()}
    inside |= {id(p) for p in scoring.causal_lm.get_output_embeddings().parameters()}
    parts = {id(p) for p in (*vision.tower.values(), *vision.projector.values())}
    assert vision.tower and vision.projector
    assert parts | inside == {id(p) for p in scoring.parameters()} and not parts & inside
    inside -= {id(p) for n, p in scoring.named_parameters() if "e_score_correction_bias" in n}
    assert all(p.requires_grad == (id(p) in inside) for p in scoring.parameters())
    scoring.train()
    assert not any(m.training for part in vision.parts.values() for m in part.modules())
    assert decoder_of(scoring.causal_lm).training
    vision.freeze(tower=True, projector=False)
    assert all(p.requires_grad for p in vision.projector.values())
    assert not any(p.requires_grad for p in vision.tower.values())


def test_a_fork_between_two_images_that_touch_is_refused_where_their_tokens_see_each_other():
    trees = [([1, *range(3, 19), START, 1000, each, 6], [[5, 2], [2]]) for each in (1001, 1002)]
    scoring = scoring_of("gemma3", "shared_prefix")
    with pytest.raises(UserError, match="train.layout=shared_prefix.*Set train.layout=packed"):
        logps(scoring, batch_of(FAMILIES["gemma3"], "shared_prefix", trees))
    expected = logps(scoring_of("gemma3", "padded"), batch_of(FAMILIES["gemma3"], "padded", trees))
    got = logps(scoring, batch_of(FAMILIES["gemma3"], "packed", trees))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_models_that_see_no_images_and_batches_that_have_them_are_refused():
    family = FAMILIES["gemma3"]
    text = ScoringModel(family.make())
    with pytest.raises(UserError, match="model.images=true"):
        logps(text, batch_of(family, "padded"))
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2,
        )
    )  # fmt: skip
    with pytest.raises(UserError, match="model.path=here: LlamaForCausalLM.*no vision tower"):
        settle_parts(ScoringModel(llama), ModelSection(path="here", images=True))


def test_other_rules_of_attention_over_images_are_refused():
    """PaliGemma's prompts see themselves both ways; its argument has Gemma 3's name."""
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", "num_hidden_layers": 1, "hidden_size": 16,
                     "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
                     "head_dim": 8, "vocab_size": 99},
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 16, "num_hidden_layers": 1,
                       "intermediate_size": 16, "num_attention_heads": 2, "patch_size": 4,
                       "image_size": 16},
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.PaliGemmaForConditionalGeneration(config)
    assert "token_type_ids" in why_no_images(model)
    with pytest.raises(UserError, match="cannot be trained on images"):
        Vision(model)


def test_images_choose_the_whole_class():
    config = transformers.Qwen3_5Config()
    assert auto_class(config) is transformers.AutoModelForCausalLM
    assert auto_class(config, images=True) is transformers.AutoModelForImageTextToText
