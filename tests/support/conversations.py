"""Conversations that think, call tools and look at images, and transformers' own scores of them.

Nothing of ours is in the scores: the chat template and the processor of transformers make the ids of the
whole conversation, and transformers' forward scores it alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from tests.support.image_rows import picture
from tests.support.templates import CALL, RESULT, TOOLS, message, user

LATER = {
    "id": "sub123456",
    "type": "function",
    "function": {"name": "add", "arguments": {"number": 7}},
}
# Each with a prompt, two answers, and what the template is told.
TEXTS: dict[str, dict[str, Any]] = {
    "thinks in a field": {
        "prompt": [user("why so?")],
        "chosen": [message("assistant", "because", reasoning_content="let me see")],
        "rejected": [message("assistant", "no idea", reasoning_content="well")],
    },
    "thinks in the content": {
        "prompt": [message("system", "be brief"), user("why so?")],
        "chosen": [message("assistant", "<think>\nlet me see\n</think>\n\nbecause")],
        "rejected": [message("assistant", "<think>\nwell\n</think>\n\nno idea")],
    },
    "does not think": {
        "prompt": [user("why so?")],
        "chosen": [message("assistant", "because")],
        "rejected": [message("assistant", "no idea")],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "thought before": {
        "prompt": [
            user("hello"),
            message("assistant", "hi", reasoning_content="a greeting"),
            user("why so?"),
        ],
        "chosen": [message("assistant", "because", reasoning_content="let me see")],
        "rejected": [message("assistant", "no idea", reasoning_content="well")],
    },
    "calls a tool": {
        "prompt": [user("what is 41 + 1?")],
        "chosen": [message("assistant", "", reasoning_content="add", tool_calls=[CALL])],
        "rejected": [message("assistant", "43", reasoning_content="easy")],
        "tools": TOOLS,
    },
    "several turns": {
        "prompt": [user("what is 41 + 1?")],
        "chosen": [
            message("assistant", "", reasoning_content="add", tool_calls=[CALL]),
            RESULT,
            message("assistant", "then", reasoning_content="more", tool_calls=[LATER]),
            message("tool", "8", name="add", tool_call_id="sub123456"),
            message("assistant", "42 and 8", reasoning_content="done"),
        ],
        "rejected": [
            message("assistant", "", reasoning_content="add", tool_calls=[CALL]),
            RESULT,
            message("assistant", "43", reasoning_content="hm"),
        ],
        "tools": TOOLS,
    },
    "called a tool before": {
        "prompt": [
            user("what is 41 + 1?"),
            message("assistant", "", reasoning_content="add", tool_calls=[CALL]),
            RESULT,
            message("assistant", "42", reasoning_content="there it is"),
            user("and then?"),
        ],
        "chosen": [message("assistant", "because", reasoning_content="let me see")],
        "rejected": [message("assistant", "", reasoning_content="again", tool_calls=[LATER])],
        "tools": TOOLS,
    },
}
PICTURES = {"a.png": (16, 16), "b.png": (24, 12), "c.png": (40, 20)}


def _part(name: str) -> dict[str, Any]:
    return {"type": "image", "image": name}


def _looking(form: dict[str, Any]) -> dict[str, Any]:
    """The same conversation with an image in every message of the user, and two in the last."""
    form = copy.deepcopy(form)
    asked = [each for each in form["prompt"] if each["role"] == "user"]
    for place, each in enumerate(asked):
        words = {"type": "text", "text": each["content"]}
        each["content"] = [_part("a.png" if place else "b.png"), words]
    asked[-1]["content"].append(_part("c.png"))
    return form


IMAGES = {f"{name}, with images": _looking(form) for name, form in TEXTS.items()} | {
    "numbered images": _looking(TEXTS["thought before"])
    | {"chat_template_kwargs": {"add_vision_id": True}},
    "a tool shows an image": {
        "prompt": [
            user("what is there?"),
            message("assistant", "", reasoning_content="look", tool_calls=[CALL]),
            message("tool", [_part("a.png"), {"type": "text", "text": "seen"}], name="add"),
        ],
        "chosen": [message("assistant", "a cat", reasoning_content="let me see")],
        "rejected": [message("assistant", "no idea", reasoning_content="well")],
        "tools": TOOLS,
    },
}


def write_pictures(folder) -> None:
    for seed, (name, size) in enumerate(PICTURES.items()):
        picture(seed, *size).save(folder / name)


class Oracle:
    """transformers' own model, template and processor, on one whole conversation at a time.

    processor: None for a model of text.
    """

    def __init__(self, model, tokenizer, processor=None) -> None:
        self.model, self.tokenizer, self.processor = model, tokenizer, processor

    def logps(self, row: dict[str, Any], answer: list[dict[str, Any]]) -> torch.Tensor:
        """Log-probs of all that the assistant writes in an answer, with the ends of its turns."""
        whole = self._text(row, answer)
        spans = []
        for place, each in enumerate(answer):
            if each["role"] == "assistant":
                start = len(self._text(row, answer[:place], generate=True))
                end = len(self._text(row, answer[: place + 1]).rstrip("\n"))
                spans.append((start, end))
        whole = whole[: spans[-1][1]]
        inputs = self._inputs(whole, row["prompt"])
        ids = inputs["input_ids"]
        logits = self.model(**inputs, use_cache=False).logits[0].float().log_softmax(-1)
        logp = logits[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
        # Where texts end in tokens: images before them have become longer.
        places = [
            slice(self._size(whole[:start], row["prompt"]), self._size(whole[:end], row["prompt"]))
            for start, end in spans
        ]
        return torch.cat([logp[each.start - 1 : each.stop - 1] for each in places])

    def _text(self, row: dict[str, Any], answer: list, generate: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            row["prompt"] + answer,
            tools=row.get("tools"),
            add_generation_prompt=generate,
            tokenize=False,
            **row.get("chat_template_kwargs", {}),
        )

    def _size(self, text: str, prompt: list) -> int:
        return self._inputs(text, prompt)["input_ids"].shape[1]

    def _inputs(self, text: str, prompt: list) -> dict[str, torch.Tensor]:
        if self.processor is None:
            return dict(self.tokenizer([text], add_special_tokens=False, return_tensors="pt"))
        names = [
            part["image"]
            for each in prompt
            if isinstance(each["content"], list)
            for part in each["content"]
            if part["type"] == "image"
        ]
        seeds = {name: seed for seed, name in enumerate(PICTURES)}
        images = [picture(seeds[name], *PICTURES[name]) for name in names]
        given = {"images": images} if images else {}
        return dict(self.processor(text=[text], return_tensors="pt", **given))
