"""Options that stand beside one image, and those of the processor for all of them."""

import json

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from dpo_fast.data.batch import collate
from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.images.files import open_image
from dpo_fast.data.rows import parse_row
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.data.verdicts import BadRow
from dpo_fast.errors import UserError
from tests.support.image_rows import picture, write_gemma, write_qwen

SIDE = 8  # pixels of a token's side in the tiny processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    picture(0, 100, 60).save(folder / "a.png")
    picture(1, 20, 24).save(folder / "b.png")
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return write_qwen(tmp_path_factory.mktemp("qwen"))


def row(*parts):
    said = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    return {
        "prompt": [{"role": "user", "content": [*parts, {"type": "text", "text": "q"}]}],
        **said,
    }


def part(**options):
    return {"type": "image", "image": "a.png", **options}


def tokenised(row, tokenizer, folder, **options):
    config = DataConfig(train="a", image_folder=str(folder), **options)
    return RowTokeniser(tokenizer, config)(parse_row("a:1", row, config))


def grid(tokenizer, folder, row, **options):
    """Rows and columns of the patches of the row's image."""
    tokeniser = RowTokeniser(
        tokenizer, config := DataConfig(train="a", image_folder=str(folder), **options)
    )
    found = tokeniser(parse_row("a:1", row, config))
    (image,) = found.images
    pixels = open_image(tokeniser.images.store.content(image), "a")
    inputs = tokeniser.images.model.inputs([pixels], [image["options"]])
    high, wide = inputs["image_grid_thw"][0, 1:].tolist()
    assert image["tokens"] == high * wide // 4
    return high // 2 * SIDE, wide // 2 * SIDE


@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        ({"max_pixels": 1024}, (4 * SIDE**2, 1024)),
        ({"min_pixels": 9000}, (9000, 16384 * SIDE**2)),  # more than the processor would ever make
        ({"min_pixels": 64, "max_pixels": 700.0}, (64, 700)),
    ],
)
def test_an_image_has_the_size_that_its_part_asks_for(options, bounds, folder, qwen):
    """As qwen_vl_utils has it, whose bounds hold where a part says nothing."""
    wanted = smart_resize(60, 100, SIDE, *bounds)
    assert grid(qwen, folder, row(part(**options))) == wanted
    nested = {"type": "image_url", "image_url": {"url": "a.png", **options}}
    assert grid(qwen, folder, row(nested)) == wanted
    column = row() | {"images": [{"path": "a.png", **options}]}
    assert grid(qwen, folder, column) == wanted
    assert grid(qwen, folder, row(part())) != wanted


def test_both_sides_are_rounded_to_whole_tokens(folder, qwen):
    asked = part(resized_height=33, resized_width=52, max_pixels=64)
    assert grid(qwen, folder, row(asked)) == (32, 48)


def test_options_of_all_images_hold_where_a_part_says_nothing(folder, qwen):
    kwargs = {"max_pixels": 1024, "min_pixels": 64}
    assert grid(qwen, folder, row(part(min_pixels=128)), images_kwargs=kwargs) == smart_resize(
        60, 100, SIDE, 128, 1024
    )


def test_pixels_are_those_of_the_resized_image(folder, qwen):
    config = DataConfig(train="a", image_folder=str(folder))
    tokeniser = RowTokeniser(qwen, config)
    model = tokeniser.images.model
    options = tokeniser(parse_row("a:1", row(part(max_pixels=1024)), config)).images[0]["options"]
    image = open_image((folder / "a.png").read_bytes(), "a")
    high, wide = smart_resize(60, 100, SIDE, 4 * SIDE**2, 1024)
    theirs = model.processor.image_processor(
        [image.resize((wide, high))], do_resize=False, return_tensors="pt"
    )
    ours = model.inputs([image, image], [options, ""])
    size = len(theirs["pixel_values"])
    assert torch.equal(ours["pixel_values"][:size], theirs["pixel_values"])
    assert torch.equal(ours["pixel_values"][size:], model.inputs([image])["pixel_values"])


def test_one_image_in_two_sizes_is_two_images(folder, qwen, tmp_path):
    rows = [row(part()), row(part(max_pixels=1024)), row(part(max_pixels=1024), part())]
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(train=str(file), cache_dir=str(tmp_path))
    for _ in range(2):  # made, and found again
        data = load_examples(config, qwen, split="train")
        batch = collate(
            [data[each] for each in range(3)], "padded", kind=data.kind, images=data.images
        )
        assert batch.images.tokens_D.tolist() == [60, 15]
        assert batch.images.order_I.tolist() == [0, 0, 1, 1, 1, 0, 1, 0]
        assert batch.images.inputs["image_grid_thw"].tolist() == [[1, 12, 20], [1, 6, 10]]


REFUSED = {
    "a size of OpenAI's": (
        row({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}),
        r"images\[0\].detail='low' names a size of OpenAI's models; give max_pixels",
    ),
    "one side": (row(part(resized_height=28)), r"images\[0\] has resized_height alone"),
    "bounds the wrong way round": (
        row(part(min_pixels=99, max_pixels=9)),
        r"images\[0\].min_pixels=99 is more than max_pixels=9",
    ),
    "no number": (row(part(max_pixels="many")), "max_pixels='many': expected a whole number"),
    "no pixels": (row(part(max_pixels=0)), "max_pixels=0: expected a whole number"),
    "a part that waits": (
        row({"type": "image", "max_pixels": 64}) | {"images": ["a.png"]},
        r"prompt\[0\].content\[0\] has max_pixels: give it beside the image, in the column",
    ),
    "a part of two kinds": (
        row({"type": "text", "text": "look", "image": "a.png"}),
        r"a part with a text and an image: prompt\[0\].content\[0\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_cannot_be_honoured_are_told(name, folder, qwen):
    wrong, message = REFUSED[name]
    with pytest.raises(BadRow, match=message):
        tokenised(wrong, qwen, folder)


def test_a_processor_without_such_options_says_so(folder, tmp_path):
    gemma = write_gemma(tmp_path)
    with pytest.raises(
        BadRow,
        match=r"images\[0\] \(.*a.png\) has max_pixels=64, and Gemma3ImageProcessorPil has no",
    ):
        tokenised(row(part(max_pixels=64)), gemma, folder)
    assert tokenised(row(part(detail="high")), gemma, folder).images[0]["tokens"] == 4


@pytest.mark.parametrize(
    "bare", [{"image": "a.png"}, {"type": None, "image_url": {"url": "a.png"}}]
)
def test_a_part_needs_no_type(bare, folder, qwen):
    wanted = tokenised(row(part()), qwen, folder)
    assert tokenised(row(bare), qwen, folder).prompt_ids == wanted.prompt_ids
    beside = row(part()) | {"metadata": {"image": "b.png"}, "source": [{"image": "b.png"}]}
    assert tokenised(beside, qwen, folder).prompt_ids == wanted.prompt_ids


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"min_pixels": 9000}, "min_pixels=9000 cannot be honoured: the max_pixels of .* is 4096"),
        ({"max_pixels": 100}, "max_pixels=100 cannot be honoured: the min_pixels of .* is 256"),
        ({"min_pixels": 9, "max_pixels": 4}, "min_pixels=9 cannot be honoured: max_pixels is 4"),
    ],
)
def test_bounds_of_all_images_go_together(kwargs, message, folder, qwen):
    with pytest.raises(UserError, match=f"data.images_kwargs.{message}"):
        tokenised(row(part()), qwen, folder, images_kwargs=kwargs)


def test_bounds_of_all_images_take_effect(folder, qwen):
    for low, high in ((64, 512), (5000, 9000)):
        kwargs = {"min_pixels": low, "max_pixels": high}
        wanted = smart_resize(60, 100, SIDE, low, high)
        assert grid(qwen, folder, row(part()), images_kwargs=kwargs) == wanted
