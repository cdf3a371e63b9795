"""Loggers beside metrics.jsonl. Each gets our metrics at our steps, from rank 0 alone.

Metrics have the names that the Trainer of transformers gives them: `train/loss`, `eval/loss`. DeepSpeed's
monitors stay off. They log a series of their own at other steps, after which W&B drops ours.

A service that fails or hangs never holds the run up: every logger works in a thread of its own, and one
that fails is told once and left out. `logger_clients.py` has the loggers themselves.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.training.checkpoints import saving
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.logger_clients import CLIENTS, FAILED, FINISHED, Answers, Logger, Opening

EVALUATION = "eval_"
IDENTITIES = "loggers.json"  # by which the services know the run
PATIENCE = {FINISHED: 120.0}  # seconds to send what is left; a run that is stopped has less
HURRY = 15.0
BEGINNING = 150.0  # seconds to begin; the client of W&B itself gives up behind two minutes
SILENT = 10.0  # so long nothing is said of a wait
MOST_CHARACTERS = 4000  # of a prompt or an answer in a table


class Guarded:
    """A logger in a thread of its own. Calls return at once; the first failure is told and is the last.

    begin: makes the logger, in that thread.

    Raises:
        Exception: what `begin` raises, or TimeoutError if it has not ended within BEGINNING seconds.
    """

    def __init__(self, name: str, begin: Callable[[], Logger]) -> None:
        self.name = name
        self._left: queue.SimpleQueue = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._told = self._closed = False
        self._begun = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=[begin], name=f"log to {name}", daemon=True
        )
        self._thread.start()
        if not self._waited(self._begun.wait, BEGINNING, "begun"):
            self._left.put(("close", FAILED))  # should it still begin
            self._left.put(None)
            raise TimeoutError(f"the service has not answered for {BEGINNING:g} seconds")
        if self._failure is not None:
            raise self._failure

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step."""
        self._ask("log", step, dict(metrics))

    def tell(self, step: int, name: str, text: str) -> None:
        """A finding, in words."""
        self._ask("tell", step, name, text)

    def answers(self, step: int, answers: Answers) -> None:
        """Sample answers as a table."""
        self._ask("answers", step, answers)

    def close(self, status: str = FINISHED) -> None:
        """Send what is left, and say how the run ended. The second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._ask("close", status)
        self._left.put(None)
        if not self._waited(self._ended, PATIENCE.get(status, HURRY), "sent what is left"):
            self._warn("does not answer")
        self._tell_failure()

    def _waited(self, ended: Callable[[float], bool], patience: float, what: str) -> bool:
        """Wait until something has ended; returns whether it has."""
        if ended(min(SILENT, patience)):
            return True
        if patience > SILENT:
            say(f"waiting until {self.name} has {what}, at most {patience:g} seconds")
        return ended(patience - min(SILENT, patience))

    def _ended(self, patience: float) -> bool:
        self._thread.join(patience)
        return not self._thread.is_alive()

    def _ask(self, *call: Any) -> None:
        self._tell_failure()
        self._left.put(call)

    def _work(self, begin: Callable[[], Logger]) -> None:
        try:
            self.logger = begin()
        except Exception as error:
            self._failure = error
            return
        finally:
            self._begun.set()
        while (call := self._left.get()) is not None:
            # After a failure only `close` is still tried: it ends the client's own threads.
            if self._failure is not None and call[0] != "close":
                continue
            try:
                getattr(self.logger, call[0])(*call[1:])
            except Exception as error:
                self._failure = self._failure or error

    def _tell_failure(self) -> None:
        if self._failure is not None:
            kind, why = type(self._failure).__name__, durable.first_line(self._failure)
            self._warn(f"failed ({kind}: {why})")

    def _warn(self, what: str) -> None:
        if not self._told:
            self._told = True
            say(
                f"log.report_to={self.name} {what} and gets nothing more; the run goes on, and "
                "metrics.jsonl has everything",
                matters=True,
            )


def check_loggers(config: RunConfig) -> None:
    """Raises UserError if the package of a logger is missing."""
    for name in config.log.report_to:
        package = CLIENTS[name].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(
                f"log.report_to={name}: the package is not installed; pip install "
                f"{CLIENTS[name].install}, or leave it out (metrics.jsonl is always written)"
            )


def open_loggers(config: RunConfig, step: int, resumed: bool = False) -> list[Guarded]:
    """The loggers of log.report_to, on rank 0.

    step: after which the run goes on. resumed: it is an earlier run that goes on, with the same loggers.

    Raises:
        UserError: one cannot begin. Of a resumed run it is left out, and told.
    """
    if not config.log.report_to:
        return []
    file = Path(config.train.output_dir) / IDENTITIES
    known = _identities(file) if resumed else {}
    with saving(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for name in config.log.report_to:
        client = CLIENTS[name]
        try:
            opening = Opening(config, step, known.get(name), client.running())
            logger = Guarded(name, partial(client, opening))
        except Exception as error:
            problem = f"log.report_to={name}: {_why(error)}"
            if not resumed:
                for begun in found:
                    begun.close(FAILED)
                raise UserError(f"{problem}{client.advice}") from error
            say(
                f"{problem}; the run goes on without it (metrics.jsonl has everything)",
                matters=True,
            )
            continue
        known[name] = logger.logger.identity
        found.append(logger)
    _remember(file, {name: value for name, value in known.items() if value})
    return found


def _why(error: Exception) -> str:
    """The first lines of what an error says: clients with pydantic have the reason in the third."""
    told = " ".join(" ".join(str(error).strip().splitlines()[:3]).split()) or type(error).__name__
    return told if told.endswith((".", "!")) else f"{told}."


def _identities(file: Path) -> dict[str, str]:
    """Those that the file has. Without it the services begin new runs: nothing else depends on it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {name: value for name, value in found.items() if isinstance(value, str)}
    except (OSError, ValueError, AttributeError):
        return {}


def _remember(file: Path, identities: dict[str, str]) -> None:
    with saving(file):
        durable.write_file(file, json.dumps(identities, indent=1))


def answers_table(answers: Sequence[dict[str, Any]]) -> Answers:
    """The table of a step's answers: a row for each prompt, as generations.jsonl has them."""
    scored = any("scores" in each for each in answers)
    drawn = [name for name in ("greedy", "sampled") if any(name in each for each in answers)]
    columns = ["where", "prompt", *drawn, *(["score"] if scored else []), "chosen"]
    rows = []
    for each in answers:
        row = [str(each.get("where", "")), _text(each.get("prompt"))]
        row += [_text((each.get(name) or {}).get("text")) for name in drawn]
        row += [(each.get("scores") or {}).get("greedy")] if scored else []
        rows.append([*row, _text(each.get("chosen"))])
    return Answers(columns, rows)


def _text(value: Any) -> str:
    if isinstance(value, list):  # messages
        parts = (f"{each.get('role')}: {each.get('content')}" for each in value)
        value = "\n\n".join(parts)
    return "" if value is None else str(value)[:MOST_CHARACTERS]


def named(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the metrics, under the names of transformers."""
    names = {
        name: f"eval/{name.removeprefix(EVALUATION)}"
        if name.startswith(EVALUATION)
        else f"train/{name}"
        for name in metrics
    }
    numbers = {name: v for name, v in metrics.items() if isinstance(v, (int, float))}
    return {names[name]: value for name, value in numbers.items()}
