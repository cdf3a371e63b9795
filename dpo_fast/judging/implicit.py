"""A model's own implicit reward as judge: beta (log policy - log reference), arXiv 2305.18290 eq 5."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dpo_fast.data.config import IMAGES, DataConfig
from dpo_fast.data.images.known import KnownImages
from dpo_fast.data.rows import parse_row
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.data.verdicts import Verdict as RowVerdict
from dpo_fast.errors import UserError
from dpo_fast.generation.encode import Tokens
from dpo_fast.generation.logps import LAYOUT, score
from dpo_fast.judging.config import JudgeSection
from dpo_fast.judging.pairing import as_read
from dpo_fast.judging.samples import LENGTH, SampleRow
from dpo_fast.judging.verdict import FAILED, Failures, Judged, Verdict, verdict_of
from dpo_fast.models import ScoringModel, end_of_turn_ids, load_model, load_tokenizer
from dpo_fast.models.architecture import architecture_of, choose_attention
from dpo_fast.models.config import ModelSection
from dpo_fast.models.load import load_skeleton
from dpo_fast.models.vision import why_no_images


class ImplicitJudge:
    """Scores completions by two models in memory. What is scored is what `train` would score.

    model: the policy. data: options of how its rows become tokens.
    """

    together = 32

    def __init__(
        self,
        section: JudgeSection,
        model: ModelSection,
        data: DataConfig,
        device: torch.device | str,
    ) -> None:
        self.section, self.data, self.device = section, data, device
        self.policy_section = model.model_copy(update={"lora": None, **_shared(section)})
        self.tokenizer = load_tokenizer(self.policy_section)
        ends = end_of_turn_ids(self.policy_section)
        self.tokenise = RowTokeniser(self.tokenizer, data, ends)
        self.images = KnownImages(self.tokenise.images.model, self.tokenise.images.store)
        self.sees = False

    @cached_property
    def models(self) -> tuple[ScoringModel, ScoringModel]:
        """The policy and the reference."""
        options = _shared(self.section) | {"images": self.sees or None}
        options["trust_remote_code"] = self.section.trust_remote_code
        reference = ModelSection(path=self.section.reference, **options)
        policy = self.policy_section.model_copy(update={"images": self.sees or None})
        policy = self._loaded(policy, "model.path")
        return policy, self._loaded(reference, "judge.reference")

    def __call__(self, chunks: Iterable[list[SampleRow]]) -> Iterator[list[Judged]]:
        name = f"judge.reference={self.section.reference}"
        failures = Failures(self.section.max_failures, name, "Look at the models and the rows.")
        for rows in chunks:
            judged = self._judged(rows)
            for row, each in zip(rows, judged):
                failures.note(row, each)
            yield judged

    def close(self) -> None:
        """Free the models' memory."""
        self.__dict__.pop("models", None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _judged(self, rows: list[SampleRow]) -> list[Judged]:
        found: list[list[Any]] = [[None] * len(row.completions) for row in rows]
        texts: list[tuple[int, int, Tokens]] = []
        for number, row in enumerate(rows):
            for index in range(len(row.completions)):
                try:
                    texts.append((number, index, self._tokens(row, index)))
                except RowVerdict as verdict:
                    found[number][index] = Verdict.without(FAILED, str(verdict))
        texts.sort(key=lambda each: -len(each[2].prompt_ids) - len(each[2].answer_ids))
        for start in range(0, len(texts), self.section.batch_size):
            batch = texts[start : start + self.section.batch_size]
            for (number, index, _), reward in zip(batch, self._rewards([t for *_, t in batch])):
                found[number][index] = verdict_of(reward)
        return [Judged(each) for each in found]

    def _tokens(self, row: SampleRow, index: int) -> Tokens:
        """Raises BadRow or Dropped for what `train` would not take, either."""
        wanted = ("system", "tools", "chat_template_kwargs", "image", IMAGES)
        columns = {name: row.content[name] for name in wanted if name in row.content}
        (answer,) = as_read(row.prompt, [row.completions[index]])
        columns |= {"finish_reason": LENGTH} if row.unfinished(index) else {}
        raw = {"prompt": row.prompt, "completion": answer, "label": True, **columns}
        found = self.tokenise(parse_row(row.where, raw, self.data))
        if found.images and not self.sees:  # the models were loaded for texts, if they were
            self.close()
            self.sees = True
        self.images.note(found.images or ())
        return Tokens(found.prompt_ids, found.completion_ids, found.completion_scored)

    def _rewards(self, texts: list[Tokens]) -> list[float]:
        pad_id = self.tokenizer.pad_token_id
        policy, reference = (score(model, texts, pad_id, self.images) for model in self.models)
        rewards = []
        for ours, theirs in zip(policy, reference):
            difference = float(ours.sum(dtype=np.float64) - theirs.sum(dtype=np.float64))
            rewards.append(
                self.section.beta * difference / (len(ours) if self.section.per_token else 1)
            )
        return rewards

    def _loaded(self, section: ModelSection, option: str) -> ScoringModel:
        skeleton = load_skeleton(section, option)
        if self.sees and (obstacle := why_no_images(skeleton)) is not None:
            raise UserError(
                f"{option}={section.path} cannot be honoured: the samples have prompts with images, and "
                f"this model cannot take them: {obstacle}. Name a model that sees images"
            )
        architecture = architecture_of(skeleton)
        attention = choose_attention(
            "auto", LAYOUT, self.device, section.torch_dtype, architecture
        ).name
        model = load_model(section, attention=attention, option=option).to(self.device)
        if model.causal_lm.get_input_embeddings().num_embeddings < len(self.tokenizer):
            raise UserError(
                f"{option}={section.path} has fewer embeddings than the tokenizer of model.path has "
                "tokens: the two models do not share a tokenizer"
            )
        return model.requires_grad_(False).eval()


def _shared(section: JudgeSection) -> dict[str, Any]:
    """Options of both models."""
    return {"dtype": section.dtype, "attention": "auto", "torch_compile": False}
