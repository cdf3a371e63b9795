"""Compile every shipped configuration of every kernel to machine code, without a GPU.

    python -m benchmarks.aot [--arch sm_90] [--kernel rows_kernel] [--variant plain] [--dtype bf16] [--json]

prints registers, stack, local and shared memory, the longest run of instructions without a branch (a
tile's epilogue, in the row kernel), and the tensor-core instruction of each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context

from benchmarks import machine_code

ARCHS = ("sm_80", "sm_90", "sm_100")
TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


@dataclass(frozen=True)
class Compilation:
    """One kernel to compile.

    variant: plain, or several of: ragged (D % BLOCK_D != 0), entropy, full (every option and extra at
        once), keep, repair. For `preference_kernel` its set of losses.
    sizes: of a block, in the kernel's order.
    """

    kernel: str
    variant: str
    arch: str
    dtype: str
    sizes: tuple[int, ...]
    num_warps: int
    num_stages: int
    tma: bool = False


@dataclass(frozen=True)
class Resources:
    """What the compiler made of a case. Bytes of stack and local memory are per thread.

    straight: instructions of the longest run without a branch: for a kernel of plain tiles, what a thread
    executes between two tiles. serial: products of Hopper that are waited for one by one, where a stage's
    should be in flight together.
    """

    case: Compilation
    registers: int
    stack: int
    local: int
    shared: int
    straight: int
    serial: int
    instruction: str
    tma: bool
    triton: str


def cases(archs: tuple[str, ...] = ARCHS) -> list[Compilation]:
    """Every distinct configuration of every kernel, once for each architecture and variant."""
    from dpo_fast.kernels import logits_logp, merge, preference, scale_rows, target_product

    found = {}

    def add(*kernel, warps: int = 4, stages: int = 3) -> None:
        found[Compilation(*kernel, warps, stages)] = None

    for arch in archs:
        for kernel, variant, dtype, config in _products(arch):
            sizes = (config.block_t, config.block_v, config.block_d, config.group_t)
            case = Compilation(
                kernel, variant, arch, dtype, sizes, config.num_warps, config.num_stages, config.tma
            )
            found[case] = None
        sizes = (merge.MERGE_TOKENS, merge.MERGE_TILES)
        for variant in ("plain", "full", "keep", "keep-full", "repair", "repair-full"):
            add("merge_kernel", variant, arch, "fp32", sizes)
        sizes = (target_product.BLOCK_T, target_product.BLOCK_D, target_product.BLOCK_S)
        for variant in ("plain", "offset"):
            add("target_product_kernel", variant, arch, "bf16", sizes)
        add("scale_rows_kernel", "plain", arch, "bf16", (scale_rows.BLOCK_D,))
        sizes, warps = (preference.BLOCK,), preference.NUM_WARPS
        for variant in (*PREFERENCES, "no-reference"):
            add("preference_kernel", variant, arch, "fp32", sizes, warps=warps)
        sizes, warps = (logits_logp.BLOCK_V,), logits_logp.NUM_WARPS
        for kernel in ("forward_kernel", "backward_kernel"):
            add(kernel, "plain", arch, "bf16", sizes, warps=warps)
    return list(found)


def _products(arch: str):
    """(kernel, variant, dtype, configuration) of the product kernels, for every entry of the table.

    A candidate of the search in the variants with the most registers, and in one order of tiles, which
    changes a constant alone.
    """
    import torch

    from dpo_fast.kernels import tiles

    runs = []
    rows = [row for key, row in tiles.HALF_CONFIGS.items() if key[0] == arch]
    listed = [row for key, found in tiles.CANDIDATES.items() if key[0] == arch for row in found]
    for row in listed:
        if row.sums.group_t == 16:
            entropy = row.choose(False, True), row.choose(True, True)
            runs += [("bf16", "tail", row.choose(False, False), row.stores)]
            runs += [("bf16", "entropy-tail", *entropy)]
            yield "rows_kernel", "repair-entropy", "bf16", tiles.repair_config(row.entropy)
            yield "gradient_kernel", "plain", "bf16", row.stores
    for row in rows:
        runs += [("bf16", v, row.sums, row.stores) for v in ("", "tail", "top1")]
        entropy = row.choose(False, True), row.choose(True, True)
        runs += [("bf16", v, *entropy) for v in ("entropy", "entropy-tail")]
    runs += [("fp16", "", row.sums, row.stores)]
    other = tiles.OTHER_HALF if arch == "sm_80" else tiles.POINTER_HALF
    rich = tiles.config_for(arch, torch.bfloat16, 4096, 128256, rich=True)
    runs += [("bf16", "full", rich, rich)]
    runs += [("bf16", "full-ragged", tiles.RICH_HALF, tiles.RICH_HALF)]
    runs += [("bf16", "ragged", other, other), ("bf16", "entropy-ragged", other, other)]
    runs += [("fp32", "ragged", tiles.FLOAT, tiles.FLOAT)]
    runs += [("fp32", "full-ragged", tiles.FLOAT, tiles.FLOAT)]
    for dtype, variant, sums, stores in runs:
        yield "rows_kernel", variant or "plain", dtype, sums
        yield "rows_kernel", f"keep-{variant}".rstrip("-"), dtype, stores
        if variant not in PARTIAL:
            yield "rows_kernel", f"repair-{variant}".rstrip("-"), dtype, tiles.repair_config(stores)
        if "entropy" not in variant and variant not in PARTIAL:
            yield "gradient_kernel", variant or "plain", dtype, stores


def _constants(case: Compilation) -> dict:
    if case.kernel in ("forward_kernel", "backward_kernel"):
        return {"stride_v": 1, "BLOCK_V": case.sizes[0]}
    if case.kernel == "preference_kernel":
        without = {"reference_ptr": None} if case.variant == "no-reference" else {}
        return without | {
            "stride_t": 1,
            "LOSSES": PREFERENCES.get(case.variant, KERNEL_LOSSES),
            "LENGTH_AVERAGE": True,
            "HAS_REFERENCE": not without,
            "BLOCK": case.sizes[0],
        }
    if case.kernel == "scale_rows_kernel":
        return {"stride_id": 1, "HAS_SLOPE": True, "BLOCK_D": case.sizes[0]}
    if case.kernel == "target_product_kernel":
        flags = dict.fromkeys(("HAS_BIAS", "HAS_CAP", "NEGATIVE"), False) | {"bias_ptr": None}
        sizes = dict(zip(("BLOCK_T", "BLOCK_D", "BLOCK_S"), case.sizes))
        flags |= {"WHOLE": True, "SAMPLE": case.variant == "offset"}
        if case.variant != "offset":
            flags |= dict.fromkeys(("sample_ptr", "offset_ptr"))
        return flags | sizes | {"stride_hd": 1, "stride_wd": 1}
    full, repair = "full" in case.variant, "repair" in case.variant
    keep = repair or "keep" in case.variant
    passes = {**dict.fromkeys(("SQUARES", "MEAN"), full), "KEEP": keep, "REPAIR": repair}
    passes["ENTROPY"] = full or "entropy" in case.variant
    if not repair:
        passes["repair_ptr"] = None
    if case.kernel == "merge_kernel":
        passes |= {"SETTLE": keep, "HAS_CAP": full}
        if not keep:
            passes |= dict.fromkeys(("kept_ptr", "flags_ptr", "stride_kt"))
        return {"BLOCK_T": case.sizes[0], "BLOCK_S": case.sizes[1], **passes}
    constants = dict(zip(("BLOCK_T", "BLOCK_V", "BLOCK_D", "GROUP_T"), case.sizes))
    constants |= dict.fromkeys(("HAS_BIAS", "HAS_CAP"), full)
    constants["NEGATIVE"] = False
    constants |= {"EVEN_D": "ragged" not in case.variant}
    constants |= {"TMA": case.tma, "FLATTEN": case.tma}
    constants |= {"stride_hd": 1, "stride_wd": 1}
    constants["PRECISION"] = "ieee" if case.dtype == "fp32" else "tf32"
    if not full:
        constants["bias_ptr"] = None
    if case.kernel == "rows_kernel":
        top1 = full or "top1" in case.variant
        constants |= passes | {"TOP1": top1, "EVEN_V": case.variant in EVEN}
        if not top1:
            constants |= dict.fromkeys(("top_ptr", "targets_ptr"))
        if not keep:
            constants |= dict.fromkeys(("kept", "stride_kt"))
    else:
        constants["COLUMN_SUMS"] = full
        if not full:
            constants["column_sum_ptr"] = None
    return constants


def _type_of(name: str, case: Compilation) -> str:
    blocks = {"hidden": (0, 2), "weight": (1, 2), "kept": (0, 1), "out": (0, 1)}
    if name in blocks:
        if not case.tma:
            return TYPES[case.dtype]
        rows, columns = (case.sizes[i] for i in blocks[name])
        return f"tensordesc<{case.dtype}[{rows},{columns}]>"
    if name == "coefficients":
        return ("fp32",) * len(PREFERENCES.get(case.variant, KERNEL_LOSSES))
    if name in POINTERS:
        return POINTERS[name]
    if name in ("hidden_ptr", "weight_ptr", "bias_ptr", "logits_ptr"):
        return TYPES[case.dtype]
    if name == "out_ptr":
        return "*fp32" if case.kernel == "target_product_kernel" else TYPES[case.dtype]
    if name.endswith("_ptr"):
        return "*fp32"
    return "fp32" if name in FLOATS else "i32"


PARTIAL = ("tail", "entropy-tail", "top1")  # of the row pass alone
EVEN = ("plain", "keep", "entropy", "keep-entropy")  # V a multiple of the tile
KERNEL_LOSSES = ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "sft")
PREFERENCES = {"sigmoid": ("sigmoid",), "all": KERNEL_LOSSES}  # variants of preference_kernel
POINTERS = {
    "targets_ptr": "*i64",
    "kept_ptr": "*bf16",
    "repair_ptr": "*i32",
    "flags_ptr": "*i32",
    "lengths_ptr": "*i64",
    "losses_ptr": "*fp64",
    "arrivals_ptr": "*i32",
}
FLOATS = ("scale", "cap_in", "largest_shift", "factor", "inverse_temperature", "beta", "eps")
ALIGNED = ("D", "stride_ht", "stride_wv", "stride_ot", "stride_kt", "stride_t")
OPERANDS = ("hidden", "weight", "kept", "out")


def _kernel(name: str):
    from dpo_fast.kernels import (
        gradient_tile,
        logits_logp,
        merge,
        preference,
        rows,
        scale_rows,
        target_product,
    )

    modules = gradient_tile, logits_logp, merge, preference, rows, scale_rows, target_product
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def compile_case(case: Compilation) -> Resources:
    """Compile a case as a launch with aligned tensors and D % 16 == 0 would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = _kernel(case.kernel)
    constants = _constants(case)
    signature = {n: "constexpr" if n in constants else _type_of(n, case) for n in fn.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(fn.arg_names)
        if name not in constants
        and (name.endswith("_ptr") or name in ALIGNED or (name in OPERANDS and not case.tma))
    }
    compiled = triton.compile(
        ASTSource(fn, signature, constants, attributes),
        target=GPUTarget("cuda", int(case.arch[3:]), 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    ptx = compiled.asm["ptx"]
    instruction = next((name for name in INSTRUCTIONS if name in ptx), "-")
    usage, runs = machine_code.read(compiled.asm["cubin"])
    return Resources(
        case,
        usage["REG"],
        usage["STACK"],
        usage["LOCAL"],
        compiled.metadata.shared,
        max(map(len, runs)),
        machine_code.products_alone(runs),
        instruction,
        "cp.async.bulk.tensor" in ptx,
        triton.__version__,
    )


def table(results: list[Resources]) -> str:
    header = (
        f"{'kernel':<22}{'variant':<22}{'arch':<7}{'dtype':<6}{'sizes':<17}{'warps':>5}{'stages':>7}"
        f"{'regs':>6}{'stack':>6}{'local':>6}{'shared':>8}{'straight':>9}{'serial':>7}"
        f"  {'instruction':<16}  loads"
    )
    lines = [header]
    for result in results:
        case = result.case
        sizes = "x".join(map(str, case.sizes[:3]))
        lines.append(
            f"{case.kernel:<22}{case.variant:<22}{case.arch:<7}{case.dtype:<6}{sizes:<17}"
            f"{case.num_warps:>5}{case.num_stages:>7}{result.registers:>6}{result.stack:>6}"
            f"{result.local:>6}{result.shared:>8}{result.straight:>9}{result.serial:>7}"
            f"  {result.instruction:<16}  {'TMA' if result.tma else '-'}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: all of them")
    for field in ("kernel", "variant", "dtype"):
        parser.add_argument(f"--{field}", action="append", help="may be repeated; default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, no table")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        print("unset TRITON_INTERPRET: the interpreter's kernels cannot compile", file=sys.stderr)
        return 2
    chosen = cases(tuple(options.arch or ARCHS))
    for field in ("kernel", "variant", "dtype"):
        known, wanted = {getattr(case, field) for case in chosen}, getattr(options, field)
        if wanted and (unknown := set(wanted) - known):
            parser.error(f"--{field} {min(unknown)} has no case; try {', '.join(sorted(known))}")
        chosen = [case for case in chosen if not wanted or getattr(case, field) in wanted]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compile_case, chosen))
    if options.json:
        print("\n".join(json.dumps(asdict(result)) for result in results))
    else:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
