"""How good data are for learning preferences: repetitions, contradictions, shortcuts, languages, doubt.

Token ids are looked at in all rows, texts in `TEXTS` rows at even distances at most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_fast.data.facts import data_facts, text_hashes
from dpo_fast.data.images.tokens import text_ids
from dpo_fast.data.kinds import PAIRS
from dpo_fast.data.near import clusters, signatures
from dpo_fast.data.traits import NO_SCRIPT, TRAITS, normalised, script, traits
from dpo_fast.progress import shown

TEXTS = 20_000
SHOWN = 5  # places and texts of each kind
SHORTCUT = 0.7  # accuracy of a rule by form
RARE = 0.05  # share of the pairs below which a rule by form does not matter
FEW = 50  # pairs
DOUBT = 1.0  # nats a token by which a reference prefers the rejected answer


@dataclass
class Rule:
    """One answer has something that the other has not. chosen: of these pairs, where the chosen one has."""

    name: str
    pairs: int
    chosen: int
    looked: int

    @property
    def right(self) -> float:
        """How often a rule that goes by it alone, in the better direction, finds the label."""
        return max(self.chosen, self.pairs - self.chosen) / max(self.pairs, 1)

    @property
    def side(self) -> str:
        return "chosen" if 2 * self.chosen >= self.pairs else "rejected"

    @property
    def gives_away(self) -> bool:
        """Whether it may be learnt in place of the preference."""
        if self.pairs < max(FEW, RARE * self.looked):
            return False
        return self.right - 1 / math.sqrt(self.pairs) > SHORTCUT


@dataclass
class Quality:
    """What was found.

    facts: of `data_facts`. texts: rows whose texts were looked at.
    near: examples that are nearly the same as one before; near_prompts: the same of prompts alone.
    largest: size, place and opening of the largest groups of examples that are nearly the same.
    across: evaluation examples that are nearly the same as one of training, and the first of both.
    prompts: distinct ones; repeated: the most frequent, with their count.
    equal: pairs, of those whose texts were looked at, whose answers differ in case and punctuation alone.
    scripts: of the prompts; changed: pairs whose chosen answer has another script than the prompt.
    rules: by form and length, the most telling first.
    lengths: scored tokens of the answers, and by how many the chosen one is longer.
    ratios: the reference's log-ratio of chosen to rejected, nats a token, of every pair; None without one.
    doubtful: pairs whose rejected answer the reference prefers by `DOUBT` nats a token, the first of them.
    """

    kind: str
    rows: int
    evaluation_rows: int = 0
    facts: dict[str, float] = field(default_factory=dict)
    texts: int = 0
    near: int = 0
    near_prompts: int = 0
    largest: list[tuple[int, str, str]] = field(default_factory=list)
    across: int = 0
    across_places: list[tuple[str, str]] = field(default_factory=list)
    prompts: int = 0
    repeated: list[tuple[int, str]] = field(default_factory=list)
    equal: int = 0
    equal_places: list[str] = field(default_factory=list)
    scripts: Counter = field(default_factory=Counter)
    changed: int = 0
    rules: list[Rule] = field(default_factory=list)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    ratios: np.ndarray | None = None
    doubtful: list[str] = field(default_factory=list)

    @property
    def doubtful_share(self) -> float:
        return float((self.ratios < -DOUBT).mean())


def measure(
    train: Any, evaluation: Any | None, tokenizer: Any, logps: np.ndarray | None = None
) -> Quality:
    """Look at a `Dataset` or `Chunk` and the evaluation's.

    logps: of a reference, for the chosen and the rejected answer of every pair, [P, 2], if there are some.
    """
    quality = Quality(train.kind.name, len(train), 0 if evaluation is None else len(evaluation))
    quality.facts = data_facts(train, evaluation)
    _repetitions(quality, train, evaluation, tokenizer)
    _texts(quality, train, tokenizer)
    _lengths(quality, train, logps)
    return quality


def _repetitions(quality: Quality, train: Any, evaluation: Any | None, tokenizer: Any) -> None:
    parts = [train] if evaluation is None or evaluation.kind != train.kind else [train, evaluation]
    first = clusters(signatures(parts, train.kind.ids))
    mine, others = first[: len(train)], first[len(train) :]
    quality.near = int((mine != np.arange(len(mine))).sum())
    sizes = Counter(mine.tolist()).most_common(SHOWN)
    quality.largest = [
        (size, train.where(place), _opening(train, place, tokenizer))
        for place, size in sizes
        if size > 1
    ]
    leaked = np.flatnonzero(others < len(train))
    quality.across = len(leaked)
    quality.across_places = [
        (evaluation.where(int(place)), train.where(int(others[place]))) for place in leaked[:SHOWN]
    ]
    prompts = clusters(signatures([train], train.kind.ids[:1]))
    quality.near_prompts = int((prompts != np.arange(len(prompts))).sum())
    _, places, counts = np.unique(
        text_hashes(train, train.kind.ids[0]), return_index=True, return_counts=True
    )
    quality.prompts = len(counts)
    for place in np.argsort(-counts, kind="stable")[:SHOWN]:
        if counts[place] > 1:
            text = _opening(train, int(places[place]), tokenizer)
            quality.repeated.append((int(counts[place]), text))


def _opening(examples: Any, index: int, tokenizer: Any) -> str:
    """The last words of a prompt: its beginning is often a template's."""
    ids = text_ids(examples[index][examples.kind.ids[0]])[-60:]
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())


def _texts(quality: Quality, examples: Any, tokenizer: Any) -> None:
    step = -(-len(examples) // TEXTS)
    paired = examples.kind == PAIRS
    differ, chosen_has = np.zeros((2, len(TRAITS)), np.int64)
    for index, (prompt, *answers) in _decoded(examples, range(0, len(examples), step), tokenizer):
        quality.texts += 1
        written = script(prompt)
        quality.scripts[written] += 1
        if not paired:
            continue
        chosen, rejected = answers
        answered = script(chosen)
        quality.changed += answered != written and NO_SCRIPT not in (answered, written)
        if normalised(chosen) == normalised(rejected):
            quality.equal += 1
            if len(quality.equal_places) < SHOWN:
                quality.equal_places.append(examples.where(index))
        has = np.array([traits(chosen), traits(rejected)])
        differ += has[0] != has[1]
        chosen_has += has[0] & ~has[1]
    if paired:
        quality.rules = [
            Rule(name, int(pairs), int(chosen), quality.texts)
            for name, pairs, chosen in zip(TRAITS, differ, chosen_has)
        ]


def _decoded(
    examples: Any, places: range, tokenizer: Any, many: int = 1024
) -> Iterator[tuple[int, list[str]]]:
    """Texts of the prompt and of the answers of a pair; of other kinds of the prompt alone."""
    names = examples.kind.ids if examples.kind == PAIRS else examples.kind.ids[:1]
    with shown("looking at texts", len(places)) as advance:
        for start in range(0, len(places), many):
            yield from _some(examples, places[start : start + many], names, tokenizer)
            advance(min(many, len(places) - start))


def _some(
    examples: Any, some: range, names: tuple[str, ...], tokenizer: Any
) -> Iterator[tuple[int, list[str]]]:
    found = (examples[index] for index in some)
    flat = [text_ids(example[name]) for example in found for name in names]
    texts = tokenizer.batch_decode(flat, skip_special_tokens=True)
    for place, index in enumerate(some):
        yield index, texts[place * len(names) : (place + 1) * len(names)]


def _lengths(quality: Quality, examples: Any, logps: np.ndarray | None) -> None:
    scored_S = examples.lengths.scored_S
    quality.lengths["prompt"] = examples.lengths.prompt_P
    if examples.kind != PAIRS:
        quality.lengths["answer"] = scored_S
        return
    chosen, rejected = scored_S[0::2], scored_S[1::2]
    quality.lengths |= {
        "chosen": chosen,
        "rejected": rejected,
        "chosen less rejected": chosen - rejected,
    }
    unequal, longer = int((chosen != rejected).sum()), int((chosen > rejected).sum())
    rules = [Rule("more tokens", unequal, longer, len(chosen)), *quality.rules]
    quality.rules = sorted(rules, key=lambda rule: (not rule.gives_away, -rule.right))
    if logps is not None:
        means = logps / np.maximum(np.stack([chosen, rejected], axis=1), 1)
        quality.ratios = means[:, 0] - means[:, 1]
        worst = np.argsort(quality.ratios, kind="stable")[:SHOWN]
        quality.doubtful = [examples.where(int(i)) for i in worst if quality.ratios[i] < -DOUBT]


def as_health_facts(quality: Quality) -> Mapping[str, float]:
    """The facts under the names of metrics, for the rules of `dpo_fast.health`."""
    return {f"data/{name}": value for name, value in quality.facts.items()}
