"""The table of targets, and CSV files, from the lines and from nothing else.

    python3 -m benchmarks.gpu.summary LINES ... [--kernels CSV] [--train CSV]

Of rows that were measured again in a later file the later one counts. Rows without a time are left out of
the CSV files, unless the memory did not suffice.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import jsonl

# (what, shape's words, mode, largest ratio to the bare products)
TARGETS = (
    ("log-probs", "logps", 1.05),
    ("frozen head", "frozen", 1.06),
    ("trainable head", "trainable", 1.06),
)
KEY = (
    "op",
    "impl",
    "mode",
    "T",
    "D",
    "V",
    "dtype",
    "model",
    "layers",
    "data",
)  # what a row is about


def rows(lines: list[dict], steps: tuple[str, ...]) -> list[dict]:
    """The rows of these steps: the last of each key, at the place of the first.

    The bare products are those beside ours: a peer's ratio is to the ones of its own process.
    """
    found = {}
    for line in (line for line in lines if line["step"] in steps):
        for row in line.get("rows", ()):
            shared = line["step"] == "peers" and row["impl"] in ("bare products", "copy")
            if row["note"] in ("", "out of memory") and not shared:
                found[tuple(row.get(name) for name in KEY)] = row
    return list(found.values())


def table(lines: list[dict]) -> str:
    """Targets and measurements, then what went wrong and what was not reached."""
    parts = [_head(lines), _rows(lines), _train(lines), _troubles(lines)]
    return "\n\n".join(part for part in parts if part)


def _head(lines: list[dict]) -> str:
    found = [
        f"{'head':<18}{'T':>7}{'D':>6}{'V':>8}  {'implementation':<26}{'ms':>9}{'x bare':>8}{'target':>8}"
    ]
    goals = {mode: (what, limit) for what, mode, limit in TARGETS}
    for row in (
        row for line in lines for row in line.get("rows", ()) if row.get("op") == "linear_logp"
    ):
        if row["impl"] == "copy":
            continue
        what, limit = goals[row["mode"]]
        start = f"{what:<18}{row['T']:>7}{row['D']:>6}{row['V']:>8}  {row['impl']:<26}"
        if not row["x_of_bare_gemm"]:
            found.append(f"{start}  {row['note']}")
            continue
        verdict = ""
        if row["impl"].startswith("dpo_fast") and row["T"] <= 8192 and row["D"] == 4096:
            verdict = f"{limit:>8.2f}  {'pass' if row['x_of_bare_gemm'] <= limit else 'FAIL'}"
        found.append(f"{start}{row['ms_p50']:>9.3f}{row['x_of_bare_gemm']:>8.3f}{verdict}")
    return "\n".join(found) if len(found) > 1 else ""


def _rows(lines: list[dict]) -> str:
    timed = [line for line in lines if line["step"] == "rows" and "x_bare" in line]
    timed.sort(key=lambda line: (line["item"].split()[:5], line["x_bare"]))
    return "\n".join(
        f"{line['item']:<90}{line['ms']:>9.3f} ms{line['x_bare']:>8.3f} x bare" for line in timed
    )


def _train(lines: list[dict]) -> str:
    names = ("impl", "pairs_per_second", "tokens_per_second", "mfu", "peak_mib", "note")
    return "\n".join(
        f"{line['item']:<50}"
        + ", ".join(f"{n} {row[n]}" for n in names if row.get(n) not in (None, ""))
        for line in lines
        if line["step"] == "train"
        for row in line.get("rows", ())
    )


def _troubles(lines: list[dict]) -> str:
    found = []
    for word in ("failed", "skipped", "not_reached"):
        found += [
            f"{word.replace('_', ' '):<12}{line['step']}: {line['item']}: {str(line[word])[:200]}"
            for line in lines
            if word in line
        ]
    return "\n".join(found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="LINES")
    parser.add_argument("--kernels", type=Path, metavar="CSV")
    parser.add_argument("--train", type=Path, metavar="CSV")
    given = parser.parse_args(arguments)
    if missing := [str(file) for file in given.files if not file.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}")
    lines = [line for file in given.files for line in jsonl.read(file)]
    if given.kernels:
        from benchmarks.kernels.results import COLUMNS

        COLUMNS.write(given.kernels, rows(lines, ("targets", "peers")))
    if given.train:
        from benchmarks.train.results import COLUMNS

        COLUMNS.write(given.train, rows(lines, ("train",)))
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
