"""`medmax generate`: its files, runs that are stopped and go on, what it refuses, previews, the terminal, ranks."""

import json
import os
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from medmax_fast.cli import main
from medmax_fast.generate.engine import Engine
from medmax_fast.generate.requests import PicturePiece, Result, TextPiece
from medmax_fast.generate.writer import Writer, count_rejected, picture_name, read_journal
from medmax_fast.model.picture_decoder import write_png
from medmax_fast.progress import Progress

JOURNAL = ".outputs.journal.jsonl"
INTERRUPTED = "medmax generate: interrupted; {} of 6 answers are kept in {}; to continue: {}"
# Pictures with one stream each.
NO_GUIDANCE = ("--guidance-text", "1", "--guidance-image", "1")


@pytest.fixture()
def calls(monkeypatch):
    """Per call of Engine.stream: ids of the prompts asked, and of those answered in the order of their answers."""
    made, stream = [], Engine.stream

    def listen(events, answered):
        for event in events:
            if isinstance(event, Result):
                answered.append(event.id)
            yield event

    def watched(self, requests, batch_size=16):
        made.append(([request.id for request in requests], []))
        return listen(stream(self, requests, batch_size), made[-1][1])

    monkeypatch.setattr(Engine, "stream", watched)
    return made


@pytest.fixture()
def drawing(golden, monkeypatch):
    """The engine draws a known picture, in two pieces; after each, the functions in the list are called."""
    codes = np.array(json.loads((golden / "image_codes.json").read_text())["ihc.png"]["codes"])
    watchers = []

    def draw(self, requests, batch_size=16):
        (request,) = requests
        for drawn in (512, 1024):
            yield PicturePiece(request.id, 0, codes[:drawn])
            # What is here runs when the command asks for the next event.
            for watch in watchers:
                watch()
        yield Result(request.id, (codes + 4).tolist(), [{"type": "image", "codes": codes}])

    monkeypatch.setattr(Engine, "stream", draw)
    return watchers


def text(request_id, words):
    return {"id": request_id, "content": [{"type": "text", "text": words}]}


def write_prompts(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def command(golden, folder, output="out", *more):
    """Prompts of folder/prompts.jsonl into folder/output."""
    files = ["--prompts", str(folder / "prompts.jsonl"), "--output", str(folder / output)]
    return ["generate", "--ckpt", str(golden / "checkpoint"), *files, *more]


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def summary_of(out):
    return json.loads(out.splitlines()[-1])


CASES = (
    "text_greedy",
    "text_greedy_batch",
    "image_greedy_cfg",
    "image_edit_greedy_cfg_batch",
    "any_greedy",
    "interleaved_greedy",
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_golden_generation_through_the_command(golden, cases, tmp_path, capsys, name, device):
    chosen = [(r, ids) for r, ids in cases if r.id.rpartition("-")[0] == name]
    write_prompts(tmp_path / "prompts.jsonl", [{"id": r.id, "token_ids": r.token_ids} for r, _ in chosen])
    words = command(golden, tmp_path, "out", "--greedy", "--device", device, "--precision", "fp32", "--cache-gb", "0.2")
    for option in ("mode", "max_new_tokens", "max_length", "guidance_text", "guidance_image"):
        words += ["--" + option.replace("_", "-"), str(getattr(chosen[0][0], option))]
    assert main(words) == 0
    summary = summary_of(capsys.readouterr().out)
    assert summary["prompts"] == len(chosen) and summary["rejected"] == 0
    for row, (request, expected) in zip(read(tmp_path / "out" / "outputs.jsonl"), chosen, strict=True):
        assert (row["id"], row["token_ids"]) == (request.id, expected)
        drawn = [piece["path"] for piece in row["content"] if piece["type"] == "image"]
        assert len(drawn) == sum(i == 8197 for i in expected) + (request.mode == "image")
        assert all((tmp_path / "out" / path).exists() for path in drawn)
    # The same command again is done at once; another setting is refused by name.
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--seed", "2"]) == 2
    assert "seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "no prompts"),
        ("{", "p.jsonl: line 1: not valid JSON"),
        ('{"id": "a"}', "either content or token_ids"),
        ('{"content": []}', "expected an object with id"),
        ('{"id": "a", "token_ids": 3}', "token_ids is int, expected a list"),
        ('{"id": "a", "token_ids": [0]}\n{"id": "a", "token_ids": [0]}', "p.jsonl: line 2: id 'a' occurs twice"),
        ('{"id": "a", "token_ids": [0]}\n\n{"id": "\xff"', "p.jsonl: line 3: not valid JSON ('utf-8' codec can't"),
        ('{"id": "\\ud83d", "token_ids": [0]}', "p.jsonl: line 1: not valid JSON ('utf-8' codec can't encode"),
        ("[" * 100_000, "p.jsonl: line 1: not valid JSON (maximum recursion depth"),
        ('{"id": "a", "token_ids": [' + "1" * 5000 + "]}", "p.jsonl: line 1: not valid JSON (Exceeds the limit"),
    ],
)
def test_bad_prompts_file(golden, tmp_path, capsys, lines, message):
    (tmp_path / "p.jsonl").write_bytes(lines.encode("latin-1"))
    words = ["generate", "--ckpt", str(golden / "checkpoint"), "--prompts", str(tmp_path / "p.jsonl")]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


BAD_FLAGS = {
    "nothing": ("", "give either --prompts FILE or --prompt TEXT"),
    "both": ("--prompts p.jsonl --output out --prompt Why?", "give either --prompts FILE or --prompt TEXT"),
    "no output": ("--prompts p.jsonl", "--prompts needs --output"),
    "no file": ("--prompts none.jsonl --output out", "none.jsonl: no such file"),
    "batch size": ("--prompt Why? --batch-size 0", "--batch-size 0: expected 1 or more"),
    "budget": ("--prompt Why? --max-new-tokens 0", "--max-new-tokens 0: expected 1 or more"),
    "cache": ("--prompt Why? --cache-gb -1", "--cache-gb -1.0: expected 0 or more"),
    "length": ("--prompts p.jsonl --output out --max-length 5000", "--max-length 5000: expected 1 to 4096"),
    "temperature": ("--prompts p.jsonl --output out --temperature -1", "--temperature -1.0: expected 0 or more"),
    "top-p": ("--prompts p.jsonl --output out --image-top-p 1.5", "--image-top-p 1.5: expected 0 to 1"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(golden, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "p.jsonl", [text("a", "Why?")])
    flags, message = BAD_FLAGS[name]
    assert main(["generate", "--ckpt", str(golden / "checkpoint"), *flags.split()]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("medmax generate: ") and message in error and error.count("\n") == 1
    assert not out and [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


# ---- runs that are stopped ----


# The command, which is killed in the middle of its third answer.
KILLED = """
import os, signal, sys
from medmax_fast.cli import main
from medmax_fast.generate.engine import Engine, Result

stream = Engine.stream

def killed(self, requests, batch_size):
    answers = 0
    for event in stream(self, requests, batch_size):
        yield event
        answers += isinstance(event, Result)
        if answers == 2 and not isinstance(event, Result):
            os.kill(os.getpid(), signal.SIGKILL)

Engine.stream = killed
main(sys.argv[1:])
"""


@pytest.fixture()
def interrupting(monkeypatch):
    """Ctrl-C while the engine is at work, after two more answers."""
    before, stream = signal.signal(signal.SIGINT, signal.default_int_handler), Engine.stream

    def interrupted(self, requests, batch_size=16):
        answers = 0
        for event in stream(self, requests, batch_size):
            yield event
            answers += isinstance(event, Result)
            if answers == 2:
                signal.raise_signal(signal.SIGINT)

    def run(words):
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "stream", interrupted)
            return main(words)

    yield run
    signal.signal(signal.SIGINT, before)


def test_a_stopped_run_goes_on(golden, tmp_path, interrupting, calls, capsys):
    """Killed, then interrupted, then left to end: byte for byte what one run gives that nothing disturbs."""
    questions = ("Is it?", "Is it large?", "Where is it?", "Short?", "Why?", "Explain figure 37 with a picture.")
    write_prompts(tmp_path / "prompts.jsonl", [text(f"q{i}", words) for i, words in enumerate(questions)])
    options = ["--mode", "any", "--greedy", "--max-new-tokens", "24", "--max-length", "1300", *NO_GUIDANCE]
    assert main(command(golden, tmp_path, "whole", *options)) == 0
    expected = files(tmp_path / "whole")
    assert expected.keys() == {"settings.json", "outputs.jsonl", "q5-0.png"}

    # One at a time, the picture last.
    folder, journal = tmp_path / "stopped", tmp_path / "stopped" / JOURNAL
    words = command(golden, tmp_path, "stopped", *options, "--batch-size", "1")
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=tmp_path, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["id"] for row in read(journal)] == ["q0", "q1"] and not (folder / "outputs.jsonl").exists()
    capsys.readouterr()
    assert interrupting(words) == 130
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == f"generate: 2 of 6 prompts are already answered in {folder}"
    assert errors[-1] == INTERRUPTED.format(4, folder, shlex.join(["medmax", *words]))
    assert not any("Traceback" in line for line in errors)
    assert [row["id"] for row in read(journal)] == ["q0", "q1", "q2", "q3"]

    # What a kill at a worse moment leaves: half a line, half a file, half a picture.
    with open(journal, "ab") as file:
        file.write(b'{"id": "q5", "token_ids": [9133, ')
    for name in (".q5-0.png.0123456789ab.tmp", "q5-0.preview.png"):
        (folder / name).write_bytes(b"half")
    calls.clear()
    assert main(words) == 0
    assert "generate: 4 of 6 prompts are already answered" in capsys.readouterr().err
    assert [asked for asked, _ in calls] == [["q4", "q5"]]
    assert files(folder) == expected


def stub_writer(folder, **engine):
    folder.mkdir(exist_ok=True)
    decode = {"decode_images": lambda codes: np.zeros((len(codes), 4, 4, 3), dtype=np.uint8)}
    return Writer(folder, SimpleNamespace(**(decode | engine)), preview=False)


def picture(request_id):
    return Result(request_id, [4] * 1024, [{"type": "image", "codes": np.zeros(1024, dtype=np.int64)}])


# Some of them end a line for str.splitlines, none does in JSON.
ODD = "a\u2028b\u2029c\x85d\x1ce\rf\ng"


def test_the_journal_is_cut_where_its_last_line_is_torn(tmp_path):
    writer = stub_writer(tmp_path)
    answers = [Result(i, [8711], [{"type": "text", "text": ODD}]) for i in ("a", "b" + ODD)]
    writer.write(answers, Progress("test", 3))
    whole = (tmp_path / JOURNAL).read_bytes()
    assert whole.count(b"\n") == 2
    more = json.dumps({"id": "c", "token_ids": [1], "content": [{"text": "\u00e9"}]}, ensure_ascii=False).encode()
    for cut in range(len(more)):
        (tmp_path / JOURNAL).write_bytes(whole + more[:cut])
        assert read_journal(tmp_path) == (False, {"a", "b" + ODD})
        assert (tmp_path / JOURNAL).read_bytes() == whole
    (tmp_path / JOURNAL).write_bytes(whole[:20])
    assert read_journal(tmp_path) == (False, set()) and (tmp_path / JOURNAL).read_bytes() == b""
    (tmp_path / JOURNAL).unlink()
    assert read_journal(tmp_path) == (False, set())

    # A run that was killed between its outputs and the end.
    writer.write([*answers, Result("c", error=ODD)], Progress("test", 3))
    writer.finish(["c", "b" + ODD, "a"])
    assert [row["id"] for row in read(tmp_path / "outputs.jsonl")] == ["b" + ODD, "a"]
    assert all(row["content"] == [{"type": "text", "text": ODD}] for row in read(tmp_path / "outputs.jsonl"))
    assert read(tmp_path / "rejected.jsonl") == [{"id": "c", "reason": ODD}] and count_rejected(tmp_path) == 1
    (tmp_path / JOURNAL).write_bytes(whole)
    assert read_journal(tmp_path) == (True, set())
    assert files(tmp_path).keys() == {"outputs.jsonl", "rejected.jsonl"}


def test_answers_are_journalled_at_once_and_pictures_together(tmp_path):
    decoded, seen = [], []

    def decode(codes):
        decoded.append(len(codes))
        return np.zeros((len(codes), 4, 4, 3), dtype=np.uint8)

    writer = stub_writer(tmp_path, decode_images=decode)

    def events():
        for i in range(9):
            yield picture(f"p{i}")
            yield TextPiece(f"t{i}", "a")
            yield Result(f"t{i}", [8711], [{"type": "text", "text": "a"}])
            seen.append({row["id"] for row in read(tmp_path / JOURNAL)})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write(events(), Progress("test", 20))
    texts, pictures = [f"t{i}" for i in range(9)], [f"p{i}" for i in range(9)]
    assert all(set(texts[: i + 1]) <= ids for i, ids in enumerate(seen))
    # Eight together, and the last one when it ends.
    assert decoded == [8, 1] and seen[6] == set(texts[:7]) and seen[7] == {*texts[:8], *pictures[:8]}
    assert read_journal(tmp_path) == (False, {*texts, *pictures})
    assert len(list(tmp_path.glob("*.png"))) == 9


def test_an_interrupt_while_pictures_are_decoded_keeps_them(tmp_path):
    tries = []

    def decode(codes):
        tries.append(len(codes))
        if len(tries) == 1:
            raise KeyboardInterrupt
        return np.zeros((len(codes), 4, 4, 3), dtype=np.uint8)

    writer = stub_writer(tmp_path, decode_images=decode)
    with pytest.raises(KeyboardInterrupt):
        writer.write((picture(f"p{i}") for i in range(9)), Progress("test", 9))
    assert tries == [8, 8] and read_journal(tmp_path) == (False, {f"p{i}" for i in range(8)})
    assert len(list(tmp_path.glob("*.png"))) == 8


# ---- what goes wrong ----


def test_rejected_prompts(golden, tmp_path, calls, capsys):
    rows = [
        text("a", "Is it?\u2028Or not?"),
        {"id": "missing", "content": [{"type": "image", "path": "no\u2028where.png"}]},
        {"id": "b", "content": [{"type": "image", "path": str(golden / "images" / "tiny.png")}]},
        text("empty", ""),
        {"id": "long", "token_ids": [0] * 1100},
        # Reaches the longest length at once.
        {"id": "c", "token_ids": [0] * 1099},
    ]
    write_prompts(tmp_path / "prompts.jsonl", rows)
    words = command(golden, tmp_path, "out", "--max-new-tokens", "8", "--max-length", "1100")
    assert main(words) == 3
    out, error = capsys.readouterr()
    assert summary_of(out) == {"prompts": 6, "rejected": 3, "output": str(tmp_path / "out" / "outputs.jsonl")}
    assert error.splitlines()[-1] == "medmax generate: 3 inputs rejected, 0 allowed"
    reasons = {
        "missing": f"{tmp_path}/no\u2028where.png: no such file",
        # bos and eot are no prompt.
        "empty": "an empty prompt",
        "long": "a prompt of 1100 ids leaves no room in max_length 1100",
    }
    assert read(tmp_path / "out" / "rejected.jsonl") == [{"id": i, "reason": r} for i, r in reasons.items()]
    answers = read(tmp_path / "out" / "outputs.jsonl")
    assert [row["id"] for row in answers] == ["a", "b", "c"] and len(answers[2]["token_ids"]) == 1
    # They were not answered in that order.
    assert [i for i in calls[0][1] if i not in reasons][0] == "c"

    before, times = files(tmp_path / "out"), [path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()]
    assert main(words) == 3
    assert summary_of(capsys.readouterr().out) == summary_of(out)
    # Nothing is left to do, for which no model is loaded.
    assert len(calls) == 1
    assert files(tmp_path / "out") == before
    assert [path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()] == times


def test_other_settings_are_refused_by_name(golden, tmp_path, capsys):
    write_prompts(tmp_path / "prompts.jsonl", [text("a", "Is it?")])
    words = command(golden, tmp_path, "out", "--max-new-tokens", "4")
    assert main(words) == 0
    before = files(tmp_path / "out")
    # What does not change the answers does not matter.
    assert main([*words, "--batch-size", "3", "--cache-gb", "0.01", "--preview", "--device", "cpu"]) == 0
    write_prompts(tmp_path / "same.jsonl", [text("a", "Is it?")])
    changes = {
        "seed": ["--seed", "1"],
        "quantize": ["--quantize", "int8"],
        "greedy": ["--greedy"],
        "max_new_tokens": ["--max-new-tokens", "5"],
        "prompts": ["--prompts", str(tmp_path / "same.jsonl")],
        "prompts_sha256": [],
    }
    for name, change in changes.items():
        if not change:
            write_prompts(tmp_path / "prompts.jsonl", [text("a", "Is it?"), text("b", "Why?")])
        capsys.readouterr()
        assert main([*words, *change]) == 2
        out, error = capsys.readouterr()
        # torchao says more when it is first imported.
        assert error.splitlines()[-1].startswith(f"medmax generate: {tmp_path / 'out'}: made with {name} = "), error
        assert not out
    assert files(tmp_path / "out") == before


# ---- pictures ----


def test_every_id_has_a_file_name_of_its_own(tmp_path):
    ids = ["a/b", "a_b", "a:b", "a\\b", "a b", "a\nb", "a\0b", "/a/b", "../a", "..", ".", "", "~", "a.b", "a-b", "a-0"]
    ids += ["x" * n for n in (99, 100, 101, 300)] + ["x" * 300 + "y", "/" * 300, "/" * 301, "../" * 100]
    # Characters of two, three and four bytes: what counts in a file name is bytes.
    ids += [c * n for c in ("\u00e9", "\u7269", "\U00020000") for n in (1, 25, 33, 34, 50, 51, 100, 300)]
    ids += ["a" + "\u7269" * 100, "\u2028", "\u202e", "b.preview"]
    names = [picture_name(i, n) for i in ids for n in (0, 1, 10)]
    assert len(set(ids)) == len(ids) and len(set(names)) == len(names)
    for name in names:
        write_png(tmp_path / name, np.zeros((1, 1, 3), dtype=np.uint8))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert picture_name("MedMax-7.b_c", 2) == "MedMax-7.b_c-2.png"


@pytest.mark.parametrize("preview", [True, False])
def test_a_picture_is_shown_while_it_is_drawn(golden, tmp_path, drawing, preview):
    name, seen = "a_b-c14cddc0-0", []
    place = tmp_path / "out" / f"{name}.preview.png"
    drawing.append(lambda: seen.append(np.array(Image.open(place)) if place.exists() else None))
    write_prompts(tmp_path / "prompts.jsonl", [text("a/b", "Draw it.")])
    more = ["--mode", "image", *(["--preview"] if preview else [])]
    assert main(command(golden, tmp_path, "out", *more)) == 0
    half, late = seen
    assert late is None and (half is None) == (not preview)
    if preview:
        assert half.shape == (512, 512, 3) and (half[256:] == 255).all()
        assert (half[:256].min((1, 2)) < 255).all()
    assert files(tmp_path / "out").keys() == {"settings.json", "outputs.jsonl", f"{name}.png"}
    (row,) = read(tmp_path / "out" / "outputs.jsonl")
    assert row["content"] == [{"type": "image", "path": f"{name}.png"}]
    assert np.array(Image.open(tmp_path / "out" / f"{name}.png")).shape == (512, 512, 3)


# ---- one prompt on the terminal ----


def terminal(golden, *words):
    return main(["generate", "--ckpt", str(golden / "checkpoint"), *words])


def test_one_prompt_is_answered_as_it_is_made(golden, cases, capsys):
    """With golden prompts, which content gives the ids of: a question, and an image with a question."""
    expected = {request.id: ids for request, ids in cases}
    question = ["--prompt", "Is this cancer? Answer yes or no.", "--max-new-tokens", "32", "--greedy"]
    image = ["--prompt", "What organ is shown?", "--image", str(golden / "images" / "retina.jpg")]
    image += ["--max-new-tokens", "48", "--greedy"]
    for words, name in ((question, "text_greedy_batch-2"), (image, "text_greedy-0")):
        assert terminal(golden, *words) == 0
        out, _ = capsys.readouterr()
        answer, _, last = out.removesuffix("\n").rpartition("\n")
        result = json.loads(last)
        assert result == {"answer": answer, "pictures": [], "token_ids": expected[name]}
        assert len(answer) > 30


def test_one_picture_on_the_terminal(golden, tmp_path, drawing, capsys):
    out, shown = tmp_path / "out", []
    drawing.append(lambda: shown.append(sorted(path.name for path in out.iterdir())))
    assert terminal(golden, "--prompt", "Draw it.", "--mode", "image", "--preview", "--output", str(out)) == 0
    assert shown == [["prompt-0.preview.png"], ["prompt-0.png"]]
    printed = capsys.readouterr().out
    assert printed.count("[picture: ") == 2 and f"[picture: {out / 'prompt-0.png'}]\n" in printed
    result = summary_of(printed)
    assert result["pictures"] == ["prompt-0.png"] and result["answer"] == "[picture: prompt-0.png]"
    assert len(result["token_ids"]) == 1024
    assert [path.name for path in out.iterdir()] == ["prompt-0.png"]
    assert np.array(Image.open(out / "prompt-0.png")).shape == (512, 512, 3)


def test_one_prompt_with_a_broken_image(golden, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_text("<html>not found</html>")
    for name in ("broken.jpg", "none.png"):
        assert terminal(golden, "--prompt", "Why?", "--image", str(tmp_path / name)) == 2
        out, error = capsys.readouterr()
        assert error.startswith(f"medmax generate: {tmp_path / name}: ") and error.count("\n") == 1
        assert not out.strip()


# ---- ranks that share a model ----


def torchrun(folder, world, words):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [*launcher, "-m", "medmax_fast", *words, "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(started, cwd=folder, env=environment, **pipes)


def test_ranks_share_a_model_or_say_why_not(golden, cases, tmp_path):
    """Two answer as one does; three have four heads to share."""
    chosen = [(r, ids) for r, ids in cases if r.id.startswith("text_greedy_batch")]
    write_prompts(tmp_path / "prompts.jsonl", [{"id": r.id, "token_ids": r.token_ids} for r, _ in chosen])
    options = ["--greedy", "--max-new-tokens", "32"]
    runs = [torchrun(tmp_path, world, command(golden, tmp_path, str(world), *options)) for world in (2, 3)]
    try:
        (out, errors), (none, refusal) = [run.communicate(timeout=300) for run in runs]
    finally:
        for run in runs:
            run.terminate()

    assert runs[0].returncode == 0, errors
    answers = [(row["id"], row["token_ids"]) for row in read(tmp_path / "2" / "outputs.jsonl")]
    assert answers == [(request.id, ids) for request, ids in chosen]
    assert files(tmp_path / "2").keys() == {"settings.json", "outputs.jsonl"}
    summaries = [line for line in out.splitlines() if line.startswith("{")]
    assert summaries == [out.splitlines()[-1]] and json.loads(summaries[0])["prompts"] == 3
    # Once in the table, and once in the JSON.
    assert out.count("outputs.jsonl") == 2

    # The launcher's own status is another one.
    assert runs[1].returncode == 1 and not none
    assert "medmax generate: 3 ranks cannot share the model's 4 heads evenly\n" in refusal
    assert "exitcode  : 2 " in refusal and "[rank" not in refusal
    assert not (tmp_path / "3").exists()
