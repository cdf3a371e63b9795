"""The journal of finished pieces: what has no end does not count, and everybody's files are read."""

from __future__ import annotations

from dpo_fast.rounds.journal import Journal


def test_lines_of_all_ranks_count_and_torn_ones_do_not(tmp_path):
    ranks = [Journal(tmp_path, "work", rank) for rank in (0, 1)]
    for number in range(4):
        ranks[number % 2].append(number, {"text": f"line\n{number} \u2028"})
    for each in ranks:
        each.close()
    Journal(tmp_path, "other", 0).append(9, None)
    with (tmp_path / "work-00001.jsonl").open("a") as file:
        file.write('{"number": 7, "content": "half of i')
    again = Journal(tmp_path, "work", 1)
    assert again.numbers() == {0, 1, 2, 3}
    again.append(5, "new")
    assert dict(again.read()) == {n: {"text": f"line\n{n} \u2028"} for n in range(4)} | {5: "new"}


def test_what_a_power_cut_damaged_is_passed_over(tmp_path):
    journal = Journal(tmp_path, "work", 0)
    for number in range(3):
        journal.append(number, "x" * 9)
    journal.close()
    file = tmp_path / "work-00000.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b"\0" * 30 + b"\n" + b'[1]\n3\n{"number": 4}\n' + lines[2])
    assert journal.numbers() == {0, 2}


def test_a_file_of_one_torn_line_holds_nothing(tmp_path):
    (tmp_path / "work-00000.jsonl").write_bytes(b'{"number"')
    assert Journal(tmp_path, "work", 0).numbers() == set()
    assert Journal(tmp_path / "none", "work", 0).numbers() == set()
