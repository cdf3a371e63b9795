"""Pictures in docs/ are those that the code makes, and show what the losses and layouts do."""

import math
import re
from pathlib import Path

import pytest
import torch

from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.errors import UserError
from dpo_fast.losses import LOSSES, register_loss
from dpo_fast.losses.custom import CUSTOM
from dpo_fast.report import layout_pictures, loss_curves
from dpo_fast.report.loss_curves import PLOTS, Plot, curves, loss_picture

DOCS = Path(__file__).resolve().parents[2] / "docs"
NUMBER = re.compile(r"-?\d+\.\d+")


def same(kept: Path, made: Path) -> bool:
    """The same picture, but for the last digit of places: another machine's exp may round otherwise."""
    texts = kept.read_text(), made.read_text()
    places = [[float(number) for number in NUMBER.findall(text)] for text in texts]
    return NUMBER.sub("", texts[0]) == NUMBER.sub("", texts[1]) and all(
        abs(a - b) < 0.11 for a, b in zip(*places, strict=True)
    )


@pytest.mark.parametrize("made_by", [loss_curves, layout_pictures], ids=["losses", "layouts"])
def test_pictures_in_the_documents_are_made_of_the_code(made_by, tmp_path):
    folder = DOCS / "pictures" / ("losses" if made_by is loss_curves else "layouts")
    made = made_by.write(tmp_path)
    assert {file.name for file in made} == {file.name for file in folder.iterdir()}
    for file in made:
        assert same(folder / file.name, file), f"{folder / file.name}: run make docs"


@pytest.mark.parametrize("name", LOSSES)
def test_slopes_are_those_of_the_curves(name):
    """Against differences, between kinks; and nothing drawn is NaN."""
    for line in curves(LOSSES[name], PLOTS.get(name, Plot())):
        x, value, slope = (torch.tensor(each) for each in (line.across, line.values, line.slopes))
        between = (value[2:] - value[:-2]) / (x[2:] - x[:-2])
        apart = (between - slope[1:-1]).abs()
        assert value.isfinite().all() and slope.isfinite().all()
        # Where the slope jumps, a difference across the kink is of both sides; there are two at most.
        smooth = apart < 0.02 * slope.abs().max().clamp(min=1e-6)
        assert int((~smooth).sum()) <= 6, (name, line.label, apart.max())


def at(name: str, place: float, label: str = "") -> tuple[float, float]:
    """Value and slope of a curve where it is at `place`."""
    (line,) = (
        line for line in curves(LOSSES[name], PLOTS.get(name, Plot())) if line.label == label
    )
    index = min(range(len(line.across)), key=lambda number: abs(line.across[number] - place))
    assert abs(line.across[index] - place) < 1e-9
    return line.values[index], line.slopes[index]


def test_curves_are_those_of_the_formulas():
    assert at("sigmoid", 0.0, "as it is") == pytest.approx((math.log(2), -0.5))
    assert at("sigmoid", 5.0, "label_smoothing 0.1")[1] > 0  # a pair that is far right pushes back
    assert at("hinge", 3.0) == pytest.approx((0.0, 0.0))
    assert at("hinge", -2.0) == pytest.approx((3.0, -1.0))
    assert at("ipo", 0.5) == pytest.approx((0.0, 0.0))  # the margin that it wants
    assert at("simpo", 1.0) == pytest.approx((math.log(2), -0.5))  # gamma
    assert at("kto", 0.0, "desirable") == pytest.approx((0.5, -0.25))
    assert at("kto", 0.0, "undesirable") == pytest.approx((0.5, 0.25))
    two, four = at("plackett_luce", 0.0, "2 answers"), at("plackett_luce", 0.0, "4 in order")
    assert two == pytest.approx((math.log(2), -0.5))
    assert four[0] == pytest.approx(math.log(24))  # no order of four is likelier than another
    above, below = (at("grpo", 0.6, label) for label in ("score above the mean", "below"))
    assert above[1] == 0 < below[1]  # clipped, and not


def test_losses_that_see_the_margin_alone_have_one_line():
    alone = {name for name in LOSSES if len(curves(LOSSES[name], PLOTS.get(name, Plot()))) == 1}
    assert {"ipo", "hinge", "robust", "simpo", "aot", "sigmoid_norm"} <= alone
    assert not alone & {"nca_pair", "dpop", "apo_down", "sppo_hard", "kto", "orpo"}


def test_a_loss_of_ones_own_is_drawn():
    @register_loss(needs_reference=False, options=("beta",))
    def drawn_here(logps, options):
        return (1 - options.beta * (logps.chosen - logps.rejected)).relu()

    try:
        picture = loss_picture("drawn_here")
    finally:
        del CUSTOM["drawn_here"]
    places = re.findall(r'<polyline class="curve"[^>]* points="([^"]+)"', picture)
    hinge = re.findall(r'<polyline class="curve"[^>]* points="([^"]+)"', loss_picture("hinge"))
    assert places == hinge and len(places) == 2
    with pytest.raises(UserError, match="no loss 'nonesuch': choose from sigmoid"):
        loss_picture("nonesuch")


def test_layouts_are_drawn_as_they_place_tokens():
    """The numbers of the title, counted by hand; as many cells, and as many dots."""
    for name, positions, pairs in (
        ("padded", 48, 9 * 10 // 2 + 12 * 13 // 2 + 2 * 15),
        ("packed", 31, 9 * 10 // 2 + 12 * 13 // 2 + 2 * 15),
        # 8 shared, then 1 and 4 that see them; 3 shared, then 2 and 2.
        ("shared_prefix", 20, 36 + (8 + 1) + (4 * 8 + 10) + 6 + 2 * (2 * 3 + 3)),
    ):
        picture = layout_pictures.layout_picture(LAYOUTS[name])
        assert f"{name}: {positions} positions, {pairs} pairs of them in attention" in picture
        assert len(re.findall(r'height="22" rx="3"', picture)) == positions
        assert len(re.findall(r'width="6" height="6"', picture)) == pairs
