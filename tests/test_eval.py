"""The evaluation folder's checks, the run with a scripted engine (restart, failures), and the real engine."""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medmax_fast.config import EvalConfig
from medmax_fast.eval.run import evaluate
from medmax_fast.eval.tasks import TASKS, find_task, load_questions
from medmax_fast.runtime import InputError

# task_name, question_type, prompt, gold, image, what the scripted engine answers
ROWS = [
    ("vqa_rad", "closed", "Is there a mass?", "yes", "images/a.png", " Yes"),
    ("vqa_rad", "closed", "Is it enlarged?", "no", "images/b.png", " normal"),
    ("vqa_rad", "closed", "Is it normal?", "no", "images/a.png", " yes"),
    ("pmc_vqa", "mcq", "Which? A: x B: y C: z D: w", "B", "images/b.png", " B"),
    ("pmc_vqa", "mcq", "What? A: x B: y C: z D: w", "C", "images/a.png", "c"),
    ("vqa_rad", "open", "What is shown?", "a lung", "images/a.png", None),
    ("mm_out", "anything", "Draw it", "free text", "", None),
]


def make_folder(folder: Path, rows=ROWS, form="parquet") -> Path:
    (folder / "images").mkdir(parents=True)
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 30), color).save(folder / "images" / f"{name}.png")
    names = ("task_name", "question_type", "prompt", "answer", "image_path")
    table = [dict(zip(names, row, strict=False)) for row in rows]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(table), folder / "test.parquet")
    else:
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return folder


@dataclass
class Answer:
    id: str
    content: list
    token_ids: list
    error: str | None = None


@dataclass
class ScriptedEngine:
    """Answers by the prompt's text; fails on images named in `broken`; is interrupted before call `stop_at`."""

    broken: tuple = ()
    stop_at: int | None = None
    requests: list = field(default_factory=list)
    calls: int = 0

    def generate(self, requests, batch_size):
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        assert 0 < len(requests) <= batch_size
        self.calls += 1
        self.requests += requests
        outputs = {row[2]: row[5] for row in ROWS}
        answers = []
        for request in requests:
            image, text = request.content
            if Path(image["path"]).name in self.broken:
                answers.append(Answer(request.id, [], [], f"{image['path']}: truncated"))
            else:
                answers.append(Answer(request.id, [{"type": "text", "text": outputs[text["text"]]}], [9000]))
        # Order must not matter.
        return answers[::-1]


@pytest.fixture()
def config(tmp_path) -> EvalConfig:
    return EvalConfig(data=str(make_folder(tmp_path / "data")), output=str(tmp_path / "run"), batch_size=2)


def samples_of(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.output) / "samples.jsonl").read_text().splitlines()]


def test_the_table_has_the_published_tasks():
    scored = {f"{task.name}_{task.question_type}" for task in TASKS if not task.lacks}
    closed = {f"{name}_closed" for name in ("vqa_rad", "slake", "pathvqa", "quilt_vqa", "probmed")}
    assert scored == closed | {"pmc_vqa_mcq", "omnimed_vqa_mcq", "path_mmu_mcq"}
    assert len(TASKS) == 8 + 4 + 6 + 1 + 2
    assert all(task.new_tokens == 1 for task in TASKS if not task.lacks)
    assert find_task("mm_out", "whatever").score == "judge"
    assert find_task("pmc_vqa", "closed") is None and find_task("vqarad", "closed") is None


def test_results_by_hand(config):
    engine = ScriptedEngine()
    result = evaluate(config, engine)
    saved = json.loads((Path(config.output) / "results.json").read_text())
    assert {key: result[key] for key in saved} == saved
    rad, pmc = saved["tasks"]["vqa_rad_closed"], saved["tasks"]["pmc_vqa_mcq"]
    assert rad["accuracy"] == pytest.approx(2 / 3) and rad["by_protocol"]["strict"] == pytest.approx(1 / 3)
    assert rad["stderr"] == pytest.approx(1 / 3) and rad["n"] == 3 and rad["unparsed"] == 1
    assert pmc["accuracy"] == 1.0 and pmc["stderr"] == 0.0 and pmc["by_protocol"]["strict"] == 0.5
    assert saved["average"] == pytest.approx((2 / 3 + 1) / 2) and saved["average_tasks"] == 2
    assert saved["average_by_protocol"]["strict"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert saved["protocol"] == "medmax-v1" and saved["unit"] == "fraction"
    # What cannot be scored is said, with its number.
    assert {task: row["n"] for task, row in saved["skipped"].items()} == {"vqa_rad_open": 1, "mm_out_anything": 1}
    assert all("needs an LLM judge" in row["reason"] for row in saved["skipped"].values())
    assert all(len(saved["hashes"][name]) == 64 for name in ("data", "prompts", "images"))


def test_requests_have_the_published_form(config):
    engine = ScriptedEngine()
    evaluate(config, engine)
    assert len(engine.requests) == 5 and engine.calls == 3
    for request in engine.requests:
        assert [piece["type"] for piece in request.content] == ["image", "text"] and request.token_ids is None
        assert request.greedy and request.repetition_penalty == 1.2 and request.max_new_tokens == 1
        assert request.mode == "text" and request.eot


def test_every_sample_is_logged(config):
    evaluate(config, ScriptedEngine())
    samples = samples_of(config)
    assert [sample["id"] for sample in samples][:2] == ["vqa_rad_closed-00000", "vqa_rad_closed-00001"]
    assert samples[1] == {
        "id": "vqa_rad_closed-00001",
        "task": "vqa_rad_closed",
        "question": "Is it enlarged?",
        "answer": "no",
        "output": " normal",
        "correct": {"medmax-v1": True, "strict": False},
        "parsed": None,
        "error": None,
        "image": "images/b.png",
        "token_ids": [9000],
    }


def test_a_failed_question_is_wrong_and_counted(config):
    result = evaluate(config, ScriptedEngine(broken=("b.png",)))
    rad = result["tasks"]["vqa_rad_closed"]
    assert (rad["n"], rad["failed"], rad["unparsed"], rad["correct"]) == (3, 1, 0, 1)
    assert result["failed"] == 2
    assert "truncated" in samples_of(config)[1]["error"]


def test_strict_protocol_and_selection(config):
    result = evaluate(replace(config, protocol="strict", tasks="pmc_vqa_mcq", limit=1), ScriptedEngine())
    assert list(result["tasks"]) == ["pmc_vqa_mcq"] and result["n"] == 1 and result["average"] == 1.0
    limited = evaluate(replace(config, limit=2, output=config.output + "2"), ScriptedEngine())
    assert {task: row["n"] for task, row in limited["tasks"].items()} == {"vqa_rad_closed": 2, "pmc_vqa_mcq": 2}


def test_restart_gives_the_same_files(config, tmp_path):
    whole = replace(config, output=str(tmp_path / "whole"))
    evaluate(whole, ScriptedEngine())
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, ScriptedEngine(stop_at=1))
    assert len(samples_of(config)) == 2
    # A kill in the middle of a line leaves half of it.
    path = Path(config.output) / "samples.jsonl"
    with open(path, "a") as file:
        file.write('{"id": "vqa_rad_clo')
    engine = ScriptedEngine()
    evaluate(config, engine)
    assert len(engine.requests) == 3
    assert path.read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    results = [json.loads((Path(c.output) / "results.json").read_text()) for c in (config, whole)]
    assert results[0] == results[1]
    # A third run asks nothing, so it needs no engine that works.
    evaluate(config, ScriptedEngine(stop_at=0))


def test_other_settings_or_data_are_refused(config):
    evaluate(config, ScriptedEngine())
    with pytest.raises(InputError, match="limit = 0, now 3"):
        evaluate(replace(config, limit=3), ScriptedEngine())
    Image.new("RGB", (40, 30), "green").save(Path(config.data) / "images" / "a.png")
    with pytest.raises(InputError, match="made with sha256_images"):
        evaluate(config, ScriptedEngine())


def test_a_damaged_log_is_named(config):
    evaluate(config, ScriptedEngine())
    path = Path(config.output) / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{broken}\n" + "".join(lines[2:]))
    with pytest.raises(InputError, match=r"samples.jsonl: line 2: not valid JSON"):
        evaluate(config, ScriptedEngine())
    path.write_text(lines[0] + lines[0])
    with pytest.raises(InputError, match="line 2: id 'vqa_rad_closed-00000' is unknown or given twice"):
        evaluate(config, ScriptedEngine())


def test_parquet_and_jsonl_are_the_same(config, tmp_path):
    other = make_folder(tmp_path / "jsonl", form="jsonl")
    found = [load_questions(folder) for folder in (config.data, other)]
    assert [q.id for q in found[0].questions] == [q.id for q in found[1].questions] and len(found[0].questions) == 5
    assert found[0].skipped == found[1].skipped


def bad(index: int, **changes) -> list[tuple]:
    names = ("task_name", "question_type", "prompt", "answer", "image_path")
    rows = [list(row[:5]) for row in ROWS]
    for name, value in changes.items():
        rows[index][names.index(name)] = value
    return [tuple(row) for row in rows]


@pytest.mark.parametrize(
    "rows, message",
    [
        (bad(1, answer="maybe"), r"row 1 \(vqa_rad_closed\): answer 'maybe', expected yes or no"),
        (bad(3, answer="E"), r"row 3 \(pmc_vqa_mcq\): answer 'E', expected A, B, C or D"),
        (bad(0, task_name="vqarad"), "row 0: unknown task 'vqarad' with question type 'closed'"),
        (bad(4, question_type="closed"), "row 4: unknown task 'pmc_vqa' with question type 'closed'"),
        (bad(2, image_path="images/gone.png"), r"row 2 \(vqa_rad_closed\): no image images/gone.png"),
        (bad(2, image_path=None), "row 2 .*: no image_path"),
        (bad(2, prompt="  "), "row 2 .*: empty prompt"),
        (ROWS[5:], "no closed or mcq question that this version can score; its rows are of mm_out_anything"),
    ],
)
def test_bad_rows_are_named_before_a_model_is_loaded(tmp_path, rows, message):
    data = make_folder(tmp_path / "data", rows)
    output = tmp_path / "run"
    # The checkpoint exists but is none: reaching for it would be another error.
    config = EvalConfig(data=str(data), output=str(output), ckpt=str(tmp_path))
    with pytest.raises(InputError, match=message) as caught:
        evaluate(config)
    assert str(data / "test.parquet") in str(caught.value) and "\n" not in str(caught.value)
    assert not output.exists()


def test_many_problems_are_counted(tmp_path):
    rows = [("vqa_rad", "closed", f"Question {i}?", "perhaps", "images/a.png") for i in range(12)]
    with pytest.raises(InputError, match="row 4 .*; and 7 more$"):
        load_questions(make_folder(tmp_path / "data", rows))


def test_gold_answers_in_another_case_are_noted(tmp_path):
    data = make_folder(tmp_path / "data", bad(0, answer="Yes"))
    result = evaluate(EvalConfig(data=str(data), output=str(tmp_path / "run")), ScriptedEngine())
    assert result["tasks"]["vqa_rad_closed"]["by_protocol"] == pytest.approx({"medmax-v1": 1 / 3, "strict": 1 / 3})
    assert result["notes"] == [
        "1 gold answers are not written as yes, no or A to D exactly; medmax-v1 never counts such a row right"
    ]


def test_bad_folders_and_flags(config, tmp_path):
    data = Path(config.data)

    def refused(message, **changes):
        with pytest.raises(InputError, match=message):
            evaluate(replace(config, **changes), ScriptedEngine())

    refused("--tasks slake_closed: no such rows", tasks="slake_closed")
    refused("--tasks vqa_rad_open: needs an LLM judge", tasks="vqa_rad_open")
    refused("--protocol loose", protocol="loose")
    refused("--batch-size 0", batch_size=0)
    refused("no such folder", data=str(tmp_path / "none"))
    refused("expected one Parquet or JSONL file of questions, found none", data=str(data / "images"))
    refused("--ckpt .*: no such folder", ckpt=str(tmp_path / "none"))
    with pytest.raises(InputError, match="--ckpt: missing"):
        evaluate(config)
    whole = (data / "test.parquet").read_bytes()
    (data / "test.parquet").write_bytes(whole[:-40])
    refused("test.parquet: not a Parquet file, or a damaged one")
    pq.write_table(pa.table({"task_name": ["vqa_rad"], "prompt": ["?"]}), data / "test.parquet")
    refused("no column 'question_type'")
    (data / "more.jsonl").write_text("{}\n")
    refused("found more.jsonl, test.parquet")
    os.remove(data / "test.parquet")
    (data / "more.jsonl").write_text('{"task_name": \n')
    refused("more.jsonl: line 1: not valid JSON")
    assert not Path(config.output).exists()


def test_only_one_process(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        evaluate(config, ScriptedEngine())


def test_with_the_real_engine(golden, tmp_path):
    """A random model on real images: every question gets one text id, the same batched and one at a time."""
    from medmax_fast.generate.engine import Engine

    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "good.jpg").write_bytes((golden / "images" / "subsampled.jpg").read_bytes())
    # It exists, so it passes the check, but cannot be decoded.
    (folder / "truncated.jpg").write_bytes((golden / "images" / "gray.jpg").read_bytes()[:2000])
    tasks = (("slake", "closed", "yes"), ("path_mmu", "mcq", "A"))
    rows = [(*task[:2], f"Question {i}?", task[2], "good.jpg") for i, task in enumerate(tasks)]
    rows.append(("slake", "closed", "And this?", "no", "truncated.jpg"))
    names = ("task_name", "question_type", "prompt", "answer", "image_path")
    (folder / "test.jsonl").write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    config = EvalConfig(
        data=str(folder), output=str(tmp_path / "together"), ckpt=str(golden / "checkpoint"), device="cpu"
    )
    result = evaluate(config)
    assert result["n"] == 3 and result["failed"] == 1 and len(result["hashes"]["checkpoint"]) == 64
    together = samples_of(config)
    assert [len(sample["token_ids"]) for sample in together] == [1, 1, 0]
    assert [sample["error"] is None for sample in together] == [True, True, False]
    assert "truncated.jpg" in together[2]["error"]
    single = replace(config, output=str(tmp_path / "single"), batch_size=1)
    evaluate(single, Engine.from_checkpoint(config.ckpt, device="cpu"))
    assert samples_of(single) == together
