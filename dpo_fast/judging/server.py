"""A chat model behind an OpenAI-compatible server as judge."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from dpo_fast.data.verdicts import BadRow
from dpo_fast.durable import first_line
from dpo_fast.errors import UserError
from dpo_fast.judging.answers import Answers
from dpo_fast.judging.config import JudgeSection
from dpo_fast.judging.in_order import in_order
from dpo_fast.judging.pictures import as_text, uris
from dpo_fast.judging.rubric import TIE, Rubric, after_thinking, winner_of
from dpo_fast.judging.samples import SampleRow
from dpo_fast.judging.verdict import (
    FAILED,
    MORE_TIME,
    REFUSED,
    UNPARSABLE,
    Failures,
    Judged,
    Verdict,
    verdict_of,
)

OTHER = {"A": "B", "B": "A", TIE: TIE}
LOCAL_KEY = "none"  # for servers that ask for none; the client wants one


class NoVerdict(Exception):
    """There is no score. word: as in `Verdict`."""

    def __init__(self, word: str, why: str) -> None:
        super().__init__(why)
        self.word = word


class ServerJudge:
    """Asks a chat model about every completion, or about every two of a prompt.

    answers: those that are known, and where new ones are kept.
    """

    together = 1

    def __init__(self, section: JudgeSection, answers: Answers) -> None:
        try:
            import openai
        except ImportError:
            raise UserError(
                "judge.type=openai needs the package openai: pip install 'dpo_fast[openai]'"
            ) from None
        self.section, self.answers, self.openai = section, answers, openai
        self.rubric = Rubric(section.rubric, section.compare)
        self.client = openai.OpenAI(
            base_url=section.url,
            api_key=os.environ.get(section.api_key_env) or LOCAL_KEY,
            timeout=section.timeout_seconds,
            max_retries=section.max_retries,
        )

    def __call__(self, chunks: Iterable[list[SampleRow]]) -> Iterator[list[Judged]]:
        name = f"judge.url={self.section.url}"
        remedy = f"Look at the server. {MORE_TIME}"
        reading = "Look at judge.rubric, which says what the judge shall answer, and at the model."
        failures = Failures(self.section.max_failures, name, remedy, reading)
        rows = (row for chunk in chunks for row in chunk)
        work = lambda row: (row, self._judged(row))  # noqa: E731
        for row, judged in in_order(work, rows, self.section.parallel):
            failures.note(row, judged)
            yield [judged]

    def close(self) -> None:
        self.client.close()
        self.answers.close()

    def _judged(self, row: SampleRow) -> Judged:
        try:
            row, images = as_text(row)
            images = uris(row, images)
        except BadRow as verdict:
            return Judged([Verdict.without(FAILED, str(verdict)) for _ in row.completions])
        if self.section.compare == "pairwise":
            return self._compared(row, images)
        return Judged([self._rating(row, completion, images) for completion in row.completions])

    def _rating(self, row: SampleRow, completion: str, images: list[str]) -> Verdict:
        try:
            answer = self._ask(self.rubric.filled(row, completion=completion), images)
        except NoVerdict as reason:
            return Verdict.without(reason.word, str(reason))
        try:
            return verdict_of(self.rubric.score_of(answer))
        except ValueError as error:
            return Verdict.without(UNPARSABLE, str(error))

    def _compared(self, row: SampleRow, images: list[str]) -> Judged:
        """Scores are shares of comparisons won, of which a tie is half a one."""
        count, facts = len(row.completions), Counter()
        won: list[list[float]] = [[] for _ in range(count)]
        reason = Verdict.without(REFUSED, "there is no other completion to compare it with")
        for one, other in itertools.combinations(range(count), 2):
            share, lost = self._share(row, one, other, facts, images)
            if share is None:
                reason = lost
                continue
            won[one].append(share)
            won[other].append(1.0 - share)
        return Judged([Verdict(sum(w) / len(w)) if w else reason for w in won], facts)

    def _share(
        self, row: SampleRow, one: int, other: int, facts: Counter, images: list[str]
    ) -> tuple[float | None, Verdict | None]:
        """What `one` wins of its comparison with `other`: 1, 0.5 or 0. Or None, and why."""
        first, second = row.completions[one], row.completions[other]
        if first == second:
            facts["comparisons of equal completions"] += 1
            return 0.5, None
        winners, lost = [], None
        for swapped in (False, True) if self.section.both_orders else (False,):
            texts = (second, first) if swapped else (first, second)
            try:
                winner = self._winner(row, *texts, images)
            except NoVerdict as reason:
                lost = Verdict.without(reason.word, str(reason))
                facts[f"comparisons {reason.word}"] += 1
                continue
            facts["comparisons"] += 1
            facts[{"A": "won by the first", "B": "won by the second", TIE: "tied"}[winner]] += 1
            winners.append(OTHER[winner] if swapped else winner)
        if not winners:
            return None, lost
        if len(set(winners)) > 1 and TIE not in winners:
            facts["contradicted in the other order"] += 1
        return sum({"A": 1.0, "B": 0.0, TIE: 0.5}[each] for each in winners) / len(winners), None

    def _winner(self, row: SampleRow, first: str, second: str, images: list[str]) -> str:
        answer = self._ask(self.rubric.filled(row, first=first, second=second), images)
        try:
            return winner_of(answer)
        except ValueError as error:
            raise NoVerdict(UNPARSABLE, str(error)) from None

    def _ask(self, text: str, images: list[str]) -> str:
        """The answer's text. Raises NoVerdict, and UserError for what no other row would mend."""
        request = self._request(text, images)
        known = self.answers.find(request)
        if known is None:
            known = self._answer(request)
            self.answers.keep(request, known)
        text, reason = known["text"], known.get("reason")
        said = after_thinking(text or "")
        if reason == "length" and "[[" not in said:
            limit = self.section.max_tokens
            raise NoVerdict(UNPARSABLE, f"the answer was cut off at judge.max_tokens={limit}")
        if text is None:
            raise NoVerdict(REFUSED, reason or "the answer is empty")
        return said

    def _request(self, text: str, images: list[str]) -> dict[str, Any]:
        """images: data: URIs, which follow the text in their order."""
        content: Any = text
        if images:
            content = [{"type": "text", "text": text}]
            content += [{"type": "image_url", "image_url": {"url": uri}} for uri in images]
        section = self.section
        system = section.system_prompt
        messages = [{"role": "system", "content": system}] if system else []
        request = {"model": section.model}
        request["messages"] = [*messages, {"role": "user", "content": content}]
        for name in ("temperature", "max_tokens", "seed"):
            if (value := getattr(section, name)) is not None:
                request[name] = value
        return request | ({"extra_body": section.extra_body} if section.extra_body else {})

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        errors, place = self.openai, f"judge.url={self.section.url}"
        try:
            reply = self.client.chat.completions.create(**request)
        except (errors.AuthenticationError, errors.PermissionDeniedError) as error:
            raise UserError(
                f"{place} refuses the key: {_told(error)}; export {self.section.api_key_env} (another "
                "variable: judge.api_key_env)"
            ) from None
        except errors.NotFoundError as error:
            raise UserError(
                f"{place} has no judge.model={self.section.model}, or is no address of chat completions, "
                f"which ends with /v1: {_told(error)}"
            ) from None
        except errors.APITimeoutError:
            raise NoVerdict(
                FAILED, f"no answer in judge.timeout_seconds={self.section.timeout_seconds:g} s"
            ) from None
        except errors.OpenAIError as error:
            raise NoVerdict(FAILED, _told(error)) from None
        except ValueError as error:  # a body that is not the JSON that it says
            raise NoVerdict(FAILED, f"the answer is no JSON: {_told(error)}") from None
        return _content(reply)


def _content(reply: Any) -> dict[str, Any]:
    """Text and finish reason of a reply. Raises NoVerdict where it is no chat completion."""
    choices = getattr(reply, "choices", None)
    message = (
        getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    )
    if message is None:
        raise NoVerdict(FAILED, f"the answer is no chat completion: {str(reply):.120}")
    refusal = getattr(message, "refusal", None)
    text = message.content if isinstance(message.content, str) and message.content else None
    return {"text": None if refusal else text, "reason": refusal or choices[0].finish_reason}


def _told(error: Exception) -> str:
    cause = error.__cause__
    return first_line(error) + (f" ({first_line(cause)})" if cause is not None else "")


def server_identity(section: JudgeSection) -> dict[str, Any]:
    """What makes a server's judge the same one: the model and what it is asked, wherever it runs."""
    names = (
        "model",
        "compare",
        "both_orders",
        "system_prompt",
        "temperature",
        "max_tokens",
        "seed",
    )
    values = {name: getattr(section, name) for name in (*names, "extra_body")}
    return values | {"rubric": Rubric(section.rubric, section.compare).text}
