"""Rows that say how good each answer is: scores, ranks, or which of two is preferred."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from dpo_fast.data.forms.conversations import EXTRA_ID, turns
from dpo_fast.data.forms.fields import Raw, better, entries, number, text, user
from dpo_fast.data.verdicts import BadRow


def ultrafeedback(row: Raw) -> Raw:
    """instruction and completions with overall_score, or with ratings of several aspects.

    custom_system_prompt and principle tell how a completion was made, each its own way; they are not
    part of the prompt.
    """
    prompt = user(text(row, "instruction", "prompt"))
    items = entries(row, "completions", "response")
    scores = [_score(item, f"completions[{index}]") for index, item in enumerate(items)]
    return {"prompt": prompt, "completions": [item["response"] for item in items], "scores": scores}


def _score(item: dict[str, Any], name: str) -> float:
    if item.get("overall_score") is not None:
        return number(item["overall_score"], f"{name}.overall_score")
    aspects = item.get("annotations")
    found = aspects.values() if isinstance(aspects, dict) else ()
    ratings = [each["Rating"] for each in found if isinstance(each, dict) and each.get("Rating")]
    known = [number(each, f"{name}.annotations") for each in ratings if each != "N/A"]
    if not known:
        raise BadRow(f"{name} has no rating", "expected overall_score, or annotations with Rating")
    return fmean(known)


def generations(row: Raw) -> Raw:
    """instruction (or input), and lists generations and ratings (distilabel)."""
    prompt = user(text(row, "instruction", "input", "prompt"))
    ratings = row.pop("ratings")
    scores = ratings if not isinstance(ratings, list) else [number(r, "ratings") for r in ratings]
    return {"prompt": prompt, "completions": row.pop("generations"), "scores": scores}


def nectar(row: Raw) -> Raw:
    """prompt of Human: and Assistant: turns, and answers with ranks, 1 is the best."""
    items = entries(row, "answers", "answer", "rank")
    ranks = [number(item["rank"], "rank") for item in items]
    prompt = turns(text(row, "prompt"))
    return {"prompt": prompt, "completions": [item["answer"] for item in items], "ranks": ranks}


def nemo_rl(row: Raw) -> Raw:
    """context, and completions with ranks, the lowest is the best; two of them are a pair."""
    items = entries(row, "completions", "completion", "rank")
    ranks = [number(item["rank"], "rank") for item in items]
    answers, prompt = [item["completion"] for item in items], row.pop("context")
    if len(items) == 2:
        return {"prompt": prompt, **better(*answers, ranks[0] - ranks[1], "rank")}
    return {"prompt": prompt, "completions": answers, "ranks": ranks}


def helpsteer2(row: Raw) -> Raw:
    """prompt, and response with helpfulness, merged of consecutive rows: the best and the worst."""
    prompt = turns(text(row, "prompt"), EXTRA_ID)
    answers, rated = row.pop("response"), row.pop("helpfulness")
    answers, rated = (each if isinstance(each, list) else [each] for each in (answers, rated))
    if len(answers) < 2:
        raise BadRow(
            "one response to a prompt", "consecutive rows with the same prompt make a pair"
        )
    if len(rated) != len(answers):
        detail = f"got {len(rated)} for {len(answers)} responses"
        raise BadRow("field 'helpfulness' has another length than 'response'", detail)
    scores = [number(each, "helpfulness") for each in rated]
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    tie = scores[worst] - scores[best]
    return {"prompt": prompt, **better(answers[best], answers[worst], tie, "helpfulness")}


def helpsteer2_preference(row: Raw) -> Raw:
    """prompt, response_1, response_2, preference_strength: below 0 for the first."""
    prompt = turns(text(row, "prompt"), EXTRA_ID)
    return {"prompt": prompt, **_preferred(row, "response_1", "response_2", "preference_strength")}


def helpsteer3(row: Raw) -> Raw:
    """context, response1, response2, overall_preference: below 0 for the first."""
    prompt = row.pop("context")
    return {"prompt": prompt, **_preferred(row, "response1", "response2", "overall_preference")}


def safe_rlhf(row: Raw) -> Raw:
    """prompt, response_0, response_1, and better_response_id."""
    prompt = user(text(row, "prompt"))
    return {"prompt": prompt, **_by_index(row, "response_0", "response_1", "better_response_id", 0)}


def shp(row: Raw) -> Raw:
    """history, human_ref_A, human_ref_B, and labels: 1 for A."""
    prompt = user(text(row, "history"))
    return {"prompt": prompt, **_by_index(row, "human_ref_A", "human_ref_B", "labels", 1)}


def _preferred(row: Raw, one: str, other: str, column: str) -> Raw:
    preference = number(row.pop(column), column)
    return better(row.pop(one), row.pop(other), preference, column)


def _by_index(row: Raw, one: str, other: str, column: str, means_first: int) -> Raw:
    index = number(row.pop(column), column)
    if index not in (0, 1):
        raise BadRow(f"field {column!r} is not 0 or 1", f"got {index:g}")
    first = index == means_first
    return better(row.pop(one), row.pop(other), -1 if first else 1, column)
