"""OpenAI's protocol on continuous batching: completions and chats, each request with settings of its own.

[`TextServer`] is the model behind it, for one process; [`make_app`] is the web application. `examples/serve_ray.py` puts
replicas of them behind one address.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from transformers import ContinuousBatchingConfig, GenerationConfig

from .streaming import TextStream


class QueueFullError(RuntimeError):
    """As many requests as the server takes are on their way."""


@dataclass
class Answer:
    """What has come of a request since the last time.

    Attributes:
        text: complete characters.
        ids, logprobs: the ids made, and their log-probabilities.
        finish_reason: None while more will come; `"stop"` (end of text, or a stop string) or `"length"`.
    """

    text: str
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None


class TextServer:
    """A model that answers many requests at once, in a thread of its own.

    Args:
        model: a [`BltForCausalLM`].
        tokenizer: its tokenizer.
        name: what clients call it.
        max_rows: requests that run at once.
        max_requests: requests that run or wait; one more is refused with [`QueueFullError`].
        max_bytes: bytes of a prompt and its answer together; None: as many as memory holds.
    """

    def __init__(
        self, model, tokenizer, name: str, max_rows: int = 32, max_requests: int = 128, max_bytes: int | None = None
    ):
        self.tokenizer, self.name, self.max_requests, self.max_bytes = tokenizer, name, max_requests, max_bytes
        self.num_requests = 0
        self.vocab_size = model.config.vocab_size
        config = GenerationConfig.from_model_config(model.config)
        ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        settings = GenerationConfig(
            do_sample=False, pad_token_id=tokenizer.pad_token_id or 0, eos_token_id=sorted(self._ends)
        )
        batching = ContinuousBatchingConfig(max_requests_per_batch=max_rows, return_logprobs=True)
        self._manager = model.init_continuous_batching(settings, batching)
        self._manager.start()
        self._is_stopped = False

    @property
    def _is_serving(self) -> bool:
        status = self._manager.background_thread_status
        return not self._is_stopped and status.fatal_error is None

    def check_health(self) -> None:
        """Does nothing as long as the thread that generates is alive.

        Raises:
            RuntimeError: it has died, with the reason.
        """
        if not self._manager.is_running():
            reason = self._manager.background_thread_status.fatal_error
            raise RuntimeError(f"the generation thread is dead: {reason}")

    def stop(self) -> None:
        """Stops the thread; requests that run fail."""
        self._is_stopped = True
        self._manager.stop(block=True)

    async def answer(
        self, prompt: list[int], max_bytes: int, stop: list[str] | None = None, **sampling: Any
    ) -> AsyncIterator[Answer]:
        """Yields the answer to a prompt, piece by piece. To close this generator is to cancel the request.

        Args:
            prompt: ids.
            max_bytes: bytes to make at most.
            stop: texts that end the answer.
            **sampling: `temperature`, `top_p`, `seed` and so on, of this request alone.
        Raises:
            QueueFullError: too many requests are on their way.
            ValueError: a prompt or settings that cannot be.
            RuntimeError: the request has failed, or the thread is dead.
        """
        if self.num_requests >= self.max_requests:
            raise QueueFullError(f"{self.num_requests} requests are on their way; the server takes no more.")
        if self.max_bytes is not None and len(prompt) + max_bytes > self.max_bytes:
            raise ValueError(
                f"a prompt of {len(prompt)} ids and `max_tokens={max_bytes}` are more than the {self.max_bytes} bytes "
                "that this server takes."
            )
        self.check_health()
        results: asyncio.Queue = asyncio.Queue()
        name, stream, taken = uuid.uuid4().hex, TextStream(self.tokenizer, stop), 0
        self._manager.register_result_handler(name, results.put_nowait)
        self.num_requests += 1
        try:
            self._manager.add_request(
                prompt, request_id=name, max_new_tokens=max_bytes, streaming=True, stop_strings=stop or None, **sampling
            )  # fmt: skip
            while True:
                output = await self._next(results)
                if output.error is not None:
                    # What the batch refuses is the request's fault; all else is the server's.
                    raise (ValueError if self._is_serving else RuntimeError)(output.error)
                ids, logprobs = output.generated_tokens[taken:], output.logprobs[taken:]
                taken += len(ids)
                is_end, is_finished = bool(ids) and ids[-1] in self._ends, output.is_finished()
                text, reason = stream.push(ids), None
                if is_finished or stream.is_stopped:
                    text += stream.close()
                    reason = "stop" if is_end or stream.is_stopped else "length"
                if text or ids or reason:
                    yield Answer(text, ids, logprobs, reason)
                if reason:
                    return
        finally:
            self.num_requests -= 1
            self._manager.cancel_request(name)  # of no effect on a request that is complete

    async def _next(self, results: asyncio.Queue):
        while True:
            try:
                return await asyncio.wait_for(results.get(), timeout=5)
            except asyncio.TimeoutError:
                self.check_health()  # nothing comes from a dead thread


# Fields that are not supported, with the values by which they ask for nothing.
_IDLE = {
    "n": 1, "best_of": 1, "echo": False, "suffix": None, "presence_penalty": 0, "frequency_penalty": 0,
    "logit_bias": None, "top_logprobs": 0, "tools": None, "tool_choice": None, "functions": None,
    "response_format": None, "store": None, "metadata": None, "service_tier": None,
}  # fmt: skip


class _Settings(BaseModel):
    """Fields of both kinds of requests. Those that cannot be honoured are refused and not dropped."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict | None = None
    user: str | None = None

    def check(self) -> None:
        for name, value in (self.model_extra or {}).items():
            if name not in _IDLE:
                raise ValueError(f"`{name}` is not a field that this server knows.")
            if value is not None and value != _IDLE[name]:
                raise ValueError(f"`{name}` is not supported; leave it out, or give {_IDLE[name]!r}.")

    def sampling(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {}
        found = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return found if self.seed is None else {**found, "seed": self.seed}

    @property
    def stops(self) -> list[str]:
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]


class CompletionRequest(_Settings):
    prompt: str | list[int]
    logprobs: int | None = Field(None, ge=0, le=1)


class ChatRequest(_Settings):
    messages: list[dict]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None


def make_app(server: TextServer | None = None) -> FastAPI:
    """Makes the web application of a server: `/v1/completions`, `/v1/chat/completions`, `/v1/models` and `/health`.

    Args:
        server: what answers; None: `app.state.server` is set later, before the first request.
    """
    app = FastAPI()
    app.state.server = server

    @app.exception_handler(RequestValidationError)
    async def refuse(_, error: RequestValidationError):
        first = error.errors()[0]
        return _error(400, f"`{'.'.join(map(str, first['loc'][1:]))}`: {first['msg']}.")

    @app.get("/health")
    async def health():
        try:
            app.state.server.check_health()
        except RuntimeError as error:
            return _error(503, str(error))
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models():
        model = {"id": app.state.server.name, "object": "model", "created": 0, "owned_by": "blt-hf"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request):
        return await _respond(app.state.server, body, request, _CompletionForm(body, app.state.server))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request):
        return await _respond(app.state.server, body, request, _ChatForm(body, app.state.server))

    return app


async def _respond(server: TextServer, body: _Settings, request: Request, form: "_Form"):
    try:
        body.check()
        prompt = form.prompt()
        pieces = server.answer(prompt, form.max_bytes(), body.stops, **body.sampling())
        first = await anext(pieces)  # what is refused is refused before the first byte of a stream
    except QueueFullError as error:
        return _error(429, str(error))
    except (ValueError, TypeError) as error:
        return _error(400, str(error))
    except RuntimeError as error:
        return _error(503, str(error))
    if body.stream:
        return StreamingResponse(_events(form, first, pieces, len(prompt)), media_type="text/event-stream")
    answers = [first]
    try:
        async for answer in pieces:
            answers.append(answer)
            if len(answers) % 16 == 0 and await request.is_disconnected():
                return _error(499, "the client has left.")
    except RuntimeError as error:
        return _error(503, str(error))
    finally:
        await pieces.aclose()
    whole = Answer(
        "".join(answer.text for answer in answers),
        [index for answer in answers for index in answer.ids],
        [logprob for answer in answers for logprob in answer.logprobs],
        answers[-1].finish_reason,
    )
    return JSONResponse({**form.whole(whole), "usage": _usage(len(prompt), len(whole.ids))})


async def _events(form: "_Form", first: Answer, pieces: AsyncIterator[Answer], prompt: int) -> AsyncIterator[str]:
    """Yields server-sent events. When the client leaves, the generator is closed, and the request with it."""
    made, answer = 0, first
    options = form.body.stream_options or {}
    try:
        while True:
            made += len(answer.ids)
            if answer.text or answer.finish_reason or form.wants_logprobs:
                yield f"data: {json.dumps(form.piece(answer))}\n\n"
            if answer.finish_reason:
                break
            answer = await anext(pieces)
        if options.get("include_usage"):
            yield f"data: {json.dumps({**form.piece(None), 'usage': _usage(prompt, made)})}\n\n"
        yield "data: [DONE]\n\n"
    except RuntimeError as error:
        yield f"data: {json.dumps(_error_body(503, str(error)))}\n\n"
    finally:
        await pieces.aclose()


class _Form:
    """How one kind of request and its answers are written.

    Attributes:
        kind: begins the id of an answer.
        whole_object, piece_object: kinds of an answer, and of a piece of one.
        whole_key, piece_key: where their text stands.
    """

    kind, whole_object, piece_object = "", "", ""
    whole_key = piece_key = "text"

    def __init__(self, body: _Settings, server: TextServer):
        self.body, self.server = body, server
        self._head = {"id": f"{self.kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": server.name}

    @property
    def wants_logprobs(self) -> bool:
        return self.body.logprobs is not None and self.body.logprobs is not False

    def max_bytes(self) -> int:
        return self.body.max_tokens or 16

    def whole(self, answer: Answer) -> dict:
        return {**self._head, "object": self.whole_object, "choices": [self._choice(answer, self.whole_key)]}

    def piece(self, answer: Answer | None) -> dict:
        choices = [] if answer is None else [self._choice(answer, self.piece_key)]
        return {**self._head, "object": self.piece_object, "choices": choices}

    def _choice(self, answer: Answer, key: str) -> dict:
        logprobs = self._logprobs(answer) if self.wants_logprobs else None
        content = self._content(answer)
        return {"index": 0, key: content, "finish_reason": answer.finish_reason, "logprobs": logprobs}

    def _tokens(self, answer: Answer) -> list[str]:
        return [self.server.tokenizer.convert_ids_to_tokens(index) for index in answer.ids]


class _CompletionForm(_Form):
    kind, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def prompt(self) -> list[int]:
        prompt = self.body.prompt
        if isinstance(prompt, str):
            return self.server.tokenizer(prompt).input_ids
        return prompt

    def _content(self, answer: Answer) -> str:
        return answer.text

    def _logprobs(self, answer: Answer) -> dict:
        return {"tokens": self._tokens(answer), "token_logprobs": answer.logprobs, "top_logprobs": None}


class _ChatForm(_Form):
    kind, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    whole_key, piece_key = "message", "delta"

    def max_bytes(self) -> int:
        return self.body.max_completion_tokens or self.body.max_tokens or 512

    def prompt(self) -> list[int]:
        messages = [{**message, "content": _as_text(message.get("content"))} for message in self.body.messages]
        tokenizer = self.server.tokenizer
        if not messages:
            raise ValueError("`messages` is empty; at least one is needed.")
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids

    def _content(self, answer: Answer) -> dict:
        return {"role": "assistant", "content": answer.text}

    def _logprobs(self, answer: Answer) -> dict:
        tokens = zip(self._tokens(answer), answer.logprobs)
        return {"content": [{"token": t, "logprob": p, "bytes": None, "top_logprobs": []} for t, p in tokens]}


def _as_text(content) -> str:
    """Joins the text of a message, which may come in parts."""
    if isinstance(content, list):
        kinds = [part.get("type") for part in content]
        if set(kinds) - {"text"}:
            raise ValueError(f"`content` must be text; got parts of types {kinds}.")
        return "".join(part["text"] for part in content)
    return content or ""


def _usage(prompt: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _error_body(status: int, message: str) -> dict:
    kinds = {400: "invalid_request_error", 429: "rate_limit_error"}
    return {"error": {"message": message, "type": kinds.get(status, "server_error"), "param": None, "code": status}}


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(_error_body(status, message), status_code=status)


def serve_folder(folder: str, name: str | None = None, **options) -> TextServer:
    """Makes a [`TextServer`] of a saved model (a folder, or a name on the Hub), on the first GPU if there is one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import blt_hf  # noqa: F401 (makes the Auto classes know BLT)

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return TextServer(model, AutoTokenizer.from_pretrained(folder), name or folder, **options)


__all__ = ["Answer", "QueueFullError", "TextServer", "make_app", "serve_folder"]
