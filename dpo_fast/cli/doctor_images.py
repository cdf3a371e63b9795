"""What doctor says of images: the processor of the model, and what an image takes."""

from __future__ import annotations

from dpo_fast.data.images.model import images_of
from dpo_fast.data.verdicts import BadRow
from dpo_fast.errors import UserError
from dpo_fast.models import load_tokenizer
from dpo_fast.ops.dispatch import Choice
from dpo_fast.training.config import RunConfig

SIZES = ((640, 480), (1920, 1080))


def image_processing(config: RunConfig) -> Choice | None:
    """The processor and the tokens of two images; None for a model of text."""
    images = images_of(load_tokenizer(config.model), config.data.images_kwargs)
    if images.source is None:
        return None
    try:
        counts = [
            f"{images.tokens_of(*size)} tokens for {'x'.join(map(str, size))}" for size in SIZES
        ]
        told = f"rows may have images: {', '.join(counts)}"
        if config.model.images is None:
            told += "; model.images=true counts their memory"
        return Choice(type(images.processor).__name__, told)
    except (UserError, BadRow) as error:
        return Choice("none", str(error))
