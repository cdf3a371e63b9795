"""The file of data.chat_template: read, checked for use, and exported with the model."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from dpo_fast.data.config import DataConfig
from dpo_fast.errors import UserError

MOST_CHARACTERS = 1 << 20


def read_template(config: DataConfig) -> str | None:
    """The text of data.chat_template, or None. Raises UserError when it cannot be read."""
    if config.chat_template is None:
        return None
    try:
        with Path(os.path.expanduser(config.chat_template)).open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"more than {MOST_CHARACTERS:,} characters")
        return text
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.chat_template={config.chat_template!r} cannot be read: {error}; give the path "
            "of a Jinja file"
        ) from error


def check_template_used(config: DataConfig, chats: bool) -> None:
    """Raises UserError for an option of chats if no row is a chat."""
    if config.chat_template_kwargs and not chats:
        raise UserError(
            f"data.chat_template_kwargs={config.chat_template_kwargs} is not used: all rows are text, "
            "which goes through no template; remove it, or give lists of messages"
        )
    if config.scored == "last" and not chats:
        raise UserError(
            "data.scored=last is not used: all rows are text, which has no turns and is scored whole; "
            "remove it, or give lists of messages"
        )


def with_template(tokenizer: Any, config: DataConfig) -> Any:
    """The tokenizer, or a copy that has data.chat_template for its own, to be saved with the model."""
    template = read_template(config)
    if template is None:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer
