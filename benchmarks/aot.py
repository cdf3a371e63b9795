"""Compile every shipped configuration of every kernel to machine code, without a GPU.

    python -m benchmarks.aot [--arch sm_90] [--json]

prints registers, stack, local and shared memory, and the tensor-core instruction of each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

ARCHS = ("sm_80", "sm_90", "sm_100")
TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


@dataclass(frozen=True)
class Case:
    """One kernel. `variant`: plain, ragged (D % BLOCK_D != 0) or full (ragged, every flag)."""

    kernel: str
    variant: str
    arch: str
    dtype: str
    sizes: tuple[int, ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Result:
    """What the compiler made of a case. Bytes of stack and local memory are per thread."""

    case: Case
    registers: int
    stack: int
    local: int
    shared: int
    instruction: str


def cases(archs: tuple[str, ...] = ARCHS) -> list[Case]:
    """Each distinct configuration once per kernel, architecture and variant."""
    from dpo_fast.kernels import linear_logp, logits_logp

    found = {}
    for arch in archs:
        table = [c for key, c in linear_logp.HALF_CONFIGS.items() if key[0] == arch]
        products = [("bf16", "plain", config) for config in table]
        products += [("bf16", "ragged", table[-1]), ("bf16", "full", linear_logp.RICH_HALF)]
        products += [("fp16", "plain", table[-1]), ("fp32", "full", linear_logp.FLOAT)]
        if arch == "sm_80":  # what sm_86 and sm_89 run
            products.append(("bf16", "plain", linear_logp.OTHER_HALF))
        for dtype, variant, config in products:
            sizes = (config.block_t, config.block_v, config.block_d, config.group_t)
            for kernel in ("statistics_kernel", "gradient_kernel"):
                case = Case(
                    kernel, variant, arch, dtype, sizes, config.num_warps, config.num_stages
                )
                found[case] = None
        found[Case("merge_kernel", "full", arch, "fp32", (linear_logp.MERGE_TOKENS,), 4, 3)] = None
        for kernel in ("forward_kernel", "backward_kernel"):
            sizes = (logits_logp.BLOCK_V,)
            found[Case(kernel, "plain", arch, "bf16", sizes, logits_logp.NUM_WARPS, 3)] = None
    return list(found)


def _constants(case: Case) -> dict:
    if case.kernel in ("forward_kernel", "backward_kernel"):
        return {"stride_v": 1, "BLOCK_V": case.sizes[0]}
    full = case.variant == "full"
    if case.kernel == "merge_kernel":
        flags = dict.fromkeys(("ENTROPY", "SQUARES", "MEAN", "TOP1"), full)
        return {"BLOCK_T": case.sizes[0], **flags}
    constants = dict(zip(("BLOCK_T", "BLOCK_V", "BLOCK_D", "GROUP_T"), case.sizes))
    constants |= {"HAS_BIAS": full, "HAS_CAP": full, "EVEN_D": case.variant == "plain"}
    constants |= {"stride_hd": 1, "stride_wd": 1}
    constants["PRECISION"] = "ieee" if case.dtype == "fp32" else "tf32"
    if case.kernel == "statistics_kernel":
        constants |= dict.fromkeys(("ENTROPY", "SQUARES", "MEAN"), full)
    else:
        constants["COLUMN_SUMS"] = full
    if not full:
        constants["bias_ptr"] = None
        if case.kernel == "gradient_kernel":
            constants["column_sum_ptr"] = None
    return constants


def _type_of(name: str, case: Case) -> str:
    if name == "targets_ptr":
        return "*i64"
    if name == "top1_ptr":
        return "*i8"
    if name in ("hidden_ptr", "weight_ptr", "bias_ptr", "logits_ptr", "out_ptr"):
        return TYPES[case.dtype]
    if name.endswith("_ptr"):
        return "*fp32"
    return "fp32" if name in FLOATS else "i32"


FLOATS = ("factor", "cap_in", "cap_out", "slope_factor", "inverse_temperature")
ALIGNED = ("D", "stride_ht", "stride_wv", "stride_ot", "stride_t")


def compile_case(case: Case) -> Result:
    """Compile with the attributes that a launch with aligned tensors and D % 16 == 0 would have."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dpo_fast.kernels import linear_logp, logits_logp

    fn = getattr(linear_logp, case.kernel, None) or getattr(logits_logp, case.kernel)
    constants = _constants(case)
    signature = {n: "constexpr" if n in constants else _type_of(n, case) for n in fn.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(fn.arg_names)
        if name not in constants and (name.endswith("_ptr") or name in ALIGNED)
    }
    compiled = triton.compile(
        ASTSource(fn, signature, constants, attributes),
        target=GPUTarget("cuda", int(case.arch[3:]), 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    ptx = compiled.asm["ptx"]
    instruction = next((name for name in INSTRUCTIONS if name in ptx), "-")
    usage = _resource_usage(compiled.asm["cubin"])
    return Result(
        case, usage["REG"], usage["STACK"], usage["LOCAL"], compiled.metadata.shared, instruction
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """The numbers of `cuobjdump -res-usage`, which the triton wheel carries."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def table(results: list[Result]) -> str:
    header = (
        f"{'kernel':<18}{'variant':<8}{'arch':<7}{'dtype':<6}{'sizes':<17}{'warps':>5}{'stages':>7}"
        f"{'regs':>6}{'stack':>6}{'local':>6}{'shared':>8}  instruction"
    )
    lines = [header]
    for result in results:
        case = result.case
        sizes = "x".join(map(str, case.sizes[:3]))
        lines.append(
            f"{case.kernel:<18}{case.variant:<8}{case.arch:<7}{case.dtype:<6}{sizes:<17}"
            f"{case.num_warps:>5}{case.num_stages:>7}{result.registers:>6}{result.stack:>6}"
            f"{result.local:>6}{result.shared:>8}  {result.instruction}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: all of them")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, no table")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        print("unset TRITON_INTERPRET: the interpreter's kernels cannot compile", file=sys.stderr)
        return 2
    chosen = cases(tuple(options.arch or ARCHS))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compile_case, chosen))
    if options.json:
        print("\n".join(json.dumps(asdict(result)) for result in results))
    else:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
