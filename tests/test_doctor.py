"""`medmax doctor`: its tables, what it says of a machine that lacks something, and self-tests that can fail."""

import importlib
import json
import os
import re
import signal
import sys

import pytest
import torch

from medmax_fast.cli import main
from medmax_fast.doctor import cases, command, components, libraries, machine
from medmax_fast.doctor.cases import EXTENSION, KERNELS, close, equal
from medmax_fast.doctor.child import Child
from medmax_fast.doctor.libraries import ACTIVE, FALLS_BACK, MISSING, Library
from medmax_fast.doctor.selftest import run_test

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Kernel -> its module, and the function there that launches it and returns what it has written.
LAUNCHERS = {
    "nearest code": ("vq", "_nearest_code_triton"),
    "codes to ids and back": ("remap", "_shift_triton"),
    "resample": ("resample", "_resample_triton"),
    "group norm, SiLU": ("group_norm", "_group_norm_triton"),
    "RMS norm": ("rms_norm", "_forward_triton"),
    "query/key norm, RoPE": ("qk_norm_rope", "_norm_rope_triton"),
    "SwiGLU": ("swiglu", "_forward_triton"),
    "LoRA projection": ("lora", "_down_triton"),
    "cross-entropy": ("cross_entropy", "_cross_entropy_triton_"),
    "norm, RoPE, store": ("norm_rope_store", "_norm_rope_store_triton"),
    "paged attention": ("paged_attention", "_paged_attention_triton"),
    "sampling of text": ("sampling", "_pick_text_triton"),
    "sampling of pictures": ("sampling", "_pick_image_triton"),
}
BROKEN = "operator torchvision::nms does not exist"


def row_of(name, passed=True, **more):
    row = {"test": name, "runs": "Triton", "passed": passed, "difference": 0.0, "allowed": 0.0}
    return row | {"seconds": 0.1, "error": ""} | more


@pytest.fixture()
def library(tmp_path, monkeypatch):
    """Make a module that does something when it is imported, here and in other processes."""

    def make(name, code):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return name

    return make


@pytest.fixture()
def quick(monkeypatch):
    """No processes: these outcomes of self-tests and imports instead."""

    def use(rows, faults):
        monkeypatch.setattr(command, "_self_tests", lambda tests, bar: rows)
        monkeypatch.setattr(command, "_faults", lambda *_: faults)
        monkeypatch.setattr(command, "to_import", list)

    return use


# ---- the command ----


def test_one_line_of_json_for_programs(library, monkeypatch, capsys):
    """The real thing once, beside a library that does not fit torch."""
    library("torchvision", f"raise RuntimeError({BROKEN!r})")
    monkeypatch.setattr(libraries, "BESIDE", ("nvidia.nvimgcodec", "torchvision"))
    monkeypatch.setattr(libraries, "LIBRARIES", [entry for entry in libraries.LIBRARIES if not entry.tried])
    assert main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    report = json.loads(out)
    assert out.count("\n") == 1 and report["versions"]["torch"] == torch.__version__
    assert [row["test"] for row in report["self_tests"]] == [*EXTENSION, *KERNELS]
    runs = {row["runs"] for row in report["self_tests"] if row["test"] in KERNELS}
    assert runs == {"Triton, interpreted"} and all(row["passed"] for row in report["self_tests"]), report["self_tests"]
    assert (report["passed"], report["failed"]) == (len(EXTENSION) + len(KERNELS), 0)
    rows = {row["component"]: row for row in report["components"]}
    assert rows["GPU"]["state"] == rows["Triton kernels"]["state"] == FALLS_BACK
    assert rows["C++ extension"]["state"] == rows["torch"]["state"] == ACTIVE
    broken = next(row for name, row in rows.items() if name.startswith("torchvision"))
    assert broken["state"] == MISSING and BROKEN in broken["why"] and "pip install" in broken["install"]
    assert all(row["uses"] and (row["state"] == ACTIVE or row["why"]) for row in rows.values())


def test_tables_for_people_end_with_the_same_json(quick, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    quick([row_of("SwiGLU", difference=3.2e-7, allowed=1e-6)], {"open_clip": "ImportError: " + "long " * 30})
    assert main(["doctor"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) <= 100 and json.loads(last)["failed"] == 0
    assert re.match(r"component +state +uses +why, and what to install", table[0])
    assert any(re.match(r"SwiGLU +Triton +passed +3.2e-07 +1e-06 +0.1 s", line) for line in table)
    assert any(re.match(r"memory +active +\d+\.\d of \d+\.\d GiB free", line) for line in table)


def test_a_failed_self_test_is_status_3(quick, capsys):
    quick([row_of("SwiGLU"), row_of("resize", False, difference=None, error="RuntimeError: no kernel image")], {})
    assert main(["doctor"]) == 3
    said = capsys.readouterr()
    assert "FAILED" in said.out and "no kernel image" in said.out
    assert "No kernel was tested" not in said.out
    assert said.err.splitlines()[-1] == "medmax doctor: 1 of 2 self-tests failed: resize"


def test_without_triton_the_references_serve(quick, monkeypatch, capsys):
    quick([row_of("resize", runs="C++")], {"triton": "ImportError: libcuda.so.1"})
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "No kernel was tested" in said and "libcuda.so.1" in said and "pip install --force-reinstall" in said


def test_without_torch_there_is_a_table_all_the_same(quick, monkeypatch, capsys):
    quick([row_of("those not named here", False, error="its process ended")], {})
    monkeypatch.setattr(command, "torch_fault", lambda: "OSError: libcudart.so.13: cannot open shared object file")
    assert main(["doctor", "--json"]) == 3
    rows = {row["component"]: row for row in json.loads(capsys.readouterr().out)["components"]}
    assert rows["torch"]["state"] == MISSING and "libcudart" in rows["torch"]["why"] and "memory" in rows


def test_a_torch_that_cannot_be_imported_is_a_reason(monkeypatch):
    assert components.torch_fault() == ""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert components.torch_fault().startswith("ModuleNotFoundError: import of torch halted")


# ---- components ----


def test_a_cpu_build_beside_a_gpu_is_named(monkeypatch):
    card = ["NVIDIA H100 80GB HBM3, driver 570.86"]
    monkeypatch.setattr(torch.version, "cuda", None)
    first, second = components._torch(False, card, "")
    assert first["state"] == second["state"] == FALLS_BACK and "H100" in first["why"]
    assert first["install"] == "pip install --force-reinstall torch"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    first, second = components._torch(False, card, "The NVIDIA driver on your system is too old")
    assert (first["state"], second["state"]) == (ACTIVE, FALLS_BACK)
    assert "too old" in second["why"] and "CUDA 13.0" in second["install"]


def test_threads_beyond_the_quota_are_a_fault(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    row = components._threads()
    assert row["state"] == FALLS_BACK and row["why"].startswith("OMP_NUM_THREADS=16, more threads than cores")
    assert row["install"] == "export OMP_NUM_THREADS=2"
    monkeypatch.setattr(machine, "cores", lambda: 16)
    assert components._threads()["state"] == ACTIVE


def test_limits_of_control_groups_count(monkeypatch, tmp_path):
    files = {"a/cpu.max": "250000 100000", "cpu.max": "max 100000", "a/memory.max": str(1 << 30)}
    files |= {"a/memory.current": str(1 << 28), "memory/b/memory.limit_in_bytes": str((1 << 63) - 4096)}
    files |= {"memory/b/memory.usage_in_bytes": "1"}
    for name, content in files.items():
        (tmp_path / "group" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "group" / name).write_text(content + "\n")
    (tmp_path / "self").write_text("4:memory:/b\n0::/a\n")
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "group")
    monkeypatch.setattr(machine, "_SELF", tmp_path / "self")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert machine.cores() == 3
    total, free = machine.memory()
    assert total == 1 << 30 and 0 < free <= (1 << 30) - (1 << 28)
    (tmp_path / "self").unlink()
    assert machine.cores() == 8 and machine.memory()[0] > 1 << 30


@pytest.mark.parametrize(
    ("modules", "faults", "state", "words"),
    [
        (("json",), {"json": ""}, ACTIVE, ""),
        (("json",), {}, ACTIVE, "not imported here, for want of time"),
        (("json", "absent_one"), {"json": ""}, MISSING, "absent_one not installed; it refuses"),
        (("json",), {"json": "OSError: libx.so"}, MISSING, "json: OSError: libx.so; it refuses"),
    ],
)
def test_a_library_is_there_missing_or_broken(modules, faults, state, words):
    row = libraries._library(Library("thing", modules, "gpu", "it refuses", tried=True), faults)
    assert (row["state"], row["why"]) == (state, words)
    instead = libraries._library(Library("thing", ("absent_one",), "gpu", "", "another", tried=True), {})
    assert (instead["state"], instead["uses"], instead["install"]) == (
        FALLS_BACK,
        "another",
        "pip install 'medmax_fast[gpu]'",
    )


@pytest.mark.parametrize("code", ["import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "import os; os._exit(3)"])
def test_a_library_that_ends_its_process_is_named(library, code):
    names = ["json", library("fatal", code), "csv"]
    with Child("medmax_fast.doctor.imports", names) as child:
        faults = command._faults(child, names, 60)
    status = -signal.SIGSEGV if "SIGSEGV" in code else 3
    assert faults == {"json": "", "fatal": f"import: its process ended with status {status}: without a word"}


def test_a_library_that_fails_as_its_process_ends_is_no_fault():
    class Ended:
        failure, late = "its process ended with status -11: without a word", False

        def lines(self, seconds):
            return iter([{"module": "a", "error": ""}])

    assert command._faults(Ended(), ["a"], 1) == {"a": ""}


def test_imports_are_not_waited_for_beyond_their_time(library):
    names = [library("slow", "import time; print('noise', flush=True); time.sleep(60)")]
    with Child("medmax_fast.doctor.imports", names) as child:
        assert command._faults(child, names, 1.5) == {} and child.late


# ---- self-tests ----


def run(name, dtype=torch.float32):
    def test(draw):
        draw.dtype = dtype
        return (KERNELS | EXTENSION)[name](draw)

    return run_test(name, test, "Triton", DEVICE)


@pytest.mark.gpu(required=False)
# In 16 bits, as on a GPU, in the interpreter too.
@pytest.mark.parametrize("dtype", [torch.bfloat16] + [torch.float32] * (DEVICE == "cpu"), ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_a_wrong_kernel_fails_its_self_test(name, dtype, monkeypatch, bf16_to_nearest):
    found = run(name, dtype)
    assert found["passed"] and found["difference"] <= found["allowed"] and found["error"] == "", found
    module, launcher = LAUNCHERS[name]
    module = importlib.import_module(f"medmax_fast.kernels.{module}")
    launch = getattr(module, launcher)

    def wrong(*arguments, **options):
        result = launch(*arguments, **options)
        tensor = result[0] if isinstance(result, tuple) else result
        # The last value, by one unit or a part of the largest; in 16 bits, where others are rounded as well, by all.
        at = tuple(size - 1 for size in tensor.shape)
        part = 1 if tensor.element_size() < 4 else 2**-5
        tensor[at] += part * tensor.abs().max() if tensor.is_floating_point() else 1
        return result

    monkeypatch.setattr(module, launcher, wrong)
    found = run(name, dtype)
    assert not found["passed"] and found["difference"] > found["allowed"], found


@pytest.mark.parametrize("name", EXTENSION)
def test_a_wrong_extension_fails_its_self_test(name, monkeypatch):
    assert run(name)["passed"]
    from medmax_fast.data import collate, packing, resize

    if name == "resize":
        monkeypatch.setattr(resize, "fit_ref", lambda image, fit_ref=resize.fit_ref: fit_ref(image) ^ 1)
    elif name == "planner":
        plan = packing.plan_epoch_ref
        monkeypatch.setattr(packing, "plan_epoch_ref", lambda lengths, room, seed, epoch: plan(lengths, room, 5, epoch))
    else:
        monkeypatch.setattr(collate, "IGNORED", -1)
    found = run(name)
    assert not found["passed"], found


def test_what_is_not_written_or_not_finite_or_raises_fails(capsys):
    def unwritten(draw):
        return close([torch.empty(3)], [torch.zeros(3)], [torch.zeros(3, dtype=torch.float64)])

    def raising(draw):
        raise RuntimeError("no kernel image is available\nfor this device")

    rows = [run_test("t", test, "Triton", "cpu") for test in (unwritten, raising)]
    assert [row["passed"] for row in rows] == [False, False]
    assert [row["error"] for row in rows] == [
        "values that are not finite",
        "RuntimeError: no kernel image is available for this device",
    ]


def test_comparisons():
    assert equal(torch.tensor([1, 2]), torch.tensor([1, 3])) == (1.0, 0.0)
    exact = torch.tensor([1.0, 100.0], dtype=torch.float64)
    own = exact.float() + torch.tensor([0.0, 1e-3])
    found, allowed = close([exact.float() + 5e-4], [own], [exact])
    assert found < allowed == pytest.approx(2e-3 + 100 * 4 * cases.EPS32, rel=0.05)
    found, allowed = close([exact.float() + 5e-3], [own], [exact])
    assert found > allowed
