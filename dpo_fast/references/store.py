"""Where the stored reference of a split lies, and whether what lies there fits the run.

It fits if it was computed by the same model in the same dtype. What it lacks of the rows that the run asks
for is added, where it was begun for the same data.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow

from dpo_fast.data.dataset import Dataset
from dpo_fast.data.kinds import PAIRS
from dpo_fast.errors import UserError
from dpo_fast.references.artefact import (
    FORMAT,
    MANIFEST,
    REMEDY,
    differences,
    read_columns,
    read_manifest,
)
from dpo_fast.references.cached import find_rows


@dataclass(frozen=True)
class Request:
    """What a split needs of a stored reference.

    name: of the split.
    examples: those of the split.
    model: identity of the model (`models/identity.py`).
    dtype: of its weights.
    per_token: whether the log-prob of every token is needed.
    named_by: option and path of the model, for errors.
    wanted_P: bool [P], the examples that the run asks for; None: all.
    """

    name: str
    examples: Dataset
    model: str
    dtype: str
    per_token: bool = False
    named_by: str = "model"
    wanted_P: np.ndarray | None = None

    @property
    def must_match(self) -> dict:
        """The values of a manifest that must agree. Sums are also read from a store of token log-probs."""
        identity = {"format": FORMAT, "model": self.model, "dtype": self.dtype, "kind": self.kind}
        return identity | ({"per_token": True} if self.per_token else {})

    @property
    def kind(self) -> str | None:
        """Kind of the examples by name; None for pairs, which a manifest does not mention."""
        return None if self.examples.kind == PAIRS else self.examples.kind.name

    @property
    def manifest(self) -> dict:
        """The manifest of a reference that is computed for this request."""
        content = {"data": self.examples.token_fingerprint, "rows": len(self.examples)}
        whole = self.must_match | {"per_token": self.per_token} | content
        return {name: value for name, value in whole.items() if value is not None}


@dataclass(frozen=True)
class Place:
    """Folders of a request's reference.

    own: the one it is computed into.
    others: those that may hold its rows, too.
    """

    own: Path
    others: tuple[Path, ...] = ()

    @property
    def stored(self) -> list[Path]:
        """Those of the folders that exist."""
        return [folder for folder in (self.own, *self.others) if folder.exists()]


def default_place(output_dir: str, request: Request) -> Place:
    """A folder beside the run. Its name changes with any value of the manifest."""
    text = json.dumps(request.manifest, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Place(Path(output_dir) / "reference" / f"{request.name}-{key}")


def named_place(cache_dir: str, request: Request) -> Place:
    """The folders below `reference.cache_dir`, which is a stored reference itself or holds several.

    Raises:
        UserError: it is a file; or it is not there, and a stored reference is under a name like it.
    """
    root = Path(os.path.expanduser(cache_dir))
    if not root.exists():
        _check_spelling(cache_dir, root, request)
    if (root / MANIFEST).exists():
        return Place(root)
    if root.exists() and not root.is_dir():
        raise UserError(f"reference.cache_dir={cache_dir} is a file; expected a folder")
    own = root / request.name
    # The name of a folder that is still being written begins with a dot.
    found = (file.parent for file in sorted(root.glob(f"*/{MANIFEST}")))
    return Place(own, tuple(x for x in found if x != own and not x.name.startswith(".")))


def _check_spelling(cache_dir: str, root: Path, request: Request) -> None:
    """Raises UserError if the name may be a slip: it would cost the computation of a whole reference.

    It is none where what has a like name is of another model.
    """
    missing = root.absolute()
    while not missing.parent.exists():
        missing = missing.parent
    rest = root.absolute().relative_to(missing)
    siblings = [each.name for each in missing.parent.iterdir() if each.is_dir()]
    for name in difflib.get_close_matches(missing.name, siblings, 3, 0.75):
        other = missing.parent / name / rest
        files = [*other.glob(MANIFEST), *other.glob(f"*/{MANIFEST}")]
        if any(_is_of(file.parent, request) for file in files):
            raise UserError(
                f"reference.cache_dir={cache_dir} does not exist, and {other} holds a stored reference: "
                f"name that one, or make the folder {root} to have one computed there"
            )


def _is_of(folder: Path, request: Request) -> bool:
    """Whether a folder holds a reference of the request's model, as far as it can be read."""
    with suppress(UserError):
        return not differences(read_manifest(folder), request.must_match)
    return False


@dataclass(frozen=True)
class Stored:
    """What is there of a request.

    folders: those that fit.
    absent_P: bool [P], the examples that are in none of them.
    lacks: whether the run asks for one of these.
    """

    folders: list[Path]
    absent_P: np.ndarray
    lacks: bool


def find_stored(place: Place, request: Request) -> list[Path] | None:
    """Folders that together hold all that a request wants; None if some is yet to be computed.

    Raises as `look`.
    """
    found = look(place, request)
    return None if found.lacks else found.folders


def look(place: Place, request: Request) -> Stored:
    """What is there of a request.

    Raises:
        UserError: what is stored is damaged, or lacks what the run asks for and is of another model or of
            other data.
    """
    fitting, misfits, stored = [], [], place.stored
    for folder in stored:
        manifest = read_manifest(folder)
        difference = differences(manifest, request.must_match)
        if difference:
            weights = ""
            if manifest.get("model") != request.model:
                computed = manifest.get("model_path")
                weights = f", the weights of {computed} as they were, and not {request.named_by}"
            misfits.append(
                f"reference {folder} was computed for something else{weights}: {difference}"
            )
        elif manifest.get("parts") != {}:  # else nothing is scored yet
            fitting.append(folder)
    absent_P = _absent(fitting, request.examples)
    missing = absent_P if request.wanted_P is None else absent_P & request.wanted_P
    found = Stored(fitting, absent_P, bool(missing.any()))
    if not found.lacks:
        return found
    if misfits:
        raise UserError(
            f"{misfits[0]}. Name another folder with reference.cache_dir, or delete that one if nothing "
            "else needs it"
        )
    if place.own in stored and differences(read_manifest(place.own), request.manifest):
        raise UserError(
            f"reference {place.own} was computed for other data: {missing.sum()} of "
            f"{len(request.examples)} {request.examples.kind.name} ({request.name}) are not in it, the "
            f"first {request.examples.where(int(missing.argmax()))}; {REMEDY}"
        )
    return found


def _absent(folders: list[Path], examples: Dataset) -> np.ndarray:
    """bool [P], the examples that no folder holds."""
    if not folders:
        return np.ones(len(examples), bool)
    table = pyarrow.concat_tables([read_columns(folder, ["digest"]) for folder in folders])
    return find_rows(table, examples.digests).is_null().to_numpy(zero_copy_only=False)
