"""The report in headless Chromium: nothing is complained of, all is drawn, what is pointed at is told."""

import pytest

from dpo_fast.report import write_comparison, write_report
from tests.support.browser import CHROMIUM, Browser
from tests.support.run_folder import LN2, make, train_line, usual, write_examples, write_facts

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
WIDTHS = (400, 900, 1600)
# Scripts that would set `window.ran`, in the places that a page may run one from.
SCRIPTS = (
    "</title></script><script>window.ran=1</script>",
    '"><img src=x onerror=window.ran=1><svg onload=window.ran=1>',
    "' onmouseover='window.ran=1' autofocus onfocus='window.ran=1' x='",
    "</style><iframe srcdoc='<script>parent.ran=1</script>'></iframe>",
    "<a href=javascript:window.ran=1>-->]]>{{7*7}}${7*7}`\\u0000</a>",
)
LONG = "a_name_without_any_place_to_break_it_" * 12


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report of one run and a comparison, with hostile and long texts wherever there are texts."""
    root = tmp_path_factory.mktemp("pages")
    hostile = "".join(SCRIPTS)
    folders = []
    for name, text in (("plain", "words"), ("hostile", hostile), ("long", LONG)):
        folder = root / name
        folder.mkdir()
        options = {"loss": {"type": "sigmoid", "beta": len(folders)}, text: text}
        make(folder, usual(), log={"run_name": text}, model={"path": text}, **options)
        write_examples(folder, text=text)
        write_facts(folder, 0, 6, device=text, versions={text: text})
        folders.append(folder)
    long = [train_line(step, grad_norm=None if step % 7 else 2.0) for step in range(1, 60)]
    make(folders[2], long, log={"run_name": LONG}, data={"train": LONG})
    return {
        "plain": write_report(folders[0]),
        "hostile": write_report(folders[1]),
        "long": write_report(folders[2]),
        "several": write_comparison(folders),
    }


@pytest.mark.parametrize("page", ["plain", "hostile", "long", "several"])
def test_nothing_is_complained_of_nothing_runs_and_nothing_overflows(browser, pages, page):
    for width in WIDTHS:
        browser.open(pages[page], width, dark=width == 900)
        browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        wide = browser.evaluate(
            "[...document.querySelectorAll('main *')].filter(each => "
            "each.getBoundingClientRect().right > innerWidth + 0.5 && !each.closest('.scroll, pre'))"
            ".map(each => each.tagName + '.' + each.getAttribute('class'))"
        )
        assert wide == [], width
    assert browser.errors == []
    assert browser.evaluate("typeof window.ran") == "undefined"
    assert browser.evaluate("document.querySelectorAll('img, iframe, a, main script').length") == 0


def test_every_plot_is_drawn(browser, pages):
    browser.open(pages["several"])
    browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    marks = browser.evaluate(
        "[...document.querySelectorAll('figure')].map(figure => ["
        "figure.querySelector('h3').textContent, ...[...figure.querySelectorAll('.curve, .area')]"
        ".map(mark => { const box = mark.getBBox(); return box.width + box.height; })])"
    )
    assert len(marks) > 12
    for title, *sizes in marks:
        assert sizes and all(size > 0 for size in sizes), title
    lines = "document.querySelectorAll('.curve polyline, .area polygon')"
    colours = browser.evaluate(f"[...{lines}].map(each => getComputedStyle(each).stroke)")
    assert "none" not in colours and len(set(colours)) >= 3


def test_light_and_dark_are_legible(browser, pages):
    """All text on cards has the contrast that WCAG asks for, 4.5."""
    code = """(() => {
      const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(v =>
        (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const card = light(getComputedStyle(document.querySelector('.card')).backgroundColor);
      return [...document.querySelectorAll('.card p, .card td, .card th, .card h3, svg text')].map(each => {
        const style = getComputedStyle(each), ink = light(each.closest('svg') ? style.fill : style.color);
        return (Math.max(ink, card) + 0.05) / (Math.min(ink, card) + 0.05); }); })()"""
    papers = set()
    for dark in (False, True):
        browser.open(pages["plain"], dark=dark)
        contrasts = browser.evaluate(code)
        assert len(contrasts) > 100 and min(contrasts) >= 4.5
        papers.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2


def place_of(browser, title: str, share: float) -> tuple[float, float]:
    """Where a share of the width of a plot is, after scrolling there."""
    found = browser.evaluate(
        f"(() => {{ const svg = document.querySelector('svg[aria-label=\"{title}\"]'); "
        "svg.scrollIntoView({block: 'center'}); const box = svg.getBoundingClientRect(); "
        "const scale = box.width / svg.viewBox.baseVal.width; "
        "return [box.left + scale * +svg.dataset.left, box.left + scale * +svg.dataset.right, "
        "(box.top + box.bottom) / 2]; })()"
    )
    left, right, y = found
    return left + share * (right - left), y


def tip(browser) -> str:
    # The scrolling before may hide it once more.
    browser.evaluate(
        "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )
    shown = "(tip => tip.hidden ? '' : tip.innerText)(document.getElementById('tip'))"
    return " ".join(browser.evaluate(shown).split())


@pytest.mark.parametrize("width", [400, 1200])
def test_pointing_at_a_chart_shows_its_values(browser, pages, width):
    browser.open(pages["plain"], width)
    place = place_of(browser, "Loss", 0.5)
    tip(browser)
    browser.point(*place)
    loss = f"{LN2 - 0.15:.4f}"
    assert tip(browser) == f"step 5 train {loss} eval {loss}"
    box = browser.evaluate(
        "(b => [b.left, b.right])(document.getElementById('tip').getBoundingClientRect())"
    )
    assert box[0] >= 0 and box[1] <= width
    cursors = browser.evaluate(
        "[...document.querySelectorAll('.cursor')].filter(each => +each.getAttribute('x1') > 0).length"
    )
    assert cursors > 8  # all charts over steps show the same one
    browser.point(1, 1)
    assert tip(browser) == ""


def test_percents_and_bins_are_told_as_such(browser, pages):
    browser.open(pages["plain"])
    place = place_of(browser, "Accuracy", 1.0)
    tip(browser)
    browser.point(*place)
    assert tip(browser) == "step 10 train 80 % eval 80 %"
    place = place_of(browser, "Prompt length", 0.3)
    tip(browser)
    browser.point(*place)
    assert tip(browser) == "4 to 7 prompt 3 (30 %)"


def test_arrow_keys_walk_over_a_chart(browser, pages):
    browser.open(pages["plain"])
    browser.evaluate("document.querySelector('svg[aria-label=\"Loss\"]').focus()")
    tip(browser)
    browser.press("ArrowLeft")
    assert tip(browser).startswith("step 10 ")
    for _ in range(12):
        browser.press("ArrowLeft")
    assert not tip(browser).startswith("step 10 ")
    browser.press("Escape")
    assert tip(browser) == ""


def test_buttons_hide_runs_and_kinds(browser, pages):
    browser.open(pages["several"])
    shown = "[...document.querySelectorAll('svg[aria-label=\"Loss\"] .curve:not(.off)')].length"
    before = browser.evaluate(shown)
    assert before == 5  # the last run was not evaluated
    buttons = "document.querySelectorAll('.chips button')"
    browser.evaluate(f"{buttons}[0].click()")
    assert browser.evaluate(shown) == 3
    browser.evaluate(f"[...{buttons}].at(-1).click()")
    assert browser.evaluate(shown) == 2
    browser.evaluate(f"[...{buttons}].at(-1).click(), {buttons}[0].click()")
    assert browser.evaluate(shown) == before
    place = place_of(browser, "Loss", 0.5)
    tip(browser)
    browser.point(*place)
    assert "<script>window.ran=1" in tip(browser)  # the name of a run, as text
    assert browser.errors == [] and browser.evaluate("typeof window.ran") == "undefined"


def test_the_page_would_not_run_a_script_that_got_in(browser, pages, tmp_path):
    """The policy of the page names our script by its hash; this one is let in by hand."""
    page = tmp_path / "page.html"
    page.write_text(
        pages["plain"].read_text().replace("</main>", "<script>window.ran=1</script></main>")
    )
    browser.open(page)
    assert browser.evaluate("typeof window.ran") == "undefined"
    assert any("Content Security Policy" in error for error in browser.errors)
    browser.errors.clear()
