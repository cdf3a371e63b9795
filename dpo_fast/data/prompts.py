"""Finds the prompt that two whole texts share."""

from __future__ import annotations

import os.path

from dpo_fast.data.verdicts import BadRow

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def split_texts(chosen: str, rejected: str, marker: str | None) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two texts that begin with the same prompt. Raises BadRow.

    With a marker, given or found (dialogues of Human: and Assistant: turns), the prompt of each
    text runs up to and including its last marker, and the two prompts must be the same. Without
    one it is the longest common beginning, cut back to the end of a word:

    >>> split_texts("2 + 2 is four.", "2 + 2 is five.", None)
    ('2 + 2 is', ' four.', ' five.')
    """
    if marker is None and HUMAN in chosen and ASSISTANT in chosen:
        marker = ASSISTANT
    if marker is None:
        end = _common_words(chosen, rejected)
        return chosen[:end], chosen[end:], rejected[end:]
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        if marker not in text:
            raise BadRow("no prompt marker", f"{field} does not contain {marker!r}")
    end = chosen.rfind(marker) + len(marker)
    if rejected.rfind(marker) + len(marker) != end or rejected[:end] != chosen[:end]:
        raise BadRow("no common prompt", f"the texts differ before their last {marker!r}")
    return chosen[:end], chosen[end:], rejected[end:]


def _common_words(chosen: str, rejected: str) -> int:
    """Where the common beginning ends, on a word boundary.

    One space stays with the answer, since most tokenizers join it to the word that follows.
    """
    common = os.path.commonprefix([chosen, rejected])
    end = next((i for i in range(len(common), 0, -1) if common[i - 1].isspace()), 0)
    if end and common[end - 1] == " ":
        end -= 1
    if not common[:end].strip():
        raise BadRow("no common prompt", "chosen and rejected do not begin with the same words")
    return end
