"""Nearest code: the published distance-matrix form, torch.cdist and ours; on a GPU the Triton kernels as well.

Two kinds of latents at the sizes of the real model: codes under noise, which any product tells apart, and independent
normal ones, whose nearest codes crowd together (the share that the screen leaves undecided shows). A row carries the
rate of the 2 N K D product, the memory beyond the inputs as MB and as a share of the N x K distances (GPU only), how
many codes differ from the fp32 argmin (on a GPU the kernels' own search alone, else the torch reference), and how many
latents are near ties (best two distances within 1e-5 in fp64), where forms may differ.
"""

from collections.abc import Callable

import torch

from benchmarks.harness import parse_arguments, report, timed
from medmax_fast.kernels import vq

LATENTS, CODES, CHANNELS = 1024, 8192, 256


def published(z_ND: torch.Tensor, e_KD: torch.Tensor) -> torch.Tensor:
    """The form of the taming-transformers quantizer: the whole N x K matrix, several times over."""
    distance = z_ND.pow(2).sum(dim=1, keepdim=True) + e_KD.pow(2).sum(dim=1)
    return (distance - 2 * torch.einsum("nd,kd->nk", z_ND, e_KD)).argmin(dim=1)


def cdist(z_ND: torch.Tensor, e_KD: torch.Tensor) -> torch.Tensor:
    return torch.cdist(z_ND, e_KD).argmin(dim=1)


def make(kind: str, latents: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [latents, D] of one kind, and the codebook [K, D]."""
    generator = torch.Generator().manual_seed(latents)
    e_KD = torch.randn(CODES, CHANNELS, generator=generator)
    z_ND = torch.randn(latents, CHANNELS, generator=generator)
    if kind == "noisy":
        z_ND = e_KD[torch.randint(CODES, (latents,), generator=generator)] + 0.8 * z_ND
    return z_ND.to(device), e_KD.to(device)


def near_ties(z_ND: torch.Tensor, e_KD: torch.Tensor) -> torch.Tensor:
    """Latents whose two best distances agree to 1e-5, as the golden data counts them; bool [N]."""
    e_KD = e_KD.double()
    parts = []
    for z in z_ND.double().split(LATENTS):
        distance = z.pow(2).sum(dim=1, keepdim=True) + e_KD.pow(2).sum(dim=1) - 2 * z @ e_KD.t()
        best = distance.topk(2, largest=False).values
        parts.append(best[:, 1] - best[:, 0] < 1e-5 * best[:, 1])
    return torch.cat(parts)


def extra_bytes(work: Callable[[], object]) -> int:
    """Most bytes that `work` holds on the GPU beyond what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(kind: str, latents: int, device: str, repeats: int) -> list[dict]:
    """One row per form; fails if one of ours is wrong beyond near ties, and the kernels if they are wrong at all."""
    z_ND, e_KD = make(kind, latents, device)
    cuda = device == "cuda"
    forms = {"published": published, "cdist": cdist, "torch": vq.nearest_code_ref}
    expected, undecided = vq.nearest_code_ref(z_ND, e_KD), None
    if cuda:
        forms["triton"] = vq.nearest_code
        expected = vq._nearest_code_triton(z_ND, e_KD, 0, screen=False)[0]
        undecided = int(vq._nearest_code_triton(z_ND, e_KD, 0)[1]) / latents
    ties = near_ties(z_ND, e_KD)
    rows = []
    for name, form in forms.items():
        wrong = form(z_ND, e_KD) != expected
        assert name != "torch" or not (wrong & ~ties).any(), "the torch reference differs beyond near ties"
        assert name != "triton" or not wrong.any(), "the screened codes differ from the search's"

        def work(form=form):
            form(z_ND, e_KD)
            if cuda:
                torch.cuda.synchronize()

        seconds = timed(work, repeats)
        extra = extra_bytes(work) if cuda else None
        rows.append(
            {
                "form": name,
                "latents": kind,
                "shape": f"{latents}x{CODES}x{CHANNELS}",
                **seconds,
                "gflop_per_s": 2e-9 * latents * CODES * CHANNELS / seconds["p50_s"],
                "extra_mb": None if extra is None else extra / 1e6,
                "share_of_matrix": None if extra is None else extra / (4 * latents * CODES),
                "codes_differing": int(wrong.sum()),
                "near_ties": int(ties.sum()),
                "undecided": undecided if name == "triton" else None,
            }
        )
    return rows


def main() -> None:
    arguments = parse_arguments("nearest code: time, memory, differing codes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("no GPU: torch forms only, the Triton kernels are not timed")
    sizes = [LATENTS // 4] if arguments.quick else [LATENTS, 64 * LATENTS] if device == "cuda" else [LATENTS]
    repeats = 3 if arguments.quick else 9
    rows = [row for kind in ("noisy", "normal") for n in sizes for row in measure(kind, n, device, repeats)]
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    report("vq", rows, arguments.output, device=name, matmul_precision=torch.get_float32_matmul_precision())


if __name__ == "__main__":
    main()
