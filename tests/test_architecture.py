"""The import directions of the package, read from the sources: whoever adds an import the wrong way learns it here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "medmax_fast"

# Layers from the bottom; a module may import from its own layer's row and from lower ones as listed.
ALLOWED = {
    "vocab": set(),
    "config": set(),
    "runtime": set(),
    "progress": {"runtime"},
    "files": {"progress", "runtime"},
    "kernels": set(),
    "interruption": set(),
    "data": {"data", "_csrc"},
    "model": {"model", "kernels"},
    "generate": {"generate", "data", "model", "kernels"},
    "figures": {"figures"},
    "page": set(),
    "pictures": {"page"},
    "encoding": {"data", "model"},
    "tokenization": {"encoding", "data", "model"},
    "decode": {"data", "model", "figures"},
    "score": {"data", "model"},
    "training": {"training", "data", "model", "figures"},
    "train": {"training", "data", "model", "figures"},
    "eval": {"eval", "generate", "data", "model", "page", "pictures", "figures"},
    "serving": {"serving", "generate", "data", "model"},
    "demo": {"demo", "serving", "generate", "data", "model"},
    "inspection": {"data", "model", "figures"},
    "report": {"bench", "eval", "data", "page", "pictures", "figures", "inspection"},
    "bench": {"bench", "page", "figures"},
    "doctor": {"doctor", "data", "model", "kernels", "_csrc"},
}
BASE = {"vocab", "config", "runtime", "progress", "files"}
# Imported in one place each, where they are used.
SINGLE = {
    "flash_attn": 1,
    "flash_attn_interface": 1,
    "bitsandbytes": 1,
    "deepspeed": 1,
    "gradio": 1,
    "httpx": 1,
    "nvidia": 1,
    "matplotlib": 1,
    "markdown_it": 1,
    "open_clip": 1,
    "pydicom": 1,
    "rouge_score": 1,
    "sacrebleu": 1,
    "starlette": 1,
    "tensorboard": 1,
    "torchao": 1,
    "torchmetrics": 1,
    "uvicorn": 1,
    "wandb": 1,
}


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [p for p in PACKAGE.rglob("*.py") if part(p) not in ("__init__", "__main__", "cli")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = part(path)
    assert own in ALLOWED, f"{own}: give the new module its place in ALLOWED"
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] == "medmax_fast" and len(pieces) > 1 and pieces[1] != "__version__":
            assert pieces[1] in ALLOWED[own] | (BASE if own not in BASE else set()), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path):
    ours = tuple(f"medmax_fast.kernels.{name}" for name in ("launch", "blocks", "sums"))
    assert {name.split(".")[0] for name in imports(path) if not name.startswith(ours)} <= {"torch", "triton"}


@pytest.mark.parametrize("library", SINGLE)
def test_heavy_libraries_have_one_home(library):
    # At any place, for torch.utils.tensorboard.
    homes = {p for p in PACKAGE.rglob("*.py") for name in imports(p) if library in name.split(".")}
    assert len(homes) <= SINGLE[library], sorted(homes)


def test_house_rules():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        text = path.read_text()
        assert text.isascii(), path
        assert text.startswith('"""'), f"{path}: no module docstring"
        calls = {
            n.func.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not calls & {"eval", "exec"}, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or (
                    isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
                )
                assert not broad, f"{path}:{node.lineno}: catches everything"
