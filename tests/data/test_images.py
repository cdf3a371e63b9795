"""Images of rows: where people put them, and what is said of those that cannot be used."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from dpo_fast.data.config import DataConfig
from dpo_fast.data.images.files import open_image, read_image
from dpo_fast.data.images.marks import images_in, mark
from dpo_fast.data.rows import parse_row
from dpo_fast.data.verdicts import BadRow
from tests.support.image_rows import picture, png

A, B = "a.png", "b.png"
ANSWERS = {"chosen": "yes", "rejected": "no"}


def turn(role, content):
    return {"role": role, "content": content}


SAID = {name: [turn("assistant", text)] for name, text in ANSWERS.items()}
PART = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def parsed(row, **options):
    return parse_row("a:1", row, DataConfig(train="a", **options))


def shown(row, **options):
    """The prompt with the names of its images, `[a.png]`; of a chat each message."""
    found = parsed(row, **options)
    names = found.optional.get("images", [])
    contents = (
        [found.prompt] if isinstance(found.prompt, str) else [m["content"] for m in found.prompt]
    )
    for index, name in enumerate(names):
        contents = [each.replace(mark(index), f"[{name}]") for each in contents]
    assert not any(images_in(each) for each in contents)
    return contents if found.is_chat else contents[0]


def asked(content):
    return [turn("user", content)]


CHATS = {
    "a column, and no place": ({"images": [A], "prompt": asked("q")}, ["[a.png]q"]),
    "a column of one": ({"image": A, "prompt": asked("q")}, ["[a.png]q"]),
    "several": ({"images": [A, B], "prompt": asked("q")}, ["[a.png][b.png]q"]),
    "after a system message": (
        {"images": [A], "prompt": [turn("system", "s"), *asked("q")]},
        ["s", "[a.png]q"],
    ),
    "parts that wait": (
        {"images": [A, B], "prompt": asked([PART, text("q"), PART])},
        ["[a.png]q[b.png]"],
    ),
    "parts as Arrow has them": (
        {
            "images": [A],
            "prompt": asked([{"type": "image", "text": None}, text("q") | {"image": None}]),
        },
        ["[a.png]q"],
    ),
    "parts that bring images": (
        {"prompt": asked([PART | {"image": A}, text("q"), PART | {"url": B}])},
        ["[a.png]q[b.png]"],
    ),
    "of OpenAI": (
        {"prompt": asked([text("q"), {"type": "image_url", "image_url": {"url": A}}])},
        ["q[a.png]"],
    ),
    "of OpenAI's responses": (
        {"prompt": asked([text("q"), {"type": "input_image", "image_url": A}])},
        ["q[a.png]"],
    ),
    "of Anthropic": (
        {"prompt": asked([{"type": "image", "source": {"type": "url", "url": A}}, text("q")])},
        ["[a.png]q"],
    ),
    "a part's path": ({"prompt": asked([PART | {"image_path": A}, text("q")])}, ["[a.png]q"]),
    "placeholders": (
        {"images": [A, B], "prompt": asked("one <image> two <image>?")},
        ["one [a.png] two [b.png]?"],
    ),
    "over two turns": (
        {
            "images": [A, B],
            "prompt": [*asked("<image>q"), turn("assistant", "a"), *asked("<image>r")],
        },
        ["[a.png]q", "a", "[b.png]r"],
    ),
    "as JSON text": (
        {"images": json.dumps([A]), "prompt": json.dumps(asked([PART, text("q")]))},
        ["[a.png]q"],
    ),
    "a text and a chat": ({"images": [A], "prompt": "q"}, ["[a.png]q"]),
    "lists of an older datasets": ({"images": {"path": [A, B]}, "prompt": asked("q")}, None),
    "nothing": ({"images": [], "prompt": asked("a <image> tag")}, ["a <image> tag"]),
    "null": ({"images": None, "prompt": asked("q")}, ["q"]),
}


@pytest.mark.parametrize("name", CHATS)
def test_images_have_a_place_in_the_prompt(name):
    row, wanted = CHATS[name]
    found = shown(row | SAID)
    if wanted is None:
        assert found[0].endswith("q") and found[0].count("[") == 2
    else:
        assert found == wanted


FORMS = {
    "of RLHF-V, JSON in a text": {"image": A, "text": json.dumps({"question": "q", **ANSWERS})},
    "whole conversations": {
        "images": [A],
        **{name: [*asked("q"), turn("assistant", each)] for name, each in ANSWERS.items()},
    },
    "whole conversations with parts": {
        name: [*asked([PART | {"image": A}, text("q")]), turn("assistant", each)]
        for name, each in ANSWERS.items()
    },
    "whole conversations with a column": {
        "images": [A],
        **{
            name: [*asked([PART, text("q")]), turn("assistant", each)]
            for name, each in ANSWERS.items()
        },
    },
    "a prompt and whole conversations": {
        "images": [A],
        "prompt": "q",
        **{name: [*asked("q"), turn("assistant", each)] for name, each in ANSWERS.items()},
    },
    "LLaMA-Factory": {
        "images": [A],
        "conversations": [{"from": "human", "value": "<image>q"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "ms-swift": {
        "images": [A],
        "messages": [*asked("<image>q"), turn("assistant", "yes")],
        "rejected_response": "no",
    },
    "OpenAI": {
        "input": {"messages": asked([{"type": "image_url", "image_url": {"url": A}}, text("q")])},
        "preferred_output": [turn("assistant", "yes")],
        "non_preferred_output": [turn("assistant", "no")],
    },
    "a group": {
        "images": [A],
        "prompt": asked("q"),
        "completions": [[turn("assistant", "yes")], [turn("assistant", "no")]],
        "scores": [1, 0],
    },
    "a completion": {
        "images": [A],
        "prompt": asked("q"),
        "completion": [turn("assistant", "yes")],
        "label": True,
    },
    "a demonstration": {"images": [A], "messages": [*asked("q"), turn("assistant", "yes")]},
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_rows_may_have_images(name):
    row = FORMS[name]
    assert shown(row) == ["[a.png]q"]
    assert all("yes" in str(each) or "no" in str(each) for each in parsed(row).answers.values())


def test_images_of_later_turns_stay_in_the_answer():
    row = {
        "images": [A, B],
        "messages": [
            *asked("<image>q"),
            turn("assistant", "a"),
            *asked("<image>r"),
            turn("assistant", "b"),
        ],
    }
    found = parsed(row, format="sft")
    assert images_in(found.prompt[0]["content"]) == [0]
    assert [images_in(message["content"]) for message in found.completion] == [[], [1], []]


def test_texts_take_images_too():
    row = {"images": [A], "prompt": "q", **ANSWERS}
    assert shown(row) == "[a.png]q"
    assert shown(row | {"prompt": "see <image>: q"}) == "see [a.png]: q"
    assert shown(row | {"prompt": "<start_of_image>q"}) == "<start_of_image>q"  # the model's own
    assert shown(row, apply_chat_template=True) == ["[a.png]q"]
    row = {"picture": [A], "prompt": "q", **ANSWERS}
    assert shown(row, columns={"images": "picture"}) == "[a.png]q"


def test_an_answer_may_speak_of_a_placeholder():
    said = {"chosen": [turn("assistant", "the tag <image>")], "rejected": [turn("assistant", "no")]}
    found = parsed({"images": [A], "prompt": asked("<image>q")} | said)
    assert found.chosen[0]["content"] == "the tag <image>"


REFUSED = {
    "more places": (
        {"images": [A], "prompt": asked("<image> or <image>?")} | SAID,
        "images and their places differ in number: the row has 1 images and 2 places.*in prompt",
    ),
    "fewer places": (
        {"images": [A, B], "prompt": asked("<image>?")} | SAID,
        "the row has 2 images and 1 places",
    ),
    "a part and no column": (
        {"prompt": asked([PART, text("q")])} | SAID,
        "the row has 0 images and 1 places",
    ),
    "two columns": (
        {"images": [A], "image": B, "prompt": asked("q")} | SAID,
        "two columns of images",
    ),
    "a null among them": (
        {"images": [A, None], "prompt": asked("q")} | SAID,
        "field 'images' has a null",
    ),
    "an answer with an image": (
        {
            "prompt": asked("q"),
            "chosen": [turn("assistant", [PART | {"image": A}])],
            "rejected": [turn("assistant", "no")],
        },
        r"an image in an answer: chosen\[0\]",
    ),
    "no message of the user": (
        {"images": [A], "prompt": [turn("system", "s")]} | SAID,
        "images without a message of the user",
    ),
    "what is no character": (
        {"images": [A], "prompt": asked("\ufdd0")} | SAID,
        r"no character: prompt has U\+FDD0",
    ),
    "a video": ({"videos": ["a.mp4"], "prompt": asked("q")} | SAID, "column 'videos' is not used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_images_that_have_no_place_are_told(name):
    row, message = REFUSED[name]
    with pytest.raises(BadRow, match=message):
        parsed(row)


def test_an_ignored_column_of_images_is_left_out():
    row = {"images": [A], "prompt": asked("q")} | SAID
    assert "images" not in parsed(row, ignore_columns=["images"]).optional


@pytest.fixture
def folder(tmp_path):
    (tmp_path / A).write_bytes(png(picture(1)))
    (tmp_path / "empty.png").touch()
    return tmp_path


def test_an_image_comes_in_many_ways(folder):
    content = (folder / A).read_bytes()
    code = base64.b64encode(content).decode()
    values = [
        *(
            A,
            f"./{A}",
            str(folder / A),
            (folder / A).as_uri(),
            folder / A,
            content,
            bytearray(content),
        ),
        *(code, f"data:image/png;base64,{code}", {"bytes": content, "path": "gone.png"}),
        *({"path": A, "bytes": None}, {"url": (folder / A).as_uri()}, {"base64": code}),
    ]
    found = [read_image(value, "images[0]", [folder]) for value in values]
    assert {each.content for each in found} == {content}
    assert len({each.digest for each in found}) == 1
    paths = [each.path for each in found]
    assert paths[:5] == [str(folder / A)] * 5 and paths[5] is None and paths[9] is None
    (same,) = {open_image(each.content, "a").tobytes() for each in found}
    kept = read_image(picture(1), "images[0]", [])
    assert open_image(kept.content, "a").tobytes() == same


def test_pixels_are_rgb_and_upright(folder):
    image = picture(1, 8, 4)
    exif = image.getexif()
    exif[0x0112] = 6  # lies on its side
    image.save(folder / "side.png", exif=exif)
    found = open_image((folder / "side.png").read_bytes(), "a")
    assert (found.size, found.mode) == ((4, 8), "RGB")
    lying = Image.open(folder / "side.png")  # PNG that is made of it would lose which way it lies
    kept = open_image(read_image(lying, "a", []).content, "a")
    assert kept.tobytes() == found.tobytes() and kept.size == found.size
    wide = Image.new("I", (4, 4), 70)  # a mode that PNG does not have in every version of Pillow
    kept = open_image(read_image(wide, "a", []).content, "a")
    assert kept.tobytes() == wide.convert("RGB").tobytes()
    assert open_image(png(image.convert("RGBA")), "a").mode == "RGB"
    clear = Image.new(
        "RGBA", (4, 4), (9, 9, 9, 0)
    )  # as TRL gives it, through the model's processor
    theirs = convert_to_rgb(clear, return_numpy=True)
    assert open_image(png(clear), "a").tobytes() == theirs.tobytes() == b"\xff" * 48
    assert open_image(png(image.convert("L")), "a").mode == "RGB"


UNREADABLE = {
    "missing": ("gone.png", r"images\[0\] is not there: no file 'gone.png' in .*data.image_folder"),
    "an empty file": ("empty.png", r"^images\[0\] is empty: .*empty.png has no bytes"),
    "empty": (b"", r"images\[0\] is empty"),
    "no keys": ({"width": 3}, r"images\[0\] is empty: it has 'width'"),
    "a number": (3, r"images\[0\] is no image: got int"),
    "no base64": ("data:image/png;base64,????", r"images\[0\] is no base64"),
    "no server": ("http://127.0.0.1:9/a.png", r"images\[0\] cannot be fetched: .*give paths"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_image_that_cannot_be_read_names_its_field(name, folder):
    value, message = UNREADABLE[name]
    with pytest.raises(BadRow, match=message):
        read_image(value, "images[0]", [folder])


@pytest.mark.parametrize("content", [b"no image", png(picture(1))[:80], png(picture(1))[:-200]])
def test_a_damaged_image_names_its_field(content):
    with pytest.raises(BadRow, match=r"images\[2\] cannot be decoded: .*bytes\)"):
        open_image(content, "images[2]")


def test_an_image_is_fetched(folder):
    content = (folder / A).read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert read_image({"url": f"{url}/a.png"}, "images[0]", []).content == content
        with pytest.raises(BadRow, match="cannot be fetched: .*Not Found"):
            read_image(f"{url}/b.png", "images[0]", [Path()])
    finally:
        server.shutdown()
