"""What an open checkpoint is to the rest of the package, whatever its layout: tensors by name, one at a time."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from medmax_fast.model.files import TorchFile, bytes_of
from medmax_fast.model.layout import Key, ModelShape, keys
from medmax_fast.model.vqgan import VQGAN
from medmax_fast.model.vqgan_config import VQConfig
from medmax_fast.progress import progress
from medmax_fast.runtime import InputError, trim_heap


class Checkpoint:
    """An open checkpoint folder. `tensor(name)` gives a language-model tensor by its Hugging Face name."""

    layout: str
    path: Path
    shape: ModelShape
    vq_config: VQConfig
    tokenizer_path: Path
    # The params.json that describes `shape`, as it came where there is one.
    params: dict
    # A taming-transformers VQGAN to be used instead of what the folder holds of one.
    vqgan_path: Path | None = None
    # The file of the folder's own, where that is one file.
    _vqgan_home: Path | None = None

    def names(self) -> Iterator[str]:
        """Hugging Face names of the language-model tensors, in the order of the table."""
        return (key.hf for key in keys(self.shape.layers))

    def meta(self, name: str) -> torch.Tensor:
        """Dtype and size of what `tensor` gives, on the meta device."""
        raise NotImplementedError

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in Hugging Face order, on the CPU, in the dtype of the file, and maybe a view of it.

        InputError if it is missing or mis-shaped.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Forget mapped files, so that their pages leave the resident memory unless a tensor is still a view of them.

        They are mapped again when they are needed.
        """

    def stream(self, label: str) -> Iterator[Key]:
        """The keys of all language-model tensors in the order of the table, with a progress bar.

        For a caller that asks for the `tensor` of each and lets go of it before the next: mapped files are released
        before more than half of the largest tensor's bytes, or one tensor, has been read from them.
        """
        sizes = {name: self.meta(name).nbytes for name in self.names()}
        largest, mapped = max(sizes.values()), 0
        # Whoever holds views from before keeps no more than what they touched.
        self.release()
        trim_heap()
        for key in progress(keys(self.shape.layers), label):
            if mapped + sizes[key.hf] > largest // 2:
                self.release()
                trim_heap()
                mapped = 0
            mapped += sizes[key.hf]
            yield key
        self.release()

    @property
    def draws(self) -> bool:
        """Whether the VQGAN has the decoder that turns codes into pictures."""
        return any(name.startswith("decoder.") for name in self.vqgan_state())

    def vqgan_state(self) -> dict[str, torch.Tensor]:
        """The VQGAN's tensors by their taming names; without `decoder.*` where there is none.

        InputError if one is missing or mis-shaped.
        """
        state, where = self._own_vqgan(), self._vqgan_home or self.path
        if self.vqgan_path:
            given = read_vqgan(self.vqgan_path)
            # Folders saved in 16 bits hold a rounded copy, which makes other codes; the file given is exact.
            for name, tensor in state.items():
                same = name not in given or torch.equal(given[name].to(tensor.dtype), tensor)
                if not same and not name.startswith("decoder."):
                    raise InputError(f"{self.vqgan_path}: {name} differs from that of {self.path}; another VQGAN")
            state, where = given, self.vqgan_path
        with torch.device("meta"):
            vqgan = VQGAN(self.vq_config, decoder=any(name.startswith("decoder.") for name in state))
        for name, like in vqgan.state_dict().items():
            if name not in state:
                raise InputError(f"{where}: tensor {name} is missing")
            check_tensor(where, name, state[name], like.to(state[name].dtype))
        return state

    def _own_vqgan(self) -> dict[str, torch.Tensor]:
        """What the folder itself holds of a VQGAN, not checked."""
        raise NotImplementedError

    def check_names(self) -> None:
        """InputError naming a language-model tensor that is missing, or one that no Chameleon has."""

    def verify(self, up_to_bytes: int | None = None) -> dict[Path, str]:
        """Compare every file with its recorded md5, which is returned; InputError names the first that differs.

        up_to_bytes: leave out larger files.
        """
        raise NotImplementedError

    def sha256(self, label: str = "hashing tensors") -> str:
        """Hash of the language model's names, dtypes, shapes and bytes; the same in both layouts."""
        digest = hashlib.sha256()
        for key in self.stream(label):
            hash_tensor(digest, key.hf, self.tensor(key.hf))
        return digest.hexdigest()


class Changed(Checkpoint):
    """Another checkpoint of which some tensors are changed as they are read.

    change(name, tensor): what to give for a tensor of `base`. dtype(name, dtype): its dtype, without computing it.
    release: called beside that of `base`.
    """

    def __init__(
        self,
        base: Checkpoint,
        change: Callable[[str, torch.Tensor], torch.Tensor],
        dtype: Callable[[str, torch.dtype], torch.dtype] = lambda _, dtype: dtype,
        release: Callable[[], None] = lambda: None,
    ):
        self.layout, self.path, self.shape, self.vq_config = base.layout, base.path, base.shape, base.vq_config
        self.tokenizer_path, self.params = base.tokenizer_path, base.params
        self._base, self._change, self._dtype, self._release = base, change, dtype, release

    def meta(self, name: str) -> torch.Tensor:
        like = self._base.meta(name)
        return like.to(self._dtype(name, like.dtype))

    def tensor(self, name: str) -> torch.Tensor:
        return self._change(name, self._base.tensor(name))

    def release(self) -> None:
        self._base.release()
        self._release()

    def _own_vqgan(self) -> dict[str, torch.Tensor]:
        return self._base.vqgan_state()

    def check_names(self) -> None:
        self._base.check_names()


def read_vqgan(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a taming-transformers checkpoint, without the discriminator, which is left from its training."""
    file = TorchFile(path, inside="state_dict")
    return {name: file.tensor(name) for name in file.names() if not name.startswith("loss.")}


def hash_tensor(digest, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor's name, dtype, size and bytes to a hashlib digest."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(bytes_of(tensor).numpy())


def check_tensor(where: str | Path, name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    """InputError for a tensor that has not the size and dtype of `like`."""
    if tensor.shape != like.shape:
        raise InputError(f"{where}: tensor {name} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
    if tensor.dtype != like.dtype:
        raise InputError(f"{where}: tensor {name} has dtype {tensor.dtype}, expected {like.dtype}")
