"""`dpo-fast judge`: scores of completions, and pairs made of them.

samples.jsonl           what is judged
.judging/               what is judged so far: a journal of each rank, and what it was begun with
scores.jsonl            samples.jsonl with scores and verdicts; scores.manifest.json says what made it
pairs.jsonl             rows that `train` reads; pairs.manifest.json
judge-report.json       counts of verdicts, of pairs, and whether length decides
"""

from __future__ import annotations

import collections
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.judging.config import JudgeSection
from dpo_fast.judging.pairing import group_of, pairs_of
from dpo_fast.judging.samples import SampleRow, read_rows, read_scored
from dpo_fast.judging.table import JUDGES, Materials
from dpo_fast.judging.tally import Tally
from dpo_fast.judging.verdict import FAILED, REFUSED, SCORED, WORDS, Judged
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.journal import Journal
from dpo_fast.rounds.made import Made, MakeAnew, manifest_of, publish_rows, read_manifest
from dpo_fast.training import distributed, signals
from dpo_fast.training.config import build
from dpo_fast.training.console import progress_bar, say
from dpo_fast.training.lock import sole_run
from dpo_fast.training.manifest import hash_file

SAMPLES, SCORES, PAIRS, REPORT = "samples.jsonl", "scores.jsonl", "pairs.jsonl", "judge-report.json"
JOURNAL, BEGUN = ".judging", "begun"
KEPT = "what was judged is kept: the same command goes on after it"
ROOM = "What was judged is kept: make room, and run the same command"


def judge(config: RoundsConfig) -> dict[str, Any]:
    """Judge the samples of a folder, and make pairs. What is complete is used as it is. Collective.

    Returns:
        What judge-report.json has.

    Raises:
        UserError: the samples, the judge or the options do not do; what is there was made with others;
            nothing can be told apart by the scores.
        Interrupted: a signal came.
    """
    section = judge_section(config)
    with signals.stop_at_once(KEPT):
        if distributed.world_size() > 1:
            distributed.init_distributed()
        with sole_run(config.output_dir, "output_dir"):
            return _Judging(config, section).run()


def judge_section(config: RoundsConfig) -> JudgeSection:
    """The section `judge`. Raises UserError where it is missing."""
    if config.judge is None:
        raise UserError(
            f"there is no section judge; add one, such as judge: {{type: rule, function: rules.py:score}}. "
            f"Types: {', '.join(JUDGES)}"
        )
    return config.judge


def judge_identity(config: RoundsConfig) -> dict[str, Any]:
    """What decides the scores: two judges with the same give the same. Raises UserError."""
    return _Judging(config, judge_section(config)).identity()


class NoPairs(UserError):
    """Nothing can be learned from the scores."""


class _Judging:
    """The files of one folder, and what is to be done about them."""

    def __init__(self, config: RoundsConfig, section: JudgeSection) -> None:
        self.config, self.section = config, section
        self.folder = Path(config.output_dir)
        self.samples = _samples(self.folder, section)
        self.scores, self.pairs = self.folder / SCORES, self.folder / PAIRS
        self.journal = self.folder / JOURNAL
        self.spec = JUDGES[section.type]
        self.materials = Materials(
            section=section,
            model=config.model,
            data=partial(data_config, config),
            folder=self.folder,
            rank=distributed.rank(),
            device=distributed.device,
            identity=partial(_identity, config),
        )

    def run(self) -> dict[str, Any]:
        made = distributed.from_main(self.made_with)
        if not distributed.from_main(lambda: self.complete(made)):
            self.judge(made)
            distributed.barrier()
            distributed.main_waits("scores", lambda: self.publish(made))
        return distributed.from_main(self.pair)

    def made_with(self) -> dict[str, Any]:
        """What the scores are made with. Raises UserError if it cannot be told."""
        if self.samples.is_dir():
            raise UserError(f"judge.samples={self.samples} is a folder: name the file in it")
        if not self.samples.is_file():
            raise UserError(
                f"{self.samples} is not there: run dpo-fast sample first, or name a file with judge.samples"
            )
        return {"samples": hash_file(self.samples).sha256, "judge": self.identity()}

    def identity(self) -> dict[str, Any]:
        """What decides the scores of a completion."""
        judge = {"type": self.section.type, **self.spec.identity(self.materials)}
        return json.loads(json.dumps(judge))

    def complete(self, made: Made) -> bool:
        """Whether the scores are there. If not, the journal is one of the same judge and samples.

        Raises:
            UserError: what is there is of others.
        """
        if self.scores.is_file():
            anew = MakeAnew(self.scores, [self.scores, self.pairs], "judge anew")
            anew.check(read_manifest(self.scores, anew)["made_with"], made)
            say(f"{self.scores} is complete")
            return True
        anew = MakeAnew(self.journal, [self.journal], "begin anew")
        if not all(map(_failed, self.judged().values())):  # a judge that only failed may be mended
            anew.check(read_manifest(self.journal / BEGUN, anew)["made_with"], made)
            return False
        with durable.writing(self.journal, ROOM):
            shutil.rmtree(self.journal, ignore_errors=True)
            self.journal.mkdir(parents=True)
            durable.write_file(manifest_of(self.journal / BEGUN), json.dumps({"made_with": made}))
        return False

    def judge(self, made: Made) -> None:
        """This rank's share of the rows that are not in the journal."""
        done = distributed.from_main(
            lambda: {n for n, e in self.judged().items() if not _failed(e)}
        )
        count = self.count()
        with closing(self.spec.open(self.materials)) as judge:
            chunks = list(self.left(count, judge.together, done))
            if done:
                say(f"{len(done):,} prompts are judged already")
            journal = Journal(self.journal, "rows", distributed.rank(), ROOM)
            with closing(journal), progress_bar("judging", len(chunks)) as advance:
                for chunk, found in zip(chunks, judge(self.rows(chunks)), strict=True):
                    for place, judged in zip(chunk, found, strict=True):
                        journal.append(place, _entry(judged))
                    advance()

    def count(self) -> int:
        """How many rows there are. A bad one is told before a model is loaded."""
        count = sum(1 for _ in read_rows(self.samples))
        if not count:
            raise UserError(f"{self.samples} has no rows: sample again, with prompts")
        return count

    def left(self, count: int, together: int, done: set[int]) -> Iterator[range]:
        """This rank's chunks that are not done. They depend on the rows alone, not on the ranks."""
        for number, first in enumerate(range(0, count, together)):
            chunk = range(first, min(first + together, count))
            if number % distributed.world_size() == distributed.rank() and not done.issuperset(
                chunk
            ):
                yield chunk

    def rows(self, chunks: list[range]) -> Iterator[list[SampleRow]]:
        """The rows of chunks, which are in order."""
        rows, place = read_rows(self.samples), 0
        for chunk in chunks:
            for _ in islice(rows, chunk.start - place):
                pass
            place = chunk.stop
            yield list(islice(rows, len(chunk)))

    def judged(self) -> dict[int, dict[str, Any]]:
        """What the journals of all ranks hold, by the row's place. A failure gives way to a score."""
        entries: dict[int, dict[str, Any]] = {}
        for place, entry in Journal(self.journal, "rows", distributed.rank()).read():
            if place not in entries or not _failed(entry):
                entries[place] = entry
        return entries

    def publish(self, made: Made) -> None:
        """Write the scores, of all rows or not at all."""
        entries, facts = self.judged(), Counter()

        def rows() -> Iterator[dict[str, Any]]:
            for row in read_rows(self.samples):
                entry = entries[row.place]
                facts.update(entry["facts"])
                content = {**row.content, "completions": row.completions, "scores": entry["scores"]}
                yield content | {"verdicts": entry["words"], "reasons": entry["reasons"]}

        publish_rows(self.scores, rows(), lambda: {"made_with": made, "facts": dict(facts)}, ROOM)
        shutil.rmtree(self.journal, ignore_errors=True)

    def pair(self) -> dict[str, Any]:
        """Make the pairs, and the report. Raises NoPairs if there are none."""
        options = self.config.pairs.model_dump()
        made = {"scores": hash_file(self.scores).sha256, "pairs": options}
        anew = MakeAnew(self.pairs, [self.pairs], "make the pairs anew; scores stay")
        tally = Tally()
        facts = read_manifest(self.scores, anew).get("facts", {})

        def report() -> dict[str, Any]:
            return tally.report() | ({"comparisons": facts} if facts else {})

        def write_report() -> dict[str, Any]:
            with durable.writing(self.folder / REPORT, ROOM):
                text = json.dumps(report(), indent=1, ensure_ascii=False) + "\n"
                durable.write_file(self.folder / REPORT, text)
            self.check(tally, facts)
            return {"made_with": made}

        if self.pairs.is_file():
            anew.check(read_manifest(self.pairs, anew)["made_with"], made)
            say(f"{self.pairs} is complete")
            collections.deque(self.pair_rows(tally), maxlen=0)
            if not (self.folder / REPORT).is_file():
                write_report()
            return report()
        publish_rows(self.pairs, self.pair_rows(tally), write_report, ROOM)
        return report()

    def pair_rows(self, tally: Tally) -> Iterator[dict[str, Any]]:
        for row, scores in read_scored(self.scores):
            words = [REFUSED if each is None else SCORED for each in scores]
            words, reasons = (row.content.get(n, words) for n in ("verdicts", "reasons"))
            tally.row(row, scores, words, reasons)
            if self.config.pairs.strategy == "groups":
                if group := group_of(row, scores, self.config.pairs, tally.refused):
                    tally.groups += 1
                    yield group
                continue
            pairs = pairs_of(row, scores, self.config.pairs, tally.refused)
            tally.pairs_of_row(pairs)
            for pair in pairs:
                yield pair.row(row, self.config.pairs)

    def check(self, tally: Tally, facts: dict[str, int]) -> None:
        """Raises UserError where there are no pairs; NoPairs if nothing could be told apart."""
        if tally.pairs or tally.groups:
            return
        said = tally.verdicts[SCORED]
        judge, completions = f"judge.type={self.section.type}", sum(tally.verdicts.values())
        others = {word: tally.verdicts[word] for word in WORDS if word != SCORED}
        told = ", ".join(f"{count:,} {word}" for word, count in others.items() if count)
        if completions == tally.rows:
            raise UserError(
                f"no pair can be made: each of {tally.rows:,} prompts in {self.samples} has one "
                "completion. Sample more of each, with sample.num_generations=4"
            )
        if not said:
            reason = next((each[0] for each in tally.reasons.values() if each), "")
            raise UserError(
                f"{judge} scored none of {completions:,} completions ({told}); the first: {reason}. Look "
                f"at the judge; {self._anew()}"
            )
        if tally.only_value is not None and said > 1:
            told = f" ({told})" if told else ""
            by_place = facts.get("contradicted in the other order", 0)
            if by_place:
                told = (
                    f", for in {by_place:,} comparisons it went by the place of the answers{told}"
                )
            raise NoPairs(
                f"{judge} always answers the same: every one of {said:,} completions got "
                f"{tally.only_value:g}{told}, so no pair can be made. Look at the judge with other rows, "
                f"or sample at a higher temperature; {self._anew()}"
            )
        reasons = ", ".join(f"{name}: {count:,}" for name, count in tally.refused.items() if count)
        raise NoPairs(
            f"no pair can be made of {self.scores} ({tally.rows:,} prompts; {reasons}). Change the section "
            f"pairs, or the judge; {self._anew()}"
        )

    def _anew(self) -> str:
        return f"remove {self.scores} to judge anew"


def _failed(entry: dict[str, Any]) -> bool:
    """Whether a row is judged again when the command goes on."""
    return FAILED in entry["words"]


def _samples(folder: Path, section: JudgeSection) -> Path:
    """The file that is judged."""
    if section.samples is not None:
        return Path(section.samples).expanduser()
    own = [folder / SAMPLES, (folder / SAMPLES).with_suffix(".parquet")]
    return next((file for file in own if file.is_file()), own[0])


def _entry(judged: Judged) -> dict[str, Any]:
    """A row's verdicts as the journal has them."""
    return {
        "scores": [each.score for each in judged.verdicts],
        "words": [each.word for each in judged.verdicts],
        "reasons": [each.why for each in judged.verdicts],
        "facts": dict(judged.facts),
    }


def _identity(config: RoundsConfig, path: str, option: str) -> str:
    """The hash of a model's weights. Raises UserError, which names the option."""
    from dpo_fast.models.checkpoint import check_model_path
    from dpo_fast.training.weights import identity_of_weights

    check_model_path(path, option)
    try:
        return identity_of_weights(data_config(config), path)
    except (OSError, KeyError) as error:
        reason = durable.first_line(error)
        raise UserError(f"{option}={path}: the model cannot be loaded: {reason}") from error


def data_config(config: RoundsConfig):
    """The section `data` with the defaults of a run. Raises UserError."""
    from dpo_fast.data.config import DataConfig

    return build(DataConfig, {"train": SAMPLES, **config.data}, "data")
