"""What MkDocs is told beyond mkdocs.yml: pages and pictures that lie outside of docs/, and notebooks.

A link out of docs/ leads to the copy of its target under `repository/`, so pages read the same in a
checkout, on a code host and in the site. Files that are no pages or pictures are shown as text.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from pathlib import Path
from urllib.parse import quote

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def on_config(config):
    """Notebooks that there are stand in the menu behind the first pages."""
    pages = [{title_of(each): page_of(each)} for each in notebooks()]
    if pages:
        config.nav.insert(2, {"Notebooks": pages})
    return config


def on_files(files, config):
    """Add README as the first page, what the pages link to outside of docs/, and the notebooks."""
    wanted = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    wanted += [ROOT / name / "README.md" for name in ("benchmarks", "csrc", "kernels")]
    pages = [*wanted, *DOCS.glob("*.md")]
    for page in pages:
        wanted += [target for target in links_of(page) if not target.is_relative_to(DOCS)]
    for target in dict.fromkeys(wanted):
        files.append(file_of(target, config))
    for notebook in notebooks():
        files.append(File.generated(config, page_of(notebook), content=markdown_of(notebook)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that lead out of docs/ are turned to the copies."""
    source = source_of(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def turned(match: re.Match) -> str:
        target = (source.parent / match[2]).resolve()
        if not target.is_file():
            return match[0]  # MkDocs warns of it, and the build is strict
        place = posixpath.relpath(place_of(target), here or ".")
        return f"{match[1]}{quote(place)}{match[3] or ''}{match[4]}"

    return LINK.sub(turned, markdown)


def links_of(page: Path) -> list[Path]:
    """Files that a page links to."""
    found = LINK.finditer(page.read_text(encoding="utf-8"))
    targets = [(page.parent / match[2]).resolve() for match in found]
    return [target for target in targets if target.is_file()]


def place_of(target: Path) -> str:
    """Where a file of the repository stands in the site's sources."""
    if target == ROOT / "README.md":
        return "index.md"
    if target in notebooks():
        return page_of(target)
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    place = f"repository/{target.relative_to(ROOT).as_posix()}"
    return place if target.suffix in SHOWN else f"{place}.md"


SHOWN = (".md", ".svg", ".png")  # as they are; all else as text on a page


def source_of(place: str) -> Path:
    """The file of the repository that stands at this place."""
    if place == "index.md":
        return ROOT / "README.md"
    if place.startswith("repository/"):
        inside = ROOT / place.removeprefix("repository/")
        return inside if inside.is_file() else inside.with_suffix("")
    return DOCS / place


def file_of(target: Path, config) -> File:
    place = place_of(target)
    if target.suffix in SHOWN:
        return File.generated(config, place, abs_src_path=str(target))
    name = target.relative_to(ROOT).as_posix()
    language = {".yaml": "yaml", ".py": "python"}.get(target.suffix, "text")
    content = f"# {name}\n\n````{language}\n{target.read_text(encoding='utf-8')}\n````\n"
    apart = InclusionLevel.NOT_IN_NAV  # reached by the links of pages alone
    return File.generated(config, place, content=content, inclusion=apart)


def notebooks() -> list[Path]:
    return sorted((DOCS / "notebooks").glob("*.ipynb"))


def page_of(notebook: Path) -> str:
    return notebook.relative_to(DOCS).with_suffix(".md").as_posix()


def title_of(notebook: Path) -> str:
    """The first heading of its text."""
    return re.search(r"^# (.+)$", markdown_of(notebook), re.M)[1]


def markdown_of(notebook: Path) -> str:
    """Markdown of a notebook: its texts, its code, and what the code showed where that is stored."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(f"````python\n{source}\n````")
            parts += [text for output in cell["outputs"] if (text := shown(output))]
    name = os.path.relpath(notebook, ROOT)
    return "\n\n".join([*parts, f"This page is the notebook `{name}`.", ""])


def shown(output: dict) -> str:
    """One output of a cell."""
    data = output.get("data", {})
    if "image/svg+xml" in data:
        return "".join(data["image/svg+xml"])
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f"![output](data:image/png;base64,{picture})"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"````text\n{text.rstrip()}\n````" if text.strip() else ""
