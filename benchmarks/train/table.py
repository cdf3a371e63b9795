"""The tables of `bench train` as they are printed."""

from __future__ import annotations

from benchmarks.table import Column, header, line
from benchmarks.train.shares import ingredients, token_factors

COLUMNS = (
    Column("s p50", "s_p50", 8, "{:.3g}".format),
    Column("p20", "s_p20", 8, "{:.3g}".format),
    Column("p80", "s_p80", 8, "{:.3g}".format),
    Column("pairs/s", "pairs_per_s", 9, "{:.2f}".format),
    Column("tokens/s", "tokens_per_s", 10, "{:,.0f}".format),
    Column("x trl", "x_of_trl", 7, "{:.2f}".format),
    Column("x pre", "x_of_trl_precomputed", 7, "{:.2f}".format),
    Column("mfu", "mfu", 7, "{:.1%}".format),
    Column("once", "mfu_once", 7, "{:.1%}".format),
    Column("positions", "computed_tokens", 11, "{:,.0f}".format),
    Column("head", "head_share", 6, "{:.0%}".format),
    Column("ref", "reference_share", 6, "{:.0%}".format),
    Column("MiB", "peak_mib", 8, "{:,.0f}".format),
    Column("loss_err", "loss_err", 10, "{:.1e}".format),
)
HEADER = f"{'contender':<38}{header(COLUMNS)}"


def contenders(rows: list[dict]) -> str:
    return "\n".join([HEADER, *map(_line, rows)])


def _line(row: dict) -> str:
    start = f"{row['impl']:<38}"
    return f"{start}  {row['note']}" if row["note"] else start + line(COLUMNS, row)


def checked(rows: list[dict]) -> str:
    """How far the losses went, and how well they agree. Losses that stay where they are prove little."""
    good = [row for row in rows if not row["note"]]
    if not good:
        return "no contender passed the check"
    first, last = good[0]["first_loss"], good[0]["last_loss"]
    worst = max(row["loss_err"] for row in good)
    return f"losses went from {first:.6f} to {last:.6f} and agree to {worst:.1e}"


def shares(rows: list[dict]) -> str:
    """What each ingredient is worth; "" where nothing can be compared."""
    found = ingredients(rows)
    counted = ", ".join(f"{name} {factor:.2f}" for name, factor in token_factors(rows).items())
    lines = [f"tokens, times what is needed: {counted}"]
    if found:
        lines += ["", f"{'ingredient':<48}{'factor':>8}{'s after':>9}"]
        lines += [f"{i.name:<48}{i.factor:>8.2f}{i.seconds:>9.3g}" for i in found]
        lines.append(f"{'all together':<48}{found[0].seconds / found[-1].seconds:>8.2f}")
    return "\n".join(lines)
