"""The documentation site: it builds strictly, needs no network, and its pages tell the truth."""

import ast
import json
import os
import re
import subprocess
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import yaml

import dpo_fast
from tests.support.browser import CHROMIUM, Browser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
HOME = ROOT / "build/site-env"  # made by `make site` and .ci/run
needs_mkdocs = pytest.mark.skipif(
    not (HOME / ".installed").exists(), reason="needs MkDocs: make build/site-env/.installed"
)
# What the theme would fetch from elsewhere in old browsers and for diagrams, neither of which is asked for.
UNASKED = ("https://unpkg.com/resize-observer-polyfill", "https://unpkg.com/mermaid")

FIRST_FOUND = """(async () => {
  for (let tries = 0; tries < 300; tries++) {
    const link = document.querySelector(".md-search-result__item a");
    if (link && link.href.includes("h=simpo")) return link.href;
    await new Promise((done) => setTimeout(done, 100));
  }
})()"""  # the address of the first result for the whole word


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [HOME / "bin/python", "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    # A proxy that is not there: a build that asked the network for anything would fail.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}
    environment.pop("PYTHONPATH", None)  # pages are made without importing the code
    built = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    # With --quiet MkDocs would not count its warnings, and --strict would mean nothing.
    assert built.returncode == 0 and "Documentation built" in built.stderr, built.stderr
    return folder


@needs_mkdocs
@pytest.mark.processes
def test_links_and_anchors_of_the_site_lead_somewhere(site):
    """Of the pages as they are, menus and API included; and nothing is fetched from elsewhere."""
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    links = 0
    for page, text in pages.items():
        for kind, address in re.findall(r'<(?!a\b)\w+\b[^>]*?\b(src|href)="([^"]+)"', text):
            assert not address.startswith(("http:", "https:", "//")), (page, kind, address)
        for address in re.findall(r'<(?:a|img|link|script)\b[^>]*?\b(?:src|href)="([^"]+)"', text):
            target, anchor = urldefrag(unquote(unescape(address)))
            if re.match(r"[a-z]+:", target) or page.name == "404.html":
                continue
            place = (page.parent / target).resolve() if target else page
            place = place / "index.html" if place.is_dir() else place
            assert place.exists(), f"{page.relative_to(site)} links to {address}"
            links += 1
            if anchor and place in anchors and not anchor.startswith("__"):
                assert anchor in anchors[place], f"{page.relative_to(site)} links to {address}"
    assert len(pages) > 30 and links > 1000


@needs_mkdocs
@pytest.mark.processes
def test_scripts_and_styles_of_the_site_are_its_own(site):
    files = [*site.rglob("*.js"), *site.rglob("*.css")]
    for file in files:
        text = "" if file.name == "search_index.js" else file.read_text(encoding="utf-8")
        hosts = r"unpkg\.com|cdn[\w.-]*|[\w.-]*jsdelivr\.net|fonts\.[\w.]+|polyfill\.[\w.]+"
        asked = re.findall(rf"https?://(?:{hosts})[^\"'`)\s]*", text)
        assert not [each for each in asked if not each.startswith(UNASKED)], (file, asked)
    assert len(files) > 5


@needs_mkdocs
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.processes
def test_the_search_works_where_pages_are_opened_as_files(site):
    browser = Browser()
    try:
        browser.send("Network.enable")
        browser.open(site / "CHOOSING_A_LOSS.html")
        browser.evaluate("document.querySelector('[data-md-component=search-query]').focus()")
        for letter in "simpo":
            browser.send("Input.dispatchKeyEvent", type="keyDown", text=letter, key=letter)
            browser.send("Input.dispatchKeyEvent", type="keyUp", key=letter)
        found = browser.evaluate(FIRST_FOUND)
        asked = [e["request"]["url"] for e in browser.events if "request" in e]
    finally:
        browser.close()
    assert found and "/LOSSES.html?h=simpo" in found and not browser.errors
    assert len(asked) > 10 and all(url.startswith(("file:", "data:")) for url in asked)


@needs_mkdocs
@pytest.mark.processes
def test_the_search_has_every_page_of_the_menu(site):
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    found = {urldefrag(each["location"])[0] for each in index["docs"]}
    for place in menu():
        page = place.replace(".md", ".html")
        assert {page, page.replace("README", "index")} & found, place
    for notebook in DOCS.glob("notebooks/*.ipynb"):
        assert f"notebooks/{notebook.stem}.html" in found
    texts = {each["location"]: each["text"] for each in index["docs"]}
    assert "SimPO" in texts["LOSSES.html#simpo"]
    # Pages open as files too: then the index is a script.
    script = (site / "search/search_index.js").read_text(encoding="utf-8")
    assert script.startswith("var __index = ")


@needs_mkdocs
@pytest.mark.processes
def test_the_api_page_has_every_public_name_with_its_fields_as_lists(site):
    page = (site / "API.html").read_text(encoding="utf-8")
    for name in set(dpo_fast.__all__) - {"__version__"}:
        assert re.search(rf'<h3 id="dpo_fast[\w.]*\.{name}"', page), name
    assert re.search(r"<li>\s*(<p>)?<strong>train_dataset, eval_dataset</strong>:", page)


def menu() -> list[str]:
    """Pages of the navigation in mkdocs.yml."""

    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        entries = entry.values() if isinstance(entry, dict) else entry
        return [page for each in entries for page in pages(each)]

    return pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])


def test_the_menu_has_every_page():
    places = menu()
    assert len(places) == len(set(places))
    own = {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")}
    assert own == {place for place in places if not place.startswith(("repository/", "index.md"))}
    for place in places:
        outside = place.removeprefix("repository/")
        assert place == "index.md" or outside == place or (ROOT / outside).is_file()


def test_the_site_is_installed_as_the_extra_says():
    extra = re.search(r"^docs = (\[.+\])$", (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    names = {re.split(r"[><=,]", need)[0] for need in ast.literal_eval(extra)}
    installed = re.search(
        r"constraints.txt (mkdocs-material.+)$", (ROOT / "Makefile").read_text(), re.M
    )
    assert {name.strip('"') for name in installed.group(1).split()} == names
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    assert {re.sub(r"\[.+\]", "", name) for name in names} <= set(pinned)


RUN = {"model": {"path": "m"}, "data": {"train": "rows.jsonl"}, "train": {"output_dir": "runs/m"}}
MISTAKES = [
    {"train": {"per_device_train_batch_size": 4}},
    {"loss": {"type": "dpo"}},
    {"loss": {"simpo_gamma": 1.0}},
    {"reference": {"provider": "none"}},
    {"reference": {"provider": "adapter_off"}},
    {"loss": {"type": "exo_pair"}},
    {"data": {"streaming": True}},
    {
        "train": {"load_best_model_at_end": True, "save_steps": 30, "eval_steps": 20},
        "data": {"eval_rows": 9},
    },
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: json.dumps(mistake)[:50])
def test_messages_on_the_page_of_troubles_are_what_is_said(mistake):
    from dpo_fast.training.config import build_config

    tree = {name: {**RUN.get(name, {}), **mistake.get(name, {})} for name in {*RUN, *mistake}}
    with pytest.raises(dpo_fast.UserError) as error:
        build_config(tree, "run.yaml")
    assert any(message in str(error.value) for message in messages()), error.value


def messages() -> list[str]:
    return re.findall(r"^### `(.+)`$", (DOCS / "TROUBLESHOOTING.md").read_text(), re.M)


ROWS = [  # of each a message on the page of troubles
    {"prompt": "a", "good": "b", "rejected": "c"},
    {"prompt": "a b", "history": "some words", "chosen": "b", "rejected": "c"},
    {"prompt": "a", "chosen": "b", "rejected": "b"},
]


def test_messages_of_data_and_runs_on_that_page_are_what_is_said(tmp_path):
    from dpo_fast.data.config import DataConfig
    from dpo_fast.data.dataset import load_examples
    from dpo_fast.training.config import build_config
    from dpo_fast.training.earlier_run import check_earlier_run
    from tests.support.tokenizers import byte_tokenizer

    said = []
    for row in ROWS:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        config = DataConfig(train=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
        with pytest.raises(dpo_fast.UserError) as error:
            load_examples(config, byte_tokenizer(), split="train")
        said.append(str(error.value))
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6/state.json").write_text("{}")
    tree = RUN | {"train": {"output_dir": str(tmp_path)}}
    with pytest.raises(dpo_fast.UserError) as error:
        check_earlier_run(build_config(tree, "run.yaml"))
    said.append(str(error.value).replace(str(tmp_path), "runs/first"))
    of_data = messages()[len(MISTAKES) :]
    for message in of_data:
        assert any(message in text for text in said), message
    assert len(of_data) >= 5 and all(any(m in text for m in of_data) for text in said)


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


def test_python_of_the_first_pages_runs(tmp_path, monkeypatch):
    """What writes rows and what draws a loss; the rows are pairs of chats."""
    from dpo_fast.data.config import DataConfig
    from dpo_fast.data.rows import PairRow, parse_row
    from dpo_fast.losses.custom import CUSTOM

    monkeypatch.chdir(tmp_path)
    (rows, *_), (drawing,) = python_blocks("QUICKSTART.md"), python_blocks("CHOOSING_A_LOSS.md")
    exec(compile(rows, "QUICKSTART.md", "exec"), {})
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
    config = DataConfig(train="pairs.jsonl")
    parsed = [parse_row("pairs.jsonl:1", json.loads(line), config) for line in lines]
    assert len(set(lines)) == 400 and all(isinstance(row, PairRow) for row in parsed)
    try:
        exec(compile(drawing, "CHOOSING_A_LOSS.md", "exec"), {})
    finally:
        CUSTOM.pop("cautious", None)
    assert "<svg" in (tmp_path / "cautious.svg").read_text()


def test_the_first_run_from_python_has_options_that_there_are():
    from dpo_fast.api.options import tree_of
    from dpo_fast.training.config import build_config

    (call,) = (
        node
        for node in ast.walk(ast.parse(python_blocks("QUICKSTART.md")[-1]))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "PreferenceRun"
    )
    given = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
    lora, rows = given.pop("peft_config"), given.pop("train_dataset")
    tree = tree_of({"model": {"path": "m", "lora": lora}, "data": {"train": rows}}, given)
    assert build_config(tree, "here").train.max_steps == 20
