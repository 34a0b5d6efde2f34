"""The benchmark of generation: it runs, ids stand beside each speed and agree in fp32, and a wrong engine fails it."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quick_run import quick_run

ROOT = Path(__file__).resolve().parents[1]
COMPARED = {"ids", "differing", "rows_differing", "agree_least", "agree_mean", "logit_gap"}
SPEED = {"row", "batch", "unit", "p20_s", "p50_s", "p80_s", "times"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a quick run of all sections wrote."""
    return quick_run("generate", tmp_path_factory.mktemp("bench"))


@pytest.fixture()
def benchmarks():
    from benchmarks import bench_generate
    from benchmarks.stages import generate_forms

    return bench_generate, generate_forms


@pytest.fixture()
def models(benchmarks, tmp_path):
    return benchmarks[1].Models("tiny", torch.device("cpu"), str(tmp_path))


def test_every_speed_stands_beside_ids_that_agree(found):
    sections = found["sections"]
    assert list(sections) == ["text", "pictures", "vqa", "agreement", "quantize"] and not found["failed"]
    for name in ("text", "pictures", "vqa"):
        for row in sections[name]:
            assert row.keys() >= SPEED | COMPARED, name
            assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"]
            assert row["ids"] > 0 and row["differing"] == row["rows_differing"] == row["logit_gap"] == 0
    shown = [(name, row["row"], row.get("p50_s"), row["differing"]) for name, rows in sections.items() for row in rows]
    measured = [row for row in found["rows"] if row["row"] != "nothing measured"]
    assert [(row["section"], row["row"], row["p50_s"], row["differing"]) for row in measured] == shown


def test_rows_of_the_common_table(found):
    sections = found["sections"]
    for stage in ("text", "pictures", "vqa"):
        rows = [row for row in found["evidence"] if row["stage"] == stage]
        assert [row["form"] for row in rows] == [row["row"] for row in sections[stage]]
        for row, own in zip(rows, sections[stage], strict=True):
            assert row["p50_s"] == own["p50_s"] and row["quality"] == {
                name: own[name] for name in ("ids", "differing", "logit_gap")
            }
            floors = (row["moved_bytes"] or 0) / found["copy_bytes_per_s"], row["flop"] / found["product_flop_per_s"]
            assert row["share"] == pytest.approx(max(floors) / row["p50_s"])
    text, pictures, vqa = ([row for row in found["evidence"] if row["stage"] == s] for s in ("text", "pictures", "vqa"))
    assert {row["shape"] for row in text[2:]} == {"1 step, batch 3, 20 + 8 ids"}
    assert text[3]["items_per_s"] == pytest.approx(3 / text[3]["p50_s"])
    assert text[3]["times"] == pytest.approx(text[2]["p50_s"] / text[3]["p50_s"])
    # A picture has 1,024 codes, and the published shape draws one after the other.
    assert pictures[2]["items_per_s"] == pytest.approx(2 / 1024 / pictures[2]["p50_s"])
    assert pictures[2]["times"] == pytest.approx(2 * pictures[0]["p50_s"] / pictures[2]["p50_s"])
    # One of an image's three questions computes it.
    assert vqa[0]["flop"] == vqa[2]["flop"] and 0.33 < vqa[3]["flop"] / vqa[0]["flop"] < 0.36
    assert vqa[3]["times"] == pytest.approx(vqa[0]["p50_s"] / vqa[3]["p50_s"])


def test_text(found):
    rows = found["sections"]["text"]
    assert [(row["row"], row["batch"]) for row in rows] == [(n, b) for b in (1, 3) for n in ("transformers", "ours")]
    for stock, engine in zip(rows[::2], rows[1::2], strict=True):
        assert stock["times"] == 1 and engine["times"] == pytest.approx(engine["ids_per_s"] / stock["ids_per_s"])
        # Three turns, one of which warms up, of at most eight ids a row.
        assert stock["ids"] == engine["ids"] <= 3 * 8 * stock["batch"]
        for row in (stock, engine):
            bandwidth = row["step_bytes"] / row["p50_s"]
            assert row["roofline"] == pytest.approx(bandwidth / found["copy_bytes_per_s"]) and row["first_p50_s"] > 0


def test_pictures(found):
    rows = found["sections"]["pictures"]
    assert [(row["row"], row["batch"]) for row in rows] == [("published, 3 streams", 1), ("ours", 1), ("ours", 2)]
    for row in rows:
        # Of a part of a picture no pictures per minute are made up.
        assert row["codes"] == 128 and row["pictures_per_min"] is None
        assert row["times"] == pytest.approx(row["batch"] * rows[0]["p50_s"] / row["p50_s"])
    assert [row["times_alone"] for row in rows[:2]] == [None, 1] and rows[2]["alone_differing"] == 0
    assert rows[2]["times_alone"] == pytest.approx(2 * rows[1]["p50_s"] / rows[2]["p50_s"])
    found_alone = [row["times_alone"] for row in found["evidence"] if row["stage"] == "pictures"]
    assert found_alone == [row["times_alone"] for row in rows]


def test_vqa(found):
    published, alone, separate, shared = found["sections"]["vqa"]
    assert [row["batch"] for row in (published, alone, separate, shared)] == [1, 1, 2, 6]
    assert published["cached"] is None and alone["cached"] == 0 and separate["cached"] < 0.01
    # Two of three questions find the image, all but its last page.
    assert 2 / 3 * 1024 / 1040 <= shared["cached"] < 2 / 3
    for row in (alone, separate, shared):
        assert row["questions_per_s"] == pytest.approx(1 / row["p50_s"])
        assert row["product_share"] == pytest.approx(row["flop_per_s"] / found["product_flop_per_s"])
    # Seconds times rate is the work of a question.
    work = [row["flop_per_s"] * row["p50_s"] for row in (alone, separate, shared)]
    assert work[0] == pytest.approx(work[1], rel=0.01) and work[2] < 0.4 * work[0]


def test_agreement(found):
    rows = {row["row"]: row for row in found["sections"]["agreement"]}
    assert list(rows) == ["float32, greedy", "float32, sampled", "bfloat16, greedy", "bfloat16, sampled"]
    for name, row in rows.items():
        assert row.keys() >= COMPARED and row["requests"] == 4 and "p50_s" not in row
        assert row["differing"] == 0 or name.startswith("bfloat16")


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_quantize(found):
    none, int8 = found["sections"]["quantize"]
    assert none["cross_entropy_change"] == none["likeliest_differing"] == none["differing"] == 0
    assert int8["weight_bytes"] < none["weight_bytes"]
    assert int8["cross_entropy"] == pytest.approx(none["cross_entropy"] + int8["cross_entropy_change"])
    assert 0 < abs(int8["cross_entropy_change"]) < 0.05


def test_only_known_sections(benchmarks, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_generate", "--only", "text,sound"])
    with pytest.raises(SystemExit, match="2"):
        benchmarks[0].main()
    assert "--only: sound: expected " in capsys.readouterr().err


def test_without_torchao(benchmarks, monkeypatch, capsys):
    bench, _ = benchmarks
    monkeypatch.setattr(sys, "argv", ["bench_generate", "--only", "quantize", "--quick"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^0$"):
        bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "quantize: torchao is not installed, nothing is measured"
    (row,) = json.loads(lines[-1])["rows"]
    assert row["section"] == "quantize" and row["row"] == "nothing measured"


def test_compare(benchmarks):
    compare = benchmarks[1].compare
    assert compare([[1, 2], [3]], [[1, 2], [3]], None)["differing"] == 0
    scores = torch.tensor([0.0, 0.5, 0.25, 2.0])
    asked = []

    def logits(row, at):
        asked.append((row, at))
        return scores

    result = compare([[1, 2, 3], [3, 1, 1], [1]], [[1, 2, 3], [3, 2, 2], [2]], logits)
    assert asked == [(1, 1), (2, 0)] and result["logit_gap"] == 1.5
    assert {name: result[name] for name in ("ids", "differing", "rows_differing", "agree_least", "agree_mean")} == {
        "ids": 7,
        "differing": 3,
        "rows_differing": 2,
        "agree_least": 0,
        "agree_mean": 0.5,
    }
    # An answer that stops too early is not a near tie.
    early = compare([[1]], [[1, 2]], logits)
    assert early["differing"] == 1 and early["logit_gap"] == float("inf")


def test_top_p_by_sort(benchmarks):
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    for top_p, kept in ((0.1, [1]), (0.5001, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        left = benchmarks[1].keep_top_p(logits, top_p)
        assert left.isfinite().nonzero()[:, 0].tolist() == kept
        assert torch.equal(left[kept], logits[kept])


def test_counted_work(benchmarks, models):
    """FLOP of a prompt of 100 ids, and of a second one that finds its first page; bytes and FLOP of a step."""
    from benchmarks.stages import generate_work as work

    forms, shape = benchmarks[1], models.shape
    blocks = shape.layers * (4 * shape.dim**2 + 3 * shape.dim * shape.hidden)
    engine = models.engine(2, 128)
    counted = work.PrefillCount(engine)
    (prompt,) = forms.text_prompts(models.layout, 1, 100, 0)
    forms.write(engine, [prompt], 1)
    forms.write(engine, [prompt[:64] + forms.text_prompts(models.layout, 1, 36, 1)[0]], 1)
    assert counted.ids == 100 + 36 and counted.pairs == 5050 + (5050 - 2080)
    attention = 4 * shape.layers * shape.dim * counted.pairs
    assert counted.flop(2) == 2 * blocks * 136 + 2 * 2 * shape.dim * shape.vocab_size + attention
    # Two rows of 3 and 2 new ids after prompts of 10: two steps read 11 + 11 and 12 positions, for 3 ids.
    weights = models.decoder.step_bytes()
    assert weights == 4 * (blocks + shape.dim * shape.vocab_size + shape.layers * 6 * shape.dim + shape.dim)
    position = 2 * shape.layers * shape.dim * 4
    head = shape.dim * shape.vocab_size
    assert work.text_work(shape, 4, 10, [3, 2], 2) == (weights + position * 34 / 2, 2 * 1.5 * (blocks + head))
    assert work.text_work(shape, 4, 10, [3, 2], 1) == (weights + position * 34 / 3, 2 * (blocks + head))
    # Three codes of two pictures: two steps, each of two streams after prompts of 5 and 2, see 6 + 3 and 7 + 4.
    moved, flop = work.picture_work(shape, 4, 5, 3, 2, 100)
    assert moved == weights - 4 * (head - shape.dim * 100) + position * 2 * (9 + 11) / 2
    assert flop == 2 * 4 * (blocks + shape.dim * 100)


def test_floors_of_7b(benchmarks):
    bench, _ = benchmarks
    floors = {(row["stage"], row["shape"]): row for row in bench.floors()}
    assert len(floors) == len(bench.floors()) == 3 + 5 + 3
    weights, position = 6_476_005_376 + 32 * 6 * 4096 + 4096, 2 * 32 * 4096 * 2
    text = floors["text", "1 step, batch 64, 64 + 32 ids"]
    assert text["moved_bytes"] == 2 * (weights + 268_435_456) + 64 * (64 + 16) * position
    assert text["flop"] == 2 * 64 * (6_476_005_376 + 268_435_456)
    picture = floors["pictures", "1 code, batch 64, 1,024 codes each"]
    assert picture["moved_bytes"] == 2 * (weights + 8192 * 4096) + 64 * (33 + 2 + 1024) * position
    whole, shared = (floors["vqa", f"1 question of 1,040 ids{more}"] for more in ("", ", batch 64, 8 an image"))
    assert whole["flop"] == pytest.approx(2 * 6_476_005_376 * 1040, rel=0.03) and not whole["moved_bytes"]
    assert shared["flop"] == pytest.approx(whole["flop"] * (1 + 7 * 13 / 1040) / 8, rel=0.01)


def test_forms_of_one_request_agree(benchmarks, models):
    """generate, the answer without a cache, and the engine; the picture's next code without caches."""
    forms, stock = benchmarks[1], models.stock
    prompts = forms.text_prompts(models.layout, 2, 12, 0)
    assert [[stock.answer(prompt)] for prompt in prompts] == stock.generate(prompts, 1)
    codes = stock.picture(prompts[0], 3)
    assert int(stock.image_logits(prompts[0], codes[:2]).argmax()) == codes[2]
    loss, likeliest = forms.row_losses(models.engine(2, 16), prompts)
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        logits = stock.model.lm_head(stock.model.model(ids).last_hidden_state)[:, :-1].flatten(0, 1)
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())), rel=1e-5)
    assert torch.equal(likeliest, logits.argmax(-1))


@pytest.mark.parametrize("section", ["text", "pictures", "vqa"])
def test_a_wrong_engine_is_not_timed(benchmarks, models, monkeypatch, section):
    bench, forms = benchmarks
    size = replace(bench.QUICK, repeats=1, batches=(1,), pictures=(1,), images=1, questions=2)
    # Of the engine's decoder alone.
    models.decoder.head.neg_()
    with pytest.raises(AssertionError, match="not the ids"):
        list(bench.SECTIONS[section](bench.Bench(models, size, bench.Roofline(1.0, 1.0))))
