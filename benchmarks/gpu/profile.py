"""One look at the row kernel with Nsight Compute: how busy the tensor cores are, and what stalls."""

from __future__ import annotations

import csv
import functools
import io
import shutil
import subprocess
import sys

from benchmarks.gpu.shapes import SHAPES, Shape
from benchmarks.machine import ROOT

METRICS = (
    "gpu__time_duration.sum",
    "sm__cycles_elapsed.max",
    "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sectors_op_read.sum",
    "lts__t_sector_hit_rate.pct",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "l1tex__m_xbar2l1tex_read_bytes.sum",
)
PROGRAM = """
import sys
from benchmarks.gpu import rows
from benchmarks.gpu.shapes import Shape
shape, keep = Shape(*map(int, sys.argv[1:4])), sys.argv[4] == "keep"
rows.launch(shape, keep, rows.tiles(shape, keep)[0])()
import torch
torch.cuda.synchronize()
"""


def items(rehearse: bool) -> dict:
    shapes = SHAPES[rehearse]
    shapes = shapes if rehearse else (shapes[0], shapes[3])
    return {
        f"{shape} {kind}": functools.partial(look, shape, kind)
        for shape in shapes
        for kind in ("sums", "keep")
    }


def look(shape: Shape, kind: str) -> dict:
    if shutil.which("ncu") is None:
        return {"skipped": "ncu is not installed"}
    command = ["ncu", "--clock-control", "none", "--csv", "--kernel-name", "rows_kernel"]
    command += ["--launch-skip", "1", "--launch-count", "1", "--metrics", ",".join(METRICS)]
    command += [sys.executable, "-c", PROGRAM, str(shape.T), str(shape.D), str(shape.V), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    start = done.stdout.find('"ID"')
    if done.returncode or start < 0:
        return {"failed": f"ncu: {(done.stdout + done.stderr)[-1500:]}"}
    rows = csv.DictReader(io.StringIO(done.stdout[start:]))
    return {"metrics": {r["Metric Name"]: f"{r['Metric Value']} {r['Metric Unit']}" for r in rows}}
