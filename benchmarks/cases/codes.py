"""The kernels from latents to ids: nearest code, codes to vocabulary ids and back, images into a buffer of ids.

Shapes: N latents of D channels against K codes.
"""

import functools

import torch
from torch.nn import functional as F

from benchmarks.cases.case import PLAIN, REFERENCE, Case, Draw, Form, Quality, Work, exactly, name_of, own_first
from medmax_fast.kernels import vq
from medmax_fast.kernels.remap import codes_to_ids, ids_to_codes, write_image_spans
from medmax_fast.vocab import IMAGE_CODES, IMAGE_IDS

PUBLISHED = "published"
# Of Chameleon's vocabulary.
NUM_CODES, IMAGE_START, EOI, BOI = 8192, 4, 8196, 8197

# Latents, codes, channels. On a GPU 64 images.
VQ_SIZES = {"gpu": (64 * IMAGE_CODES, NUM_CODES, 256), "cpu": (IMAGE_CODES, NUM_CODES, 256), "quick": (40, 64, 24)}


def vq_cases(name: str) -> list[Case]:
    """Two kinds of latents: codes under noise, which any product tells apart, and independent normal ones, whose
    nearest codes crowd together (the share that the screen leaves undecided shows)."""
    N, K, D = VQ_SIZES[name]
    moved, images = 4 * (N + K) * D + 8 * N, (N / IMAGE_CODES, "images")
    return [
        Case(
            "vq",
            f"{N}x{K}x{D} float32, {kind}",
            moved,
            2.0 * N * K * D,
            functools.partial(vq_work, size=(N, K, D), noisy=noisy),
            images,
            whole=4.0 * N * K,
        )
        for kind, noisy in (("codes with noise", True), ("independent latents", False))
    ]


def vq_work(draw: Draw, size: tuple[int, int, int], noisy: bool) -> Work:
    N, K, D = size
    z, e = draw.normal(N, D), draw.normal(K, D)
    if noisy:
        z = e[draw.integers(0, K, N)] + 0.8 * z

    def published() -> torch.Tensor:
        # The form of the taming-transformers quantizer: the whole N x K matrix, several times over.
        distance = z.pow(2).sum(dim=1, keepdim=True) + e.pow(2).sum(dim=1)
        return (distance - 2 * torch.einsum("nd,kd->nk", z, e)).argmin(dim=1)

    def ours(id_offset: int = 0) -> torch.Tensor:
        return vq.nearest_code(z, e, id_offset=id_offset, impl=draw.impl)

    ids, remapped = f"{draw.ours}, ids", f"{draw.ours}, then remap"
    others = {
        ids: Form(lambda: ours(IMAGE_START), own=True),
        remapped: Form(lambda: codes_to_ids(ours(), IMAGE_START, K, impl=draw.impl), own=True),
        REFERENCE: lambda: vq.nearest_code(z, e, impl="torch"),
        PUBLISHED: published,
        "torch.cdist": lambda: torch.cdist(z, e).argmin(dim=1),
    }
    best = functools.cache(lambda: nearest_exactly(z, e))

    @functools.cache
    def search() -> tuple[torch.Tensor, float | None]:
        """Codes of the kernels' own search without the screen, and the share that it decides with it."""
        if draw.impl == "torch":
            return best()[0], None
        undecided = int(vq._nearest_code_triton(z, e, 0)[1]) / N
        return vq._nearest_code_triton(z, e, 0, screen=False)[0], undecided

    def judge(work: Work, name: str, found: torch.Tensor) -> Quality:
        codes = found - (IMAGE_START if name in (ids, remapped) else 0)
        (exact, tie), (searched, undecided) = best(), search()
        differing = int((codes != searched).sum())
        if work.forms[name].own:
            assert not ((codes != exact) & ~tie).any(), f"{name}: codes differ beyond near ties"
            assert draw.impl == "torch" or differing == 0, f"{name}: {differing} codes are not those of the search"
        quality = {"codes_differing": differing, "near_ties": int(tie.sum())}
        return quality | ({"undecided": undecided} if work.forms[name].own and undecided is not None else {})

    return Work(own_first(draw, ours, others), PUBLISHED, judge)


def nearest_exactly(z: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64: nearest codes, int64 [N], and where forms may differ, as the best two agree to 1e-5, bool [N]."""
    e, codes, ties = e.double(), [], []
    for part in z.double().split(IMAGE_CODES):
        distance = part.pow(2).sum(dim=1, keepdim=True) + e.pow(2).sum(dim=1) - 2 * part @ e.t()
        best = distance.topk(2, largest=False)
        codes.append(best.indices[:, 0])
        ties.append(best.values[:, 1] - best.values[:, 0] < 1e-5 * best.values[:, 1])
    return torch.cat(codes), torch.cat(ties)


# Ids converted, and images written into a buffer; on a GPU far more than its L2 cache holds.
REMAP_SIZES = {"gpu": (1 << 26, 1 << 15), "cpu": (1 << 20, 1 << 9), "quick": (1500, 2)}


def remap_cases(name: str) -> list[Case]:
    size, images = REMAP_SIZES[name]
    pairs = [(torch.int64, torch.int64, False), (torch.uint16, torch.int64, False), (torch.int64, torch.uint16, True)]
    cases = [
        Case(
            "remap",
            f"{size} {'ids to codes' if back else 'codes to ids'}, {name_of(given)} to {name_of(made)}",
            size * (given.itemsize + made.itemsize),
            0.0,
            functools.partial(shift_work, size=size, given=given, made=made, back=back),
        )
        for given, made, back in pairs
    ]
    # Codes are uint16 and ids int64; a start for each.
    moved = images * (2 * IMAGE_CODES + 8 * IMAGE_IDS + 8)
    shape = f"{images} images into a buffer, uint16 to int64"
    return [*cases, Case("remap", shape, moved, 0.0, functools.partial(span_work, images=images), (images, "images"))]


def shift_work(draw: Draw, size: int, given: torch.dtype, made: torch.dtype, back: bool) -> Work:
    low, convert = (IMAGE_START, ids_to_codes) if back else (0, codes_to_ids)
    values = draw.integers(low, low + NUM_CODES, size, dtype=given)
    shift = -IMAGE_START if back else IMAGE_START

    def form(impl: str) -> torch.Tensor:
        return convert(values, IMAGE_START, NUM_CODES, dtype=made, impl=impl)

    judge = exactly(lambda: (values.int() + shift).to(made))
    others = {REFERENCE: functools.partial(form, "torch")}
    return Work(own_first(draw, functools.partial(form, draw.impl), others), REFERENCE, judge)


def span_work(draw: Draw, images: int) -> Work:
    codes = draw.integers(0, NUM_CODES, images, IMAGE_CODES, dtype=torch.uint16)
    # Between images lie other ids, which nobody may touch.
    starts = torch.arange(images, device=draw.device) * (IMAGE_IDS + 7) + 3
    buffer = torch.empty(images * (IMAGE_IDS + 7), dtype=torch.int64, device=draw.device)

    def ours() -> torch.Tensor:
        return write_image_spans(buffer, starts, codes, BOI, EOI, IMAGE_START, NUM_CODES, impl=draw.impl)

    def plain() -> torch.Tensor:
        wide = codes.long()
        if bool(((wide < 0) | (wide >= NUM_CODES)).any() | ((starts < 0) | (starts > len(buffer) - IMAGE_IDS)).any()):
            raise ValueError("a code or a start out of range")
        spans = F.pad(wide + IMAGE_START, (1, 1))
        spans[:, 0], spans[:, -1] = BOI, EOI
        buffer[starts[:, None] + torch.arange(IMAGE_IDS, device=starts.device)] = spans
        return buffer

    def expected() -> torch.Tensor:
        rows = torch.full((images, IMAGE_IDS + 7), -1, device=draw.device)
        rows[:, 3], rows[:, IMAGE_IDS + 2] = BOI, EOI
        rows[:, 4 : IMAGE_IDS + 2] = codes.long() + IMAGE_START
        return rows.flatten()

    return Work(own_first(draw, ours, {PLAIN: plain}), PLAIN, exactly(expected), lambda: buffer.fill_(-1))
