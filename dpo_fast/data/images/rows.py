"""The images of a checked row, found before anything of it is tokenised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_fast.data.config import IMAGES, DataConfig
from dpo_fast.data.images.files import ImageFile, read_image
from dpo_fast.data.images.options import options_of
from dpo_fast.data.rows import Row


def keep_images(row: Row, config: DataConfig, keep: Callable[[ImageFile], dict[str, Any]]) -> None:
    """Puts what `keep` returns in place of every image of a row that is not kept yet. Raises BadRow."""
    images = row.optional.get(IMAGES)
    if images and not all(isinstance(each, dict) and "digest" in each for each in images):
        folders = _folders(row.where, config)
        named = [(image, f"images[{place}]") for place, image in enumerate(images)]
        row.optional[IMAGES] = [
            keep(read_image(*each, folders)) | {"options": options_of(*each)} for each in named
        ]


def in_memory(image: ImageFile) -> dict[str, Any]:
    """What finds an image again that is kept nowhere: itself, or its file."""
    found = {"digest": image.digest, "path": image.path}
    return found if image.path else found | {"content": image.content}


def _folders(where: str, config: DataConfig) -> list[Path]:
    """Where relative paths begin: at data.image_folder, else beside the data file, else here."""
    if config.image_folder is not None:
        return [Path(config.image_folder).expanduser()]
    beside = Path(where.rpartition(":")[0]).parent
    return [beside, Path()]
