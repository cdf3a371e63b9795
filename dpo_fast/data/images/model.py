"""The processor of a model: which tokens an image takes, and its pixel values.

What stands in a text for an image is told by calling the processor itself, and so is what is computed of
its pixels. Nothing here knows any model.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_fast.data.images.options import resized
from dpo_fast.data.images.processor_options import (
    call_kwargs,
    check_kwargs,
    pixel_bounds,
    token_side,
)
from dpo_fast.data.verdicts import BadRow
from dpo_fast.errors import UserError
from dpo_fast.models.hub import file_of, has_processor
from dpo_fast.wording import clipped, quoted

if TYPE_CHECKING:
    from PIL.Image import Image

# What a processor makes of texts. The rest of its answer is about images.
OF_TEXTS = {
    *("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"),
    *("special_tokens_mask", "offset_mapping", "text_replacement_offsets", "length"),
}
# The image token by its names in configurations.
TOKEN_NAMES = ("image_token_id", "image_token_index", "image_patch_id")
NO_DIFFERENCE = ("processor_class", "image_processor_type", "_processor_class")
BLANK = (56, 56)  # pixels; no processor takes smaller ones as they are
SOURCE = "image_source"  # attribute of a tokenizer: what `from_pretrained` of its model's processor takes


class Expansion(NamedTuple):
    """What a processor writes in place of one placeholder, and the image tokens in it."""

    text: str
    tokens: int


def deciding(pictures: Any) -> dict[str, Any]:
    """The options of an image processor that decide what it makes of an image."""
    told = pictures.to_dict().items()
    return {k: v for k, v in told if v is not None and k not in NO_DIFFERENCE}


class ModelImages:
    """The images of one model.

    source: arguments of `from_pretrained`; a processor; or None for a model that takes no images.
    named: what has no processor, for errors.
    kwargs: data.images_kwargs.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: Any,
        named: str = "the model",
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.tokenizer, self.named = source, tokenizer, named
        self.kwargs = dict(kwargs or {})
        self._expansions: dict[tuple[tuple[int, int], str], Expansion] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what is loaded again: other processes get the folder's name."""
        loaded = ("processor", "_recording") if isinstance(self.source, Mapping) else ()
        return {name: value for name, value in vars(self).items() if name not in loaded}

    @cached_property
    def processor(self) -> Any:
        """The model's own processor. Raises UserError."""
        if self.source is None:
            raise UserError(
                f"the data has images, and {self.named} takes none: it has neither a "
                "preprocessor_config.json nor a processor_config.json. Choose an image-text model, or "
                "leave the images out: data.ignore_columns=[images]"
            )
        if not isinstance(self.source, Mapping):
            return self.source
        from dpo_fast.data.images.processor import load_processor

        found = load_processor(self.source, self.tokenizer, self.named)
        check_kwargs(found, self.kwargs)
        return found

    @cached_property
    def placeholder(self) -> str:
        """What stands for one image in the texts that the processor takes."""
        return str(getattr(self.processor, "image_token", None) or "<image>")

    @cached_property
    def token_id(self) -> int:
        """The token that the model replaces with features of an image."""
        if (told := self.told_token_id) is not None:
            return told
        found = _token_id([self.processor])
        return self.tokenizer.convert_tokens_to_ids(self.placeholder) if found is None else found

    @cached_property
    def told_token_id(self) -> int | None:
        """The same, as the configuration or the tokenizer has it, without the processor; or None."""
        return None if self.source is None else _token_id([self._config, self.tokenizer])

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(**self.source)
        except (OSError, ValueError, KeyError, TypeError, ImportError):
            return None

    @cached_property
    def processing(self) -> bytes:
        """sha256 of what decides the pixel values of an image, the same on every machine."""
        told = deciding(self.processor.image_processor)
        text = json.dumps([told, self.kwargs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).digest()

    @property
    def identity(self) -> str:
        """sha256 hex of the files and options that decide the tokens of an image; empty without any."""
        if self.source is None:
            return ""
        if not isinstance(self.source, Mapping):
            return self.processing.hex()
        found = hashlib.sha256(json.dumps(self.kwargs, sort_keys=True).encode())
        for name in ("processor_config.json", "preprocessor_config.json"):
            path = file_of(self.source, name)
            found.update(b"" if path is None else path.read_bytes())
        return found.hexdigest()

    def expansion(self, image: Image, options: str = "", name: str = "an image") -> Expansion:
        """What stands for an image in a text. Of images of one size it is the same.

        options: of this image, as `options_of` has them.

        Raises BadRow where the processor refuses the image, or its options.
        """
        case = image.size, options
        if case not in self._expansions:
            self._check_options(options, name)
            _, (text,) = self._process([image], [options])
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            count = ids.count(self.token_id)
            if not count:
                raise UserError(
                    f"{self.named}: its processor writes {quoted(text)} for an image, which has no token "
                    f"{self.token_id}, the model's image token: images of this model cannot be trained on"
                )
            self._expansions[case] = Expansion(text, count)
        return self._expansions[case]

    def written(self, text: str, images: Sequence[Image]) -> str:
        """A text as the processor itself writes it, with placeholders for these images."""
        return self._call([text], [list(images)])[1][0]

    def inputs(self, images: Sequence[Image], options: Sequence[str] = ()) -> dict[str, Tensor]:
        """The model's arguments for images, each as if it were alone in its text.

        options: of each image; none without any.
        """
        return self._process(images, options)[0]

    def tokens_of(self, width: int, height: int) -> int:
        """Image tokens of an image of so many pixels."""
        from PIL import Image

        return self.expansion(Image.new("RGB", (width, height))).tokens

    def blank(self) -> dict[str, Tensor]:
        """The model's arguments for one grey image, for ranks whose batch has none."""
        return self.inputs([_grey()])

    def _process(
        self, images: Sequence[Image], options: Sequence[str] = ()
    ) -> tuple[dict[str, Tensor], list[str]]:
        if not any(options):
            return self._called(images)
        bounds = pixel_bounds(self.kwargs.get("size")) | self.kwargs
        calls = [
            self._called([resized(image, own, self._side, bounds)], asis=True)
            if own
            else self._called([image])
            for image, own in zip(images, options, strict=True)
        ]
        tensors = {name: torch.cat([found[name] for found, _ in calls]) for name in calls[0][0]}
        return tensors, [text for _, (text,) in calls]

    def _called(
        self, images: Sequence[Image], asis: bool = False
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Each image in a text of its own, and what is written for it."""
        before, after = self._frame
        text = f"{before}{self.placeholder}{after}"
        tensors, texts = self._call([text] * len(images), [[each] for each in images], asis)
        return tensors, [each.removeprefix(before).removesuffix(after) for each in texts]

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What must stand before and behind a placeholder; most processors ask for nothing."""
        names = ("image_start_token", "image_end_token")
        found = tuple(getattr(self.processor, name, None) for name in names)
        if not all(isinstance(each, str) for each in found):
            return "", ""
        try:
            self._call([self.placeholder], [[_grey()]])
        except BadRow:
            return found
        return "", ""

    @cached_property
    def _side(self) -> int | None:
        return token_side(self.processor.image_processor)

    def _check_options(self, options: str, name: str) -> None:
        """Raises BadRow for options of an image that its processor has not."""
        if options and self._side is None:
            told = ", ".join(f"{key}={value}" for key, value in json.loads(options).items())
            kind = type(self.processor.image_processor).__name__
            raise BadRow(
                "an option of an image that cannot be honoured",
                f"{name} has {told}, and {kind} has no such option for an image: leave it out; "
                "data.images_kwargs has the options of this processor, for all images",
            )

    def _call(
        self, texts: list[str], images: list[list[Image]], asis: bool = False
    ) -> tuple[dict[str, Tensor], list[str]]:
        """The processor's tensors of images, and the texts that it tokenises. Raises BadRow.

        asis: images keep their sizes.
        """
        options = {"return_tensors": "pt"} | call_kwargs(self.processor, self.kwargs)
        options |= {"do_resize": False} if asis else {}
        recorder = _Recorder(self.processor.tokenizer)
        processor = copy.copy(self.processor)
        processor.tokenizer = recorder
        try:
            found = processor(text=texts, images=images, images_kwargs=options)
        except Exception as error:  # a processor raises anything at an image that it cannot take
            raise BadRow(
                "the processor refuses an image",
                f"{clipped(str(error) or type(error).__name__, 300)} ({self.named})",
            ) from error
        tensors = {name: _tensor(value) for name, value in found.items() if not _of_texts(name)}
        return {k: v for k, v in tensors.items() if v is not None}, recorder.texts


def _grey() -> Image:
    from PIL import Image

    return Image.new("RGB", BLANK, (127, 127, 127))


def _of_texts(name: str) -> bool:
    return name in OF_TEXTS or name.endswith("token_type_ids")


def _token_id(owners: Sequence[Any]) -> int | None:
    found = (getattr(owner, name, None) for owner in owners for name in TOKEN_NAMES)
    return next((each for each in found if isinstance(each, int)), None)


class _Recorder:
    """A tokenizer that remembers the texts of its last call."""

    def __init__(self, tokenizer: Any) -> None:
        self.inner, self.texts = tokenizer, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, text: list[str], **kwargs: Any) -> Any:
        self.texts = [text] if isinstance(text, str) else list(text)
        return self.inner(text, **kwargs)


def _tensor(value: Any) -> Tensor | None:
    """A tensor, floats as fp32; None for what is none."""
    if isinstance(value, (list, tuple, np.ndarray)):
        try:
            value = torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError):
            return None
    if not isinstance(value, Tensor):
        return None
    return value.float() if value.is_floating_point() else value


def images_of(tokenizer: Any, kwargs: Mapping[str, Any] | None = None) -> ModelImages:
    """The images of the model that a tokenizer is of. `SOURCE` of the tokenizer says where they are.

    Without it they are looked for where the tokenizer came from.
    """
    name = getattr(tokenizer, "name_or_path", "") or ""
    source = getattr(tokenizer, SOURCE, None)
    if not hasattr(tokenizer, SOURCE) and name:
        source = {"pretrained_model_name_or_path": name}
        if not has_processor(source):
            source = None
    return ModelImages(source, tokenizer, f"model.path={name}" if name else "the model", kwargs)
