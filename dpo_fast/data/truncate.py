"""How a row is made to fit into max_length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dpo_fast.data.config import DataConfig
from dpo_fast.data.verdicts import Dropped
from dpo_fast.errors import UserError


@dataclass(frozen=True)
class Fitted:
    """A row that fits; `prompt_cut` and `answers_cut` say how many tokens and answers were cut."""

    prompt: list[int]
    answers: list[list[int]]
    prompt_cut: int = 0
    answers_cut: int = 0


def fit(
    where: str,
    prompt: list[int],
    answers: Mapping[str, list[int]],
    config: DataConfig,
    bos_id: int | None,
) -> Fitted:
    """Cuts a row so that prompt + completion is at most config.max_length tokens, for every answer.

    All sequences of a row keep the same prompt. First the completions: each keeps its first
    `max_length - min(len(prompt), max_prompt_length)` tokens. Then the prompt, which gets what the
    longest completion leaves: its end (`keep_end`, with BOS still first) or its start
    (`keep_start`). So the answers are cut only where the prompt already is at its reserve, and at
    least one token of each part stays. With max_length=8 and max_prompt_length=3:

        prompt 4, chosen 4, rejected 2    fits: 4 + 4
        prompt 9, chosen 4, rejected 2    prompt cut to 4
        prompt 9, chosen 7, rejected 2    chosen cut to 5, prompt to 3
        prompt 1, chosen 9, rejected 2    chosen cut to 7, prompt stays 1

    A cut completion has no end of turn, and none is put there: the model is not taught to stop
    in mid-sentence. `drop` and `error` never cut.

    Raises Dropped (too long under `drop`; an answer without tokens; answers that are the same
    tokens, or become so by the cut) and UserError (too long under `error`).
    """
    parts = list(answers.values())
    if not all(parts):
        raise Dropped("an answer has no tokens")
    if _alike(parts):
        raise Dropped("the answers are the same tokens")
    longest = len(prompt) + max(map(len, parts))
    if longest <= config.max_length:
        return Fitted(prompt, parts)
    if config.truncation == "drop":
        raise Dropped("longer than max_length", f"{longest} > {config.max_length} tokens")
    if config.truncation == "error":
        raise _too_long(where, {"prompt": prompt, **answers}, longest, config)
    return _cut(prompt, parts, config, bos_id)


def _alike(answers: list[list[int]]) -> bool:
    """Whether all answers are the same; there is nothing to compare one answer with."""
    return len(answers) > 1 and all(answer == answers[0] for answer in answers)


def _too_long(
    where: str, parts: Mapping[str, list[int]], longest: int, config: DataConfig
) -> UserError:
    counts = [f"{len(ids)} {name}" for name, ids in parts.items()]
    return UserError(
        f"{where}: {', '.join(counts[:-1])} and {counts[-1]} tokens do not fit into "
        f"data.max_length={config.max_length}; raise it to {longest}, or set data.truncation to "
        "keep_end, keep_start or drop"
    )


def _cut(
    prompt: list[int], answers: list[list[int]], config: DataConfig, bos_id: int | None
) -> Fitted:
    room = config.max_length - min(len(prompt), config.prompt_reserve)
    answers_cut = sum(len(answer) > room for answer in answers)
    answers = [answer[:room] for answer in answers]
    if _alike(answers):
        raise Dropped("the answers are the same once cut", f"all keep {room} tokens")
    length = min(len(prompt), config.max_length - max(map(len, answers)))
    prompt_cut = len(prompt) - length
    if config.truncation == "keep_start":
        kept = prompt[:length]
    elif prompt_cut and bos_id is not None and prompt[0] == bos_id:
        kept = [bos_id, *prompt[len(prompt) - length + 1 :]]
    else:
        kept = prompt[prompt_cut:]
    return Fitted(kept, answers, prompt_cut, answers_cut)
