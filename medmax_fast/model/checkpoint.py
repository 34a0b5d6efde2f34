"""Opening a checkpoint folder in either layout and reading its tensors under one set of names.

Chameleon layout: models/*/{params.json, consolidated*.pth, checklist.chk} and tokenizer/{*.json, vqgan.yaml,
vqgan.ckpt, checklist.chk}. Hugging Face layout: config.json, tokenizer.json, safetensors, and of ours
vqgan_decoder.safetensors, since stock folders carry no picture decoder; a vqgan.ckpt put into the folder serves too.
Everything is read under the Hugging Face names; layout.py holds the table between the two.
"""

import math
from pathlib import Path

import torch
import yaml

from medmax_fast.files import read_json, read_object, read_text, require_file
from medmax_fast.model.checkpoint_base import Checkpoint, check_tensor, read_vqgan
from medmax_fast.model.files import SafetensorsFile, TorchFile, check_files
from medmax_fast.model.layout import Disagreement, Key, ModelShape, keys, to_hf
from medmax_fast.model.vqgan_config import VQConfig
from medmax_fast.runtime import InputError

DECODER_FILE = "vqgan_decoder.safetensors"
VQGAN_FILE = "vqgan.ckpt"
VQ_PREFIX = "model.vqmodel."
# Rotary frequencies are computed; files of either layout may hold them all the same.
_COMPUTED = ("rope.freqs", "rotary_emb.inv_freq")
# Files up to this size are checked against their checksum whenever the folder is opened; larger ones when the
# checkpoint is inspected, converted or merged (hashing 14 GB takes longer than loading it).
CHECK_BYTES = 1 << 29


def open_checkpoint(path: str | Path, vqgan: str | Path = "") -> Checkpoint:
    """Recognise the layout by its files and open it; InputError for anything that is not a checkpoint.

    vqgan: a vqgan.ckpt to be used in place of the folder's own, which it must agree with.
    """
    path = Path(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "no such folder"
        raise InputError(f"{path}: {found}, expected the folder of a checkpoint")
    given = require_file(vqgan) if vqgan else None
    if (path / "config.json").is_file():
        return HFCheckpoint(path, given)
    if (path / "tokenizer").is_dir() and (path / "models").is_dir():
        return ChameleonCheckpoint(path, given)
    raise InputError(f"{path}: neither a Hugging Face (config.json) nor a Chameleon (models/, tokenizer/) checkpoint")


class ChameleonCheckpoint(Checkpoint):
    """The layout of Meta, Anole and medmax_7b; several shards are joined as they are read."""

    layout = "chameleon"

    def __init__(self, path: Path, vqgan: Path | None = None):
        self.path = path
        folders = sorted(p.parent for p in path.glob("models/*/params.json"))
        if len(folders) != 1:
            raise InputError(f"{path}: {len(folders)} folders models/*/ with a params.json, expected one")
        self.model_path = folders[0]
        self.shape = _parse(self.model_path / "params.json", ModelShape.from_params)
        self.params = read_json(self.model_path / "params.json")
        self.vq_config = _parse(require_file(path / "tokenizer" / "vqgan.yaml"), VQConfig.from_yaml)
        self.vqgan_path, self._vqgan_home = vqgan, path / "tokenizer" / VQGAN_FILE
        self.tokenizer_path = path / "tokenizer" / "text_tokenizer_modified.json"
        if not self.tokenizer_path.exists():
            self.tokenizer_path = require_file(path / "tokenizer" / "text_tokenizer.json")
        self.shards = self._open_shards()
        if self.params.get("model_parallel_size", 1) != len(self.shards):
            self.params = self.params | {"model_parallel_size": len(self.shards)}
        self._table = {key.hf: key for key in keys(self.shape.layers)}
        self.verify(CHECK_BYTES)

    def _open_shards(self) -> list[TorchFile]:
        """The files of weights in their order; InputError if one is missing, or one too many."""
        recorded = _parse(self.model_path / "params.json", lambda spec: int(spec.get("model_parallel_size") or 1))
        paths = sorted(self.model_path.glob("consolidated*.pth"))
        count = len(paths) if recorded == 1 else recorded
        names = [f"consolidated.{i:02d}.pth" for i in range(count)]
        # A single file may have either name.
        if not paths or (max(count, len(paths)) > 1 and [path.name for path in paths] != names):
            found = ", ".join(path.name for path in paths) or "no consolidated*.pth"
            raise InputError(f"{self.model_path}: {found}, expected {' '.join(names) or 'consolidated.pth'}")
        return [TorchFile(path) for path in paths]

    def verify(self, up_to_bytes: int | None = None) -> dict[Path, str]:
        return check_files(self.model_path, up_to_bytes) | check_files(self.path / "tokenizer", up_to_bytes)

    def check_names(self) -> None:
        known = [key.chameleon for key in self._table.values()]
        for shard in self.shards:
            _check_names(shard.path, known, shard.names())

    def meta(self, name: str) -> torch.Tensor:
        key = self._table[name]
        dtype = self._parts(key)[0].dtype
        return torch.empty(key.size(self.shape), dtype=dtype, device="meta")

    def tensor(self, name: str) -> torch.Tensor:
        key = self._table[name]
        try:
            return to_hf(key, self._parts(key), self.shape)
        except Disagreement as error:
            raise InputError(
                f"{self.model_path}: the {error} of {key.chameleon} in its shards, expected equal ones"
            ) from error

    def _parts(self, key: Key) -> list[torch.Tensor]:
        size, parts = key.part_size(self.shape, len(self.shards)), []
        for shard in self.shards:
            parts.append(shard.tensor(key.chameleon))
            check_tensor(shard.path, key.chameleon, parts[-1], torch.empty(size, dtype=parts[0].dtype, device="meta"))
        return parts

    def release(self) -> None:
        for shard in self.shards:
            shard.release()

    def _own_vqgan(self) -> dict[str, torch.Tensor]:
        assert self._vqgan_home is not None
        return {} if self.vqgan_path and not self._vqgan_home.exists() else read_vqgan(self._vqgan_home)


class HFCheckpoint(Checkpoint):
    """A folder that transformers loads, with our extra file for the picture decoder if there is one."""

    layout = "hf"

    def __init__(self, path: Path, vqgan: Path | None = None):
        self.path = path
        spec = read_object(path / "config.json")
        if spec.get("model_type") != "chameleon":
            raise InputError(f"{path}/config.json: model_type {spec.get('model_type')!r}, expected 'chameleon'")
        self.shape = _parse(path / "config.json", ModelShape.from_hf)
        self.vq_config = _parse(path / "config.json", lambda c: VQConfig.from_hf(c["vq_config"]))
        self.tokenizer_path = require_file(path / "tokenizer.json")
        self.params = self.shape.to_params()
        if (path / "params.json").exists() and _parse(path / "params.json", ModelShape.from_params) == self.shape:
            self.params = read_json(path / "params.json")
        beside = path / VQGAN_FILE
        self.vqgan_path = vqgan or (beside if beside.exists() else None)
        self._sizes = {key.hf: key.size(self.shape) for key in keys(self.shape.layers)}
        self._files = self._read_index()
        self.verify(CHECK_BYTES)

    def _read_index(self) -> dict[str, SafetensorsFile]:
        """The file of each tensor; InputError where the index and the files do not agree."""
        index = self.path / "model.safetensors.index.json"
        if not index.exists():
            single = SafetensorsFile(self.path / "model.safetensors")
            return dict.fromkeys(single.names(), single)
        places = _parse(index, lambda spec: {name: str(file) for name, file in spec["weight_map"].items()})
        files = {name: SafetensorsFile(self.path / name) for name in sorted(set(places.values()))}
        there = {(name, file.path.name) for file in files.values() for name in file.names()}
        for name, place in places.items():
            if (name, place) not in there:
                raise InputError(f"{self.path / place}: tensor {name} is missing, {index.name} says it is there")
        for name, place in sorted(there - places.items()):
            raise InputError(f"{self.path / place}: tensor {name}, which {index.name} does not list there")
        return {name: files[place] for name, place in places.items()}

    def verify(self, up_to_bytes: int | None = None) -> dict[Path, str]:
        files = {file.path: file for file in self._files.values()}
        if (self.path / DECODER_FILE).exists():
            files[self.path / DECODER_FILE] = SafetensorsFile(self.path / DECODER_FILE)
        limit = up_to_bytes if up_to_bytes is not None else math.inf
        sums = {path: file.verify() for path, file in sorted(files.items()) if path.stat().st_size <= limit}
        return {path: md5 for path, md5 in sums.items() if md5}

    def check_names(self) -> None:
        _check_names(self.path, list(self._sizes), [n for n in self._files if not n.startswith(VQ_PREFIX)])

    def meta(self, name: str) -> torch.Tensor:
        if name not in self._files:
            raise InputError(f"{self.path}: tensor {name} is missing")
        like = self._files[name].meta(name)
        if name in self._sizes:
            check_tensor(self._files[name].path, name, like, like.new_empty(self._sizes[name]))
        return like

    def tensor(self, name: str) -> torch.Tensor:
        self.meta(name)
        return self._files[name].tensor(name)

    def release(self) -> None:
        for file in set(self._files.values()):
            file.release()

    def _own_vqgan(self) -> dict[str, torch.Tensor]:
        state = {n.removeprefix(VQ_PREFIX): self.tensor(n) for n in self._files if n.startswith(VQ_PREFIX)}
        if (self.path / DECODER_FILE).exists():
            decoder = SafetensorsFile(self.path / DECODER_FILE)
            state.update({name: decoder.tensor(name) for name in decoder.names()})
        return state


def _check_names(where: Path, known: list[str], found: list[str]) -> None:
    expected, there = set(known), set(found)
    missing = next((name for name in known if name not in there), None)
    if missing:
        raise InputError(f"{where}: tensor {missing} is missing")
    unexpected = next((name for name in found if name not in expected and not name.endswith(_COMPUTED)), None)
    if unexpected:
        raise InputError(f"{where}: tensor {unexpected} is unexpected, a Chameleon of this shape has none such")


def _parse(path: Path, build):
    """Read a JSON or YAML description and build a config from it; InputError names the file and what is wrong."""
    try:
        spec = yaml.safe_load(read_text(path)) if path.suffix == ".yaml" else read_json(path)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from error
    try:
        return build(spec)
    except KeyError as error:
        raise InputError(f"{path}: no entry {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a model description ({error})") from error
