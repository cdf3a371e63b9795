"""Completions written by `generate` of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria, StopStringCriteria

from dpo_fast.errors import UserError
from dpo_fast.generation.batches import Batch
from dpo_fast.generation.config import SampleSection
from dpo_fast.generation.encode import PromptCodec
from dpo_fast.generation.engine import LENGTH, STOP, Completion, Request, cut_at_stop
from dpo_fast.models.scoring import ScoringModel


class TransformersEngine:
    """Batches padded on the left. Every batch has its own seed, whatever was drawn before it.

    scoring: the model; it is in evaluation mode meanwhile.
    """

    def __init__(self, scoring: ScoringModel, codec: PromptCodec, section: SampleSection) -> None:
        self.scoring, self.codec, self.section = scoring, codec, section
        self.pad_id = codec.tokenizer.pad_token_id

    def complete(
        self, batches: Iterable[Batch], requests: Sequence[Request]
    ) -> Iterator[tuple[Batch, list[Completion]]]:
        """As `Engine.complete`. Batches come in their order."""
        causal_lm = self.scoring.causal_lm
        own, was_training = causal_lm.generation_config, self.scoring.training
        # `generate` takes what a call leaves open from here: penalties, bad words, a top-k of 50.
        causal_lm.generation_config = GenerationConfig()
        self.scoring.eval()
        try:
            for batch in batches:
                yield batch, self._complete(batch, [requests[place] for place, _ in batch.members])
        finally:
            causal_lm.generation_config = own
            self.scoring.train(was_training)

    def close(self) -> None:
        del self.scoring

    def _complete(self, batch: Batch, requests: list[Request]) -> list[Completion]:
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(batch.seed)
            ids_BL = self._generate(requests)
        longest = max(len(each.ids) for each in requests)
        ends = {index for each in requests for index in each.stop_ids}
        rows = (ids[longest:] for ids in ids_BL.tolist())
        return [self._read(each, ids, ends) for each, ids in zip(requests, rows)]

    @torch.no_grad()
    def _generate(self, requests: list[Request]) -> Tensor:
        """Prompts with what follows them, int64 [B, L]."""
        longest, images = max(len(each.ids) for each in requests), self.codec.images
        rows = [
            [self.pad_id] * (longest - len(each.ids)) + images.as_read(each.ids)
            for each in requests
        ]
        masks = [[0] * (longest - len(each.ids)) + [1] * len(each.ids) for each in requests]
        input_ids = torch.tensor(rows, device=self._device)
        try:
            return self.scoring.model.generate(
                input_ids=input_ids,
                attention_mask=torch.tensor(masks, device=self._device),
                generation_config=self._generation_config(requests),
                stopping_criteria=self._stopping(longest),
                **self._images(requests, input_ids),
            )
        except torch.OutOfMemoryError:
            raise UserError(
                f"sample.engine.batch_size={len(requests)}: not enough memory for so many completions of "
                f"up to {longest + self.section.max_new_tokens} tokens at a time; lower it. Other batches "
                "give other completions, so what is done is made again: name another output_dir"
            ) from None
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            where = requests[0].prompt.where
            raise UserError(
                f"the model gives no probabilities, but nan or inf, for a batch with {where}; look at the "
                "model and at model.dtype"
            ) from None

    def _images(self, requests: list[Request], input_ids: Tensor) -> dict[str, Tensor]:
        """The arguments of `generate` for the images of the prompts; none without any."""
        inputs = self.codec.images.inputs(each.ids for each in requests)
        if not inputs:
            return {}
        flags = [
            [False] * (input_ids.shape[1] - len(each.ids)) + [index < 0 for index in each.ids]
            for each in requests
        ]
        return self.scoring.vision.of_generate(
            self.scoring.causal_lm, inputs, torch.tensor(flags), input_ids
        )

    def _generation_config(self, requests: list[Request]) -> GenerationConfig:
        section, drawn = self.section, {"do_sample": False}
        if section.temperature:
            drawn = {"do_sample": True, "temperature": section.temperature, "top_p": section.top_p}
            drawn |= {"top_k": section.top_k, "min_p": section.min_p or None}
        ends = sorted({index for each in requests for index in each.stop_ids})
        return GenerationConfig(
            max_new_tokens=section.max_new_tokens,
            repetition_penalty=section.repetition_penalty,
            eos_token_id=ends,
            pad_token_id=self.pad_id,
            **drawn,
        )

    def _stopping(self, longest: int) -> list[StoppingCriteria]:
        if not self.section.stop:
            return []
        return [_InCompletion(StopStringCriteria(self.codec.tokenizer, self.section.stop), longest)]

    def _read(self, request: Request, ids: list[int], ends: set[int]) -> Completion:
        """One row of what was written, which goes on with padding after its end."""
        size = next((place for place, index in enumerate(ids) if index in ends), None)
        text = self.codec.decode(request.prompt, request.ids, ids[:size])
        text, stopped = cut_at_stop(text, self.section.stop)
        if size is not None:
            return Completion(text, STOP, ids[: size + 1])
        while self.section.stop and ids[-1:] == [self.pad_id]:
            ids = ids[:-1]
        # A stopping text may also be in the name of a special token, which is no part of the text.
        if stopped or len(ids) < self.section.max_new_tokens:
            return Completion(text, STOP, ids)
        return Completion(self.codec.cut_off(request.prompt, request.ids, text), LENGTH, ids)

    @property
    def _device(self) -> torch.device:
        return self.scoring.causal_lm.device


class _InCompletion(StoppingCriteria):
    """A criterion that sees no prompt: a stopping text that begins in it is none of the completion's.

    start: tokens before the completion.
    """

    def __init__(self, criterion: StoppingCriteria, start: int) -> None:
        self.criterion, self.start = criterion, start

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        return self.criterion(input_ids[:, self.start :], scores, **more)


def positions_of(causal_lm: Any) -> int | None:
    """Tokens of a sequence that a model has positions for; None where there is no limit."""
    return getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
