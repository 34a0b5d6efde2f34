"""The engine: id for id with the reference, in any company; sharing, streaming, faults and what comes after them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medmax_fast.generate import grammar, samples
from medmax_fast.generate.cache import position_bytes
from medmax_fast.generate.engine import Engine
from medmax_fast.generate.pages import PAGE
from medmax_fast.generate.prompts import PromptEncoder
from medmax_fast.generate.requests import PicturePiece, Request, Result, TextPiece
from medmax_fast.generate.samples import uniforms
from medmax_fast.kernels import norm_rope_store, paged_attention, rms_norm, sampling, swiglu
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.decoder import Decoder
from medmax_fast.runtime import InputError, available_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def fresh_engine(golden, positions=200_000, lag=None, device="cpu"):
    checkpoint = open_checkpoint(golden / "checkpoint")
    decoder = Decoder.load(checkpoint, torch.device(device), torch.float32)
    return Engine(decoder, PromptEncoder(checkpoint, device), positions, lag)


@pytest.fixture(scope="module")
def engine(golden):
    return Engine.from_checkpoint(golden / "checkpoint", device="cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("batch_size", "lag"), [(16, 1), (4, 0)])
def test_golden_generation(golden, cases, batch_size, lag, device):
    """Text, pictures and interleaved output together in one call, with places refilled when the batch is small."""
    engine = fresh_engine(golden, lag=lag, device=device)
    order = list(range(len(cases)))
    if batch_size < len(cases):
        order.reverse()
    results = engine.generate([cases[i][0] for i in order], batch_size=batch_size)
    for i, result in zip(order, results, strict=True):
        assert result.error is None
        assert result.token_ids == cases[i][1], result.id
    assert any(piece["type"] == "image" for result in results for piece in result.content)
    # All that was held has been given back; a second call finds the prompts in the cache and says the same.
    assert engine.room.empty
    before = engine.room.cached_ids
    again = engine.generate([request for request, _ in cases[:4]], batch_size=2)
    assert [result.token_ids for result in again] == [expected for _, expected in cases[:4]]
    # The whole pages of two prompts of 1,040 and 1,044 ids.
    assert engine.room.cached_ids - before >= 2 * 1024


def test_one_bad_request_among_32_leaves_the_others(engine, tmp_path):
    bad_picture = tmp_path / "broken.jpg"
    bad_picture.write_text("<html>not found</html>")
    good = [Request(f"r{i}", token_ids=[0, 8800 + i, 8710], max_new_tokens=6, greedy=True) for i in range(31)]
    expected = {result.id: result.token_ids for result in engine.generate(good, batch_size=31)}
    bad = Request("bad", content=[{"type": "image", "path": str(bad_picture)}])
    results = engine.generate([*good[:17], bad, *good[17:]], batch_size=8)
    assert len(results) == 32 and results[17].error and "broken.jpg" in results[17].error
    assert all(result.token_ids == expected[result.id] for result in results if result.id != "bad")


BAD = {
    "missing image": ({"content": [{"type": "image", "path": "none.png"}]}, "none.png: no such file"),
    "too long": ({"token_ids": [0] * 4096}, "a prompt of 4096 ids leaves no room in max_length 4096"),
    "no room": ({"token_ids": [0] * 3073, "mode": "image"}, "no room for a picture in max_length 4096"),
    "empty content": ({"content": []}, "an empty prompt"),
    "empty ids": ({"token_ids": []}, "an empty prompt"),
    "mode": ({"token_ids": [0], "mode": "video"}, "mode 'video', expected one of text, image, any"),
    "id": ({"token_ids": [0, 10212]}, "token id 10212, expected an integer in 0..10211"),
    "kind of id": ({"token_ids": [0, "1"]}, "token id '1', expected an integer"),
    "placeholder": ({"content": [{"type": "text", "text": "see <image>"}]}, "give the image as a piece of its own"),
    "piece": ({"content": [{"type": "sound"}]}, "content piece {'type': 'sound'}, expected"),
    "both": ({"content": [], "token_ids": [0]}, "either content or token_ids"),
    "temperature": ({"token_ids": [0], "temperature": -1.0}, "temperature -1.0: expected 0 or more"),
    "nan": ({"token_ids": [0], "guidance_text": float("nan")}, "guidance_text nan: expected"),
    "top_p": ({"token_ids": [0], "image_top_p": 1.5}, "image_top_p 1.5: expected 0 to 1"),
    "penalty": ({"token_ids": [0], "repetition_penalty": 0.0}, "expected a positive number"),
    "budget": ({"token_ids": [0], "max_new_tokens": 0}, "max_new_tokens 0: expected 1 or more"),
    "length": ({"token_ids": [0], "max_length": 5000}, "max_length 5000: expected 1 to 4096"),
}


def test_what_is_wrong_with_a_request_is_said(engine, cases):
    text, expected = cases[0]
    bad = [Request(name, **prompt) for name, (prompt, _) in BAD.items()]
    results = engine.generate([*bad[:4], text, *bad[4:]], batch_size=3)
    assert results.pop(4).token_ids == expected
    for result, (_, message) in zip(results, BAD.values(), strict=True):
        assert message in result.error and "\n" not in result.error, result
        assert result.token_ids == [] and result.content == []


def sampled(count):
    return [Request(f"r{i}", token_ids=[0, 8800 + i, 8710], max_new_tokens=12, seed=7) for i in range(count)]


@pytest.mark.parametrize("lag", [0, 1])
def test_sampling_does_not_depend_on_the_batch(golden, lag):
    requests = sampled(5)
    engine = fresh_engine(golden, lag=lag)
    together = [r.token_ids for r in engine.generate(requests)]
    alone = [fresh_engine(golden).generate([r])[0].token_ids for r in reversed(requests)][::-1]
    assert together == alone
    assert len({tuple(ids) for ids in together}) == 5
    other_seed = engine.generate([replace(requests[0], seed=8)])[0].token_ids
    assert other_seed != together[0]
    # Greedy and sampled requests share a batch, each by its own settings.
    mixed = [replace(r, greedy=i % 2 == 0) for i, r in enumerate(requests)]
    results = engine.generate(mixed)
    assert [r.token_ids for r in results[1::2]] == together[1::2]
    assert results[0].token_ids != together[0]


def test_random_numbers_are_even_and_their_own():
    values = uniforms(Request("a", token_ids=[0]), 4096)
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() < 1
    counts = np.bincount((values * 16).astype(int), minlength=16)
    # Chi-squared with 15 degrees of freedom stays below 45 but for 1 in 10,000 cases.
    assert ((counts - 256) ** 2 / 256).sum() < 45
    for other in (Request("b", token_ids=[0]), Request("a", token_ids=[0], seed=1)):
        assert abs(np.corrcoef(values, uniforms(other, 4096))[0, 1]) < 0.06
    assert np.array_equal(values[:7], uniforms(Request("a", token_ids=[5], mode="any"), 7))
    assert uniforms(Request("a", token_ids=[0], greedy=True), 7) is None


def test_content_prompt_is_bos_image_text_eot(engine, golden):
    path = str(golden / "images" / "tiny.png")
    request = Request("x", content=[{"type": "image", "path": path}, {"type": "text", "text": "Is it?"}])
    ids = engine.encoder.encode(request)
    codes = json.loads((golden / "image_codes.json").read_text())["tiny.png"]["codes"]
    expected = [0, 8197, *(c + 4 for c in codes), 8196, *engine.tokenizer.encode("Is it?"), 8710]
    assert ids == expected


def test_an_image_is_tokenized_once_and_its_positions_are_computed_once(golden, monkeypatch):
    engine = fresh_engine(golden)
    path = str(golden / "images" / "tiny.png")
    encoded, computed = [], []
    encode, prefill = type(engine.encoder.image_tokenizer).encode, engine.steps.prefill
    monkeypatch.setattr(
        type(engine.encoder.image_tokenizer), "encode", lambda self, x: encoded.append(len(x)) or encode(self, x)
    )
    monkeypatch.setattr(
        engine.steps,
        "prefill",
        lambda slots, leases, ids: (
            computed.append([len(i) - lease.cached for i, lease in zip(ids, leases, strict=True)]),
            prefill(slots, leases, ids),
        ),
    )
    questions = [
        Request(
            str(n),
            content=[{"type": "image", "path": path}, {"type": "text", "text": text}],
            max_new_tokens=1,
            greedy=True,
        )
        for n, text in enumerate(("Is it large?", "Is a tumor seen?", "What organ is shown in it?", "Where is it?"))
    ]
    together = engine.generate(questions)
    assert encoded == [1], "four questions about one image"
    (lengths,) = computed
    # All in one pass, in which the later ones read what the first one stores: 1,024 of the 1,027 ids are shared.
    assert lengths[0] > 1027 and all(3 < length < 50 for length in lengths[1:]), lengths
    alone = [fresh_engine(golden).generate([question])[0] for question in questions]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_two_equal_unconditioned_streams_are_one_with_equal_logits(golden, cases):
    """A prompt without images needs no image-conditioned stream: forced to have one, it draws the same."""
    engine = fresh_engine(golden)
    prompt = [0, 8800, 8801, 8710, 8197]
    assert grammar.guides(prompt, 3.0, 1.2, engine.layout) == [[0, 8197]]
    states, session = [], engine.session(1, pieces=False)
    for ids in ([0, 8197], grammar.images_only(prompt, engine.layout)):
        stream = engine.room.open(ids, len(ids) + 1)
        session._place([replaced(stream, 0)])
        engine.steps.decode([stream.slot])
        session._place([replaced(stream, 1)])
        engine.steps.decode([stream.slot])
        states.append(engine.steps.slots.hidden_SC[stream.slot] @ engine.decoder.head.T)
    assert torch.equal(*states)


def replaced(stream, fed):
    stream.fed = fed
    return stream


def test_a_dropped_stream_changes_nothing(golden, monkeypatch):
    """Streams of weight 0 are left out; with all three the codes are the same."""
    prompt = [0, 8197, *range(500, 500 + 1024), 8196, 8800, 8710]
    scales = [(1.0, 1.0), (3.0, 1.0), (2.0, 2.0)]
    requests = [
        Request(str(pair), token_ids=prompt, mode="image", greedy=True, guidance_text=pair[0], guidance_image=pair[1])
        for pair in scales
    ]
    fewer = fresh_engine(golden)
    lean = [result.token_ids for result in fewer.generate(requests)]
    assert len(set(map(tuple, lean))) == 3

    def all_three(ids, text_scale, image_scale, layout):
        return [grammar.images_only(ids, layout), [layout.bos, layout.boi]]

    monkeypatch.setattr("medmax_fast.generate.session.grammar.guides", all_three)
    whole = fresh_engine(golden)
    assert [result.token_ids for result in whole.generate(requests)] == lean
    assert whole.room.prompt_ids > fewer.room.prompt_ids


def test_pieces_add_up_to_the_result(golden, cases):
    engine = fresh_engine(golden, lag=1)
    chosen = [case for case in cases if case[0].id in ("interleaved_greedy-0", "text_greedy-0", "image_greedy_cfg-0")]
    text: dict[str, str] = {}
    pictures: dict[str, list] = {}
    results = {}
    for event in engine.stream([request for request, _ in chosen]):
        assert event.id not in results, "the result comes last"
        if isinstance(event, TextPiece):
            assert event.text
            text[event.id] = text.get(event.id, "") + event.text
        elif isinstance(event, PicturePiece):
            pictures.setdefault(event.id, []).append(event)
        else:
            results[event.id] = event
    for request, expected in chosen:
        result = results[request.id]
        assert result.token_ids == expected
        said = "".join(piece["text"] for piece in result.content if piece["type"] == "text")
        assert text.get(request.id, "") == said
        drawn = [piece["codes"] for piece in result.content if piece["type"] == "image"]
        whole = [piece for piece in pictures.get(request.id, []) if len(piece.codes) == 1024]
        assert [piece.number for piece in whole] == list(range(len(drawn)))
        for piece in pictures.get(request.id, []):
            assert np.array_equal(piece.codes, drawn[piece.number][: len(piece.codes)])
    assert len(pictures["image_greedy_cfg-0"]) == 8
    assert sum(len(pieces) for pieces in text.values()) > 20


def test_a_preview_shows_what_is_drawn(golden, engine):
    codes = np.array(json.loads((golden / "image_codes.json").read_text())["ihc.png"]["codes"])
    whole = engine.decode_images(codes[None])[0]
    half = engine.preview(codes[:512])
    assert (half[256:] == 255).all() and half.shape == (512, 512, 3)
    # Away from the edge the upper half looks as it will: attention in the decoder sees the whole picture.
    difference = np.abs(half[:192].astype(int) - whole[:192]).mean()
    assert difference < 0.5 * np.abs(whole[:192].astype(int) - whole[320:]).mean(), difference
    assert np.array_equal(engine.preview(codes), whole)


@pytest.mark.parametrize("stop_at", [0, 1, 5])
def test_an_abandoned_call_leaves_nothing_behind(golden, cases, tmp_path, stop_at):
    """The first event of all may come before anything has been computed."""
    engine = fresh_engine(golden, lag=1)
    request, expected = cases[0]
    bad = Request("bad", content=[{"type": "image", "path": str(tmp_path / "none.png")}])
    # One of them shares the pages of a prompt that is not computed yet.
    requests = [request, replace(request, id="twin"), replace(request, id="third", max_new_tokens=9), bad]
    events = engine.stream(requests)
    for _ in range(stop_at + 1):
        next(events)
    events.close()
    assert engine.room.empty
    assert engine.generate([request])[0].token_ids == expected


def test_a_small_cache_makes_requests_wait(golden):
    requests = [Request(f"r{i}", token_ids=[0, *range(8800, 8850), 8710], max_new_tokens=20) for i in range(6)]
    expected = [r.token_ids for r in fresh_engine(golden).generate(requests)]
    small = fresh_engine(golden, positions=4 * PAGE)
    assert [r.token_ids for r in small.generate(requests)] == expected
    too_long = Request("long", token_ids=[0, 8800], max_new_tokens=1000)
    results = small.generate([requests[0], too_long, requests[1]])
    assert [r.token_ids for r in results[::2]] == expected[:2]
    assert results[1].error == "needs 1024 positions of the cache, which holds 256; lower max_length"


def test_logits_that_are_no_numbers_end_their_request_alone(golden):
    engine = fresh_engine(golden)
    requests = sampled(4)
    expected = [r.token_ids for r in fresh_engine(golden).generate(requests)]
    engine.decoder.embedding[8801] = float("nan")
    results = engine.generate(requests)
    assert results[1].error == "the model gave logits that are not numbers"
    # The others may pick that id themselves.
    same = [r.token_ids == e for r, e in zip(results, expected, strict=True) if r.error is None and 8801 not in e]
    assert same and all(same)


class CountReads(TorchDispatchMode):
    """Counts what makes a host wait for a device: values that become Python numbers."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.reads.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu(required=False)
def test_a_step_runs_on_its_kernels_and_waits_for_nothing(golden, cases, monkeypatch):
    """The engine on Triton kernels, interpreted on a CPU, gives the reference's ids, and no step reads a value."""
    engine = fresh_engine(golden, lag=1, device=DEVICE)
    # The picture is left after a few codes.
    monkeypatch.setattr(samples, "PREVIEW", 3)
    for module in (norm_rope_store, paged_attention, rms_norm, sampling, swiglu):
        monkeypatch.setattr(module, "use_triton", lambda *_: True)
    # Programs are interpreted one after the other; a GPU would have hundreds.
    monkeypatch.setattr(paged_attention, "_splits", lambda *_, **__: 2)
    counted = CountReads()

    def watched(work):
        def run(slots):
            with counted:
                return work(slots)

        return run

    for name in ("_decode", "_pick_text", "_pick_image"):
        monkeypatch.setattr(engine.steps, name, watched(getattr(engine.steps, name)))
    text = replace(cases[1][0], max_new_tokens=3)
    picture = next(request for request, _ in cases if request.id == "image_edit_greedy_cfg_batch-1")
    expected = {text.id: cases[1][1][:3], picture.id: dict((r.id, e) for r, e in cases)[picture.id]}
    codes = 0
    for event in engine.stream([text, picture]):
        if isinstance(event, Result):
            assert event.id == text.id and event.token_ids == expected[text.id]
        elif isinstance(event, PicturePiece):
            codes = len(event.codes)
            assert [c + 4 for c in event.codes] == expected[picture.id][:codes]
            break
    assert codes == 3
    assert counted.reads == []


class Products(TorchDispatchMode):
    """The shapes of what products multiply."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.shapes.append([tuple(operand.shape) for operand in args[:2]])
        return func(*args, **(kwargs or {}))


def test_the_head_is_read_once_for_the_three_streams_of_pictures(golden):
    steps = fresh_engine(golden).steps
    width, products = steps.decoder.shape.dim, Products()
    with torch.no_grad(), products:
        steps._pick_image(torch.tensor([3, 1, 2, 6, 4, 5]))
    assert products.shapes == [[(6, width), (width, 8192)]]


def test_memory_for_the_cache_is_checked(golden):
    with pytest.raises(InputError, match="no memory for keys and values"):
        Engine.from_checkpoint(golden / "checkpoint", device="cpu", cache_gb=1e-6)
    engine = Engine.from_checkpoint(golden / "checkpoint", device="cpu", cache_gb=0.01)
    size = position_bytes(engine.decoder)
    assert size == 2 * 2 * 64 * 4
    assert 0.9e7 < engine.cache.pool.size * PAGE * size <= 1e7


def test_freed_memory_that_torch_keeps_counts_as_free(monkeypatch):
    figures = {"mem_get_info": (10, 100), "memory_reserved": 60, "memory_allocated": 35}
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, figure=figure: figure)
    assert available_bytes(torch.device("cuda", 0)) == 10 + 25


def test_batch_size_is_checked(engine):
    with pytest.raises(ValueError, match="batch_size 0"):
        engine.generate([], batch_size=0)
    assert engine.generate([]) == []


def test_one_call_at_a_time(golden):
    engine = fresh_engine(golden)
    events = engine.stream(sampled(2))
    next(events)
    with pytest.raises(RuntimeError, match="running another call; exhaust or close its stream first"):
        engine.generate(sampled(1))
    events.close()
    assert len(engine.generate(sampled(1))) == 1
