"""The evaluation folder: what is read, and everything wrong with it that is named before a model is loaded."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eval_folder import NAMES, ROWS, make_folder
from hypothesis import given
from hypothesis import strategies as st

from medmax_fast.eval.questions import load_questions, read_chat_answer
from medmax_fast.eval.tasks import TASKS, find_task
from medmax_fast.files import hash_file
from medmax_fast.runtime import InputError


def changed(index: int, **changes) -> list[tuple]:
    rows = [list(row) for row in ROWS]
    for name, value in changes.items():
        rows[index][NAMES.index(name)] = value
    return [tuple(row) for row in rows]


def test_the_table_has_the_published_tasks():
    by_kind = {}
    for task in TASKS:
        by_kind.setdefault(task.kind, set()).add(f"{task.name}_{task.question_type}")
    assert by_kind["yes_no"] == {f"{n}_closed" for n in ("vqa_rad", "slake", "pathvqa", "quilt_vqa", "probmed")}
    assert by_kind["letter"] == {"pmc_vqa_mcq", "omnimed_vqa_mcq", "path_mmu_mcq"}
    assert by_kind["open"] == {f"{n}_open" for n in ("vqa_rad", "slake", "pathvqa", "quilt_vqa")}
    assert sum(len(by_kind[kind]) for kind in ("yes_no", "letter", "open")) == 12
    assert len(TASKS) == 12 + 6 + 1 + 2
    assert [task.new_tokens for task in TASKS if task.kind in ("yes_no", "letter", "open")] == [1] * 8 + [60] * 4
    assert find_task("mm_out", "whatever").new_tokens == 1024
    assert {task.first for task in TASKS if task.kind == "drawing"} == {100}
    assert find_task("pmc_vqa", "closed") is None and find_task("vqarad", "closed") is None


def test_parquet_and_jsonl_are_the_same(tmp_path):
    folders = [make_folder(tmp_path / form, form=form) for form in ("parquet", "jsonl")]
    first, second = [load_questions(folder) for folder in folders]
    assert [q.id for q in first.questions] == [q.id for q in second.questions] and len(first.questions) == len(ROWS)
    assert first.questions[0].id == "vqa_rad_closed-00000" and first.questions[6].id == "mm_out_anything-00006"
    assert first.questions[6].path is None and first.questions[5].path.name == "b.png"
    assert first.cluster(first.questions[0]) == first.cluster(first.questions[3]) == hash_file(first.questions[0].path)
    assert first.cluster(first.questions[6]) == "mm_out_anything-00006"
    assert [q.source for q in first.questions] == ["vqa_rad", "vqa_rad", "pmc_vqa", "vqa_rad", "quilt", "report"] + [
        "anything",
        "visual_chat",
        "visual_chat",
    ]
    chat = first.questions[7]
    assert (chat.reference, chat.context, chat.domains) == ("A rib.", "A scan.\nSee it.", ("ct",))


def test_a_source_column_is_taken(tmp_path):
    data = make_folder(tmp_path / "data", [(*ROWS[0], "hospital"), (*ROWS[1], None)], names=(*NAMES, "source"))
    assert [q.source for q in load_questions(data).questions] == ["hospital", "vqa_rad"]


def test_selection(tmp_path):
    data = make_folder(tmp_path / "data", [ROWS[0]] * 5 + [ROWS[5]] * 130)
    found = load_questions(data).questions
    assert sum(q.task.kind == "drawing" for q in found) == 100 and sum(q.task.kind == "yes_no" for q in found) == 5
    assert len(load_questions(data, limit=3).questions) == 6
    assert {q.task_id for q in load_questions(data, "vqa_rad_closed").questions} == {"vqa_rad_closed"}
    lacking = {"drawing": "nothing draws"}
    kept = load_questions(data, lacking=lacking)
    assert len(kept.questions) == 5
    assert kept.skipped == {"image_generation_report": {"n": 130, "reason": "nothing draws"}}
    with pytest.raises(InputError, match="--tasks image_generation_report: nothing draws"):
        load_questions(data, "image_generation_report", lacking=lacking)
    with pytest.raises(InputError, match="--tasks slake_closed: no such rows in .*; found image_gen"):
        load_questions(data, "slake_closed")
    only = make_folder(tmp_path / "only", [ROWS[5]])
    with pytest.raises(InputError, match="no question that this run can ask; image_generation_report: nothing draws"):
        load_questions(only, lacking=lacking)


@pytest.mark.parametrize(
    "rows, message",
    [
        (changed(1, answer="maybe"), r"row 1 \(vqa_rad_closed\): answer 'maybe', expected yes or no"),
        (changed(2, answer="E"), r"row 2 \(pmc_vqa_mcq\): answer 'E', expected A, B, C or D"),
        (
            changed(0, task_name="vqarad"),
            "row 0: unknown task 'vqarad' with question type 'closed', expected one of vqa_rad .closed, open., slake",
        ),
        (changed(2, question_type="closed"), "row 2: unknown task 'pmc_vqa' with question type 'closed'"),
        (changed(1, image_path="images/gone.png"), r"row 1 \(vqa_rad_closed\): no image images/gone.png"),
        (changed(5, image_path="images/gone.png"), "row 5 .*: no image images/gone.png"),
        (changed(1, image_path=None), "row 1 .*: no image_path"),
        (changed(4, image_path=""), "row 4 .*: no image_path"),
        (changed(1, prompt="  "), "row 1 .*: empty prompt"),
        (changed(5, prompt=""), "row 5 .*: empty prompt"),
        (changed(3, answer=" "), "row 3 .*: empty answer, expected the one to compare with"),
        (changed(6, answer=""), "row 6 .*: empty answer"),
        (changed(7, answer="a rib"), r"row 7 \(visual_chat_conversation\): answer: neither a Python dict nor JSON"),
        (changed(7, answer="['a']"), "row 7 .*: answer: a list, expected a dict with gpt4_answer"),
        (changed(8, answer="{'fig_caption': 'x'}"), "row 8 .*: answer: no gpt4_answer in it"),
        (changed(7, answer="__import__('os').system('true')"), "row 7 .*: answer: neither a Python dict nor JSON"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    data = make_folder(tmp_path / "data", rows)
    with pytest.raises(InputError, match=message) as caught:
        load_questions(data)
    assert str(data / "test.parquet") in str(caught.value) and "\n" not in str(caught.value)


def test_values_of_another_type_are_named(tmp_path):
    data = make_folder(tmp_path / "data", [("vqa_rad", "closed", "Is it?", True, "images/a.png")], "jsonl")
    with pytest.raises(InputError, match="line 1: answer is bool True, expected str"):
        load_questions(data)


def test_half_a_character_is_named(tmp_path):
    """JSON can spell it; the files of a run could not hold it, which would show after everything is answered."""
    data = make_folder(tmp_path / "data", [("vqa_rad", "closed", "Is \ud83d it?", "yes", "images/a.png")], "jsonl")
    with pytest.raises(InputError, match="line 1: prompt holds a lone surrogate, expected Unicode text"):
        load_questions(data)


def test_many_problems_are_counted(tmp_path):
    rows = [("vqa_rad", "closed", f"Question {i}?", "perhaps", "images/a.png") for i in range(12)]
    with pytest.raises(InputError, match="row 4 .*; and 7 more$"):
        load_questions(make_folder(tmp_path / "data", rows))


def test_bad_folders(tmp_path):
    data = make_folder(tmp_path / "data")

    def refused(message, folder=data):
        with pytest.raises(InputError, match=message):
            load_questions(folder)

    refused("no such folder", tmp_path / "none")
    refused("test.parquet: a file, expected the folder that holds it", data / "test.parquet")
    refused("expected one Parquet or JSONL file of questions, found none", data / "images")
    whole = (data / "test.parquet").read_bytes()
    (data / "test.parquet").write_bytes(whole[:-40])
    refused("test.parquet: not a Parquet file, or a damaged one")
    pq.write_table(pa.table({"task_name": ["vqa_rad"], "prompt": ["?"]}), data / "test.parquet")
    refused("no column 'question_type'")
    (data / "more.jsonl").write_text("{}\n")
    refused("found more.jsonl, test.parquet")
    (data / "test.parquet").unlink()
    (data / "more.jsonl").write_text('{"task_name": \n')
    refused("more.jsonl: line 1: not valid JSON")


def test_chat_answers_of_every_form():
    flat = {"gpt4_answer": "x", "fig_label": "F1", "fig_caption": "c", "mri": True, "histology": False}
    assert read_chat_answer(repr(flat)) == ("x", "F1\nc", ["mri"])
    assert read_chat_answer(json.dumps(flat)) == ("x", "F1\nc", ["mri"])
    mentions = {**flat, "in_text_mention": [{"tokens": "one"}, "two", None, {"deep": ["three"]}]}
    assert read_chat_answer(repr(mentions))[1] == "F1\nc\none two three"
    with pytest.raises(ValueError, match="neither"):
        read_chat_answer("[" * 100_000)


@given(st.text(max_size=60))
def test_a_chat_answer_is_read_or_refused(text):
    try:
        reference, _, _ = read_chat_answer(text)
    except ValueError as error:
        assert str(error)
    else:
        assert reference.strip()
