"""The figures: what they show, that they can be read in greyscale and by the colour-blind, and who draws them."""

import itertools
import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from matplotlib.text import Text
from PIL import Image

from medmax_fast import decode, figures
from medmax_fast.bench.run import Run
from medmax_fast.config import DecodeConfig, InspectConfig, ReportConfig
from medmax_fast.data.codes import perplexity
from medmax_fast.data.store import write_store
from medmax_fast.data.summary import check_rows
from medmax_fast.eval.published import PUBLISHED
from medmax_fast.eval.statistics import wilson
from medmax_fast.figures import drawing
from medmax_fast.figures.pictures import psnr
from medmax_fast.figures.training import MOST_POINTS, running_mean
from medmax_fast.inspection import inspect
from medmax_fast.report import report
from medmax_fast.vocab import IdLayout

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "benchmarks" / "results" / "cpu_epyc-2core_202611.json"
MEDMAX = {"name": "MedMax-7B", "tasks": PUBLISHED["MedMax-7B"]["tasks"]}
# Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as the colour-blind see it.
SEEN = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def losses(count: int) -> list[dict]:
    values = np.random.default_rng(0).random((count, 3)) + 1
    names = ("loss", "text_loss", "image_loss")
    return [{"step": k + 1, **dict(zip(names, row.tolist(), strict=True))} for k, row in enumerate(values)]


def accuracies(runs: int, tasks: int) -> dict[str, dict]:
    """Runs whose intervals differ; the last run has none."""
    names = list(MEDMAX["tasks"])[:tasks]
    return {
        f"run {k}": {name: (0.2 * k, *(wilson(2 * k, 10) if k < 3 else (None, None))) for name in names}
        for k in range(runs)
    }


def measured() -> list[dict]:
    return json.loads(BENCHMARK.read_text())["rows"]


def codes_with(first: int) -> np.ndarray:
    """Counts of a codebook of which a few codes are common and half are dead."""
    return np.maximum(first // np.arange(1, 8193) - first // 4096, 0)


PICTURE = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
NAMES = [f"{name}.png" for name in ("a", "b$x", "c$y$", "\u75c5", "a name that is longer than its picture is wide")]
# Every figure, short and long, full and nearly empty.
DRAWN = {
    "loss": lambda path: figures.loss_curve(losses(20), path, [{"step": 20, "loss": 1.5}]),
    "loss_long": lambda path: figures.loss_curve(losses(12_000), path),
    "loss_once": lambda path: figures.loss_curve([{"step": 1, "loss": 2.0, "text_loss": None}], path),
    "packing": lambda path: figures.packing({2048: 0.5, 32768: 1.0}, {1: 1.0, 16: 0.25}, path),
    "packing_empty": lambda path: figures.packing({2048: 0.0}, {}, path),
    "histogram": lambda path: figures.token_histogram([3, 0, 1], [0, 10, 20, 30], path, "4 rows", cut=25),
    "histogram_log": lambda path: figures.token_histogram([99_999, 0, 1], [0, 1000, 2000, 4096], path, cut=2048),
    "histogram_empty": lambda path: figures.token_histogram([0], [0, 1], path),
    "codes": lambda path: figures.code_usage(codes_with(1_000_000), path, "a note"),
    "codes_one": lambda path: figures.code_usage([0, 7, 0], path),
    "codes_equal": lambda path: figures.code_usage([5] * 8192, path),
    "grid": lambda path: figures.reconstruction_grid([PICTURE] * 5, [PICTURE // 2] * 5, NAMES, path),
    "grid_one": lambda path: figures.reconstruction_grid([PICTURE[..., 0]], [PICTURE[..., 0]], ["a.png"], path),
    "bars": lambda path: figures.evaluation_bars(accuracies(1, 2), path),
    "bars_many": lambda path: figures.evaluation_bars(accuracies(4, 12), path, MEDMAX),
    "dots": lambda path: figures.accuracy_dots(accuracies(6, 12), path, MEDMAX),
    "similarity": lambda path: figures.similarity_dots({"$a$ b": {"image_captioning_quilt": (-0.1, -0.2, 0.3)}}, path),
    "relative": lambda path: figures.relative_dots({"a": {"visual_chat_conversation": (1.1, None, None)}}, path),
    "roofline": lambda path: figures.roofline(measured(), path),
    "roofline_bytes": lambda path: figures.roofline([row for row in measured() if not row["flop"]], path),
    "roofline_flop": lambda path: figures.roofline([row for row in measured() if row["stage"] == "vqa"], path),
    "roofline_copy": lambda path: figures.roofline([row for row in measured() if row["stage"] == "pictures"], path),
}


@pytest.fixture()
def drawn(monkeypatch):
    """Figures come back as matplotlib's, and no file is written."""
    monkeypatch.setattr(drawing, "save", lambda figure, path: figure)


def lightness(color: str, seen) -> float:
    """CIE L* of a colour as somebody sees it, 0..100."""
    bytes_RGB = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(bytes_RGB <= 0.04045, bytes_RGB / 12.92, ((bytes_RGB + 0.055) / 1.055) ** 2.4)
    y = np.clip(np.asarray(seen) @ linear, 0, 1) @ (0.2126, 0.7152, 0.0722)
    return 116 * (np.cbrt(y) if y > 216 / 24389 else (24389 / 27 * y + 16) / 116) - 16


@pytest.mark.parametrize("seen", SEEN)
def test_series_differ_in_lightness_for_everybody(seen):
    found = sorted(lightness(color, SEEN[seen]) for color, *_ in drawing.SERIES)
    # And all of them from the paper.
    assert min(np.diff([*found, 100])) > (20 if seen == "normal" else 12), found
    for k in (1, 2, 3):
        assert len({series[k] for series in drawing.SERIES}) == len(drawing.SERIES)
    assert len(set(drawing.DOTS)) == 8 and "D" not in drawing.DOTS


@pytest.mark.parametrize("name", ["loss", "bars_many", "dots"])
def test_every_series_is_seen_in_greyscale(name, tmp_path):
    """Each of the four greys is there in the picture without its colours."""
    grey = np.asarray(Image.open(DRAWN[name](tmp_path / "x.png")).convert("L")).astype(int)
    for color, *_ in drawing.SERIES:
        own = Image.new("RGB", (1, 1), color).convert("L").getpixel((0, 0))
        assert (abs(grey - own) <= 2).sum() > 100, color


def texts_of(figure) -> list:
    """(text, its box in pixels) of all that is written in a figure."""
    found = [artist for artist in figure.findobj(Text) if artist.get_visible() and artist.get_text().strip()]
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                # Ticks beyond the ends of the axis have labels that are not drawn.
                inside = low - 1e-9 <= tick.get_loc() <= high + 1e-9
                hidden |= {label for label in (tick.label1, tick.label2) if not (inside and label.get_visible())}
    return [(artist.get_text(), artist.get_window_extent()) for artist in found if artist not in hidden]


@pytest.mark.parametrize("name", DRAWN)
def test_words_stand_apart_and_axes_have_units(name, monkeypatch, tmp_path):
    kept, save = [], drawing.save
    monkeypatch.setattr(drawing, "save", lambda figure, path: kept.append(figure) or save(figure, path))
    with warnings.catch_warnings():
        # A letter that the font does not have, or a label of no series, is nothing to be told of.
        warnings.simplefilter("error")
        path = DRAWN[name](tmp_path / "x.png")
    pixels = np.asarray(Image.open(path).convert("L"))
    assert path == tmp_path / "x.png" and pixels.shape[1] > 300 and (pixels < 250).mean() > 0.01
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    (figure,) = kept
    texts = texts_of(figure)
    assert len(texts) > 3
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1), f"{one!r} is over {other!r}"
    for text, box in texts:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, text
    if not name.startswith("grid"):
        # The rows and the columns of bars and lanes bear names in place of a unit.
        assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes[-1:])
        words = {word for axes in figure.axes for word in (axes.get_xlabel(), axes.get_ylabel()) if word}
        assert words <= {
            "optimizer step",
            "loss (nats per supervised id)",
            "share of positions that hold a row (%)",
            "row length (ids)",
            "rows",
            "rows (log scale)",
            "codes, the commonest first",
            "share of all codes (%, log scale)",
            "accuracy (%), 95 % interval",
            "cosine similarity, 95 % interval",
            "score relative to the reference (%), 95 % interval",
            "arithmetic intensity (FLOP per byte that must move)",
            "performance (GFLOP/s)",
            "share of the roofline (%, log scale), by stage and what bounds it",
        }


@pytest.mark.parametrize("count", [20, MOST_POINTS, MOST_POINTS + 1, 5000])
def test_loss_curve_shows_every_series(tmp_path, drawn, count):
    metrics = losses(count)
    names = ("loss", "text_loss", "image_loss")
    for row in metrics[1::3]:
        row["image_loss"] = None
    validation = [{"step": 0, "loss": 2.0, "text_loss": 1.0}, {"step": count, "loss": 1.5}, {"step": 7, "loss": None}]
    (axes,) = figures.loss_curve(metrics, tmp_path / "loss.png", validation).axes
    labels = ["all targets", "text targets", "image targets", "validation"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
    lines = {line.get_label(): line for line in axes.get_lines()}
    raw = [line for line in axes.get_lines() if line.get_label() not in labels]
    assert lines["validation"].get_xydata().tolist() == [[0, 2.0], [count, 1.5]]
    assert lines["validation"].get_marker() != "None" and lines["validation"].get_markevery() is None
    long = count > MOST_POINTS
    assert len(raw) == (3 if long else 0)
    for k, name in enumerate(names):
        steps, values = zip(*[(row["step"], row[name]) for row in metrics if row[name] is not None], strict=True)
        line = lines[labels[k]]
        assert line.get_xdata().tolist() == list(steps)
        if long:
            assert raw[k].get_xydata().tolist() == np.stack([steps, values], 1).tolist()
            assert raw[k].get_alpha() < 0.5 and line.get_alpha() is None
            assert np.std(line.get_ydata()) < np.std(values) / 2
        else:
            assert line.get_ydata().tolist() == list(values)
    assert ("running mean" in axes.get_title()) == long


@pytest.mark.parametrize(("count", "window"), [(1, 1), (1, 5), (4, 9), (40, 1), (40, 7), (700, 15)])
def test_running_mean(count, window):
    values = np.random.default_rng().normal(size=count)
    half = window // 2
    expected = [np.mean(values[max(k - half, 0) : k + half + 1]) for k in range(count)]
    np.testing.assert_allclose(running_mean(values.tolist(), window), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("draw", [figures.evaluation_bars, figures.accuracy_dots])
def test_runs_intervals_and_published_values_are_all_drawn(draw, tmp_path, drawn):
    rng = np.random.default_rng()
    tasks = list(MEDMAX["tasks"])[: int(rng.integers(2, 13))]
    runs = {f"run {k}": {task: tuple(np.sort(rng.random(3))[[1, 0, 2]]) for task in tasks[k:]} for k in range(2)}
    figure = draw(runs, tmp_path / "x.png", MEDMAX)
    across = 1 if draw is figures.evaluation_bars else 0
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["run 0", "run 1", "MedMax-7B (published)"]
    lines = [line for axes in figure.axes for line in axes.get_lines() if line.get_label() == labels[2]]
    theirs = sorted(value for line in lines for value in line.get_xydata()[:, across])
    assert theirs == sorted(MEDMAX["tasks"][task] for task in tasks)
    assert all(line.get_marker() == "D" and line.get_mfc() in ("white", "none") for line in lines)
    # The ends of every interval, as the error bars' segments.
    segments = [s for axes in figure.axes for c in axes.collections for s in c.get_segments()]
    # Those of bars are drawn twice, white and black.
    ends = sorted({tuple(sorted(segment[:, across])) for segment in segments})
    expected = sorted((100 * low, 100 * high) for run in runs.values() for _, low, high in run.values())
    np.testing.assert_allclose(ends, expected, rtol=0, atol=1e-9)


def test_code_usage_ends_where_codes_are_dead(drawn, tmp_path):
    counts = np.random.default_rng().permutation(codes_with(100_000))
    (axes,) = figures.code_usage(counts, tmp_path / "x.png").axes
    usage, equal = axes.get_lines()
    assert usage.get_xdata()[-1] == np.count_nonzero(counts) < 8192 == equal.get_xdata()[-1]
    assert (np.diff(usage.get_ydata()) <= 0).all() and sum(usage.get_ydata()) == pytest.approx(100)
    assert set(equal.get_ydata()) == {100 / 8192}


def test_perplexity():
    assert perplexity(np.zeros(5, int)) == 0 and perplexity(np.array([0, 9])) == pytest.approx(1)
    assert perplexity(np.full(8192, 3)) == pytest.approx(8192)
    # Of shares 1/2, 1/4, 1/4: 2^1.5.
    assert perplexity(np.array([2, 1, 0, 1])) == pytest.approx(2**1.5)


def test_reconstructions_stand_below_their_originals(drawn, tmp_path):
    noisy = np.clip(PICTURE.astype(int) + 4 * (-1) ** np.arange(3), 0, 255).astype(np.uint8)
    figure = figures.reconstruction_grid([PICTURE] * 5, [PICTURE, *[noisy] * 4], NAMES, tmp_path / "x.png")
    shown = {
        (k // 4, k % 4): axes.get_images()[0].get_array() for k, axes in enumerate(figure.axes) if axes.get_images()
    }
    places = [*itertools.product((0, 1), range(4)), (2, 0), (3, 0)]
    assert sorted(shown) == places
    for row, column in places:
        expected = noisy if row % 2 and (row, column) != (1, 0) else PICTURE
        assert np.array_equal(shown[row, column], expected)
    assert figure.axes[4].get_xlabel() == "equal" and figure.axes[5].get_xlabel().endswith(" dB")


def test_psnr():
    black = np.zeros((2, 2, 3), np.uint8)
    assert psnr(black, black) == math.inf and psnr(black, black + 255) == 0
    assert psnr(black, black + 5) == pytest.approx(20 * math.log10(255 / 5))


def test_roofline_shows_what_was_measured(drawn, tmp_path):
    rows = [row for row in measured() if row["share"]]
    both = [row for row in rows if row["moved_bytes"] and row["flop"]]
    above, below = figures.roofline(measured(), tmp_path / "x.png").axes
    roof, *points = above.get_lines()
    places = [point for line in points for point in line.get_xydata().tolist()]
    wanted = [[row["flop"] / row["moved_bytes"], 1e3 * row["tflop_per_s"]] for row in both]
    np.testing.assert_allclose(sorted(places), sorted(wanted), rtol=1e-9)
    # No point is above the roof, and its corner is where a copy takes as long as a product.
    (left, _, right), height = roof.get_xdata(), roof.get_ydata()
    assert all(
        y <= np.interp(np.log(x), np.log(roof.get_xdata()), np.log(height)) for x, y in places for y in [np.log(y)]
    )
    assert height[1] == height[2] and left < min(x for x, _ in places) and right > max(x for x, _ in places)
    shares = {(round(x, 9), y) for line in below.get_lines() for x, y in line.get_xydata() if line.get_marker() == "o"}
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    assert shares == {(round(100 * row["share"], 9), stages.index(row["stage"])) for row in rows}
    names = [label.get_text() for label in below.get_yticklabels()]
    assert names == ["collate (copy)", "train (product)", "text (copy, product)", "pictures (copy)", "vqa (product)"]


def test_our_forms_are_told_from_the_others(drawn, tmp_path):
    base = {"stage": "s", "moved_bytes": 1e9, "flop": None, "floor_s": 1.0, "bound": "copy", "beside": "torch"}
    shares = {"ours": 0.5, "ours, ids": 0.4, "torch": 0.1, "compiled": 0.2}
    rows = [base | {"form": form, "share": share, "p50_s": 1 / share} for form, share in shares.items()]
    figure = figures.roofline(rows, tmp_path / "x.png")
    lines = {line.get_label(): sorted(line.get_xdata()) for line in figure.axes[0].get_lines()}
    assert lines["ours"] == [40, 50] and lines["what ours is compared with"] == [10, 20]


@pytest.fixture()
def store(golden, tmp_path):
    layout = IdLayout.from_file(golden / "checkpoint" / "tokenizer" / "text_tokenizer.json")
    rng = np.random.default_rng()
    text = np.array([layout.bos, layout.text_start, layout.eot, layout.eos])
    codes = rng.integers(0, 300, (3, 1024))
    rows = [(np.concatenate([text, layout.image_span(own)]), str(i), "t", "s") for i, own in enumerate(codes)]
    return write_store(tmp_path / "store", layout, [(text, "text", "t", "s"), *rows]), codes


def test_inspect_counts_codes_and_draws_them(store, tmp_path, monkeypatch):
    built, codes = store
    for block in (1 << 22, 1500, 1):
        monkeypatch.setattr("medmax_fast.data.summary._BLOCK", block)
        assert check_rows(built).codes.tolist() == np.bincount(codes.ravel(), minlength=8192).tolist()
    result = inspect(InspectConfig(str(built.path)))
    assert result["codes_used"] == len(np.unique(codes)) and result["codes_known"] == 8192
    assert result["code_perplexity"] == pytest.approx(perplexity(np.bincount(codes.ravel())))
    for name in ("histogram", "packing", "codes"):
        assert Path(result[name]) == built.path / f"{name}.png" and Image.open(result[name]).width > 400
    report(ReportConfig(runs=(str(built.path),), output=str(tmp_path / "report")))
    text = (tmp_path / "report" / "report.md").read_text()
    assert all(f"![{caption} of store](" in text for caption in ("Row lengths", "Packing", "Image codes"))


def test_a_store_of_text_has_no_figure_of_codes(golden, tmp_path):
    layout = IdLayout.from_file(golden / "checkpoint" / "tokenizer" / "text_tokenizer.json")
    built = write_store(tmp_path / "store", layout, [(np.array([layout.bos, layout.eot]), "0", "t", "s")])
    result = inspect(InspectConfig(str(built.path)))
    assert "codes" not in result and result["codes_used"] == 0 == result["code_perplexity"]
    assert not (built.path / "codes.png").exists()


def test_decode_puts_pictures_beside_their_originals(golden, tmp_path, monkeypatch):
    codes = json.loads((golden / "image_codes.json").read_text())["ihc.png"]["codes"]
    (tmp_path / "images").mkdir()
    shutil.copy(golden / "images" / "ihc.png", tmp_path / "images" / "reconstructions.png")
    table = {"img_path": ["images/gone.png", "images/reconstructions.png"], "img_tokens": [codes] * 2}
    parquet.write_table(pyarrow.table(table), tmp_path / "codes.parquet")
    pixels = np.random.default_rng().integers(0, 256, (2, 512, 512, 3), np.uint8)
    monkeypatch.setattr(decode.ImageTokenizer, "decode", lambda self, codes: pixels[: len(codes)])
    seen = []
    draw = decode.reconstruction_grid
    monkeypatch.setattr(decode, "reconstruction_grid", lambda *given: seen.append(given) or draw(*given))
    config = DecodeConfig(str(tmp_path / "codes.parquet"), str(golden / "checkpoint"), str(tmp_path / "out"))
    result = decode.decode_images(config)
    ((original,), (picture,), names, _) = seen[0]
    assert names == ("reconstructions.png",) and original.shape == picture.shape == (512, 512, 3)
    assert np.array_equal(picture, pixels[1])
    # The figure's name is not given to a picture.
    assert np.array_equal(picture, Image.open(tmp_path / "out" / "reconstructions-1.png"))
    assert result["reconstructions"] == str(tmp_path / "out" / "reconstructions.png")
    report(ReportConfig(runs=(config.output,), output=str(tmp_path / "report")))
    assert "## Reconstructions" in (tmp_path / "report" / "report.md").read_text()
    (kept,) = (tmp_path / "report" / "figures").iterdir()
    assert kept.read_bytes() == Path(result["reconstructions"]).read_bytes()


@pytest.mark.parametrize("dry", [False, True])
def test_bench_and_report_draw_the_roofline(dry, tmp_path):
    result = json.loads(BENCHMARK.read_text()) | {"dry": dry}
    run = Run(ROOT, "cpu", dry, tmp_path, True, 0.0, rows=result["rows"], benchmarks=result["benchmarks"])
    run.save()
    # The times of a dry run mean nothing.
    assert (tmp_path / "roofline.png").exists() == (not dry)
    report(ReportConfig(runs=(str(tmp_path),), output=str(tmp_path / "report")))
    assert ("![Roofline of" in (tmp_path / "report" / "report.md").read_text()) == (not dry)
