"""Loads the processor of a model, without its video part where that cannot be loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.models.hub import file_of
from dpo_fast.wording import clipped


def load_processor(source: Mapping[str, Any], tokenizer: Any, named: str) -> Any:
    """The model's own processor, with a tokenizer of its own: other threads use the other.

    transformers reads videos with torchvision alone, and images without it too.

    source: arguments of `from_pretrained`. named: the model, for errors. Raises UserError.
    """
    from transformers import AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(**source)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        try:
            found = _without_video(source, tokenizer)
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as without:
            # What images need is missing, and not what videos need.
            told = without if isinstance(without, ImportError) else error
            reason = clipped(" ".join(str(told).split()) or type(told).__name__, 300)
            raise UserError(
                f"{named}: its processor cannot be loaded, and the data has images: {reason}"
            ) from error
    if not hasattr(found, "image_processor") or not hasattr(found, "tokenizer"):
        raise UserError(
            f"{named}: the data has images, and its processor ({type(found).__name__}) takes none"
        )
    return found


def _without_video(source: Mapping[str, Any], tokenizer: Any) -> Any:
    """The processor of images and texts. Its class is the model's own."""
    import transformers
    from transformers import AutoConfig, AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    told = _told(source)
    name = told.get("processor_class")
    if name is None:
        name = PROCESSOR_MAPPING_NAMES[AutoConfig.from_pretrained(**source).model_type]
    kind = getattr(transformers, name)

    class WithoutVideo(kind):
        """A processor whose missing part may be None."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    WithoutVideo.__name__ = WithoutVideo.__qualname__ = kind.__name__
    parts = {"image_processor": AutoImageProcessor.from_pretrained(**source)}
    parts |= {"tokenizer": copy.deepcopy(tokenizer), "chat_template": tokenizer.chat_template}
    parts |= dict.fromkeys(set(kind.get_attributes()) - parts.keys())
    others = ("processor_class", "image_processor", "video_processor", "feature_extractor")
    own = {key: value for key, value in told.items() if key not in (*others, *parts)}
    return WithoutVideo(**parts, **own)


def _told(source: Mapping[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path := file_of(source, name)) is not None:
            found = json.loads(path.read_text(encoding="utf-8"))
            told |= (
                found
                if name.startswith("processor")
                else {key: found[key] for key in ("processor_class",) if key in found}
            )
    return told
