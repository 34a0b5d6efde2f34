"""From the streams of a chat's choices, which threads fill, to replies and chunks on the event loop."""

import json
from collections.abc import Awaitable, Callable

import anyio
from anyio import to_thread

from medmax_fast.generate.requests import Result, TextPiece
from medmax_fast.model.picture_decoder import png
from medmax_fast.serving.dispatcher import Dispatcher, Drawing, Stream
from medmax_fast.serving.protocol import ApiError
from medmax_fast.serving.replies import Choice, Reply

Emit = Callable[[bytes], Awaitable[None]]


class Answering:
    """The answer to one chat while it is made, its choices side by side."""

    def __init__(self, dispatcher: Dispatcher, streams: list[Stream], reply: Reply, threads: anyio.CapacityLimiter):
        self._dispatcher, self._streams, self._threads = dispatcher, streams, threads
        self.reply = reply
        self.error: ApiError | None = None

    async def run(self, emit: Callable[[dict], Awaitable[None]]) -> None:
        """Follow all choices to their end, giving each chunk's choice as it comes; the first error ends all of them."""
        async with anyio.create_task_group() as group:

            async def follow(stream: Stream, choice: Choice) -> None:
                try:
                    await self._follow(stream, choice, emit)
                except ApiError as error:
                    self.error = self.error or error
                    group.cancel_scope.cancel()

            for stream, choice in zip(self._streams, self.reply.choices, strict=True):
                group.start_soon(follow, stream, choice)

    def close(self) -> None:
        """End what still runs or waits of it."""
        for stream in self._streams:
            stream.cancel()

    async def send_events(self, send: Emit, include_usage: bool) -> None:
        """All chunks as server-sent events; an error is one, too, since the status has been sent."""

        async def emit(choice: dict) -> None:
            await send(_event(self.reply.chunk(choice, include_usage)))

        await self.run(emit)
        if self.error:
            await send(_event(self.error.body()))
            return
        if include_usage:
            await send(_event(self.reply.usage_chunk()))
        await send(b"data: [DONE]\n\n")

    async def _follow(self, stream: Stream, choice: Choice, emit: Callable[[dict], Awaitable[None]]) -> None:
        await emit(choice.begin())
        while choice.finish_reason is None:
            # A thread that is left behind ends with the stream.
            event = await to_thread.run_sync(stream.next, abandon_on_cancel=True, limiter=self._threads)
            if isinstance(event, TextPiece):
                await emit(choice.add_text(event.text))
            elif isinstance(event, Drawing):
                await emit(choice.add_picture(await to_thread.run_sync(self._file, event)))
            elif isinstance(event, Result) and not event.error:
                await emit(choice.finish(event, stream.request.mode))
            else:
                raise self._failure(event)

    def _file(self, drawing: Drawing) -> bytes:
        """A picture as a PNG file, which is read as the very same codes when it is sent back."""
        file = png(drawing.pixels)
        self._dispatcher.remember(file, drawing.codes)
        return file

    def _failure(self, event: Result | None) -> ApiError:
        if event is None or not self._dispatcher.alive:
            return ApiError("the server is shutting down", status=503)
        return ApiError(f"this request cannot be run: {event.error}", code="cannot_be_run")


async def while_connected(receive: Callable[[], Awaitable[dict]], work: Callable[[], Awaitable[None]]) -> bool:
    """Run work() unless the client hangs up, which cancels it; whether it came to its end."""
    done = False
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        await work()
        done = True
        group.cancel_scope.cancel()
    return done


def _event(body: dict) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"
