"""Prefill: a prompt that ends with the beginning of an answer, which the answers continue.

    prompt  user "2 + 2?", assistant "It is"        answers " four", " five"

The prompt ends open, in the assistant's turn, as apply_chat_template(continue_final_message=True)
renders it. For the chat template prefill and answer are one message.
"""

from __future__ import annotations

from dataclasses import replace

from dpo_fast.data.rows import GroupRow, Row
from dpo_fast.data.thinking import skip_empty_thought
from dpo_fast.data.verdicts import BadRow


def prefill_of(row: Row) -> str:
    """The text of the assistant's message that ends the prompt; empty if the prompt ends otherwise."""
    return row.prompt[-1]["content"] if row.prompt and row.prompt[-1]["role"] == "assistant" else ""


def whole_answers(row: Row, prefill: str) -> Row:
    """The row with the prefill at the beginning of each answer instead of at the end of the prompt."""
    if not prefill:
        return row
    begun = {}
    for name, (first, *others) in row.answers.items():
        if first["role"] != "assistant":
            raise BadRow(
                "the prompt ends with an assistant message that nothing continues",
                f"{name} begins with a {first['role']} message",
            )
        begun[name] = [{**row.prompt[-1], **first, "content": prefill + first["content"]}, *others]
    answers = {"completions": list(begun.values())} if isinstance(row, GroupRow) else begun
    return replace(row, prompt=row.prompt[:-1], **answers)


def ends_open(
    prompt: str, texts: list[str], prefill: str, unfinished: str, name: str
) -> tuple[str, list[str]]:
    """Prompt and texts of a chat, with the prefill at the prompt's end. Raises BadRow.

    unfinished: the prompt with the prefill as rendered for inference. Its header may differ from that for
    generation, and it lacks white space at the prefill's end where the template strips messages.
    name: of the chat template.
    """
    begun = prefill.lstrip()
    bare = unfinished.rstrip().removesuffix(begun.rstrip())
    known = bare != unfinished.rstrip()
    found = [_find(text, begun, prompt, bare if known else prompt) for text in texts]
    end = found[0] + len(begun)
    if min(found) < 0 or len({text[:end] for text in texts}) != 1:
        raise BadRow(
            "the chat template leaves something out",
            f"it does not write the assistant message that ends the prompt ({name}); use a template "
            "that does (data.chat_template), or put that message into the answers",
        )
    opened = bare + begun if known else texts[0][:end]
    return opened, [opened + text[end:] for text in texts]


def _find(text: str, begun: str, prompt: str, bare: str) -> int:
    """Where a prefill begins in a text; below 0 if it is not there.

    Its words may also stand in what the template writes before them: "in" in <think>. bare: the text up
    to the prefill, as far as that is known.
    """
    if text.startswith(bare + begun):
        return len(bare)
    start = len(text) - len(skip_empty_thought(text[len(prompt) :], opened=True))
    found = text.find(begun, start)
    return found if found >= 0 else text.find(begun, len(prompt))
