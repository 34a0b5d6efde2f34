"""The answers of a run on disk: one file per batch, complete as soon as it is there, whoever made it.

A batch is a unit: its pictures and its file are synced before the file gets its name, so that what `kill -9` costs is
the batch under way. Batches do not depend on the processes that share them, nor therefore do their answers. Answers
whose error may pass (a server was down) are asked for again by the next run, and the file is replaced; the others of
their batch are kept.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from medmax_fast.data.rows import read_rows
from medmax_fast.eval.backends.protocol import Answer
from medmax_fast.eval.samples import Given
from medmax_fast.files import atomic_path
from medmax_fast.generate.writer import picture_name
from medmax_fast.model.picture_decoder import write_png
from medmax_fast.runtime import InputError

PICTURES = "pictures"
# Facts of a model that tell one from another.
SAME = ("kind", "model", "revision", "architecture", "image_processor", "dtype")


class Answers:
    """The answers under `folder`; batches: the ids of the questions of each batch."""

    def __init__(self, folder: Path, batches: Sequence[Sequence[str]]):
        self._run, self._folder, self._batches = folder, folder / "answers", batches

    @property
    def claims_path(self) -> Path:
        """File on whose bytes processes hold locks: byte n for batch n, the one after the last for the scoring."""
        return self._folder / "claims"

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def left(self) -> list[int]:
        """Batches without their file."""
        return [number for number in range(len(self._batches)) if self.state(number) is None]

    def state(self, number: int) -> tuple | None:
        """What changes whenever a batch's file is replaced; None where there is none."""
        try:
            found = self._path(number).stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_ino

    def to_ask_again(self) -> dict[int, tuple]:
        """Batches with errors that may have passed, and their states."""
        batches = {}
        for number in range(len(self._batches)):
            state = self.state(number)
            if state and any(row["passing"] for row in self._rows(number)[1].values()):
                batches[number] = state
        return batches

    def kept(self, number: int) -> dict[str, dict]:
        """Rows of a batch that need not be asked again; none where it has no file."""
        if self.state(number) is None:
            return {}
        return {name: row for name, row in self._rows(number)[1].items() if not row["passing"]}

    def publish(self, number: int, facts: dict, kept: dict[str, dict], answers: Iterable[Answer]) -> None:
        """Save a whole batch: rows kept from before, and new answers. facts: of the backend that gave these."""
        if kept:
            facts = unite(self._rows(number)[0], facts, self._folder)
        rows = kept | {answer.id: self._row(answer) for answer in answers}
        assert rows.keys() == set(self._batches[number]), "the backend lost or invented answers"
        write_lines(self._path(number), [facts, *(rows[name] for name in self._batches[number])])

    def check_model(self, facts: dict) -> None:
        """InputError if a batch that is there was answered by another model than the one of these facts."""
        for number in range(len(self._batches)):
            if self.state(number):
                unite(self._rows(number)[0], facts, self._folder)

    def digest(self) -> str:
        """SHA-256 of the answers of all batches, which are there; not of the facts, which tell how they came."""
        digest = hashlib.sha256()
        for number in range(len(self._batches)):
            digest.update(self._path(number).read_bytes().partition(b"\n")[2])
        return digest.hexdigest()

    def read(self) -> tuple[dict, dict[str, Given]]:
        """(facts of the backend, answers by question id) of all batches.

        InputError where batches were answered by different models, as for a file that is damaged.
        """
        facts: dict = {}
        found: dict[str, Given] = {}
        for number in range(len(self._batches)):
            told, rows = self._rows(number)
            facts = unite(facts, told, self._folder)
            for row in rows.values():
                pictures, ids = tuple(row["pictures"]), tuple(row["token_ids"])
                found[row["id"]] = Given(row["text"], pictures, ids, row["error"], row["passing"])
        return facts, found

    def _row(self, answer: Answer) -> dict:
        """An answer as a row, its pictures saved."""
        names = []
        for number, pixels in enumerate(answer.pictures):
            names.append(f"{PICTURES}/{picture_name(answer.id, number)}")
            write_png(self._run / names[-1], pixels)
            with open(self._run / names[-1], "rb") as file:
                os.fsync(file.fileno())
        # What a server sends may hold halves of characters, which no file can.
        text = answer.text.encode("utf-8", "replace").decode()
        facts = {"token_ids": answer.token_ids, "error": answer.error, "passing": answer.passing}
        return {"id": answer.id, "text": text, "pictures": names, **facts}

    def _rows(self, number: int) -> tuple[dict, dict[str, dict]]:
        """(facts, rows by question id) of a batch's file; InputError for one that is not as it was written."""
        path, known, found = self._path(number), set(self._batches[number]), {}
        again = "delete the file to ask again"
        try:
            (_, facts), *rows = read_rows(path) if path.stat().st_size else [(0, {})]
        except InputError as error:
            raise InputError(f"{error}; {again}") from error
        for line, row in rows:
            if row.get("id") not in known or row["id"] in found:
                raise InputError(f"{path}: line {line + 1}: id {row.get('id')!r} is unknown or given twice; {again}")
            if not {"text", "pictures", "token_ids", "error", "passing"} <= row.keys():
                raise InputError(f"{path}: line {line + 1}: not an answer by medmax eval; {again}")
            found[row["id"]] = row
        if len(found) < len(known):
            raise InputError(f"{path}: {len(found)} answers, expected {len(known)}; {again}")
        return facts, found

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.jsonl"


def unite(facts: dict, more: dict, folder: Path) -> dict:
    """Facts of a backend with those that it, or its like in another process, told at another time; lists are united.

    InputError where the two are of different models.
    """
    for name in SAME:
        if facts.get(name, more.get(name)) != more.get(name, facts.get(name)):
            what = f"answers by models of {name} {facts[name]!r} and {more[name]!r}"
            raise InputError(f"{folder}: {what}; choose another --output")
    lists = {name: sorted({*facts[name], *more.get(name, ())}) for name in facts if isinstance(facts[name], list)}
    return {**more, **facts, **lists}


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write objects as JSONL, atomically and synced to the disk."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
