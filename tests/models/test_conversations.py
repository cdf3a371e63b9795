"""Thinking, tools and images in hybrids and image-text models: every layout against transformers alone."""

import copy
import functools

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

from transformers import AutoTokenizer

from dpo_fast.data.batch import collate
from dpo_fast.data.config import DataConfig
from dpo_fast.data.images.laid import ImageLoader
from dpo_fast.data.images.processor import load_processor
from dpo_fast.data.kinds import PAIRS
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.data.rows import parse_row
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.models import ScoringModel, load_tokenizer
from dpo_fast.models.attention import NAMES
from dpo_fast.models.config import ModelSection
from dpo_fast.models.decoder import attention_of_parts
from dpo_fast.models.lora import add_lora
from dpo_fast.models.lora_section import LoraSection
from dpo_fast.models.parts import settle_parts
from dpo_fast.models.scoring import forward_arguments
from tests.support.conversations import IMAGES, TEXTS, Oracle, write_pictures
from tests.support.faults import SLOW
from tests.support.hybrids import make
from tests.support.image_runs import write_image_model
from tests.support.templates import template_tokenizer, trl_templates

# A model that is tried with a template of its family.
OF_TEXT = {
    "qwen3-next": "qwen3",
    "qwen3.5": "qwen3_5_think",
    "qwen3.5-moe": "qwen3_6",
    "nemotron-h": "nemotron_3_nano",
    "lfm2": "lfm2_v2",
    "granite-hybrid": "qwen3",
}
OF_IMAGES = {"qwen3-vl": "qwen3_vl", "qwen3.5": "qwen3_5_think", "gemma3": "gemma3"}
SAMPLE = {"qwen3.5": ("several turns", "thought before"), "nemotron-h": ("calls a tool",)}
SAMPLE_OF_IMAGES = {"qwen3.5": ("several turns, with images", "numbered images")}
SAMPLE_OF_IMAGES |= {"qwen3-vl": ("a tool shows an image",)}


def scored(scoring, tokeniser, row, layout):
    """Our log-probs of both answers."""
    found = tokeniser(parse_row("rows:1", row, tokeniser.config))
    example = vars(found) | ({"images": found.images} if found.images else {})
    model = tokeniser.images.model
    batch = collate(
        [example], layout, kind=PAIRS, images=ImageLoader(model, tokeniser.images.store)
    )
    logp = scoring(**forward_arguments(batch))["logp"]
    return logp.split(batch.lengths_S.tolist())


@functools.cache
def text_model(name):
    tokenizer = template_tokenizer(trl_templates()[OF_TEXT[name]])
    return tokenizer, make(name, vocab_size=len(tokenizer), max_position_embeddings=4096)


def adapters_on(scoring, values=None):
    """Adapters that change what the model says: these, or some."""
    add_lora(scoring, LoraSection(r=2, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, each in scoring.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each, std=0.1)
        if values and name in values:
            each.data.copy_(values[name])


def plain(scoring):
    """transformers' model with its adapters, and a head of its own."""
    model, weight = scoring.causal_lm, scoring.causal_lm.get_output_embeddings().weight
    head = torch.nn.Linear(*reversed(weight.shape), bias=False)
    head.weight = weight
    model.set_output_embeddings(head)
    return model


def settled(model, images):
    scoring = ScoringModel(model)
    if images:
        settle_parts(scoring, ModelSection(path="model", images=True))
    return scoring


def check(model, tokenizer, folder, forms, processor=None, adapters=False):
    """Every layout gives the log-probs that transformers gives each conversation alone."""
    ours = settled(copy.deepcopy(model), processor is not None)
    theirs = model
    if adapters:
        adapters_on(ours)
        values = {name: each.data for name, each in ours.named_parameters() if "lora_" in name}
        other = settled(copy.deepcopy(model), processor is not None)
        adapters_on(other, values)
        theirs = plain(other)
    config = DataConfig(train="rows", max_length=4096, image_folder=str(folder))
    tokeniser = RowTokeniser(tokenizer, config)
    oracle = Oracle(theirs, tokenizer, processor)
    counts = {}
    for name, row in forms.items():
        expected = [oracle.logps(row, row[side]) for side in ("chosen", "rejected")]
        for layout in LAYOUTS:
            if LAYOUTS[layout].shares_rows:
                attention = attention_of_parts(ours.causal_lm.config, NAMES["sdpa"])
                ours.causal_lm.set_attn_implementation(attention)
            found = scored(ours, tokeniser, row, layout)
            for one, other in zip(found, expected):
                assert len(one) == len(other), (name, layout, len(one), len(other))
                assert torch.allclose(one, other, rtol=1e-4, atol=1e-4), (name, layout)
        counts[name] = [len(each) for each in expected]
        ours.causal_lm.set_attn_implementation(attention_of_parts(ours.causal_lm.config, "sdpa"))
    return counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversations")
    write_pictures(folder)
    return folder


@functools.cache
def image_model(folder, name):
    """A model with its processor, and the template that TRL has of its family."""
    path = write_image_model(folder / name, name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = trl_templates()[OF_IMAGES[name]]
    marks = [
        each for each in ("<start_of_turn>", "<end_of_turn>") if each in tokenizer.chat_template
    ]
    tokenizer.add_tokens(marks, special_tokens=True)  # the model has rows to spare
    tokenizer.save_pretrained(path)
    tokenizer = load_tokenizer(ModelSection(path=str(path)))
    processor = load_processor({"pretrained_model_name_or_path": str(path)}, tokenizer, name)
    config = transformers.AutoConfig.from_pretrained(path)
    config.text_config.max_position_embeddings = 4096
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, config=config)
    return tokenizer, processor, model.eval()


def told_to(tokenizer, forms):
    """Forms as a template takes them: without fields of thinking or tools that it would not write."""
    template, found = tokenizer.chat_template, {}
    for name, row in forms.items():
        if row.get("tools") and "tools" not in template:
            continue
        row = copy.deepcopy(row)
        for each in (*row["prompt"], *row["chosen"], *row["rejected"]):
            if "reasoning_content" not in template:
                each.pop("reasoning_content", None)
        kwargs = row.pop("chat_template_kwargs", {})
        if kwargs := {key: value for key, value in kwargs.items() if key in template}:
            row["chat_template_kwargs"] = kwargs
        found[name] = row
    assert found
    return found


def of_images(folder, name, forms, adapters=False):
    tokenizer, processor, model = image_model(folder, name)
    told = told_to(tokenizer, {each: IMAGES[each] for each in forms})
    return check(model, tokenizer, folder, told, processor, adapters)


def of_text(folder, name, forms, adapters=False):
    tokenizer, model = text_model(name)
    told = told_to(tokenizer, {each: TEXTS[each] for each in forms})
    return check(model, tokenizer, folder, told, None, adapters)


@pytest.mark.parametrize("name", SAMPLE)
def test_conversations_in_hybrids_score_as_each_alone(folder, name):
    of_text(folder, name, SAMPLE[name])


@pytest.mark.parametrize("name", SAMPLE_OF_IMAGES)
def test_conversations_about_images_score_as_each_alone(folder, name):
    of_images(folder, name, SAMPLE_OF_IMAGES[name])


def test_adapters_score_conversations_about_images_as_each_alone(folder):
    of_images(folder, "qwen3.5", ("calls a tool, with images",), adapters=True)


@SLOW
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("name", OF_TEXT)
def test_every_conversation_in_every_hybrid(folder, name, adapters):
    print(name, of_text(folder, name, TEXTS, adapters))


@SLOW
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("name", OF_IMAGES)
def test_every_conversation_about_images(folder, name, adapters):
    print(name, of_images(folder, name, (*IMAGES,), adapters))
