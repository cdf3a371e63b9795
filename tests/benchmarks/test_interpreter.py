"""Triton's interpreter as tests and rehearsals have it: hastened, and it says the same."""

import pytest

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter


def test_it_is_hastened_in_this_process():
    """tests/conftest.py has done it, and this Triton has the names that it needs."""
    for replaced in (interpreter._patch_lang, interpreter.GridExecutor.__call__):
        assert hasattr(replaced, "__wrapped__")


def test_a_launch_replaces_functions_anew_and_a_device_function_no_second_time():
    asked = []

    def body():
        asked.append(interpreter._patch_lang(body))

    inside = interpreter.GridExecutor(body, [], (2,), [])
    for _ in range(2):
        inside()
    assert asked == [None] * 4  # the launch itself had done it, both times


@pytest.mark.parametrize("name", ["int1", "uint8", "int64", "float16", "bfloat16", "float8e5"])
def test_dtypes_are_those_of_the_table(name):
    dtype = getattr(tl, name)
    known, table = interpreter._get_np_dtype, interpreter._get_np_dtype.__wrapped__
    pointer = tl.pointer_type(dtype)
    for kind in (dtype, pointer):
        for asked in (kind, tl.block_type(kind, [4])):
            assert known(asked) == known(asked) == table(asked)
