"""One engine for many users: requests join and leave while others run, and each gets what it gets alone."""

import threading
import time
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from medmax_fast.generate.engine import Engine
from medmax_fast.generate.prompts import PromptEncoder
from medmax_fast.generate.requests import PicturePiece, Request, Result, TextPiece
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.decoder import Decoder
from medmax_fast.runtime import InputError
from medmax_fast.serving.dispatcher import Busy, Dispatcher, Drawing

TEXT = [Request(f"t{i}", token_ids=[0, 8800 + i, 8710], max_new_tokens=12, greedy=True) for i in range(6)]
PICTURE = Request("p", token_ids=[0, 8800, 8710], mode="image", greedy=True)


def new_engine(golden, lag):
    checkpoint = open_checkpoint(golden / "checkpoint")
    decoder = Decoder.load(checkpoint, torch.device("cpu"), torch.float32)
    return Engine(decoder, PromptEncoder(checkpoint, "cpu"), 100_000, lag)


@pytest.fixture(scope="module")
def engine(golden):
    return new_engine(golden, 1)


@pytest.fixture(scope="module")
def alone(engine):
    """Ids of every request when nothing else runs."""
    return {request.id: engine.generate([request])[0].token_ids for request in (*TEXT, PICTURE)}


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


@pytest.mark.parametrize("lag", [0, 1])
def test_requests_join_and_leave_a_session(golden, alone, lag, fresh_seed):
    engine = new_engine(golden, lag)
    rng = np.random.default_rng(fresh_seed)
    with engine.session(batch_size=3, pieces=False) as session:
        picture = session.submit(PICTURE)
        numbers, cancelled, results = {}, set(), {}
        left, steps = list(TEXT), 0
        # Not `running`: of those that wait for a place none may be, between two steps.
        while left or numbers.keys() - cancelled - results.keys():
            if left and rng.random() < 0.3:
                request = left.pop()
                numbers[session.submit(request)] = request.id
            if numbers and rng.random() < 0.04:
                number = int(rng.choice(list(numbers)))
                session.cancel(number)
                cancelled.update({number} - results.keys())
            results.update(session.step())
            steps += 1
        assert picture not in results and session.busy and steps < 1024
        session.cancel(picture)
        assert not session.busy and engine.room.empty
    assert results.keys() == numbers.keys() - cancelled
    assert all(results[number].token_ids == alone[numbers[number]] for number in results)
    # Nothing of a cancelled request is left that the next call would meet.
    assert [result.token_ids for result in engine.generate(TEXT)] == [alone[request.id] for request in TEXT]


def test_cancelling_where_a_picture_begins_spoils_nothing(golden, alone):
    """Guides that were just opened have not been computed, and what they would have computed was announced already."""
    engine = new_engine(golden, 0)
    layout, allowed = engine.layout, engine.steps._allowed_AV.clone()
    image = layout.image_span(np.arange(1024)).tolist()
    begins = Request("b", token_ids=[0, 8800, 8801, *image, 8710], mode="any", greedy=True)
    with engine.session(batch_size=3, pieces=False) as session:
        other = session.submit(TEXT[0])
        # Nothing but a picture may follow.
        engine.steps._allowed_AV[:] = False
        engine.steps._allowed_AV[:, layout.boi] = True
        number = session.submit(begins)
        while not engine.room._fresh:
            list(session.step())
        session.cancel(number)
        session.cancel(other)
        engine.steps._allowed_AV.copy_(allowed)
        after = session.submit(TEXT[1])
        assert dict(session.events())[after].token_ids == alone["t1"]
    assert engine.room.empty


def test_a_reader_may_cancel_what_it_is_told_of(engine):
    with engine.session(batch_size=2, pieces=True) as session:
        first, second = session.submit(TEXT[0]), session.submit(TEXT[1])
        seen = []
        for number, event in session.events():
            seen.append((number, type(event)))
            if number == first:
                session.cancel(first)
        assert seen.count((first, TextPiece)) == 1 and (first, Result) not in seen
        assert seen[-1] == (second, Result)
    assert engine.room.empty


def test_one_session_at_a_time(engine):
    with engine.session(batch_size=1, pieces=False) as session:
        session.submit(PICTURE)
        list(session.step())
        with pytest.raises(RuntimeError, match="the engine is running another call"):
            engine.session(batch_size=1, pieces=False)
    assert engine.room.empty
    with pytest.raises(ValueError, match="batch_size 0"):
        engine.session(batch_size=0, pieces=False)


def test_many_users_get_what_they_get_alone(engine, alone):
    answers = {}
    with Dispatcher(engine, batch_size=3, waiting=10) as dispatcher:

        def ask(request):
            with dispatcher.submit(request) as stream:
                pieces = list(stream)
            assert stream.ended
            text = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
            answers[request.id] = pieces[-1].token_ids, text, pieces[-1].content

        users = [threading.Thread(target=ask, args=(request,)) for request in TEXT]
        for user in users:
            user.start()
        for user in users:
            user.join(20)
        assert dispatcher.running == dispatcher.waiting == 0
    for request in TEXT:
        ids, text, content = answers[request.id]
        assert ids == alone[request.id]
        assert text == "".join(piece["text"] for piece in content)
    assert engine.room.empty


def test_a_picture_comes_with_previews_and_can_be_asked_about(engine, alone, tmp_path, monkeypatch):
    with Dispatcher(engine) as dispatcher:
        with dispatcher.submit(PICTURE, previews=True) as stream:
            pieces = list(stream)
        result, drawings = pieces[-1], pieces[:-1]
        assert all(isinstance(piece, Drawing) for piece in drawings) and len(drawings) > 1
        shares = [piece.share for piece in drawings]
        assert shares == sorted(shares) and shares[-1] == 1.0 and shares[0] <= 0.25
        assert result.token_ids == alone["p"]
        np.testing.assert_array_equal(drawings[-1].codes + 4, alone["p"])
        np.testing.assert_array_equal(drawings[-1].pixels, engine.decode_images(drawings[-1].codes[None])[0])
        # Rows that are not drawn yet are white.
        assert drawings[0].pixels.shape == (512, 512, 3) and (drawings[0].pixels[-100:] == 255).all()
        # Any file will do to show that these codes are taken for it.
        path = tmp_path / "drawn.png"
        path.write_bytes(b"not a picture, but known")
        dispatcher.remember(path.read_bytes(), drawings[-1].codes)
        about = Request("about", content=[{"type": "image", "path": str(path)}], greedy=True, max_new_tokens=2)
        assert list(dispatcher.submit(about))[-1].error is None
    monkeypatch.setattr("medmax_fast.generate.prompts.CACHED_IMAGES", 3)
    for number in range(5):
        engine.encoder.remember(b"%d" % number, drawings[-1].codes)
    engine.encoder.remember(path.read_bytes(), drawings[-1].codes)
    assert len(engine.encoder._codes) == 3
    request = replace(about, content=None, token_ids=[0, 8197, *alone["p"], 8196, 8710])
    assert engine.encoder.encode(about) == request.token_ids


def test_the_line_is_bounded_and_moves_up(engine, alone):
    with Dispatcher(engine, batch_size=1, waiting=2) as dispatcher:
        drawing = dispatcher.submit(PICTURE)
        until(lambda: dispatcher.running == 1)
        second, third = dispatcher.submit(TEXT[0]), dispatcher.submit(TEXT[1])
        with pytest.raises(Busy, match="2 requests are waiting"):
            dispatcher.submit(TEXT[2])
        assert (drawing.ahead, second.ahead, third.ahead) == (0, 0, 1)
        assert third.next(timeout=0.01) is None and not third.ended
        second.cancel()
        until(lambda: dispatcher.waiting == 1)
        assert third.ahead == 0 and list(second) == []
        fourth = dispatcher.submit(TEXT[2])
        # The picture ends in the middle, and the next ones have its place.
        drawing.cancel()
        assert not any(isinstance(piece, Result) for piece in drawing)
        assert list(third)[-1].token_ids == alone["t1"] and list(fourth)[-1].token_ids == alone["t2"]
    assert engine.room.empty


def test_a_request_that_cannot_be_run_is_told_so(engine, tmp_path, monkeypatch):
    with Dispatcher(engine) as dispatcher:
        missing = Request("m", content=[{"type": "image", "path": str(tmp_path / "none.png")}])
        (result,) = dispatcher.submit(missing)
        assert result.error == f"{tmp_path / 'none.png'}: no such file"
        # It was there a moment ago.
        (tmp_path / "none.png").write_bytes(b"")
        with monkeypatch.context() as patch:
            gone = FileNotFoundError(2, "No such file or directory")
            patch.setattr("medmax_fast.generate.prompts.hash_file", Mock(side_effect=gone))
            (result,) = dispatcher.submit(missing)
        assert result.error == f"{tmp_path / 'none.png'}: cannot be read (No such file or directory)"
        monkeypatch.setattr(type(engine.encoder.checkpoint), "draws", property(lambda _: False))
        with pytest.raises(InputError, match="mode 'image': the checkpoint has no VQGAN decoder"):
            dispatcher.submit(PICTURE)


def test_closing_ends_everything(engine):
    dispatcher = Dispatcher(engine, batch_size=1, waiting=2)
    streams = [dispatcher.submit(replace(PICTURE, id=str(i))) for i in range(2)]
    until(lambda: dispatcher.running == 1)
    dispatcher.close()
    for stream in streams:
        assert list(stream)[-1].error == "the engine has stopped"
    with pytest.raises(RuntimeError, match="the engine has stopped"):
        dispatcher.submit(PICTURE)
    assert engine.room.empty and not dispatcher.alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_leaves_nobody_waiting(golden, monkeypatch):
    engine = new_engine(golden, 0)
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: seen.append(failed.exc_value))

    def fail(*_):
        raise torch.cuda.OutOfMemoryError("no memory")

    dispatcher = Dispatcher(engine, batch_size=1)
    monkeypatch.setattr(engine.steps, "decode", fail)
    streams = [dispatcher.submit(PICTURE), dispatcher.submit(TEXT[0])]
    assert [list(stream)[-1].error for stream in streams] == ["the engine has stopped"] * 2
    until(lambda: not dispatcher.alive)
    with pytest.raises(RuntimeError):
        dispatcher.submit(PICTURE)
    dispatcher.close()
    assert len(seen) == 1 and "no memory" in str(seen[0])


def test_pieces_of_a_stream_are_those_of_the_engine(engine):
    request = replace(TEXT[3], id="pieces", mode="any", max_length=1200, greedy=False, seed=5)
    expected = list(engine.stream([request]))
    with Dispatcher(engine) as dispatcher, dispatcher.submit(request, previews=True) as stream:
        got = list(stream)
    assert [piece.text for piece in got if isinstance(piece, TextPiece)] == [
        piece.text for piece in expected if isinstance(piece, TextPiece)
    ]
    assert got[-1].token_ids == expected[-1].token_ids
    complete = [piece for piece in expected if isinstance(piece, PicturePiece) and len(piece.codes) == 1024]
    assert len([piece for piece in got if isinstance(piece, Drawing) and piece.share == 1.0]) == len(complete)
