"""The table of targets, from the lines and from nothing else."""

from __future__ import annotations

# (what, shape's words, mode, largest ratio to the bare products)
TARGETS = (
    ("log-probs", "logps", 1.05),
    ("frozen head", "frozen", 1.06),
    ("trainable head", "trainable", 1.06),
)


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
