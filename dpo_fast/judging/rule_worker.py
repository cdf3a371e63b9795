"""The process in which a user's function runs. It imports nothing of this package, so it starts at once.

Its first line says {"ready": {...}} or {"error": ...}. Then each line of standard input is a row with some
of its completions, and each line of output {"scores": [...]} or {"error": ...}. What the function prints
goes to standard error.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import signal
import sys
import traceback

PR_SET_PDEATHSIG = 1


def load(name: str):
    """The function of module:function or path.py:function, which may be a method, and its file."""
    place, _, path = name.rpartition(":")
    sys.path.insert(0, os.getcwd())
    if place.endswith(".py"):
        file = os.path.abspath(os.path.expanduser(place))
        if not os.path.isfile(file):
            raise LookupError(f"there is no file {place}")
        sys.path.insert(0, os.path.dirname(file))
        stem = os.path.splitext(os.path.basename(file))[0]
        spec = importlib.util.spec_from_file_location(stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[stem] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    found = module
    for part in path.split("."):
        if not hasattr(found, part):
            own = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
            raise LookupError(
                f"{place} has no {path}; it has {', '.join(own[:20]) or 'no function'}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{path} of {place} is a {type(found).__name__}, and not a function")
    return found, getattr(module, "__file__", None)


class Rule:
    """Calls the function in the way that its parameters ask for."""

    def __init__(self, function, kwargs: dict) -> None:
        self.function, self.kwargs = function, kwargs
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # some functions of C
            parameters = [inspect.Parameter("completion", inspect.Parameter.POSITIONAL_ONLY)]
        kinds = inspect.Parameter
        self.takes_all = any(each.kind == kinds.VAR_KEYWORD for each in parameters)
        positional = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        self.required = [
            each.name
            for each in parameters
            if each.kind in positional and each.default is each.empty and each.name not in kwargs
        ]
        self.names = {each.name for each in parameters if each.kind != kinds.POSITIONAL_ONLY}
        unknown = sorted(set(kwargs) - self.names)
        if unknown and not self.takes_all:
            raise TypeError(f"judge.kwargs.{unknown[0]}: the function has no such parameter")

    @property
    def together(self) -> bool:
        """Whether it wants all completions of a prompt at a time."""
        return "completions" in self.names

    def __call__(self, row: dict) -> list:
        if self.together:
            return self._together(row)
        return [self._one(row, completion) for completion in row["completions"]]

    def _together(self, row: dict) -> list:
        """As TRL calls a reward function: lists, and messages where the prompt is messages."""
        completions, count = row["completions"], len(row["completions"])
        if not isinstance(row["prompt"], str):
            completions = [[{"role": "assistant", "content": each}] for each in completions]
        given = {name: [value] * count for name, value in row["columns"].items()}
        given |= {"prompts": [row["prompt"]] * count, "completions": completions}
        found = _result(self.function(**(self._known(given) | self.kwargs)))
        found = found.tolist() if hasattr(found, "tolist") else found
        if not isinstance(found, (list, tuple)) or len(found) != count:
            raise TypeError(f"expected a list of {count} scores, got {found!r:.80}")
        return [_number(each) for each in found]

    def _one(self, row: dict, completion: str):
        given = {"prompt": row["prompt"], "completion": completion}
        columns = self._known({k: v for k, v in row["columns"].items() if k not in self.kwargs})
        known = {name: value for name, value in given.items() if name in self.names}
        if self.takes_all and ("completion" in known or not self.required):
            known = given
        values, free = [], []
        if (
            "completion" not in known
        ):  # it has another name: the first, or the second after the prompt's
            free = [name for name in self.required if name not in known]
            several = len(free) > 1 and not known
            free = free[: 1 + several]
            values = [row["prompt"], completion] if several else [completion]
        if meant := [name for name in free if name in columns]:
            raise TypeError(
                f"parameter {meant[0]}: is it the row's column of that name? Call the parameter of the "
                "completion `completion`, and that of the prompt `prompt`"
            )
        if known:
            known, values = known | dict(zip(free, values)), []
        return _number(_result(self.function(*values, **(columns | known), **self.kwargs)))

    def _known(self, given: dict) -> dict:
        """Those that the function has a parameter for."""
        return given if self.takes_all else {k: v for k, v in given.items() if k in self.names}


class Several:
    """Adds what several functions give, as TRL's GRPO does.

    A function that gives None adds nothing; where all do, None is the sum.
    """

    together = True

    def __init__(self, rules: list[Rule], weights: list[float] | None, normalise: bool) -> None:
        self.rules, self.normalise = rules, normalise
        self.weights = weights or [1.0] * len(rules)

    def __call__(self, row: dict) -> list:
        scores = [rule(row) for rule in self.rules]
        if self.normalise:
            scores = [_normalised(given) for given in scores]
        return [self._sum(each) for each in zip(*scores)]

    def _sum(self, scores: tuple):
        if all(score is None for score in scores):
            return None
        odd = [score for score in scores if isinstance(score, str)]  # no finite number
        pairs = zip(self.weights, scores)
        return odd[0] if odd else float(sum(w * score for w, score in pairs if score is not None))


def _normalised(scores: list) -> list:
    """The scores of a prompt with mean 0 and standard deviation 1, as far as they differ."""
    known = [each for each in scores if isinstance(each, (int, float))]
    mean = sum(known) / max(len(known), 1)
    spread = math.sqrt(sum((each - mean) ** 2 for each in known) / max(len(known) - 1, 1))
    return [
        (each - mean) / (spread + 1e-4) if isinstance(each, (int, float)) else each
        for each in scores
    ]


def _result(value):
    return asyncio.run(value) if inspect.iscoroutine(value) else value


def _number(value):
    """A number as JSON has it; one that is not finite, or is no number, as a text that says so."""
    if value is None or isinstance(value, (bool, int)):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"{value!r:.80}"
    return number if math.isfinite(number) else repr(number)


def _told(error: BaseException) -> str:
    """The error, with the line of the user's code in which it came up."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _hash(file: str | None) -> str | None:
    if file is None or not os.path.isfile(file):
        return None
    with open(file, "rb") as content:
        return hashlib.sha256(content.read()).hexdigest()


def end_with_parent() -> None:
    """A function that never returns would not see that standard input has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def rule_of(names: list[str], options: dict):
    """What scores a row, and the files of its functions. Several functions are added up."""
    loaded = [load(name) for name in names]
    kwargs = options["kwargs"]
    if len(loaded) == 1:
        return Rule(loaded[0][0], kwargs), [loaded[0][1]]
    rules = [Rule(function, _taken(function, kwargs)) for function, _ in loaded]
    if unused := set(kwargs) - {name for rule in rules for name in rule.kwargs}:
        raise TypeError(f"judge.kwargs.{sorted(unused)[0]}: no function has such a parameter")
    normalise = options["aggregation"] == "normalize_then_sum"
    return Several(rules, options["weights"], normalise), [file for _, file in loaded]


def _taken(function, kwargs: dict) -> dict:
    """The further arguments that a function has a parameter for, by name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in kwargs.items() if name in parameters}


def main(names: str, options: str) -> None:
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the function may print
    rows = os.fdopen(os.dup(0), "rb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # and may start programs, which would read its rows

    def say(value: dict) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        rule, files = rule_of(json.loads(names), json.loads(options))
    except Exception as error:
        say({"error": _told(error)})
        return
    say({"ready": {"sha256": [_hash(file) for file in files], "together": rule.together}})
    for line in rows:
        try:
            say({"scores": rule(json.loads(line))})
        except Exception as error:
            say({"error": _told(error)})


if __name__ == "__main__":
    main(*sys.argv[1:])
