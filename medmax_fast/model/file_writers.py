"""Writing tensor files in a stream: torch's zip format, safetensors, and the checksums beside them.

Names, dtypes and sizes are declared first, as meta tensors, and then the tensors are taken in that order, so that no
more than one has to exist at a time. A file is on the disk when its writer is closed. A TorchWriter's equals that of
torch.save byte for byte.
"""

import hashlib
import io
import json
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from torch.serialization import _open_zipfile_writer

from medmax_fast.files import hash_file
from medmax_fast.model.files import CHECKLIST, MD5_ENTRY, SAFETENSORS_DTYPES, STORAGES, bytes_of
from medmax_fast.progress import progress


class SafetensorsWriter:
    """Writes a safetensors file of the tensors described by `meta`, in their order, with their md5 in the header."""

    def __init__(self, path: Path, meta: dict[str, torch.Tensor]):
        names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
        # As long as the sum that takes its place at the end.
        header: dict[str, dict] = {"__metadata__": {"format": "pt", MD5_ENTRY: "-" * 32}}
        start = 0
        for name, like in meta.items():
            offsets = [start, start + like.nbytes]
            header[name] = {"dtype": names[like.dtype], "shape": list(like.shape), "data_offsets": offsets}
            start += like.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._left, self._md5 = iter(meta.values()), hashlib.md5()
        self._place = 8 + text.index(b"-" * 32)
        self._file = open(path, "wb")  # noqa: SIM115
        self._file.write(len(text).to_bytes(8, "little"))
        self._file.write(text)

    def write(self, tensor: torch.Tensor) -> None:
        """The next tensor."""
        data = memoryview(_checked(tensor, next(self._left)).numpy())
        self._md5.update(data)
        self._file.write(data)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, failed, *_) -> None:
        assert failed or next(self._left, None) is None
        self._file.seek(self._place)
        self._file.write(self._md5.hexdigest().encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class TorchWriter:
    """Writes the file that torch.save would make of a dict, at its top or under the key `inside`.

    meta: tensors described, in their order; None is written as it is.
    """

    def __init__(self, path: Path, meta: dict[str, torch.Tensor | None], inside: str = ""):
        self._left = iter([like for like in meta.values() if like is not None])
        self._path = path
        self._zip = _open_zipfile_writer(str(path))
        self._writer = self._zip.__enter__()
        self._written = 0
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=2).dump({inside: meta} if inside else meta)
        for name, value in (
            ("data.pkl", pickled.getvalue()),
            # Storages are numbered in the order of the file, and each begins at a multiple of 64 bytes.
            (".format_version", b"1"),
            (".storage_alignment", b"64"),
            ("byteorder", sys.byteorder.encode()),
        ):
            self._writer.write_record(name, value, len(value))

    def write(self, tensor: torch.Tensor) -> None:
        """The next tensor."""
        # By way of NumPy, the storage is that of this tensor alone, not of all that it is a view of.
        storage = torch.from_numpy(_checked(tensor, next(self._left)).numpy()).untyped_storage()
        self._writer.write_record(f"data/{self._written}", storage, storage.nbytes())
        self._written += 1

    def __enter__(self) -> "TorchWriter":
        return self

    def __exit__(self, failed, *_) -> None:
        assert failed or next(self._left, None) is None
        self._zip.__exit__(None, None, None)
        with open(self._path, "rb") as file:
            os.fsync(file.fileno())


def _checked(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor that is as `like` describes it."""
    assert (tensor.dtype, tensor.shape) == (like.dtype, like.shape), (tensor.dtype, tensor.shape, like)
    return bytes_of(tensor)


class _Storage:
    """Stands for the bytes of one tensor in the pickled part of a torch file."""

    def __init__(self, like: torch.Tensor, number: int):
        self.reference = ("storage", STORAGES[like.dtype], str(number), "cpu", like.numel())


class _Pickler(pickle.Pickler):
    """Pickles meta tensors as torch pickles tensors on the CPU, a storage each."""

    _storages = 0

    def persistent_id(self, value):
        return value.reference if isinstance(value, _Storage) else None

    def reducer_override(self, value):
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        storage = _Storage(value, self._storages)
        self._storages += 1
        # Whatever its strides, it is written contiguously.
        contiguous = torch.empty(value.shape, device="meta").stride()
        hooks: OrderedDict = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (storage, 0, tuple(value.shape), contiguous, False, hooks)


def write_checklist(folder: Path) -> None:
    """Record the md5 of all files of a folder in its checklist.chk, as the published checkpoints do."""
    names = sorted(file.name for file in folder.iterdir() if file.name != CHECKLIST)
    lines = [f"{hash_file(folder / name, 'md5')}  {name}\n" for name in progress(names, "checksums")]
    (folder / CHECKLIST).write_text("".join(lines), encoding="utf-8")
