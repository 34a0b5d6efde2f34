"""The report of runs of every kind, the page made from Markdown, the figures, and `medmax inspect`."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medmax_fast import figures
from medmax_fast.config import InspectConfig, ReportConfig
from medmax_fast.eval.published import PUBLISHED, URL
from medmax_fast.eval.run import summarize
from medmax_fast.eval.scoring import score, wilson
from medmax_fast.inspection import inspect, inspect_store
from medmax_fast.page import html_page, plain, table
from medmax_fast.report import load_runs, report
from medmax_fast.runtime import InputError

TASKS = (("vqa_rad_closed", "yes_no", "yes"), ("path_mmu_mcq", "letter", "B"))


class Page(HTMLParser):
    """Tags, pictures and rows of a page; rows are lists of (class, text) of their cells."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.pictures, self.rows, self.row_classes, self.cell = [], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        if tag == "img":
            self.pictures.append(attrs["src"])
        elif tag == "tr":
            self.rows.append([])
            self.row_classes.append(attrs.get("class"))
        elif tag in ("td", "th"):
            self.cell = [attrs.get("class"), ""]
            self.rows[-1].append(self.cell)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell[1] += data


def eval_run(folder: Path, data: Path, outputs: list[str], protocol: str = "medmax-v1") -> str:
    """An evaluation folder with two questions per task; `outputs` in order."""
    samples = []
    for i, output in enumerate(outputs):
        task, kind, gold = TASKS[i % 2]
        verdict = score(kind, gold, output)
        samples.append(
            {
                "id": f"{task}-{i:05d}",
                "task": task,
                "question": f"Question {i} <b>bold</b> | a pipe?",
                "answer": gold,
                "output": output,
                "correct": {name: verdict[name] for name in ("medmax-v1", "strict")},
                "parsed": verdict["parsed"],
                "error": None,
                "image": "a.png",
                "token_ids": [9000],
            }
        )
    results = {
        **summarize(samples, protocol),
        "skipped": {"slake_open": {"n": 7, "reason": "needs an LLM judge, which this version does not have"}},
        "notes": [],
        "data": str(data),
        "ckpt": "",
        "hashes": {"data": "d" * 64, "images": "e" * 64, "prompts": "f" * 64, "checkpoint": None},
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return str(folder)


@pytest.fixture()
def runs(tmp_path) -> dict[str, str]:
    """One run of each kind, two evaluations."""
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGBA", (300, 200), (200, 0, 0, 128)).save(data / "a.png")
    found = {
        "before": eval_run(tmp_path / "before", data, ["no", "C", "yes", "A thing"]),
        "after": eval_run(tmp_path / "after", data, ["yes", "B", "yes", "C"]),
    }
    for name in ("train", "drawn"):
        (tmp_path / name).mkdir()
        found[name] = str(tmp_path / name)
    rows = [
        {"step": i, "loss": 5.0 - i, "text_loss": 4.0 - i, "image_loss": 6.0 - i if i != 2 else None, "tokens": 100}
        for i in (1, 2, 3)
    ]
    (tmp_path / "train" / "metrics.jsonl").write_text("".join(json.dumps({**r, "seconds": 0.5}) + "\n" for r in rows))
    Image.new("RGB", (512, 512), "navy").save(tmp_path / "drawn" / "p0.png")
    content = [{"type": "text", "text": "Here:"}, {"type": "image", "path": "p0.png"}]
    lines = [{"id": "p0", "content": content}, {"id": "p1", "content": [], "error": "prompt too long"}]
    (tmp_path / "drawn" / "outputs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompt = {"id": "p0", "content": [{"type": "text", "text": "Draw a lung"}], "reference": "data/a.png"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    settings = {"command": "generate", "settings": {"prompts": str(tmp_path / "prompts.jsonl")}}
    (tmp_path / "drawn" / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "notes.md").write_text("Some *words*.\n\n![a](data/a.png)\n\n<script>alert(1)</script>\n")
    found["notes"] = str(tmp_path / "notes.md")
    return found


@pytest.fixture()
def store(golden, tmp_path) -> str:
    from medmax_fast.data.store import write_store
    from medmax_fast.vocab import IdLayout

    layout = IdLayout.from_file(golden / "checkpoint" / "tokenizer" / "text_tokenizer.json")
    short = [layout.bos, layout.text_start, layout.eot, layout.text_start + 1, layout.eos]
    long = [layout.bos, *layout.image_span(np.arange(1024)), layout.eot, layout.text_start, layout.eos]
    write_store(
        tmp_path / "store", layout, [(np.array(short), "f:0", "vqa", "a"), (np.array(long), "f:1", "draw", "b")]
    )
    return str(tmp_path / "store")


def test_report_of_everything(runs, store, tmp_path):
    paths = (*runs.values(), store)
    result = report(ReportConfig(runs=paths, output=str(tmp_path / "report"), title="A <b> report"))
    assert [row["kind"] for row in result["runs"]] == ["evaluation"] * 2 + ["training", "generation", "notes", "store"]
    text = (tmp_path / "report" / "report.md").read_text()
    headings = re.findall(r"^## (\w+)", text, re.M)
    assert headings == ["Evaluation", "Generation", "Training", "Data"]
    # The Markdown's pictures exist beside it.
    named = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(named) >= 8 and all((tmp_path / "report" / name).is_file() for name in named)
    whole = (tmp_path / "report" / "report.html").read_text()
    page = Page(whole)
    assert "<title>A &lt;b&gt; report</title>" in whole and 'name="viewport"' in whole
    assert "script" not in page.tags and "link" not in page.tags and "b" not in page.tags
    assert len(page.pictures) == len(named)
    for picture in page.pictures:
        head, _, body = picture.partition(";base64,")
        assert head in ("data:image/png", "data:image/jpeg")
        Image.open(io.BytesIO(base64.b64decode(body))).verify()
    # The only address outside is the source of the published rows, as text and link.
    assert set(re.findall(r'(?:src|href)="(http[^"]+)"', whole)) == {URL}


def test_ours_stand_beside_the_published_rows(runs, tmp_path):
    report(ReportConfig(runs=(runs["before"], runs["after"]), output=str(tmp_path / "report")))
    page = Page((tmp_path / "report" / "report.html").read_text())
    rows = {
        row[0][1]: ([text for _, text in row[1:]], kind) for row, kind in zip(page.rows, page.row_classes, strict=True)
    }
    # before: yes/no 1 of 2, letters 0 of 2; after: 2 of 2 and 1 of 2.
    assert rows["before (medmax-v1)"] == (["25.0", "50.0", "0.0", "-"], None)
    assert rows["after (medmax-v1)"] == (["75.0", "100.0", "50.0", "-"], None)
    published = [name for name in rows if name.endswith("(published)")]
    assert published == [f"{model} (published)" for model in PUBLISHED]
    cells, kind = rows["MedMax-7B (published)"]
    # Mean of 75.3 and 49.3, the two, and the printed mean of twelve.
    assert (cells, kind) == (["62.3", "75.3", "49.3", "65.5"], "published")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "were not measured by this package" in text
    assert text.count("Skipped: slake_open (7 rows): needs an LLM judge") == 2


def test_samples_wrong_first_and_side_by_side(runs, tmp_path):
    report(ReportConfig(runs=(runs["before"], runs["after"]), output=str(tmp_path / "report")))
    page = Page((tmp_path / "report" / "report.html").read_text())
    start = next(i for i, row in enumerate(page.rows) if row[0][1] == "image")
    assert [text for _, text in page.rows[start]] == [
        "image",
        "gold",
        "before: output",
        "after: output",
        "question",
        "task",
    ]
    outputs = [[tuple(cell) for cell in row[2:4]] for row in page.rows[start + 1 :]]
    assert outputs == [
        # Wrong after training; then wrong before; then right both times.
        [("unparsed", "unparsed: 'A thing'"), ("wrong", "wrong: 'C'")],
        [("wrong", "wrong: 'no'"), ("right", "right: 'yes'")],
        [("wrong", "wrong: 'C'"), ("right", "right: 'B'")],
        [("right", "right: 'yes'"), ("right", "right: 'yes'")],
    ]
    assert page.rows[start + 1][4][1] == "Question 3 <b>bold</b> | a pipe?"


def test_generation_shows_prompt_reference_and_drawing(runs, tmp_path):
    report(ReportConfig(runs=(runs["drawn"],), output=str(tmp_path / "report")))
    page = Page((tmp_path / "report" / "report.html").read_text())
    texts = [[text.strip() for _, text in row] for row in page.rows]
    assert texts == [
        ["id", "prompt", "reference", "drawn: output"],
        ["p0", "Draw a lung", "", "Here:"],
        ["p1", "", "", "prompt too long"],
    ]
    reference, drawn = [Image.open(io.BytesIO(base64.b64decode(p.split(",")[1]))) for p in page.pictures]
    # Transparency is shown over white.
    assert reference.size == (256, 171) and np.abs(np.array(reference.getpixel((9, 9))) - [227, 127, 127]).max() < 5
    assert drawn.size == (256, 256)


def test_a_lost_picture_is_said(runs, tmp_path):
    shutil.rmtree(tmp_path / "data")
    report(ReportConfig(runs=(runs["after"], runs["notes"]), output=str(tmp_path / "report")))
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.count("(no picture)") == 4 and "(no picture data/a.png)" in text


def test_rendering_again_and_refusals(runs, tmp_path):
    config = ReportConfig(runs=(runs["after"],), output=str(tmp_path / "report"))
    report(config)
    first = {path.name: path.read_bytes() for path in (tmp_path / "report").rglob("*") if path.is_file()}
    report(config)
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "report").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="made with title"):
        report(ReportConfig(runs=config.runs, output=config.output, title="Other"))

    def refused(message, path):
        output = tmp_path / "none"
        with pytest.raises(InputError, match=message) as caught:
            report(ReportConfig(runs=(runs["after"], str(path)), output=str(output)))
        assert "\n" not in str(caught.value) and not output.exists()

    refused("no run to report, expected a folder with", tmp_path / "data")
    refused("no run to report", tmp_path / "absent")
    (tmp_path / "train" / "metrics.jsonl").write_text('{"loss": 1}\n')
    refused("metrics.jsonl: line 1: no 'step'", runs["train"])
    (tmp_path / "train" / "metrics.jsonl").write_text("")
    refused("metrics.jsonl: empty", runs["train"])
    (tmp_path / "before" / "results.json").write_text("{}")
    refused("results.json: no tasks", runs["before"])
    (tmp_path / "before" / "results.json").write_text("{")
    refused("results.json: not valid JSON", runs["before"])


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    for parent in ("x", "y"):
        shutil.copytree(runs["after"], tmp_path / parent / "after")
    paths = (runs["after"], str(tmp_path / "x" / "after"), str(tmp_path / "y" / "after"))
    names = [run.name for run in load_runs(paths)]
    assert names[1:] == ["x/after", "y/after"] and len(set(names)) == 3


def test_inspect(store, tmp_path):
    result = inspect_store(InspectConfig(store, output=str(tmp_path / "seen")))
    assert result["rows"] == 2 and result["ids"] == 5 + 1030 and result["images"] == 1
    assert [row["task"] for row in result["tasks"]] == ["draw", "vqa"]
    assert Image.open(tmp_path / "seen" / "histogram.png").size[0] > 400
    assert inspect_store(InspectConfig(store))["histogram"] == str(Path(store) / "histogram.png")
    with pytest.raises(InputError, match="neither a token store"):
        inspect(InspectConfig(str(tmp_path)))


# Ids of a row for the checks below: every marker, codes and text.
def row_of(layout, *parts):
    return np.concatenate([np.atleast_1d(part) for part in (layout.bos, *parts, layout.eos)])


@pytest.fixture(scope="module")
def layout(golden):
    from medmax_fast.vocab import IdLayout

    return IdLayout.from_file(golden / "checkpoint" / "tokenizer" / "text_tokenizer.json")


def test_suspicious_rows_are_named_with_their_reasons(layout, tmp_path):
    from medmax_fast.data.store import write_store

    codes, eot, boi, eoi = layout.image_start + np.arange(1024), layout.eot, layout.boi, layout.eoi
    cases = [
        ("good", (eot, boi, codes, eoi), None),
        ("text", (layout.text_start, eot), None),
        ("two", (boi, codes, eoi, eot, boi, codes, eoi), None),
        ("silent", (boi, codes, eoi), ["no eot"]),
        ("short", (eot, boi, codes[:-1], eoi), ["image 1 of 1023 codes"]),
        ("long", (eot, boi, codes, codes[:1], eoi), ["image 1 of 1025 codes"]),
        ("empty", (eot, boi, eoi), ["image 1 of 0 codes"]),
        ("open", (eot, boi, codes), ["1 boi, 0 eoi", "no eoi after image 1"]),
        ("stray", (eot, codes), ["1024 codes without boi"]),
        ("closed", (eot, codes, eoi), ["0 boi, 1 eoi", "1024 codes without boi"]),
        ("lone", (eot, eoi), ["0 boi, 1 eoi"]),
        ("many", (*(boi, eoi) * 6,), ["no eot", *[f"image {i} of 0 codes" for i in (1, 2, 3, 4)], "2 more"]),
        ("nested", (eot, boi, boi, codes, eoi), ["2 boi, 1 eoi", "image 1 of 0 codes"]),
        ("halves", (eot, boi, codes[:512], layout.text_start, codes[512:], eoi), ["512 codes without boi", "image 1"]),
    ]
    rows = [(row_of(layout, *parts), key, "t", "s") for key, parts, _ in cases]
    # A row that ends inside an image before one that goes on with codes: each is wrong by itself.
    rows += [
        (np.array([0, eot, boi, *codes[:500]]), "cut", "t", "s"),
        (np.array([*codes[500:], eoi, eot]), "on", "", ""),
    ]
    store = write_store(tmp_path / "store", layout, rows)
    result = inspect_store(InspectConfig(str(store.path), output=str(tmp_path / "seen")))
    found = [json.loads(line) for line in (tmp_path / "seen" / "suspicious.jsonl").read_text().splitlines()]
    expected = {key: reasons for key, _, reasons in cases if reasons}
    assert [row["key"] for row in found] == [*expected, "cut", "on"] and found[-1]["task"] == ""
    for row in found[:-2]:
        reasons = expected[row["key"]]
        assert [r[: len(e)] for r, e in zip(row["reasons"], reasons, strict=True)] == reasons
        assert rows[row["row"]][1] == row["key"] and row["ids"] == len(rows[row["row"]][0])
    assert found[-2]["reasons"] == ["1 boi, 0 eoi", "image 1 of 500 codes"]
    assert found[-1]["reasons"] == ["0 boi, 1 eoi", "524 codes without boi"]
    counted = {name: result[name] for name in result if "suspicious_" in name or name.startswith("rows_")}
    assert counted.pop("rows_cut_as_published") == 1
    assert list(counted.values()) == [13, 2, 6, 11]
    assert result["first_suspicious"][3]["reasons"] == "image 1 of 0 codes"


def test_only_the_first_suspicious_rows_are_printed(layout, tmp_path, capsys):
    from medmax_fast import cli
    from medmax_fast.data.store import write_store

    rows = [(np.array([0, 2]), f"k{i}", "", "") for i in range(30)]
    store = write_store(tmp_path / "store", layout, rows)
    assert cli.main(["inspect", str(store.path)]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    assert sum(line.rstrip().endswith("no eot") for line in shown) == 20
    assert len((store.path / "suspicious.jsonl").read_text().splitlines()) == 30
    assert json.loads(last)["suspicious_rows"] == 30 and json.loads(last)["tasks"][0]["supervised"] == 30
    # The files beside it do not make the store another one.
    assert cli.main(["inspect", str(store.path)]) == 0


def faults_by_hand(ids, layout, codes_per_image):
    """Bits of summary.NO_EOT, UNBALANCED, ODD_IMAGE of one row, from a text of it."""
    letters = {layout.boi: "<", layout.eoi: ">", layout.eot: "|"}
    text = "".join(letters.get(i, "c" if layout.image_start <= i < layout.image_end else ".") for i in ids.tolist())
    rest = re.sub(f"<c{{{codes_per_image}}}>", "", text)
    return ("|" not in text) + 2 * (text.count("<") != text.count(">")) + 4 * bool(re.search("[<c]", rest))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_checks_equal_a_reading_of_each_row(layout, data):
    from medmax_fast.data import summary

    alphabet = [layout.boi, layout.eoi, layout.eot, layout.image_start, layout.image_end - 1, layout.text_start]
    image = [layout.boi, *[layout.image_start] * 3, layout.eoi]
    piece = st.one_of(st.just(image), st.lists(st.sampled_from(alphabet), min_size=1, max_size=4))
    rows = data.draw(st.lists(st.lists(piece, min_size=1, max_size=5), min_size=1, max_size=8))
    rows = [np.array([i for piece in row for i in piece], np.uint16) for row in rows]
    offsets = np.cumsum([0, *map(len, rows)])
    store = FakeStore(np.concatenate(rows), offsets, layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "IMAGE_CODES", 3)
        patch.setattr(summary, "_BLOCK", data.draw(st.sampled_from([1, 7, 1000])))
        checks = summary.check_rows(store)
    assert checks.faults.tolist() == [faults_by_hand(row, layout, 3) for row in rows]
    assert checks.images == sum(int((row == layout.boi).sum()) for row in rows)


class FakeStore:
    def __init__(self, ids, offsets, layout):
        self.ids, self.offsets, self.layout = ids, offsets, layout

    def __len__(self):
        return len(self.offsets) - 1


def test_padding_is_what_shuffled_batches_waste():
    from medmax_fast.data.summary import padding

    # Two rows, one batch: half of the room of the shorter one.
    assert padding(np.array([10, 20]), 2) == padding(np.array([10, 20]), 16) == pytest.approx(0.25)
    assert padding(np.array([7, 7, 7]), 4) == padding(np.array([3, 9]), 1) == padding(np.zeros(0, int), 4) == 0
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2000, 64) ** 2 // 1000 + 1
    for batch in (2, 4, 16):
        orders = rng.permuted(np.tile(lengths, (4000, 1)), axis=1).reshape(4000, -1, batch)
        padded = orders.max(2).sum() * batch
        assert padding(lengths, batch) == pytest.approx(1 - orders.sum() / padded, abs=2e-3)
        assert padding(lengths, batch) > 0.2


def test_padding_of_a_store_with_and_without_the_published_cut(layout, tmp_path):
    from medmax_fast.data.store import write_store

    rows = [(np.full(n, layout.eot), str(n), "", "") for n in (1024, 3072)]
    result = inspect_store(InspectConfig(str(write_store(tmp_path / "store", layout, rows).path)))
    by_batch = {row["batch"]: (row["padding_cut"], row["padding_whole"]) for row in result["padding"]}
    assert list(by_batch) == [1, 4, 8, 16] and by_batch[1] == (0, 0)
    assert by_batch[4] == pytest.approx((1 - 1536 / 2048, 1 - 2048 / 3072))
    assert (result["rows_cut_as_published"], result["ids_cut_as_published"]) == (1, 1024)


@given(st.text(max_size=40))
def test_plain_text_survives_markdown(text):
    row = [{"a": plain(text), "b": "x"}]
    page = Page(html_page("t", table(row), "."))
    assert [cell[1] for cell in page.rows[0]] == ["a", "b"]
    # Blanks of any kind count as one; NUL has no place in HTML.
    assert page.rows[1][0][1].split() == text.replace("\0", "\ufffd").split()
    assert set(page.tags) <= {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }


def test_figures_are_readable_in_greyscale(tmp_path):
    """The series differ in lightness, and in style or hatch besides."""
    grey = [Image.new("RGB", (1, 1), color).convert("L").getpixel((0, 0)) for color, *_ in figures.SERIES]
    assert min(abs(a - b) for i, a in enumerate(grey[:3]) for b in grey[:i]) > 40
    for k in (1, 2, 3):
        assert len({series[k] for series in figures.SERIES}) == len(figures.SERIES)


@pytest.mark.parametrize("count", [20, figures.MOST_POINTS, figures.MOST_POINTS + 1, 5000])
def test_loss_curve_shows_every_series(tmp_path, monkeypatch, count):
    monkeypatch.setattr(figures, "_save", lambda figure, path: figure)
    rng = np.random.default_rng()
    losses = rng.random((count, 3)) + 1
    names = ("loss", "text_loss", "image_loss")
    metrics = [{"step": k + 1, **dict(zip(names, row.tolist(), strict=True))} for k, row in enumerate(losses)]
    for row in metrics[1::3]:
        row["image_loss"] = None
    validation = [{"step": 0, "loss": 2.0, "text_loss": 1.0}, {"step": count, "loss": 1.5}, {"step": 7, "loss": None}]
    (axes,) = figures.loss_curve(metrics, tmp_path / "loss.png", validation).axes
    labels = ["all targets", "text targets", "image targets", "validation"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
    drawn = {line.get_label(): line for line in axes.get_lines()}
    raw = [line for line in axes.get_lines() if line.get_label() not in labels]
    assert drawn["validation"].get_xydata().tolist() == [[0, 2.0], [count, 1.5]]
    assert drawn["validation"].get_marker() != "None" and drawn["validation"].get_markevery() is None
    long = count > figures.MOST_POINTS
    assert len(raw) == (3 if long else 0)
    for k, name in enumerate(names):
        steps, values = zip(*[(row["step"], row[name]) for row in metrics if row[name] is not None], strict=True)
        line = drawn[labels[k]]
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
    np.testing.assert_allclose(figures.running_mean(values.tolist(), window), expected, rtol=0, atol=1e-12)


def test_every_figure_draws(tmp_path):
    metrics = [{"step": 1, "loss": 2.0, "text_loss": None, "image_loss": 1.0}, {"step": 2, "loss": 1.0}]
    bars = {"a": {"slake_closed": (0.5, *wilson(5, 10))}, "b": {"pmc_vqa_mcq": (1.0, *wilson(10, 10))}}
    published = {"name": "MedMax-7B", "tasks": PUBLISHED["MedMax-7B"]["tasks"]}
    picture = np.zeros((8, 8, 3), np.uint8)
    drawn = [
        figures.loss_curve(metrics, tmp_path / "loss.png"),
        figures.loss_curve(metrics, tmp_path / "validated.png", [{"step": 2, "loss": 1.5, "text_loss": None}]),
        figures.loss_curve(metrics * 400, tmp_path / "long.png"),
        figures.store_overview([3, 0, 1], [0, 10, 20, 30], {2048: 0.9}, {8: 0.6}, tmp_path / "store.png", cut=25),
        figures.store_overview([999, 0, 1], [0, 10, 20, 30], {2048: 0.9}, {}, tmp_path / "skewed.png", "note"),
        figures.store_overview([0], [0, 1], {2048: 0.0}, {8: 1.0}, tmp_path / "empty.png"),
        figures.evaluation_bars(bars, tmp_path / "bars.png", published),
        figures.evaluation_bars(bars, tmp_path / "ours.png"),
        figures.picture_grid([[picture, None]], ["before", "after"], tmp_path / "grid.png", ["one"]),
    ]
    for path in drawn:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[1] > 300 and (pixels < 250).mean() > 0.01, path
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in drawn)
