"""Tensor files: what is written is what torch and safetensors write and read, and nothing unsound is read."""

import hashlib
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medmax_fast.model.file_writers import SafetensorsWriter, TorchWriter, write_checklist
from medmax_fast.model.files import CHECKLIST, SafetensorsFile, TorchFile, check_files, load_pickle
from medmax_fast.runtime import InputError

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SIZES = [(), (0,), (1,), (3, 0, 2), (7,), (64,), (5, 3), (2, 3, 4), (33, 65)]
# As tensors come out of slices, transposes and expansions.
FORMS = {
    "whole": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "channels last": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1) if t.dim() == 3 else t,
    "slice": lambda t: torch.stack([t + 1, t])[1],
    "every other": lambda t: torch.stack([t, t + 1], -1)[..., 0] if t.numel() > 1 else t,
    "expanded": lambda t: t[:1].expand(4, *t.shape[1:]) if t.numel() > 1 else t.expand(3, *t.shape),
}


def described(tensors: dict) -> dict:
    """What a writer is told: sizes and dtypes without values."""
    return {n: t if t is None else torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in tensors.items()}


def plain(tensor):
    """With a storage of its own, as a file holds it."""
    return tensor if tensor is None else tensor.clone(memory_format=torch.contiguous_format)


@st.composite
def states(draw, nothing: bool) -> dict:
    """A dict of tensors in several forms; with `nothing`, None among them."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    state = {}
    for i in range(draw(st.integers(1, 8))):
        tensor = torch.randn(draw(st.sampled_from(SIZES))).to(draw(st.sampled_from(DTYPES)))
        form = FORMS[draw(st.sampled_from(sorted(FORMS)))]
        state[f"layers.{i}.weight"] = None if nothing and draw(st.integers(0, 4)) == 0 else form(tensor)
    return state


@settings(max_examples=60, deadline=None)
@given(state=states(nothing=True), inside=st.sampled_from(["", "state_dict"]))
def test_torch_writer_equals_torch_save_byte_for_byte(tmp_path_factory, state, inside):
    folder = tmp_path_factory.mktemp("torch")
    # A torch file begins with its own name.
    ours, theirs = folder / "ours" / "consolidated.00.pth", folder / "theirs" / "consolidated.00.pth"
    for path in (ours, theirs):
        path.parent.mkdir()
    with TorchWriter(ours, described(state), inside) as writer:
        for tensor in state.values():
            if tensor is not None:
                writer.write(tensor)
    expected = {name: plain(tensor) for name, tensor in state.items()}
    torch.save({inside: expected} if inside else expected, theirs)
    assert ours.read_bytes() == theirs.read_bytes()
    file = TorchFile(ours, inside)
    assert file.names() == [name for name, tensor in expected.items() if tensor is not None]
    for name in file.names():
        like = file.meta(name)
        assert (like.dtype, like.shape, like.device.type) == (expected[name].dtype, expected[name].shape, "meta")
        assert torch.equal(file.tensor(name), expected[name])


def test_torch_writer_with_a_description_that_has_strides(tmp_path):
    tensor = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    with TorchWriter(tmp_path / "x.pth", {"conv": tensor.to("meta")}) as writer:
        writer.write(tensor)
    assert torch.equal(torch.load(tmp_path / "x.pth", weights_only=True)["conv"], tensor)


def test_safetensors_writer_with_a_single_element_cut_out(tmp_path):
    with SafetensorsWriter(tmp_path / "x", {"a": torch.empty(1, device="meta")}) as writer:
        writer.write(torch.ones(1, 2)[:, 0])
    assert load_file(tmp_path / "x")["a"].tolist() == [1]


@settings(max_examples=60, deadline=None)
@given(state=states(nothing=False))
def test_safetensors_reads_what_the_writer_wrote(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("safe") / "model.safetensors"
    with SafetensorsWriter(path, described(state)) as writer:
        for tensor in state.values():
            writer.write(tensor)
    found, ours = load_file(path), SafetensorsFile(path)
    assert sorted(found) == sorted(ours.names()) == sorted(state)
    with safe_open(path, framework="pt") as file:
        # transformers refuses a file that does not say this.
        assert file.metadata()["format"] == "pt"
    content = path.read_bytes()
    assert ours.verify() == hashlib.md5(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    for name, tensor in state.items():
        assert found[name].dtype == ours.meta(name).dtype == tensor.dtype
        assert torch.equal(found[name], tensor) and torch.equal(ours.tensor(name), tensor), name
        assert ours.meta(name).shape == tensor.shape
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("writer", ["TorchWriter", "SafetensorsWriter"])
def test_interpreter_survives_a_writer_left_by_an_exception(tmp_path, writer):
    code = f"""
        import torch
        from medmax_fast.model.file_writers import {writer}

        meta = {{name: torch.empty(1000, device="meta") for name in "ab"}}
        try:
            with {writer}("{tmp_path}/file", meta) as writer:
                writer.write(torch.ones(1000))
                raise OSError("no space left")
        except OSError as error:
            print("caught", error, flush=True)
        # Too few tensors, and a wrong one.
        for size in (1000, 999):
            try:
                with {writer}("{tmp_path}/file", meta) as writer:
                    writer.write(torch.ones(size))
            except AssertionError:
                print("asserted", size, flush=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "caught no space left\nasserted 1000\nasserted 999\n"), done.stderr


class Touch:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def write_truncated(path, share, size=50_000):
    torch.save({"a": torch.randn(size), "b": torch.randn(size)}, path)
    os.truncate(path, int(path.stat().st_size * share))


UNSOUND = {
    "code": lambda p: torch.save({"a": torch.ones(2), "b": Touch(p.with_name("ran"))}, p),
    "bare pickle": lambda p: p.write_bytes(pickle.dumps({"b": Touch(p.with_name("ran"))})),
    "legacy": lambda p: torch.save({"a": torch.ones(2)}, p, _use_new_zipfile_serialization=False),
    "half": lambda p: write_truncated(p, 0.5),
    "nearly whole": lambda p: write_truncated(p, 0.999),
    "half of a small one": lambda p: write_truncated(p, 0.5, 1000),
    "empty": lambda p: p.write_bytes(b""),
    "list": lambda p: torch.save([torch.ones(2)], p),
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_unsound_files_are_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "x.pth"
    UNSOUND[kind](path)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: (cannot be read|holds a list)") as raised:
        load_pickle(path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_the_malicious_files_above_would_run(tmp_path):
    for kind in ("code", "bare pickle"):
        UNSOUND[kind](tmp_path / "x.pth")
        if kind == "code":
            torch.load(tmp_path / "x.pth", weights_only=False)["b"].close()
        else:
            pickle.loads((tmp_path / "x.pth").read_bytes())["b"].close()
        (tmp_path / "ran").unlink()


def test_a_missing_file_is_called_missing(tmp_path):
    with pytest.raises(InputError) as raised:
        load_pickle(tmp_path / "x.pth")
    assert str(raised.value) == f"{tmp_path / 'x.pth'}: no such file"


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_safetensors_of_other_than_floats_are_refused(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    save_file({"weight": torch.ones(2), "odd": torch.ones(2).to(dtype)}, path)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: tensor odd has dtype .*, expected one of F64"):
        SafetensorsFile(path)


def test_torch_files_of_other_than_floats_are_refused(tmp_path):
    torch.save({"weight": torch.ones(2, dtype=torch.int8)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="tensor weight has dtype torch.int8"):
        TorchFile(tmp_path / "x.pth").tensor("weight")


def test_checklist_names_what_is_damaged_or_missing(tmp_path):
    contents = {"a.pth": b"a" * 5000, "b.json": b"{}"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    write_checklist(tmp_path)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    assert (tmp_path / CHECKLIST).read_text() == "".join(f"{sums[name]}  {name}\n" for name in contents)
    assert check_files(tmp_path) == {tmp_path / name: value for name, value in sums.items()}
    assert check_files(tmp_path, up_to_bytes=100) == {tmp_path / "b.json": sums["b.json"]}

    (tmp_path / "a.pth").write_bytes(b"a" * 4999 + b"b")
    with pytest.raises(InputError, match=f"a.pth: md5 [0-9a-f]{{32}}, expected {sums['a.pth']}"):
        check_files(tmp_path)
    check_files(tmp_path, up_to_bytes=4999)
    (tmp_path / "a.pth").unlink()
    with pytest.raises(InputError, match="a.pth: missing, .*checklist.chk lists it"):
        check_files(tmp_path, up_to_bytes=100)
    # md5sum's mark of binary files; and no list at all.
    (tmp_path / CHECKLIST).write_text(f"{sums['b.json']} *b.json\n")
    assert list(check_files(tmp_path)) == [tmp_path / "b.json"]
    (tmp_path / CHECKLIST).unlink()
    assert check_files(tmp_path) == {}


def resident_file_bytes() -> int:
    return 1024 * int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux says what is resident")
@pytest.mark.parametrize("kind", [TorchFile, SafetensorsFile])
def test_release_gives_pages_back(tmp_path, kind):
    size = 64 << 20
    tensors = {"a": torch.ones(size // 8), "b": torch.ones(size // 8)}
    (save_file if kind is SafetensorsFile else torch.save)(tensors, tmp_path / "x")
    file = kind(tmp_path / "x")
    before = resident_file_bytes()
    assert all(file.tensor(name).sum() == size // 8 for name in tensors)
    assert resident_file_bytes() - before > 0.9 * size
    file.release()
    assert resident_file_bytes() - before < 0.1 * size
    assert file.tensor("b")[-1] == 1


def test_checksum_of_a_safetensors_file_travels_in_it(tmp_path):
    path, tensor = tmp_path / "x.safetensors", torch.randn(100)
    with SafetensorsWriter(path, {"a": tensor.to("meta")}) as writer:
        writer.write(tensor)
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"damaged.safetensors: md5 of the tensors \w{32}, its header says \w{32}"):
        SafetensorsFile(tmp_path / "damaged.safetensors").verify()
    # Written anew by others, it is another file, and no damage.
    save_file({"a": tensor + 1}, path, metadata={"format": "pt"})
    assert SafetensorsFile(path).verify() is None
