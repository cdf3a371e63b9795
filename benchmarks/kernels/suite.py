"""Which sizes are measured: named heads, the default points of a device, and the curve against T."""

from __future__ import annotations

from benchmarks.kernels.case import MODES, Operation
from benchmarks.kernels.measure import Group

HEADS = {  # D, V
    "llama3": (4096, 128256),
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-1.5b": (1536, 151936),
    "gemma3-1b": (1152, 262144),
    "mistral": (4096, 32768),
    "cpu": (896, 32000),  # a head that two cores multiply in a second
    "tiny": (64, 2000),
}
# Points: tokens, head, modes. The last one of a GPU is about memory: logits of 19 GiB in bf16.
POINTS = {
    "cpu": ((2048, HEADS["cpu"], MODES),),
    "cuda": (
        (8192, HEADS["llama3"], MODES),
        (16384, HEADS["qwen2.5-0.5b"], MODES),
        (65536, (4096, 151936), ("trainable",)),
    ),
}
DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
CURVE = {  # head, and two decades of tokens or nearly so, in powers of 2
    "cpu": ((256, 8192), tuple(2**n for n in range(7, 15))),
    "cuda": (HEADS["qwen2.5-1.5b"], tuple(2**n for n in range(10, 17))),
}
TOKENS = {"cpu": 2048, "cuda": 8192}  # for a head chosen without tokens
MOST_LOGITS = 1 << 31
QUICK = (128, HEADS["tiny"], MODES)


def points(operation: Operation, device: str, dtypes, modes, points) -> list[Group]:
    """One group per point and dtype, in the modes that the operation has of those asked for."""
    groups = {}
    for T, (D, V), own in points:
        wanted = tuple(m for m in operation.modes if m in own and m in (modes or MODES))
        # Logits that exist are read once: beyond some GiB that tells nothing new.
        if not wanted or (operation.sizes == "TV" and T * V > MOST_LOGITS):
            continue
        sizes = (D if "D" in operation.sizes else 0, V if "V" in operation.sizes else 0)
        for dtype in operation.dtypes or dtypes:
            groups[Group(operation.name, T, *sizes, dtype, device, wanted)] = None
    return list(groups)


def curve(operation: Operation, device: str, dtypes, modes, head, tokens) -> list[Group]:
    """Groups along T: forward and backward of a trainable head, unless modes say otherwise."""
    if operation.sizes != "TDV":
        return []
    return [
        Group(operation.name, T, *head, dtype, device, modes or ("trainable",), growth=True)
        for dtype in dtypes
        for T in tokens
    ]
