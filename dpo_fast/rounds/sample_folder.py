"""The files of samples: complete or absent, and what they were made with."""

from __future__ import annotations

import base64
import datetime
import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dpo_fast import durable
from dpo_fast.data.config import DataConfig
from dpo_fast.errors import UserError
from dpo_fast.generation.config import SampleSection
from dpo_fast.generation.encode import Encoded, Tokens
from dpo_fast.generation.engine import LENGTH, Completion
from dpo_fast.generation.prompts import Prompts
from dpo_fast.generation.sample_rows import FORMATS, sample_row, write_rows
from dpo_fast.references.sequences import sequence_digest, write_sequences
from dpo_fast.rounds.journal import Journal
from dpo_fast.rounds.made import MakeAnew
from dpo_fast.training import distributed

FORMAT = 1
MANIFEST, LOGPS = "samples.manifest.json", "samples.logps.parquet"
KEPT = "What is done is kept: make room, and the same command goes on after it"
TOLD = ("created", "versions", "counts")  # what a manifest tells beside the options
# Options that change no completion.
APART = {"prompts": True, "output": True, "long_prompts": True, "logps": True}
APART_OF_ENGINE = {
    *("concurrency", "timeout_seconds", "max_retries", "api_key_env", "url", "model", "batch_size")
}
APART_OF_DATA = {
    "train",
    "eval",
    "workers",
    "cache_dir",
    "chat_template",
    "on_bad_row",
    "max_row_bytes",
}


def manifest_of(
    section: SampleSection, data: DataConfig, facts: dict[str, Any], prompts: str
) -> dict[str, Any]:
    """What completions follow from, flat, by the option's name. prompts: their digest."""
    sampled = section.model_dump(mode="json", exclude=APART | {"engine": APART_OF_ENGINE})
    engine = sampled.pop("engine") | {"batch_size": section.engine.sequences}
    return {
        "format": FORMAT,
        **facts,
        "prompts": prompts,
        **{f"sample.{name}": value for name, value in sampled.items()},
        **{f"sample.engine.{name}": value for name, value in engine.items()},
        **{f"data.{n}": v for n, v in data.model_dump(mode="json", exclude=APART_OF_DATA).items()},
        "logps": section.scores,
        "output": section.output,
    }


@dataclass(frozen=True)
class Written:
    """A completion as the journal has it.

    place: of its prompt. number: of the completion. completion: None where a server had no room.
    tokens: as `train` would score it; None where it could not, or nothing is scored.
    same: whether these are the ids that were written; None where that is not known.
    """

    place: int
    number: int
    completion: Completion | None
    reason: str = ""
    tokens: Tokens | None = None
    same: bool | None = None

    @property
    def digest(self) -> bytes | None:
        if self.tokens is None:
            return None
        return sequence_digest(self.tokens.prompt_ids, self.tokens.answer_ids, self.tokens.scored)

    def line(self) -> list[Any]:
        found, tokens = self.completion, None
        if self.tokens is not None:
            ids = (self.tokens.prompt_ids, self.tokens.answer_ids)
            tokens = [*(_packed(each, "<i4") for each in ids), self.tokens.scored]
        text = [None, self.reason] if found is None else [found.text, found.finish_reason]
        return [self.place, self.number, *text, tokens, self.same]

    @classmethod
    def of(cls, line: list[Any]) -> Written:
        place, number, text, reason, tokens, same = line
        completion = None if text is None else Completion(text, reason)
        if tokens is not None:
            ids = (_unpacked(each, "<i4").tolist() for each in tokens[:2])
            tokens = Tokens(*ids, tokens[2])
        return cls(place, number, completion, reason, tokens, same)


class SampleFolder:
    """The files of one sampling.

    root: folder that they lie in. output: a name of `FORMATS`. manifest: what they are made with.
    """

    def __init__(self, root: Path, output: str, manifest: dict[str, Any]) -> None:
        self.root, self.manifest = root, manifest
        self.rows_file = root / FORMATS[output]
        self.partial = durable.aside(root / "samples")

    def is_complete(self) -> bool:
        """Whether the samples are there. Raises UserError if others are."""
        there = [self.root / name for name in FORMATS.values() if (self.root / name).exists()]
        if not there:
            return False
        if not (self.root / MANIFEST).is_file():
            raise UserError(
                f"{there[0]} is there, and no {MANIFEST} that says what it was sampled with: move it, or "
                "name another output_dir"
            )
        self._check(
            self.root / MANIFEST, there[0], [*there, self.root / LOGPS, self.root / MANIFEST]
        )
        shutil.rmtree(self.partial, ignore_errors=True)  # a kill may have left it
        return True

    def journal(self, name: str) -> Journal:
        """Of a kind of work; this rank's lines are appended."""
        return Journal(self.partial, name, distributed.rank(), KEPT)

    def begin(self) -> None:
        """Make the folder of pieces, or go on with it. Raises UserError if it was begun otherwise."""
        with self.writing():
            self.partial.mkdir(parents=True, exist_ok=True)
            if any(self.journal(name).numbers() for name in ("completions", "logps")):
                self._check(self.partial / MANIFEST, self.partial, [self.partial])
            else:
                durable.write_file(self.partial / MANIFEST, json.dumps(self.manifest, indent=2))

    def _check(self, file: Path, what: Path, remove: list[Path]) -> None:
        """Raises UserError if what is there was made with other options than those of a manifest."""
        anew = MakeAnew(what, remove, "sample anew")
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            stored = {name: stored[name] for name in stored if name not in TOLD}
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file} cannot be read ({error}); {anew.remedy}") from None
        anew.check(stored, self.manifest)

    def completions(self) -> Iterator[Written]:
        """All that are written, in the order of their prompts; each once."""
        found = {}
        for _, lines in self.journal("completions").read():
            for line in lines:
                found[line[0], line[1]] = line
        for key in sorted(found):
            yield Written.of(found[key])

    def logps(self) -> dict[bytes, np.ndarray]:
        """Log-probs of all sequences that are scored, by digest."""
        found = {}
        for _, pairs in self.journal("logps").read():
            found |= {bytes.fromhex(digest): _unpacked(text, "<f4") for digest, text in pairs}
        return found

    def finish(self, prompts: Prompts, encoded: Encoded) -> str:
        """Write the files, the rows last, and remove the pieces. Returns what to say of them."""
        logps = self.logps() if self.manifest["logps"] else None
        groups: dict[int, list[Written]] = {}
        for written in self.completions():
            groups.setdefault(written.place, []).append(written)
        self._check_whole(groups, encoded, logps)
        whole = {p: g for p, g in groups.items() if all(each.completion for each in g)}
        refused = [
            (prompts.items[p].where, g[0].reason) for p, g in groups.items() if p not in whole
        ]
        if not whole:
            where, reason = refused[0]
            raise UserError(f"none of the prompts has a completion; the first: {where}: {reason}")
        rows = [_row(prompts.items[place], group, logps) for place, group in whole.items()]
        counts = _counts([each for group in whole.values() for each in group])
        counts |= {"prompts_left_out": [*encoded.dropped, *refused][:50]}
        counts |= {"prompts_left_out_count": len(encoded.dropped) + len(refused)}
        self._publish(rows, logps, counts)
        return _summary(self.rows_file, counts, len(rows), self.manifest["sample.max_new_tokens"])

    def _check_whole(
        self, groups: dict[int, list[Written]], encoded: Encoded, logps: dict[bytes, Any] | None
    ) -> None:
        """Raises UserError unless every completion and every log-prob is there."""
        count = self.manifest["sample.num_generations"]
        lack = [place for place in encoded.places if len(groups.get(place, ())) != count]
        if logps is not None:
            digests = {each.digest for group in groups.values() for each in group} - {None}
            lack += digests - logps.keys()
        if lack:
            raise UserError(
                f"{self.partial}: {len(lack)} pieces are missing, though all ranks are done. Ranks on "
                "other machines write to folders of their own, or files were removed: output_dir must be "
                "on a file system that all ranks share. The same command makes what is missing"
            )

    def _publish(self, rows: list, logps: dict | None, counts: dict[str, Any]) -> None:
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        told = {"created": created, "versions": {n: version(n) for n in ("torch", "transformers")}}
        with self.writing():
            if logps is not None:
                model, dtype = self.manifest["model"], self.manifest["dtype"]
                write_sequences(self.root / LOGPS, model, dtype, logps)
            content = json.dumps(self.manifest | told | {"counts": counts}, indent=2)
            durable.write_file(self.root / MANIFEST, content)
            write_rows(self.rows_file, rows)
        with suppress(OSError):
            shutil.rmtree(self.partial)

    def writing(self) -> AbstractContextManager[None]:
        return durable.writing(self.rows_file, KEPT)


def _row(
    prompt: Any, group: list[Written], logps: dict[bytes, np.ndarray] | None
) -> dict[str, Any]:
    sums = None
    if logps is not None:
        digests = [each.digest for each in group]
        sums = [None if d is None else float(np.sum(logps[d], dtype=np.float64)) for d in digests]
    return sample_row(prompt, [each.completion for each in group], sums)


def _counts(written: list[Written]) -> dict[str, Any]:
    """Numbers of completions by what may matter of them."""
    reasons = [each.completion.finish_reason for each in written]
    return {
        "completions": len(written),
        "finish_reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "empty": sum(not each.completion.text.strip() for each in written),
        "other_ids_in_training": sum(each.same is False for each in written),
    }


def _summary(file: Path, counts: dict[str, Any], rows: int, most: int) -> str:
    reasons = ", ".join(f"{count} {name}" for name, count in counts["finish_reasons"].items())
    text = f"{file}: {counts['completions']} completions of {rows} prompts ({reasons})"
    text += f", {counts['empty']} of them empty" if counts["empty"] else ""
    if 2 * counts["finish_reasons"].get(LENGTH, 0) > counts["completions"]:
        text += f". Most were cut off by sample.max_new_tokens={most}; raise it if they shall end"
    return text


def _packed(values: Any, dtype: str) -> str:
    return base64.b64encode(np.asarray(values, dtype=dtype).tobytes()).decode()


def _unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def pack_logps(values: np.ndarray) -> str:
    """fp32 values as the journal has them."""
    return _packed(values, "<f4")
