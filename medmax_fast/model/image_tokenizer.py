"""Images to codes and back with a checkpoint's VQGAN."""

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import torch

from medmax_fast.model.checkpoint import Checkpoint, open_checkpoint
from medmax_fast.model.vqgan import VQGAN
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_CODES

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}
# A byte's value in the encoder's input, x / 255 * 2 - 1, computed in float64 as the reference does.
_PIXEL_VALUES = (np.arange(256, dtype=np.float64) / 255 * 2 - 1).astype(np.float32)


class ImageTokenizer:
    """The VQGAN of a checkpoint on one device.

    precision: fp32 (TF32 off everywhere), tf32 (GPU convolutions), fp16 or bf16 (autocast). The nearest-code
    search is always fp32.
    """

    def __init__(self, vqgan: VQGAN, sha256: str, device="cpu", precision: str = "fp32"):
        self.device = torch.device(device)
        self.precision = precision
        self.sha256 = sha256
        self.vqgan = vqgan.requires_grad_(False).eval().to(self.device)
        # The decoder runs channels last, which is about twice as fast on a CPU. The encoder must not: torch's
        # channels-last GroupNorm is less precise there and changed 86 of the 21,504 golden codes.
        if self.vqgan.decoder is not None:
            self.vqgan.decoder.to(memory_format=torch.channels_last)
        self._values = torch.from_numpy(_PIXEL_VALUES).to(self.device)

    @classmethod
    def from_checkpoint(cls, path: str | Path | Checkpoint, device="cpu", precision: str = "fp32") -> "ImageTokenizer":
        """Load the VQGAN of a checkpoint, a folder or open; InputError if it is incomplete or mis-shaped."""
        checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
        state = checkpoint.vqgan_state()
        has_decoder = any(name.startswith("decoder.") for name in state)
        with torch.device("meta"):
            vqgan = VQGAN(checkpoint.vq_config, decoder=has_decoder)
        check_state(state, vqgan.state_dict(), checkpoint.path)
        vqgan.load_state_dict({name: state[name].float() for name in vqgan.state_dict()}, assign=True)
        return cls(vqgan, hash_state(state), device, precision)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Codes int64 [N, 1024] of preprocessed pixels uint8 [N, 512, 512, 3]."""
        assert pixels.dtype == np.uint8 and pixels.ndim == 4, (pixels.dtype, pixels.shape)
        x_BCHW = self._values[torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).int()].contiguous()
        with torch.inference_mode(), self._arithmetic():
            return self.vqgan.encode(x_BCHW).cpu().numpy()

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Pixels uint8 [N, 512, 512, 3] of codes [N, 1024]; InputError without a decoder or for a bad code."""
        if self.vqgan.decoder is None:
            raise InputError("this checkpoint has no VQGAN decoder, so it cannot draw; use one in the Chameleon layout")
        codes = np.asarray(codes, dtype=np.int64)
        if codes.ndim != 2 or codes.shape[1] != IMAGE_CODES:
            raise InputError(f"codes of shape {codes.shape}, expected [N, {IMAGE_CODES}]")
        if codes.size and (codes.min() < 0 or codes.max() >= self.vqgan.config.n_embed):
            raise InputError(f"code {codes.max()} is outside 0..{self.vqgan.config.n_embed - 1}")
        with torch.inference_mode(), self._arithmetic():
            x_BCHW = self.vqgan.decode(torch.from_numpy(codes).to(self.device)).float()
        levels = (x_BCHW.clamp(-1, 1) + 1) / 2 * 255
        return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    @contextlib.contextmanager
    def _arithmetic(self):
        dtype = _AUTOCAST.get(self.precision)
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        try:
            with torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                yield
        finally:
            torch.backends.cudnn.allow_tf32 = before


def check_state(state: dict, expected: dict, where: str | Path) -> None:
    """InputError naming the first tensor of `expected` that `state` lacks or holds in another shape."""
    for name, tensor in expected.items():
        if name not in state:
            raise InputError(f"{where}: tensor {name} is missing")
        if state[name].shape != tensor.shape:
            found, wanted = tuple(state[name].shape), tuple(tensor.shape)
            raise InputError(f"{where}: tensor {name} has shape {found}, expected {wanted}")


def hash_state(state: dict[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of what makes codes: all tensors but the decoder's."""
    digest = hashlib.sha256()
    for name in sorted(n for n in state if not n.startswith(("decoder.", "post_quant_conv."))):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
