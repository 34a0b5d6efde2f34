"""Images to codes and back with a checkpoint's VQGAN."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from medmax_fast.kernels.resample import plan_resample, resample
from medmax_fast.model.arithmetic import repeatable
from medmax_fast.model.checkpoint import Checkpoint, open_checkpoint
from medmax_fast.model.checkpoint_base import hash_tensor
from medmax_fast.model.vqgan import VQGAN
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_CODES

# Of the pixels and of the convolutions' weights.
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# A byte's value in the encoder's input, x / 255 * 2 - 1, computed in float64 as the reference does.
_PIXEL_VALUES = (np.arange(256, dtype=np.float64) / 255 * 2 - 1).astype(np.float32)


class ImageTokenizer:
    """The VQGAN of a checkpoint on one device; the module that is handed in is changed and belongs to it from then on.

    vqgan: the module; without its decoder it cannot draw. sha256: what makes codes, as `hash_state` has it.
    precision: fp32 (no TF32 anywhere), tf32 (the convolutions' products on a GPU, as torch has them by default; on a
    CPU the same as fp32), fp16 or bf16 (weights and activations of encoder and decoder, sums in fp32; slow on most
    CPUs). The latents' last convolution and the nearest-code search are always fp32.
    batch_size: on a GPU, encode in batches of this size, shorter ones padded, from one captured CUDA graph; None runs
    each batch as it comes. On a CPU it has no effect.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        sha256: str,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        batch_size: int | None = None,
    ):
        if precision not in PRECISIONS:
            raise InputError(f"precision {precision!r}: expected {', '.join(PRECISIONS)}")
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.precision = precision
        self.sha256 = sha256
        self.batch_size = batch_size
        self.vqgan = vqgan.requires_grad_(False).eval().to(self.device)
        for half in (self.vqgan.encoder, self.vqgan.decoder):
            for module in half.modules() if half is not None else ():
                if isinstance(module, nn.Conv2d):
                    module.to(self.input_dtype)
        # The decoder runs channels last, which is about twice as fast on a CPU. The encoder must not there: torch's
        # channels-last GroupNorm is less precise on a CPU and changed 86 of the 21,504 golden codes.
        if self.device.type == "cuda":
            self.vqgan.to(memory_format=torch.channels_last)
        elif self.vqgan.decoder is not None:
            self.vqgan.decoder.to(memory_format=torch.channels_last)
        self._values = torch.from_numpy(_PIXEL_VALUES).to(self.device, self.input_dtype)
        self._graph: _EncoderGraph | None = None

    @property
    def input_dtype(self) -> torch.dtype:
        """What `encode_tensor` takes: float32 for fp32 and tf32, else the 16-bit type."""
        return PRECISIONS[self.precision]

    @property
    def num_codes(self) -> int:
        """Codes are 0..num_codes-1."""
        return self.vqgan.config.n_embed

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path | Checkpoint,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        batch_size: int | None = None,
        vqgan: str | Path = "",
    ) -> "ImageTokenizer":
        """Load the VQGAN of a checkpoint; InputError if it is incomplete or mis-shaped.

        path: a folder in either layout, or an open Checkpoint. vqgan: of a folder, a vqgan.ckpt to be used in place of
        its own. device, precision, batch_size: see the class.
        """
        checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path, vqgan)
        state = checkpoint.vqgan_state()
        has_decoder = any(name.startswith("decoder.") for name in state)
        with torch.device("meta"):
            module = VQGAN(checkpoint.vq_config, decoder=has_decoder)
        module.load_state_dict({name: state[name].float() for name in module.state_dict()}, assign=True)
        return cls(module, hash_state(state), device, precision, batch_size)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Codes int64 [N, 1024] of preprocessed pixels uint8 [N, 512, 512, 3]."""
        assert pixels.dtype == np.uint8 and pixels.ndim == 4, (pixels.dtype, pixels.shape)
        x_BCHW = normalised(torch.from_numpy(pixels).to(self.device)).to(self.input_dtype)
        return self.encode_tensor(x_BCHW).cpu().numpy()

    def encode_tensor(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Codes int64 [N, 1024] on the device, without waiting for it; call it from one stream at a time.

        x_BCHW: pixels / 255 * 2 - 1, [N, 3, 512, 512] of `input_dtype` on the device; channels last costs no copy on
        a GPU, channels first none on a CPU. InputError for anything else.
        """
        side = self.vqgan.config.resolution
        if x_BCHW.shape[1:] != (3, side, side) or x_BCHW.dtype != self.input_dtype or x_BCHW.device != self.device:
            found = f"{x_BCHW.dtype} {list(x_BCHW.shape)} on {x_BCHW.device}"
            raise InputError(f"pixels {found}: expected {self.input_dtype} [N, 3, {side}, {side}] on {self.device}")
        if len(x_BCHW) == 0:
            return torch.empty((0, IMAGE_CODES), dtype=torch.int64, device=self.device)
        with torch.no_grad(), self._arithmetic():
            if self.device.type != "cuda":
                # One by one, at the same speed: so no picture's sums depend on how many share its batch.
                return torch.cat([self.vqgan.encode(x[None].contiguous()) for x in x_BCHW])
            if self.batch_size is None:
                return self.vqgan.encode(x_BCHW.contiguous(memory_format=torch.channels_last))
            if self._graph is None:
                shape = (self.batch_size, *x_BCHW.shape[1:])
                self._graph = _EncoderGraph(self.vqgan.encode, shape, self.input_dtype, self.device)
            return torch.cat([self._graph(part) for part in x_BCHW.split(self.batch_size)])

    def encode_pictures(self, pictures: list, columns: list, rows: list) -> torch.Tensor:
        """Codes int64 [N, 1024] of full-size pictures, on the device and not waited for.

        pictures, columns, rows: as for `resampled`.
        """
        return self.encode_tensor(self._resample(pictures, columns, rows, self._values))

    def resampled(self, pictures: list, columns: list, rows: list) -> np.ndarray:
        """What the encoder sees of full-size pictures, as uint8 [N, 512, 512, 3].

        pictures: uint8 [H, W, 3] each, NumPy arrays or tensors on the device. columns, rows: per picture the
        (starts, weights) of its kept columns and rows, see kernels/resample.py.
        """
        bytes_ = torch.arange(256, dtype=torch.uint8, device=self.device)
        return self._resample(pictures, columns, rows, bytes_).permute(0, 2, 3, 1).cpu().numpy()

    def _resample(self, pictures: list, columns: list, rows: list, values: torch.Tensor) -> torch.Tensor:
        plan = plan_resample([picture.shape[:2] for picture in pictures], columns, rows)
        return resample(self._upload(pictures), plan, values)

    def _upload(self, pictures: list) -> torch.Tensor:
        """All bytes end to end, uint8 on the device; from the host through pinned memory, without waiting for it."""
        if not all(isinstance(picture, np.ndarray) for picture in pictures):
            return torch.cat([torch.as_tensor(picture, device=self.device).flatten() for picture in pictures])
        sizes = [picture.size for picture in pictures]
        staged = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        for part, picture in zip(staged.split(sizes), pictures, strict=True):
            # Through NumPy, since torch warns about arrays that must not be written to.
            part.numpy()[:] = picture.ravel()
        return staged.to(self.device, non_blocking=True)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Pixels uint8 [N, 512, 512, 3] of codes [N, 1024]; InputError without a decoder or for a bad code."""
        if self.vqgan.decoder is None:
            raise InputError("this checkpoint has no VQGAN decoder, so it cannot draw; --vqgan gives it one")
        codes = np.asarray(codes, dtype=np.int64)
        if codes.ndim != 2 or codes.shape[1] != IMAGE_CODES:
            raise InputError(f"codes of shape {codes.shape}, expected [N, {IMAGE_CODES}]")
        if codes.size and (codes.min() < 0 or codes.max() >= self.vqgan.config.n_embed):
            bad = codes[(codes < 0) | (codes >= self.vqgan.config.n_embed)].flat[0]
            raise InputError(f"code {bad} is outside 0..{self.vqgan.config.n_embed - 1}")
        with torch.inference_mode(), self._arithmetic():
            x_BCHW = self.vqgan.decode(torch.from_numpy(codes).to(self.device)).float()
        levels = (x_BCHW.clamp(-1, 1) + 1) / 2 * 255
        return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def _arithmetic(self) -> AbstractContextManager[None]:
        """The arithmetic of this precision, for a call; TF32 leaves out matrix products, 0.4 % of the work here."""
        convolutions = "tf32" if self.precision == "tf32" else "ieee"
        return repeatable(self.device, convolutions, exact_attention=self.input_dtype == torch.float32)


class _EncoderGraph:
    """Encoder and code search captured for one batch size, so that a batch costs one launch instead of hundreds.

    A picture's codes do not depend on the others of its batch: what pads a short one is left from the last.
    """

    def __init__(self, encode: Callable, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.x_BCHW = torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
        # Triton compiles and cuDNN sets itself up before the capture, on another stream as torch asks for.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                encode(self.x_BCHW)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU, decoding the next pictures.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.codes_BN = encode(self.x_BCHW)

    def __call__(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Codes of up to a batch, in memory of their own."""
        self.x_BCHW[: len(x_BCHW)].copy_(x_BCHW)
        self.graph.replay()
        return self.codes_BN[: len(x_BCHW)].clone()


def normalised(pixels_BHWC: torch.Tensor) -> torch.Tensor:
    """x / 255 * 2 - 1 of bytes, float32 [B, 3, H, W] contiguous; as (2 x - 255) / 255 one rounding gives the same bits
    as the reference's float64."""
    x_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return x_BCHW.mul_(2).sub_(255).div_(255)


def hash_state(state: dict[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of what makes codes: all tensors but the decoder's."""
    digest = hashlib.sha256()
    for name in sorted(n for n in state if not n.startswith(("decoder.", "post_quant_conv."))):
        hash_tensor(digest, name, state[name])
    return digest.hexdigest()
