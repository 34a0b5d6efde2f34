"""The chat client against a real server that fails in every way, and the backend built on it."""

import base64
import io
import json
import logging
import random
import socket
import threading
import time
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
from chat_server import MODEL, serve
from PIL import Image

from medmax_fast.data.images import ImageError
from medmax_fast.eval.backends.openai import NEW_TOKENS, OpenAIBackend, image_url
from medmax_fast.eval.backends.protocol import Ask
from medmax_fast.eval.servers.chat import SILENCE, ChatClient, ChatError, key_from_environment
from medmax_fast.eval.servers.chat_reply import seconds_to_wait
from medmax_fast.eval.servers.spending import BudgetSpent, Meter, price_of
from medmax_fast.runtime import InputError

KEY = "sk-very-secret-0123456789abcdef"


def quiet(_: int) -> None:
    """Told of answers as they come."""


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def echo(body: dict) -> str:
    content = body["messages"][-1]["content"]
    return f"answer to {content}" if isinstance(content, str) else f"{len(content)} parts"


def client_of(url: str, cache=None, **options) -> ChatClient:
    return ChatClient(url, "m", cache=cache, **{"backoff": 0.001, "timeout": 5.0, **options})


class Script:
    """An answer() that says these things in turn, and then goes on with echo."""

    def __init__(self, *said):
        self.said = list(said)

    def __call__(self, body: dict):
        return self.said.pop(0) if self.said else echo(body)


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# ---- one request ----


def test_request_and_reply():
    with serve(echo) as server:
        client = client_of(server.url + "/", key=KEY)
        reply = client.ask(user("hello there"), 7, top_logprobs=2)
    assert (reply.text, reply.model, reply.finish_reason) == ("answer to hello there", MODEL, "stop")
    assert (reply.pictures, reply.cached, reply.completion_tokens) == ([], False, 4) and reply.prompt_tokens > 0
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions" and request["headers"]["Authorization"] == f"Bearer {KEY}"
    expected = {"model": "m", "messages": user("hello there"), "max_tokens": 7, "temperature": 0, "seed": 0}
    assert request["body"] == {**expected, "top_logprobs": 2}
    facts = client.facts()
    assert facts["reported"] == [MODEL] and facts["dropped"] == [] and facts["model"] == "m"
    assert facts["usage"] == {
        "calls": 1,
        "retries": 0,
        "cached": 0,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": 4,
        "usd": None,
    }


MALFORMED = ["[]", '"text"', "null", "[" * 100_000, {"choices": [{}]}, {"choices": [{"message": {"content": 3}}]}]
MALFORMED += [{"choices": {"message": 1}}, {"choices": [{"message": {"content": [7]}}]}, "", "\x00\xff<html>"]
MALFORMED += [{"error": {"message": "upstream is down"}}, {"choices": [{"message": {"images": [{"image_url": 1}]}}]}]
MALFORMED += [{"choices": [{"message": {"images": [{"image_url": {"url": "data:image/png;base64,A"}}]}}]}]


def test_malformed_bodies_are_tried_again():
    with serve(echo) as server:
        client, hasty = client_of(server.url), client_of(server.url, tries=2)
        for i, body in enumerate(MALFORMED):
            server.answer = Script((200, body), (200, body))
            assert client.ask(user("x"), 1).text == "answer to x", body
            assert (client.meter.calls, client.meter.retries) == (3 * i + 3, 2 * i + 2), body
            server.answer = lambda _, body=body: (200, body)
            with pytest.raises(ChatError, match="after 2 tries.*not a chat completion") as caught:
                hasty.ask(user("y"), 1)
            assert caught.value.passing and "\n" not in str(caught.value)


def test_statuses_that_may_pass():
    with serve(echo) as server:
        client, hasty = client_of(server.url), client_of(server.url, tries=3)
        for status in (408, 409, 429, 500, 502, 503, 504, 529):
            before = len(server.requests)
            server.answer = lambda _, status=status: (status, {"error": {"message": "busy\nnow"}})
            with pytest.raises(ChatError, match=f"after 3 tries, the last: {status}: busy now") as caught:
                hasty.ask(user("x"), 1)
            assert caught.value.passing and len(server.requests) == before + 3
            server.answer = Script((status, "<html>"), (status, {"error": "busy"}))
            assert client.ask(user("x"), 1).text == "answer to x"


@pytest.mark.parametrize("status", [400, 413, 415, 418, 422])
def test_statuses_of_one_request(status):
    message = "max_tokens is too large: 99999. This model supports at most 4096 completion tokens"
    with serve(lambda _: (status, {"error": {"message": message, "param": "max_tokens", "code": None}})) as server:
        client = client_of(server.url)
        with pytest.raises(ChatError, match=f"^{status}: max_tokens is too large") as caught:
            client.ask(user("x"), 1)
        assert not caught.value.passing and len(server.requests) == 1
        assert client.facts()["dropped"] == []


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (
            401,
            {"error": {"message": f"Incorrect API key provided: {KEY}"}},
            "refuses the key of MEDMAX_JUDGE_API_KEY",
        ),
        (
            401,
            {"error": {"message": f"Incorrect API key provided: {KEY[:8]}****{KEY[-4:]}."}},
            "refuses the key of MEDMAX_JUDGE_API_KEY",
        ),
        (403, f"<b>no\nentry</b> for Bearer {KEY}", "refuses the key of MEDMAX_JUDGE_API_KEY"),
        (404, {"error": {"message": "The model does not exist", "code": "model_not_found"}}, "no model 'm'"),
        (402, {"error": {"message": "Insufficient credits"}}, "no credit left"),
        (429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, "no credit left"),
        (429, {"error": {"message": "Quota", "type": "insufficient_quota", "code": None}}, "no credit left"),
        (302, "moved", "sends requests on to"),
    ],
)
def test_what_ends_the_run(status, body, words, tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO)
    with serve(lambda _: (status, body, {"Location": f"https://elsewhere/?key={KEY}"})) as server:
        client = client_of(server.url, tmp_path, key=KEY, flag="--judge-url")
        with pytest.raises(InputError) as caught:
            client.ask(user("x"), 1)
        assert len(server.requests) == 1
    message = str(caught.value)
    assert words in message and f"--judge-url {server.url}: " in message and str(status) in message
    assert "\n" not in message
    printed = "".join(capfd.readouterr())
    for place in (message, repr(caught.value), repr(client), str(client.facts()), caplog.text, printed):
        assert KEY not in place and KEY[-4:] not in place
    assert not files_below(tmp_path)


def test_flagged_content_is_of_one_request():
    with serve(lambda _: (403, {"error": {"message": "your input was flagged"}})) as server:
        with pytest.raises(ChatError) as caught:
            client_of(server.url).ask(user("x"), 1)
        assert not caught.value.passing


def test_a_reply_that_takes_too_long_or_never_ends():
    """A server that says a little now and then must not hold a thread for ever."""
    ended = threading.Event()

    def drip(listener):
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while not ended.wait(0.05):
                try:
                    connection.sendall(b"1\r\n \r\n")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        began = time.monotonic()
        with pytest.raises(ChatError, match="without end") as caught:
            client_of(f"http://127.0.0.1:{listener.getsockname()[1]}", tries=1, timeout=0.4).ask(user("x"), 1)
        assert caught.value.passing and time.monotonic() - began < 3
        ended.set()
        thread.join()
    with serve(echo, fail=1.0, slow=0.6) as server:
        with pytest.raises(ChatError) as caught:
            client_of(server.url, tries=12, timeout=0.1).ask(user("x"), 1)
        assert caught.value.passing and server.counts["slow"] and server.counts["closed"]
        assert sum(server.counts.values()) == 12


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    client = client_of(url, tries=2)
    with pytest.raises(ChatError, match="after 2 tries") as caught:
        client.ask(user("x"), 1)
    assert caught.value.passing
    with pytest.raises(InputError, match=f"^--api-url {url}: no server found there"):
        client.check()


def test_waits():
    """Retry-After is honoured, in both of its forms, up to a minute; without it waits grow from the base."""
    assert seconds_to_wait("2") == 2 and seconds_to_wait(" 0.5") == 0.5
    assert 8 < seconds_to_wait(formatdate(time.time() + 10, usegmt=True)) <= 10
    for text in ("", "soon", "-3", "nan", "inf", formatdate(0, usegmt=True), "9" * 400):
        assert seconds_to_wait(text) == 0
    waits = []
    with serve(Script((503, "", {"Retry-After": "0.3"}))) as server:
        client = client_of(server.url)
        wait = client._stopped.wait
        client._stopped.wait = lambda seconds: waits.append(seconds) or wait(seconds)
        began = time.monotonic()
        client.ask(user("x"), 1)
        assert time.monotonic() - began >= 0.3 and len(waits) == 1 and 0.3 <= waits.pop() < 2
    with serve(lambda _: (429, "", {"Retry-After": "86400"})) as server:
        client = client_of(server.url)
        client._stopped.wait = waits.append
        with pytest.raises(ChatError):
            client.ask(user("x"), 1)
        assert waits == [60.0] * 7
        waits.clear()
        server.answer = lambda _: (500, "")
        client = client_of(server.url, backoff=2.0, tries=40)
        client._stopped.wait = waits.append
        with pytest.raises(ChatError):
            client.ask(user("x"), 1)
    assert all(0 <= wait <= min(60, 2.0 * 2**n) for n, wait in enumerate(waits)) and len(set(waits)) == 39
    assert max(waits) > 30


def test_stop_ends_the_waiting():
    with serve(lambda _: (503, "", {"Retry-After": "50"})) as server:
        client = client_of(server.url)
        timer = threading.Timer(0.3, client.stop)
        timer.start()
        began = time.monotonic()
        with pytest.raises(ChatError, match="stopped") as caught:
            client.ask(user("x"), 1)
        assert caught.value.passing and time.monotonic() - began < 5
        with pytest.raises(ChatError, match="stopped"):
            client.ask(user("y"), 1)
        assert len(server.requests) == 1


# ---- dialects ----


def refusing(*names, form):
    def answer(body):
        for name in names:
            if name in body:
                return form(name)
        return echo(body)

    return answer


UNSUPPORTED = "Unsupported parameter: '{}' does not go with 'max_completion_tokens', 'temperature' or 'seed'."
FORMS = {
    "openai": lambda name: (
        400,
        {"error": {"message": UNSUPPORTED.format(name), "code": "unsupported", "param": name}},
    ),
    "pydantic": lambda name: (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra"}]}),
    "plain": lambda name: (400, f"unknown field '{name}'"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", [["max_tokens"], ["seed"], ["seed", "max_tokens", "temperature"]], ids=str)
def test_refused_parameters_are_left_out(form, names, tmp_path):
    with serve(refusing(*names, form=FORMS[form])) as server:
        client = client_of(server.url, tmp_path)
        assert client.ask(user("x"), 9).text == "answer to x"
        assert len(server.requests) == len(names) + 1
        client.ask(user("y"), 9)
        assert len(server.requests) == len(names) + 2
    last = server.requests[-1]["body"]
    full = {"temperature", "seed", "max_tokens"} - set(names)
    assert set(last) == {"model", "messages"} | full | ({"max_completion_tokens"} if "max_tokens" in names else set())
    assert last.get("max_tokens", last.get("max_completion_tokens")) == 9
    assert client.facts()["dropped"] == sorted(names) and client.facts()["usage"]["retries"] == 0
    # A run from the cache alone says the same of itself.
    again = client_of(server.url, tmp_path)
    again.ask(user("x"), 9)
    expected = {**client.facts(), "usage": None}
    assert {**again.facts(), "usage": None} == expected


def test_parameters_are_dropped_once_only():
    with serve(
        lambda body: FORMS["openai"]("max_tokens" if "max_tokens" in body else "max_completion_tokens")
    ) as server:
        with pytest.raises(ChatError) as caught:
            client_of(server.url).ask(user("x"), 1)
        assert not caught.value.passing and len(server.requests) == 2


def test_text_and_pictures_of_all_forms(capfd):
    one, two = png(noise(5, 7)), png(noise(3, 4))
    parts = [{"type": "text", "text": "a "}, {"type": "image_url", "image_url": {"url": data_url(one)}}]
    parts += [{"type": "output_text", "text": "b"}, {"type": "reasoning"}]
    away = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/secret.png"}}
    images = {"content": None, "images": [{"type": "image_url", "image_url": {"url": data_url(two)}}, away]}
    refusal = {"content": None, "refusal": "I will not"}
    with serve(Script(parts, images, refusal, {"content": None}, "half \ud800 pair")) as server:
        client = client_of(server.url)
        replies = [client.ask(user(str(i)), 1) for i in range(5)]
    assert [reply.text for reply in replies] == ["a b", "", "I will not", "", "half ? pair"]
    assert [reply.pictures for reply in replies] == [[one], [two], [], [], []]
    assert [reply.unfetched for reply in replies] == [0, 1, 0, 0, 0]
    assert capfd.readouterr().err.count("not fetched") == 1


# ---- cache, keys, money ----


def test_cache(tmp_path):
    picture = png(noise(4, 4))
    said = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": data_url(picture)}}]
    with serve(lambda _: said) as server:
        client = client_of(server.url, tmp_path, key=KEY)
        first = client.ask(user("x"), 5)
        second = client.ask(user("x"), 5)
        assert len(server.requests) == 1 and second.cached and not first.cached
        assert {**vars(second), "cached": False} == vars(first) and first.pictures == [picture]
        (file,) = files_below(tmp_path)
        assert file.parent.parent == tmp_path and file.name.startswith(file.parent.name) and len(file.stem) == 64
        # Whatever the reply depends on makes another file.
        client.ask(user("x"), 6)
        client.ask(user("y"), 5)
        client.ask(user("x"), 5, stop=["."])
        ChatClient(server.url, "other", cache=tmp_path).ask(user("x"), 5)
        assert len(server.requests) == 5 == len(files_below(tmp_path))
        assert client.facts()["usage"]["cached"] == 1
        stored = json.loads(file.read_text())
        assert stored["request"] == {"model": "m", "max_tokens": 5, "text": "x", "images": 0}
        wrong = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"reply": {}, "dropped": []}', file.read_bytes()[:-30]]
        for change in ({"text": 3}, {"pictures": ["?"]}, {"pictures": None}, {"extra": 1}):
            wrong.append(json.dumps({**stored, "reply": {**stored["reply"], **change}}).encode())
        wrong.append(json.dumps({**stored, "dropped": [["a"]]}).encode())
        for i, content in enumerate(wrong):
            file.write_bytes(content)
            assert client_of(server.url, tmp_path).ask(user("x"), 5) == first, content
            assert len(server.requests) == 6 + i
            assert json.loads(file.read_text()) == stored


def test_failures_are_not_cached(tmp_path):
    with serve(Script((400, "no"), (500, "no"), (200, "{}"))) as server:
        client = client_of(server.url, tmp_path, tries=1)
        for _ in range(3):
            with pytest.raises(ChatError):
                client.ask(user("x"), 1)
        assert not files_below(tmp_path)
        assert client.ask(user("x"), 1).text == "answer to x"


def test_keys_stay_secret(tmp_path, caplog, capfd):
    """Even where a server sends them back in its answers."""
    caplog.set_level(logging.DEBUG)
    password, token = "p%40ss-word-9876543210", "query-secret-0123456789"
    with serve(lambda body: "ok") as server:
        host = server.url.removeprefix("http://")

        def all_headers(_):
            request = server.requests[-1]
            return f"{request['headers']} {request['path']}"

        seen = []
        for url, key in ((server.url, KEY), (f"http://me:{password}@{host}?sig={token}", "")):
            for i, answer in enumerate((all_headers, lambda _: (400, all_headers(_)), lambda _: (401, all_headers(_)))):
                server.answer = answer
                client = client_of(url, tmp_path, key=key)
                try:
                    seen.append(client.ask(user(f"{i}"), 1))
                except (ChatError, InputError) as error:
                    seen += [error, repr(error)]
                seen += [client, client.facts(), OpenAIBackend(client, 1).facts(), client.url]
        assert server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"
        basic = server.requests[-1]["headers"]["Authorization"]
        assert base64.b64decode(basic.removeprefix("Basic ")) == b"me:p@ss-word-9876543210"
        assert server.requests[-1]["path"] == f"/v1/chat/completions?sig={token}"
        assert client.url == server.url
    cached = [path.read_text() for path in files_below(tmp_path)]
    assert len(cached) == 1 and "[key]" in cached[0]
    for place in [*map(str, seen), *map(repr, seen), *cached, "".join(capfd.readouterr())]:
        for secret in (KEY, "p@ss-word-9876543210", password, token, basic.removeprefix("Basic ")):
            assert secret not in place
    # The library's own log shows addresses as they are, but no keys.
    assert KEY not in caplog.text and password not in caplog.text


def test_short_placeholders_do_not_change_answers(tmp_path):
    with serve(lambda _: "EMPTY is no answer") as server:
        assert client_of(server.url, key="EMPTY").ask(user("x"), 1).text == "EMPTY is no answer"


@pytest.mark.parametrize("key", ["sk two", "sk-\u00e9", "a\nb"])
def test_impossible_keys(key):
    with pytest.raises(InputError) as caught:
        client_of("http://127.0.0.1:9/v1", key=key)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://x/v1",
        "http://",
        "http://x:port/v1",
        "http://a b/v1",
        "http://me:1/2@x/v1",
        "http://\u2603..x",
    ],
)
def test_impossible_addresses(url):
    with pytest.raises(InputError, match="^--api-url.*: not an "):
        client_of(url)


def test_keys_from_the_environment(monkeypatch):
    monkeypatch.delenv("A_KEY", raising=False)
    monkeypatch.setenv("B_KEY", "  ")
    monkeypatch.setenv("C_KEY", "three\n")
    assert key_from_environment("A_KEY", "B_KEY", "C_KEY") == "three"
    assert key_from_environment("A_KEY", "B_KEY") == ""


def test_check():
    with serve(echo) as server:
        client_of(server.url).check()
        # Servers need not have the list of models.
        client_of(server.url.removesuffix("/v1") + "/nothing").check()
        assert not server.requests
        for status, ends in ((401, True), (302, True), (403, False), (404, False), (405, False), (503, False)):
            server.RequestHandlerClass.do_GET = lambda handler, status=status: handler._send(status, f"no {KEY}")
            try:
                client_of(server.url, key=KEY).check()
                assert not ends, status
            except InputError as error:
                assert ends and KEY not in str(error) and str(error).startswith(f"--api-url {server.url}: "), status


def test_budget_and_prices(tmp_path):
    assert price_of("gpt-4o-mini", "", "--price") == (0.15, 0.60)
    assert price_of("unheard-of", "", "--price") is None and price_of("gpt-4o", " 1, 2.5", "--price") == (1.0, 2.5)
    for text in ("1", "1,2,3", "a,b", "-1,2", "nan,1", "1,inf", ","):
        with pytest.raises(InputError, match=f"^--price {text}: expected USD"):
            price_of("gpt-4o", text, "--price")
    with pytest.raises(InputError, match="--budget 2: the price of 'm' is not known"):
        client_of("http://127.0.0.1:9", meter=Meter(2.0))
    with serve(lambda _: "one two three") as server:
        meter = Meter(budget=0.05)
        client = client_of(server.url, tmp_path, prices=(0.0, 10_000.0), meter=meter)
        client.ask(user("0"), 1)
        assert meter.usage()["usd"] == pytest.approx(0.03)
        client.ask(user("1"), 1)
        with pytest.raises(BudgetSpent, match=r"^--budget 0.05: 0.0600 USD spent; .*larger --budget"):
            client.ask(user("2"), 1)
        assert len(server.requests) == 2
        # What is known costs nothing, even then.
        assert client.ask(user("1"), 1).cached
        larger = Meter(budget=0.09)
        client = client_of(server.url, tmp_path, prices=(0.0, 10_000.0), meter=larger)
        assert [client.ask(user(str(i)), 1).cached for i in range(3)] == [True, True, False]
        assert larger.usage()["usd"] == pytest.approx(0.03) and larger.usage()["cached"] == 2
        server.answer = lambda _: (200, {"choices": [{"message": {"content": "free?"}}]})
        with pytest.raises(InputError, match="does not report the tokens"):
            client.ask(user("3"), 1)
        assert client.ask(user("3"), 1).text == "free?"


# ---- pictures ----


def sent(url: str) -> tuple[str, Image.Image, bytes]:
    head, _, data = url.partition(";base64,")
    raw = base64.b64decode(data, validate=True)
    image = Image.open(io.BytesIO(raw))
    image.load()
    return head.removeprefix("data:"), image, raw


@pytest.mark.parametrize(("name", "mime"), [("a.jpg", "jpeg"), ("a.png", "png"), ("a.webp", "webp"), ("a.gif", "gif")])
def test_usual_files_go_as_they_are(name, mime, tmp_path):
    path = tmp_path / f"{name}.bin"
    Image.fromarray(noise(30, 40)).save(path, name[2:].replace("jpg", "jpeg"))
    found, _, raw = sent(image_url(path))
    assert found == f"image/{mime}" and raw == path.read_bytes()


def test_other_files_go_as_png(tmp_path, golden):
    pixels = noise(20, 30)
    for name in ("a.tiff", "a.bmp", "a.jp2"):
        Image.fromarray(pixels).save(tmp_path / name, **({"irreversible": False} if name == "a.jp2" else {}))
        mime, image, _ = sent(image_url(tmp_path / name))
        assert mime == "image/png" and image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)
    deep = np.arange(600, dtype=np.uint16).reshape(20, 30) * 109
    Image.fromarray(deep).save(tmp_path / "deep.png")
    _, image, _ = sent(image_url(tmp_path / "deep.png"))
    expected = np.floor(deep / 65535 * 255 + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(image), np.repeat(expected[..., None], 3, 2))
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.jpg")
    mime, image, _ = sent(image_url(tmp_path / "cmyk.jpg"))
    assert (mime, image.mode, image.size) == ("image/png", "RGB", (30, 20))
    frames = [Image.fromarray(noise(8, 8 + i)).crop((0, 0, 8, 8)) for i in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    mime, image, _ = sent(image_url(tmp_path / "moving.gif"))
    assert (mime, image.size) == ("image/png", (8, 8))


def test_dicom_goes_as_png(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3"
    data = FileDataset(str(tmp_path / "a.dcm"), {}, file_meta=meta, preamble=b"\0" * 128)
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 6, 9, 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 0
    data.PixelData = np.arange(54, dtype=np.uint16).tobytes()
    data.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    mime, image, _ = sent(image_url(tmp_path / "a.dcm"))
    assert (mime, image.size) == ("image/png", (9, 6)) and np.asarray(image)[-1, -1].tolist() == [255, 255, 255]


def test_large_images_are_scaled_down(tmp_path):
    Image.fromarray(noise(60, 3000)).save(tmp_path / "wide.png")
    mime, image, _ = sent(image_url(tmp_path / "wide.png"))
    assert (mime, image.size) == ("image/png", (2048, 41))
    _, image, _ = sent(image_url(tmp_path / "wide.png", max_side=100))
    assert image.size == (100, 2)
    Image.fromarray(noise(5, 3000)).save(tmp_path / "line.png")
    assert sent(image_url(tmp_path / "line.png", max_side=100))[1].size == (100, 1)
    Image.fromarray(noise(64, 2048)).save(tmp_path / "fits.jpg")
    assert sent(image_url(tmp_path / "fits.jpg"))[2] == (tmp_path / "fits.jpg").read_bytes()


def test_broken_images_are_refused(tmp_path):
    Image.fromarray(noise(200, 200)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    contents = {"cut.png": whole[: len(whole) // 2], "empty.jpg": b"", "page.jpg": b"<html>not found</html>"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=name):
            image_url(tmp_path / name)
    with pytest.raises(ImageError, match="no such file"):
        image_url(tmp_path / "missing.png")


# ---- the backend ----


def test_backend_answers(tmp_path):
    Image.fromarray(noise(9, 9)).save(tmp_path / "a.png")
    drawn, parts = noise(6, 5), [{"type": "text", "text": "Here: "}]
    image = {"type": "image", "path": str(tmp_path / "a.png")}

    def answer(body):
        content = body["messages"][0]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        if text == "draw":
            return [*parts, {"type": "image_url", "image_url": {"url": data_url(png(drawn))}}]
        if text == "scrawl":
            return [*parts, {"type": "image_url", "image_url": {"url": data_url(b"not an image")}}]
        return {"filtered": (400, "content policy"), "down": (503, "")}.get(text, f"{text}!")

    asks = [Ask("a", [image, {"type": "text", "text": "what"}], new_tokens=1)]
    asks += [Ask(text, [{"type": "text", "text": text}], "any") for text in ("draw", "scrawl", "filtered", "down")]
    asks += [Ask("b", [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}])]
    asks += [Ask("broken", [{"type": "image", "path": str(tmp_path / "gone.png")}, {"type": "text", "text": "x"}])]
    with serve(answer) as server:
        backend = OpenAIBackend(client_of(server.url, tries=2), 4)
        answers = backend.answer(asks, 3, quiet)
        assert backend.answer([], 3, quiet) == []
    found = {answer.id: answer for answer in answers}
    assert len(answers) == len(asks) == len(found)
    assert found["a"].text == "what!" and found["b"].text == "one two!" and found["a"].error is None
    assert found["draw"].text == "Here: "
    np.testing.assert_array_equal(found["draw"].pictures[0], drawn)
    assert "picture 0 of the reply" in found["scrawl"].error and not found["scrawl"].passing
    assert found["filtered"].error == "400: content policy" and not found["filtered"].passing
    assert "503" in found["down"].error and found["down"].passing and not found["down"].content
    assert "gone.png: no such file" in found["broken"].error and not found["broken"].passing
    bodies = [request["body"] for request in server.requests]
    (first,) = [body for body in bodies if not isinstance(body["messages"][0]["content"], str)]
    assert first["max_tokens"] == 1 and first["messages"][0]["role"] == "user"
    assert [part["type"] for part in first["messages"][0]["content"]] == ["image_url", "text"]
    url = first["messages"][0]["content"][0]["image_url"]["url"]
    assert sent(url)[2] == (tmp_path / "a.png").read_bytes()
    assert {body["max_tokens"] for body in bodies} == {1, NEW_TOKENS} and NEW_TOKENS == 1024
    wishes = {str(body["messages"][0]["content"]): body.get("modalities") for body in bodies}
    assert wishes["draw"] == wishes["down"] == ["text", "image"] and wishes["one two"] is None
    facts = backend.facts()
    assert backend.draws is None and facts["kind"] == "openai" and facts["url"] == [server.url]
    assert "see dropped" in facts["decoding"] and facts["usage"]["calls"] == 7


def test_a_server_that_does_not_know_the_wish_for_pictures_is_asked_without():
    def answer(body):
        if "modalities" in body:
            return 400, {"error": {"message": "Unknown parameter: 'modalities'.", "param": "modalities"}}
        return echo(body)

    asks = [Ask(f"{mode} {i}", [{"type": "text", "text": "x"}], mode) for mode in ("image", "any") for i in range(2)]
    with serve(answer) as server:
        backend = OpenAIBackend(client_of(server.url), 1)
        assert [answer.text for answer in backend.answer(asks, 3, quiet)] == ["answer to x"] * 4
    assert [request["body"].get("modalities") for request in server.requests] == [["image"], None, None, None, None]
    assert backend.facts()["dropped"] == ["modalities"]


def test_unreliable_server_gives_the_same_answers(tmp_path):
    salt = random.random()
    asks = [Ask(f"q{i}", [{"type": "text", "text": f"{i} of {salt}"}]) for i in range(60)]
    found = []
    for run, shares in enumerate(({}, {"fail": 0.3, "nonsense": 0.05, "slow": 0.5})):
        with serve(echo, **shares) as server:
            backend = OpenAIBackend(client_of(server.url, tmp_path / str(run), timeout=0.25), 8)
            answers = backend.answer(asks, 100, quiet)
        assert all(answer.error is None for answer in answers)
        found.append(({answer.id: answer.text for answer in answers}, backend.facts(), dict(server.counts)))
    (calm, calm_facts, _), (rough, rough_facts, counts) = found
    assert calm == rough and len(calm) == 60
    usage = rough_facts["usage"]
    assert usage["retries"] == usage["calls"] - 60 > 5 and counts["answered"] == 60
    assert sum(counts.values()) == usage["calls"]
    assert usage["completion_tokens"] == calm_facts["usage"]["completion_tokens"]
    varying = {"usage": None, "url": None}
    assert {**calm_facts, **varying} == {**rough_facts, **varying}
    assert len(files_below(tmp_path / "1")) == 60


def test_the_servers_failures_are_reproducible():
    """Whatever the order of requests, or the test above would not mean much."""
    counts, texts = [], [f"question {i}" for i in range(40)]
    for order in (texts, texts[::-1]):
        with serve(echo, fail=0.4, nonsense=0.1, seed=3) as server:
            client = client_of(server.url)
            for text in order:
                client.ask(user(text), 1)
        counts.append(dict(server.counts))
    assert counts[0] == counts[1] and len(counts[0]) == 8


def test_budget_ends_a_batch_and_keeps_what_was_answered(tmp_path):
    asks = [Ask(f"q{i}", [{"type": "text", "text": str(i)}]) for i in range(200)]
    with serve(lambda _: "one two") as server:
        client = client_of(server.url, tmp_path, prices=(0.0, 5000.0), meter=Meter(0.1))
        began = time.monotonic()
        with pytest.raises(BudgetSpent):
            OpenAIBackend(client, 4).answer(asks, 200, quiet)
        assert time.monotonic() - began < 10
        # A cent a reply, and at most those of the other threads beyond the budget.
        assert 10 <= len(server.requests) <= 14
        assert len(files_below(tmp_path)) == len(server.requests)
        before = len(server.requests)
        free = client_of(server.url, tmp_path, prices=(0.0, 5000.0), meter=Meter(100.0))
        assert len(OpenAIBackend(free, 4).answer(asks, 200, quiet)) == 200
        assert len(server.requests) == 200 and free.meter.cached == before


def test_a_wrong_key_ends_a_batch_at_once(tmp_path):
    asks = [Ask(f"q{i}", [{"type": "text", "text": str(i)}]) for i in range(200)]
    answer = Script(*[(503, "", {"Retry-After": "50"})] * 3, *[(401, "who are you")] * 400)
    with serve(answer) as server:
        began = time.monotonic()
        with pytest.raises(InputError, match="the server wants a key, set OPENAI_API_KEY"):
            OpenAIBackend(client_of(server.url, tmp_path), 8).answer(asks, 200, quiet)
        assert time.monotonic() - began < 10 and len(server.requests) < 60


def test_a_refusal_in_the_middle_is_of_one_request():
    """A server that has answered before may turn one request away, whatever status it finds for it."""

    def answer(body):
        status = {"forbid": 403, "lose": 404, "revoke": 401}.get(body["messages"][-1]["content"])
        return (status, {"error": {"message": "not this one"}}) if status else "yes"

    with serve(answer) as server:
        client = ChatClient(server.url, "m", cache=None)
        assert client.ask(user("hello"), 5).text == "yes"
        for word, passing in (("forbid", True), ("lose", True), ("revoke", True)):
            with pytest.raises(ChatError, match="not this one") as caught:
                client.ask(user(word), 5)
            assert caught.value.passing is passing
        assert client.ask(user("hello again"), 5).text == "yes"


def test_a_server_that_falls_silent_ends_the_run_in_time():
    down = False
    with serve(lambda body: (500, {"error": {"message": "down"}}) if down else "yes") as server:
        client = ChatClient(server.url, "m", cache=None, tries=2, backoff=0.001)
        client.ask(user("hello"), 5)
        down = True
        for i in range(SILENCE - 1):
            with pytest.raises(ChatError) as caught:
                client.ask(user(f"{i}"), 5)
            assert caught.value.passing
        with pytest.raises(InputError, match=f"--api-url .*: no answer after 2 tries, .*; so it went {SILENCE} times"):
            client.ask(user("once more"), 5)
        down = False
        assert client.ask(user("back"), 5).text == "yes"
        down = True
        with pytest.raises(ChatError):
            client.ask(user("counted from the start"), 5)


def test_what_a_run_has_cost_is_counted_when_it_goes_on(tmp_path):
    with serve(lambda body: "a b c") as server:
        prices = (2e6, 1e6)
        first = ChatClient(server.url, "m", cache=tmp_path, prices=prices)
        replies = [first.ask(user(f"question {i}"), 5) for i in range(3)]
    spent = first.meter.usd
    assert spent == pytest.approx(sum(2 * r.prompt_tokens + r.completion_tokens for r in replies)) and spent > 0
    later = Meter(spent + 1)
    later.count_kept(tmp_path, {"m": prices, "another": (1.0, 1.0)})
    assert later.before == pytest.approx(spent) and later.usd == 0
    poorer = Meter(spent / 2)
    poorer.count_kept(tmp_path, {"m": prices})
    with pytest.raises(BudgetSpent):
        poorer.check()
    unknown = Meter(1)
    unknown.count_kept(tmp_path, {"m": None})
    assert unknown.before == 0
