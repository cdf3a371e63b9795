"""Held-out prompts answered in the middle of a run, judged, and kept in generations.jsonl.

A line of the file is what the model answered after a step. The first is that of the start, which later ones
are compared with.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_fast.data.images.marks import named
from dpo_fast.durable import write_file
from dpo_fast.errors import UserError
from dpo_fast.generation.batches import batches_of
from dpo_fast.generation.encode import PromptCodec, encode_all
from dpo_fast.generation.engine import LENGTH, STOP, Completion, Request
from dpo_fast.generation.sample_rows import sample_row
from dpo_fast.generation.with_transformers import TransformersEngine, positions_of
from dpo_fast.judging.samples import SampleRow
from dpo_fast.judging.table import JUDGES, Materials
from dpo_fast.judging.verdict import FAILED, UNPARSABLE
from dpo_fast.models import end_of_turn_ids
from dpo_fast.models.layer_kinds import carried_state
from dpo_fast.training import distributed, signals
from dpo_fast.training.answer_metrics import distinct, mean, win_rate
from dpo_fast.training.checkpoints import saving
from dpo_fast.training.console import say, track
from dpo_fast.training.earlier_run import GENERATIONS
from dpo_fast.training.generating import generating
from dpo_fast.training.held_out_prompts import HeldOut, choose_prompts
from dpo_fast.training.prepare import Run
from dpo_fast.training.run_log import RunLog, step_of_line
from dpo_fast.training.selection import EVALUATION, OF_ANSWERS
from dpo_fast.training.weights import identity_on_this_rank

PREFIX = EVALUATION + OF_ANSWERS
COMPARED = ("start", "first", "chosen")  # what the greedy answers are compared with
Answers = dict[str, Any]  # of one prompt: what a line of the file has for it


class Answering:
    """What a run needs to answer held-out prompts. Every rank has one, and calls it at the same time."""

    def __init__(self, run: Run) -> None:
        self.run, self.section = run, run.config.generate
        self.file = Path(run.config.train.output_dir) / GENERATIONS

    def due(self, step: int, last: bool) -> bool:
        """Whether answers are due after a step and are not there. Collective."""
        steps = self.section.steps
        if not (last or step == 0 or (steps is not None and step % steps == 0)):
            return False
        return distributed.from_main(lambda: step not in {line["step"] for line in self._lines()})

    def begin(self, step: int) -> None:
        """Before the first answers of a run that goes on after `step`. Collective.

        Raises:
            UserError: the answers that are there are of other prompts or options.
        """
        distributed.from_main(lambda: self._begin(step))

    def _begin(self, step: int) -> None:
        kept = [line for line in self._lines() if line["step"] <= step] if step else []
        if any(line["asked"] != self.asked for line in kept):
            raise UserError(
                f"{self.file} has answers to other prompts, or with other options of generate: leave the "
                "section as it was, or remove the file to begin it anew from here"
            )
        if self.file.is_file():
            with saving(self.file):
                write_file(self.file, "".join(f"{json.dumps(line)}\n" for line in kept))

    def _lines(self) -> list[dict[str, Any]]:
        """What the file has, but for a line that a crash has torn."""
        if not self.file.is_file():
            return []
        lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
        return [json.loads(line) for line in lines if step_of_line(line) is not None]

    @cached_property
    def held_out(self) -> list[HeldOut]:
        """The prompts. Collective."""
        section, config = self.section, self.run.config
        examples = self.run.eval.examples
        found = distributed.from_main(
            lambda: choose_prompts(config, examples, section.max_prompts, section.seed)
        )
        codec, most = self.codec, config.data.max_length
        limits, positions = f"data.max_length={most}", positions_of(self.run.model.causal_lm)
        if positions is not None and positions < most:
            most, limits = positions, f"the model's {positions} positions"
        limits = f"{limits} and generate.max_new_tokens={section.max_new_tokens}"
        prompts = [each.prompt for each in found]
        encoded = encode_all(codec, prompts, most - section.max_new_tokens, limits, False, True)
        if encoded.dropped:
            where, reason = encoded.dropped[0]
            say(f"{len(encoded.dropped)} held-out prompts are not answered; {where}: {reason}")
        self.requests = [
            Request(prompts[place], ids, codec.stop_ids(prompts[place]))
            for place, ids in zip(encoded.places, encoded.ids)
        ]
        return [found[place] for place in encoded.places]

    @cached_property
    def codec(self) -> PromptCodec:
        config = self.run.config
        return PromptCodec(self.run.tokenizer, config.data, end_of_turn_ids(config.model))

    @cached_property
    def asked(self) -> str:
        """What decides the answers beside the weights."""
        options = self.section.model_dump(mode="json", exclude={"steps", "judge", "first_answers"})
        prompts = [str(self.run.config.data.eval), self.run.config.data.eval_rows]
        return hashlib.sha256(json.dumps([options, prompts]).encode()).hexdigest()

    def __call__(self, step: int, log: RunLog, asked: Callable[[], bool] | None = None) -> None:
        """Answer after `step` steps, judge, and log. Collective.

        asked: whether a signal has come to any rank. Raises StopAsked between two batches then, and
            nothing is kept.
        """
        answers = self._answers(asked)
        metrics = distributed.main_waits("answers", lambda: self._judged(step, answers))
        metrics = {f"{PREFIX}{name}": value for name, value in metrics.items()}
        log.generated(step, self.run.best.note(step, metrics, answers=True), answers)

    def _answers(self, asked: Callable[[], bool] | None) -> list[Answers]:
        """Every kind of answer to every prompt, on every rank."""
        held_out = self.held_out
        answers: list[Answers] = [
            {"where": each.prompt.where, "prompt": named(each.prompt.prompt), "chosen": each.chosen}
            for each in held_out
        ]
        alike = bool(carried_state(self.run.model.causal_lm))
        lengths = [len(each.ids) for each in self.requests]
        world, rank = distributed.world_size(), distributed.rank()
        with generating(self.run) as policy:
            for name, section in self.section.draws.items():
                engine = TransformersEngine(policy, self.codec, section)
                batches = batches_of(lengths, 1, self.section.batch_size, section.seed, alike)
                # Every rank asks for signals as often as the others.
                rounds = range(0, len(batches), world)
                turns = track(signals.until(asked, rounds), f"answering ({name})", len(rounds))
                mine = (batches[first + rank] for first in turns if first + rank < len(batches))
                found = [
                    (place, _as_json(answer))
                    for batch, completions in engine.complete(mine, self.requests)
                    for (place, _), answer in zip(batch.members, completions)
                ]
                for each in distributed.gathered(found):
                    for place, answer in each:
                        answers[place][name] = answer
        return answers

    def _judged(self, step: int, answers: list[Answers]) -> dict[str, Any]:
        """Judge the answers of a step and write its line; returns the metrics. On rank 0."""
        lines = self._lines()
        scores = self._scores_or_none(step, answers, lines[0]["answers"] if lines else None)
        metrics: dict[str, float | None] = {}
        for name in self.section.draws:
            prefix = "" if name == "greedy" else f"{name}_"
            facts = _facts([each[name] for each in answers])
            facts |= {"score": mean(scores[name])} if scores else {}
            metrics |= {f"{prefix}{key}": value for key, value in facts.items()}
        for name in COMPARED if scores else ():
            if name in scores and (found := win_rate(scores["greedy"], scores[name])):
                metrics |= {
                    f"win_rate_{name}": found.rate,
                    f"win_rate_{name}_low": found.low,
                    f"win_rate_{name}_high": found.high,
                }
        if self.section.judge is not None:
            told = scores["greedy"] if scores else [None] * len(answers)
            metrics["unjudged"] = sum(value is None for value in told)
        for place, each in enumerate(answers if scores else ()):
            each["scores"] = {name: values[place] for name, values in scores.items()}
        metrics = {name: value for name, value in metrics.items() if value is not None}
        line = {"step": step, "asked": self.asked, "metrics": metrics, "answers": answers}
        with saving(self.file), self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        return metrics

    def _scores_or_none(
        self, step: int, answers: list[Answers], start: list[Answers] | None
    ) -> dict[str, list[float | None]]:
        """As `_scores`. A judge that fails once the run has begun does not end it: it gives no scores."""
        try:
            return self._scores(answers, start)
        except UserError as error:
            text = re.sub(r"(?<![\w.])judge\.(?=[a-z_]+=)", "generate.judge.", str(error))
            if step == 0:
                raise UserError(text if "generate." in text else f"generate: {text}") from None
            say(f"the answers of step {step} are not judged: {text}", matters=True)
            return {}

    def _scores(
        self, answers: list[Answers], start: list[Answers] | None
    ) -> dict[str, list[float | None]]:
        """What the judge gives each kind of answer, those of the start and the chosen ones; {} without one.

        All answers to a prompt are judged together, as a judge may compare them.
        """
        if self.section.judge is None:
            return {}
        before = {each["where"]: each["greedy"]["text"] for each in start or ()}
        first = self._first
        columns, rows = [], []
        for place, (each, held_out) in enumerate(zip(answers, self.held_out, strict=True)):
            texts = {name: each[name]["text"] for name in self.section.draws}
            texts |= {"start": before.get(each["where"]), "chosen": each["chosen"]}
            texts["first"] = first.get((each["where"], json.dumps(each["prompt"])))
            texts = {name: text for name, text in texts.items() if text is not None}
            columns.append(list(texts))
            rows.append(_row(place, held_out, list(texts.values())))
        scores: dict[str, list[float | None]] = {}
        found = [judged.verdicts for judged in self._verdicts(rows)]
        told = [verdict for verdicts in found for verdict in verdicts]
        if told and all(verdict.word in (FAILED, UNPARSABLE) for verdict in told):
            raise UserError(
                f"judge.type={self.section.judge.type} gave none of {len(told)} answers a score, at last "
                f"for {rows[-1].where}: {told[-1].why}"
            )
        for place, (names, verdicts) in enumerate(zip(columns, found, strict=True)):
            for name, verdict in zip(names, verdicts, strict=True):
                scores.setdefault(name, [None] * len(rows))[place] = verdict.score
        return scores

    @cached_property
    def _first(self) -> dict[tuple[str, str], str]:
        """The first answers of `generate.first_answers`, by the place and the text of their prompts.

        Raises UserError: the file is not there, or is another.
        """
        file = self.section.first_answers
        if file is None:
            return {}
        try:
            with Path(file).expanduser().open(encoding="utf-8") as stream:
                answers = json.loads(stream.readline())["answers"]
            return {
                (each["where"], json.dumps(each["prompt"])): each["greedy"]["text"]
                for each in answers
            }
        except OSError as error:
            why = error.strerror
        except (ValueError, KeyError, TypeError):
            why = "its first line has no answers"
        raise UserError(
            f"generate.first_answers={file} cannot be read ({why}); name the {GENERATIONS} of a run, or "
            "remove it"
        )

    def _verdicts(self, rows: list[SampleRow]) -> Iterable[Any]:
        config, section = self.run.config, self.section.judge
        materials = Materials(
            section=section,
            model=config.model,
            data=lambda: config.data,
            folder=self.file.parent,
            rank=0,
            device=lambda: self.run.engine.device,
            identity=lambda path: identity_on_this_rank(config, path),
        )
        with closing(JUDGES[section.type].open(materials)) as judge:
            size = judge.together
            chunks = [rows[first : first + size] for first in range(0, len(rows), size)]
            return [each for judged in judge(chunks) for each in judged]


def _as_json(answer) -> dict[str, Any]:
    """An answer as the file has it."""
    tokens = None if answer.ids is None else len(answer.ids)
    return {"text": answer.text, "finish_reason": answer.finish_reason, "tokens": tokens}


def _facts(told: list[dict[str, Any]]) -> dict[str, float | None]:
    texts = [each["text"] for each in told]
    return {
        "tokens": mean(each["tokens"] for each in told),
        "finished": mean(float(each["finish_reason"] != LENGTH) for each in told),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
    }


def _row(place: int, held_out: HeldOut, texts: list[str]) -> SampleRow:
    """A row as judges take it, with the columns that `dpo-fast sample` would write."""
    completions = [Completion(text, STOP) for text in texts]
    content = sample_row(held_out.prompt, completions, None)
    content.pop("finish_reasons")
    return SampleRow(place, held_out.prompt.where, content["prompt"], texts, [], content)


def begin_answering(run: Run, step: int, log: RunLog) -> Answering | None:
    """Answer before the first step, or what an interruption left out after `step`. Collective.

    Returns what answers later; None for a run that answers no prompts.
    """
    if not run.config.generate.max_prompts:
        return None
    answering = Answering(run)
    answering.begin(step)
    if answering.due(step, last=step == run.total_steps):
        answering(step, log)
        if step:  # an interruption came between the checkpoint and the answers
            run.best.keep(step)
            run.best.write()
    return answering


def answered(
    answering: Answering | None, step: int, last: bool, log: RunLog, asked: Callable[[], bool]
) -> bool:
    """Answer after `step` steps if it is due. False, and nothing kept, if a signal came. Collective."""
    if answering is None or not answering.due(step, last):
        return True
    try:
        answering(step, log, asked)
    except signals.StopAsked:
        return False
    return True
