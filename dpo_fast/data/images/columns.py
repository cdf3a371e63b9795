"""Takes the images of a row out of its columns and messages, and marks their places in the texts.

    images: [a, b]                                          a column, also `image` with one
    {"type": "image"}, {"type": "image_url"}                parts of messages that wait for the column's
    {"type": "image", "image": a}, {"type": "image_url", "image_url": {"url": a}}     parts that bring one
    {"image": a}                                            the same, in the content of a message
    "<image>What is it?"                                    a placeholder in a text, one for each image
    no part and no placeholder                              the images begin the first message of the user

After it every form of rows is read as if it had texts alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_fast.data.images.marks import BEGIN, mark
from dpo_fast.data.images.options import stated
from dpo_fast.data.json_text import decode
from dpo_fast.data.messages import OTHER_ROLES, messages_in
from dpo_fast.data.verdicts import BadRow

COLUMNS = {"images", "image"}
PLACEHOLDER = "<image>"
# Placeholders of models in texts that were rendered before they came here.
OF_MODELS = (
    *(
        "<|image_pad|>",
        "<start_of_image>",
        "<|image|>",
        "[IMG]",
        "<IMG_CONTEXT>",
        "<image_soft_token>",
    ),
    *("<|image_soft_token|>", "<|IMAGE|>", "<image_pad>"),
)
TYPES = ("image", "image_url", "input_image")
PAYLOADS = ("image", "image_url", "url", "path", "image_path", "base64")
PAYLOADS += ("bytes", "source")
TYPELESS = ("image", "image_url")  # what tells an image in a part without a type
# Columns whose texts follow the prompt.
ANSWERS = (
    *("chosen", "rejected", "completion", "completions", "chosen_response", "rejected_response"),
    *("preferred_output", "non_preferred_output", "response", "responses", "output", "answer"),
    *("answers", "generations", "rejected_messages"),
)
# Where a prompt may stand, the likeliest first.
PROMPTS = (
    *("prompt", "conversations", "messages", "conversation", "context", "instruction", "question"),
    *("query", "input"),
)
USERS = ("user", "human", "prompter")
ASSISTANTS = ("assistant", *(other for other, ours in OTHER_ROLES.items() if ours == "assistant"))


def take_images(row: dict[str, Any]) -> list[Any]:
    """The images of a row, which loses their columns and gets marks. Empty for a row without any.

    Raises BadRow.
    """
    given = _given(row) if row.keys() & COLUMNS else []
    for name, value in row.items():
        if isinstance(value, str) and '"image' in value and (found := messages_in(value)):
            row[name] = found
    nested = ((name, value) for name, value in row.items() if isinstance(value, (dict, list)))
    names = [name for name, value in nested if _has_parts(value)]
    if not given and not names:
        return []
    for name, value in row.items():
        if any(BEGIN in text for text in _texts(value)):
            raise BadRow("a text has a code point that is no character", f"{name} has U+FDD0")
    taken = _Taken(given)
    for name in names:
        row[name] = taken.without_parts(row[name], name)
    if given or any(WAITING in text for value in row.values() for text in _texts(value)):
        _place(row, len(given))
    return taken.images


class _Taken:
    """Images so far: those of the column, and then those of parts."""

    def __init__(self, images: list[Any]) -> None:
        self.images = list(images)

    def number(self, value: Any) -> int:
        """An image that stands in several texts, as in whole conversations, is one."""
        for place, image in enumerate(self.images):
            if type(image) is type(value) and image == value:
                return place
        self.images.append(value)
        return len(self.images) - 1

    def without_parts(self, value: Any, name: str, said: bool = False) -> Any:
        """A value whose parts that are images are texts: marks, or placeholders for the column's.

        said: it is what a message says. Raises BadRow.
        """
        if isinstance(value, Mapping):
            if _is_part(value, said):
                return {"type": "text", "text": self._part(value, name)}
            return {
                key: self.without_parts(each, f"{name}.{key}", _says(value, key))
                for key, each in value.items()
            }
        if isinstance(value, list):
            return [self.without_parts(each, f"{name}[{i}]", said) for i, each in enumerate(value)]
        return value

    def _part(self, part: Mapping[str, Any], name: str) -> str:
        given = [part[key] for key in PAYLOADS if part.get(key) is not None]
        if part.get("text") and (given or part.get("type") in TYPES):
            raise BadRow("a part with a text and an image", f"{name}: make two parts of it")
        if not given:
            if options := stated(part):
                raise BadRow(
                    "an option of an image that is elsewhere",
                    f"{name} has {', '.join(options)}: give it beside the image, in the column, as in "
                    "{path: a.png, max_pixels: 50176}",
                )
            return WAITING
        image = given[0]
        while isinstance(image, Mapping) and isinstance(image.get("url"), (str, Mapping)):
            image = image["url"]
        options = stated(part)
        return mark(self.number({"image": image, **options} if options else image))


WAITING = BEGIN + "image"  # a part that waits for an image of the column


def _given(row: dict[str, Any]) -> list[Any]:
    """The images of the row's columns, which it loses. Raises BadRow."""
    found = {name: _listed(row.pop(name), name) for name in sorted(COLUMNS & row.keys())}
    found = {name: images for name, images in found.items() if not all(map(_blank, images))}
    if len(found) > 1:
        raise BadRow("two columns of images", "'image' and 'images': leave one of them out")
    images = next(iter(found.values()), [])
    if any(map(_blank, images)):
        raise BadRow(f"field {next(iter(found))!r} has a null", f"of {len(images)} images")
    return images


def _listed(value: Any, name: str) -> list[Any]:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = decode(value)
        except ValueError as error:
            raise BadRow(f"field {name!r} is not JSON", str(error)) from None
    if _blank(value):
        return []
    if isinstance(value, Mapping) and any(isinstance(each, list) for each in value.values()):
        size = max(len(each) for each in value.values() if isinstance(each, list))
        lists = {key: each for key, each in value.items() if isinstance(each, list)}
        return [{key: each[index] for key, each in lists.items()} for index in range(size)]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _blank(value: Any) -> bool:
    """Whether it is nothing, as JSON, CSV or Arrow have it."""
    if isinstance(value, Mapping):
        return all(map(_blank, value.values()))
    return value is None or (isinstance(value, (str, bytes)) and not value.strip())


def _is_part(value: Mapping[str, Any], said: bool) -> bool:
    """said: it is of what a message says, where a part needs no type: templates look for its key."""
    if value.get("type") in TYPES:
        return "role" not in value
    told = said and value.get("type") in (None, "text", "input_text")
    return told and any(value.get(key) is not None for key in TYPELESS)


def _says(message: Mapping[str, Any], key: str) -> bool:
    return key in ("content", "value") and ("role" in message or "from" in message)


def _has_parts(value: list | dict, said: bool = False) -> bool:
    """Whether parts that are images are in it. Every row is asked, so it is quick about texts."""
    if isinstance(value, dict):
        if _is_part(value, said):
            return True
        return any(
            _has_parts(each, _says(value, key))
            for key, each in value.items()
            if isinstance(each, (dict, list))
        )
    return any(_has_parts(each, said) for each in value if isinstance(each, (dict, list)))


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for each in value.values() for text in _texts(each)]
    return [text for each in value for text in _texts(each)] if isinstance(value, list) else []


def _waiting(value: Any, said: bool = False) -> int:
    """Places in a value that wait for images of the column.

    said: by the assistant, whose texts may speak of a placeholder.
    """
    if isinstance(value, str):
        return value.count(WAITING) + (0 if said else value.count(PLACEHOLDER))
    if isinstance(value, Mapping):
        said = _role(value) in ASSISTANTS
        return sum(_waiting(each, said) for each in value.values())
    return sum(_waiting(each, said) for each in value) if isinstance(value, list) else 0


def _role(value: Mapping[str, Any]) -> str:
    return str(value.get("role", value.get("from", ""))).lower()


def _place(row: dict[str, Any], count: int) -> None:
    """Puts the marks of the column's images into the row. Raises BadRow."""
    places = {name: _waiting(value) for name, value in row.items() if name not in ANSWERS}
    places = {name: waiting for name, waiting in places.items() if waiting}
    before = 0
    if places and set(places.values()) != {count}:
        if sum(places.values()) > count:
            name = max(places, key=places.get)
            raise _mismatch(count, sum(places.values()), ", ".join(places) or name)
        for name in sorted(places, key=lambda each: each != "history"):  # what came first
            row[name] = _filled(row[name], iter(range(before, count)))
            before += places[name]
    else:
        for name in places:
            row[name] = _filled(row[name], iter(range(count)))
        before = count if places else 0
    found = _place_in_answers(row, count, before)
    if before == count or found:
        return
    if before:
        raise _mismatch(count, before, ", ".join(places))
    _begin(row, count)


def _place_in_answers(row: dict[str, Any], count: int, before: int) -> bool:
    """Whether answers have the images that the prompt lacks: whole conversations have all of them."""
    placed = False
    for name in ANSWERS:
        value = row.get(name)
        if name in ("completions", "responses", "answers", "generations") and isinstance(
            value, list
        ):
            done = [_in_answer(each, count, before, name) for each in value]
            row[name] = [each for each, _ in done]
            placed = placed or any(found for _, found in done)
        elif value is not None:
            row[name], found = _in_answer(value, count, before, name)
            placed = placed or found
    return placed


def _in_answer(value: Any, count: int, before: int, name: str) -> tuple[Any, bool]:
    parts, waiting = sum(text.count(WAITING) for text in _texts(value)), _waiting(value)
    if isinstance(value, str) and before:
        return value, False
    if waiting == count:
        return _filled(value, iter(range(count))), True
    if waiting and waiting == count - before:
        return _filled(value, iter(range(before, count))), True
    if parts:
        raise _mismatch(count, before + waiting, name)
    return value, False  # an answer may speak of <image>


def _mismatch(count: int, places: int, name: str) -> BadRow:
    return BadRow(
        "images and their places differ in number",
        f"the row has {count} images and {places} places for them, parts of type image or "
        f"{PLACEHOLDER!r}, in {name}",
    )


def _filled(value: Any, numbers: Iterator[int], said: bool = False) -> Any:
    """The value with marks in its places, in their order."""
    if isinstance(value, str):
        pieces = (value if said else value.replace(PLACEHOLDER, WAITING)).split(WAITING)
        return "".join([pieces[0], *(mark(next(numbers)) + piece for piece in pieces[1:])])
    if isinstance(value, Mapping):
        said = _role(value) in ASSISTANTS
        return {key: _filled(each, numbers, said) for key, each in value.items()}
    return [_filled(each, numbers, said) for each in value] if isinstance(value, list) else value


def _begin(row: dict[str, Any], count: int) -> None:
    """The images begin the first message of the user, or the text of the prompt. Raises BadRow."""
    marks = "".join(mark(image) for image in range(count))
    names = [name for name in PROMPTS if row.get(name) and not isinstance(row[name], (int, float))]
    placed = False
    for name in names[:1]:
        row[name], placed = _begun(row[name], marks, text=True)
    for name in ANSWERS:
        value = row.get(name)
        if isinstance(value, list) and value and isinstance(value[0], list):
            row[name] = [_begun(each, marks, text=False)[0] for each in value]
        elif isinstance(value, list):
            row[name], found = _begun(value, marks, text=not (placed or names))
            placed = placed or found
        elif isinstance(value, str) and not names:
            row[name], placed = _begun(value, marks, text=True)
    if not placed:
        raise BadRow("images without a message of the user", f"the row has {count} images")


def _begun(value: Any, marks: str, text: bool) -> tuple[Any, bool]:
    """text: whether a text by itself may get them."""
    if isinstance(value, str):
        found = messages_in(value)
        if found is not None:
            return _begun(found, marks, text)
        own = any(each in value for each in OF_MODELS)
        return (value if own else marks + value, True) if text else (value, False)
    if isinstance(value, Mapping):
        return _begun_in_mapping(value, marks, text)
    done, placed = [], False
    for each in value if isinstance(value, list) else ():
        if not placed and isinstance(each, Mapping):
            each, placed = _begun_in_mapping(each, marks, False)
        done.append(each)
    return (done, True) if placed else (value, False)


def _begun_in_mapping(value: Mapping[str, Any], marks: str, text: bool) -> tuple[Any, bool]:
    if _role(value) in USERS:
        key = "content" if "content" in value else "value"
        content = value.get(key)
        if isinstance(content, list):
            return {**value, key: [{"type": "text", "text": marks}, *content]}, True
        return {**value, key: marks + (content or "")}, True
    for key in ("messages", "human", "user"):
        if isinstance(value.get(key), (str, list)):
            inner, placed = _begun(value[key], marks, isinstance(value[key], str))
            return {**value, key: inner}, placed
    return value, False
