"""Fixtures shared by all tests; Triton runs in its interpreter wherever there is no GPU."""

import json
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# Must be set before triton is first imported.
if not _has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items) -> None:
    """Tests marked gpu are left out where there is none."""
    if not _has_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The reference's inputs and answers: the shared folder beside a checkout, or the copy in the tree."""
    for folder in (ROOT.parent / "shared" / "golden", ROOT / "tests" / "golden"):
        if (folder / "image_codes.json").exists():
            return folder
    pytest.fail("no golden data: expected tests/golden or ../shared/golden")


@pytest.fixture(scope="session")
def cases(golden):
    """(request, expected new ids) of every prompt of generation.json."""
    from medmax_fast.generate.requests import Request

    names = {
        "max_gen_len": "max_new_tokens",
        "max_seq_len": "max_length",
        "guidance_scale_text": "guidance_text",
        "guidance_scale_image": "guidance_image",
    }
    found = []
    for case in json.loads((golden / "generation.json").read_text()):
        options = {names.get(name, name): value for name, value in case["options"].items()}
        for i, (prompt, expected) in enumerate(zip(case["prompt_ids"], case["generated"], strict=True)):
            found.append((Request(f"{case['name']}-{i}", token_ids=prompt, **options), expected))
    assert len(found) == 9
    return found


@pytest.fixture()
def golden_checkpoint(golden, tmp_path) -> Path:
    """A writable copy of the golden checkpoint, for tests that damage it."""
    target = tmp_path / "checkpoint"
    shutil.copytree(golden / "checkpoint", target)
    for path in target.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    target.chmod(0o755)
    return target


@pytest.fixture(scope="session")
def hf(golden, tmp_path_factory) -> Path:
    """The golden checkpoint in the Hugging Face layout; not to be changed."""
    from medmax_fast.model.checkpoint import open_checkpoint
    from medmax_fast.model.convert import write_checkpoint

    folder = tmp_path_factory.mktemp("golden") / "hf"
    write_checkpoint(open_checkpoint(golden / "checkpoint"), folder, "hf")
    return folder


@pytest.fixture()
def bf16_to_nearest(monkeypatch):
    """Triton's interpreter cuts fp32 to bf16; with this it rounds to nearest, as a GPU does."""
    from medmax_fast.kernels.launch import INTERPRETED

    if not INTERPRETED:
        return
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        return torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
