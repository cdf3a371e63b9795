"""How messages are handed to a chat template, and whether it writes all that they say.

Templates want the same messages in different forms: DeepSeek's takes the arguments of a tool call as
JSON text and most others as an object, SmolVLM's takes content as parts, gpt-oss has a field for
thinking. A form that a template does not know is often left out without a word.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpo_fast.data.images.marks import content_parts, images_in
from dpo_fast.data.json_text import decode
from dpo_fast.data.messages import WEIGHTS, Messages
from dpo_fast.data.thinking import KEYS, find_thought, without_thought

AS_IS, WRITTEN = "as it is", "written"
SWITCH = re.compile(r"/(?:no_?)?think\b")  # in messages to SmolLM 3, Nemotron, Qwen 3 and GLM


@dataclass(frozen=True)
class Dialect:
    """One form of messages.

    parts: content as a list of parts. text_arguments: arguments of tool calls as JSON text.
    blank: the content of a message that only calls tools.
    thinking: AS_IS; a field's name; or WRITTEN: left out, for the caller to write.
    developer: whether the template knows the role developer; else such a message is the system's.
    """

    parts: bool = False
    text_arguments: bool = False
    blank: str | None = ""
    thinking: str = AS_IS
    developer: bool = False

    def prompt(self, messages: Messages) -> Messages:
        """Messages before the answer. Their thinking stays as it is."""
        return [self._message(message) for message in messages]

    def answer(self, messages: Messages) -> Messages:
        return [self._message(self._think(message)) for message in messages]

    def _think(self, message: dict[str, Any]) -> dict[str, Any]:
        thought = find_thought(message)
        if thought is None or self.thinking == AS_IS:
            return message
        plain = without_thought(message)
        if self.thinking == WRITTEN:
            return plain
        return plain | {self.thinking: thought.inside.strip()}

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        message = {key: value for key, value in message.items() if key not in WEIGHTS}
        if message["role"] == "developer" and not self.developer:
            message["role"] = "system"
        if message.get("tool_calls"):
            message["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
            message["content"] = message["content"] or self.blank
        content = message["content"]
        if isinstance(content, str) and images_in(content):
            message["content"] = content_parts(content)
        elif self.parts and isinstance(content, str):
            message["content"] = [{"type": "text", "text": content}]
        return message

    def _call(self, call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        function = call.get("function", call)
        if not isinstance(function, dict) or "arguments" not in function:
            return call
        function = function | {"arguments": self._arguments(function["arguments"])}
        if "function" not in call:
            return function
        return call | {"type": call.get("type", "function"), "function": function}

    def _arguments(self, arguments: Any) -> Any:
        if self.text_arguments:
            if isinstance(arguments, str):
                return arguments
            return json.dumps(arguments, ensure_ascii=False)
        if isinstance(arguments, str):
            try:
                parsed = decode(arguments)
            except ValueError:
                return arguments
            return parsed if isinstance(parsed, dict) else arguments
        return arguments


def dialects(
    prompt: Messages, answers: list[Messages], source: str, parts: bool
) -> Iterator[Dialect]:
    """The forms that may differ for these messages, the likeliest first. source: of the template."""
    last = [message for answer in answers for message in answer]
    calling = [message for message in (*prompt, *last) if message.get("tool_calls")]
    arguments = (False, True) if calling else (False,)
    blanks = ("", None) if any(not message["content"] for message in calling) else ("",)
    forms = itertools.product(_thinking(last, source), arguments, blanks)
    for thinking, text_arguments, blank in forms:
        yield Dialect(parts, text_arguments, blank, thinking, "developer" in source)


def _thinking(answers: Messages, source: str) -> list[str]:
    """Where the template may take thinking from.

    A template that knows the closing mark takes it out of the content by itself.
    """
    thoughts = list(filter(None, map(find_thought, answers)))
    if not thoughts:
        return [AS_IS]
    keys = [key for key in KEYS if re.search(rf"\b{key}\b", source)]
    known = any(thought.key or thought.close in source for thought in thoughts)
    return [AS_IS, *keys, WRITTEN] if known else [*keys, AS_IS, WRITTEN]


def left_out_of_prompt(messages: Messages, text: str) -> str | None:
    """What the rendered prompt does not have, in words; None if it has everything.

    A text is looked for by its longest word. Templates may leave thinking out of earlier turns.
    """
    for index, message in enumerate(messages):
        if message["role"] != "assistant" and not _has(text, _text(message.get("content"))):
            return f"prompt[{index}] ({message['role']})"
        if not _has_calls(text, message):
            return f"the tool calls of prompt[{index}]"
    return None


def left_out_of_answer(
    messages: Messages, field: str, text: str, place: int | None = None
) -> str | None:
    """The same of an answer, with its thinking. place: the one message to look for."""
    for index, message in enumerate(messages):
        if place not in (None, index):
            continue
        thought, name = find_thought(message), f"{field}[{index}]"
        content = thought.rest if thought else _text(message.get("content"))
        if not _has(text, content):
            return f"the content of {name}"
        if not _has_calls(text, message):
            return f"the tool calls of {name}"
        if thought and not _has(text, thought.inside):
            return f"the {thought.key or 'thinking'} of {name}"
    return None


def marked_tools(messages: Messages) -> tuple[Messages, dict[str, tuple[int, str]]]:
    """The messages with a mark for every tool's result and for the first call of every tool.

    Returns them, and for each mark the place of its message and what it stands for, in words.
    """
    marks: dict[str, tuple[int, str]] = {}
    names: dict[str, str] = {}
    marked = []
    for place, message in enumerate(messages):
        if message["role"] == "tool" and message["content"].strip():
            mark = f"Zyzzyva{len(marks)}z"
            marks[mark] = place, "{} (tool)"
            message = message | {"content": mark}
        if message.get("tool_calls"):
            calls = copy.deepcopy(message["tool_calls"])
            for function in filter(None, map(_function, calls)):
                if function["name"] not in names:
                    names[function["name"]] = mark = f"Zyzzyva{len(marks)}z"
                    marks[mark] = place, "the tool calls of {}"
                function["name"] = names[function["name"]]
            message = message | {"tool_calls": calls}
        if message.get("name") in names:
            message = message | {"name": names[message["name"]]}
        marked.append(message)
    return marked, marks


def _function(call: Any) -> dict[str, Any] | None:
    """The function of a call; None if it has no name as text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    named = isinstance(function, dict) and isinstance(function.get("name"), str)
    return function if named and function["name"] else None


def _has_calls(text: str, message: dict[str, Any]) -> bool:
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        arguments = Dialect()._arguments(function.get("arguments", ""))
        values = arguments.values() if isinstance(arguments, dict) else [arguments]
        # Templates write true, null and nested values in their own ways.
        plain = [str(each) for each in values if type(each) in (str, int)]
        if not all(_has(text, each) for each in (str(function.get("name", "")), *plain)):
            return False
    return True


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content or ""


def _has(text: str, written: str) -> bool:
    """Whether the longest word is there, as it is or as JSON has it.

    Templates take switches out of messages, such as /no_think. Text with backslashes may be escaped.
    """
    words = re.findall(r"\w+", SWITCH.sub("", written))
    if not words or "\\" in written:
        return True
    longest = max(words, key=len)
    return longest in text or json.dumps(longest)[1:-1] in text
