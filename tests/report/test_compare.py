"""Several runs on one page: results, what differs, colours and names."""

import re

import pytest

from dpo_fast.errors import UserError
from dpo_fast.report import write_comparison
from dpo_fast.report.compare import MOST_RUNS, flatten
from dpo_fast.report.style import STYLE
from tests.support.run_folder import HOSTILE, make, train_line, usual, write_examples, write_facts


@pytest.fixture
def pair(tmp_path):
    """Two runs that differ in beta, in what was evaluated and in the version of torch."""
    for name, beta, torch in (("a", 0.1, "2.10.0"), ("b", 0.3, "2.11.0")):
        (tmp_path / name).mkdir()
        lines = [line | ({"eval_loss": beta} if "eval_loss" in line else {}) for line in usual()]
        train = {"output_dir": name, "learning_rate": 5e-7}
        options = {"loss": {"type": "sigmoid", "beta": beta}, "log": {"run_name": f"run {name}"}}
        make(tmp_path / name, lines, train=train, **options)
        write_facts(tmp_path / name, 0, versions={"torch": torch})
        write_examples(tmp_path / name)
    return [tmp_path / "a", tmp_path / "b"]


def source_of(folders) -> str:
    return write_comparison(folders).read_text(encoding="utf-8")


def texts(source: str) -> str:
    body = re.sub(r"<(style|script)>.*?</\1>", "", source, flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_the_page_lies_beside_the_first_run_or_where_it_is_asked_for(pair, tmp_path):
    assert write_comparison(pair) == tmp_path / "comparison.html"
    assert write_comparison(pair, tmp_path / "new/page.html").is_file()
    assert write_comparison(pair, tmp_path / "new") == tmp_path / "new/comparison.html"


def test_results_stand_in_a_table_and_the_best_stand_out(pair):
    source = source_of(pair)
    assert "<b>0.1000</b>" in source and "<b>0.3000</b>" not in source  # of the losses
    assert "run a " in texts(source) and "10, stopped" in texts(source)
    assert "80 %" in texts(source)


def test_what_differs_is_a_row_and_nothing_else(pair):
    text = texts(source_of(pair))
    rows = text[text.index("What differs") : text.index("Are they learning?")]
    assert "loss.beta 0.1 0.3" in rows and "torch 2.10.0 2.11.0" in rows
    assert "learning_rate" not in rows and "output_dir" not in rows and "run_name" not in rows


def test_runs_alike_are_said_to_be(pair):
    (pair[1] / "config.yaml").write_text((pair[0] / "config.yaml").read_text())
    (pair[1] / "run.json").write_text((pair[0] / "run.json").read_text())
    text = texts(source_of(pair))
    assert "Configurations, versions and machines are the same." in text
    assert f"run a ({pair[0]})" in text and f"run a ({pair[1]})" in text  # one name, two runs


def test_every_panel_has_both_runs(pair):
    source = source_of(pair)
    for title in ("Loss", "Accuracy", "Chosen reward", "Margins of held-out pairs"):
        picture = source[source.index(f'aria-label="{title}"') :]
        picture = picture[: picture.index("</svg>")]
        assert 'data-name="run a"' in picture and 'data-name="run b"' in picture, title
        assert "run-0" in picture and "run-1" in picture


def test_losses_of_other_objectives_and_other_evaluations_are_not_ranked(pair):
    make(pair[1], usual(), loss={"type": "ipo"}, data={"eval_rows": 9})
    source = source_of(pair)
    assert "<b>0.1000</b>" not in source
    assert "The objectives differ" in source and "data.eval_rows differ" in source


def test_a_run_without_evaluation_has_dashes(pair):
    make(pair[1], [train_line(step) for step in (1, 2)])
    text = texts(source_of(pair))
    assert "Not every run was evaluated." in text and "\N{EN DASH}" in text


def test_names_of_runs_stay_text(pair):
    make(pair[1], usual(), log={"run_name": HOSTILE})
    source = source_of(pair)
    assert "<img" not in source and source.count("<script") == 1 and source.count("&lt;img") > 5


def test_one_run_twice_and_too_many_are_refused(pair, tmp_path):
    with pytest.raises(UserError, match="a is named 2 times"):
        write_comparison([pair[0], pair[1], tmp_path / "b/../a"])
    many = [tmp_path / str(index) for index in range(MOST_RUNS + 1)]
    for folder in many:
        folder.mkdir()
        make(folder, [train_line(1)])
    with pytest.raises(UserError, match=f"name {MOST_RUNS} at most"):
        write_comparison(many)
    source = source_of(many[:-1])
    tones = re.findall(r'data-run="[^"]*"><i class="swatch ([^"]*)"', source)
    assert len(set(tones)) == MOST_RUNS
    for tone in {name for each in tones for name in each.split()} - {"dashed-0"}:
        assert f".{tone} " in STYLE


def test_leaves_of_a_configuration_by_their_path():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
