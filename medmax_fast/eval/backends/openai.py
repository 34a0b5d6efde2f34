"""A model behind a chat-completions server as an evaluation backend.

Every ask is one user message with its pictures inside it as data: URLs, in the order of the content. Answers come from
a pool of threads; a question that fails, or whose picture is broken, is an error of its own, and the others go on.
There is no repetition penalty in this protocol, so a model that repeats itself does so up to its limit.
"""

import base64
import contextlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np

from medmax_fast.data.images import ImageError, Picture, decode, read_file
from medmax_fast.eval.backends.protocol import NEW_TOKENS, Answer, Ask, Content
from medmax_fast.eval.servers.chat import ChatClient, ChatError
from medmax_fast.model.picture_decoder import png

# Servers scale larger pictures down themselves, to less than this; it bounds what is sent.
MAX_SIDE = 2048
# What a server that draws is asked for; text alone is what all give unasked.
MODALITIES = {"image": ["image"], "any": ["text", "image"]}
# What every server reads, and the modes in which it does.
_MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


class OpenAIBackend:
    """See eval/backends/protocol.py; at most `concurrency` questions are in flight."""

    draws = None

    def __init__(self, client: ChatClient, concurrency: int):
        assert concurrency >= 1, concurrency
        self.client, self._concurrency = client, concurrency

    def answer(self, asks: list[Ask], batch_size: int, done: Callable[[int], None]) -> list[Answer]:
        """Answers in order of completion; InputError (BudgetSpent among them) for what ends the run.

        Then, and when interrupted, what has begun is waited for and kept in the client's cache, and the client stops.
        """
        workers = max(1, min(self._concurrency, len(asks)))
        with ThreadPoolExecutor(workers) as pool, contextlib.ExitStack() as ending:
            ending.callback(pool.shutdown, wait=False, cancel_futures=True)
            ending.callback(self.client.stop)
            futures = [pool.submit(self._answer, ask) for ask in asks]
            answers = []
            for future in as_completed(futures):
                answers.append(future.result())
                done(1)
            ending.pop_all()
        return answers

    def facts(self) -> dict:
        """The client's facts with the kind of backend and how it decodes."""
        decoding = "temperature 0 and seed 0, where the server takes them (see dropped), no repetition penalty"
        return {"kind": "openai", "decoding": decoding, **self.client.facts()}

    def _answer(self, ask: Ask) -> Answer:
        try:
            message = {"role": "user", "content": _parts(ask.content)}
            wish = {"modalities": MODALITIES[ask.mode]} if ask.mode != "text" else {}
            reply = self.client.ask([message], ask.new_tokens or NEW_TOKENS, **wish)
        except ImageError as error:
            return Answer(ask.id, error=str(error))
        except ChatError as error:
            return Answer(ask.id, error=str(error), passing=error.passing)
        content: Content = [{"type": "text", "text": reply.text}] if reply.text else []
        try:
            for i, data in enumerate(reply.pictures):
                pixels = decode(data, f"picture {i} of the reply", packed=True).decoded
                content.append({"type": "image", "pixels": pixels})
        except ImageError as error:
            return Answer(ask.id, content, error=str(error))
        return Answer(ask.id, content)


def image_url(path: str | os.PathLike, max_side: int = MAX_SIDE) -> str:
    """An image file as a data: URL; ImageError for what cannot be decoded whole.

    Still JPEG, PNG, WebP and GIF files of 8-bit grey or RGB go as they are; all else (TIFF, BMP, DICOM, CMYK, 16 bits,
    animations) goes as PNG, 16-bit grey levels scaled. max_side: pixels of the longer side; larger images are scaled
    down to it by Pillow's LANCZOS and go as PNG too.
    """
    data = read_file(path)
    picture = decode(data, str(path), depth16="scale", packed=True)
    mime = _mime(data, picture) if max(picture.size) <= max_side else None
    if mime is None:
        mime, data = "image/png", _png(picture, max_side)
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _mime(data: bytes, picture: Picture) -> str | None:
    """The media type of a file that any server can be expected to read, None for others."""
    from PIL import Image, UnidentifiedImageError

    if set(picture.notes) & {"frames", "depth16"}:
        return None
    try:
        with Image.open(io.BytesIO(data), formats=list(_MIME)) as image:
            # Pillow makes 8 bits of 16-bit colour in PNG without a word; its depth is byte 24 of the file.
            deep = image.format == "PNG" and data[24] > 8
            return _MIME[str(image.format)] if image.mode in _MODES and not deep else None
    except UnidentifiedImageError:
        return None


def _png(picture: Picture, max_side: int) -> bytes:
    from PIL import Image

    image = Image.fromarray(picture.decoded)
    longest = max(image.size)
    if longest > max_side:
        size = [max(1, round(side * max_side / longest)) for side in image.size]
        image = image.resize(size, Image.Resampling.LANCZOS)
    return png(np.asarray(image))


def _parts(content: Content) -> str | list[dict]:
    """Content pieces in the protocol's form; a plain string where there is no picture, which every server takes."""
    if all(piece["type"] == "text" for piece in content):
        return "".join(piece["text"] for piece in content)
    return [
        {"type": "text", "text": piece["text"]}
        if piece["type"] == "text"
        else {"type": "image_url", "image_url": {"url": image_url(piece["path"])}}
        for piece in content
    ]
