"""Files of rows that are whole or absent, each with a manifest of what it was made with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.wording import quoted

Made = dict[str, Any]  # options by name, and hashes of what was read


@dataclass(frozen=True)
class MakeAnew:
    """What is there, and how it is made anew.

    remove: the files that have to go for it; those that are there are named.
    """

    file: Path
    remove: list[Path]
    aim: str

    @property
    def remedy(self) -> str:
        names = [str(each) for each in self.remove if each.exists()]
        return f"remove {' and '.join(names)} to {self.aim}"

    def check(self, before: Made, now: Made) -> None:
        """Raises UserError if the file was made with something else."""
        told = [
            f"{name} was {quoted(old)} and is {quoted(new)}"
            for name, old, new in _differences(before, now)
        ]
        if told:
            raise UserError(
                f"{self.file} was made with something else: {'; '.join(told[:6])}. Set it back, name "
                f"another output_dir, or {self.remedy}"
            )


def _differences(before: Made, now: Made, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys((*before, *now)):
        old, new, place = before.get(name), now.get(name), f"{prefix}{name}"
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{place}.")
        elif old != new:
            yield place, old, new


def manifest_of(file: Path) -> Path:
    """Where the manifest of a file of rows stands: scores.manifest.json for scores.jsonl."""
    return file.with_name(f"{file.stem}.manifest.json")


def read_manifest(file: Path, anew: MakeAnew) -> dict[str, Any]:
    """The manifest of a file that is there. Raises UserError if it cannot be read."""
    place = manifest_of(file)
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("made_with"), dict):
            raise ValueError("it is no manifest")
        return content
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{place} cannot be read ({reason}), so nobody can tell what {file} was made with: "
            f"{anew.remedy}"
        ) from None


def publish_rows(
    file: Path, rows: Iterable[dict[str, Any]], manifest: Callable[[], dict[str, Any]], remedy: str
) -> None:
    """Write rows as JSON Lines, and the manifest that `manifest` gives once they are written.

    The manifest comes first: a file under its name has one. remedy: where it cannot be written.
    """
    partial = durable.aside(file)
    try:
        with durable.writing(file, remedy):
            file.parent.mkdir(parents=True, exist_ok=True)
            # Half a surrogate pair, in a column that nobody reads, is written as JSON escapes it.
            with partial.open("w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        content = manifest()
        with durable.writing(file, remedy):
            durable.flush(partial)
            durable.write_file(manifest_of(file), json.dumps(content, indent=1, ensure_ascii=False))
            partial.replace(file)
            durable.flush(file.parent)
    finally:
        partial.unlink(missing_ok=True)
