"""The prompt of a chat alone, as a model is given it to go on from. No answer is known yet."""

from __future__ import annotations

from dpo_fast.data.chat import ChatTemplate
from dpo_fast.data.dialects import dialects
from dpo_fast.data.prefill import prefill_of
from dpo_fast.data.rows import Row
from dpo_fast.data.verdicts import BadRow
from dpo_fast.errors import UserError


def generation_prompt(template: ChatTemplate, row: Row) -> str:
    """The messages before the answer, rendered with add_generation_prompt=True.

    A prompt that ends with the assistant's message stays open, as with continue_final_message=True. Its
    tokens are those of the prompt in `ChatTemplate.texts` once an answer is there, except where that
    depends on whether the answer thinks.

    row: of any kind; its answers are not looked at.

    Raises:
        BadRow: the template refuses the messages, or leaves some of them out.
        UserError: there is no template.
    """
    if not template.exists:
        raise UserError(
            f"{row.where}: the prompt is a list of messages, but the tokenizer has no chat template; set "
            "data.chat_template to a Jinja file"
        )
    kwargs = row.optional.get("chat_template_kwargs", {})
    options = {"tools": row.optional.get("tools"), "kwargs": kwargs}
    prefill, reasons = prefill_of(row), []
    for dialect in dialects(row.prompt, [], template.source, template.takes_parts):
        messages = dialect.prompt(row.prompt)
        try:
            text = template.render(
                messages, generate=not prefill, unfinished=bool(prefill), **options
            )
            template.check_prompt(row.prompt, text)
            return _with_its_end(text, prefill.lstrip()) if prefill else text
        except BadRow as verdict:
            reasons.append(verdict)
    raise reasons[0]


def _with_its_end(text: str, prefill: str) -> str:
    """The text with the white space that ends the prefill, which templates strip (`ends_open`)."""
    bare = text.rstrip().removesuffix(prefill.rstrip())
    return text if bare == text.rstrip() else bare + prefill
