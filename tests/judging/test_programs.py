"""Judges that are programs: rules and commands, with all that may go wrong in them."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import pytest

from dpo_fast.errors import UserError
from dpo_fast.judging.child import Child, Lost
from dpo_fast.judging.programs import CommandJudge, RuleJudge, command_identity, rule_identity
from dpo_fast.judging.rule_worker import Rule, load
from dpo_fast.judging.samples import SampleRow
from tests.support.judging import row, section, write_code

pytestmark = pytest.mark.processes
ANSWERING = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    {}
    print(json.dumps({{"score": len(asked["completion"])}}))
"""
CHAT = [{"role": "user", "content": "q"}]


def command(folder, code: str, **options) -> CommandJudge:
    program = write_code(folder / "judge.py", code)
    options = {"max_retries": 0, "timeout_seconds": 20} | options
    return CommandJudge(section(type="command", command=[sys.executable, str(program)], **options))


def rule(folder, code: str, name="score", **options) -> RuleJudge:
    write_code(folder / "rules.py", code)
    options = {"max_retries": 0, "timeout_seconds": 20} | options
    return RuleJudge(section(type="rule", function=f"{folder}/rules.py:{name}", **options))


def verdicts(judge, *rows: SampleRow) -> list[list]:
    """Scores; of those without one the word and the reason."""
    try:
        found = [judged for chunk in judge([each] for each in rows) for judged in chunk]
    finally:
        judge.close()
    return [
        [v.score if v.word == "scored" else (v.word, v.why) for v in judged.verdicts]
        for judged in found
    ]


def test_a_command_answers_line_after_line(tmp_path):
    code = ANSWERING.format("assert asked['prompt'] == 'q' and asked['id'] == 3")
    judge = command(tmp_path, code)
    assert verdicts(judge, row("a", "ccc", id=3), row("dd", id=3)) == [[1, 3], [2]]


def test_what_python_prints_comes_at_once(tmp_path, monkeypatch):
    """Into a pipe it would come when there is much of it."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    judge = command(tmp_path, ANSWERING.format("pass"), timeout_seconds=5)
    assert verdicts(judge, row("a", "bb")) == [[1, 2]]


def test_several_processes_answer_in_the_order_of_the_rows(tmp_path):
    code = ANSWERING.format("import time; time.sleep(0.1 * (len(asked['completion']) == 1))")
    rows = [row("a" * (index % 3 + 1)) for index in range(12)]
    judge = command(tmp_path, code, concurrency=3)
    assert verdicts(judge, *rows) == [[index % 3 + 1] for index in range(12)]


def test_a_process_for_every_line(tmp_path):
    code = """
    import json, sys
    asked = json.load(sys.stdin)  # to the end, which a process that lives on would never see
    print(json.dumps({"score": len(asked["completion"])}), end="")
    """
    assert verdicts(command(tmp_path, code, keep_alive=False), row("a", "bb")) == [[1, 2]]


def test_a_row_at_a_time(tmp_path):
    code = """
    import json, sys
    for line in sys.stdin:
        asked = json.loads(line)
        scores = [len(each) or None for each in asked["completions"]]
        print(json.dumps({"scores": scores[: len(asked["prompt"])]}))
    """
    judge = command(tmp_path, code, unit="row")
    found = verdicts(judge, row("a", "", prompt="qq"), row("a", "b", prompt="q"))
    assert found[0] == [1, ("refused", "null")]
    assert found[1][0][0] == "unparsable" and "is no list of 2 scores" in found[1][0][1]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("null", ("refused", "null")),
        ('{"score": null}', ("refused", "null")),
        ("2.5", 2.5),
        ("true", 1.0),
        ('{"score": "7"}', ("unparsable", "'7' is no number")),
        ('{"score": NaN}', ("unparsable", "nan is not finite")),
        ('{"score": 1e999}', ("unparsable", "inf is not finite")),
        ('{"points": 1}', ("unparsable", """'{"points": 1}' has no 'score'""")),
        ('{"error": "no key"}', ("failed", "no key")),
        ("loading weights...", ("unparsable", "'loading weights...' is no JSON")),
        ("", ("unparsable", "'' is no JSON")),
    ],
)
def test_answers_that_are_no_score(tmp_path, answer, found):
    code = f"import sys\nfor line in sys.stdin:\n    print({answer!r})\n"
    assert verdicts(command(tmp_path, code), row("a")) == [[found]]


def test_lines_that_are_no_answers_do_not_shift_the_answers(tmp_path):
    """A log line before every third answer: what comes after it belongs to the line before."""
    code = ANSWERING.format("if asked['completion'] == 'bb': print('a log line')")
    found = verdicts(command(tmp_path, code), row("a", "bb", "ccc", "dddd"))
    assert found == [[1, ("unparsable", "'a log line' is no JSON"), 3, 4]]


def test_a_crash_is_told_with_what_was_said_and_the_rest_is_judged(tmp_path):
    code = ANSWERING.format("if 'x' in asked['completion']: raise KeyError('no such thing')")
    found = verdicts(command(tmp_path, code), row("a", "x", "bb"))
    assert found[0][0] == 1 and found[0][2] == 2
    word, why = found[0][1]
    assert word == "failed" and "it ended with code 1 and no answer" in why
    assert "KeyError: 'no such thing'" in why


def test_a_crash_is_tried_again(tmp_path):
    flag = tmp_path / "flag"
    code = ANSWERING.format(
        f"import os; p = {str(flag)!r}; n = os.path.exists(p); open(p, 'w'); n or os.abort()"
    )
    judge = command(tmp_path, code, max_retries=1)
    assert verdicts(judge, row("a", "bb")) == [[1, 2]]


def test_a_signal_is_named(tmp_path):
    found = verdicts(
        command(tmp_path, ANSWERING.format("import os; os.kill(os.getpid(), 9)")), row("a")
    )
    assert "it was killed by SIGKILL" in found[0][0][1]


def test_what_takes_too_long_is_ended_with_what_it_started(tmp_path):
    file = tmp_path / "pid"
    code = ANSWERING.format(
        f"""
    if asked["completion"] == "x":
        import subprocess, time
        open({str(file)!r}, "w").write(str(subprocess.Popen(["sleep", "60"]).pid))
        time.sleep(60)
    """
    )
    start = time.monotonic()
    found = verdicts(command(tmp_path, code, timeout_seconds=2), row("x", "bb"))
    assert time.monotonic() - start < 20
    assert found[0][1] == 2
    word, why = found[0][0]
    assert word == "failed" and "it took longer than judge.timeout_seconds" in why
    assert "It must answer each line with one line, and flush it" in why
    for _ in range(100):
        state = Path(f"/proc/{file.read_text()}/stat")
        if not state.exists() or " Z " in state.read_text():
            return
        time.sleep(0.05)
    raise AssertionError("what the judge had started goes on")


def test_a_judge_that_never_answers_ends_the_command_with_the_reason(tmp_path):
    judge = command(tmp_path, "raise SystemExit('no weights')", max_failures=4)
    with pytest.raises(UserError) as error:
        verdicts(judge, *(row("a", "b", place=place) for place in range(9)))
    said = str(error.value)
    assert "judge.type=command failed 4 times in a row (judge.max_failures=4)" in said
    assert "at last for samples.jsonl:2: it ended with code 1" in said and "no weights" in said


def test_a_program_that_is_not_there(tmp_path):
    judge = CommandJudge(section(type="command", command="/no/such/judge -x"))
    with pytest.raises(
        UserError, match=r"judge\.command: /no/such/judge cannot be started: No such"
    ):
        verdicts(judge, row("a"))


def test_long_texts_go_both_ways(tmp_path):
    """More than a pipe holds, while the other side writes as much before it reads."""
    code = """
    import sys, json
    for line in sys.stdin:
        sys.stderr.write("e" * 300_000)
        print(json.dumps({"score": len(line), "why": "w" * 300_000}))
    """
    ((score,),) = verdicts(command(tmp_path, code), row("a" * 400_000))
    assert score > 400_000


def test_a_program_that_closes_its_output(tmp_path):
    code = "import os, time\nos.close(1)\ntime.sleep(60)\n"
    found = verdicts(command(tmp_path, code), row("a"))
    assert "it closed its standard output without an answer" in found[0][0][1]


def test_another_file_makes_another_command(tmp_path):
    judge = command(tmp_path, "pass")
    before = command_identity(judge.section)
    write_code(tmp_path / "judge.py", "pass  # edited")
    assert (
        command_identity(judge.section)
        != before
        == command_identity(judge.section) | {"files": before["files"]}
    )


def test_a_child_that_is_not_used_is_not_started():
    child = Child(["/no/such"], "judge.command")
    child.close()
    assert not child.running
    quiet = Child(["sleep", "9"], "judge.command")
    with pytest.raises(Lost, match="took longer"):
        quiet.ask("x", 0.2)
    assert not quiet.running


RULES = """
import functools, numpy

def by_name(prompt, completion): return len(prompt) * 10 + len(completion)
def one(text): return len(text)
def two(question, reply): return len(question) * 10 + len(reply)
def two_swapped(completion, prompt): return len(prompt) * 10 + len(completion)
def column(completion, answer, weight=1): return (answer in completion) * weight
def columns(completion, **row): return sorted(row)[0] == "answer" and len(row)
def scaled(completion, factor=1): return factor * len(completion)
def trl(prompts, completions, answer, **kwargs):
    assert len(prompts) == len(answer) == len(completions) and kwargs["factor"] == 2
    return [float(len(each[0]["content"])) for each in completions]
def trl_text(completions, **kwargs): return numpy.array([len(each) for each in completions])
async def later(completion): return len(completion)
class Judge:
    def __call__(self, completion): return len(completion)
    def method(self, completion): return 2 * len(completion)
judge = Judge()
partial = functools.partial(scaled, factor=3)
true = lambda completion: completion == "bb"
"""


@pytest.mark.parametrize(
    ("name", "kwargs", "scores"),
    [
        ("by_name", {}, [31, 32]),
        ("one", {}, [1, 2]),
        ("two", {}, [31, 32]),
        ("two_swapped", {}, [31, 32]),
        ("column", {}, [1, 0]),
        ("column", {"weight": 4}, [4, 0]),
        ("columns", {}, [2, 2]),
        ("scaled", {"factor": 2}, [2, 4]),
        ("trl_text", {}, [1, 2]),
        ("later", {}, [1, 2]),
        ("judge", {}, [1, 2]),
        ("judge.method", {}, [2, 4]),
        ("partial", {}, [3, 6]),
        ("true", {}, [0, 1]),
    ],
)
def test_functions_of_all_kinds(tmp_path, monkeypatch, name, kwargs, scores):
    """In this process; the worker's loop round it has its own tests."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = write_code(tmp_path / f"rules_{name.replace('.', '_')}.py", RULES)
    function, found = load(f"{file}:{name}")
    asked = {"prompt": "why", "completions": ["a", "bb"], "columns": {"answer": "a"}}
    assert Rule(function, kwargs)(asked) == scores and found == str(file)


def test_columns_never_stand_in_for_what_is_judged():
    asked = {"prompt": "why", "completions": ["a", "bb"]}
    asked["columns"] = {"completion": "gold", "completions": ["x"], "prompts": 1, "factor": 9}
    assert Rule(lambda prompt, completion, **row: len(completion), {})(asked) == [1, 2]
    together = Rule(
        lambda completions, factor, **row: [factor * len(c) for c in completions], {"factor": 2}
    )
    assert together(asked) == [2, 4]


def test_a_reward_function_of_trl(tmp_path):
    judge = rule(tmp_path, RULES, "trl", kwargs={"factor": 2})
    assert verdicts(judge, row("a", "bb", prompt=CHAT, answer="x")) == [[1, 2]]


def test_what_a_function_prints_is_no_answer(tmp_path):
    code = """
    import sys
    print("loading")
    def score(completion):
        print("judging", flush=True)
        sys.stdout.write("0")
        return len(completion)
    """
    assert verdicts(rule(tmp_path, code), row("a", "bb")) == [[1, 2]]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise ValueError('bad ' + completion)", "ValueError: bad x ("),
        ("import os; os._exit(3)", "it ended with code 3 and no answer"),
        ("while True: pass", "it took longer than judge.timeout_seconds"),
        ("import ctypes; ctypes.string_at(0)", "it was killed by SIGSEGV"),
    ],
)
def test_a_function_that_fails_does_so_alone(tmp_path, body, why):
    code = f"def score(completion):\n    if completion == 'x':\n        {body}\n    return 1\n"
    judge = rule(tmp_path, code, timeout_seconds=2)
    found = verdicts(judge, row("a", "x", "b"))
    assert found[0][0] == found[0][2] == 1 and found[0][1][0] == "failed"
    assert why in found[0][1][1]


def test_a_list_of_another_length_fails(tmp_path):
    code = "def score(completions, **kwargs):\n    return [1]\n"
    found = verdicts(rule(tmp_path, code), row("a", "b"))
    assert [each[0] for each in found[0]] == ["failed"] * 2
    assert "expected a list of 2 scores, got [1]" in found[0][0][1]


def test_values_that_are_no_numbers(tmp_path):
    code = "def score(completion):\n    return {'a': 'good', 'b': float('inf'), 'c': None}[completion]\n"
    assert verdicts(rule(tmp_path, code), row("a", "b", "c")) == [
        [
            ("unparsable", "\"'good'\" is no number"),
            ("unparsable", "inf is not finite"),
            ("refused", "null"),
        ]
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{folder}/rules.py:gone", "rules.py has no gone; it has "),
        ("{folder}/none.py:score", "there is no file"),
        ("{folder}/broken.py:score", "SyntaxError"),
        ("no_such_module:score", "No module named 'no_such_module'"),
        ("{folder}/rules.py:number", "number of {folder}/rules.py is a int, and not a function"),
        ("{folder}/exits.py:score", "it ended with code 5 and no answer"),
    ],
)
def test_functions_that_cannot_be_loaded(tmp_path, name, said):
    write_code(tmp_path / "rules.py", RULES + "number = 3\n")
    write_code(tmp_path / "broken.py", "def score(:")
    write_code(tmp_path / "exits.py", "raise SystemExit(5)")
    name, said = name.format(folder=tmp_path), said.format(folder=tmp_path)
    with pytest.raises(UserError) as error:
        rule_identity(section(type="rule", function=name))
    assert f"judge.function={name} cannot be loaded" in str(error.value)
    assert said in str(error.value)


SEVERAL = """
def length(completions, **columns):
    return [float(len(each)) for each in completions]
def vowels(completion, times=1):
    return None if completion == "x" else times * sum(each in "aeiou" for each in completion)
def odd(completions):
    return [float("nan") if each == "aa" else None for each in completions]
"""


def several(folder, *names, **options) -> RuleJudge:
    write_code(folder / "rules.py", SEVERAL)
    functions = [f"{folder}/rules.py:{name}" for name in names]
    return RuleJudge(section(type="rule", function=functions, max_retries=0, **options))


def test_the_scores_of_several_functions_are_added(tmp_path):
    both = ("length", "vowels")
    assert verdicts(several(tmp_path, *both), row("aab", "x")) == [[5, 1]]
    weighted = several(tmp_path, *both, weights=[0.5, 2], kwargs={"times": 10})
    assert verdicts(weighted, row("aab", "x")) == [[0.5 * 3 + 2 * 20, 0.5]]
    [[first, second, third]] = verdicts(several(tmp_path, "odd", "vowels"), row("aa", "x", "e"))
    assert first == ("unparsable", "nan is not finite") and third == 1
    assert second == ("refused", "null"), "no function scores it"


def test_several_functions_of_other_scales_may_count_alike(tmp_path):
    """TRL's own arithmetic: advantages of each function in the group, weighed and added."""
    how = {"multi_objective_aggregation": "normalize_then_sum", "weights": [1.0, 3.0]}
    answers, found = ("aab", "e", "bbbbbb"), []
    for scores in ((3.0, 1.0, 6.0), (2.0, 1.0, 0.0)):
        mean, spread = statistics.mean(scores), statistics.stdev(scores)
        found.append([(each - mean) / (spread + 1e-4) for each in scores])
    wanted = [one + 3 * other for one, other in zip(*found, strict=True)]
    [[*ours]] = verdicts(several(tmp_path, "length", "vowels", **how), row(*answers))
    assert ours == pytest.approx(wanted)


def test_each_of_several_functions_makes_a_judge_another_one(tmp_path):
    judge = several(tmp_path, "length", "vowels", weights=[1, 2]).section
    first = rule_identity(judge)
    assert first["weights"] == [1, 2] and len(first["sha256"]) == 2
    write_code(tmp_path / "rules.py", SEVERAL + "# changed")
    assert rule_identity(judge) != first
    with pytest.raises(UserError, match=r"judge\.kwargs\.most: no function has such a parameter"):
        rule_identity(several(tmp_path, "length", "vowels", kwargs={"most": 1}).section)


def test_an_argument_that_the_function_lacks(tmp_path):
    write_code(tmp_path / "rules.py", RULES)
    options = {"function": f"{tmp_path}/rules.py:scaled", "kwargs": {"factr": 2}}
    with pytest.raises(
        UserError, match=r"judge\.kwargs\.factr: the function has no such parameter"
    ):
        rule_identity(section(type="rule", **options))


def test_a_module_of_the_working_folder_and_one_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_code(tmp_path / "config.py", "def score(completion):\n    return 5\n")
    (tmp_path / "below").mkdir()
    write_code(tmp_path / "below/table.py", "SCORE = 6\n")
    write_code(
        tmp_path / "below/mine.py", "from table import SCORE\ndef score(text):\n    return SCORE\n"
    )
    for function, score in (("config:score", 5), ("below/mine.py:score", 6), ("builtins:len", 1)):
        judge = RuleJudge(section(type="rule", function=function))
        assert verdicts(judge, row("a")) == [[score]]
    with_hash = rule_identity(section(type="rule", function="config:score"))
    write_code(tmp_path / "config.py", "def score(completion):\n    return 7\n")
    assert rule_identity(section(type="rule", function="config:score")) != with_hash


def test_programs_that_a_function_starts_do_not_read_its_rows(tmp_path):
    code = "import subprocess\ndef score(completion):\n"
    code += "    subprocess.run(['cat'])\n    return len(completion)\n"
    assert verdicts(rule(tmp_path, code), row("a", "bcd"), row("ef")) == [[1, 3], [2]]


def test_what_a_command_says_beside_its_answers_does_not_shift_them(tmp_path):
    code = """
    import json, os, sys
    for line in sys.stdin:
        text = json.loads(line)["completion"]
        before = "-1\\n" if text == "bb" else ""
        os.write(1, f"{before}{len(text)}\\n\\n".encode())  # an empty line is nothing
    """
    found = verdicts(command(tmp_path, code), row("a", "bb", "ccc", "dddd"))[0]
    assert found[:2] == [1, -1] and found[3] == 4
    assert found[2] == ("failed", found[2][1]) and "it said '2' without being asked" in found[2][1]
    assert verdicts(command(tmp_path, code, max_retries=1), row("a", "bb", "ccc"))[0][2] == 3


def test_an_answer_with_the_number_of_its_line_is_not_taken_for_another(tmp_path):
    """A line of JSON that looks like a score, and comes first, is told by its number."""
    code = """
    import json, os, sys
    for line in sys.stdin:
        asked = json.loads(line)
        mine = json.dumps({"score": len(asked["completion"]), "request_id": asked["request_id"]})
        other = json.dumps({"score": 9, "request_id": asked["request_id"] - 1}) + "\\n"
        os.write(1, (other * (asked["completion"] == "bb") + mine + "\\n").encode())
    """
    found = verdicts(command(tmp_path, code), row("a", "bb", "ccc", request_id=None))[0]
    assert found[0] == 1 and found[2] == 3
    assert found[1][0] == "unparsable" and "answers another line: request_id is 2" in found[1][1]
    code = ANSWERING.format("assert asked['request_id'] == 'mine'")  # a column of the row's own
    assert verdicts(command(tmp_path, code), row("a", request_id="mine")) == [[1]]


@pytest.mark.parametrize(
    "function, found",
    [
        (lambda prompt, response: f"{prompt}/{response}", "q/text"),
        (lambda response, prompt: f"{prompt}/{response}", "q/text"),
        (lambda response, prompt, answer: f"{prompt}/{response}/{answer}", "q/text/42"),
        (lambda question, reply, answer: f"{question}/{reply}/{answer}", "q/text/42"),
    ],
)
def test_parameters_of_other_names(function, found):
    columns = {"answer": "42"}
    asked = {"prompt": "q", "completions": ["text"], "columns": columns}
    assert Rule(function, {})(asked) == [repr(found)]


def test_a_column_or_the_completion(tmp_path):
    asked = {"prompt": "q", "completions": ["text"], "columns": {"answer": "42"}}
    with pytest.raises(TypeError, match="parameter answer: is it the row's column"):
        Rule(lambda response, answer: len(answer), {})(asked)


def test_a_program_of_one_line_may_answer_before_it_reads(tmp_path):
    code = "import os\nos.write(1, b'5\\n6\\n')\ninput()\n"
    judge = command(tmp_path, code, keep_alive=False)
    assert verdicts(judge, row("a", "b")) == [[5, 5]]
