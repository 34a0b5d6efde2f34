"""What stands behind the demo's page, without a browser: conversations, settings, what is refused, how it ends."""

import io
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from ports import free_port

pytest.importorskip("gradio", reason="the demo needs gradio")

from medmax_fast.cli import main  # noqa: E402
from medmax_fast.config import DemoConfig  # noqa: E402
from medmax_fast.demo import command, settings  # noqa: E402
from medmax_fast.demo.talk import Service, Talk, Visitors  # noqa: E402
from medmax_fast.generate.engine import Engine  # noqa: E402
from medmax_fast.generate.requests import Request  # noqa: E402
from medmax_fast.runtime import InputError  # noqa: E402
from medmax_fast.serving.dispatcher import Busy, Dispatcher  # noqa: E402
from medmax_fast.serving.uploads import Uploads  # noqa: E402

# Gradio's own use of pandas.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")


def png(side: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(side * side, dtype=np.uint8).reshape(side, side)).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def engine(golden):
    return Engine.from_checkpoint(golden / "checkpoint", device="cpu")


@contextmanager
def service(engine, folder, **limits):
    with Dispatcher(engine, **limits) as dispatcher, Uploads() as uploads:
        yield Service(dispatcher, engine.tokenizer, True, uploads, folder)


def fields(**changes) -> dict:
    values = dict(zip(settings.NAMES, settings.published(), strict=True)) | {"greedy": True, "max_new_tokens": 2}
    return settings.request_fields([(values | changes)[name] for name in settings.NAMES])


def test_settings_are_the_requests_own():
    assert settings.request_fields(settings.published()) | {"seed": 0} == {
        name: settings.DEFAULTS[name] for name in settings.NAMES
    }
    for setting in settings.SETTINGS:
        assert setting.least <= settings.DEFAULTS[setting.name] <= setting.most
        for value in (setting.least, setting.most):
            Request("1", [{"type": "text", "text": "?"}], **fields(**{setting.name: value})).check()
    assert fields(temperature=None)["temperature"] == settings.DEFAULTS["temperature"]
    assert fields()["seed"] != fields()["seed"] and fields(seed=" 12 ")["seed"] == 12
    with pytest.raises(InputError, match="seed '-1': expected a whole number, or nothing"):
        fields(seed="-1")


def test_a_conversation_goes_on_and_forgets_its_oldest_turns(engine, tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(png(64))
    with service(engine, tmp_path / "served") as shared:
        talk = Talk(shared)
        for number in range(4):
            views = list(talk.ask(f"Question {number}?", [str(image)], "text", fields()))
            assert views[-1].status.startswith("Done") and not views[-1].running
            assert len(views[-1].turns) == 2 * number + 2
            # A prompt holds three images, of which the newest stay.
            assert len(shared.uploads) == min(number + 1, 3)
        assert "the oldest turns (2) no longer fit and are forgotten" in views[-1].status
        assert len(list((tmp_path / "served").rglob("*.png"))) == 4
        talk.close()
        assert not len(shared.uploads) and not list((tmp_path / "served").iterdir())
    # It was not the page's to delete.
    assert image.exists()


def test_questions_that_cannot_be_answered(engine, tmp_path):
    with service(engine, tmp_path) as shared:
        talk = Talk(shared)
        refused = {
            "type a question, or attach an image": ("  ", [], "text"),
            "special token <image>": ("What is <image>?", [], "text"),
            "^nowhere.png: no such file; attach it again": ("What?", [str(tmp_path / "nowhere.png")], "text"),
            r"the question takes \d+ ids, expected at most": ("word " * 5000, [], "text"),
        }
        for message, (text, files, mode) in refused.items():
            with pytest.raises(InputError, match=message):
                talk.ask(text, files, mode, fields())
        with pytest.raises(InputError, match="temperature -1: expected 0 or more"):
            talk.ask("What?", [], "text", fields(temperature=-1))
        with pytest.raises(InputError, match="this checkpoint has no VQGAN decoder, so it cannot draw"):
            Talk(replace(shared, draws=False)).ask("A cell.", [], "image", fields())
        answer = talk.ask("What?", [], "text", fields())
        with pytest.raises(InputError, match="an answer is still being made; wait for it, or press Stop"):
            talk.ask("And what?", [], "text", fields())
        assert list(answer)[-1].status.startswith("Done")
        shared.dispatcher.close()
        with pytest.raises(InputError, match="the engine has stopped"):
            talk.ask("What?", [], "text", fields())
        assert not len(shared.uploads) and not len(talk.view("").turns) > 2


def test_a_question_that_is_not_asked_leaves_no_file(engine, tmp_path, monkeypatch):
    served, image = tmp_path / "served", tmp_path / "image.png"
    image.write_bytes(png(64))
    with service(engine, served) as shared:
        talk = Talk(shared)
        with pytest.raises(InputError, match="4 images, expected at most 3 in a question"):
            talk.ask("What?", [str(image)] * 4, "text", fields())
        with pytest.raises(InputError, match=r"the question takes \d+ ids"):
            talk.ask("word " * 5000, [str(image)] * 2, "text", fields())
        # What a browser can send, though it is no text.
        assert list(talk.ask("half \ud83d?", [], "text", fields()))[-1].turns[0] == ("user", ["half ??"])
        with monkeypatch.context() as patch:
            full = OSError(28, "No space left on device")
            patch.setattr(shared.uploads, "add", Mock(side_effect=full))
            with pytest.raises(InputError, match=r"^no room for an image \(No space left on device\)$"):
                talk.ask("What?", [str(image)], "text", fields())
        with monkeypatch.context() as patch:
            gone = FileNotFoundError(2, "No such file or directory")
            patch.setattr("medmax_fast.generate.prompts.hash_file", Mock(side_effect=gone))
            with pytest.raises(InputError, match=r"cannot be read \(No such file or directory\)"):
                list(talk.ask("What?", [str(image)], "text", fields()))
        with monkeypatch.context() as patch:
            full = Busy("2 requests are waiting")
            patch.setattr(shared.dispatcher, "submit", Mock(side_effect=full))
            with pytest.raises(
                InputError, match="^2 requests are waiting; what you typed is kept, try again in a moment$"
            ):
                talk.ask("What?", [str(image)], "text", fields())
        with talk._asking, pytest.raises(InputError, match="a question is being read already"):
            talk.ask("What?", [], "text", fields())
        assert not len(shared.uploads) and not [path for path in served.rglob("*") if path.is_file()]


def test_pages_that_never_say_that_they_are_closed(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("medmax_fast.demo.talk.MOST_TALKS", 3)
    with service(engine, tmp_path) as shared:
        with Visitors(shared) as visitors:
            talks = [visitors.enter(str(number)) for number in range(3)]
            # The one that was used last is the last to go.
            again = visitors.enter("0")
            visitors.enter("3")
            assert len(visitors) == 3 and visitors.of("0") is again and visitors.of("1") is None
            assert [talk._closed for talk in talks] == [True, True, False]
        assert not len(visitors) and again._closed and visitors.enter("late")._closed


def test_without_a_decoder_only_text_can_be_chosen(engine, tmp_path):
    from medmax_fast.demo import page

    with service(engine, tmp_path) as shared:
        parts = page.build(Visitors(shared), "small", draws=False).get_config_file()["components"]
    (mode,) = (part["props"] for part in parts if part["props"].get("elem_id") == "mode")
    assert not mode["interactive"] and "no VQGAN decoder" in mode["info"]
    (chat,) = (part["props"] for part in parts if part["props"].get("elem_id") == "chat")
    assert len(chat["examples"]) == 4


def test_examples_are_small_real_and_free():
    folder = Path(command.__file__).parent / "examples"
    listed = json.loads((folder / "examples.json").read_text())
    assert set(listed["pictures"]) == {path.name for path in folder.iterdir() if path.suffix != ".json"}
    assert set(listed["pictures"]) == {file for example in listed["examples"] for file in example["files"]}
    assert {example["mode"] for example in listed["examples"]} == {"text", "image", "any"}
    for name, about in listed["pictures"].items():
        assert about["source"] and about["licence"] in ("CC0 1.0", "no known copyright restrictions")
        assert (folder / name).stat().st_size <= 40_000
        with Image.open(folder / name) as image:
            image.load()


def no_network(*_, **__):
    raise OSError("network is unreachable")


@pytest.mark.parametrize(
    "changes, auth, message",
    [
        ({"batch_size": 0}, "", "--batch-size 0: expected 1 or more"),
        ({"waiting": -1}, "", "--waiting -1: expected 0 or more"),
        ({"max_upload_mb": 0}, "", "--max-upload-mb 0: expected a positive number"),
        ({"port": 70000}, "", "--port 70000: expected 0 to 65535"),
        ({"host": "192.0.2.1"}, "", "--host 192.0.2.1 --port 0: cannot listen there"),
        ({"auth": True}, "", "--auth: MEDMAX_AUTH is not set, expected name:password"),
        ({"auth": True}, "ann:secret,bob", "MEDMAX_AUTH: entry 2 of 2 is not of the form name:password"),
        ({"auth": True}, "ann:", "MEDMAX_AUTH: entry 1 of 1 is not of the form name:password"),
        ({"share": True}, "", "--share: Gradio's tunnel cannot be reached"),
    ],
)
def test_flags_that_are_refused(golden, monkeypatch, changes, auth, message):
    monkeypatch.setenv("MEDMAX_AUTH", auth)
    monkeypatch.setattr("gradio.networking.setup_tunnel", no_network)
    config = DemoConfig(**{"ckpt": str(golden / "checkpoint"), "port": 0, **changes})
    with pytest.raises(InputError) as refused, command.serving(config):
        pass
    assert message in str(refused.value) and "secret" not in str(refused.value)


def test_gradio_is_missing(golden, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "medmax_fast.demo.page")
    monkeypatch.delattr("medmax_fast.demo.page")
    config = DemoConfig(ckpt=str(golden / "checkpoint"), port=0)
    message = r"gradio is missing, needed for the demo: pip install 'medmax_fast\[demo\]'"
    with pytest.raises(InputError, match=message), command.serving(config):
        pass


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGHUP, 0)])
def test_the_command_asks_for_a_password_and_leaves_nothing(golden, tmp_path, monkeypatch, number, status):
    monkeypatch.setenv("MEDMAX_AUTH", "ann:to be kept, bob:another:one")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # What torch keeps for all processes, if this one is the first to need it.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path.with_name("inductor")))
    port = free_port()
    url, answered = f"http://127.0.0.1:{port}", {}

    def visit() -> None:
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        try:
            while url not in printed.getvalue():
                time.sleep(0.05)
            form = {"ann": "wrong", "bob": "another:one"}
            for name, password in form.items():
                data = urllib.parse.urlencode({"username": name, "password": password}).encode()
                answered[name] = code(opener, f"{url}/login", data)
                answered[f"config {name}"] = code(opener, f"{url}/config")
            boundary = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n"
            request = urllib.request.Request(f"{url}/gradio_api/upload", boundary + png(8) + b"\r\n--x--\r\n")
            request.add_header("Content-Type", "multipart/form-data; boundary=x")
            answered["upload"] = code(opener, request)
            # A name of somebody else's that leads here.
            request = urllib.request.Request(f"{url}/config", headers={"Host": f"elsewhere.example:{port}"})
            answered["by another name"] = code(opener, request)
            answered["kept"] = len(list(tmp_path.rglob("a.png")))
        finally:
            os.kill(os.getpid(), number)

    visitor, printed = threading.Thread(target=visit), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        visitor.start()
        assert main(["demo", "--ckpt", str(golden / "checkpoint"), "--port", str(port), "--auth"]) == status
        visitor.join()
    assert answered == {"ann": 400, "config ann": 401, "bob": 200, "config bob": 200, "upload": 200} | {
        "by another name": 403,
        "kept": 1,
    }
    text = printed.getvalue()
    assert "to be kept" not in text and "another" not in text
    assert ("medmax demo: interrupted; the page has ended; uploads and pictures are deleted" in text) == bool(status)
    assert not list(tmp_path.iterdir())


def code(opener, request, data: bytes | None = None) -> int:
    try:
        with opener.open(request, data) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
