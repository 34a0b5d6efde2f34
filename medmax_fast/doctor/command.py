"""`medmax doctor`: what is active on this machine, what serves in place of the rest, and whether it computes right.

Every kernel is tried beside its reference, and every installed library that may not fit the others is imported, both in
processes of their own, while this one looks around. What does not work is a row of a table, not an error.
"""

import shutil
import time

from medmax_fast.config import DoctorConfig
from medmax_fast.doctor.child import Child
from medmax_fast.doctor.components import broken_torch, compute_rows, machine_rows, torch_fault
from medmax_fast.doctor.libraries import ACTIVE, FALLS_BACK, MISSING, library_rows, to_import
from medmax_fast.progress import Progress
from medmax_fast.runtime import Incomplete, versions

# A first run on a GPU compiles every kernel.
TEST_SECONDS = 300.0
# For the imports, from the start of the command.
IMPORT_SECONDS = 12.0
# Some libraries look for something better on a hub while they are imported.
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
# Columns of the printed tables.
WIDTHS = (80, 130)


def doctor(config: DoctorConfig) -> dict:
    """Prints two tables, or nothing with `json`; returns components, self_tests, passed, failed, seconds, versions.

    A component has component, state (active, falls back, missing), uses, why and install. Raises Incomplete if a
    self-test fails.
    """
    start = time.monotonic()
    tried = to_import()
    with (
        Child("medmax_fast.doctor.selftest") as tests,
        Child("medmax_fast.doctor.imports", tried, OFFLINE) as imports,
        Progress("doctor (self-tests)") as bar,
    ):
        fault = torch_fault()
        components = broken_torch(fault) if fault else machine_rows()
        rows = _self_tests(tests, bar)
        faults = _faults(imports, tried, start + IMPORT_SECONDS - time.monotonic())
    if not fault:
        components += compute_rows(faults)
    components += library_rows(faults)
    failed = [row["test"] for row in rows if not row["passed"]]
    result = {
        "components": components,
        "self_tests": rows,
        "passed": len(rows) - len(failed),
        "failed": len(failed),
        "seconds": round(time.monotonic() - start, 1),
        "versions": versions(),
    }
    if not config.json:
        _print(result)
    result["printed"] = tuple(result) if config.json else ("components", "self_tests")
    if failed:
        raise Incomplete(result, f"{len(failed)} of {len(rows)} self-tests failed: {', '.join(failed)}")
    return result


def _self_tests(tests: Child, bar: Progress) -> list[dict]:
    """Their outcomes; the last one says what ended them early, if something has."""
    rows = []
    for row in tests.lines(TEST_SECONDS):
        if "tests" in row:
            bar.total = row["tests"]
            continue
        rows.append(row)
        bar.update(len(rows))
    if tests.failure:
        row = {"test": "those not named here", "runs": "-", "passed": False, "difference": None, "allowed": None}
        rows.append(row | {"seconds": 0.0, "error": tests.failure})
    return rows


def _faults(imports: Child, tried: list[str], seconds: float) -> dict[str, str]:
    """Why an import failed, by module; empty for one that works, none for one that was not reached in time."""
    faults = {row["module"]: row["error"] for row in imports.lines(seconds)}
    if imports.failure and not imports.late:
        # The first one that is not there has ended the process; none, if it failed only as it ended.
        for name in [name for name in tried if name not in faults][:1]:
            faults[name] = f"import: {imports.failure}"
    return faults


def _print(result: dict) -> None:
    """Both tables, as wide as the terminal is, or 100 columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    least, most = WIDTHS
    width = min(max(shutil.get_terminal_size((100, 24)).columns, least), most)
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    styles = {ACTIVE: "green", FALLS_BACK: "yellow", MISSING: "red", "passed": "green", "FAILED": "bold red"}

    def show(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        table = Table(*names, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for cells in rows:
            table.add_row(*(Text(cell, styles.get(cell, "")) for cell in cells))
        console.print(table)
        console.print()

    rows: list[tuple[str, ...]] = []
    for row in result["components"]:
        note = row["why"] + f"\n{row['install']}" * bool(row["install"])
        rows.append((row["component"], row["state"], row["uses"], note.strip()))
    show(("component", "state", "uses", "why, and what to install"), rows)
    rows = []
    for row in result["self_tests"]:
        figures = ["-" if row[name] is None else f"{row[name]:.2g}" for name in ("difference", "allowed")]
        outcome = "passed" if row["passed"] else "FAILED"
        rows.append((row["test"], row["runs"], outcome, *figures, f"{row['seconds']:.1f} s", row["error"]))
    show(("self-test", "of", "outcome", "difference", "allowed", "took", ""), rows)
    if not any(row["runs"].startswith("Triton") for row in result["self_tests"]):
        console.print("No kernel was tested: Triton is not here, and the torch reference of each serves.\n")
