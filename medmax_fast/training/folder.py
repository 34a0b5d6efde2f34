"""The files of a run folder R.

    settings.json                what the result depends on (runtime.open_output)
    long_rows.jsonl              rows left out or cut for their length: row, key, ids, kept (0: left out); if any
    metrics.jsonl                one line per logged step
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

from medmax_fast.runtime import atomic_path, log, read_json, remove, write_json

KEPT = 2
_STATE = "state.json"


class RunFolder:
    """Paths and records of one run; writing methods are for rank 0."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.long_rows = self.path / "long_rows.jsonl"
        self.curve = self.path / "loss.png"
        self.result = self.path / "result.json"

    def temporary_checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step is written before `publish` gives it its name."""
        return self.checkpoints / f".step-{step:06d}.tmp"

    def open_checkpoint(self, step: int) -> Path:
        """Create the temporary folder of a step's checkpoint, rid of what an interrupted run has left."""
        for left in self.checkpoints.glob(".step-*.tmp"):
            remove(left)
        folder = self.temporary_checkpoint(step)
        folder.mkdir(parents=True)
        return folder

    def publish(self, step: int, state: dict) -> Path:
        """Complete a checkpoint with `state`, give it its name, and delete all but the newest ones."""
        folder = self.temporary_checkpoint(step)
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        for name in files:
            _sync(folder / name)
        write_json(folder / _STATE, {"step": step, **state, "files": files})
        _sync(folder / _STATE)
        final = self.checkpoints / f"step-{step:06d}"
        remove(final)
        os.replace(folder, final)
        _sync(self.checkpoints)
        for old in self._published()[:-KEPT]:
            remove(old)
        return final

    def newest_checkpoint(self) -> tuple[Path, dict] | None:
        """(folder, state) of the newest complete checkpoint, None without one."""
        for folder in reversed(self._published()):
            if not (folder / _STATE).is_file():
                log(f"{folder}: passed over, it has no {_STATE}")
                continue
            state = read_json(folder / _STATE)
            damaged = [name for name, size in state["files"].items() if _size(folder / name) != size]
            if not damaged:
                return folder, state
            log(f"{folder}: passed over, {damaged[0]} is incomplete")
        return None

    def _published(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))

    def append(self, record: dict) -> None:
        """One more line of metrics."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict]:
        """The lines of metrics; a last one cut short by a kill is left out."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, step: int) -> None:
        """Drop the metrics of later steps, which a resumed run makes again."""
        kept = [record for record in self.records() if record["step"] <= step]
        with atomic_path(self.metrics) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
