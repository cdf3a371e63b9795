"""The bytes of an image, in the forms that people give it, and its pixels.

"cats/1.jpg", {"path": ...}             a path: from the data file's folder, or data.image_folder
"file:///data/1.jpg"                    a path
"https://...", {"url": ...}             fetched once, and kept
"data:image/png;base64,...", base64     the image itself
b"...", {"bytes": ..., "path": ...}     the image itself, as `datasets.Image` has it
PIL.Image.Image                         kept as PNG
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_fast.data.verdicts import BadRow
from dpo_fast.wording import quoted

if TYPE_CHECKING:
    from PIL.Image import Image

SECONDS = 30.0  # for a server to answer
LARGEST = 256 << 20  # bytes of an image that is fetched
KEYS = ("bytes", "path", "image", "image_url", "url", "base64", "data", "source")
LEAST_BASE64 = 64  # characters; no image is smaller, and most paths are


class ImageFile(NamedTuple):
    """An image as it came. digest: sha256 of its bytes. path: of the file; None if it has none."""

    content: bytes
    digest: bytes
    path: str | None


def read_image(value: Any, name: str, folders: list[Path]) -> ImageFile:
    """The bytes of an image. Raises BadRow that names the field.

    name: of the field. folders: where relative paths begin, the first first.
    """
    value = _innermost(value, name)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _kept(bytes(value), name)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return _from_text(value, name, folders)
    if hasattr(value, "save") and hasattr(value, "convert"):  # of PIL
        return _kept(png(value), name)
    raise BadRow(
        f"{name} is no image",
        f"got {type(value).__name__}; expected a path, a URL, base64, bytes, a PIL image, or an object "
        "with 'bytes' or 'path'",
    )


def open_image(content: bytes, name: str) -> Image:
    """The pixels as RGB, upright, and what is transparent on white. Raises BadRow.

    So processors of transformers have PIL images, and vLLM all; `load_image` alone shows what lies below.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return _on_white(ImageOps.exif_transpose(image)).convert("RGB")
    except Exception as error:  # decoders raise anything at what is not an image
        reason = str(error).partition("<_io")[0].strip() or type(error).__name__
        raise BadRow(f"{name} cannot be decoded", f"{reason} ({len(content)} bytes)") from None


def _on_white(image: Image) -> Image:
    from PIL import Image as images

    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image
    white = images.new("RGBA", image.size, (255, 255, 255, 255))
    return images.alpha_composite(white, image.convert("RGBA"))


def _innermost(value: Any, name: str) -> Any:
    """What an object says of an image: its bytes before its path, which may be another machine's."""
    while isinstance(value, Mapping):
        given = [value[key] for key in KEYS if value.get(key) is not None]
        if not given:
            raise BadRow(f"{name} is empty", f"it has {', '.join(map(repr, value)) or 'no keys'}")
        value = given[0]
    return value


def _from_text(text: str, name: str, folders: list[Path]) -> ImageFile:
    scheme = text.partition(":")[0].lower()
    if scheme == "data":
        return _kept(_decoded(text.partition(",")[2], name), name)
    if scheme in ("http", "https"):
        return _kept(_fetched(text, name), name)
    if scheme == "file":
        text = urllib.request.url2pathname(urllib.parse.urlparse(text).path)
    places = [folder / os.path.expanduser(text) for folder in folders]
    for path in places:
        try:
            if not path.is_file():
                continue
            content = path.read_bytes()
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) != 36 and "null" not in str(
                error
            ):  # no name of a file
                raise BadRow(f"{name} cannot be read", f"{path}: {error}") from None
            continue
        return _kept(content, name, str(path.resolve()))
    if len(text) >= LEAST_BASE64 and (content := _base64(text)) is not None:
        return _kept(content, name)
    looked = ", ".join(dict.fromkeys(str(folder) for folder in folders)) or "."
    where = quoted(text) if os.path.isabs(text) else f"{quoted(text)} in {looked}"
    raise BadRow(f"{name} is not there", f"no file {where}; data.image_folder names the folder")


def _decoded(text: str, name: str) -> bytes:
    found = _base64(text)
    if found is None:
        raise BadRow(f"{name} is no base64", f"got {quoted(text)}")
    return found


def _base64(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _fetched(url: str, name: str) -> bytes:
    """The answer of a server. Raises BadRow."""
    request = urllib.request.Request(url, headers={"User-Agent": "dpo_fast"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            content = answer.read(LARGEST + 1)
    except (OSError, ValueError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or error
        raise BadRow(
            f"{name} cannot be fetched",
            f"{quoted(url)}: {reason}; without a network, give paths of files",
        ) from None
    if len(content) > LARGEST:
        raise BadRow(f"{name} cannot be fetched", f"{quoted(url)} has more than {LARGEST} bytes")
    return content


def png(image: Any) -> bytes:
    """A PIL image as PNG, upright, which loses nothing else of what a processor looks at."""
    from PIL import ImageOps

    content = io.BytesIO()
    kept = ImageOps.exif_transpose(image)
    kept = kept if kept.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else kept.convert("RGB")
    kept.save(content, "PNG", compress_level=1)
    return content.getvalue()


def _kept(content: bytes, name: str, path: str | None = None) -> ImageFile:
    if not content:
        raise BadRow(f"{name} is empty", f"{path or 'it'} has no bytes")
    return ImageFile(content, hashlib.sha256(content).digest(), path)
