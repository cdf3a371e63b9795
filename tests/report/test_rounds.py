"""The page of `iterate` over its rounds: the same prompts before and after each, and their curve."""

import json
import re

from dpo_fast.report import write_comparison
from tests.support.run_folder import make, usual

SCORES = {"stage-1": (1.0, 2.0), "stage-2": (2.0, 3.5)}
WINS = {
    "stage-1": {"win_rate_start": 0.75},
    "stage-2": {"win_rate_start": 0.6, "win_rate_first": 0.9},
}


def line(step: int, texts: list[str], **metrics) -> str:
    answers = [
        {"where": f"p:{n}", "prompt": f"question {n}", "chosen": "right", "greedy": {"text": text}}
        for n, text in enumerate(texts)
    ]
    return json.dumps({"step": step, "asked": "x", "metrics": metrics, "answers": answers})


def write(tmp_path, prompts: int = 2):
    """Two stages. The second answer changes in every round, the first stays as it was."""
    folders = []
    for number, (name, (before, after)) in enumerate(SCORES.items()):
        (tmp_path / name / "train").mkdir(parents=True)
        folder = make(tmp_path / name / "train", usual(), log={"run_name": name})
        same = ["stays"] * (prompts - 1)
        (folder / "generations.jsonl").write_text(
            line(0, [*same, f"answer {number}"], score=before)
            + "\n"
            + line(10, [*same, f"answer {number + 1}"], score=after, **WINS[name])
            + "\n"
        )
        folders.append(folder)
    return folders


def test_the_same_prompts_before_and_after_each_round(tmp_path):
    page = write_comparison(write(tmp_path), rounds=True).read_text()
    section = page[page.index("<h2>Answers</h2>") :]
    rows = re.findall(r"<tr>(.*?)</tr>", section[: section.index("</table>")])
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]
    assert len(cells) == 4 and cells[1][:2] == ["before", "1.000"], cells
    assert [row[0] for row in cells[2:]] == ["stage-1", "stage-2"]
    assert [row[1] for row in cells[1:]] == ["1.000", "2.000", "3.500"]
    assert (cells[2][2], cells[3][3]) == ("75 %", "90 %")
    first = section[section.index("<article") :]
    card = first[: first.index("</article>")]
    assert "question 1" in card  # what changed comes first
    assert re.findall(r"answer \d", card) == ["answer 0", "answer 1", "answer 2"]
    assert "question 0" in first and "stays" in first


def test_the_curve_has_a_point_before_and_after_each_round(tmp_path):
    page = write_comparison(write(tmp_path), rounds=True).read_text()
    section = page[page.index("Answers, round by round") :]
    score, wins = section.split("<figure")[1:3]
    assert "<h3>Score</h3>" in score and "<h3>Wins</h3>" in wins
    assert score.count("<circle") == wins.count("<circle") == 3
    assert ">round<" in score


def test_runs_that_are_no_rounds_have_no_such_section(tmp_path):
    folders = write(tmp_path)
    assert "round by round" not in write_comparison(folders).read_text()
    for folder in folders:
        (folder / "generations.jsonl").unlink()
    assert "round by round" not in write_comparison(folders, rounds=True).read_text()


def test_a_run_with_other_prompts_is_left_out(tmp_path):
    folders = write(tmp_path)
    other = (folders[1] / "generations.jsonl").read_text().replace("question", "riddle")
    (folders[1] / "generations.jsonl").write_text(other)
    page = write_comparison(folders, rounds=True).read_text()
    section = page[page.index("<h2>Answers</h2>") :]
    assert section[: section.index("</table>")].count("<tr>") == 3
    assert "riddle" not in section
