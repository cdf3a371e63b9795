"""Rows with images, from files to the pixel values of a batch, by the processors of two models."""

import base64
import json
import shutil
import threading

import datasets
import pytest
import torch
from pyarrow import ipc
from transformers import AutoTokenizer, LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor

from dpo_fast.data.batch import collate
from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.grouping import exact_costs
from dpo_fast.data.images.ahead import Ahead
from dpo_fast.data.images.files import open_image
from dpo_fast.data.images.model import images_of
from dpo_fast.data.images.processor import load_processor
from dpo_fast.data.images.tokens import codes, image_key, whole_images
from dpo_fast.data.kinds import ExampleLengths
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.data.mismatched import mismatched
from dpo_fast.data.rows import parse_row
from dpo_fast.data.stream import ExampleStream
from dpo_fast.data.tokenise import RowTokeniser, fit
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError
from dpo_fast.models import load_tokenizer
from dpo_fast.models.config import ModelSection
from tests.support.image_rows import (
    GEMMA,
    QWEN,
    image_tokenizer,
    picture,
    png,
    write_gemma,
    write_qwen,
)
from tests.support.tokenizers import chat_tokenizer

SIZES = [(32, 24), (24, 32), (40, 40), (32, 24)]
TOKENS = [12, 12, 25, 12]  # of Qwen's, one for 8 x 8 pixels


def turn(role, content):
    return {"role": role, "content": content}


def pair(content="<image>What is it?", images=("0.png",), chosen="A cat.", rejected="A dog."):
    row = {"prompt": [turn("user", content)], "images": list(images)}
    return row | {"chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for seed, size in enumerate(SIZES):
        picture(seed, *size).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return write_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return write_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture
def load(folder, tmp_path, qwen):
    """Writes rows beside the pictures and loads them."""

    def run(rows, tokenizer=qwen, name="rows.jsonl", **options):
        path = folder / name
        if rows is not None:
            path.write_text("\n".join(map(json.dumps, rows)))
        config = DataConfig(train=str(path), cache_dir=str(tmp_path / "cache"), **options)
        return load_examples(config, tokenizer, split="train")

    yield run
    for path in folder.glob("*.jsonl"):
        path.unlink()


def tokenised(row, tokenizer, folder, **options):
    config = DataConfig(train="a", image_folder=str(folder), **options)
    return RowTokeniser(tokenizer, config)(parse_row("a:1", row, config))


def laid(data, layout="shared_prefix", rows=None):
    rows = range(len(data)) if rows is None else rows
    examples = [data[row] for row in rows]
    return collate(examples, layout, kind=data.kind, images=data.images)


@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_prompts_are_what_the_processor_makes_of_them(family, folder, request):
    tokenizer = request.getfixturevalue(family)
    model = images_of(tokenizer)
    row = pair("<image>\nand\n<image>", ["0.png", "2.png"])
    found = tokenised(row, tokenizer, folder)
    pictures = [open_image((folder / name).read_bytes(), name) for name in row["images"]]
    parts = [{"type": "image"}, {"type": "text", "text": "\nand\n"}, {"type": "image"}]
    text = tokenizer.apply_chat_template(
        [turn("user", parts)], tokenize=False, add_generation_prompt=True
    )
    theirs = model.processor(text=[text], images=[pictures])
    ids = [model.token_id if index < 0 else index for index in found.prompt_ids]
    assert ids == theirs["input_ids"][0]
    assert model.token_id == tokenizer.convert_tokens_to_ids(
        {"qwen": QWEN, "gemma": GEMMA}[family][2]
    )
    counts = [image["tokens"] for image in found.images]
    assert counts == ([12, 25] if family == "qwen" else [4, 4])
    assert found.image_tokens == sum(counts)
    theirs = model.processor(text=[text], images=[pictures], images_kwargs={"return_tensors": "pt"})
    for name, value in model.inputs(pictures).items():
        assert torch.equal(value, theirs[name])


def test_an_image_is_its_own_tokens(folder, qwen):
    first = tokenised(pair(images=["0.png"]), qwen, folder)
    again = tokenised(pair(images=["0.png"]), qwen, folder)
    other = tokenised(pair(images=["3.png"]), qwen, folder)  # of the same size
    assert first.prompt_ids == again.prompt_ids != other.prompt_ids
    assert len(first.prompt_ids) == len(other.prompt_ids)
    differing = [a for a, b in zip(first.prompt_ids, other.prompt_ids) if a != b]
    assert len(differing) == 12 and max(differing) < 0
    coarse = tokenised(pair(images=["0.png"]), qwen, folder, images_kwargs={"do_normalize": False})
    assert coarse.prompt_ids != first.prompt_ids  # its pixel values are others
    key = image_key(b"a", b"b")
    assert codes(key, 3) == codes(key, 5)[:3] and min(codes(key, 5000)) >= -(2**31)


ROWS = [
    pair(),
    pair(images=["3.png"]),  # the same text, another image
    pair(chosen="A bird."),
    pair("No image.", []),
    pair("<image> or <image>?", ["2.png", "0.png"]),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_have_every_distinct_image_once(layout, load):
    data = load(ROWS)
    batch = laid(data, layout)
    images = batch.images
    assert images.tokens_D.tolist() == [12, 12, 25]
    wanted = {"shared_prefix": [0, 1, 2, 0], "packed": [0, 0, 1, 1, 0, 0, 2, 0, 2, 0]}
    wanted["padded"] = wanted["packed"]
    if layout != "shared_prefix":  # the rejected answers of the first and the third are one row
        wanted[layout] = [0, 0, 1, 1, 0, 2, 0, 2, 0]
    assert images.order_I.tolist() == wanted[layout]
    assert images.image_tokens_N.sum() == images.tokens_D[images.order_I].sum()
    ids = batch.input_ids.flatten()
    assert torch.equal(ids == images.token_id, images.image_tokens_N) and ids.min() >= 0
    names = ["0.png", "3.png", "2.png"]
    pictures = [picture(int(name[0]), *SIZES[int(name[0])]) for name in names]
    for name, value in data.images.model.inputs(pictures).items():
        assert torch.equal(images.inputs[name], value)
    assert (batch.targets_U >= 0).all() and not (batch.targets_U == images.token_id).any()
    assert laid(data, layout, [3]).images is None
    moved = batch.to("meta").images
    tensors = [moved.order_I, moved.tokens_D, moved.image_tokens_N, *moved.inputs.values()]
    assert {each.device.type for each in tensors} == {"meta"}


def trajectory(begun):
    """Answers that begin alike, up to an image of the user's and after it."""
    row = pair(images=["0.png", "0.png"])
    for name, text in (("chosen", "good"), ("rejected", "bad")):
        row[name] = [turn("assistant", begun), turn("user", "<image>"), turn("assistant", text)]
    return row


@pytest.mark.parametrize("layout", LAYOUTS)
def test_costs_count_the_tokens_of_images(layout, load):
    data = load([*ROWS, trajectory("yes"), trajectory("nay")])
    alone = [laid(data, layout, [row]).input_ids.numel() for row in range(len(data))]
    assert exact_costs(data, layout).alone_P.tolist() == alone
    lengths = ExampleLengths.of([data[0]], data.kind)
    assert lengths.prompt_P.tolist() == data.lengths.prompt_P[:1].tolist()


def test_what_is_stored_is_found_again(load, capsys, folder):
    data = load(ROWS)
    report = data.report
    assert (report.with_images, report.images, report.image_tokens) == (
        4,
        5,
        12 + 12 + 12 + 25 + 12,
    )
    assert "4 of 5 pairs have images: 5 with 73 tokens" in " ".join(report.notes())
    assert data[3]["images"] is None
    again = load(None)
    assert again.token_fingerprint == data.token_fingerprint
    assert len(set(data.digests.to_pylist())) == 5
    assert "made again" not in capsys.readouterr().err


def test_an_image_that_changes_makes_its_rows_new(load, folder, capsys):
    file = folder / "own.png"
    file.write_bytes(png(picture(7)))
    data = load([pair(images=["own.png"])])
    file.write_bytes(png(picture(8)))
    with pytest.raises(UserError, match="own.png: the image has changed since the rows were read"):
        laid(data)
    again = load(None)
    assert "own.png: the image has changed; " in capsys.readouterr().err
    assert again.token_fingerprint != data.token_fingerprint
    assert laid(again).images.tokens_D.tolist() == [12]
    file.unlink()
    with pytest.raises(UserError, match="own.png: the image was there when the rows were read"):
        laid(again)
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: images\[0\] is not there: no file 'own.png'"
    ):
        load(None)


@pytest.mark.parametrize("nested", [False, True])
def test_images_inside_rows_are_kept_beside_the_tokens(nested, load, folder, tmp_path):
    """As `datasets` has them, in Parquet and in a folder of its own; none is decoded on the way."""
    contents = [(folder / f"{seed}.png").read_bytes() for seed in (0, 3, 0)]
    rows = [pair(images=[]) for _ in contents]
    column = datasets.List(datasets.Image()) if nested else datasets.Image()
    for row, content in zip(rows, contents):
        image = {"bytes": content, "path": None}
        row["images"] = [image] if nested else image
    features = datasets.Dataset.from_list([{**row, "images": None} for row in rows]).features
    features["images"] = column
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    files = load([pair(), pair(images=["3.png"]), pair()])
    wanted = laid(files)
    for name in ("rows.parquet", "saved"):
        config = DataConfig(train=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        data = load_examples(config, load(None).images.model.tokenizer, split="train")
        batch = laid(data)
        assert data.digests == files.digests
        assert torch.equal(batch.input_ids, wanted.input_ids)
        assert torch.equal(batch.images.order_I, wanted.images.order_I)
        for key, value in wanted.images.inputs.items():
            assert torch.equal(batch.images.inputs[key], value)
    kept = [ipc.open_file(str(file)) for file in (tmp_path / "cache").rglob("images.arrow")]
    assert [file.num_record_batches for file in kept] == [2, 2]


def test_large_images_do_not_make_a_row_too_long(tmp_path, qwen):
    noise = png(picture(1, 900, 900))
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "image": {"bytes": noise, "path": None}}
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert len(noise) > 1 << 20
    options = {"cache_dir": str(tmp_path / "cache")}
    config = DataConfig(train=str(tmp_path / "a.parquet"), **options)
    assert len(load_examples(config, qwen, split="train")) == 1
    with pytest.raises(UserError, match="more than data.max_row_bytes"):
        datasets.Dataset.from_list([rows[0] | {"prompt": "q" * (2 << 20)}]).to_parquet(
            tmp_path / "a.parquet"
        )
        load_examples(config, qwen, split="train")


def test_large_images_in_lines_of_json_are_no_texts(load):
    code = base64.b64encode(png(picture(1, 900, 900))).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{code}"}}
    row = pair([image, {"type": "text", "text": "q"}], [])
    assert len(json.dumps(row)) > 1 << 20
    assert laid(load([row, pair()])).images.order_I.tolist() == [0, 1]
    with pytest.raises(UserError, match="rows.jsonl:2: more than data.max_row_bytes"):
        load([row, pair([image, {"type": "text", "text": "q" * (2 << 20)}], [])])
    with pytest.raises(UserError, match="rows.jsonl:1: more than data.max_row_bytes"):
        load([pair(images=[code])])


def test_parts_with_and_without_images_are_one_data_set(load, folder, tmp_path, qwen):
    for name, rows in (
        ("a", [pair()]),
        ("b", [pair("No image.", [])]),
        ("c", [pair(images=["3.png"])]),
    ):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [{"path": str(folder / f"{name}.jsonl"), "weight": 1} for name in "bac"]
    config = DataConfig(train=sources, cache_dir=str(tmp_path / "cache"))
    data = load_examples(config, qwen, split="train")
    assert [bool(data[row]["images"]) for row in range(3)] == [False, True, True]
    assert laid(data).images.order_I.tolist() == [0, 1]
    assert data.report.images == 2


def test_several_processes_make_the_same_of_images(load):
    alone, together = load(ROWS), load(None, workers=2)
    assert alone.token_fingerprint == together.token_fingerprint


def test_a_stream_makes_the_same_batches(load, folder, qwen):
    stored = load(ROWS)
    config = DataConfig(train=str(folder / "rows.jsonl"), streaming=True)
    chunk = ExampleStream(config, qwen).read()
    assert [chunk[row]["prompt_ids"] for row in range(5)] == [
        stored[row]["prompt_ids"] for row in range(5)
    ]
    one, other = laid(chunk), laid(stored)
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.images.inputs["pixel_values"], other.images.inputs["pixel_values"])
    assert chunk.report.images == 5


LONG = "word " * 30


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_no_cut_goes_through_an_image(truncation, folder, qwen):
    """Every length is tried: what is kept has the whole image and its marks, or the row is dropped."""
    marks = [qwen.convert_tokens_to_ids(mark) for mark in QWEN[:2]]
    row = pair(f"{LONG}<image>{LONG}", ["0.png"])
    whole = tokenised(row, qwen, folder)
    answers = {"chosen": whole.chosen_ids, "rejected": whole.rejected_ids}
    kept = dropped = 0
    for length in range(10, len(whole.prompt_ids) + 7):
        config = DataConfig(train="a", max_length=length, truncation=truncation)
        try:
            found = fit("a:1", whole.prompt_ids, answers, config).prompt
        except Dropped as verdict:
            assert verdict.fault == "an image does not fit"
            dropped += 1
            continue
        kept += 1
        images = [place for place, index in enumerate(found) if index < 0]
        assert len(images) == 12 and images[-1] - images[0] == 11
        assert [found[images[0] - 1], found[images[-1] + 1]] == marks
        assert len(found) < length
    assert kept > 100 and dropped > 100
    cut = tokenised(row, qwen, folder, max_length=len(whole.prompt_ids), truncation=truncation)
    assert cut.prompt_cut and len(cut.images) == 1
    with pytest.raises(Dropped, match="longer than max_length"):
        tokenised(row, qwen, folder, max_length=100, truncation="drop")
    with pytest.raises(UserError, match="do not fit into data.max_length=100; raise it to"):
        tokenised(row, qwen, folder, max_length=100, truncation="error")


def test_dropped_images_are_counted(load):
    data = load([pair(LONG + "<image>" + LONG), *ROWS], max_length=120)
    assert data.report.dropped.counts == {"an image does not fit": 1} and len(data) == 5


CONVERSATION = {
    "messages": [
        turn("user", "<image>q"),
        turn("assistant", "one"),
        turn("user", "<image>r"),
        turn("assistant", "two"),
        turn("user", "and <image> here"),
        turn("assistant", "three"),
    ],
    "images": ["0.png", "2.png", "0.png"],
}


@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_images_of_later_turns_are_in_the_answer_and_not_scored(family, folder, request):
    tokenizer = request.getfixturevalue(family)
    found = tokenised(CONVERSATION, tokenizer, folder)
    scored = [index for index, flag in zip(found.completion_ids, found.completion_scored) if flag]
    assert tokenizer.decode(scored) == "one<|im_end|>two<|im_end|>three<|im_end|>"
    assert sum(index < 0 for index in found.completion_ids) == (37 if family == "qwen" else 8)
    assert len(found.images) == 2
    with pytest.raises(BadRow, match="an image that would be scored"):
        tokenised(CONVERSATION, tokenizer, folder, scored="all")
    # An answer is cut before an image that does not fit, and the image is not stored then.
    cut = tokenised(CONVERSATION, tokenizer, folder, max_length=len(found.prompt_ids) + 28)
    assert [image["tokens"] for image in cut.images] == [found.images[0]["tokens"]]
    assert min(cut.completion_ids) >= 0


def test_a_foreign_completion_brings_its_images(load):
    data = load([CONVERSATION, {**CONVERSATION, "images": ["3.png", "1.png", "1.png"]}])
    first, second = data[0], data[1]
    for room in range(len(first["prompt_ids"]) + 8, data.lengths.prompt_P[0] + 60):
        foreign = mismatched(first, second, data.kind, room)
        assert len(foreign["completion_ids"]) == len(foreign["completion_scored"])
        batch = collate([foreign], "packed", kind=data.kind, images=data.images)
        assert batch.images.order_I.tolist() == [0] + [1] * (len(batch.images.order_I) - 1)
    assert len(batch.images.order_I) == 2


def test_texts_get_what_the_template_writes_for_an_image(folder, qwen):
    row = {"prompt": "<image>Q:", "images": ["0.png"], "chosen": " a", "rejected": " b"}
    found = tokenised(row, qwen, folder)
    ids = [qwen.convert_tokens_to_ids(mark) for mark in QWEN[:2]]
    assert found.prompt_ids[0] == ids[0] and found.prompt_ids[13] == ids[1]
    own = tokenised(row | {"prompt": "<|image_pad|>Q:"}, qwen, folder)
    assert own.prompt_ids == [*found.prompt_ids[1:13], *found.prompt_ids[14:]]
    with pytest.raises(BadRow, match="images and their places differ in number"):
        tokenised(row | {"prompt": "<|image_pad|><|image_pad|>Q:"}, qwen, folder)


def test_a_text_with_the_models_own_placeholder_is_told(folder, qwen):
    with pytest.raises(
        BadRow, match="the prompt has 1 of the row's 1 images, and its text has 2 times"
    ):
        tokenised(pair("<image>What is <|image_pad|>?"), qwen, folder)


def test_a_template_without_images_is_told(folder, tmp_path):
    tokenizer = write_qwen(tmp_path)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ '<|vision_start|>", "{{ '")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|image_pad|><|vision_end|>", "")
    with pytest.raises(
        BadRow, match="its text has 0 times '<|image_pad|>': the chat template writes"
    ):
        tokenised(pair(), tokenizer, folder)


def test_a_model_of_text_says_that_it_takes_no_images(folder, load, tmp_path):
    message = "the data has images, and .* takes none.*data.ignore_columns=.images."
    with pytest.raises(UserError, match=message):
        tokenised(pair(), chat_tokenizer(), folder)
    plain = tmp_path / "plain"
    chat_tokenizer().save_pretrained(plain)
    with pytest.raises(UserError, match=f"model.path={plain} takes none"):
        load([pair()], AutoTokenizer.from_pretrained(plain))
    row = pair("q") | {"images": []}
    assert len(load([row, pair("r")], chat_tokenizer(), ignore_columns=["images"])) == 2


def test_a_processor_that_cannot_be_loaded_is_told(folder, tmp_path):
    tokenizer = write_qwen(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_processor_type": "Nothing"}))
    with pytest.raises(UserError, match=f"{tmp_path}: its processor cannot be loaded"):
        tokenised(pair(), tokenizer, folder)


def test_options_of_the_processor_are_checked_and_used(folder, qwen):
    small = tokenised(pair(images=["2.png"]), qwen, folder, images_kwargs={"max_pixels": 1024})
    assert small.images[0]["tokens"] < 25
    with pytest.raises(
        UserError, match="data.images_kwargs.max_pixel=3: .* no such option; choose from"
    ):
        tokenised(pair(), qwen, folder, images_kwargs={"max_pixel": 3})


def test_damaged_images_name_file_line_and_field(load, folder):
    (folder / "bad.png").write_bytes(b"no image")
    rows = [pair(), pair("<image><image>", ["0.png", "bad.png"])]
    with pytest.raises(
        UserError, match=r"rows.jsonl:2: images\[1\] \(.*bad.png\) cannot be decoded"
    ):
        load(rows)
    data = load(rows, on_bad_row="skip")
    assert len(data) == 1 and data.report.bad.total == 1


def test_parts_of_an_image_are_no_end():
    ids = [5, -1, -2, 6, -3, -4, -5]
    assert [whole_images(ids, size) for size in range(9)] == [0, 1, 1, 3, 4, 4, 4, 7, 7]


def test_image_folder_is_where_paths_begin(load, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "else")
    (tmp_path / "rows.jsonl").write_text(json.dumps(pair()))
    config = DataConfig(train=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    tokenizer = load([pair()]).images.model.tokenizer
    with pytest.raises(UserError, match="no file '0.png' in"):
        load_examples(config, tokenizer, split="train")
    config = config.model_copy(update={"image_folder": str(tmp_path / "else")})
    assert len(load_examples(config, tokenizer, split="train")) == 1


def test_the_next_batch_is_made_ahead():
    made, gate = [], threading.Event()

    def make(places):
        if len(made) == 2:
            assert gate.wait(10)
        if places == [9]:
            raise UserError("a damaged image")
        made.append((places, threading.current_thread() is threading.main_thread()))
        return places

    ahead = Ahead(make)
    first = ahead.batches([[0], [1], [2]], [3])
    assert next(first) == [0] and next(first) == [1]
    gate.set()  # the third is on its way, and nobody waits for it
    assert list(first) == [[2]]
    assert list(ahead.batches([[3], [4]], None)) == [[3], [4]]
    assert [places for places, _ in made] == [[0], [1], [2], [3], [4]]
    assert not any(main for _, main in made)
    list(ahead.batches([[5]], [6]))
    assert list(ahead.batches([[7]], None)) == [[7]]  # another than was expected
    failing = ahead.batches([[8], [9]], None)
    assert next(failing) == [8]
    with pytest.raises(UserError, match="a damaged image"):
        next(failing)


def test_the_tokenizer_of_a_model_knows_its_processor(folder, tmp_path, qwen):
    """Its template may be in a file of the processor's own, which transformers gives to no tokenizer."""
    tokenizer = write_qwen(tmp_path / "model")
    template = tokenizer.chat_template
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template is None
    (tmp_path / "model" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    found = load_tokenizer(ModelSection(path=str(tmp_path / "model")))
    assert found.chat_template == template
    wanted = tokenised(pair(), qwen, folder).prompt_ids
    assert tokenised(pair(), found, folder).prompt_ids == wanted
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    (tmp_path / "other" / "preprocessor_config.json").unlink()
    section = ModelSection(path=str(tmp_path / "model"), tokenizer=str(tmp_path / "other"))
    assert tokenised(pair(), load_tokenizer(section), folder).prompt_ids == wanted
    plain = ModelSection(path=str(tmp_path / "other"))
    with pytest.raises(UserError, match="takes none"):
        tokenised(pair(), load_tokenizer(plain), folder)


def test_a_processor_that_treats_several_images_otherwise_is_told(folder):
    """LLaVA-OneVision cuts one image into tiles, and several into none."""

    class Processor(LlavaOnevisionProcessor):
        def check_argument_for_proper_class(self, *_):
            """Without torchvision there is no video processor."""

    tokenizer = image_tokenizer(("<image>", "<video>"), "<image>")
    tokenizer.image_token, tokenizer.video_token = "<image>", "<video>"
    pictures = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28})
    tokenizer.image_source = Processor(pictures, tokenizer, None, num_image_tokens=4)
    one = tokenised(pair(), tokenizer, folder)
    assert len(one.images) == 1 and one.images[0]["tokens"] > 4
    with pytest.raises(BadRow, match="2 images in one text are not what they are by themselves"):
        tokenised(pair("<image><image>", ["0.png", "1.png"]), tokenizer, folder)


@pytest.mark.parametrize("place", ["prompt", "chosen"])
def test_an_image_token_without_an_image_is_told(place, folder, qwen):
    """In a batch with images the model would look for its features."""
    row = pair("Why?", []) | {place: [turn({"prompt": "user"}.get(place, "assistant"), QWEN[2])]}
    with pytest.raises(
        BadRow, match="(prompt|chosen) has 1 times '<.image_pad.>', the model's image"
    ):
        tokenised(row, qwen, folder)
    assert tokenised(row | {place: pair("Why?", [])[place]}, qwen, folder).images is None
    without = chat_tokenizer()  # a model without a processor has no such token
    assert tokenised(row, without, folder).images is None


def test_a_part_that_images_need_is_named_before_one_that_videos_need(monkeypatch):
    def missing(name):
        def load(*_, **__):
            raise ImportError(f"{name} was not found")

        return load

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", missing("torchvision"))
    monkeypatch.setattr("dpo_fast.data.images.processor._without_video", missing("num2words"))
    with pytest.raises(UserError, match="the data has images: num2words was not found"):
        load_processor({}, None, "the model")
