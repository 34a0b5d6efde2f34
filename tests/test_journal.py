"""The journal gives back exactly the chunks that are whole, whatever is cut off or damaged behind them."""

import hashlib
import json
import os
import random
import subprocess
import sys

import pytest

from medmax_fast.data.journal import JOURNAL_FILE, Journal

SETTINGS = {"input": "a", "pair": (1, 2)}
CHUNKS = [(bytes([i]) * (7 * i + 1), {"row": i}) for i in range(6)]


def write(folder, chunks=CHUNKS, settings=SETTINGS):
    with Journal(folder, settings, "data/d.bin") as journal:
        for data, record in chunks:
            journal.append(data, record)
    return folder


def left(folder, settings=SETTINGS):
    """Records that a new run finds; checks that data, digest and records fit together."""
    with Journal(folder, settings, "data/d.bin") as journal:
        records = list(journal.records())
        expected = b"".join(data for data, _ in CHUNKS[: len(records)])
        assert journal.last == (records[-1] if records else {})
        assert journal.digest.hexdigest() == hashlib.sha256(expected).hexdigest()
        assert journal.data_path.read_bytes() == expected
    assert records == [record for _, record in CHUNKS[: len(records)]]
    return len(records)


def test_everything_is_taken_over(tmp_path):
    folder = write(tmp_path / "j", CHUNKS[:4])
    assert left(folder) == 4
    assert left(write(folder, CHUNKS[4:])) == 6


def test_other_settings_begin_anew(tmp_path):
    folder = write(tmp_path / "j")
    (folder / "data" / "more").touch()
    assert left(folder, {**SETTINGS, "input": "b"}) == 0
    assert left(folder) == 0 and not (folder / "data" / "more").exists()
    (write(tmp_path / "k") / "resume.json").write_text('{"input"')
    assert left(tmp_path / "k") == 0


@pytest.mark.parametrize("name", ["data/d.bin", JOURNAL_FILE])
def test_cut_or_flipped_anywhere(tmp_path, name):
    draw, seen = random.Random(3), set()
    for trial in range(60):
        folder = write(tmp_path / str(trial))
        content = (folder / name).read_bytes()
        at = draw.randrange(len(content))
        flipped = content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
        (folder / name).write_bytes(content[:at] if trial % 2 else flipped)
        found = left(folder)
        seen.add(found)
        # It goes on from there, to the same whole.
        assert found < 6 and left(write(folder, CHUNKS[found:])) == 6
    assert len(seen) > 3


def test_data_without_its_line_is_dropped(tmp_path):
    folder = write(tmp_path / "j", CHUNKS[:2])
    with open(folder / "data" / "d.bin", "ab") as file:
        file.write(b"half a chunk")
    assert left(folder) == 2


def test_one_process_at_a_time(tmp_path):
    code = f"from medmax_fast.data.journal import Journal\nJournal({str(tmp_path / 'j')!r}, {{}}, 'd')"
    with Journal(tmp_path / "j", {}, "d"):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 1 and "InputError" in result.stderr and "another process" in result.stderr
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_removed_as_a_whole(tmp_path):
    with Journal(tmp_path / "j", json.loads(json.dumps(SETTINGS)), "d") as journal:
        journal.append(b"x", {})
        journal.remove()
    assert os.listdir(tmp_path) == []
