"""Error messages: the page that shows them all, bad usage of every command, wrong paths and full disks."""

import errno
import resource
import shlex

import error_page
import pytest
from error_recorder import scrubbed
from error_sites import messages

from medmax_fast.cli import main
from medmax_fast.files import atomic_path, input_error
from medmax_fast.runtime import InputError

# ---- docs/errors.md ----


def test_the_page_shows_every_message():
    page = error_page.PAGE.read_text()
    assert page.isascii() and "/tmp/" not in page
    examples = error_page.examples_of(page)
    # SystemExit names the messages that the page lacks.
    assert error_page.render(examples) == page, "run the tests of the messages that are new, then `make errors`"
    gone = {test for _, test in examples.values()} - error_page.tests()
    assert not gone, "tests that the page names are gone: `make errors` takes others"


def test_messages_are_read_from_the_sources():
    found = {(message.file, message.template) for message in messages()}
    assert len(found) > 350
    # A plain one, a condition, a local variable that holds words, and what a function of the module returns.
    assert found >= {
        ("files.py", "{path}: no such file"),
        ("files.py", "{path}: a folder, expected a file"),
        ("data/archive.py", "{name}: not a tar archive, or damaged ({error})"),
        ("data/images.py", "{path}: empty file"),
    }
    message = next(m for m in messages() if m.template == "--limit {limit}: expected seconds, or 0 for none")
    assert message.fits("--limit -1: expected seconds, or 0 for none") and not message.fits("--limit -1: expected")


def test_what_differs_from_run_to_run_is_not_shown(tmp_path):
    assert scrubbed(f"{tmp_path}/a/b.csv: no such file") == "a/b.csv: no such file"
    assert scrubbed(f"{tmp_path}: no rows") == "folder: no rows"
    assert scrubbed("http://127.0.0.1:40123/v1: no") == "http://127.0.0.1:8000/v1: no"
    assert scrubbed("sha256 " + "0123456789abcdef" * 4) == "sha256 01234567..."
    assert scrubbed("a\0b \xe9: no such file") == "a\\x00b \\xe9: no such file"


# ---- usage ----

USAGE = [
    ("", "medmax: the following arguments are required: COMMAND; see medmax --help"),
    ("paint", "medmax: argument COMMAND: invalid choice: 'paint' (choose from"),
    ("score --ckpt ckpt", "score: the following arguments are required: --input, --output; see medmax score --help"),
    ("report --output a", "report: the following arguments are required: RUNS"),
    ("report", "required: RUNS, --output"),
    ("init a b", "unrecognized arguments: b; see"),
    ("train --data", "argument --data: expected one argument"),
    ("train --sed 3", "required: --data, --ckpt, --output"),
    ("tokenize --fast --exact", "argument --exact: not allowed with argument --fast"),
    ("init --seed two a", "argument --seed: 'two', expected a whole number"),
    ("init --seed 1.5 a", "argument --seed: '1.5', expected a whole number"),
    ("init --seed 9223372036854775808 a", "argument --seed: '9223372036854775808', expected a whole number"),
    ("train --lr nan", "argument --lr: 'nan', expected a finite number"),
    ("train --lr 1e400", "argument --lr: '1e400', expected a finite number"),
    ("train --lr high", "argument --lr: 'high', expected a finite number"),
    ("init --size huge a", "argument --size: invalid choice: 'huge' (choose from"),
    ("init ''", "argument DIR: '', expected a path"),
    ("score --ckpt ' '", "argument --ckpt: ' ', expected a path"),
    ("train @none.args", "[Errno 2] No such file or directory: 'none.args'"),
]


@pytest.mark.parametrize(("line", "message"), USAGE, ids=[line for line, _ in USAGE])
def test_bad_usage(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert message in error and error.count("\n") == 1


# ---- files and folders ----


def out_of_room(file) -> None:
    """Write as to a disk with 4 KB left: the system refuses more, which Python does not turn into a name."""
    file.write(b"x" * (1 << 20))
    file.flush()


def test_what_cannot_be_written_says_why(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(InputError, match="file/below: cannot be written .a file is in the way.$"),
        atomic_path(tmp_path / "file" / "below"),
    ):
        pytest.fail("there is no place for it")
    with (
        pytest.raises(InputError, match=r"folder: cannot be written \(Is a directory\)$"),
        atomic_path(tmp_path / "folder") as path,
    ):
        path.touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with (
            pytest.raises(InputError, match=r"big: cannot be written \(File too large\)$"),
            atomic_path(tmp_path / "big") as path,
            open(path, "wb") as file,
        ):
            out_of_room(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    # What is read meanwhile is another matter.
    with pytest.raises(FileNotFoundError, match="none"), atomic_path(tmp_path / "copy"):
        (tmp_path / "none").read_bytes()


WRONG = [
    ("init {long}", "x: cannot be used (File name too long)"),
    ("init file/below", "file/below: cannot be written (a file is in the way)"),
    ("init file", "file: a file is in the way, expected a folder to create"),
    ("init folder", "folder: not empty and not made by this command; choose another --output"),
    ("inspect none", "none: no such folder, expected the folder of a token store or of a checkpoint"),
    ("inspect file", "file: a file, expected the folder of a token store or of a checkpoint"),
    ("convert --input file --to hf --output out", "file: a file, expected the folder of a checkpoint"),
    ("build --input words.jsonl --ckpt file --output out", "file: a file, expected the folder of a checkpoint"),
    ("score --ckpt {ckpt} --input none --output folder", "--output folder: a folder, expected the JSONL file to write"),
    ("score --ckpt {ckpt} --input none --output out --max-length 0", "--max-length 0: expected 1 or more"),
    ("score --ckpt {ckpt} --input none --output out --pack-length -1", "--pack-length -1: expected 1 or more"),
    ("score --ckpt {ckpt} --input none.jsonl --output out", "none.jsonl: no such file"),
    ("score --ckpt {ckpt} --input empty.jsonl --output out", "empty.jsonl: no rows"),
    (
        "generate --ckpt {ckpt} --prompt Hi --device cuda",
        "--device cuda: torch sees no GPU; use --device cpu or run `medmax doctor`",
    ),
    (
        "generate --ckpt {ckpt} --prompts good.jsonl --output file/out",
        "file/out: cannot be written (a file is in the way)",
    ),
    ("generate --ckpt {ckpt} --prompts folder --output out", "folder: a folder, expected a file"),
    ("generate --ckpt {ckpt} --vqgan none --prompt Hi", "none: no such file"),
    ("generate --ckpt {ckpt} --prompt Hi --image none.png", "none.png: no such file"),
    (
        "generate --ckpt {ckpt} --prompts words.jsonl --output out",
        "words.jsonl: line 1: content is str, expected a list",
    ),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_paths(line, message, golden, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "something").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "words.jsonl").write_text('{"id": 1, "content": "Hi"}\n')
    (tmp_path / "good.jsonl").write_text('{"id": 1, "token_ids": [0, 9000, 8710]}\n')
    line = line.format(ckpt=golden / "checkpoint", long="x" * 300)
    assert main(shlex.split(line)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"medmax {line.split()[0]}: ") and error.endswith(message)
    assert not (tmp_path / "out").exists()


def test_errors_of_the_system_that_are_no_fault_of_a_path():
    full = OSError(errno.ENOSPC, "No space left on device")
    assert str(input_error(full)) == "a file cannot be written (No space left on device); make room and start again"
    assert input_error(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")) is None
