"""The rule of `dpo-fast demo --real --rounds`: at most two sentences, and an end.

Its text is written beside the run, as a file that a user would have.
"""

import re


def at_most_two_sentences(completion: str) -> bool:
    """Whether an answer has one or two sentences, and ends with the last."""
    text = completion.strip()
    ends = re.findall(r"[.!?]+(?=\s|$)", text)
    return text.endswith((".", "!", "?")) and len(ends) <= 2
