"""The images of a judged prompt: for a judge that sees them, and for one that reads texts alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_fast.data.images.columns import COLUMNS, take_images
from dpo_fast.data.images.files import read_image
from dpo_fast.data.images.marks import named
from dpo_fast.data.images.written import data_uri
from dpo_fast.errors import UserError
from dpo_fast.judging.samples import SampleRow


def as_text(row: SampleRow) -> tuple[SampleRow, list[Any]]:
    """The row with `[image 1]` in the texts of its prompt, and its images as the row has them.

    Raises BadRow for images without a place.
    """
    told = {"prompt": row.prompt}
    told |= {name: row.content[name] for name in COLUMNS & row.content.keys()}
    images = take_images(told)
    if not images:
        return row, []
    prompt = told["prompt"]
    if isinstance(prompt, str):
        return replace(row, prompt=named(prompt)), images
    prompt = [{**each, "content": _said(each.get("content"))} for each in prompt]
    return replace(row, prompt=prompt), images


def uris(row: SampleRow, images: list[Any]) -> list[str]:
    """The images as data: URIs. Raises BadRow for one that cannot be read."""
    folders = [Path(row.where.rpartition(":")[0]).parent, Path()]
    named = ((image, f"images[{place}]") for place, image in enumerate(images))
    return [data_uri(read_image(*each, folders).content) for each in named]


def refuse_images(row: SampleRow, kind: str) -> None:
    """Raises UserError for a prompt with images and a judge that would not see them."""
    if as_text(row)[1]:
        raise UserError(
            f"{row.where}: the prompt has images, and judge.type={kind} reads texts alone; set "
            "judge.type=openai with a model that sees images, implicit, rule or command"
        )


def _said(content: Any) -> Any:
    """The texts of a message's parts; of other contents themselves."""
    if isinstance(content, list):
        texts = (each.get("text") if isinstance(each, dict) else each for each in content)
        content = "".join(each for each in texts if isinstance(each, str))
    return named(content) if isinstance(content, str) else content
