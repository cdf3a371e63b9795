"""The files of other trainers, and those that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.training.config_file import read_tree
from dpo_fast.wording import quoted

MOST_BYTES = 8 << 20  # of a file; LLaMA-Factory's dataset_info.json grows with its data sets


def read_text(path: Path) -> str:
    """The text of a file. Raises UserError."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(data) > MOST_BYTES:
        raise UserError(f"{path}: more than {MOST_BYTES >> 20} MiB is no configuration")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML or JSON file holds. Raises UserError with the line of a fault."""
    if path.suffix.lower() == ".json":
        try:
            found = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {error.lineno} is not JSON: {error.msg}") from None
        except RecursionError:
            raise UserError(f"{path}: too deeply nested") from None
    else:
        found = read_tree(str(path), sections=("names of options, each with a value",))
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a mapping of options, got {type(found).__name__}")
    wrong = next((key for key in found if not isinstance(key, str)), None)
    if wrong is not None:
        raise UserError(f"{path}: {quoted(wrong)} is not the name of an option")
    return found


def beside(name: str, file: Path, what: str, option: str) -> Path:
    """A file that another one names: from here, or from the folder of that file or one above it.

    Raises:
        UserError: it is in none of them.
    """
    given = Path(name).expanduser()
    folders = [Path(), *(folder for folder in file.absolute().parents)]
    found = next((folder / given for folder in folders if (folder / given).is_file()), None)
    if found is None:
        raise UserError(
            f"{file}: {option}={name}: there is no such {what}, from here or from the folders "
            f"above {file}; "
            "import where it is, or give its whole path"
        )
    return found
