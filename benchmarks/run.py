"""The command line of the benchmarks.

    python -m benchmarks.run kernels [--help]      or      dpo-fast bench kernels [--help]
    python -m benchmarks.run train [--help]        or      dpo-fast bench train [--help]

Exit codes: 0 done; 1 a contender is wrong and has no time; 2 an option cannot be honoured.
"""

from __future__ import annotations

import importlib
import sys

from dpo_fast.errors import UserError

BENCHMARKS = ("kernels", "train")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code. Raises UserError for mistakes; `python -m` prints them as one paragraph."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if not words or words[0] not in BENCHMARKS:
        asked = " ".join(words[:1]) or "nothing"
        raise UserError(f"{asked} to measure: choose {' or '.join(BENCHMARKS)}")
    # By name: `kernels` must run without transformers, which `train` imports.
    return importlib.import_module(f"benchmarks.{words[0]}.run").main(words[1:])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"benchmarks: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
