"""Reading tensor files, one tensor at a time and memory-mapped: torch's zip format, safetensors, and checksums.

Reading maps a file and hands out views of it; `release` forgets the mapping, since pages once touched stay in the
process's resident memory until then. Nothing that could run code is unpickled.
"""

import os
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from medmax_fast.files import hash_file, hash_rest, read_text, require_file
from medmax_fast.runtime import InputError

CHECKLIST = "checklist.chk"

# Entry of a safetensors header.
MD5_ENTRY = "md5"
# What weights may be stored in: safetensors' names, and the storage classes by which torch's files name them.
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


class SafetensorsFile:
    """A safetensors file; InputError if it is none, or holds other than floating-point tensors."""

    def __init__(self, path: Path):
        self.path = path
        self._file: safe_open | None = None
        file = self._open()
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        odd = next((name for name, kind in kinds.items() if kind not in SAFETENSORS_DTYPES), None)
        if odd:
            raise InputError(
                f"{path}: tensor {odd} has dtype {kinds[odd]}, expected one of {', '.join(SAFETENSORS_DTYPES)}"
            )
        self._meta = {
            name: torch.empty(file.get_slice(name).get_shape(), dtype=SAFETENSORS_DTYPES[kind], device="meta")
            for name, kind in kinds.items()
        }

    def _open(self):
        if self._file is None:
            try:
                self._file = safe_open(require_file(self.path), framework="pt")
            except SafetensorError as error:
                raise InputError(f"{self.path}: not a safetensors file ({error})") from error
        return self._file

    def names(self) -> list[str]:
        return list(self._meta)

    def meta(self, name: str) -> torch.Tensor:
        """Dtype and size of a tensor, on the meta device; KeyError if it is not there."""
        return self._meta[name]

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the mapped file; InputError if it is not there."""
        if name not in self._meta:
            raise InputError(f"{self.path}: tensor {name} is missing")
        try:
            return self._open().get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{self.path}: tensor {name} cannot be read ({error})") from error

    def release(self) -> None:
        self._file = None

    def verify(self) -> str | None:
        """The md5 of the tensors' bytes, None where the file records none; InputError if it is not as recorded.

        The record is in the file's own header, so that a program that writes the file anew leaves it out.
        """
        recorded = (self._open().metadata() or {}).get(MD5_ENTRY)
        if recorded is None:
            return None
        with open(self.path, "rb") as file:
            file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
            found = hash_rest(file, "md5")
        if found != recorded:
            raise InputError(f"{self.path}: md5 of the tensors {found}, its header says {recorded}; damaged")
        return found


class TorchFile:
    """A file of torch.save that holds a dict of tensors, at its top or under the key `inside`."""

    def __init__(self, path: Path, inside: str = ""):
        self.path = path
        self._inside = inside
        self._state: dict | None = None

    def _open(self) -> dict:
        if self._state is None:
            state = load_pickle(self.path)
            state = state.get(self._inside) if self._inside else state
            if not isinstance(state, dict):
                raise InputError(f"{self.path}: no {self._inside}, expected a dict of tensors under it")
            self._state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
            for name, value in self._state.items():
                if value.dtype not in STORAGES:
                    expected = ", ".join(str(dtype) for dtype in STORAGES)
                    raise InputError(f"{self.path}: tensor {name} has dtype {value.dtype}, expected one of {expected}")
        return self._state

    def names(self) -> list[str]:
        return list(self._open())

    def meta(self, name: str) -> torch.Tensor:
        """Dtype and size of a tensor, on the meta device; InputError if it is not there."""
        return self.tensor(name).to("meta")

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the mapped file; InputError if it is not there."""
        if name not in self._open():
            raise InputError(f"{self.path}: tensor {name} is missing")
        return self._open()[name]

    def release(self) -> None:
        self._state = None


def reason_of(error: Exception) -> str:
    """Why torch cannot load a file, without its advice to have the code in the file run."""
    lines = str(error).splitlines()
    return lines[0].partition(". In PyTorch")[0] if lines else type(error).__name__


def load_pickle(path: Path) -> dict:
    """A torch file as a dict of memory-mapped tensors, without running code; InputError if that cannot be done."""
    require_file(path)
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no archive as torch.save writes it since 1.6, or cut off")
        value = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, OSError, EOFError, KeyError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as plain tensors ({reason_of(error)}); if it is a whole but old file, load it "
            "where you trust it and torch.save its state dict"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, expected a dict of tensors")
    return value


def check_files(folder: Path, up_to_bytes: int | None = None) -> dict[Path, str]:
    """Compare files with the md5 sums in the folder's checklist.chk, if it has one; InputError names one that differs.

    up_to_bytes: leave out larger files. Gives the md5 of each file compared.
    """
    path, compared = folder / CHECKLIST, {}
    for line in read_text(path).splitlines() if path.exists() else ():
        expected, _, name = line.strip().partition(" ")
        if not name:
            continue
        file = folder / name.strip().lstrip("*")
        if not file.is_file():
            raise InputError(f"{file}: missing, {path} lists it; if it was removed on purpose, remove that line")
        if up_to_bytes is not None and file.stat().st_size > up_to_bytes:
            continue
        found = hash_file(file, "md5")
        if found != expected.lower():
            raise InputError(
                f"{file}: md5 {found}, expected {expected} ({CHECKLIST}); damaged, or changed since that was written"
            )
        compared[file] = found
    return compared


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor infinity; at the speed of reading it, unlike torch's isfinite."""
    return all(bound.isfinite() for bound in tensor.aminmax())


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in its logical order, uint8 [n]; a view where they lie so."""
    # torch calls a single element contiguous whatever its stride, which then is in the way of another dtype.
    tensor = tensor.contiguous() if tensor.numel() > 1 else tensor.clone(memory_format=torch.contiguous_format)
    return tensor.view(-1).view(torch.uint8)
