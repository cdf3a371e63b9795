"""Who takes part: contenders by name or by pattern, where * matches any text."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_fast.errors import UserError


@dataclass(frozen=True)
class Selection:
    """Those that match `only`, or everybody where it is empty; without those that match `skip`."""

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    @classmethod
    def of(cls, given, known: Sequence[str]) -> Selection:
        """From --only and --skip. Raises UserError for a pattern that matches none of the known names."""
        return cls(_matching("--only", given.only, known), _matching("--skip", given.skip, known))

    def asked(self, name: str) -> bool:
        """By its name: a pattern does not call in what takes minutes."""
        return name in self.only

    def chosen(self, name: str) -> bool:
        return (not self.only or _any(name, self.only)) and not _any(name, self.skip)

    def nobody(self) -> UserError:
        """What to raise where none of those who could be measured is chosen."""
        return UserError(
            f"--only {' '.join(self.only) or '*'} --skip {' '.join(self.skip) or 'nothing'} "
            "leave no contender: choose others"
        )


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _matching(option: str, patterns: list[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    for pattern in patterns or ():
        if not fnmatch.filter(known, pattern):
            close = difflib.get_close_matches(pattern, known, 1)
            remedy = f"did you mean {close[0]!r}?" if close else f"choose from: {'; '.join(known)}"
            raise UserError(f"{option} {pattern!r} matches no contender; {remedy}")
    return tuple(patterns or ())
