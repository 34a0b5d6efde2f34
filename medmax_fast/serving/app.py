"""The web application of `medmax serve`: POST /v1/chat/completions, GET /v1/models, GET /health.

The engine runs on its dispatcher's thread, requests are read and images checked on worker threads, and each running
answer has a thread that waits for its pieces, so the event loop only passes bytes on. A client that hangs up ends what
it asked for. Pages of other sites cannot use a server on this machine: they cannot send application/json without
asking first, which is refused, and a name of theirs that leads to this machine is not one of ours.
"""

import hmac
import json
import secrets
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from medmax_fast.config import ServeConfig
from medmax_fast.generate import requests as generation
from medmax_fast.generate.engine import Engine
from medmax_fast.model.layout import MAX_POSITIONS
from medmax_fast.runtime import InputError
from medmax_fast.serving.answering import Answering, while_connected
from medmax_fast.serving.conversation import content_of, count_ids
from medmax_fast.serving.dispatcher import Busy, Dispatcher
from medmax_fast.serving.hosts import is_one_of
from medmax_fast.serving.protocol import ApiError, image_data, read_chat
from medmax_fast.serving.replies import Choice, Counts, Reply
from medmax_fast.serving.uploads import Uploads
from medmax_fast.vocab import IMAGE_CODES, IMAGE_IDS

# Requests that are read, and their images decoded, at a time.
READERS = 4
# Bodies that arrive at a time, which bounds memory, and the seconds that one may take.
BODIES, BODY_SECONDS = 16, 120
# Of a body beside its images, whose bytes take a third more in base64; no text that fits into the context is as long.
TEXT_BYTES = 1 << 20


@dataclass(frozen=True)
class Prepared:
    """A request that is ready to run: one of the engine's per choice, the ids of its prompt, its image files."""

    requests: list[generation.Request]
    prompt_ids: int
    paths: list[Path]
    stream: bool
    include_usage: bool


class Service:
    """What the application answers with.

    counts: what is done is added to them. key: that clients must send, "" for none. hosts: names by which they may call
    this server, empty for any.
    """

    def __init__(
        self,
        engine: Engine,
        dispatcher: Dispatcher,
        uploads: Uploads,
        config: ServeConfig,
        counts: Counts,
        key: str = "",
        hosts: Collection[str] = (),
    ):
        self.name, self.counts = config.name or Path(config.ckpt).resolve().name, counts
        self._dispatcher, self._uploads = dispatcher, uploads
        self._tokenizer, self._draws = engine.tokenizer, engine.encoder.checkpoint.draws
        self._key, self._hosts, self._most_choices = key.encode(), hosts, config.batch_size
        self._reading, self._arriving = anyio.CapacityLimiter(READERS), anyio.CapacityLimiter(BODIES)
        # Those of answers that a client has left behind end a moment later.
        self._threads = anyio.CapacityLimiter(2 * (config.batch_size + config.waiting))
        self._max_body = uploads.max_bytes * 4 // 3 * (MAX_POSITIONS // IMAGE_IDS) + TEXT_BYTES
        self._begun = int(time.time())
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._health),
        ]
        handlers: dict[Any, Any] = {ApiError: self._fail, HTTPException: self._fail_http}
        self._app = Starlette(routes=routes, exception_handlers=handlers)

    async def __call__(self, scope, receive, send) -> None:
        """The ASGI application."""
        refusal = self._refusal(scope["path"], Headers(scope=scope))
        self.counts.refused += refusal is not None
        await (_failure(refusal) if refusal else self._app)(scope, receive, send)

    # ---- routes ----

    async def _chat(self, request: Request) -> Response:
        async with self._arriving:
            try:
                with anyio.fail_after(BODY_SECONDS):
                    body = await self._body(request)
            except ClientDisconnect:
                self.counts.hung_up += 1
                return Response()
            except TimeoutError as error:
                raise ApiError(f"the body has not arrived within {BODY_SECONDS} s", status=408) from error
            prepared = await to_thread.run_sync(self._prepare, body, limiter=self._reading)
            del body
        try:
            answering = self._submit(prepared)
        except ApiError:
            self._uploads.drop(prepared.paths)
            raise
        if prepared.stream:
            return _EventStream(self, answering, prepared)

        async def ignore(_: dict) -> None:
            """Nothing is sent before the answer is whole."""

        await self.finish(request.receive, lambda: answering.run(ignore), answering, prepared)
        if answering.error:
            raise answering.error
        return _json(answering.reply.whole())

    async def _models(self, _: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": self._begun, "owned_by": "medmax_fast"}
        model |= {"context_length": MAX_POSITIONS, "output_modalities": ["text", "image"] if self._draws else ["text"]}
        return _json({"object": "list", "data": [model]})

    async def _health(self, _: Request) -> Response:
        alive = self._dispatcher.alive
        state: dict[str, Any] = {"status": "ok" if alive else "stopped"}
        state |= {"running": self._dispatcher.running, "waiting": self._dispatcher.waiting}
        return _json(state, 200 if alive else 503)

    # ---- from a body to streams ----

    async def _body(self, request: Request) -> bytearray:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(f"content-type {kind!r}, expected application/json", status=415)
        body, declared = bytearray(), request.headers.get("content-length", "0")
        too_large = ApiError(f"the body is too large, expected at most {self._max_body} bytes", status=413)
        if int(declared) > self._max_body:
            raise too_large
        async for piece in request.stream():
            body += piece
            if len(body) > self._max_body:
                raise too_large
        return body

    def _prepare(self, body: bytearray) -> Prepared:
        chat = read_chat(body, self.name, self._most_choices)
        mode = chat.settings["mode"]
        if mode != "text" and not self._draws:
            lacking = "modalities: this model cannot draw, its checkpoint has no picture decoder"
            raise ApiError(lacking, "modalities", code="unsupported_parameter")
        text = sum(len(piece.get("text", "")) for turn in chat.turns for piece in turn.content)
        if text > TEXT_BYTES:
            much = f"messages: {text} characters of text, too many for {MAX_POSITIONS} ids"
            raise ApiError(much, "messages", code="context_length_exceeded")
        parts = len(chat.turns) + sum(len(turn.content) for turn in chat.turns)
        if parts > MAX_POSITIONS:
            many = f"messages: {parts} messages and parts, too many for {MAX_POSITIONS} ids"
            raise ApiError(many, "messages", code="context_length_exceeded")
        try:
            content = content_of(chat.turns, self._tokenizer)
        except InputError as error:
            raise ApiError(f"messages: {error}", "messages") from error
        # A picture alone begins with an id of its own, which is part of the prompt.
        prompt_ids = count_ids(chat.turns, self._tokenizer) + (mode == "image")
        if prompt_ids + (IMAGE_CODES if mode == "image" else 1) > MAX_POSITIONS:
            room = f"{IMAGE_CODES} ids for the picture" if mode == "image" else "an answer"
            long = f"messages: {prompt_ids} ids leave no room for {room} within {MAX_POSITIONS}"
            raise ApiError(f"{long} (an image takes {IMAGE_IDS})", "messages", code="context_length_exceeded")
        paths: list[Path] = []
        with ExitStack() as failing:
            failing.callback(self._uploads.drop, paths)
            content = [self._kept(piece, paths) if piece["type"] == "image" else piece for piece in content]
            failing.pop_all()
        settings = {"seed": secrets.randbits(63), **chat.settings}
        requests = [generation.Request(str(i), content, **settings) for i in range(chat.n)]
        return Prepared(requests, prompt_ids, paths, chat.stream, chat.include_usage)

    def _kept(self, piece: dict, paths: list[Path]) -> dict:
        """An image piece with the path of its file in place of its data; the path is noted at once."""
        data = image_data(piece)
        try:
            paths.append(self._uploads.add(data, piece["where"]))
        except InputError as error:
            raise ApiError(str(error), piece["where"], code="invalid_image") from error
        except OSError as error:
            raise ApiError(f"no room for an image ({error.strerror})", piece["where"], status=507) from error
        return {"type": "image", "path": str(paths[-1])}

    def _submit(self, prepared: Prepared) -> Answering:
        with ExitStack() as failing:
            streams = []
            for request in prepared.requests:
                try:
                    streams.append(self._dispatcher.submit(request))
                except Busy as error:
                    raise ApiError(f"{error}, try again later", status=429, code="busy", retry_after="1") from error
                except RuntimeError as error:
                    raise ApiError("the server is shutting down", status=503) from error
                failing.callback(streams[-1].cancel)
            failing.pop_all()
        choices = [Choice(i, self._tokenizer.layout.eos) for i in range(len(streams))]
        return Answering(self._dispatcher, streams, Reply(self.name, prepared.prompt_ids, choices), self._threads)

    async def finish(self, receive, work, answering: Answering, prepared: Prepared) -> None:
        """Run work(), which follows an answer, as long as its client is there; then forget its images and count it."""
        try:
            whole = await while_connected(receive, work)
        finally:
            answering.close()
            self._uploads.drop(prepared.paths)
        if not whole:
            self.counts.hung_up += 1
        elif answering.error:
            # Others are raised, and counted where they become a response.
            self.counts.refused += prepared.stream
        else:
            reply = answering.reply
            self.counts.answered += 1
            self.counts.pictures += sum(len(choice.images) for choice in reply.choices)
            self.counts.prompt_ids += reply.prompt_ids
            self.counts.new_ids += reply.ids

    # ---- refusals ----

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        """Why a request must not go further, if so."""
        if self._hosts and not is_one_of(headers.get("host", ""), self._hosts):
            stranger = f"host {headers.get('host', '')!r} is not a name of this server"
            return ApiError(f"{stranger}: {', '.join(sorted(self._hosts))}", status=403, code="unknown_host")
        if self._key and path != "/health":
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key):
                message = "missing or wrong API key, expected it as Authorization: Bearer KEY"
                return ApiError(message, status=401, code="invalid_api_key")
        return None

    async def _fail(self, _: Request, error: ApiError) -> Response:
        self.counts.refused += 1
        return _failure(error)

    async def _fail_http(self, request: Request, error: HTTPException) -> Response:
        """What the router refuses."""
        refused = f"{request.method} {request.url.path}: {error.detail.lower()}"
        return _failure(ApiError(refused, status=error.status_code, **(error.headers or {})))


class _EventStream(Response):
    """An answer as server-sent events."""

    def __init__(self, service: Service, answering: Answering, prepared: Prepared):
        # No Content-Length, and no proxy that waits for the end.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._service, self._answering, self._prepared = service, answering, prepared

    async def __call__(self, scope, receive, send) -> None:
        async def event(body: bytes) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": True})

        async def work() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._answering.send_events(event, self._prepared.include_usage)
            await send({"type": "http.response.body", "body": b""})

        await self._service.finish(receive, work, self._answering, self._prepared)


def _failure(error: ApiError) -> Response:
    return _json(error.body(), error.status, error.headers)


def _json(body: dict, status: int = 200, headers: dict | None = None) -> Response:
    return Response(json.dumps(body), status, headers, "application/json")
