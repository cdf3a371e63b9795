"""Triton's interpreter without half of its work: for tests and rehearsals, where it takes most of the time.

It replaces the functions of `triton.language` when a kernel is launched, and all of them once more at every
call of a device function inside, `tl.sum` and `tl.max` too: here at the first such call of a launch. And it
makes a table of all dtypes whenever it looks one up.
"""

from __future__ import annotations

import functools
import importlib.util

NAMES = ("GridExecutor", "_patch_lang", "_get_np_dtype")


def hasten() -> None:
    """For all kernels of this process. Nothing changes where Triton is missing, or has other names."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in NAMES) or hasattr(
        interpreter._patch_lang, "__wrapped__"
    ):
        return
    executor, patch = interpreter.GridExecutor, interpreter._patch_lang
    launch = executor.__call__
    seen: set[int] = (
        set()
    )  # modules, by the dictionary of their names, for which this launch has patched

    @functools.wraps(launch)
    def launch_anew(self, *args, **kwargs):
        seen.clear()
        return launch(self, *args, **kwargs)

    @functools.wraps(patch)
    def patch_once(fn):
        if id(fn.__globals__) in seen:
            return None  # a device function's: only a launch takes back what it has replaced
        seen.add(id(fn.__globals__))
        return patch(fn)

    look_up = interpreter._get_np_dtype
    known = functools.cache(look_up)

    @functools.wraps(look_up)
    def numpy_dtype(tt_dtype):
        scalar = tt_dtype.scalar
        return (look_up if scalar.is_ptr() else known)(scalar)

    executor.__call__, interpreter._patch_lang = launch_anew, patch_once
    interpreter._get_np_dtype = numpy_dtype
