"""Where the processor of a model lies, which makes the pixel values of images."""

from __future__ import annotations

import os
from typing import Any

from dpo_fast.models.checkpoint import base_of
from dpo_fast.models.config import ModelSection
from dpo_fast.models.hub import has_processor, source


def processor_source(section: ModelSection) -> dict[str, Any] | None:
    """Arguments of `from_pretrained` of a section's processor; None if the model has none.

    An adapter's is that of its base model, unless its own folder has one.
    """
    for path in dict.fromkeys((section.path, base_of(section.path))):
        where = source(os.path.expanduser(path))
        if has_processor(where):
            return where | {"trust_remote_code": section.trust_remote_code}
    return None
