"""Opening a checkpoint folder in either layout and reading its tensors under one set of names.

Chameleon layout: models/*/{params.json, consolidated*.pth, checklist.chk} and tokenizer/{*.json, vqgan.yaml,
vqgan.ckpt, checklist.chk}. Hugging Face layout: config.json, tokenizer.json, safetensors, and (ours) a
vqgan_decoder.safetensors, since stock folders carry no picture decoder. Everything is read under the Hugging Face
names; layout.py holds the table between the two, with the permutation and the shard axis of each tensor.
Files are memory-mapped, and nothing that could run code is unpickled.
"""

import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open

from medmax_fast.model.layout import Key, ModelShape, half_split, keys
from medmax_fast.model.vqgan import VQConfig
from medmax_fast.runtime import InputError, hash_file, read_json, require_file

DECODER_FILE = "vqgan_decoder.safetensors"
VQ_PREFIX = "model.vqmodel."
# Files up to this size are checked against their checksum whenever the folder is opened; larger ones when the
# checkpoint is converted or merged (hashing 14 GB takes longer than loading it).
CHECK_BYTES = 1 << 30


class Checkpoint:
    """An open checkpoint folder. `tensor(name)` gives a language-model tensor by its Hugging Face name."""

    layout: str
    path: Path
    shape: ModelShape
    vq_config: VQConfig
    tokenizer_path: Path
    # The params.json that describes `shape`, as it came where there is one.
    params: dict

    def names(self) -> Iterator[str]:
        """Hugging Face names of the language-model tensors, in the order of the table."""
        return (key.hf for key in keys(self.shape.layers))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in Hugging Face order, on the CPU, in the dtype of the file; InputError if it is missing."""
        raise NotImplementedError

    def vqgan_state(self) -> dict[str, torch.Tensor]:
        """The VQGAN's tensors by their taming names; without `decoder.*` where the folder has none."""
        raise NotImplementedError

    def verify(self) -> None:
        """Compare every file with its recorded checksum; InputError names the first that differs."""

    def sha256(self) -> str:
        """Hash of the language model's names, dtypes, shapes and bytes; the same in both layouts."""
        digest = hashlib.sha256()
        for name in self.names():
            tensor = self.tensor(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy())
        return digest.hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Recognise the layout by its files and open it; InputError for anything that is not a checkpoint."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such checkpoint folder")
    if (path / "config.json").is_file():
        return HFCheckpoint(path)
    if (path / "tokenizer").is_dir() and (path / "models").is_dir():
        return ChameleonCheckpoint(path)
    raise InputError(f"{path}: neither a Hugging Face (config.json) nor a Chameleon (models/, tokenizer/) checkpoint")


class ChameleonCheckpoint(Checkpoint):
    """The layout of Meta, Anole and medmax_7b; several shards are joined as they are read."""

    layout = "chameleon"

    def __init__(self, path: Path):
        self.path = path
        folders = sorted(p.parent for p in path.glob("models/*/params.json"))
        if len(folders) != 1:
            raise InputError(f"{path}: {len(folders)} folders models/*/ with a params.json, expected one")
        self.model_path = folders[0]
        self.shape = _parse(self.model_path / "params.json", ModelShape.from_params)
        self.params = read_json(self.model_path / "params.json")
        yaml_path = require_file(path / "tokenizer" / "vqgan.yaml")
        self.vq_config = _parse(yaml_path, VQConfig.from_yaml)
        self.tokenizer_path = path / "tokenizer" / "text_tokenizer_modified.json"
        if not self.tokenizer_path.exists():
            self.tokenizer_path = require_file(path / "tokenizer" / "text_tokenizer.json")
        self.shard_paths = sorted(self.model_path.glob("consolidated*.pth"))
        if not self.shard_paths:
            raise InputError(f"{self.model_path}: no consolidated*.pth")
        self._table = {key.hf: key for key in keys(self.shape.layers)}
        self._shards: list[dict] | None = None
        self.verify(CHECK_BYTES)

    def verify(self, up_to_bytes: int | None = None) -> None:
        for checklist in (self.model_path / "checklist.chk", self.path / "tokenizer" / "checklist.chk"):
            if not checklist.exists():
                continue
            for line in checklist.read_text().splitlines():
                expected, name = line.split(maxsplit=1)
                file = require_file(checklist.parent / name.lstrip("*"))
                if up_to_bytes is not None and file.stat().st_size > up_to_bytes:
                    continue
                found = hash_file(file, "md5")
                if found != expected:
                    raise InputError(f"{file}: md5 {found}, expected {expected} ({checklist.name})")

    def tensor(self, name: str) -> torch.Tensor:
        key = self._table[name]
        if self._shards is None:
            self._shards = [load_pickle(p) for p in self.shard_paths]
        parts = []
        for path, shard in zip(self.shard_paths, self._shards, strict=True):
            if not isinstance(shard.get(key.chameleon), torch.Tensor):
                raise InputError(f"{path}: tensor {key.chameleon} is missing")
            parts.append(shard[key.chameleon])
        return self._join(key, parts)

    def _join(self, key: Key, parts: list[torch.Tensor]) -> torch.Tensor:
        if key.kind == "qk_norm":
            # Each shard holds one vector for its own share of the heads.
            heads = (self.shape.heads if ".q_norm" in key.hf else self.shape.kv_heads) // len(parts)
            if any(p.shape != (self.shape.head_dim,) for p in parts):
                found = next(tuple(p.shape) for p in parts if p.shape != (self.shape.head_dim,))
                raise InputError(f"{self.path}: {key.chameleon} has shape {found}, expected ({self.shape.head_dim},)")
            return torch.cat([half_split(p)[None].expand(heads, -1) for p in parts])
        if key.axis is None:
            if any(not torch.equal(p, parts[0]) for p in parts[1:]):
                parts = [torch.stack([p.float() for p in parts]).mean(0).to(parts[0].dtype)]
            whole = parts[0]
        else:
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=key.axis)
        if key.kind == "rotary":
            if whole.ndim != 2 or whole.shape[0] % self.shape.head_dim:
                raise InputError(f"{self.path}: {key.chameleon} has shape {tuple(whole.shape)}, not rows of heads")
            whole = half_split(whole, self.shape.head_dim)
        return whole

    def vqgan_state(self) -> dict[str, torch.Tensor]:
        path = require_file(self.path / "tokenizer" / "vqgan.ckpt")
        state = load_pickle(path).get("state_dict")
        if not isinstance(state, dict):
            raise InputError(f"{path}: no state_dict, expected a taming-transformers VQGAN")
        # Training leftovers (the discriminator) are no part of the model.
        return {name: t for name, t in state.items() if not name.startswith("loss.")}


class HFCheckpoint(Checkpoint):
    """A folder that transformers loads, with our extra file for the picture decoder if there is one."""

    layout = "hf"

    def __init__(self, path: Path):
        self.path = path
        spec = read_json(path / "config.json")
        if spec.get("model_type") != "chameleon":
            raise InputError(f"{path}/config.json: model_type {spec.get('model_type')!r}, expected 'chameleon'")
        self.shape = _parse(path / "config.json", ModelShape.from_hf)
        self.vq_config = _parse(path / "config.json", lambda c: VQConfig.from_hf(c["vq_config"]))
        self.tokenizer_path = require_file(path / "tokenizer.json")
        self.params = self.shape.to_params()
        if (path / "params.json").exists() and _parse(path / "params.json", ModelShape.from_params) == self.shape:
            self.params = read_json(path / "params.json")
        index = path / "model.safetensors.index.json"
        if index.exists():
            self._files = {name: path / file for name, file in read_json(index)["weight_map"].items()}
        else:
            single = require_file(path / "model.safetensors")
            self._files = dict.fromkeys(_open_safetensors(single).keys(), single)
        self._open: dict[Path, safe_open] = {}

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._files:
            raise InputError(f"{self.path}: tensor {name} is missing")
        file = self._files[name]
        if file not in self._open:
            self._open[file] = _open_safetensors(file)
        try:
            return self._open[file].get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{file}: tensor {name} cannot be read ({error})") from error

    def vqgan_state(self) -> dict[str, torch.Tensor]:
        state = {n.removeprefix(VQ_PREFIX): self.tensor(n) for n in self._files if n.startswith(VQ_PREFIX)}
        decoder = self.path / DECODER_FILE
        if decoder.exists():
            file = _open_safetensors(decoder)
            state.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return state


def load_pickle(path: Path) -> dict:
    """A torch file as a dict of memory-mapped tensors, without running code; InputError if that cannot be done."""
    try:
        value = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: cannot be read as plain tensors ({reason}); "
            "if it is an old file, load it where you trust it and torch.save its state dict"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, expected a dict of tensors")
    return value


def _open_safetensors(path: Path):
    try:
        return safe_open(require_file(path), framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error


def _parse(path: Path, build):
    """Read a JSON or YAML description and build a config from it; InputError names the file and what is wrong."""
    try:
        spec = yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else read_json(path)
        return build(spec)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from error
    except KeyError as error:
        raise InputError(f"{path}: no entry {error}") from error
    except (TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a model description ({error})") from error
