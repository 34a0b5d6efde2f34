"""Nearest code: the published distance-matrix form, torch.cdist and ours, timed in turn in one run.

    python benchmarks/bench_vq.py [--images 1,8] [--device auto] [--repeats 9] [--output FILE.json]

A row gives milliseconds (20th, 50th, 80th percentile), the rate of the 2 N K D product, memory beyond the inputs
(GPU only) and how many codes differ from the reference. No row is printed for a kernel of ours whose codes differ
other than at near ties. On a CPU only the torch forms run: the Triton kernel needs a GPU.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

from medmax_fast.kernels import vq
from medmax_fast.runtime import versions

LATENTS, CODES, CHANNELS = 1024, 8192, 256


def published(z_ND, e_KD):
    """The form of the taming-transformers quantizer: the whole N x K matrix, several times over."""
    distance = z_ND.pow(2).sum(dim=1, keepdim=True) + e_KD.pow(2).sum(dim=1)
    return (distance - 2 * torch.einsum("nd,kd->nk", z_ND, e_KD)).argmin(dim=1)


def cdist(z_ND, e_KD):
    return torch.cdist(z_ND, e_KD).argmin(dim=1)


def near_ties(z_ND, e_KD):
    """Latents whose two best distances agree to 1e-5, as the golden data counts them."""
    ties = torch.zeros(len(z_ND), dtype=torch.bool, device=z_ND.device)
    norm_K = e_KD.double().pow(2).sum(1)
    for start in range(0, len(z_ND), LATENTS):
        z = z_ND[start : start + LATENTS].double()
        best = (z.pow(2).sum(1, keepdim=True) + norm_K - 2 * z @ e_KD.double().t()).topk(2, largest=False).values
        ties[start : start + LATENTS] = best[:, 1] - best[:, 0] < 1e-5 * best[:, 1]
    return ties


def timed(form, z_ND, e_KD):
    """(codes, seconds, bytes allocated beyond what was there)."""
    if not z_ND.is_cuda:
        start = time.perf_counter()
        return form(z_ND, e_KD), time.perf_counter() - start, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    codes = form(z_ND, e_KD)
    torch.cuda.synchronize()
    return codes, time.perf_counter() - start, torch.cuda.max_memory_allocated() - before


def measure(images, device, repeats):
    generator = torch.Generator().manual_seed(images)
    e_KD = torch.randn(CODES, CHANNELS, generator=generator).to(device)
    pick = torch.randint(CODES, (images * LATENTS,), generator=generator).to(device)
    noise = torch.randn(images * LATENTS, CHANNELS, generator=generator).to(device)
    z_ND = e_KD[pick] + 0.8 * noise
    forms = {"published": published, "cdist": cdist, "torch": vq.nearest_code_ref}
    if device.type == "cuda":
        forms["triton"] = lambda z, e: vq.nearest_code(z, e, impl="triton")
    expected = vq.nearest_code_ref(z_ND, e_KD)
    apart = ~near_ties(z_ND, e_KD)
    differ = {name: int((form(z_ND, e_KD) != expected).sum()) for name, form in forms.items()}
    if "triton" in forms and (forms["triton"](z_ND, e_KD) != expected)[apart].any():
        sys.exit("bench_vq: the Triton kernel's codes differ from the reference's; no speed is given")
    seconds, memory = {name: [] for name in forms}, {}
    # In turn, so that a slow moment of the machine falls on all of them.
    for _ in range(repeats):
        for name, form in forms.items():
            _, elapsed, memory[name] = timed(form, z_ND, e_KD)
            seconds[name].append(elapsed)
    for name in forms:
        low, middle, high = torch.tensor(seconds[name]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        yield {
            "form": name,
            "shape": f"{images * LATENTS}x{CODES}x{CHANNELS}",
            "ms_p20_p50_p80": [round(1e3 * t, 3) for t in (low, middle, high)],
            "gflop_per_s": round(2e-9 * images * LATENTS * CODES * CHANNELS / middle, 1),
            "extra_mb": None if memory[name] is None else round(memory[name] / 1e6, 1),
            "codes_differing": differ[name],
            "near_ties": int((~apart).sum()),
        }


def cpu_name():
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="", help="comma-separated batch sizes (default 1 on a CPU, 1,64 on a GPU)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", default="", help="also write the JSON here")
    args = parser.parse_args()
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    device = torch.device("cuda" if cuda else "cpu")
    batches = [int(n) for n in (args.images or ("1,64" if cuda else "1")).split(",")]
    if not cuda:
        print("no GPU: torch forms only, the Triton kernel is not timed")
    print(f"{'form':<10} {'shape':<16} {'ms p20/p50/p80':<26} {'GFLOP/s':>9} {'extra MB':>9} {'differ':>7} {'ties':>5}")
    rows = []
    for images in batches:
        for row in measure(images, device, args.repeats):
            rows.append(row)
            times = "/".join(str(t) for t in row["ms_p20_p50_p80"])
            print(f"{row['form']:<10} {row['shape']:<16} {times:<26} {row['gflop_per_s']:>9}", end="")
            print(f" {row['extra_mb'] or '-':>9} {row['codes_differing']:>7} {row['near_ties']:>5}")
    hardware = torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {torch.get_num_threads()} threads"
    result = json.dumps({"benchmark": "vq", "hardware": hardware, "versions": versions(), "rows": rows})
    if args.output:
        Path(args.output).write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
