"""What `make demo` and the examples rest on, without the training: pictures, questions, rows, commands' inputs."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scripts import load

from medmax_fast.data.images import load_image
from medmax_fast.eval.questions import load_questions

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def demo():
    before = list(sys.path)
    yield load(ROOT / "examples" / "demo" / "run.py")
    sys.path[:] = before


@pytest.fixture(scope="module")
def inputs(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo.write_inputs(folder)
    return folder


def test_pictures_are_real_and_reproducible(demo, inputs, tmp_path):
    pictures = sorted((inputs / "evaluation" / "images").iterdir())
    assert len(pictures) == len(demo.NAMES) >= 20
    for picture in pictures:
        # A black or flat picture would mean that a scan was not read.
        assert load_image(picture).std() > 2, picture.name
    demo.write_inputs(tmp_path)
    for name in ("train.jsonl", "images.csv", "prompts.jsonl"):
        assert (tmp_path / name).read_bytes() == (inputs / name).read_bytes()


def test_questions_are_balanced(demo):
    questions = demo.questions()
    closed = Counter(answer for _, kind, _, _, answer in questions if kind == "closed")
    letters = Counter(answer for _, kind, _, _, answer in questions if kind == "mcq")
    assert closed["yes"] == closed["no"] and set(closed) == {"yes", "no"}
    assert len(set(letters.values())) == 1 and set(letters) == set("ABCD")
    # No question can be answered without looking: each has as many right answers as it has kinds of them.
    by_question = {}
    for _, _, question, _, answer in questions:
        by_question.setdefault(question, Counter())[answer] += 1
    assert all(len(set(answers.values())) == 1 and len(answers) > 1 for answers in by_question.values())
    assert len({(question, picture) for _, _, question, picture, _ in questions}) == len(questions)


def test_inputs_are_valid_for_the_commands(demo, inputs):
    rows = [json.loads(line) for line in (inputs / "train.jsonl").read_text().splitlines()]
    assert all(row["text"].count("<image>") == 1 and row["text"].count(demo.EOT) == 1 for row in rows)
    assert all((inputs / row["image_path"]).exists() for row in rows)
    data = load_questions(str(inputs / "evaluation"), "", 0)
    assert len(data.questions) == len(demo.questions()) and not data.skipped
    assert pq.read_table(inputs / "evaluation" / "questions.parquet").num_rows == len(demo.questions())


def test_tokenize_folder_example(golden, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(golden / "images" / "tiny.png", folder / "tiny.png")
    (folder / "broken.jpg").write_text("<html></html>")
    module = load(ROOT / "examples" / "tokenize_folder.py")
    assert module.tokenize_folder(str(folder), str(golden / "checkpoint"), str(tmp_path / "out")) == 1
    assert "broken.jpg" in capsys.readouterr().out
    expected = json.loads((golden / "image_codes.json").read_text())["tiny.png"]["codes"]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "tiny.npy"), expected)
