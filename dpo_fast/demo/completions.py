"""Greedy completions of a saved checkpoint, by transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_fast.demo.task import Question
from dpo_fast.training import distributed
from dpo_fast.training.progress import track

BATCH = 64


@dataclass(frozen=True)
class Completions:
    """The text a checkpoint gives for each question, and the share that is the right answer."""

    texts: list[str]
    right_share: float


@torch.no_grad()
def complete(checkpoint: Path, questions: Sequence[Question], description: str) -> Completions:
    """Load `checkpoint` with `AutoModelForCausalLM.from_pretrained` and answer the questions.

    An answer counts as right if the whole text is the right answer and ends by itself.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(checkpoint).to(distributed.device()).eval()
    batches = [questions[i : i + BATCH] for i in range(0, len(questions), BATCH)]
    texts = []
    for batch in track(batches, description, len(batches)):
        prompts = tokenizer.apply_chat_template(
            [question.messages for question in batch],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        ids = model.generate(**prompts, max_new_tokens=16, do_sample=False)
        answers = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :])
        texts += [answer.replace(tokenizer.pad_token, "") for answer in answers]
    end = tokenizer.eos_token
    right = sum(text == question.right + end for text, question in zip(texts, questions))
    return Completions([text.removesuffix(end) for text in texts], right / len(questions))
