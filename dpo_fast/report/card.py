"""The curves of a run as pictures in the card of its model."""

from __future__ import annotations

from pathlib import Path

from dpo_fast.durable import write_file, writing
from dpo_fast.report.chart import HEIGHT, WIDTH, draw
from dpo_fast.report.panels import LEARNING, marks, panels
from dpo_fast.report.read import MODEL, read_run
from dpo_fast.report.style import STYLE
from dpo_fast.training.model_card import CARD, END_OF_PICTURES, PICTURES

FOLDER = "curves"  # in the folder of the model
MOST = 6
SVG = '<svg xmlns="http://www.w3.org/2000/svg" '


def illustrate(run_dir: Path) -> Path | None:
    """Draw the curves of a run into the card of its model; returns the card, None where there is none.

    A second call draws them anew.

    Raises:
        UserError: metrics.jsonl cannot be read, or the folder not be written.
    """
    folder = run_dir / MODEL
    file = folder / CARD
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    before, found, rest = text.partition(PICTURES)
    _, ended, after = rest.partition(END_OF_PICTURES)
    if not (found and ended):
        return file  # somebody has written it anew
    run = read_run(run_dir)
    drawn = panels([run], LEARNING)[:MOST]
    lines = []
    with writing(folder, "The model is as it was: make room, and call `dpo-fast report` again"):
        (folder / FOLDER).mkdir(exist_ok=True)
        for panel in drawn:
            name = f"{FOLDER}/{_file_name(panel.title)}.svg"
            write_file(folder / name, picture(draw(panel, run.last_step, marks(run))))
            lines.append(f"![{panel.title}]({name})")
        told = "\n## Curves\n\n" + "\n".join(lines) + "\n" if lines else "\n"
        write_file(file, f"{before}{PICTURES}{told}{END_OF_PICTURES}{after}")
    return file


def picture(inline: str) -> str:
    """A chart of the page as a file of its own: with its styles, a size and a ground."""
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="var(--card)"/>'
    head, close, rest = inline.partition(">")
    head = head.replace("<svg ", f'{SVG}width="{WIDTH}" height="{HEIGHT}" ', 1)
    return f"{head}{close}<style>{STYLE}</style>{ground}{rest}\n"


def _file_name(title: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in title.lower())
    return "-".join(words.split())
