"""Answers in channels, as gpt-oss writes them, as thinking and what is said.

    <|channel|>analysis<|message|>hmm<|end|><|start|>assistant<|channel|>final<|message|>yes
    becomes     <think>\\nhmm\\n</think>\\n\\nyes

which is a form of thinking that rows may have; the chat template writes the channels again.
"""

from __future__ import annotations

import re

CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
PART = re.compile(
    r"<\|channel\|>(\w+)[^<]*<\|message\|>(.*?)(?=<\|end\|>|<\|start\|>|<\|channel\|>|$)", re.S
)
THOUGHT, SAID = "analysis", "final"


def without_channels(text: str) -> str | None:
    """The answer with its thinking in marks; None if it is not of these two channels alone.

    text: decoded with its special tokens, without the end of turn.
    """
    parts = PART.findall(text)
    names = [name for name, _ in parts]
    if not parts or set(names) - {THOUGHT, SAID} or names.count(SAID) > 1:
        return None
    thought = "\n".join(words.strip() for name, words in parts if name == THOUGHT)
    said = "".join(words for name, words in parts if name == SAID)
    if SAID not in names:  # it was cut off while it thought
        return f"<think>\n{thought}"
    return f"<think>\n{thought}\n</think>\n\n{said}" if thought else said
