"""What the machine has, and what computes on it: torch, GPU, kernels, attention, decoders, threads, memory, disk."""

import os
import warnings

from medmax_fast.doctor import machine
from medmax_fast.doctor.libraries import ACTIVE, FALLS_BACK, MISSING, installed, pip, row, version_of
from medmax_fast.runtime import one_line


def torch_fault() -> str:
    """Why torch cannot be imported; empty if it can."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {one_line(error)}"
    return ""


def broken_torch(fault: str) -> list[dict]:
    """The rows of a machine without torch."""
    return [row("torch", MISSING, "-", fault, "pip install --force-reinstall torch"), _memory(), *_disks()]


def machine_rows() -> list[dict]:
    """torch, the GPU, processor, memory and disk."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gpu = torch.cuda.is_available()
    # Such as that the driver is too old for this build.
    said = " ".join(str(warning.message) for warning in caught).partition("\n")[0]
    return [*_torch(gpu, machine.graphics_cards(), said), _extension(), _threads(), _memory(), *_disks()]


def _torch(gpu: bool, cards: list[str], said: str) -> list[dict]:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip and f"ROCm {torch.version.hip}"
    uses = f"{torch.__version__}, built for {built or 'CPUs alone'}"
    if gpu:
        return [row("torch", ACTIVE, uses), _gpu(cards)]
    if not cards:
        return [row("torch", ACTIVE, uses), row("GPU", FALLS_BACK, "the CPU", "no GPU: nvidia-smi shows none")]
    if not built:
        why = f"this torch cannot use the GPU that is here ({cards[0]})"
        return [
            row("torch", FALLS_BACK, uses, why, "pip install --force-reinstall torch"),
            row("GPU", FALLS_BACK, "the CPU", "torch is built for CPUs alone"),
        ]
    why = said or f"torch sees none, though nvidia-smi shows {cards[0]}; CUDA_VISIBLE_DEVICES may hide it"
    return [
        row("torch", ACTIVE, uses),
        row("GPU", FALLS_BACK, "the CPU", why, f"a driver for {built} or newer"),
    ]


def _gpu(cards: list[str]) -> dict:
    import torch

    try:
        first, (free, total) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info(0)
    # Such as one that another process has for itself.
    except RuntimeError as error:
        return row("GPU", MISSING, "-", one_line(error))
    card = f"{torch.cuda.device_count()} x {first.name}, capability {first.major}.{first.minor}"
    card += f", {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return row("GPU", ACTIVE, card + (f", driver {cards[0].rpartition(' ')[2]}" if cards else ""))


def _extension() -> dict:
    reinstall = "pip install --force-reinstall --no-deps . in a checkout, with a C++ compiler"
    try:
        from medmax_fast._csrc import has_avx2
    except ImportError as error:
        return row("C++ extension", MISSING, "-", str(error), reinstall)
    if has_avx2():
        return row("C++ extension", ACTIVE, "resize with AVX2, packing, collator")
    return row("C++ extension", ACTIVE, "resize, packing, collator", "no AVX2 here: the resize has equal pixels, later")


def _threads() -> dict:
    import torch

    cores, threads, asked = machine.cores(), torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    uses = f"{threads} threads of torch on {cores} cores"
    why = f"OMP_NUM_THREADS={asked}" if asked else ""
    if threads > cores:
        why = f"{why}{', ' * bool(why)}more threads than cores that this process may use wait for each other"
        return row("CPU threads", FALLS_BACK, uses, why, f"export OMP_NUM_THREADS={cores}")
    return row("CPU threads", ACTIVE, uses, why)


def _memory() -> dict:
    total, free = machine.memory()
    return row("memory", ACTIVE, f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free")


def _disks() -> list[dict]:
    """Space in the current folder, and for what Triton compiles."""
    rows, cache = [row("disk", ACTIVE, f"{machine.free_disk('.') / 2**30:.1f} GiB free here")], machine.triton_cache()
    if installed("triton"):
        there = next(folder for folder in (cache, *cache.parents) if folder.exists())
        if os.access(there, os.W_OK):
            rows.append(row("Triton's cache", ACTIVE, f"{machine.free_disk(cache) / 2**30:.1f} GiB free in {cache}"))
        else:
            why = f"{cache} cannot be written"
            rows.append(row("Triton's cache", MISSING, "-", why, "export TRITON_CACHE_DIR=FOLDER"))
    return rows


def compute_rows(faults: dict[str, str]) -> list[dict]:
    """Kernels, attention and image decoders."""
    import torch

    gpu = torch.cuda.is_available()
    reference = "the torch reference of each kernel"
    if faults.get("triton"):
        again = "pip install --force-reinstall triton"
        triton = row("Triton kernels", FALLS_BACK, reference, f"{version_of('triton')}: {faults['triton']}", again)
    elif not installed("triton"):
        triton = row("Triton kernels", FALLS_BACK, reference, "triton is missing", pip("gpu"))
    elif not gpu:
        triton = row(
            "Triton kernels", FALLS_BACK, reference, f"no GPU; {version_of('triton')} is here to be interpreted"
        )
    elif os.environ.get("TRITON_INTERPRET") == "1":
        triton = row("Triton kernels", FALLS_BACK, reference, "TRITON_INTERPRET=1 is set", "unset TRITON_INTERPRET")
    else:
        triton = row("Triton kernels", ACTIVE, version_of("triton"))
    graphs = row("decode steps", ACTIVE, "captured as CUDA graphs")
    if not gpu:
        graphs = row("decode steps", FALLS_BACK, "launched one by one", "no GPU to capture CUDA graphs for")
    return [triton, _attention(gpu, faults), graphs, *_decoders(faults)]


def _attention(gpu: bool, faults: dict[str, str]) -> dict:
    import torch

    from medmax_fast.model.attention import available

    impl, name = available(torch.device("cuda" if gpu else "cpu"), torch.bfloat16), "packed attention"
    modules = {"flash_attn_3": "flash_attn_interface", "flash_attn": "flash_attn"}
    if error := faults.get(modules.get(impl, "")):
        return row(name, MISSING, "-", f"{version_of(modules[impl])}: {error}", f"pip uninstall {modules[impl]}")
    if impl in modules:
        return row(name, ACTIVE, version_of(modules[impl]))
    if impl == "torch_varlen":
        why = "flash-attn is not installed, and not needed"
        return row(name, ACTIVE, "torch.nn.attention.varlen", why)
    uses = "scaled dot-product attention, sequence by sequence"
    if gpu:
        return row(name, FALLS_BACK, uses, "torch before 2.10 and no flash-attn", "pip install -U torch")
    return row(name, FALLS_BACK, uses, "no GPU")


def _decoders(faults: dict[str, str]) -> list[dict]:
    """Of images: nvImageCodec with DALI's decoders on the CPU, and nvJPEG on the GPU."""
    from medmax_fast.data import dali

    rows, error = [], faults.get("nvidia.nvimgcodec")
    for device, name in (("cpu", "DALI decoders"), ("mixed", "nvJPEG (--fast)")):
        problem = error or dali.available(device)
        why, _, install = problem.partition(": pip")
        if not problem:
            rows.append(row(name, ACTIVE, "nvImageCodec, with Pillow's pixels" if device == "cpu" else "nvImageCodec"))
        else:
            rows.append(row(name, FALLS_BACK, "Pillow", why, f"pip{install}" if install else ""))
    return rows
