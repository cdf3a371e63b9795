"""Chat templates, a tokenizer for any of them, and the forms of rows that they meet.

The templates of model families are those that TRL ships. SMALL holds templates of a few lines, written
here, each with a habit of a family that TRL does not ship.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# How families write their special tokens.
MARK = re.compile(
    r"<\|[^<>|\s'\"{}]{1,40}\|>|<｜[^<>｜\s'\"{}]{1,40}｜>|<\|[a-z_]{2,20}>|<[a-z_]{2,20}\|>"
    r"|\[/?[A-Z_]{3,30}\]|</?think>|</s>|\[gMASK\]|<sop>|<(?:start|end)_of_turn>|<end_of_utterance>"
)


def trl_templates(training: bool = False) -> dict[str, str]:
    """The templates in the installed TRL, by name; with `training` those patched for training too."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
    return {
        name: text for name, text in found.items() if training or not name.endswith("_training")
    }


@cache
def template_tokenizer(template: str, **names) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens of a template; BOS and EOS are <BOS> and <EOS>."""
    special = ["<pad>", "<BOS>", "<EOS>", *sorted(set(MARK.findall(template)))]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    names = {"bos_token": "<BOS>", "eos_token": "<EOS>", "pad_token": "<pad>"} | names
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **names,
    )


def message(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def user(content: str = "why so?") -> dict:
    return message("user", content)


def answers(chosen: str = "because", rejected: str = "no idea", **more) -> dict:
    texts = {"chosen": chosen, "rejected": rejected}
    return {name: [message("assistant", text, **more)] for name, text in texts.items()}


FUNCTION = {
    "name": "add",
    "description": "Adds one.",
    "parameters": {
        "type": "object",
        "properties": {"number": {"type": "integer", "description": "what to add to"}},
        "required": ["number"],
    },
}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {
    "id": "add123456",
    "type": "function",
    "function": {"name": "add", "arguments": {"number": 41}},
}
CALLS = message("assistant", "", tool_calls=[CALL])
RESULT = message("tool", "42", name="add", tool_call_id="add123456")

FORMS = {
    "one turn": {"prompt": [user()], **answers()},
    "many turns": {
        "prompt": [user("hello"), message("assistant", "hi there"), user()],
        **answers(),
    },
    "system": {"prompt": [message("system", "be brief"), user()], **answers()},
    "tools": {"prompt": [user(), CALLS, RESULT], **answers(), "tools": TOOLS},
    "tool call": {"prompt": [user()], **answers(), "chosen": [CALLS], "tools": TOOLS},
    "thinking": {
        "prompt": [user()],
        **answers("<think>\nhmm\n</think>\n\nbecause", "<think>\nwell\n</think>\n\nno idea"),
    },
    "reasoning": {"prompt": [user()], **answers(reasoning_content="hmm")},
}

_TURNS = (
    "{{ '<U>' + m.content }}{% endif %}{% if m.role == 'tool' %}{{ '<T>' + m.content }}{% endif %}"
)
_LOOP = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}" + _TURNS
_THINK = (
    "{% set c = m.content %}{% set r = '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].replace('<think>', '').strip() %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
    "{% if m.reasoning_content %}{% set r = m.reasoning_content %}{% endif %}"
)
_END = "{% endif %}{% endfor %}{% if add_generation_prompt %}"

SMALL = {
    # DeepSeek R1: opens thinking, finished turns have none.
    "opens, drops": _LOOP
    + "{% if m.role == 'assistant' %}{{ '<A>' + m.content.split('</think>')[-1].lstrip() + eos_token }}"
    + _END
    + "{{ '<A><think>\n' }}{% endif %}",
    # R1 as it was first published: the same, and does not open it.
    "drops": _LOOP
    + "{% if m.role == 'assistant' %}{{ '<A>' + m.content.split('</think>')[-1].lstrip() + eos_token }}"
    + _END
    + "{{ '<A>' }}{% endif %}",
    # DeepSeek V3.1: finished turns close thinking that nobody opened.
    "closes": _LOOP
    + "{% if m.role == 'assistant' %}"
    + "{{ '<A></think>' + m.content.split('</think>')[-1].lstrip() + eos_token }}"
    + _END
    + "{{ '<A><think>' if enable_thinking else '<A></think>' }}{% endif %}",
    # Nemotron: opens with a line break, finished turns have empty thinking without.
    "opens, empty": _LOOP
    + "{% if m.role == 'assistant' %}"
    + _THINK
    + "{{ '<A><think>' + ('\n' + r + '\n' if r else '') + '</think>' + c + eos_token }}"
    + _END
    + "{{ '<A><think>\n' }}{% endif %}",
    # Nemotron Nano 2: the last turn begins as the generation prompt does, whatever the answer says.
    "opens, copies": _LOOP
    + "{% if m.role == 'assistant' %}"
    + "{{ '<A>' + ('<think>\n' if loop.last else '') + m.content + eos_token }}"
    + _END
    + "{{ '<A><think>\n' }}{% endif %}",
    # Hermes for tools: it cannot do without.
    "needs tools": "{% for tool in tools %}{{ tool.function.name + '. ' }}{% endfor %}"
    + _LOOP
    + "{% if m.role == 'assistant' %}{{ '<A>' + m.content }}"
    + "{% for call in m.tool_calls %}{{ call.function.name }}41{% endfor %}<END>"
    + _END
    + "{{ '<A>' }}{% endif %}",
    # Kimi K2 Thinking: every finished turn has empty thinking, whatever the answer thinks.
    "always empty": _LOOP
    + "{% if m.role == 'assistant' %}{{ '<A><think></think>' + m.content + eos_token }}"
    + _END
    + "{{ '<A>' }}{% endif %}",
    # gpt-oss and Kimi: thinking of an earlier turn goes once an answer follows.
    "forgets": _LOOP
    + "{% if m.role == 'assistant' %}"
    + _THINK
    + "{{ '<A>' + ('<think>' + r + '</think>' if r and (messages[-1].role != 'assistant' or loop.last)"
    + " else '') + c + eos_token }}"
    + _END
    + "{{ '<A>' }}{% endif %}",
    # Mistral: the system message stands in the last message, if that is a question.
    "system last": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<U>' }}"
    + "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '. ' }}{% endif %}"
    + "{{ m.content + '</U>' }}"
    + "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    # Phi: a prompt that ends with a space which turns do not have.
    "white space": _LOOP
    + "{% if m.role == 'assistant' %}{{ '<A>' + m.content.strip() + eos_token }}"
    + _END
    + "{{ '<A> ' }}{% endif %}",
    # SmolLM3, Qwen 3: a switch turns thinking off.
    "switch": _LOOP
    + "{% if m.role == 'assistant' %}"
    + _THINK
    + "{{ '<A>' + ('<think>\n' + r + '\n</think>\n\n' if r else '') + c + eos_token }}"
    + _END
    + "{{ '<A>' + ('<think>\n\n</think>\n\n' if enable_thinking is false else '') }}{% endif %}",
}
