"""Where the processor of a model lies, which makes the pixel values of images."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from dpo_fast.models.checkpoint import base_of
from dpo_fast.models.config import ModelSection
from dpo_fast.models.hub import file_of, has_processor, source


def processor_source(section: ModelSection) -> dict[str, Any] | None:
    """Arguments of `from_pretrained` of a section's processor; None if the model has none.

    An adapter's is that of its base model, unless its own folder has one.
    """
    for path in dict.fromkeys((section.path, base_of(section.path))):
        where = source(os.path.expanduser(path))
        if has_processor(where):
            return where | {"trust_remote_code": section.trust_remote_code}
    return None


def processor_template(where: Mapping[str, Any] | None) -> str | None:
    """The chat template that a processor has in a file of its own, as older ones do.

    transformers leaves it out when it loads the tokenizer alone. where: as `processor_source` gives it.
    """
    path = None if where is None else file_of(where, "chat_template.json")
    if path is None:
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    template = found.get("chat_template") if isinstance(found, dict) else None
    return template if isinstance(template, str) else None
