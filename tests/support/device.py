"""Where tests run kernels: Triton's interpreter on a CPU, or a GPU with TRITON_INTERPRET=0.

A test that draws numbers draws them on the CPU and moves them, so that a GPU sees those that the
interpreter has seen. The fixture `on_the_device` makes DEVICE the default of what tests create.
"""

import pytest
import torch

from dpo_fast.ops import dispatch

INTERPRETED = dispatch.interpreting()
ON_A_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if ON_A_GPU else "cpu")
HAS_TRITON = dispatch.HAS_TRITON and (INTERPRETED or ON_A_GPU)

needs_triton = pytest.mark.skipif(
    not HAS_TRITON, reason="needs triton, and TRITON_INTERPRET=1 or a GPU"
)
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=needs_triton)]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
