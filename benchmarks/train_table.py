"""The tables of `bench train` as they are printed."""

from __future__ import annotations

from benchmarks.train_shares import ingredients, token_factors

HEADER = (
    f"{'contender':<38}{'s p50':>8}{'p20':>8}{'p80':>8}{'pairs/s':>9}{'tokens/s':>10}{'x trl':>7}"
    f"{'x pre':>7}{'mfu':>7}{'once':>7}{'positions':>11}{'head':>6}{'ref':>6}{'MiB':>8}{'loss_err':>10}"
)


def contenders(rows: list[dict]) -> str:
    return "\n".join([HEADER, *map(_line, rows)])


def _line(row: dict) -> str:
    start = f"{row['impl']:<38}"
    if row["note"]:
        return f"{start}  {row['note']}"
    cells = [
        *(_cell(row[name], 8, ".3g") for name in ("s_p50", "s_p20", "s_p80")),
        _cell(row["pairs_per_s"], 9, ".2f"),
        _cell(row["tokens_per_s"], 10, ",.0f"),
        *(_cell(row[name], 7, ".2f") for name in ("x_of_trl", "x_of_trl_precomputed")),
        *(_cell(row[name], 7, ".1%") for name in ("mfu", "mfu_once")),
        _cell(row["computed_tokens"], 11, ",.0f"),
        *(_cell(row[name], 6, ".0%") for name in ("head_share", "reference_share")),
        _cell(row["peak_mib"], 8, ",.0f"),
        _cell(row["loss_err"], 10, ".1e"),
    ]
    return start + "".join(cells)


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


def _cell(value, width: int, form: str) -> str:
    return " " * width if value == "" else f"{value:>{width}{form}}"
