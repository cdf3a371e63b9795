"""Completions written by a server with the OpenAI API, asked through the package `openai`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from dpo_fast.data.images.options import told
from dpo_fast.data.images.written import url_part, with_parts
from dpo_fast.durable import first_line
from dpo_fast.errors import UserError
from dpo_fast.generation.batches import Batch
from dpo_fast.generation.config import EngineSection, SampleSection
from dpo_fast.generation.encode import PromptCodec
from dpo_fast.generation.engine import LENGTH, STOP, Completion, Request, TooLong
from dpo_fast.generation.prompts import Prompt
from dpo_fast.wording import quoted

KEPT = "What is done is kept: the same command goes on after it"
# How servers say that a prompt has no room: OpenAI, vLLM, SGLang, TGI and llama.cpp.
NO_ROOM = (
    *("context_length_exceeded", "maximum context length", "exceed_context_size"),
    *("exceeds the available context", "longer than the model", "max_model_len"),
    *("prompt is too long", "`max_new_tokens` must be <="),
)


# Other words of servers for a completion that ended by itself, or was cut off.
REASONS = {
    **dict.fromkeys(("eos", "eos_token", "stop_sequence", "end_turn", "tool_calls"), STOP),
    **dict.fromkeys(("max_tokens", "model_length", "abort", "content_filter", "error"), LENGTH),
}


class ServerEngine:
    """Sends one request for each completion, several at a time. A request has its batch's seed.

    model: the name that the server has for it. codec: None with api=chat.

    Raises:
        UserError: the package is missing, the server is down, or it does not have the model.
    """

    def __init__(self, section: SampleSection, model: str, codec: PromptCodec | None) -> None:
        self.section, self.engine, self.codec = section, section.engine, codec
        self.client = connect(self.engine)
        self.model = self.engine.model or model
        self._check_model()

    def complete(
        self, batches: Iterable[Batch], requests: Sequence[Request]
    ) -> Iterator[tuple[Batch, list[Completion | TooLong]]]:
        """As `Engine.complete`; each batch is one completion. They come as they are done."""
        if self.engine.api == "chat":
            _check_chats(requests)
        check_images(self.engine, [each.prompt for each in requests])
        left, asked = iter(batches), {}
        pool = ThreadPoolExecutor(self.engine.concurrency)
        try:
            while True:
                while len(asked) < 2 * self.engine.concurrency and (batch := next(left, None)):
                    request = requests[batch.members[0][0]]
                    asked[pool.submit(self._ask, request, batch.seed)] = batch
                if not asked:
                    return
                done, _ = wait(asked, return_when=FIRST_COMPLETED)
                for future in done:
                    batch = asked.pop(future)
                    yield batch, [self._result(future, requests[batch.members[0][0]])]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        self.client.close()

    def _result(self, future: Future, request: Request) -> Completion | TooLong:
        """What a thread brings. Templates are rendered in this thread alone."""
        try:
            found = future.result()
        except TooLong as error:
            return error
        if self.codec is None or self.engine.api == "chat":
            return found
        text = self.codec.without_lead(request.prompt, found.text)
        if found.finish_reason == LENGTH:
            text = self.codec.cut_off(request.prompt, request.ids, text)
        return replace(found, text=text)

    def _ask(self, request: Request, seed: int) -> Completion:
        """One completion. Raises TooLong and UserError."""
        import openai

        try:
            if self.engine.api == "chat":
                found = self.client.chat.completions.create(**self._chat(request, seed))
            else:
                found = self.client.completions.create(**self._plain(request, seed))
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if any(words in f"{error} {error.code}" for words in NO_ROOM):
                raise TooLong(first_line(error)) from None
            if "stop_token_ids" in str(error) and "stop_token_ids" not in self.engine.extra_body:
                raise UserError(
                    f"sample.engine.url={self.engine.url} refuses stop_token_ids, the ends of turn of the "
                    f"chat template ({first_line(error)}). If the server knows them by itself, set "
                    "sample.engine.extra_body={stop_token_ids: null}, which leaves them out; or set "
                    f"sample.stop to their text. {KEPT}"
                ) from None
            raise self._refused(error, request) from None
        except openai.APIError as error:
            raise self._refused(error, request) from None
        except ValueError as error:  # an answer that is no JSON
            raise self._garbage(repr(error), request) from None
        return self._read(found, request)

    def _options(self, seed: int) -> dict[str, Any]:
        section, extra = self.section, {}
        if section.top_k:
            extra["top_k"] = section.top_k
        if section.min_p:
            extra["min_p"] = section.min_p
        if section.repetition_penalty != 1:
            extra["repetition_penalty"] = section.repetition_penalty
        return {
            "model": self.model,
            "n": 1,
            "temperature": section.temperature,
            "top_p": section.top_p,
            "seed": seed % 2**31,  # some servers have no more
            "stop": section.stop or None,
            "extra_body": extra | self.engine.extra_body,
        }

    def _plain(self, request: Request, seed: int) -> dict[str, Any]:
        options = self._options(seed) | {"max_tokens": self.section.max_new_tokens}
        # The template may end turns with a token that the server does not know as an end.
        body = {"stop_token_ids": list(request.stop_ids)} | options["extra_body"]
        if body["stop_token_ids"] is None:  # the server refuses it
            del body["stop_token_ids"]
        prompt = list(request.ids) if self.engine.send == "ids" else self.codec.text(request.ids)
        return options | {"prompt": prompt, "extra_body": body}

    def _chat(self, request: Request, seed: int) -> dict[str, Any]:
        prompt = request.prompt
        options = self._options(seed) | {"max_tokens": self.section.max_new_tokens}
        body = dict(options["extra_body"])
        if prompt.optional.get("chat_template_kwargs"):
            body["chat_template_kwargs"] = prompt.optional["chat_template_kwargs"]
        if prompt.prompt and prompt.prompt[-1]["role"] == "assistant":  # vLLM's names
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        tools = {"tools": prompt.optional["tools"]} if prompt.optional.get("tools") else {}
        images = prompt.images
        messages = with_parts(prompt.prompt, lambda number: url_part(images[number]))
        return options | {"messages": messages, "extra_body": body, **tools}

    def _read(self, found: Any, request: Request) -> Completion:
        """What a server answered. Raises UserError for what is no completion."""
        choices = getattr(found, "choices", None)
        if not isinstance(choices, list) or not choices:
            raise self._garbage(found, request)
        choice = choices[0]
        message = getattr(choice, "message", None)
        text = getattr(choice, "text", None) if self.engine.api == "completions" else None
        if self.engine.api == "chat" and message is not None:
            text = _spoken(message)
        if not isinstance(text, str):
            raise self._garbage(found, request)
        reason = str(choice.finish_reason or STOP)
        return Completion(text, REASONS.get(reason, reason))

    def _check_model(self) -> None:
        """Raises UserError if the server is not there or names other models. Some have no list of them."""
        import openai

        try:
            served = [each.id for each in self.client.models.list().data]
        except openai.NotFoundError:
            return
        except openai.APIError as error:
            raise self._refused(error) from None
        except (ValueError, TypeError, AttributeError):
            return
        if served and self.model not in served:
            option = "sample.engine.model" if self.engine.model else "model.path"
            raise UserError(
                f"{option}={self.model}: the server at {self.engine.url} has no such model, but "
                f"{', '.join(served[:5])}; start it with that model and under that name (of vLLM, "
                "--served-model-name), or set sample.engine.model to the name under which it has it"
            )

    def _refused(self, error: Exception, request: Request | None = None) -> UserError:
        """The error for a server that is down, slow, or does not want a request."""
        import openai

        place = f"sample.engine.url={self.engine.url}"
        where = f" ({request.prompt.where})" if request else ""
        if isinstance(error, openai.APITimeoutError):
            return UserError(
                f"{place}: no answer within sample.engine.timeout_seconds={self.engine.timeout_seconds:g}, "
                f"{self.engine.max_retries + 1} times{where}; raise it, or lower "
                f"sample.engine.concurrency={self.engine.concurrency}. {KEPT}"
            )
        if isinstance(error, openai.AuthenticationError):
            return UserError(
                f"{place} does not let this key in: set {self.engine.api_key_env} in the environment. "
                f"{KEPT}"
            )
        if isinstance(error, openai.APIResponseValidationError):
            return self._garbage(first_line(error), request)
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            return UserError(
                f"{place}: the server cannot be reached, or breaks off its answers, "
                f"{self.engine.max_retries + 1} times: {first_line(cause)}{where}. Start it, or correct "
                f"the address. {KEPT}"
            )
        remedy = ""
        if isinstance(error, openai.NotFoundError):
            remedy = " Does the address end as it should, mostly with /v1?"
        if isinstance(error, (openai.RateLimitError, openai.InternalServerError)):
            remedy = (
                " If it has too much to do, lower sample.engine.concurrency="
                f"{self.engine.concurrency}, or raise max_retries={self.engine.max_retries}."
            )
        return UserError(
            f"{place} refuses a request{where}: {first_line(error):.600}.{remedy} {KEPT}"
        )

    def _garbage(self, found: Any, request: Request | None) -> UserError:
        where = f" ({request.prompt.where})" if request else ""
        return UserError(
            f"sample.engine.url={self.engine.url} gave no completion{where}: {quoted(found, 300)}; "
            f"is it a server with the OpenAI API, and does the address end as it should, mostly with /v1? "
            f"{KEPT}"
        )


def _check_chats(requests: Sequence[Request]) -> None:
    """Raises UserError for a prompt that is no chat."""
    where = next((each.prompt.where for each in requests if not each.prompt.is_chat), None)
    if where is not None:
        raise UserError(
            f"{where}: the prompt is text, and sample.engine.api=chat sends messages; set "
            "data.apply_chat_template=true to make it the user's message, or api=completions"
        )


def check_images(engine: EngineSection, prompts: Sequence[Prompt]) -> None:
    """Raises UserError for prompts with images that a server cannot be sent."""
    for prompt in (each for each in prompts if each.images):
        if engine.api != "chat":
            raise UserError(
                f"{prompt.where}: the prompt has images, and sample.engine.api=completions sends token ids "
                "or text alone; set api=chat, which sends them in the messages"
            )
        for image in prompt.images:
            for name, value in told(image["options"]).items():
                raise UserError(
                    f"{prompt.where}: an image has {name}={value}, and a server is sent images as they "
                    "are: leave it out and start the server with it (of vLLM, --mm-processor-kwargs), or "
                    "set sample.engine.type=transformers"
                )


def connect(engine: EngineSection) -> Any:
    """A client of the server. Raises UserError without the package."""
    try:
        import openai
    except ImportError:
        raise UserError(
            "sample.engine.type=openai needs the package openai: pip install 'dpo_fast[openai]'"
        ) from None
    return openai.OpenAI(
        base_url=engine.url,
        api_key=os.environ.get(engine.api_key_env) or "none",
        timeout=engine.timeout_seconds,
        max_retries=engine.max_retries,
    )


def _spoken(message: Any) -> str | None:
    """What a chat's answer says, with thinking that a server keeps apart. Empty if it only calls tools."""
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    text = getattr(message, "content", None)
    if text is None:
        text = getattr(message, "refusal", None)
    if text is None and getattr(message, "tool_calls", None):
        text = ""
    if isinstance(thought, str) and thought.strip():
        closed = f"\n</think>\n\n{text}" if text else ""  # else it was cut off while it thought
        return f"<think>\n{thought.strip()}{closed}"
    return text
