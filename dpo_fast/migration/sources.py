"""Sources of data as data.train has them: several, each with options of its own, or one."""

from __future__ import annotations

from typing import Any

from dpo_fast.migration.draft import Draft

OF_SECTION = ("format", "columns")


def short(sources: list[dict[str, Any]]) -> Any:
    """A source without options of its own as its path, and one alone without a list."""
    made = [each["path"] if set(each) == {"path"} else each for each in sources]
    return made[0] if len(made) == 1 and isinstance(made[0], str) else made


def put_sources(draft: Draft, sources: list[dict[str, Any]], *names: str) -> None:
    """data.train. The options of a single source stand in the section, where data.max_rows may stand, too.

    names: of the options that the sources follow from.
    """
    if (
        len(sources) == 1
        and set(sources[0]) <= {"path", *OF_SECTION}
        and "data.eval" not in draft.keys
    ):
        only = sources[0]
        draft.put("data.train", only["path"], *names)
        for key in OF_SECTION:
            if key in only:
                draft.put(f"data.{key}", only[key], *names)
        return
    draft.put("data.train", short(sources), *names)
