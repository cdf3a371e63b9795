"""A chat model behind a server as judge: down, slow, garbage, position bias, and nothing asked twice."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dpo_fast.data.images.written import data_uri
from dpo_fast.errors import UserError
from dpo_fast.judging.answers import Answers
from dpo_fast.judging.server import ServerJudge, server_identity
from tests.support.image_rows import picture
from tests.support.judging import row, section

pytest.importorskip("openai")
CHAT = [{"role": "user", "content": "which?"}]


class Server:
    """Answers chat completions by a function of the request. requests: all that came."""

    def __init__(self, answer: Callable[[dict], object]) -> None:
        self.requests: list[dict] = []
        self.keys: set[str] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(asked | {"path": self.path})
                outer.keys.add(self.headers["Authorization"])
                found = answer(asked)
                status, body = found if isinstance(found, tuple) else (200, found)
                if isinstance(body, str):
                    body = chat(body)
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                with contextlib.suppress(OSError):  # one who no longer waits
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *arguments) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@contextlib.contextmanager
def serving(answer) -> Iterator[Server]:
    server = Server(answer)
    thread = threading.Thread(target=server.server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()


def chat(text: str | None, reason: str = "stop", **message) -> dict:
    message = {"role": "assistant", "content": text, **message}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def asked_of(request: dict) -> str:
    return request["messages"][-1]["content"]


def judged(url: str, *rows, folder=None, **options):
    options = {"max_retries": 0, "timeout_seconds": 20, "concurrency": 1} | options
    own = section(type="openai", url=url, model="m", **options)
    judge = ServerJudge(own, Answers(folder))
    try:
        return [each for chunk in judge([each] for each in rows) for each in chunk]
    finally:
        judge.close()


def scores(*arguments, **options):
    return [[v.score for v in each.verdicts] for each in judged(*arguments, **options)]


def longest(request: dict) -> str:
    """Prefers the longer of two answers."""
    pattern = r"start of assistant [AB]'s answer\]\n(.*?)\n\[The end"
    first, second = re.findall(pattern, asked_of(request), re.DOTALL)
    return f"I think [[{'A' if len(first) > len(second) else 'B'}]]"


def test_every_completion_gets_a_number(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with serving(lambda asked: f"Rating: [[{len(asked_of(asked)) % 10}]]") as server:
        rows = [row("a", "bb", prompt=CHAT), row("ccc", prompt=CHAT)]
        options = {"system_prompt": "be fair", "seed": 3, "extra_body": {"top_k": 4}}
        options |= {"api_key_env": "JUDGE_KEY", "concurrency": 3}
        found = scores(server.url, *rows, rubric="{prompt} {completion}", **options)
    assert found == [[8, 9], [0]]
    assert server.keys == {"Bearer secret"}
    (request,) = (each for each in server.requests if each["messages"][1]["content"] == "which? a")
    assert request == {
        "path": "/v1/chat/completions",
        "model": "m",
        "messages": [
            {"role": "system", "content": "be fair"},
            {"role": "user", "content": "which? a"},
        ],
        "temperature": 0,
        "max_tokens": 1024,
        "seed": 3,
        "top_k": 4,
    }


def test_a_judge_is_sent_the_images_behind_the_text(tmp_path):
    picture(0).save(tmp_path / "a.png")
    parts = [{"type": "image", "image": str(tmp_path / "a.png")}, {"type": "text", "text": "what?"}]
    rows = [
        row("yes", prompt=[{"role": "user", "content": parts}]),
        row("yes", prompt="see <image>", images=[str(tmp_path / "a.png")]),
        row("yes", prompt=[{"role": "user", "content": [{"type": "image", "image": "none.png"}]}]),
        row("yes", "no", prompt=[{"role": "user", "content": parts}]),
    ]
    with serving(lambda asked: "[[5]]") as server:
        found = judged(server.url, *rows[:3], rubric="{prompt} {completion}")
        judged(server.url, rows[3], compare="pairwise", rubric="{prompt} {first} {second}")
    assert [each.verdicts[0].score for each in found] == [5, 5, None]
    assert "images[0] is not there" in found[2].verdicts[0].why
    contents = [asked_of(each) for each in server.requests]
    texts = [each[0]["text"] for each in contents]
    assert texts[:2] == ["[image 1]what? yes", "see [image 1] yes"]
    assert texts[2:] == ["[image 1]what? yes no", "[image 1]what? no yes"]
    uri = data_uri((tmp_path / "a.png").read_bytes())
    assert all(each[1:] == [{"type": "image_url", "image_url": {"url": uri}}] for each in contents)


def test_fields_that_a_model_refuses_are_left_out():
    with serving(lambda asked: "[[5]]") as server:
        options = {"temperature": None, "max_tokens": None}
        scores(server.url, row("a"), extra_body={"max_completion_tokens": 9}, **options)
    assert set(server.requests[0]) == {"path", "model", "messages", "max_completion_tokens"}


def test_pairs_in_both_orders():
    with serving(longest) as server:
        (each,) = judged(server.url, row("a", "bbb", "cc", prompt=CHAT), compare="pairwise")
        assert [v.score for v in each.verdicts] == [0.0, 1.0, 0.5]
        assert each.facts == {"comparisons": 6, "won by the first": 3, "won by the second": 3}
        once = judged(server.url, row("a", "bbb"), compare="pairwise", both_orders=False)
    assert len(server.requests) == 7 and [v.score for v in once[0].verdicts] == [0.0, 1.0]


def test_a_judge_that_goes_by_the_place_decides_nothing():
    with serving(lambda asked: "[[A]]") as server:
        (each,) = judged(server.url, row("a", "bb", "ccc"), compare="pairwise")
    assert [v.score for v in each.verdicts] == [0.5] * 3
    assert each.facts["contradicted in the other order"] == 3
    assert each.facts["won by the first"] == 6 == each.facts["comparisons"]


def test_ties_equal_texts_and_answers_without_a_winner():
    def answer(asked):
        return "no idea" if "x" in asked_of(asked).rpartition("[The start")[2] else "[[C]]"

    with serving(answer) as server:
        rows = [row("aa", "bb", "aa"), row("only"), row("aa", "x")]
        same, only, half = judged(
            server.url, *rows, compare="pairwise", rubric="{first} [The start {second}"
        )
    assert [v.score for v in same.verdicts] == [0.5] * 3
    assert same.facts["comparisons of equal completions"] == 1 and same.facts["tied"] == 4
    assert only.verdicts[0].word == "refused" and "no other completion" in only.verdicts[0].why
    assert [v.score for v in half.verdicts] == [0.5] * 2  # of the order that was answered
    assert half.facts == {"comparisons": 1, "tied": 1, "comparisons unparsable": 1}


@pytest.mark.parametrize(
    ("answer", "word", "why"),
    [
        ("I would rather not.", "unparsable", "holds no [[number]]"),
        (chat(None, "content_filter"), "refused", "content_filter"),
        (chat("no", refusal="I cannot judge this"), "refused", "I cannot judge this"),
        (chat(None, "length"), "unparsable", "cut off at judge.max_tokens=1024"),
        (chat("It is go", "length"), "unparsable", "cut off at judge.max_tokens=1024"),
        ({"object": "list", "data": []}, "failed", "no chat completion"),
        (b"<html>busy</html>", "failed", "no"),
        ((500, {"error": {"message": "out of memory"}}), "failed", "out of memory"),
        ((400, {"error": {"message": "context length"}}), "failed", "context length"),
    ],
)
def test_what_is_no_score_is_kept_apart(answer, word, why):
    with serving(lambda asked: answer if "x" in asked_of(asked) else "[[4]]") as server:
        (each,) = judged(server.url, row("a", "x", "b"), rubric="{completion}")
    good, bad, other = each.verdicts
    assert good.score == other.score == 4
    assert bad.word == word and why in bad.why


def test_a_server_that_is_down_ends_the_command_with_its_address():
    with serving(lambda asked: "[[1]]") as server:
        url = server.url
    with pytest.raises(UserError) as error:
        judged(url, *(row("a", "b", place=place) for place in range(9)), max_failures=5)
    said = str(error.value)
    assert f"judge.url={url} failed 5 times in a row (judge.max_failures=5)" in said
    assert "at last for samples.jsonl:3: Connection error" in said
    assert "the same command goes on" in said


def test_a_slow_server():
    with serving(lambda asked: time.sleep(3) or "[[1]]") as server:
        (each,) = judged(server.url, row("a"), timeout_seconds=0.3)
    assert each.verdicts[0].why == "no answer in judge.timeout_seconds=0.3 s"


def test_an_error_is_tried_again():
    with serving(lambda asked: (503, {}) if len(server.requests) == 1 else "[[2]]") as server:
        assert scores(server.url, row("a"), max_retries=1) == [[2]]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            401,
            r"refuses the key: .*; export OPENAI_API_KEY \(another variable: judge\.api_key_env\)",
        ),
        (404, r"has no judge\.model=m, or is no address of chat completions"),
    ],
)
def test_what_no_other_row_would_mend_ends_at_once(status, said):
    answer = (status, {"error": {"message": "no"}})
    with serving(lambda asked: answer) as server, pytest.raises(UserError, match=said):
        judged(server.url, *(row("a") for _ in range(5)))
    assert len(server.requests) == 1


def test_nothing_is_asked_twice(tmp_path):
    with serving(lambda asked: "[[3]]") as server:
        first = scores(server.url, row("a", "b"), folder=tmp_path)
        file = tmp_path / "judge-cache-0.jsonl"
        assert len(file.read_bytes().splitlines()) == 2 == len(server.requests)
        file.write_bytes(file.read_bytes()[:-5])  # killed while it wrote
        assert scores(server.url, row("a", "b", "c"), folder=tmp_path) == [[3, 3, 3]]
        assert len(server.requests) == 4
        assert scores(server.url, row("a", "b", "c"), folder=tmp_path) == [[3, 3, 3]]
        assert len(server.requests) == 4 and first == [[3, 3]]
        scores(server.url, row("a"), folder=tmp_path, temperature=0.5)
        assert len(server.requests) == 5


def test_failures_are_not_kept(tmp_path):
    with serving(lambda asked: (500, {})) as server:
        judged(server.url, row("a"), folder=tmp_path)
        judged(server.url, row("a"), folder=tmp_path)
    assert len(server.requests) == 2


def test_where_it_runs_makes_no_other_judge():
    def identity(**options):
        return server_identity(
            section(type="openai", **{"url": "http://a", "model": "m"} | options)
        )

    assert identity(url="http://b", concurrency=3, timeout_seconds=3) == identity()
    for other in ({"model": "n"}, {"rubric": "{completion}"}, {"compare": "pairwise"}, {"seed": 1}):
        assert identity(**other) != identity()
