"""Generation id for id with the reference, in any company; the grammar, the sampling and the command."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_fast.cli import main
from medmax_fast.generate import grammar, sampling
from medmax_fast.generate.engine import Engine
from medmax_fast.generate.requests import Request
from medmax_fast.vocab import TextTokenizer


@pytest.fixture(scope="module")
def engine(golden):
    return Engine.from_checkpoint(golden / "checkpoint", device="cpu")


@pytest.fixture(scope="module")
def cases(golden):
    """(request, expected new ids) of every prompt of generation.json."""
    names = {
        "max_gen_len": "max_new_tokens",
        "max_seq_len": "max_length",
        "guidance_scale_text": "guidance_text",
        "guidance_scale_image": "guidance_image",
    }
    found = []
    for case in json.loads((golden / "generation.json").read_text()):
        options = {names.get(name, name): value for name, value in case["options"].items()}
        for i, (prompt, expected) in enumerate(zip(case["prompt_ids"], case["generated"], strict=True)):
            found.append((Request(f"{case['name']}-{i}", token_ids=prompt, **options), expected))
    assert len(found) == 9
    return found


@pytest.mark.parametrize("batch_size", [16, 4])
def test_golden_generation(engine, cases, batch_size):
    """Text, pictures and interleaved output together in one call, with places refilled when the batch is small."""
    order = list(range(len(cases)))
    if batch_size < len(cases):
        order.reverse()
    results = engine.generate([cases[i][0] for i in order], batch_size=batch_size)
    for i, result in zip(order, results, strict=True):
        assert result.error is None
        assert result.token_ids == cases[i][1], result.id
    assert any(piece["type"] == "image" for result in results for piece in result.content)


def test_one_bad_request_leaves_the_others(engine, cases, tmp_path):
    bad_picture = tmp_path / "broken.jpg"
    bad_picture.write_text("<html>not found</html>")
    text, expected = cases[0]
    bad = [
        Request("no image", content=[{"type": "image", "path": str(bad_picture)}]),
        Request("missing image", content=[{"type": "image", "path": str(tmp_path / "none.png")}]),
        Request("too long", token_ids=[0] * 4096),
        Request("no room", token_ids=[0] * 3073, mode="image"),
        Request("empty", content=[]),
        Request("mode", token_ids=[0], mode="video"),
        Request("id", token_ids=[0, 10212]),
        Request("placeholder", content=[{"type": "text", "text": "see <image>"}]),
        Request("piece", content=[{"type": "sound"}]),
    ]
    results = engine.generate([*bad[:4], text, *bad[4:]], batch_size=3)
    assert results[4].token_ids == expected
    assert all(result.error for i, result in enumerate(results) if i != 4)
    assert "\n" not in "".join(result.error or "" for result in results)


def test_sampling_does_not_depend_on_the_batch(engine):
    requests = [Request(f"r{i}", token_ids=[0, 8800 + i, 8710], max_new_tokens=12, seed=7) for i in range(5)]
    together = [r.token_ids for r in engine.generate(requests)]
    alone = [engine.generate([r])[0].token_ids for r in reversed(requests)][::-1]
    assert together == alone
    assert len({tuple(ids) for ids in together}) == 5
    other_seed = engine.generate([Request("r0", token_ids=[0, 8800, 8710], max_new_tokens=12, seed=8)])[0].token_ids
    assert other_seed != together[0]


def test_content_prompt_is_bos_image_text_eot(engine, golden):
    path = str(golden / "images" / "tiny.png")
    request = Request("x", content=[{"type": "image", "path": path}, {"type": "text", "text": "Is it?"}])
    ids = engine.encoder.encode(request)
    codes = json.loads((golden / "image_codes.json").read_text())["tiny.png"]["codes"]
    expected = [0, 8197, *(c + 4 for c in codes), 8196, *engine.tokenizer.encode("Is it?"), 8710]
    assert ids == expected


def test_text_mask_holds_text_and_eos_alone(golden):
    tokenizer = TextTokenizer(golden / "checkpoint" / "tokenizer" / "text_tokenizer_modified.json")
    layout = tokenizer.layout
    for boi in (False, True):
        allowed = set(np.flatnonzero(grammar.text_mask(layout, tokenizer.unwritable, boi)))
        expected = set(range(layout.text_start, layout.vocab_size)) - set(tokenizer.unwritable) | {layout.eos}
        assert allowed == expected | ({layout.boi} if boi else set())
    assert tokenizer.unwritable, "the reference's quirk needs a name that begins with <"


@given(st.integers(0, 5000), st.integers(1027, 5000), st.sampled_from(grammar.MODES))
def test_a_picture_that_is_begun_always_fits(position, max_length, mode):
    if grammar.may_begin_image(mode, position, max_length):
        assert mode == "any"
        # boi at `position`, then 1,024 image ids and eoi.
        assert position + 1 + 1024 + 1 <= max_length


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5), min_size=6, max_size=6), min_size=1, max_size=4), st.floats(0.05, 1.0))
def test_top_p_keeps_the_smallest_sufficient_set(rows, p):
    logits = torch.tensor(rows)
    kept = sampling.keep_top_p(logits, torch.full((len(rows), 1), p)) > float("-inf")
    probability = logits.softmax(-1)
    for row, mask in zip(probability, kept, strict=True):
        assert mask.any()
        total = row[mask].sum()
        assert total >= min(p, 1.0) - 1e-5
        # Without its least likely member the set falls short.
        assert total - row[mask].min() < p + 1e-5
        if (~mask).any():
            assert row[~mask].max() <= row[mask].min()


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[2.0, -2.0, 3.0, 0.0]])
    seen = torch.tensor([[True, True, False, True]])
    out = sampling.penalize_repetition(logits, seen, torch.tensor([[1.25]]))
    torch.testing.assert_close(out, torch.tensor([[1.6, -2.5, 3.0, 0.0]]))


def test_guidance_by_hand():
    full, image, none = (torch.full((1, 3), v) for v in (5.0, 2.0, 1.0))
    out = sampling.guide(full, image, none, torch.tensor([[3.0]]), torch.tensor([[1.2]]))
    torch.testing.assert_close(out, torch.full((1, 3), 1 + 1.2 * 1 + 3 * 3.0))


def test_draw_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, float("-inf"), 2.0]]).expand(4000, -1)
    generator = sampling.make_generator(0, "x")
    picked = torch.tensor(sampling.draw(logits, [generator] * 4000))
    share = torch.bincount(picked, minlength=4) / 4000
    torch.testing.assert_close(share, logits[0].softmax(-1), rtol=0, atol=0.04)
    assert share[2] == 0


CASES = (
    "text_greedy",
    "text_greedy_batch",
    "image_greedy_cfg",
    "image_edit_greedy_cfg_batch",
    "any_greedy",
    "interleaved_greedy",
)


@pytest.mark.parametrize("name", CASES)
def test_golden_generation_through_the_command(golden, cases, tmp_path, capsys, name):
    chosen = [(r, ids) for r, ids in cases if r.id.rpartition("-")[0] == name]
    lines = [{"id": r.id, "token_ids": r.token_ids} for r, _ in chosen]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["generate", "--ckpt", str(golden / "checkpoint"), "--prompts", str(tmp_path / "prompts.jsonl")]
    command += ["--output", str(tmp_path / "out"), "--greedy"]
    for option in ("mode", "max_new_tokens", "max_length", "guidance_text", "guidance_image"):
        command += ["--" + option.replace("_", "-"), str(getattr(chosen[0][0], option))]
    assert main(command) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["prompts"] == len(chosen) and summary["rejected"] == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()]
    for row, (request, expected) in zip(rows, chosen, strict=True):
        assert (row["id"], row["token_ids"]) == (request.id, expected)
        drawn = [piece["path"] for piece in row["content"] if piece["type"] == "image"]
        assert len(drawn) == sum(i == 8197 for i in expected) + (request.mode == "image")
        assert all((tmp_path / "out" / path).exists() for path in drawn)
    # The same command again is done at once; another setting is refused by name.
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--seed", "2"]) == 2
    assert "seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "no prompts"),
        ("{", "p.jsonl:1: not valid JSON"),
        ('{"id": "a"}', "either content or token_ids"),
        ('{"content": []}', "expected an object with id"),
        ('{"id": "a", "token_ids": 3}', "token_ids is a int, expected a list"),
        ('{"id": "a", "token_ids": [0]}\n{"id": "a", "token_ids": [0]}', "p.jsonl:2: id 'a' occurs twice"),
    ],
)
def test_bad_prompts_file(golden, tmp_path, capsys, lines, message):
    (tmp_path / "p.jsonl").write_text(lines)
    command = ["generate", "--ckpt", str(golden / "checkpoint"), "--prompts", str(tmp_path / "p.jsonl")]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
