"""Sections of a benchmark one after the other: what one has found is written at once, and no other one loses it.

A section is a generator of pairs (rows, evidence): rows of its own, which are printed as a table, and rows of
`harness.evidence`, both as they are done. Where one fails, what it has given counts, and the others go on; the reason
is written down and the exit status is 1.
"""

import argparse
import gc
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from subprocess import SubprocessError

import torch

from benchmarks.harness import environment, report
from medmax_fast.files import write_json
from medmax_fast.kernels.launch import triton
from medmax_fast.runtime import one_line, print_table

# What ends a section but not the others: a wrong result, too little memory, a library that is missing or of another
# version, a kernel that cannot be compiled or launched, for which triton and torch.compile run programs.
FAILURES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError)
FAILURES += (SubprocessError, TypeError, ValueError)
if triton is not None:
    FAILURES += (triton.TritonError,)

Section = Callable[[], Iterator[tuple[list[dict], list[dict]]]]


def section_parser(
    description: str, sections: Collection[str], default: Sequence[str] = (), sized: bool = False
) -> argparse.ArgumentParser:
    """A parser with --only (some of `sections`, as a list; without it `default`, or all), --quick and --output.

    sized: of a benchmark of random models; adds --size.
    """

    def chosen(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(sections):
            raise argparse.ArgumentTypeError(f"{','.join(sorted(unknown))}: expected {', '.join(sections)}")
        return names

    default = list(default or sections)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = f"sections to run, with commas, some of {', '.join(sections)} (default: {','.join(default)})"
    parser.add_argument("--only", type=chosen, default=default, help=words)
    if sized:
        parser.add_argument("--size", choices=("tiny", "7b"), help="random model (default: 7b on a GPU, tiny on a CPU)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--output", help="JSON file to write")
    return parser


def forget() -> None:
    """Let go of what is left of models, engines and captured graphs, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gpu_lost() -> bool:
    """Whether a kernel that failed has left this process without its GPU: whatever it does there then fails too."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def reason_of(error: BaseException) -> str:
    """The error on one line, with its type."""
    return f"{type(error).__name__}: {one_line(error)}"


def failure(what: str, error: BaseException) -> str:
    """The error on one line, with its type; where it happened goes to standard error. Call it while it is handled."""
    traceback.print_exc()
    reason = reason_of(error)
    print(f"{what} failed: {reason}", flush=True)
    return reason


def run_sections(
    name: str, sections: dict[str, Section], summary: Sequence[str], output: str | None, facts: dict
) -> int:
    """Run all `sections`; returns the exit status.

    summary: keys of the rows that stay in the last table, the first of them what a row is called. The result has
    beside `facts` section_s, failed (reasons), sections (all rows), each by section, `evidence`, and gpu_lost: whether
    a section has ended the others' GPU with it, which are left out then.
    """
    facts = facts | {"section_s": {}, "failed": {}, "sections": {}, "evidence": [], "gpu_lost": False}
    rows: list[dict] = []

    def write() -> None:
        if output:
            write_json(output, {"benchmark": name, **facts, "environment": environment(), "rows": rows})

    for section, work in sections.items():
        start = time.perf_counter()
        facts["sections"][section] = found = []
        try:
            forget()
            for some, evidence in work():
                found += some
                facts["evidence"] += evidence
                write()
        except FAILURES as error:
            facts["failed"][section] = failure(section, error)
            facts["gpu_lost"] = gpu_lost()
        facts["section_s"][section] = time.perf_counter() - start
        shown = found or [{summary[0]: "nothing measured"}]
        rows += [{"section": section} | {key: row.get(key) for key in summary} for row in shown]
        print(f"{section}: {facts['section_s'][section]:.0f} s")
        if found:
            print_table(found)
        print(flush=True)
        write()
        if facts["gpu_lost"]:
            break
    report(name, rows, output, **facts)
    return int(bool(facts["failed"]))
