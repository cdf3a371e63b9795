"""Losses that are not ours: registered from Python, named as `module:function`, or brought by a plugin.

They stand beside the table and not in it, so that documents and schemas are of our own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from dpo_fast.errors import UserError
from dpo_fast.losses.logps import Logps, PairLogps
from dpo_fast.losses.options import LossOptions
from dpo_fast.losses.spec import LossSpec
from dpo_fast.losses.table import LOSSES

if TYPE_CHECKING:
    from torch import Tensor

Loss = Callable[[Logps, LossOptions], "Tensor"]
LossFunction = TypeVar("LossFunction", bound=Callable[..., "Tensor"])
NOT_THEIRS = (str(Path(__file__).parents[1]), sysconfig.get_path("stdlib"), "<")
SITE = "site-packages"
GROUP = "dpo_fast.losses"  # of entry points
CUSTOM: dict[str, LossSpec] = {}
_specs: dict[Loss, LossSpec] = {}  # of decorated functions
_digests: dict[Path, str] = {}  # of files that were loaded


@overload
def register_loss(function: LossFunction, /) -> LossFunction: ...


@overload
def register_loss(
    *, name: str | None = None, **facts: Any
) -> Callable[[LossFunction], LossFunction]: ...


def register_loss(function: Any = None, /, *, name: str | None = None, **facts: Any) -> Any:
    """Decorator: a function becomes a loss, under its own name or another.

        @register_loss(needs_reference=False, options=("beta",))
        def wide_margin(logps: PairLogps, options: LossOptions) -> Tensor:
            return (1 - options.beta * (logps.chosen - logps.rejected)).relu()

    The function gives one value for each pair, [P], or for each completion, [S], with `kind="completions"`
    or `kind="groups"`. It must be the same on every rank. A name registered twice is the later function.

    facts: fields of `LossSpec`; by default it takes pairs, compares with a reference and uses beta.

    Raises:
        UserError: the name is one of the table, or a fact is none.
    """

    def add(function: Loss) -> Loss:
        spec = make_spec(name or function.__name__, function, **facts)
        if spec.name in LOSSES:
            raise UserError(f"there is a loss {spec.name} already: name yours otherwise")
        CUSTOM[spec.name] = _specs[function] = spec
        return function

    return add if function is None else add(function)


def make_spec(name: str, function: Loss, **facts: Any) -> LossSpec:
    """A function as a row of the table. Raises UserError for facts that there are not."""
    told = {"formula": name, "source": "your own code", "when": (function.__doc__ or "").strip()}
    try:
        spec = LossSpec(name, function, **{**told, "options": ("beta",), **facts})
    except TypeError as error:
        raise UserError(
            f"loss {name}: {str(error).partition(') ')[2] or error}; facts are the fields of LossSpec"
        ) from None
    if spec.kind not in ("pairs", "completions", "groups"):
        raise UserError(f"loss {name}: kind={spec.kind!r}: expected pairs, completions or groups")
    if not set(spec.options) <= set(LossOptions.__dataclass_fields__):
        odd = sorted(set(spec.options) - set(LossOptions.__dataclass_fields__))
        raise UserError(f"loss {name}: options={odd}: not among the fields of LossOptions")
    return LossSpec(**{**vars(spec), "function": _guarded(name, function), "kernel": False})


def spec_of(name: str) -> LossSpec | None:
    """The loss of a name; None if nobody has it.

    name: of the table, of a registered loss, of a plugin's, or `module:function`, where module is also a
        file, as in `my_losses.py:wide`.

    Raises:
        UserError: code is named and cannot be loaded, or is no loss.
    """
    if name in LOSSES:
        return LOSSES[name]
    if name not in CUSTOM:
        found = _named(name) if ":" in name else _of_plugin(name)
        if found is None:
            return None
        CUSTOM[name] = found
    return CUSTOM[name]


def known_names() -> list[str]:
    """Names that need no code to be named: the table's, registered ones, and those of plugins."""
    return list(dict.fromkeys([*LOSSES, *CUSTOM, *(each.name for each in _plugins())]))


def all_specs(names: Iterable[str]) -> tuple[LossSpec, ...]:
    """The losses of names that are known by now."""
    return tuple(spec for name in names if (spec := spec_of(name)) is not None)


def _plugins() -> Iterable[Any]:
    return entry_points(group=GROUP)


def _of_plugin(name: str) -> LossSpec | None:
    for point in _plugins():
        if point.name == name:
            where = f"loss.type={name}, of the plugin {point.value}"
            return as_spec(name, loaded(where, point.load), where)
    return None


def _named(name: str) -> LossSpec:
    where = f"loss.type={name}"
    return as_spec(name, load_object(name, where), where)


def as_spec(name: str, found: Any, where: str) -> LossSpec:
    """What some code has under a name, as a loss. Raises UserError if it is none."""
    spec = found if isinstance(found, LossSpec) else None
    if callable(found) and spec is None:
        spec = _specs.get(found)
    if spec is not None:
        return LossSpec(**{**vars(spec), "name": name})
    if not callable(found) or isinstance(found, type):
        raise UserError(
            f"{where} is a {type(found).__name__}: expected a function of log-probs and options"
        )
    return make_spec(name, found)


def load_object(name: str, where: str) -> Any:
    """What `module:object` names. The module is a file, or is looked for where the run was started, too.

    where: what errors begin with.

    Raises:
        UserError: there is no such module or object, or the module's own code fails.
    """
    module, _, attribute = name.rpartition(":")
    if module.endswith(".py"):
        found = loaded(where, lambda: _of_file(Path(os.path.expanduser(module)), where))
    else:
        found = loaded(where, lambda: _of_module(module, where))
    for part in attribute.split("."):
        if not hasattr(found, part):
            own = [each for each in vars(found) if not each.startswith("_")]
            raise UserError(f"{where}: {module} has no {attribute}; it has {', '.join(own)}")
        found = getattr(found, part)
    return found


def _of_file(file: Path, where: str) -> Any:
    file = file.absolute()
    if not file.is_file():
        raise UserError(f"{where}: no such file {file}")
    # A file that was changed, as in a notebook, is another module.
    digest = _digests[file] = _digest(file)
    name = f"dpo_fast_custom_{file.stem}_{digest[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None  # a file that ends in .py has one
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def refresh() -> None:
    """Forget losses of files that were changed: the next use loads them anew. Between runs of a process."""
    for name in list(CUSTOM):
        module = name.rpartition(":")[0]
        file = Path(os.path.expanduser(module)).absolute()
        with contextlib.suppress(OSError):  # a file that is gone is kept as it was
            if module.endswith(".py") and _digest(file) != _digests.get(file):
                del CUSTOM[name]


def _digest(file: Path) -> str:
    return hashlib.sha256(str(file).encode() + b"\0" + file.read_bytes()).hexdigest()


def _of_module(module: str, where: str) -> Any:
    here = os.getcwd()
    path = list(sys.path)
    sys.path.append(here)  # last: it hides no installed module
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"{where}: no module {error.name} is installed or lies in {here}; a file is named as "
                "FOLDER/FILE.py:FUNCTION"
            ) from None
        raise
    finally:
        sys.path[:] = path


def loaded(where: str, load: Callable[[], Any]) -> Any:
    """What `load` gives. Raises UserError with file and line for an error of the code that it runs."""
    try:
        return load()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where} cannot be loaded: {told(error)}") from error


def told(error: BaseException) -> str:
    """An error of somebody's code: the file and line that raised it, its kind and its words."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    # What a library says is told where their code called it.
    own = [f for f in frames if not f.filename.startswith(NOT_THEIRS) and SITE not in f.filename]
    place = f"{own[-1].filename}, line {own[-1].lineno}: " if own else ""
    return f"{place}{type(error).__name__}: {error}"


def _guarded(name: str, function: Loss) -> Loss:
    """The function with what it returns checked. Raises UserError."""

    @functools.wraps(function)
    def loss(logps: Logps, options: LossOptions) -> Tensor:
        try:
            values = function(logps, options)
        except Exception as error:
            raise UserError(f"loss {name}: {told(error)}") from error
        _check(name, values, logps)
        return values

    return loss


def _check(name: str, values: Any, logps: Logps) -> None:
    policy = logps.chosen if isinstance(logps, PairLogps) else logps.logps
    unit = "pair" if isinstance(logps, PairLogps) else "completion"
    shape, found = tuple(policy.shape), getattr(values, "shape", None)
    if found is None or tuple(found) != shape:
        what = type(values).__name__ if found is None else f"a tensor of shape {list(found)}"
        hint = "" if found is None else "; do not take their mean, which is over the global batch"
        raise UserError(
            f"loss {name} gave {what}: expected one value for each {unit}, a tensor of shape "
            f"{list(shape)}{hint}"
        )
    tokens = getattr(logps, "tokens", None)
    learns = policy.requires_grad or (tokens is not None and tokens.requires_grad)
    if learns and not values.requires_grad:
        raise UserError(
            f"loss {name} does not depend on the policy's log-probs: nothing could be learned from it"
        )
