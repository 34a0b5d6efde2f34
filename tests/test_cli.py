"""The command line as a whole: help, exit statuses, init."""

import json
import subprocess
import sys

import pytest

from medmax_fast.cli import COMMANDS, main
from medmax_fast.files import atomic_path, open_output
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IdLayout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_default(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: medmax " + command in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["paint"], ["score", "--ckpt", "x"], ["init", "d", "--size", "huge"]])
def test_bad_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err


def test_import_loads_no_torch():
    code = "import sys, medmax_fast, medmax_fast.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_init_tiny_is_reproducible_and_loads(tmp_path, capsys):
    for name in ("a", "b"):
        assert main(["init", str(tmp_path / name), "--seed", "5"]) == 0
    assert main(["init", str(tmp_path / "c"), "--seed", "6"]) == 0
    sums = [(tmp_path / n / "models" / "7b" / "checklist.chk").read_text() for n in "abc"]
    assert sums[0] == sums[1] != sums[2]
    layout = IdLayout.from_file(tmp_path / "a" / "tokenizer" / "text_tokenizer_modified.json")
    assert (layout.boi, layout.eot, layout.text_start) == (8197, 8710, 8712)
    capsys.readouterr()
    # A second init into the same folder must not overwrite a checkpoint.
    assert main(["init", str(tmp_path / "a")]) == 2
    assert "not empty" in capsys.readouterr().err
    command = ["generate", "--ckpt", str(tmp_path / "a"), "--prompt", "Is this the retina?", "--max-new-tokens", "3"]
    assert main(command) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["token_ids"]) <= 3


def test_missing_checkpoint_is_one_line(tmp_path, capsys):
    assert main(["convert", "--input", str(tmp_path / "no"), "--output", str(tmp_path / "o"), "--to", "hf"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no such folder" in error


def test_atomic_path_leaves_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with atomic_path(tmp_path / "f") as temporary:
        temporary.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_output_folder_remembers_its_settings(tmp_path):
    open_output(tmp_path / "o", "tokenize", {"alpha": "drop", "size": (1, 2)})
    open_output(tmp_path / "o", "tokenize", {"alpha": "drop", "size": (1, 2)})
    with pytest.raises(InputError, match="made with alpha = 'drop', now 'whiten'"):
        open_output(tmp_path / "o", "tokenize", {"alpha": "whiten", "size": (1, 2)})
    with pytest.raises(InputError, match="made with command = 'tokenize'"):
        open_output(tmp_path / "o", "train", {"alpha": "drop", "size": (1, 2)})
