"""Columns that a row's form does not take.

A column whose name is known for content, and whose words are nowhere in the example, would change
what is trained on if it were used: it is an error. Others (ids, sources, scores, languages, other
answers) are named in the report. Texts that the example has already are no loss, as H4's `messages`,
or a `question` beside a `prompt` that quotes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_fast.data.verdicts import BadRow

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# What comes before an answer. Other answers to it do not change this example.
CONTENT = (
    *("system", "system_prompt", "instruction", "input", "query", "question", "history", "context"),
    *("messages", "conversations", "documents", "prompt"),
)
KNOWN = {*MEDIA, *CONTENT}
# Names of columns with paths of images, what such paths end in, and what images begin with.
WORDS = ("image", "img", "picture", "photo")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8")  # and WebP, a kind of RIFF
REMEDY = "list it in data.ignore_columns to leave it out"


def check_unused(left: Mapping[str, Any], row: Any, has_prompt: bool, images: bool = False) -> None:
    """Raises BadRow for columns that may not be passed over.

    left: columns that the row's form did not take. has_prompt: whether a column holds the prompt.
    images: whether the row has images; other columns of them may then be anything.
    """
    for name, value in left.items() if not images else ():
        if holds_images(name, value):
            raise BadRow(
                f"column {name!r} holds images, and is not used",
                f"name it with data.columns={{images: {name}}}, or {REMEDY}",
            )
    if has_prompt and not KNOWN & left.keys():
        return
    filled = {name: value for name, value in left.items() if not _empty(value)}
    for name in MEDIA:
        if name in filled:
            raise BadRow(
                f"column {name!r} is not used", f"texts and images are trained on; {REMEDY}"
            )
    suspects = [name for name in CONTENT if name in filled]
    if not has_prompt:
        suspects += [name for name, value in filled.items() if _is_prose(value)]
    if not suspects:
        return
    known = "\n".join(texts_of([row.prompt, *row.answers.values()]))
    for name in suspects:
        if all(text.strip() in known for text in texts_of(filled[name])):
            continue
        if name not in CONTENT:
            raise BadRow(
                "no prompt, and a column that is not used",
                f"{name!r} has words that the answers lack: name it with data.columns.prompt={name} if "
                f"it is the prompt, or {REMEDY}",
            )
        raise BadRow(
            f"column {name!r} is not used",
            "its words are nowhere in the example: map it with data.columns (docs/FORMATS.md has the "
            f"names){_remedy(name, filled[name], row, has_prompt)} or {REMEDY}",
        )


def _remedy(name: str, value: Any, row: Any, has_prompt: bool) -> str:
    """What else would use a column of content."""
    if not has_prompt and name != "system":
        return f", data.columns={{prompt: {name}}} if it is the prompt,"
    if row.is_chat:
        return ""
    if name.startswith("system"):
        return (
            ", set data.apply_chat_template=true or data.format=alpaca, which make a chat of texts,"
        )
    return ", set data.format=alpaca, which makes a chat of texts,"


def holds_images(name: str, value: Any) -> bool:
    """Whether a column has images, by what it holds; of paths its name must say so, too."""
    if isinstance(value, str):
        if value.startswith("data:image/"):
            return True
        return value.lower().endswith(ENDINGS) and any(word in name.lower() for word in WORDS)
    if isinstance(value, (bytes, bytearray)):
        return value.startswith(BEGINNINGS) or value[8:12] == b"WEBP"
    if isinstance(value, Mapping):
        inner = value.get("bytes") or value.get("path") or value.get("url")
        return isinstance(inner, (str, bytes)) and holds_images(f"{name} image", inner)
    if isinstance(value, (list, tuple)):
        return bool(value) and holds_images(name, value[0])
    return hasattr(value, "save") and hasattr(value, "convert")  # of PIL


def texts_of(value: Any) -> Iterator[str]:
    """All texts in nested values, but for roles and types."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("role", "from", "type"):
                yield from texts_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_of(item)


def _empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, (list, tuple)):
        return all(map(_empty, value))
    if isinstance(value, Mapping):
        return all(map(_empty, value.values()))
    return value is None


def _is_prose(value: Any) -> bool:
    """Whether it holds text of several words, so neither an id nor a category."""
    return any(len(text.split()) > 1 for text in texts_of(value))
