"""liger-kernel's layer kernels in Triton's interpreter, on a CPU."""

import numpy as np


def interpret_liger(setattr) -> None:
    """Teach the interpreter the two things that it lacks for them.

    It hands Python floats to a kernel as they are, where a compiled kernel sees an fp32 scalar; and
    libdevice's rsqrt has no body. `setattr` is the built-in or a monkeypatch's.
    """
    import liger_kernel.ops.rms_norm as rms_norm
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    plain = interpreter._implicit_cvt

    def convert(argument):
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return plain(argument)

    setattr(interpreter, "_implicit_cvt", convert)
    setattr(rms_norm, "rsqrt", lambda x: 1.0 / tl.sqrt(x))
