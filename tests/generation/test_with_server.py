"""A server with the OpenAI API: what it is asked, and what is said when it misbehaves."""

from __future__ import annotations

import base64
import threading
import time

import pytest

from dpo_fast.data.config import DataConfig
from dpo_fast.data.images.marks import mark
from dpo_fast.errors import UserError
from dpo_fast.generation.batches import batches_of
from dpo_fast.generation.config import SampleSection
from dpo_fast.generation.encode import PromptCodec
from dpo_fast.generation.engine import Request, TooLong
from dpo_fast.generation.prompts import Prompt
from dpo_fast.generation.with_server import ServerEngine
from tests.support.image_rows import picture, png
from tests.support.server import MODEL, Reply, Server, refusal, serving, slowly
from tests.support.templates import TOOLS, user
from tests.support.tokenizers import byte_tokenizer, chat_tokenizer

pytest.importorskip("openai")
FAST = {"max_retries": 0, "timeout_seconds": 5.0}


@pytest.fixture
def server():
    with serving() as found:
        yield found


def with_image(options="") -> Prompt:
    """A prompt about an image that came inside its row."""
    content = png(picture(0))
    image = {"digest": b"d", "content": content, "path": None, "options": options}
    return Prompt("row:0", [user(f"see {mark(0)}?")], images=[image])


def test_images_are_sent_in_the_messages(server):
    found = complete(engine(server, api="chat"), [with_image()], 1)
    assert len(found) == 1
    first, image, last = server.asked[0]["messages"][0]["content"]
    assert [first, last] == [{"type": "text", "text": "see "}, {"type": "text", "text": "?"}]
    kind, _, content = image["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(content) == png(picture(0))


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        ({}, "", "row:0: the prompt has images, and sample.engine.api=completions sends"),
        ({"api": "chat"}, '{"max_pixels": 64}', "row:0: an image has max_pixels=64, and a server"),
    ],
)
def test_images_that_a_server_is_not_sent_are_named(server, made, options, message):
    request = Request(with_image(options), [1], [])
    with pytest.raises(UserError, match=message):
        next(engine(server, **made).complete(batches_of([1], 1, 1, 0), [request]))


def engine(server: Server, chat=False, sample=None, **options) -> ServerEngine:
    tree = {"type": "openai", "url": server.url, "model": MODEL} | FAST | options
    section = SampleSection(
        prompts="rows", **{"max_new_tokens": 6, "engine": tree} | (sample or {})
    )
    tokenizer = chat_tokenizer() if chat else byte_tokenizer()
    codec = (
        None if section.engine.api == "chat" else PromptCodec(tokenizer, DataConfig(train="rows"))
    )
    return ServerEngine(section, "model/path", codec)


def requests(made: ServerEngine, prompts: list) -> list[Request]:
    found = []
    for number, each in enumerate(prompts):
        prompt = each if isinstance(each, Prompt) else Prompt(f"row:{number}", each)
        codec = made.codec
        ids = [] if codec is None else codec.encode(prompt)
        found.append(Request(prompt, ids, [] if codec is None else codec.stop_ids(prompt)))
    return found


def complete(made: ServerEngine, prompts: list, generations: int = 2) -> dict:
    asked = requests(made, prompts)
    batches = batches_of([1] * len(prompts), generations, 1, 0)
    found = {}
    for batch, (completion,) in made.complete(batches, asked):
        found[batch.members[0]] = completion
    return dict(sorted(found.items()))


def test_each_completion_is_asked_for_with_its_own_seed_and_the_ids_of_training(server):
    made = engine(server, sample={"temperature": 0.7, "top_p": 0.9, "stop": ["\n"]})
    found = complete(made, ["one", "two"])
    assert list(found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {each.finish_reason for each in found.values()} == {"stop"}
    texts = [each.text for each in found.values()]
    assert len(set(texts)) == 4 and texts == [
        e.text for e in complete(made, ["one", "two"]).values()
    ]
    body = server.asked[0]
    assert body["prompt"] in [list(each.ids) for each in requests(made, ["one", "two"])]
    wanted = {
        "model": MODEL,
        "n": 1,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 6,
        "stop": ["\n"],
    }
    assert wanted.items() <= body.items()
    assert body["stop_token_ids"] == [2] and 0 <= body["seed"] < 2**31
    assert not {"top_k", "min_p", "repetition_penalty"} & body.keys()  # OpenAI's own refuses them


def test_what_only_some_servers_know_is_sent_if_it_is_asked_for(server):
    sample = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    complete(
        engine(server, sample=sample, extra_body={"priority": 3, "stop_token_ids": [9]}), ["one"]
    )
    assert (sample | {"priority": 3, "stop_token_ids": [9]}).items() <= server.asked[0].items()


def test_a_server_that_refuses_ends_of_turn_is_told_how_to_leave_them_out(server):
    def strict(body):
        unknown = "stop_token_ids" in body
        return refusal(400, "Unrecognized request argument: stop_token_ids") if unknown else "text"

    server.answer = strict
    with pytest.raises(UserError, match="refuses stop_token_ids.*stop_token_ids: null"):
        complete(engine(server), ["one"])
    found = complete(engine(server, extra_body={"stop_token_ids": None}), ["one"])
    assert {each.text for each in found.values()} == {"text"}


def test_chats_are_sent_as_messages(server):
    made = engine(server, api="chat")
    tools = {"tools": TOOLS, "chat_template_kwargs": {"deep": True}}
    open_ = [user("q"), {"role": "assistant", "content": "It is"}]
    complete(made, [Prompt("row:0", [user("q")], tools), open_], generations=1)
    first, second = sorted(server.asked, key=lambda body: len(body["messages"]))
    assert first["messages"] == [user("q")] and "stop_token_ids" not in first
    assert first["tools"] == TOOLS and first["chat_template_kwargs"] == {"deep": True}
    assert second["continue_final_message"] is True and second["add_generation_prompt"] is False
    with pytest.raises(
        UserError, match="row:0: the prompt is text, and sample.engine.api=chat sends"
    ):
        complete(made, ["text"])


def test_a_server_that_takes_no_ids_gets_the_rendered_text(server):
    complete(engine(server, chat=True, send="text"), [[user("q")]], 1)
    assert server.asked[0]["prompt"] == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "said, reason, wanted",
    [
        ({"content": "yes"}, "eos_token", ("yes", "stop")),
        ({"content": ""}, "stop", ("", "stop")),
        ({"content": "ye"}, "abort", ("ye", "length")),
        ({"content": None, "refusal": "I cannot"}, "stop", ("I cannot", "stop")),
        (
            {"content": None, "tool_calls": [{"id": "1", "type": "function"}]},
            "tool_calls",
            ("", "stop"),
        ),
    ],
)
def test_what_chats_answer_in_other_words(server, said, reason, wanted):
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", **said}}
    whole = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [choice],
    }
    server.answer = lambda body: Reply(200, whole)
    (found,) = complete(engine(server, api="chat"), [[user("q")]], 1).values()
    assert (found.text, found.finish_reason) == wanted


def test_thinking_that_a_server_keeps_apart_is_put_back(server):
    message = {"role": "assistant", "content": "yes", "reasoning_content": "hmm\n"}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    whole = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [choice],
    }
    server.answer = lambda body: Reply(200, whole)
    (found,) = complete(engine(server, api="chat"), [[user("q")]], 1).values()
    assert found.text == "<think>\nhmm\n</think>\n\nyes"
    message["content"], choice["finish_reason"] = None, "length"
    (found,) = complete(engine(server, api="chat"), [[user("q")]], 1).values()
    assert (found.text, found.finish_reason) == ("<think>\nhmm", "length")


def test_so_many_requests_wait_at_a_time(server):
    server.answer = slowly(0.05)
    complete(engine(server, concurrency=3), ["a", "b"], 6)
    assert server.most == 3


def test_finished_completions_come_while_others_wait(server):
    """One slow answer does not keep back the rest, which would be lost if the run ended."""
    hold = threading.Event()
    first = []

    def answer(body):
        if not first:
            first.append(body["seed"])
            hold.wait(5)
        return "done"

    server.answer = answer
    made = engine(server, concurrency=2)
    found = made.complete(batches_of([1], 8, 1, 0), requests(made, ["a"]))
    early = [next(found) for _ in range(6)]
    assert not hold.is_set() and len(early) == 6
    hold.set()
    assert len(list(found)) == 2


def test_a_failure_that_passes_is_not_told(server):
    counts = {}

    def answer(body):
        counts[body["seed"]] = count = counts.get(body["seed"], 0) + 1
        return refusal(503, "loading") if count == 1 else "text"

    server.answer = answer
    found = complete(engine(server, max_retries=2), ["a"])
    assert [each.text for each in found.values()] == ["text", "text"]


GARBAGE = {
    "a page": Reply(200, b"<html>Welcome</html>", kind="text/html"),
    "no JSON": Reply(200, b"{'choices'"),
    "nothing": Reply(200, b""),
    "a list": Reply(200, []),
    "no choices": Reply(200, {"id": "1", "choices": []}),
    "null choices": Reply(200, {"id": "1", "choices": None}),
    "no text": Reply(200, {"id": "1", "choices": [{"index": 0, "finish_reason": "stop"}]}),
    "text that is none": Reply(200, {"id": "1", "choices": [{"text": 3, "finish_reason": "stop"}]}),
    "choices that are none": Reply(200, {"id": "1", "choices": ["yes"]}),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_an_answer_that_is_no_completion_is_told(server, name):
    server.answer = lambda body: GARBAGE[name]
    with pytest.raises(UserError, match="gave no completion .row:0.*What is done is kept"):
        complete(engine(server), ["a"])


ENDS = "What is done is kept: the same command goes on after it$"
FAILURES = {
    "slow": (
        slowly(0.5),
        {"timeout_seconds": 0.1},
        "no answer within .*timeout_seconds=0.1, 1 times",
    ),
    "cut off": (lambda body: Reply(200, b" " * 99, cut=50), {}, "breaks off its answers, 1 times"),
    "broken": (
        lambda body: refusal(500, "CUDA error"),
        {},
        "refuses a request .row:0.: .*CUDA error.* lower sample.engine.concurrency",
    ),
    "busy": (lambda body: refusal(429, "slow down"), {}, "refuses a request .row:0.: .*slow down"),
    "no entry": (lambda body: refusal(401, "who?"), {}, "set OPENAI_API_KEY in the environment"),
    "odd option": (lambda body: refusal(400, "seed is no field"), {}, "seed is no field"),
    "no such place": (lambda body: refusal(404, "no such path"), {}, "no such path.* with /v1"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_server_that_fails_is_told_with_the_row_and_what_to_do(server, name):
    server.answer, options, words = FAILURES[name]
    with pytest.raises(UserError, match=f"sample.engine.url={server.url}.*{words}") as told:
        complete(engine(server, **options), ["a"], 1)
    assert told.match(ENDS)


def test_text_for_chats_is_told_before_anything_is_sent(server):
    made = engine(server, api="chat")
    with pytest.raises(UserError, match="^row:1: the prompt is text, and sample.engine.api=chat"):
        complete(made, [[{"role": "user", "content": "q"}], "a"])
    assert not server.asked


def test_a_server_that_is_down_is_told(server):
    url = server.url.replace(server.url.split(":")[2], "9/v1")
    with pytest.raises(UserError, match=f"{url}: the server cannot be reached"):
        engine(server, url=url)


def test_a_server_with_another_model_is_told(server):
    server.models = ["theirs", "others"]
    with pytest.raises(
        UserError, match="sample.engine.model=served: .* but theirs, others; start it"
    ):
        engine(server)
    with pytest.raises(UserError, match="model.path=model/path: the server"):
        engine(server, model=None)
    server.models = None  # it has no list: nothing can be told
    engine(server)


@pytest.mark.parametrize(
    "message, code",
    [
        ("This model's maximum context length is 32 tokens. However, you requested", None),
        ("too large", "context_length_exceeded"),
        ("`inputs` tokens + `max_new_tokens` must be <= 32", None),
        ("the request exceeds the available context size, try increasing it", None),
    ],
)
def test_a_prompt_that_the_server_has_no_room_for_is_left_out(server, message, code):
    def answer(body):
        return refusal(400, message, code) if len(body["prompt"]) > 5 else "text"

    server.answer = answer
    found = complete(engine(server), ["short", "much longer"], 1)
    assert found[0, 0].text == "text"
    assert isinstance(found[1, 0], TooLong) and str(found[1, 0])


def test_the_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    complete(engine(server, api_key_env="MY_KEY"), ["a"], 1)
    assert server.keys == {"Bearer secret"}


def test_an_error_does_not_wait_for_requests_that_are_out(server):
    first = []

    def answer(body):
        if first:
            time.sleep(2)
            return "late"
        first.append(1)
        return refusal(400, "no")

    server.answer = answer
    begin = time.monotonic()
    pytest.raises(UserError, complete, engine(server, concurrency=4), ["a"], 8)
    assert time.monotonic() - begin < 1.5
