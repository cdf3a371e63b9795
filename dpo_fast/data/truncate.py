"""How a pair is made to fit into max_length."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_fast.data.config import DataConfig
from dpo_fast.data.verdicts import Dropped
from dpo_fast.errors import UserError


@dataclass(frozen=True)
class Fitted:
    """A pair that fits; `prompt_cut` and `answers_cut` say how many tokens and answers were cut."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    prompt_cut: int = 0
    answers_cut: int = 0


def fit(
    where: str,
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    config: DataConfig,
    bos_id: int | None,
) -> Fitted:
    """Cuts a pair so that prompt + completion is at most config.max_length tokens, for both.

    The two sequences keep the same prompt. First the completions: each keeps its first
    `max_length - min(len(prompt), max_prompt_length)` tokens. Then the prompt, which gets what the
    longer completion leaves: its end (`keep_end`, with BOS still first) or its start
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
    if not chosen or not rejected:
        raise Dropped("an answer has no tokens")
    if chosen == rejected:
        raise Dropped("the answers are the same tokens")
    longest = len(prompt) + max(len(chosen), len(rejected))
    if longest <= config.max_length:
        return Fitted(prompt, chosen, rejected)
    if config.truncation == "drop":
        raise Dropped("longer than max_length", f"{longest} > {config.max_length} tokens")
    if config.truncation == "error":
        raise _too_long(where, prompt, chosen, rejected, config)
    return _cut(prompt, chosen, rejected, config, bos_id)


def _too_long(
    where: str, prompt: list[int], chosen: list[int], rejected: list[int], config: DataConfig
) -> UserError:
    longest = len(prompt) + max(len(chosen), len(rejected))
    return UserError(
        f"{where}: {len(prompt)} prompt, {len(chosen)} chosen and {len(rejected)} rejected tokens "
        f"do not fit into data.max_length={config.max_length}; raise it to {longest}, or set "
        "data.truncation to keep_end, keep_start or drop"
    )


def _cut(
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    config: DataConfig,
    bos_id: int | None,
) -> Fitted:
    room = config.max_length - min(len(prompt), config.prompt_reserve)
    answers_cut = (len(chosen) > room) + (len(rejected) > room)
    chosen, rejected = chosen[:room], rejected[:room]
    if chosen == rejected:
        raise Dropped("the answers are the same once cut", f"both keep {room} tokens")
    length = min(len(prompt), config.max_length - max(len(chosen), len(rejected)))
    prompt_cut = len(prompt) - length
    if config.truncation == "keep_start":
        kept = prompt[:length]
    elif prompt_cut and bos_id is not None and prompt[0] == bos_id:
        kept = [bos_id, *prompt[len(prompt) - length + 1 :]]
    else:
        kept = prompt[prompt_cut:]
    return Fitted(kept, chosen, rejected, prompt_cut, answers_cut)
