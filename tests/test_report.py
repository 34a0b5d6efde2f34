"""The report of runs of every kind, the page made from Markdown, and `medmax inspect`."""

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

from medmax_fast.config import InspectConfig, ReportConfig
from medmax_fast.eval.published import INTERLEAVED, PUBLISHED, SIMILARITY, URL, VISUAL_CHAT
from medmax_fast.eval.reporting.section import figures_of
from medmax_fast.eval.statistics import compare_runs, holm
from medmax_fast.inspection import inspect, inspect_store
from medmax_fast.page import html_page, plain, table
from medmax_fast.report import load_runs, report
from medmax_fast.runtime import InputError

PROTOCOLS = ("medmax-v1", "strict")
STATUSES = ("answered", "unparsed", "failed", "unjudged")


class Page(HTMLParser):
    """Tags, pictures, folded parts and rows of a page; rows are lists of (class, text) of their cells."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.pictures, self.rows, self.row_classes, self.cell = [], [], [], [], None
        # Of each <details>: [summary, whether it is open, its rows, whether it is closed again].
        self.parts, self.summary = [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        if tag == "img":
            self.pictures.append(attrs["src"])
        elif tag == "details":
            self.parts.append(["", "open" in attrs, [], False])
        elif tag == "summary":
            self.summary = True
        elif tag == "tr":
            self.rows.append([])
            if self.parts and not self.parts[-1][3]:
                self.parts[-1][2].append(self.rows[-1])
            self.row_classes.append(attrs.get("class"))
        elif tag in ("td", "th"):
            self.cell = [attrs.get("class"), ""]
            self.rows[-1].append(self.cell)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None
        elif tag == "summary":
            self.summary = False
        elif tag == "details":
            self.parts[-1][3] = True

    def handle_data(self, data):
        if self.summary:
            self.parts[-1][0] += data
        if self.cell is not None:
            self.cell[1] += data


def sample(task: str, number: int, output: str, score: float | None, **more) -> dict:
    """A line of samples.jsonl with the same score under both protocols."""
    return {
        "id": f"{task}-{number:05d}",
        "task": task,
        "metric": metric_of(task),
        "source": "s",
        "question": f"Question {number} <b>bold</b> | a pipe?",
        "answer": "gold",
        "output": output,
        "image": "a.png",
        "pictures": [],
        "scores": dict.fromkeys(PROTOCOLS, score),
        "status": "answered",
        "parsed": None,
        "judge": None,
        "image_similarity": None,
        "text_metrics": None,
        "error": None,
        "token_ids": [9000],
        "cluster": str(number),
    } | more


def figure(values: list[float | None]) -> dict:
    kept = [value for value in values if value is not None]
    mean = sum(kept) / len(kept) if kept else None
    return {
        "value": mean,
        "stderr": 0.1 if kept else None,
        "stderr_clustered": 0.125 if kept else None,
        "n": len(values),
        "counted": len(kept),
        "images": len(kept),
        "ci95": [mean - 0.2, mean + 0.25] if kept else None,
        "ci_method": "bootstrap" if kept else None,
        "by_protocol": {"medmax-v1": mean, "strict": None if mean is None else mean - 0.05},
    }


def metric_of(task: str) -> str:
    return {"image": "similarity", "mm": "relative_score", "visual": "relative_score"}.get(
        task.split("_")[0], "accuracy"
    )


def eval_run(folder: Path, data: Path, samples: list[dict], data_hash: str = "d", **more) -> str:
    """An evaluation folder of these samples; figures are by medmax-v1."""
    tasks = {}
    for name in dict.fromkeys(row["task"] for row in samples):
        own, metric = [row for row in samples if row["task"] == name], metric_of(name)
        found = figure([row["scores"]["medmax-v1"] for row in own])
        coverage = {status: sum(row["status"] == status for row in own) for status in STATUSES}
        tasks[name] = {"metric": metric, metric: found.pop("value"), **found, "coverage": coverage}
        drawn = [row["image_similarity"]["medmax-v1"] for row in own if row["image_similarity"]]
        if drawn:
            tasks[name]["image_similarity"] = figure(drawn)
    results = {
        "protocol": "medmax-v1",
        "unit": "fraction",
        "n": len(samples),
        "tasks": tasks,
        "groups": {"source": {}, "domain": {}},
        "skipped": {"slake_open": {"n": 7, "reason": "asked without a judge"}},
        "notes": [],
        "data": str(data),
        "backend": {"kind": "native", "model": "ck`pt"},
        "judge": None,
        "clip": None,
        "prompt_form": "[bos, image, question, eot]",
        "hashes": {"data": data_hash * 64, "images": "e" * 64, "prompts": "f" * 64, "checkpoint": None},
        "versions": {},
    } | more
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return str(folder)


def two_tasks(*answers: tuple[str, str, float]) -> list[dict]:
    """Samples of closed and mcq questions in turn, from (status, output, score) each."""
    names = ("vqa_rad_closed", "path_mmu_mcq")
    return [sample(names[i % 2], i, output, score, status=status) for i, (status, output, score) in enumerate(answers)]


BEFORE = (("answered", "no", 0.0), ("answered", "C", 0.0), ("answered", "yes", 1.0), ("unparsed", "A thing", 0.0))
AFTER = (("answered", "yes", 1.0), ("answered", "B", 1.0), ("answered", "yes", 1.0), ("answered", "C", 0.0))


def rendered(tmp_path: Path, *runs: str) -> tuple[str, Page]:
    """report.md and the page of it."""
    report(ReportConfig(runs=runs, output=str(tmp_path / "report")))
    folder = tmp_path / "report"
    return (folder / "report.md").read_text(), Page((folder / "report.html").read_text())


@pytest.fixture()
def runs(tmp_path) -> dict[str, str]:
    """One run of each kind, two evaluations."""
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGBA", (300, 200), (200, 0, 0, 128)).save(data / "a.png")
    found = {
        "before": eval_run(tmp_path / "before", data, two_tasks(*BEFORE)),
        "after": eval_run(tmp_path / "after", data, two_tasks(*AFTER)),
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
    assert rows["before (medmax-v1)"] == (["25.0", "-", "50.0", "0.0"], None)
    assert rows["after (medmax-v1)"] == (["75.0", "-", "100.0", "50.0"], None)
    published = [name for name in rows if name.endswith("(published)")]
    assert published == [f"{model} (published)" for model in PUBLISHED]
    cells, kind = rows["MedMax-7B (published)"]
    # Mean of 75.3 and 49.3, the two, and the printed mean of twelve.
    assert (cells, kind) == (["62.3", "65.5", "75.3", "49.3"], "published")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "were not measured by this package" in text
    assert text.count("Skipped: slake_open (7 rows): asked without a judge.") == 2


def test_samples_wrong_first_and_side_by_side(runs, tmp_path):
    _, page = rendered(tmp_path, runs["before"], runs["after"])
    parts = {summary.partition(":")[0]: rows for summary, _, rows, _ in page.parts}
    columns = ["image", "question", "gold", "before: output", "after: output"]
    for task, expected in {
        # Wrong after training comes first, then what was wrong before.
        "path_mmu_mcq": [
            [("unparsed", "unparsed: A thing"), ("wrong", "wrong: C")],
            [("wrong", "wrong: C"), ("right", "right: B")],
        ],
        "vqa_rad_closed": [
            [("wrong", "wrong: no"), ("right", "right: yes")],
            [("right", "right: yes"), ("right", "right: yes")],
        ],
    }.items():
        heading, *rows = parts[task]
        assert [text for _, text in heading] == columns
        assert [[tuple(cell) for cell in row[3:]] for row in rows] == expected
    assert parts["path_mmu_mcq"][1][1][1] == "Question 3 <b>bold</b> | a pipe?"


def test_parts_fold_and_the_rest_does_not(runs, tmp_path):
    text, page = rendered(tmp_path, *runs.values())
    # A part per run and per task; the first of each section is open, and every part ends before the next section.
    expected = [("before: medmax-v1", True), ("after: medmax-v1", False)]
    expected += [("vqa_rad_closed: before 50.0 %, after 100.0 %", True)]
    expected += [("path_mmu_mcq: before 0.0 %, after 50.0 %", False)]
    assert [tuple(part[:2]) for part in page.parts] == expected and all(part[3] for part in page.parts)
    whole = (tmp_path / "report" / "report.html").read_text()
    assert whole.count("<details") == whole.count("</details>") == 4
    assert whole.rindex("</details>") < whole.index("<h2>Generation") and "<details" not in text
    # With nothing after it, the last part ends before the footer.
    alone = html_page("t", "### Samples, wrong ones first\n\n#### a\n\nx\n\n---\n\nfooter", ".")
    assert alone.index("</details>") < alone.index("<hr") < alone.index("footer")
    assert html_page("t", "### Other\n\n#### a\n\nx", ".").count("<details") == 0
    assert html_page("t", "### Runs in detail\n\n#### a\n\nx", ".").rstrip().endswith("</details>\n</body>\n</html>")


def all_tasks(rng: np.random.Generator, count: int = 3, judged: bool = True) -> list[dict]:
    """Samples of every kind of task with random scores."""
    rows = []
    names = ["slake_closed", "slake_open", "image_captioning_quilt", "image_generation_quilt", "mm_out_x", "mm_out_y"]
    for k, name in enumerate([*names, "visual_chat_conversation", "visual_chat_detailed_description"]):
        binary, by_judge = metric_of(name) == "accuracy", name.split("_")[-1] in ("open", "x", "y", "conversation")
        for i in range(count + k):
            value = float(rng.integers(2)) if binary else float(rng.random())
            row = sample(name, i, f"out {i}", value if judged or not by_judge else None)
            if name.startswith("mm_out"):
                row["image_similarity"] = dict.fromkeys(PROTOCOLS, float(rng.random()))
            if by_judge and judged:
                row["judge"] = {"scores": [1] if binary else [8, 4], "reply": f"said {i}", "error": None}
            rows.append(row)
    return rows


def table_rows(page: Page, *columns: str) -> list[dict[str, str]]:
    """Rows of all tables with these columns among others."""
    found, names = [], []
    for row in page.rows:
        texts = [text for _, text in row]
        if texts[0] in ("model", "task", "source", "image", "reference"):
            names = texts
        elif set(columns) <= set(names):
            found.append(dict(zip(names, texts, strict=True)))
    return found


def test_every_group_stands_beside_the_published_rows(runs, tmp_path):
    samples = all_tasks(np.random.default_rng())
    path = eval_run(tmp_path / "all", tmp_path / "data", samples)
    text, page = rendered(tmp_path, path, runs["before"])
    tasks = json.loads((tmp_path / "all" / "results.json").read_text())["tasks"]
    # A run is in the tables of what it has figures of.
    assert [row["model"] for row in table_rows(page, "mean of 12")][:2] == ["all (medmax-v1)", "before (medmax-v1)"]
    similar, mm_out, chat = (
        table_rows(page, "model", name) for name in ("image_captioning_quilt", "mm_out_x", "visual_chat, all")
    )
    assert [row["model"] for row in similar] == ["all (medmax-v1)", "Chameleon-7B (published)", "MedMax-7B (published)"]
    for name in ("image_captioning_quilt", "image_generation_quilt"):
        assert similar[0][name] == f"{tasks[name]['similarity']:.2f}"
        assert similar[2][name] == f"{SIMILARITY['MedMax-7B'][name]:.2f}"
    # The published figures are of all questions, so they stand beside the mean over all questions.
    for label, key, factor, half in (
        ("mm_out, all", "scores", 100, 0.0501),
        ("mm_out, images, all", "image_similarity", 1, 0.00501),
    ):
        values = [row[key]["medmax-v1"] for row in samples if row["task"].startswith("mm_out")]
        assert float(mm_out[0][label]) == pytest.approx(factor * np.mean(values), abs=half)
    assert [mm_out[2][name] for name in ("mm_out_x", "mm_out, all", "mm_out, images, all")] == [
        "-",
        f"{INTERLEAVED['MedMax-7B']['text']:.1f}",
        f"{INTERLEAVED['MedMax-7B']['image']:.2f}",
    ]
    values = [row["scores"]["medmax-v1"] for row in samples if row["task"].startswith("visual_chat")]
    assert float(chat[0]["visual_chat, all"]) == pytest.approx(100 * np.mean(values), abs=0.051)
    assert {row["model"]: row["visual_chat, all"] for row in chat[1:]} == {
        f"{model} (published)": f"{value:.1f}" for model, value in VISUAL_CHAT.items()
    }
    assert "read off a plot" in text
    for caption in ("Accuracy per task", "Accuracy by answer type", "Similarity", "Relative scores"):
        assert text.count(f"![{caption}](") == 1


def test_the_only_task_of_mm_out_stands_for_all_of_it(tmp_path):
    for judged in (True, False):
        rows = [row for row in all_tasks(np.random.default_rng(1), judged=judged) if row["task"] != "mm_out_y"]
        folder = tmp_path / str(judged)
        _, page = rendered(folder, eval_run(folder / "one", tmp_path / "data", rows))
        ours, _, published = table_rows(page, "model", "mm_out_x, images")
        assert set(ours) == {"model", "mm_out_x, images"} | ({"mm_out_x"} if judged else set())
        assert (published.get("mm_out_x"), published["mm_out_x, images"]) == ("94.2" if judged else None, "0.46")


def test_a_table_without_any_of_our_tasks_is_left_out(runs, tmp_path):
    text, page = rendered(tmp_path, runs["before"])
    assert "### Similarity" not in text and "### Relative scores" not in text and "### Paired" not in text
    assert not table_rows(page, "image_captioning_quilt")


def test_without_a_judge(tmp_path):
    rows = all_tasks(np.random.default_rng(2), judged=False)
    text, page = rendered(tmp_path, eval_run(tmp_path / "bare", tmp_path / "data", rows))
    row = next(row for row in table_rows(page, "clustered") if row["task"] == "slake_open")
    assert [row[name] for name in ("counted", "value", "95 % interval", "by", "standard error")] == ["0", *"----"]
    assert "slake_open" not in table_rows(page, "mean of 12")[0]
    shown = next(part for part in page.parts if part[0].startswith("slake_open"))
    assert all(row[-1][1].startswith("not scored: out ") for row in shown[2][1:])
    # Of the pictures of mm_out there are figures all the same.
    assert {"mm_out, images, all", "mm_out_x, images"} <= set(table_rows(page, "model", "mm_out_x, images")[0])
    assert "mm_out_x, images" in figures_of(json.loads((tmp_path / "bare" / "results.json").read_text()))


def test_details_of_a_run(tmp_path):
    rows = [sample("slake_open", i, "x", 0.5, status=status) for i, status in enumerate((*STATUSES, "failed"))]
    path = eval_run(
        tmp_path / "run",
        tmp_path / "data",
        rows,
        judge={"model": "gpt-4o-mini", "reported": ["snap-1", "snap-2"], "calls": 9, "prompts_sha256": "ab" * 32},
        clip={"model": "Biomed*CLIP*"},
        notes=["a <i>note</i>"],
        groups={
            "source": {
                "slake": {"metric": "accuracy", "accuracy": 0.25, "n": 4, "stderr_clustered": 0.1, "ci95": [0, 0.5]}
            },
            "domain": {},
        },
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    results["tasks"]["slake_open"]["text_metrics"] = {"token_f1": 0.25}
    results["tasks"]["slake_open"]["fid"] = {"features": "clip", "fid": 12.5, "n_real": 4}
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    text, page = rendered(tmp_path, path)
    (row,) = table_rows(page, "clustered", "counted")
    assert list(row.values()) == ["slake_open", "5", "5", "5", "50.0 %", "30.0 to 75.0", "bootstrap", "10.0", "12.5"]
    (row,) = table_rows(page, "strict - medmax-v1")
    assert list(row.values()) == ["slake_open", "50.0", "45.0", "-5.0", "1", "1", "2", "1"]
    assert table_rows(page, "token_f1") == [{"task": "slake_open", "token_f1": "0.250"}]
    assert table_rows(page, "fid") == [{"task": "slake_open", "features": "clip", "fid": "12.500", "n_real": "4"}]
    assert [list(row.values())[:4] for row in table_rows(page, "source")] == [["slake", "4", "25.0 %", "0.0 to 50.0"]]
    whole = (tmp_path / "report" / "report.html").read_text()
    for fact in (
        "Model: kind native; model ck`pt",
        "Judge: model gpt-4o-mini; reported snap-1, snap-2; calls 9; prompts sha256 " + "ab" * 32,
        "Image-text encoder: model Biomed*CLIP*",
        "Note: a &lt;i&gt;note&lt;/i&gt;.",
        "Prompt form: [bos, image, question, eot]",
        "sha256 of data: " + "d" * 64,
    ):
        assert f"<li>{fact}</li>" in whole, fact
    assert "sha256 of checkpoint" not in text and "i" not in page.tags


def test_pairs_are_those_of_the_same_questions_and_adjusted_together(tmp_path):
    rng = np.random.default_rng()
    names = ("slake_closed", "path_mmu_mcq", "image_captioning_quilt")

    def made(better: float) -> list[dict]:
        rows = []
        for name in names:
            for i in range(60):
                value = float(rng.random() < better) if name != names[2] else 0.1 * better + float(rng.random())
                rows.append(sample(name, i, "x", value))
        return rows

    runs = {"first": made(0.2), "second": made(0.4), "third": made(0.3), "other": made(0.5)}
    # Not the same questions: the run has no part in any pair.
    paths = [
        eval_run(tmp_path / name, tmp_path / "data", rows, "9" if name == "other" else "d")
        for name, rows in runs.items()
    ]
    text, page = rendered(tmp_path, *paths)
    expected = [row for name in ("second", "third") for row in compare_runs(runs["first"], runs[name], "medmax-v1")]
    adjusted = holm([row["p_value"] for row in expected])
    shown = table_rows(page, "p, Holm")
    assert [row["task"] for row in shown] == [*names, "mean of 2 tasks"] * 2
    assert f"adjusted for all {len(expected)} comparisons" in text

    def number(p: float) -> str:
        return "< 0.001" if p < 0.001 else f"{p:.3f}"

    for row, known, p in zip(shown, expected, adjusted, strict=True):
        plainly = known["task"] == names[2]
        for cell, key in zip(
            [row["difference"], *row["95 % interval"].split(" to ")], ("difference", "low", "high"), strict=True
        ):
            assert float(cell) == pytest.approx(known[key] * (1 if plainly else 100), abs=0.00051 if plainly else 0.051)
        assert (row["p"], row["p, Holm"]) == (number(known["p_value"]), number(p))
        assert (row["n"], row["images"]) == (str(known["n"]), str(known["images"]))
    for k, name in enumerate(("second", "third")):
        line = re.search(rf"^\*\*{name}\*\* - first \(medmax-v1\); .* significant at 5 %: (.*)\.$", text, re.M)[1]
        found = [
            row["task"] for row, p in zip(expected[4 * k :], adjusted[4 * k : 4 * k + 4], strict=False) if p < 0.05
        ]
        assert re.findall(r"(\w[\w ]*) [+-]", line) == found or (line, found) == ("nothing", [])
    assert "other** -" not in text and "first** -" not in text
    # The samples of the other run are apart as well.
    assert sum(part[0].startswith("slake_closed: other") for part in page.parts) == 1


def test_drawings_stand_beside_their_reference(runs, tmp_path):
    rows = [
        sample("image_generation_quilt", 0, "", 0.3125, pictures=["pictures/x.png"], answer=""),
        sample("image_generation_quilt", 1, "", None, status="unparsed", answer=""),
        sample("image_generation_quilt", 2, "", 0.1, pictures=["pictures/x.png"], answer="", image=""),
    ]
    path = eval_run(tmp_path / "drew", tmp_path / "data", rows)
    (tmp_path / "drew" / "pictures").mkdir()
    Image.new("RGB", (512, 512), "navy").save(tmp_path / "drew" / "pictures" / "x.png")
    _, page = rendered(tmp_path, path)
    heading, *shown = [[text.strip() for _, text in row] for row in page.parts[-1][2]]
    # No column of gold answers where there are none.
    assert heading == ["reference", "drew: output", "question"]
    assert [row[:2] for row in shown] == [["", "unparsed: (nothing)"], ["-", "0.100:"], ["", "0.312:"]]
    images = [Image.open(io.BytesIO(base64.b64decode(p.split(",")[1]))) for p in page.pictures[-4:]]
    assert [image.size for image in images] == [(192, 128), (192, 192), (192, 128), (192, 192)]
    assert images[1].getpixel((9, 9))[2] > 100 and images[0].getpixel((9, 9))[0] > 200


def test_long_outputs_and_many_samples_are_cut(tmp_path):
    rows = [sample("slake_open", i, f"{i} " + "word " * 500, float(i >= 30)) for i in range(50)]
    rows[3]["judge"] = {"scores": [0], "reply": "because " * 100, "error": None}
    rows[4] |= {"status": "unjudged", "judge": {"scores": None, "reply": "", "error": "HTTP 503"}}
    rows[4]["scores"] = dict.fromkeys(PROTOCOLS)
    text, page = rendered(tmp_path, eval_run(tmp_path / "long", tmp_path / "data", rows))
    (_, *shown) = page.parts[-1][2]
    assert len(shown) == 20 and "30 more samples of slake_open are in samples.jsonl." in text
    outputs = [row[-1][1] for row in shown]
    # Wrong ones in the order of the data; what nobody judged is not among them.
    numbers = [int(re.match(r"wrong: (\d+) word", output)[1]) for output in outputs]
    assert numbers == [i for i in range(21) if i != 4]
    assert all(len(output) < 320 and output.endswith(" ...") for output in outputs[:3])
    assert re.fullmatch(r"wrong: 3 (word )+.*\.\.\. judge: (because )+.*\.\.\.", outputs[3]) and len(outputs[3]) < 500


HOSTILE = "</td><script>alert(1)</script> | **b** | `c` \n\n# head\n\n#### x ![p](a.png) [l](http://x.org)"
HOSTILE += " <!-- &lt; _i_ ~~s~~ \\"


@pytest.mark.parametrize("field", ["question", "answer", "output", "error", "judge", "name"])
def test_nothing_in_a_sample_is_markup(field, runs, tmp_path):
    plainly = sample("slake_open", 0, "out", 0.0, judge={"scores": [0], "reply": "said", "error": None})
    calm = rendered(tmp_path / "calm", eval_run(tmp_path / "x", tmp_path / "data", [plainly]))[1]
    change = {field: HOSTILE, "judge": plainly["judge"]}
    change |= {"judge": {"scores": [0], "reply": HOSTILE, "error": None}} if field == "judge" else {}
    change |= {"status": "failed"} if field == "error" else {}
    name = "a *b* | <i>c" if field == "name" else "y"
    path = eval_run(tmp_path / name, tmp_path / "data", [plainly | change])
    _, page = rendered(tmp_path / "wild", path)
    assert page.tags == calm.tags
    text = " ".join(cell[1] for row in page.rows for cell in row)
    if field == "name":
        assert name in text
    else:
        assert " ".join(HOSTILE.split())[:150] in text


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
    (tmp_path / "before" / "results.json").write_text('{"tasks": {"slake_closed": {"accuracy": 0.5}}}')
    refused("results.json: a task without its metric", runs["before"])
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
