"""The files of a run folder R.

    settings.json                what the result depends on (files.open_output)
    long_rows.jsonl              rows left out or cut for their length: row, key, ids, kept (0: left out); if any
    metrics.jsonl                one line per logged step
    validation.jsonl             one line per validation
    stopped.json                 why a run ended itself, and the rows that were worst
    checkpoints/step-000010/     resumable state after 10 steps: state.json, and DeepSpeed's files in engine/
    adapter/ or model/           the result
    loss.png                     the loss curve
    result.json                  the summary; written last, so a run that has it is finished

A checkpoint is written under a hidden name and renamed when every rank is done. state.json lists the size of every
file, so a folder that lost some of its bytes is passed over as well.
"""

import json
import os
from pathlib import Path

from medmax_fast.files import atomic_path, read_object, read_text, remove, write_json
from medmax_fast.runtime import InputError, log

_STATE = "state.json"


class RunFolder:
    """Paths and records of one run; writing methods are for rank 0."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.validation = self.path / "validation.jsonl"
        self.stopped = self.path / "stopped.json"
        self.long_rows = self.path / "long_rows.jsonl"
        self.curve = self.path / "loss.png"
        self.result = self.path / "result.json"

    def temporary_checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step is written before `publish` gives it its name."""
        return self.checkpoints / f".step-{step:06d}.tmp"

    def reshaped(self, step: int) -> Path:
        """Where the checkpoint of a step is rewritten for another number of ranks; the next one saved removes it."""
        return self.checkpoints / f".step-{step:06d}.reshaped.tmp"

    def open_checkpoint(self, step: int) -> Path:
        """Create the temporary folder of a step's checkpoint, rid of what an interrupted run has left."""
        for left in self.checkpoints.glob(".step-*.tmp"):
            remove(left)
        folder = self.temporary_checkpoint(step)
        folder.mkdir(parents=True)
        return folder

    def publish(self, step: int, state: dict, keep: int) -> Path:
        """Complete a checkpoint with `state`, give it its name, and delete older ones but for the `keep` newest."""
        folder = self.temporary_checkpoint(step)
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        write_json(folder / _STATE, {"step": step, **state, "files": files})
        # What a checkpoint stands for includes the lines logged before it.
        for path in [*folder.rglob("*"), folder, self.metrics, self.validation]:
            _sync(path)
        final = self.checkpoints / f"step-{step:06d}"
        remove(final)
        os.replace(folder, final)
        _sync(self.checkpoints)
        self._rotate(keep)
        return final

    def _rotate(self, keep: int) -> None:
        """Of the checkpoints up to the newest complete one, delete all but the `keep` newest complete ones."""
        published = self._published()
        complete = [path for path in published if self._read(path)[0]]
        older = published[: published.index(complete[-1])] if complete else []
        for path in older:
            if path not in complete[-keep:]:
                remove(path)

    def newest_checkpoint(self) -> tuple[Path, dict] | None:
        """(folder, state) of the newest complete checkpoint, None without one."""
        for folder in reversed(self._published()):
            state, problem = self._read(folder)
            if state:
                return folder, state
            log(f"{folder}: passed over, {problem}")
        return None

    def _read(self, folder: Path) -> tuple[dict | None, str]:
        """The state of a checkpoint, or None and what it lacks."""
        if not (folder / _STATE).is_file():
            return None, f"it has no {_STATE}"
        try:
            state = read_object(folder / _STATE)
        except InputError as error:
            return None, str(error)
        damaged = [name for name, size in state["files"].items() if _size(folder / name) != size]
        return (None, f"{damaged[0]} is incomplete") if damaged else (state, "")

    def _published(self) -> list[Path]:
        """Folders with a checkpoint's name, oldest first; copies that somebody has named otherwise are left alone."""
        steps = {path: path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*")}
        return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))

    def append(self, path: Path, record: dict) -> None:
        """One more line of metrics or validation."""
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self, path: Path | None = None) -> list[dict]:
        """The lines of metrics (or of `path`); a last one cut short by a kill is left out."""
        path = path or self.metrics
        if not path.exists():
            return []
        lines = read_text(path).split("\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise InputError(f"{path}: a line is not valid JSON ({error}); remove it to go on") from error

    def rewind(self, step: int, keep: int) -> None:
        """Drop the lines of later steps, which a resumed run makes again, and what else an earlier one has left."""
        self.stopped.unlink(missing_ok=True)
        # Half-written results, of which a 7B model is 14 GB, and checkpoints that it was about to delete.
        for left in self.path.glob(".*.tmp"):
            remove(left)
        self._rotate(keep)
        for path in (self.metrics, self.validation):
            if path.exists():
                kept = [record for record in self.records(path) if record["step"] <= step]
                with atomic_path(path) as temporary:
                    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _sync(path: Path) -> None:
    """Have the bytes of a file, or the names in a folder, on the disk; nothing if it does not exist."""
    if not path.exists():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
