"""`medmax serve` as clients see it: OpenAI's own client, raw HTTP and our own evaluation against a real server."""

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
import httpx
import numpy as np
import openai
import pytest
from doc_blocks import blocks
from eval_folder import make_folder
from PIL import Image

from medmax_fast import cli
from medmax_fast.config import ServeConfig
from medmax_fast.eval.backends.native import NativeBackend
from medmax_fast.eval.backends.openai import OpenAIBackend
from medmax_fast.eval.backends.protocol import Ask
from medmax_fast.eval.servers.chat import ChatClient
from medmax_fast.generate.engine import Engine
from medmax_fast.generate.prompts import PromptEncoder
from medmax_fast.generate.requests import Request
from medmax_fast.model.picture_decoder import png
from medmax_fast.runtime import InputError
from medmax_fast.serving import app
from medmax_fast.serving.app import Service
from medmax_fast.serving.command import listening, names_of, running, serve, url_of
from medmax_fast.serving.dispatcher import Dispatcher
from medmax_fast.serving.replies import Counts
from medmax_fast.serving.uploads import Uploads

KEY = "sk-very-secret-0123456789abcdef"
NEW = 10
# Of every request that runs or waits.
PLACES = 6
# Uniform sampling begins a picture here after a few ids.
SHOWING = {"seed": 34, "temperature": 1e6, "top_p": 1.0, "guidance_text": 1.0, "guidance_image": 1.0}


@dataclass
class World:
    """A server on this machine, and an engine of the same weights to compare it with."""

    ckpt: Path
    url: str
    service: Service
    dispatcher: Dispatcher
    uploads: Uploads
    engine: Engine
    native: Engine

    @property
    def client(self) -> openai.OpenAI:
        return client_of(self.url)

    def post(self, **body) -> httpx.Response:
        return post(self.url, **{"model": "tiny", "messages": user("Hello"), "max_tokens": NEW, **body})

    def remembered(self, file: bytes) -> np.ndarray:
        """The codes that the server takes this image file for."""
        return self.engine.encoder._codes[hashlib.sha256(file).hexdigest()]

    def alone(self, *content, **settings) -> tuple[str, list[int]]:
        """What the engine answers to these pieces when nothing else runs."""
        request = Request("0", list(content), **{"max_new_tokens": NEW, "greedy": True, **settings})
        (result,) = self.native.generate([request])
        assert not result.error, result.error
        return "".join(piece.get("text", "") for piece in result.content), result.token_ids


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    ckpt = tmp_path_factory.mktemp("serve") / "tiny"
    assert cli.main(["init", str(ckpt)]) == 0
    engine = Engine.from_checkpoint(ckpt, "cpu", cache_gb=0.2)
    native = Engine(engine.decoder, PromptEncoder(engine.encoder.checkpoint), 20_000)
    config = ServeConfig(str(ckpt), batch_size=4, waiting=PLACES - 4)
    with Uploads() as uploads, listening("127.0.0.1", 0) as listener:
        dispatcher = Dispatcher(engine, config.batch_size, config.waiting)
        service = Service(engine, dispatcher, uploads, config, Counts(), "", names_of(listener))
        with running(service, listener), dispatcher:
            yield World(ckpt, url_of(listener), service, dispatcher, uploads, engine, native)


@contextlib.contextmanager
def another(world, **options):
    """The address of another server in front of the same engine, with these arguments of Service."""
    config = ServeConfig(str(world.ckpt), name="other")
    given = {"engine": world.native, "dispatcher": world.dispatcher, "uploads": world.uploads, "config": config}
    with listening("127.0.0.1", 0) as listener, running(Service(**{**given, "counts": Counts(), **options}), listener):
        yield url_of(listener)


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)


def post(url: str, headers=(), raw: bytes | None = None, **body) -> httpx.Response:
    headers = {"content-type": "application/json", **dict(headers)}
    content = raw if raw is not None else json.dumps(body).encode()
    return httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers, timeout=120)


def user(*content) -> list[dict]:
    """One message of the user: a string, or parts."""
    return [{"role": "user", "content": content[0] if len(content) == 1 else list(content)}]


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8).repeat(9, 0).repeat(9, 1)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def image_part(data: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def file_of(image: dict) -> bytes:
    return base64.b64decode(image["image_url"]["url"].partition(",")[2])


def until(condition, seconds=60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


# ---- answers ----


def test_a_question_is_answered_as_by_the_engine(world):
    expected, ids = world.alone(text("What organ is this?"))
    reply = world.client.chat.completions.create(
        model="tiny", messages=user("What organ is this?"), max_tokens=NEW, temperature=0, user="me", stop=None, n=None
    )
    (choice,) = reply.choices
    assert choice.message.content == expected and choice.message.role == "assistant" and len(expected) > 5
    prompt = len(world.native.tokenizer.encode("What organ is this?")) + 2
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (prompt, len(ids))
    assert reply.usage.total_tokens == prompt + len(ids)
    assert (choice.finish_reason, reply.model, reply.object) == ("length", "tiny", "chat.completion")


def test_a_stream_gives_the_same(world):
    expected, ids = world.alone(text("What organ is this?"))
    chunks = list(
        world.client.chat.completions.create(
            model="tiny",
            messages=user("What organ is this?"),
            max_completion_tokens=NEW,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"greedy": True},
        )
    )
    deltas = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert chunks[0].choices[0].delta.role == "assistant" and "".join(filter(None, deltas)) == expected
    assert len(deltas) > 5 and len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(ids)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    plain = world.post(messages=user("What organ is this?"), greedy=True, stream=True)
    assert plain.headers["content-type"].startswith("text/event-stream")
    assert plain.text.endswith("data: [DONE]\n\n") and "usage" not in plain.text


def test_images_and_turns_come_to_the_engine_in_order(world, tmp_path):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, path in enumerate(files):
        path.write_bytes(picture(seed))
    first, second = ({"type": "image", "path": str(path)} for path in files)
    messages = [
        {"role": "developer", "content": "Be brief."},
        *user(image_part(picture(0)), text("What is it?")),
        {"role": "assistant", "content": "A liver."},
        *user(text("And this?"), image_part(picture(1))),
    ]
    eot = {"type": "eot"}
    content = [text("Be brief."), first, text("What is it?"), eot, text("A liver."), eot, text("And this?"), second]
    expected, _ = world.alone(*content)
    reply = world.client.chat.completions.create(model="tiny", messages=messages, max_tokens=NEW, temperature=0)
    assert reply.choices[0].message.content == expected
    assert reply.usage.prompt_tokens == len(world.native.encoder.encode(Request("0", content)))
    swapped = [*messages[:3], *user(image_part(picture(1)), text("And this?"))]
    assert world.alone(*content[:-2], second, text("And this?"))[0] != expected
    assert (
        world.client.chat.completions.create(model="tiny", messages=swapped, max_tokens=NEW, temperature=0)
        .choices[0]
        .message.content
        == world.alone(*content[:-2], second, text("And this?"))[0]
    )
    assert len(world.uploads) == 0


def test_clients_at_once_get_what_they_get_alone(world):
    questions = [f"Question {i} about the slide?" for i in range(PLACES)]
    expected = [world.alone(text(question))[0] for question in questions]
    with ThreadPoolExecutor(PLACES) as pool:
        replies = list(pool.map(lambda q: world.post(messages=user(q), temperature=0).json(), questions))
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == expected
    assert len(set(expected)) == PLACES


def test_choices_differ_and_a_seed_repeats_them(world):
    asked = {"model": "tiny", "messages": user("Say something."), "max_tokens": NEW, "n": 2}
    first, again, other = (
        [choice.message.content for choice in world.client.chat.completions.create(**asked, seed=seed).choices]
        for seed in (5, 5, -6)
    )
    assert first == again and len({*first, *other}) == 4
    # As the engine and `medmax generate` draw for prompts of the ids 0 and 1.
    requests = [Request(i, [text("Say something.")], max_new_tokens=NEW, seed=5) for i in "01"]
    assert first == [result.content[0]["text"] for result in world.native.generate(requests)]
    streamed = {0: "", 1: ""}
    for chunk in world.client.chat.completions.create(**asked, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == first
    # Without a seed it is another one every time.
    assert world.post().json()["choices"] != world.post().json()["choices"]


def test_published_settings_are_the_default(world):
    (result,) = world.native.generate([Request("0", [text("Hello")], max_new_tokens=NEW, seed=3)])
    assert world.post(seed=3).json()["choices"][0]["message"]["content"] == result.content[0]["text"]
    settings = {"temperature": 0.5, "top_p": 0.7, "repetition_penalty": 1.0}
    (result,) = world.native.generate([Request("0", [text("Hello")], max_new_tokens=NEW, seed=3, **settings)])
    assert world.post(seed=3, **settings).json()["choices"][0]["message"]["content"] == result.content[0]["text"]


def test_pictures_are_those_of_the_engine_and_come_back_as_their_codes(world, tmp_path):
    """Drawn side by side: one for our own evaluation, one within a streamed text; then both are asked about."""
    chat = ChatClient(f"{world.url}/v1", "tiny", cache=None)
    shown = {"model": "tiny", "messages": user("Tell and show"), "max_tokens": 12}
    with ThreadPoolExecutor(2) as pool:
        ask = Ask("0", [text("A red cell.")], "image")
        drawn = pool.submit(OpenAIBackend(chat, 1).answer, [ask], 1, lambda _: None)
        chunks = list(
            world.client.chat.completions.create(
                **shown, stream=True, seed=SHOWING["seed"], modalities=["text", "image"], extra_body=SHOWING
            )
        )
        (answer,) = drawn.result()
    assert not answer.error and chat.facts()["dropped"] == []
    deltas = [chunk.choices[0].delta for chunk in chunks]
    (image,) = [image for delta in deltas for image in getattr(delta, "images", None) or []]
    before = "".join(delta.content or "" for delta in deltas[: [hasattr(d, "images") for d in deltas].index(True)])
    whole = "".join(delta.content or "" for delta in deltas)
    assert image["offset"] == len(before) and 0 < len(before) < len(whole) and image["index"] == 0

    requests = [Request("0", [text("Tell and show")], mode="any", max_new_tokens=12, **SHOWING)]
    requests += [Request("0", [text("A red cell.")], mode="image", greedy=True)]
    mixed, single = world.native.generate(requests)
    assert [piece["type"] for piece in mixed.content] == ["text", "image", "text"]
    assert before == mixed.content[0]["text"] and whole == before + mixed.content[2]["text"]

    # The conversation goes on with what was answered, in both forms in which it may be sent back.
    span, layout = world.native.layout.image_span(mixed.content[1]["codes"]).tolist(), world.native.layout
    said = world.native.tokenizer.encode
    ids = [layout.bos, *said("Tell and show"), layout.eot, *said(before), *span, *said(mixed.content[2]["text"])]
    ids += [layout.eot, *said("Why?"), layout.eot]
    (expected,) = world.native.generate([Request("0", token_ids=ids, greedy=True, max_new_tokens=NEW)])
    again = {"role": "assistant", "content": whole, "images": [image], "refusal": None, "annotations": []}
    parts = [text(before), {"type": "image_url", "image_url": image["image_url"]}, text(mixed.content[2]["text"])]
    for message in (again, {"role": "assistant", "content": parts}):
        reply = world.post(messages=[*user("Tell and show"), message, *user("Why?")], temperature=0).json()
        assert reply["usage"]["prompt_tokens"] == len(ids)
        assert reply["choices"][0]["message"]["content"] == expected.content[0]["text"]
    np.testing.assert_array_equal(world.remembered(file_of(image)), mixed.content[1]["codes"])
    np.testing.assert_array_equal(world.remembered(png(answer.pictures[0])), single.content[0]["codes"])
    assert Image.open(io.BytesIO(file_of(image))).size == (512, 512)


def test_our_own_evaluation_asks_our_own_server(world, tmp_path):
    files = [tmp_path / f"{seed}.png" for seed in range(2)]
    for seed, path in enumerate(files):
        path.write_bytes(picture(seed))
    asks = [
        Ask(f"{i} {question}", [{"type": "image", "path": str(path)}, text(question)], new_tokens=NEW)
        for i, path in enumerate(files)
        for question in ("Is it a tumor?", "What is shown?")
    ]
    served = OpenAIBackend(ChatClient(f"{world.url}/v1", "tiny", cache=None), 4).answer(asks, 4, lambda _: None)
    alone = NativeBackend(world.native, "tiny").answer(asks, 4, lambda _: None)
    assert {a.id: (a.text, a.error) for a in served} == {a.id: (a.text, None) for a in alone}
    folder, output = make_folder(tmp_path / "data"), tmp_path / "scores"
    flags = ["--data", folder, "--output", output, "--model", "tiny", "--api-url", f"{world.url}/v1", "--clip", "none"]
    flags += ["--tasks", "vqa_rad_closed,pmc_vqa_mcq", "--prompt-form", "tuned"]
    assert cli.main(["eval", "--backend", "openai", *map(str, flags)]) == 0
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_bytes().splitlines()]
    assert len(rows) == 3 and all(row["output"] for row in rows)


def test_the_examples_of_the_document(world, tmp_path, monkeypatch, capsys):
    """Those that do not draw, as they stand but for the port."""
    (tmp_path / "slide.png").write_bytes(picture(0))
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).resolve().parents[1] / "docs" / "serving.md"
    # Unasked, the server takes a random seed, and an untrained model may well end its answer at once.
    monkeypatch.setattr(app.secrets, "randbits", lambda bits: 7)
    config = ServeConfig(str(world.ckpt), name="tuned", batch_size=4)
    with another(world, engine=world.engine, config=config) as url:
        found = [
            replace(b, lines=tuple(x.replace("http://127.0.0.1:8000", url) for x in b.lines)) for b in blocks(page)
        ]
        (curl,) = (block.text for block in found if block.language == "sh")
        if shutil.which("curl"):
            said = subprocess.run(["bash", "-c", curl], check=True, capture_output=True, timeout=120).stdout
            assert json.loads(said)["choices"][0]["message"]["content"]
        script = tmp_path / "example.py"
        script.write_text(next(block.text for block in found if block.language == "python"))
        capsys.readouterr()
        names = runpy.run_path(str(script))
        printed = capsys.readouterr().out
        again = client_of(url).chat.completions.create(model="tuned", messages=names["messages"], max_tokens=60, seed=7)
        assert printed and printed == again.choices[0].message.content


# ---- the line, and clients that go ----


def test_a_full_line_and_clients_that_hang_up(world):
    """Streams fill all places; one more is refused; when the clients go, all places are free again at once."""
    hung_up = world.service.counts.hung_up
    # Two more than run at a time wait.
    request = {"model": "tiny", "messages": user("Draw"), "modalities": ["image"]}
    streams = [world.client.chat.completions.create(**request, stream=True) for _ in range(PLACES - 1)]
    # One client waits for a whole answer, and goes before it is made.
    impatient = httpx.Client(base_url=world.url)
    waiting = threading.Thread(target=lambda: leave(impatient, request))
    waiting.start()
    until(lambda: (world.dispatcher.running, world.dispatcher.waiting) == (4, 2))
    with pytest.raises(openai.RateLimitError, match="2 requests are waiting, try again later") as caught:
        world.client.chat.completions.create(**request)
    assert caught.value.response.headers["retry-after"] == "1" and caught.value.code == "busy"
    assert caught.value.body["type"] == "rate_limit_error"
    health = httpx.get(f"{world.url}/health").json()
    assert health == {"status": "ok", "running": 4, "waiting": 2}
    for stream in streams:
        stream.close()
    waiting.join()
    until(lambda: world.dispatcher.running + world.dispatcher.waiting == 0)
    until(lambda: world.service.counts.hung_up == hung_up + PLACES)
    assert world.post(temperature=0).status_code == 200 and len(world.uploads) == 0


def leave(client: httpx.Client, request: dict) -> None:
    """Ask, and hang up after two seconds."""
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=request, timeout=2)


def test_choices_are_taken_all_or_none(world):
    request = {"model": "tiny", "messages": user("Draw"), "modalities": ["image"], "stream": True}
    streams = [world.client.chat.completions.create(**request) for _ in range(PLACES - 1)]
    assert world.post(n=2).status_code == 429
    for stream in streams:
        stream.close()
    until(lambda: world.dispatcher.running + world.dispatcher.waiting == 0)


def test_a_client_that_goes_while_it_sends(world):
    hung_up = world.service.counts.hung_up

    def half():
        yield b'{"model": "tiny", '
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        httpx.post(
            f"{world.url}/v1/chat/completions", content=half(), headers={"content-type": "application/json"}, timeout=60
        )
    until(lambda: world.service.counts.hung_up == hung_up + 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_is_gone_before_the_answer_begins(world, stream):
    messages = user(image_part(picture(0)), text("Redraw it."))
    body = {"model": "other", "messages": messages, "modalities": ["image"], "stream": stream, "n": 2}
    events = [{"type": "http.request", "body": json.dumps(body).encode()}]
    config = ServeConfig(str(world.ckpt), name="other", batch_size=4)
    service = Service(world.engine, world.dispatcher, world.uploads, config, Counts())

    async def receive() -> dict:
        return events.pop() if events else {"type": "http.disconnect"}

    async def send(_: dict) -> None:
        await anyio.sleep(0)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}
    anyio.run(service, scope, receive, send)
    assert (service.counts.hung_up, service.counts.answered) == (1, 0) and len(world.uploads) == 0
    until(lambda: world.dispatcher.running + world.dispatcher.waiting == 0, seconds=20)


def test_a_server_that_ends_does_not_wait_for_a_client_that_sends_nothing(world):
    with socket.socket() as client:
        with another(world) as url:
            host, port = url.removeprefix("http://").split(":")
            client.connect((host, int(port)))
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert httpx.get(f"{url}/health").status_code == 200
            start = time.monotonic()
        assert time.monotonic() - start < 30


# ---- refusals ----

DATA = "data:image/png;base64,"
BAD = [
    ({"model": None}, "model is missing, expected 'tiny'", "model"),
    ({"temperature": -1}, "temperature -1: expected 0 or more", "temperature"),
    ({"temperature": True}, "temperature True: expected a number", "temperature"),
    ({"temperature": "0"}, "temperature '0': expected a number", "temperature"),
    ({"top_p": 2}, "top_p 2: expected 0 to 1", "top_p"),
    ({"repetition_penalty": 0}, "repetition_penalty 0: expected a positive number", "repetition_penalty"),
    ({"guidance_text": 1e300}, "guidance_text 1e+300: expected -1e+06 or more", "guidance_text"),
    ({"max_tokens": 0}, "max_tokens 0: expected 1 or more", "max_tokens"),
    ({"max_tokens": None, "max_completion_tokens": 1.5}, "max_completion_tokens 1.5: expected a whole number", None),
    ({"max_completion_tokens": 3}, "max_tokens and max_completion_tokens: expected one of them", "max_tokens"),
    ({"seed": 1 << 63}, f"seed {1 << 63}: expected a whole number of 64 bits", "seed"),
    ({"greedy": 1}, "greedy 1: expected true or false", "greedy"),
    ({"n": 5}, "n 5: expected 1 to 4", "n"),
    ({"n": "2"}, "n '2': expected a whole number", "n"),
    ({"stream": "yes"}, "stream 'yes': expected true or false", "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options without stream", "stream_options"),
    ({"stream": True, "stream_options": {"a": 1}}, "stream_options {'a': 1}: expected include_usage", "stream_options"),
    ({"logprobs": True}, "logprobs True is not supported", "logprobs"),
    ({"logprobs": 0}, "logprobs 0 is not supported", "logprobs"),
    ({"frequency_penalty": 0.5}, "frequency_penalty 0.5 is not supported", "frequency_penalty"),
    ({"stop": ["\n"]}, "stop ['\\n'] is not supported", "stop"),
    ({"tools": [{"type": "function"}]}, "tools [{'type': 'function'}] is not supported", "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format {'type': 'json_object'} is not", "response_format"),
    ({"best_of\ud83d": 2}, "unknown parameter 'best_of\\ud83d'", "best_of\ud83d"),
    ({"modalities": ["audio"]}, "modalities ['audio']: expected", "modalities"),
    ({"modalities": []}, 'modalities []: expected ["text"], ["image"] or ["text", "image"]', "modalities"),
    ({"messages": "Hello"}, "messages 'Hello': expected a list", "messages"),
    ({"messages": []}, "messages: no turns, expected a conversation that ends", "messages"),
    ({"messages": ["Hello"]}, "messages[0] 'Hello': expected an object", "messages[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role 'tool': expected one of system", None),
    ({"messages": user(7)}, "messages[0].content 7: expected a string or a list of parts", "messages[0].content"),
    ({"messages": user("a") + [{"role": "assistant", "tool_calls": [1]}]}, "'tool_calls' is not supported in", None),
    ({"messages": [{**user("a")[0], "images": [1]}]}, "'images' is not supported in a message of the user", None),
    ({"messages": user("a\ud83d")}, "messages[0].content: half of a surrogate pair", "messages[0].content"),
    ({"messages": user("a <reserved08706> b")}, "messages: the text holds the special token <reserved08706>", None),
    ({"messages": user("")}, "messages: a turn of the user is empty", "messages"),
    ({"messages": user("a" * 1_100_000)}, "messages: 1100000 characters of text, too many for 4096 ids", "messages"),
    ({"messages": user(*[text("a")] * 4096)}, "messages: 4097 messages and parts, too many for 4096 ids", "messages"),
    ({"messages": user("a " * 5000)}, "ids leave no room for an answer within 4096 (an image", None),
    (
        {"messages": user(*[{"type": "image_url", "image_url": {"url": DATA}}] * 4)},
        "messages: 4106 ids leave no room for an answer within 4096 (an image takes 1026)",
        "messages",
    ),
    (
        {"messages": user("a " * 3200), "modalities": ["image"]},
        "ids leave no room for 1024 ids for the picture within 4096",
        "messages",
    ),
    ({"messages": user({"type": "input_audio"}, text("b"))}, "a part of type 'input_audio', expected", None),
    ({"messages": user({"type": "text"}, text("b"))}, "messages[0].content[0]: {'type': 'text'}, expected", None),
    ({"messages": user({"type": "image_url"}, text("b"))}, "{'type': 'image_url'}, expected", None),
    (
        {"messages": user({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, text("b"))},
        "messages[0].content[0]: 'https://example.org/a.png' is not a data: URL; this server fetches nothing",
        "messages[0].content[0]",
    ),
    (
        {"messages": user({"type": "image_url", "image_url": "data:image/png,abc"}, text("b"))},
        "is not a data: URL",
        None,
    ),
    ({"messages": user({"type": "image_url", "image_url": "/etc/passwd"}, text("b"))}, "'/etc/passwd' is not a", None),
    ({"messages": user({"type": "image_url", "image_url": DATA + "A"}, text("b"))}, "content[0]: not base64 (", None),
    ({"messages": user(image_part(b"GIF89a"), text("b"))}, "messages[0].content[0]: .*; allowed are JPEG, PNG", None),
]
ASSISTANT = [
    ({"content": [text("b")], "images": [image_part(b"")]}, "messages[1]: images beside a list of parts, expected one"),
    ({"content": "b", "images": {"a": 1}}, "messages[1].images {'a': 1}: expected a list"),
    ({"content": "b", "images": [{**image_part(b""), "offset": 2}]}, "in rising order, of at most 1"),
    ({"content": "b", "images": [{**image_part(b""), "offset": True}]}, "in rising order, of at most 1"),
    ({"content": "b", "images": [{**image_part(b""), "offset": n} for n in (1, 0)]}, "messages[1].images[1]: expected"),
    ({"content": "b", "images": [text("c")]}, "messages[1].images[0]: expected an image_url with an offset"),
]
BAD += [
    ({"messages": [*user("a"), {"role": "assistant", **said}, *user("d")]}, words, None) for said, words in ASSISTANT
]


def pattern(message: str) -> str:
    """A message as a regular expression, in which .* is one already."""
    return re.escape(message).replace(r"\.\*", ".*")


@pytest.mark.parametrize(("body", "message", "param"), BAD)
def test_what_cannot_be_honoured_is_named(world, body, message, param):
    response = world.post(**body)
    error = response.json()["error"]
    assert response.status_code == 400 and re.search(pattern(message), error["message"]), error
    assert error["type"] == "invalid_request_error" and (param is None or error["param"] == param)
    assert len(error["message"]) < 400 and len(world.uploads) == 0


def test_bodies_that_are_no_requests(world):
    for raw, message in (
        (b"{", "the body is not JSON"),
        (b'{"temperature": NaN}', "the body is not JSON .NaN is no number."),
        (b"[" * 100_000, "the body is not JSON"),
        (b"\xff{}", "the body is not JSON"),
        (f'{{"seed": {"9" * 5000}}}'.encode(), "the body is not JSON"),
        (b"[]", "the body is a JSON list, expected an object"),
    ):
        response = post(world.url, raw=raw)
        assert response.status_code == 400 and re.match(message, response.json()["error"]["message"])
    kinds = (
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": ""},
    )
    for headers in kinds:
        response = post(world.url, headers, raw=b"{}")
        assert response.status_code == 415 and "expected application/json" in response.json()["error"]["message"]
    assert post(world.url, {"content-type": "application/json; charset=utf-8"}, raw=b"{}").status_code == 400


def test_clients_exceptions(world):
    create = world.client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="model 'gpt-4o' does not exist here, expected 'tiny'") as caught:
        create(model="gpt-4o", messages=user("a"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="leave no room") as caught:
        create(model="tiny", messages=user("a " * 5000))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="top_logprobs 2 is not supported") as caught:
        create(model="tiny", messages=user("a"), top_logprobs=2)
    assert caught.value.code == "unsupported_parameter"


def test_what_asks_for_nothing_may_be_said(world):
    harmless = {"frequency_penalty": 0.0, "presence_penalty": 0, "logprobs": False, "top_logprobs": 0, "logit_bias": {}}
    harmless |= {"stop": [], "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False}
    harmless |= {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "n": 1, "modalities": ["text"]}
    harmless |= {"stream": False, "functions": None, "audio": None, "prediction": None}
    assert world.post(**harmless).status_code == 200


def test_a_checkpoint_that_cannot_draw(world, monkeypatch):
    monkeypatch.setattr(world.service, "_draws", False)
    response = world.post(modalities=["image"])
    message = "modalities: this model cannot draw, its checkpoint has no picture decoder"
    assert response.status_code == 400 and response.json()["error"]["message"] == message
    assert httpx.get(f"{world.url}/v1/models").json()["data"][0]["output_modalities"] == ["text"]


def test_bodies_are_bounded_while_they_are_read(world):
    with Uploads(max_mb=0.01) as uploads, another(world, uploads=uploads) as url:
        limit = 10_000 * 4 // 3 * 3 + (1 << 20)
        message = f"the body is too large, expected at most {limit} bytes"
        assert post(url, raw=b" " * limit).status_code == 400
        response = post(url, raw=b" " * (limit + 1))
        assert response.status_code == 413 and response.json()["error"]["message"] == message
        # Without a length, in chunks.
        chunks, headers = (b" " * (1 << 16) for _ in range(200)), {"content-type": "application/json"}
        response = httpx.post(f"{url}/v1/chat/completions", content=chunks, headers=headers, timeout=60)
        assert response.status_code == 413 and response.json()["error"]["message"] == message
        with pytest.raises(openai.APIStatusError, match="too large") as caught:
            client_of(url).chat.completions.create(model="other", messages=user("a" * 2_000_000))
        assert caught.value.status_code == 413


def test_a_body_has_its_time(world, monkeypatch):
    monkeypatch.setattr("medmax_fast.serving.app.BODY_SECONDS", 0.1)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with another(world) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            client.settimeout(30)
            said = b""
            while not said.endswith(b"}"):
                said += client.recv(1 << 16)
        assert b" 408 " in said and b"the body has not arrived within 0.1 s" in said


def test_no_room_for_an_image(world, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world.service._uploads, "add", full)
    response = post(world.url, model="tiny", messages=user(image_part(picture(0)), text("What?")))
    error = response.json()["error"]
    assert response.status_code == 507 and error["message"] == "no room for an image (No space left on device)"


def test_the_key(world):
    with another(world, key=KEY) as url:
        for headers in ((), {"authorization": KEY}, {"authorization": "Bearer"}, {"authorization": f"Basic {KEY}"}):
            response = post(url, headers, raw=b"{}")
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert KEY not in response.text
        message = "missing or wrong API key, expected it as Authorization: Bearer KEY"
        for key in (KEY[:-1], KEY + "x", "none"):
            with pytest.raises(openai.AuthenticationError, match=message):
                client_of(url, key).models.list()
        assert httpx.get(f"{url}/v1/models", headers={"authorization": b"Bearer \xe9"}).status_code == 401
        assert httpx.get(f"{url}/v1/models").status_code == 401 and httpx.get(f"{url}/health").status_code == 200
        assert [model.id for model in client_of(url, KEY).models.list()] == ["other"]
        reply = client_of(url, KEY).chat.completions.create(model="other", messages=user("a"), max_tokens=1)
        assert reply.usage.completion_tokens == 1


def test_pages_of_other_sites_cannot_use_it(world):
    """By their own name that leads here, or by a request that a browser sends without asking."""
    port = world.url.rpartition(":")[2]
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", "[::1]:8000", "LOCALHOST"):
        assert httpx.get(f"{world.url}/health", headers={"host": host}).status_code == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost:80:80", "192.168.0.1"):
        response = httpx.get(f"{world.url}/health", headers={"host": host})
        assert response.status_code == 403
        expected = f"host {host!r} is not a name of this server: 127.0.0.1, ::1, localhost"
        assert response.json()["error"]["message"] == expected
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    asked |= {"access-control-request-headers": "content-type"}
    response = httpx.options(f"{world.url}/v1/chat/completions", headers=asked)
    assert response.status_code == 405 and not any("access-control" in name for name in response.headers)
    with another(world, hosts=()) as url:
        assert httpx.get(f"{url}/health", headers={"host": "proxy.example"}).status_code == 200


def test_other_paths_and_the_models(world):
    (model,) = world.client.models.list()
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "medmax_fast")
    assert (model.context_length, model.output_modalities) == (4096, ["text", "image"])
    response = httpx.get(f"{world.url}/v1/engines")
    assert response.status_code == 404 and response.json()["error"]["message"] == "GET /v1/engines: not found"
    response = httpx.get(f"{world.url}/v1/chat/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    assert response.json()["error"]["message"] == "GET /v1/chat/completions: method not allowed"


def test_what_the_engine_cannot_run_and_its_end(world):
    small = Engine(world.native.decoder, world.native.encoder, 256)
    dispatcher = Dispatcher(small, 2, 2)
    asked = {"model": "other", "messages": user("Hello")}
    with another(world, engine=small, dispatcher=dispatcher) as url:
        client = client_of(url)
        message = "this request cannot be run: needs 1088 positions of the cache, which holds 256; lower max_length"
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(**asked)
        with pytest.raises(openai.APIError, match=message):
            list(client.chat.completions.create(**asked, stream=True))
        # Shorter ones can be.
        stream = client.chat.completions.create(**asked, max_tokens=200, stream=True)
        pieces = [next(stream), next(stream)]
        assert pieces[1].choices[0].delta.content
        dispatcher.close()
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="the server is shutting down") as caught:
            client.chat.completions.create(**asked)
        assert caught.value.status_code == 503 and caught.value.body["type"] == "server_error"
        response = httpx.get(f"{url}/health")
        assert response.status_code == 503 and response.json()["status"] == "stopped"


# ---- the command ----


def flags(world, **values) -> ServeConfig:
    return ServeConfig(str(world.ckpt), **{"port": 0, "device": "cpu", "cache_gb": 0.1, **values})


def test_flags_that_cannot_be(world, monkeypatch):
    taken = int(world.url.rpartition(":")[2])
    for values, message in (
        ({"port": 65536}, "--port 65536: expected 0 to 65535"),
        ({"port": -1}, "--port -1: expected 0 to 65535"),
        ({"port": taken}, f"--host 127.0.0.1 --port {taken}: cannot listen there .Address already in use"),
        ({"host": "no such host"}, "--host no such host: no such address, expected one such as 127.0.0.1"),
        ({"host": ""}, "--host : no such address"),
        ({"host": "192.0.2.1"}, "--host 192.0.2.1 --port 0: cannot listen there .Cannot assign"),
        ({"batch_size": 0}, "--batch-size 0: expected 1 or more"),
        ({"waiting": -1}, "--waiting -1: expected 0 or more"),
        ({"max_pixels": 0}, "--max-pixels 0: expected a positive number"),
        ({"ckpt": str(world.ckpt / "no")}, "no"),
    ):
        with pytest.raises(InputError, match=message):
            serve(ServeConfig(**{"ckpt": str(world.ckpt), "port": 0, "device": "cpu", **values}))
    for key in ("", "  ", "two words", "\xe9"):
        monkeypatch.setenv("MEDMAX_API_KEY", key)
        with pytest.raises(InputError, match="MEDMAX_API_KEY is empty or holds blanks .*; unset it for none") as caught:
            serve(flags(world))
        assert not key.strip() or key not in str(caught.value)
    monkeypatch.delenv("MEDMAX_API_KEY")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match=r"uvicorn is missing, needed to serve: pip install 'medmax_fast\[serve\]'"):
        serve(flags(world))


def test_addresses():
    with listening("::1", 0) as listener:
        assert url_of(listener) == f"http://[::1]:{listener.getsockname()[1]}" and "::1" in names_of(listener)
    with listening("0.0.0.0", 0) as listener:
        assert names_of(listener) == () and url_of(listener).startswith("http://0.0.0.0:")
    with listening("localhost", 0) as listener:
        assert "localhost" in names_of(listener)


def test_sigterm_ends_the_command_with_a_summary(world, monkeypatch, capsys):
    """In this process, on an address that others reach, with a stream that is still running."""
    monkeypatch.setenv("MEDMAX_API_KEY", KEY)
    with listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    errors = []

    def visit() -> None:
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(url))
        client = client_of(url, KEY)
        client.chat.completions.create(model="tiny", messages=user("Hello"), max_tokens=3)
        stream = client.chat.completions.create(model="tiny", messages=user("Draw"), modalities=["image"], stream=True)
        next(stream)
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            list(stream)
        except openai.APIError as error:
            errors.append(str(error))

    visitor = threading.Thread(target=visit)
    visitor.start()
    before = signal.getsignal(signal.SIGTERM)
    summary = serve(flags(world, host="0.0.0.0", port=port, name="tiny"))
    visitor.join()
    assert errors == ["the server is shutting down"] and signal.getsignal(signal.SIGTERM) is before
    assert summary.pop("seconds") > 0
    expected = {"answered": 1, "refused": 1, "hung_up": 0, "pictures": 0, "prompt_ids": 5, "new_ids": 3}
    assert summary == expected
    out, err = capsys.readouterr()
    assert out == f"tiny: http://0.0.0.0:{port}/v1 (Ctrl-C ends it)\n" and KEY not in out + err


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    return False


def test_an_engine_that_fails_ends_the_command(world, monkeypatch, capsys):
    monkeypatch.setattr(Dispatcher, "alive", property(lambda _: False))
    with pytest.raises(RuntimeError, match="the engine or the web server has stopped"):
        serve(flags(world, host="0.0.0.0"))
    # Nor was a key set.
    assert "whoever reaches 0.0.0.0 may use this server; MEDMAX_API_KEY gives it a key" in capsys.readouterr().err


def test_the_command_itself_until_ctrl_c(world, tmp_path):
    arguments = ["serve", "--ckpt", world.ckpt, "--port", "0", "--device", "cpu", "--cache-gb", "0.1"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("MEDMAX_API_KEY", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-m", "medmax_fast", *map(str, arguments)], env=environment, **pipes)
    with process:
        url = re.fullmatch(r"tiny: (http://127\.0\.0\.1:\d+)/v1 \(Ctrl-C ends it\)\n", process.stdout.readline())[1]
        reply = post(url, model="tiny", messages=user(image_part(picture(0)), text("What?")), max_tokens=2)
        assert reply.status_code == 200 and list(tmp_path.glob("medmax-*"))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert err.strip().splitlines()[-1] == "medmax serve: interrupted; the server has ended, requests answered: 1"
    assert not list(tmp_path.glob("medmax-*"))
