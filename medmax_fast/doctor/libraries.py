"""Optional libraries: which are there, which cannot be imported, what serves in place of the others."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

ACTIVE, FALLS_BACK, MISSING = "active", "falls back", "missing"


@dataclass(frozen=True)
class Library:
    """Optional libraries of one purpose.

    extra: of this package; none for what it always needs. without: what happens if one is missing; with `instead`,
    something else serves then. tried: imported, since it may be built for another torch or driver than is installed.
    """

    component: str
    modules: tuple[str, ...]
    extra: str
    without: str
    instead: str = ""
    tried: bool = False


LIBRARIES = (
    Library("models and tokenizers", ("transformers",), "", "", tried=True),
    Library("DICOM", ("pydicom",), "dicom", "DICOM files are rejected"),
    Library("training", ("deepspeed", "peft"), "train", "train refuses", tried=True),
    Library("8-bit optimizer", ("bitsandbytes",), "8bit", "--optimizer adamw8bit refuses", tried=True),
    Library("8-bit weights", ("torchao",), "quant", "--quantize refuses", tried=True),
    Library("tracking", ("tensorboard", "wandb"), "track", "--track refuses what is missing"),
    Library("servers and judges", ("httpx",), "eval", "eval asks no server and no judge"),
    Library("BLEU and ROUGE", ("sacrebleu", "rouge_score"), "eval", "eval leaves these metrics out"),
    Library("BiomedCLIP", ("open_clip",), "eval", "", "CLIP and SigLIP models of transformers", tried=True),
    Library("FID and KID", ("torchmetrics",), "eval", "--fid refuses", tried=True),
    Library("API server", ("starlette", "uvicorn"), "serve", "serve refuses"),
    Library("demo", ("gradio",), "demo", "demo refuses"),
)
# Imported too where they are installed: other libraries use them unasked.
BESIDE = ("triton", "nvidia.nvimgcodec", "flash_attn", "flash_attn_interface", "torchvision")
PACKAGES = {"open_clip": "open_clip_torch", "flash_attn_interface": "flash_attn_3"}


def library_rows(faults: dict[str, str]) -> list[dict]:
    """A row for each purpose. faults: why an import failed, by module."""
    return [*(_library(library, faults) for library in LIBRARIES), *_torchvision(faults)]


def to_import() -> list[str]:
    """Installed modules of which only an import tells whether they work."""
    return [name for name in (*BESIDE, *_tried()) if installed(name)]


def row(component: str, state: str, uses: str, why: str = "", install: str = "") -> dict:
    return {"component": component, "state": state, "uses": uses, "why": why, "install": install}


def installed(module: str) -> bool:
    """Whether there is such a module, which is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _tried() -> Iterator[str]:
    for library in LIBRARIES:
        yield from library.modules if library.tried else ()


def version_of(module: str) -> str:
    """Of a module's package, after its name."""
    try:
        return f"{module} {metadata.version(PACKAGES.get(module, module.partition('.')[0]))}"
    except metadata.PackageNotFoundError:
        return module


def _library(library: Library, faults: dict[str, str]) -> dict:
    missing = [name for name in library.modules if not installed(name)]
    broken = [f"{version_of(name)}: {faults[name]}" for name in library.modules if faults.get(name)]
    if not missing and not broken:
        late = library.tried and not faults.keys() >= set(library.modules)
        why = "not imported here, for want of time" if late else ""
        return row(library.component, ACTIVE, ", ".join(map(version_of, library.modules)), why)
    whys = [f"{' and '.join(missing)} not installed" if missing else "", *broken, library.without]
    install = f"pip install --force-reinstall {library.modules[0]}" if broken and not missing else pip(library.extra)
    state = FALLS_BACK if library.instead else MISSING
    return row(library.component, state, library.instead or "-", "; ".join(filter(None, whys)), install)


def _torchvision(faults: dict[str, str]) -> list[dict]:
    """A row only for one that does not fit: nothing needs it, and it breaks those that use it where it is there."""
    if not faults.get("torchvision"):
        return []
    why = f"{faults['torchvision']}; it does not fit this torch, and breaks what imports it"
    return [row(version_of("torchvision"), MISSING, "-", why, "pip install -U torch torchvision, or uninstall it")]


def pip(extra: str) -> str:
    return f"pip install 'medmax_fast[{extra}]'" if extra else "pip install medmax_fast"
