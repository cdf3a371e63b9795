"""What stands in a text for an image, by the processors of all image-text models that can be made here.

Their tokenizer is one of bytes with the special tokens that they ask for. What is compared is text: the one
that the processor hands to its tokenizer for a whole prompt, and ours.
"""

import inspect
import json
from collections import Counter

import pytest
import torch
import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from dpo_fast.data.images.model import ModelImages
from dpo_fast.data.images.processor_options import token_side
from dpo_fast.data.verdicts import BadRow
from tests.support.faults import SLOW
from tests.support.image_rows import image_tokenizer, picture

SAMPLE = ("gemma3n", "glm4v", "idefics3", "internvl", "llava_next")
# Processors that add words of their own to every prompt, or treat several images as they do not one.
OTHERWISE = {"chameleon", "idefics", "llava_onevision", "mllama"}
TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "start_image_token": "<|image_start|>",
    "end_image_token": "<|image_end|>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
    "audio_token": "<audio>",
    "boa_token": "<audio>",
    "eoa_token": "<audio>",
}
MORE = ("<image>", "<|image_pad|>", "<fake_token_around_image>", "<global-img>", "<img>", "</img>")
SIZES = {"image_seq_length": 4, "image_seq_len": 4, "num_image_tokens": 4, "patch_size": 14}
SIZES |= {"num_additional_image_tokens": 1, "audio_seq_length": 4}
PICTURES = [picture(0, 60, 90), picture(1, 90, 60), picture(2, 128, 300)]


def processor_of(family):
    """The processor of a family, small; raises what transformers raises where it cannot be made."""
    kind = getattr(transformers, PROCESSOR_MAPPING_NAMES[family])
    names = IMAGE_PROCESSOR_MAPPING_NAMES[family]
    names = list(names.values()) if isinstance(names, dict) else names
    names = [name for name in names if name] if isinstance(names, (list, tuple)) else [names]
    pictures = getattr(
        transformers, next((name for name in names if name.endswith("Pil")), names[0])
    )()
    tokenizer = image_tokenizer((*dict.fromkeys(TOKENS.values()), *MORE), "<image>")
    for name, token in (TOKENS | {"image_token": "<image>"}).items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))

    class Small(kind):
        def check_argument_for_proper_class(self, *_):
            """Without torchvision there is no video processor."""

    Small.__name__ = kind.__name__
    taken = inspect.signature(kind.__init__).parameters
    parts = dict.fromkeys(kind.get_attributes()) | {
        "image_processor": pictures,
        "tokenizer": tokenizer,
    }
    own = {name: value for name, value in SIZES.items() if name in taken}
    for name, value in (("vision_feature_select_strategy", "default"), ("image_token", "<image>")):
        own |= {name: value} if name in taken else {}
    return Small(**parts, **own)


def images(family):
    processor = processor_of(family)
    model = ModelImages(processor, processor.tokenizer, family)
    (text,) = model._process(PICTURES[:1])[1]
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    # Without a model's configuration, the image token is the special token that comes most often.
    special = [index for index in ids if index in processor.tokenizer.all_special_ids]
    model.token_id = Counter(special or ids).most_common(1)[0][0]
    return model


def same(model, pictures):
    words = [f"word {place}\n" for place in range(len(pictures))]
    begin, end = model._frame
    before = "".join(word + begin + model.placeholder + end for word in words)
    ours = "".join(
        word + begin + model.expansion(each).text + end for word, each in zip(words, pictures)
    )
    return model.written(f"{before} end", pictures) == f"{ours} end"


@pytest.mark.parametrize("family", SAMPLE)
def test_a_prompt_is_written_as_the_processor_writes_it(family):
    model = images(family)
    assert same(model, PICTURES[:1]) and same(model, PICTURES)
    inputs = model.inputs(PICTURES)
    assert "pixel_values" in inputs and "input_ids" not in inputs
    assert all(model.expansion(each).tokens for each in PICTURES)


@SLOW
def test_every_processor_that_can_be_made_is_tried():
    found, told, unmade = [], set(), {}
    for family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        try:
            model = images(family)
        except Exception as error:  # torchvision, other packages, tokens that the tokenizer lacks
            unmade[family] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            continue
        if same(model, PICTURES[:1]) and same(model, PICTURES):
            found.append(family)
        else:
            told.add(family)
    print(f"{len(found)} as the processor writes them: {', '.join(found)}")
    for family, error in unmade.items():
        print(f"{family}: {error}")
    assert told <= OTHERWISE and len(found) > 30


@SLOW
def test_every_processor_takes_the_size_of_one_image_or_says_that_it_does_not():
    honoured, refused = [], []
    for family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        try:
            model = images(family)
        except Exception:  # noqa: S112 - told by the test above
            continue
        side = token_side(model.processor.image_processor)
        asked = json.dumps({"resized_height": 4 * (side or 28), "resized_width": 6 * (side or 28)})
        try:
            expansion = model.expansion(PICTURES[2], asked)
        except BadRow as verdict:
            assert side is None and "has no such option" in str(verdict)
            refused.append(family)
            continue
        pixels = model.inputs([PICTURES[2], PICTURES[0]], [asked, ""])
        alone = [model.inputs([PICTURES[2]], [asked]), model.inputs([PICTURES[0]])]
        for name, value in pixels.items():
            assert torch.equal(value, torch.cat([each[name] for each in alone])), (family, name)
        grid = next(value for name, value in pixels.items() if name.endswith("grid_thw"))
        merge = model.processor.image_processor.merge_size
        assert grid[0, 1:].tolist() == [4 * merge, 6 * merge], family
        assert expansion.tokens >= 24, family
        honoured.append(family)
    print(f"honoured: {', '.join(honoured)}; refused: {', '.join(refused)}")
    assert len(honoured) > 5 and len(refused) > 10
