"""What a compiled kernel is made of: registers, and the instructions between branches."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path


def read(cubin: bytes) -> tuple[dict[str, int], list[list[str]]]:
    """The numbers of `cuobjdump -res-usage`, and the instructions of `-sass` in runs without a branch.

    The triton wheel carries the tool.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [str(tool), option, file.name], check=True, capture_output=True, text=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)
    return {name: int(value) for name, value in found}, _runs(code)


def _runs(code: str) -> list[list[str]]:
    """The instructions between branches and what branches lead to; padding left out."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    branch = re.compile(r"\b(BRA|EXIT|RET)\b")
    targets = {int(x, 16) for _, text in lines for x in re.findall(r"BRA.* 0x([0-9a-f]+)", text)}
    runs = [[]]
    for address, text in lines:
        if int(address, 16) in targets:
            runs.append([])
        if not text.startswith("NOP"):
            runs[-1].append(text)
        if branch.search(text):
            runs.append([])
    return [run for run in runs if run]


def products_alone(runs: list[list[str]]) -> int:
    """How many wgmma are the only one between two waits of their warpgroup."""
    alone = 0
    for run in runs:
        since = 0
        for text in run:
            if "HGMMA" in text:
                since += 1
                if "gsb0" in text:
                    alone += since == 1
                    since = 0
    return alone
