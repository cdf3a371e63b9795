"""A sequence classifier of transformers as judge: its logit is the score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jinja2 import TemplateError

from dpo_fast.durable import first_line
from dpo_fast.errors import UserError
from dpo_fast.judging.classifier import classifier_tokenizer, label_of, load_classifier
from dpo_fast.judging.config import JudgeSection
from dpo_fast.judging.pictures import refuse_images
from dpo_fast.judging.rubric import conversation
from dpo_fast.judging.samples import SampleRow
from dpo_fast.judging.verdict import FAILED, Failures, Judged, Verdict, verdict_of

Encoded = dict[str, list[int]]  # input_ids, and token_type_ids where the tokenizer has them
ENDLESS = 1 << 20  # tokenizers that know no limit name a huge one


class RewardModelJudge:
    """Scores a prompt with its completion as one text, in batches of like length."""

    together = 32

    def __init__(self, section: JudgeSection, device: torch.device | str) -> None:
        self.section, self.device = section, device
        self.model = load_classifier(section).to(device).eval()
        self.tokenizer = classifier_tokenizer(section)
        self.label = label_of(self.model.config, section.label)
        pad_id = self.model.config.get_text_config().pad_token_id
        embedded = self.model.get_input_embeddings().num_embeddings
        # Some name -1, or a token that was never added.
        self.pad_id = pad_id if pad_id is not None and 0 <= pad_id < embedded else None
        self.limit = self._limit()
        template = section.apply_chat_template
        if template is True and not self.tokenizer.chat_template:
            raise UserError(
                f"judge.apply_chat_template=true, but judge.path={section.path} has no chat template; "
                "set false"
            )

    def __call__(self, chunks: Iterable[list[SampleRow]]) -> Iterator[list[Judged]]:
        failures = Failures(
            self.section.max_failures, f"judge.path={self.section.path}", "Look at the model."
        )
        for rows in chunks:
            judged = self._judged(rows)
            for row, each in zip(rows, judged):
                failures.note(row, each)
            yield judged

    def close(self) -> None:
        """Free the model's memory."""
        del self.model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _judged(self, rows: list[SampleRow]) -> list[Judged]:
        found: dict[tuple[int, int], Verdict] = {}
        facts = [Counter() for _ in rows]
        texts: list[tuple[int, int, Encoded]] = []
        for number, row in enumerate(rows):
            refuse_images(row, "reward_model")
            for index, completion in enumerate(row.completions):
                try:
                    encoded = self.encoded(row, completion)
                except (TemplateError, TypeError, ValueError) as error:
                    reason = f"the chat template refuses the messages: {first_line(error)}"
                    found[number, index] = Verdict.without(FAILED, reason)
                    continue
                facts[number]["texts cut to judge.max_length"] += encoded.pop("cut")
                texts.append((number, index, encoded))
        texts.sort(key=lambda each: -len(each[2]["input_ids"]))
        for start in range(0, len(texts), self.section.batch_size):
            batch = texts[start : start + self.section.batch_size]
            for (number, index, _), score in zip(batch, self.scores([each[2] for each in batch])):
                found[number, index] = verdict_of(score)
        return [
            Judged([found[number, index] for index in range(len(row.completions))], +facts[number])
            for number, row in enumerate(rows)
        ]

    def encoded(self, row: SampleRow, completion: str) -> dict[str, Any]:
        """Token ids of a completion with its prompt, and `cut`, whether they were too many."""
        tokenizer = self.tokenizer
        if self.section.input == "completion":
            whole, texts = tokenizer(completion), (completion,)
        elif self._templated(row):
            text = self._chat(row, completion)
            whole = tokenizer(text, add_special_tokens=False)
            return self._end(whole["input_ids"])
        elif tokenizer.sep_token is not None:  # an encoder, which reads pairs of texts
            texts = (conversation(row), completion)
            whole = tokenizer(*texts)
        else:
            prompt = row.prompt if isinstance(row.prompt, str) else conversation(row) + "\n\n"
            texts = (prompt + completion,)
            whole = tokenizer(*texts)
        over = self.limit is not None and len(whole["input_ids"]) > self.limit
        if over:  # by the tokenizer, which knows which special tokens go round a text
            whole = tokenizer(*texts, truncation=True, max_length=self.limit)
        names = ("input_ids", "token_type_ids")
        return {name: list(whole[name]) for name in names if name in whole} | {"cut": bool(over)}

    def _end(self, ids: list[int]) -> dict[str, Any]:
        """The last tokens of a text, as many as fit, behind its BOS."""
        if self.limit is None or len(ids) <= self.limit:
            return {"input_ids": ids, "cut": False}
        first = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return {"input_ids": [*first, *ids[len(ids) - self.limit + len(first) :]], "cut": True}

    def _templated(self, row: SampleRow) -> bool:
        asked = self.section.apply_chat_template
        if not self.tokenizer.chat_template:
            return False
        return not isinstance(row.prompt, str) or asked in (True, "auto")

    def _chat(self, row: SampleRow, completion: str) -> str:
        messages = row.messages
        if messages and messages[-1]["role"] == "assistant":  # the completion goes on in it
            start = messages[-1]["content"]
            messages, completion = messages[:-1], f"{start}{completion}"
        return self.tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": completion}],
            tools=row.content.get("tools"),
            tokenize=False,
            **row.content.get("chat_template_kwargs", {}),
        )

    @torch.no_grad()
    def scores(self, texts: list[Encoded]) -> list[float]:
        """The logits of a batch of texts, fp32."""
        ids = [each["input_ids"] for each in texts]
        longest, pad = max(map(len, ids)), self._pad_id(ids)
        rows = {"input_ids": [each + [pad] * (longest - len(each)) for each in ids]}
        rows["attention_mask"] = [[1] * len(each) + [0] * (longest - len(each)) for each in ids]
        if "token_type_ids" in texts[0]:
            types = [each["token_type_ids"] for each in texts]
            rows["token_type_ids"] = [each + [0] * (longest - len(each)) for each in types]
        batch = {name: torch.tensor(value, device=self.device) for name, value in rows.items()}
        try:
            logits = self.model(**batch).logits.float().reshape(len(texts), -1)
        except torch.OutOfMemoryError:
            raise UserError(
                f"judge.path={self.section.path}: not enough memory for {len(texts)} texts of up to "
                f"{longest} tokens; lower judge.batch_size, or judge.max_length"
            ) from None
        except (IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = first_line(error).rstrip(".")
            raise UserError(
                f"judge.path={self.section.path} cannot score texts of up to {longest} tokens: {reason}. "
                "Look at the model; judge.max_length and judge.dtype=fp32 are others to try"
            ) from error
        # Code of a model's own may give one score, whatever its labels.
        return logits[:, self.label if logits.shape[1] > 1 else 0].cpu().tolist()

    def _pad_id(self, ids: list[list[int]]) -> int:
        """The model's own. A decoder that came without one scores the last token that is not padding, so
        padding may be any token that is the last of no text.
        """
        if self.pad_id is not None:
            return self.pad_id
        last = {each[-1] for each in ids}
        free = next(token for token in range(len(ids) + 1) if token not in last)
        for config in (self.model.config, self.model.config.get_text_config()):
            config.pad_token_id = free
        return free

    def _limit(self) -> int | None:
        """Tokens of a text, at most; None: any number."""
        takes = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if takes is not None and _counts_behind_padding(self.model):
            takes -= self.model.config.pad_token_id + 1
        limits = [self.tokenizer.model_max_length, takes]
        known = [each for each in limits if isinstance(each, int) and 0 < each < ENDLESS]
        own = self.section.max_length
        if own is not None and known and own > min(known):
            raise UserError(
                f"judge.max_length={own} is more than judge.path={self.section.path} takes: {min(known)}; "
                "lower it"
            )
        return own or min(known, default=None)


def _counts_behind_padding(model: torch.nn.Module) -> bool:
    """Whether its first position is that behind the padding token's number, as with RoBERTa."""
    tables = (each for name, each in model.named_modules() if name.endswith(".position_embeddings"))
    return any(getattr(each, "padding_idx", None) is not None for each in tables)
