"""Two runs on held-out pairs as one SVG: accuracy and margin, by the report's own charts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from dpo_fast.numbers import percent
from dpo_fast.report.chart import HEIGHT, WIDTH, Curve, Panel, draw

TITLE = 30  # room above a chart
# Colours stand in every rule: few viewers of SVG know variables.
STYLE = """
text { font: 10.5px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #5d6470; }
.title { font-size: 14px; font-weight: 600; fill: #1b1e24; }
.hint { font-size: 9.5px; fill: #8a909b; }
.label { font-size: 11px; font-weight: 600; }
.grid { stroke: #ecece8; }
.axis { stroke: #8a909b; stroke-width: 0.8; }
.rule { stroke: #8a909b; stroke-width: 0.8; stroke-dasharray: 1.5 2.5; }
.curve polyline { fill: none; stroke-width: 1.6; }
.chosen polyline { stroke: #0868b4; }
.rejected polyline { stroke: #c65102; }
.chosen circle, .label.chosen { fill: #0868b4; }
.rejected circle, .label.rejected { fill: #c65102; }
"""


def draw_runs(runs: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """The SVG document. runs: for each the points of `accuracy` and `margin`; titles: of the runs."""
    panels = [
        Panel(
            "Held-out accuracy",
            "",
            _curves(runs, titles, "accuracy"),
            [(0.5, "as good as chance")],
            (0.5,),
            (0.0, 1.0),
            percent,
            percent=True,
        ),
        Panel("Held-out margin", "", _curves(runs, titles, "margin"), [(0.0, "")], (0.0,)),
    ]
    last = max(run["steps"] for run in runs.values())
    parts = [
        f'<g transform="translate({index * WIDTH}, 0)"><text x="10" y="19" class="title">'
        f'{escape(panel.title)}</text><svg y="{TITLE}" width="{WIDTH}" height="{HEIGHT}"'
        + draw(panel, last, []).removeprefix("<svg")
        + "</g>"
        for index, panel in enumerate(panels)
    ]
    size = f'viewBox="0 0 {2 * WIDTH} {HEIGHT + TITLE}" width="{2 * WIDTH}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="Held-out accuracy and '
        f'margin"><style>{STYLE}</style><rect width="100%" height="100%" fill="#ffffff"/>'
        + "".join(parts)
        + "</svg>\n"
    )


def _curves(runs: Mapping, titles: Mapping[str, str], metric: str) -> list[Curve]:
    tones = ("chosen", "rejected")
    return [
        Curve(titles[name], [tuple(point) for point in run[metric]], tone, True, titles[name])
        for (name, run), tone in zip(runs.items(), tones)
    ]
