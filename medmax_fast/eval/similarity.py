"""How alike a picture and a text, or two pictures, are to a dual encoder.

The published encoder is BiomedCLIP through open_clip; other open_clip models and the CLIP and SigLIP families of
transformers work too, so that an evaluation does not hang on torchvision, which open_clip needs. Everything runs in
fp32 without TF32, in the given order and in batches of one size, so that a run repeats; the price on a GPU is small
beside drawing the pictures. Pictures are made RGB as the encoders' own preprocessing does it (alpha is dropped, not
blended), but before they are resized rather than after.
"""

import contextlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from medmax_fast.data.images import ImageError, decode, read_file
from medmax_fast.files import hash_folder, read_object
from medmax_fast.progress import bars_on_terminals_only, progress
from medmax_fast.runtime import InputError, one_line

BIOMEDCLIP = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
HUB_PREFIX = "hf-hub:"
OPEN_CLIP_CONFIG = "open_clip_config.json"
BATCH = 32

# Pixels uint8 [H, W, 3], or the path of an image file.
Picture = np.ndarray | str | os.PathLike


class Encoder(ABC):
    """A dual encoder that is loaded, made by `open_encoder`; embeddings have length 1.

    Each library's subclass encodes one batch of pixels or of texts to features [n, D] that are not yet normalised.
    """

    def __init__(self, model, device, facts: dict):
        self.model, self.device = model.to(device).eval(), device
        self._facts = facts

    def images(self, pictures: Sequence[Picture]) -> tuple[np.ndarray, list[str | None]]:
        """float32 [N, D], and per picture why it could not be read; the row of such a picture is NaN."""
        rows, errors = [], []
        for batch in progress(_batches(pictures), "similarity, batches of pictures"):
            pixels, found = read_pictures(batch)
            errors += found
            embeddings = np.full((len(batch), self._facts["dim"]), np.nan, np.float32)
            if pixels:
                embeddings[[error is None for error in found]] = self._run(self._encode_images, pixels)
            rows.append(embeddings)
        return self._stack(rows), errors

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, D]; a text is cut off at the model's context, which facts() tells in ids."""
        batches = progress(_batches(texts), "similarity, batches of texts")
        return self._stack([self._run(self._encode_texts, [_utf8(text) for text in batch]) for batch in batches])

    def facts(self) -> dict:
        """model, library, version, dim, context, and what tells the weights: revision (hub) or sha256 (folder)."""
        return dict(self._facts)

    def probe(self, name: str) -> "Encoder":
        """Try it out, which tells its dimension; InputError if it makes nothing of pictures or texts."""
        picture = self._run(self._encode_images, [np.zeros((32, 32, 3), np.uint8)])
        texts = self._run(self._encode_texts, ["a", "b"])
        if picture.shape[1:] != texts.shape[1:]:
            raise InputError(
                f"--clip {name}: pictures become {picture.shape[-1]} numbers and texts {texts.shape[-1]}, expected a "
                "dual encoder with one space for both"
            )
        # transformers makes an empty tokenizer where its files are missing.
        if np.allclose(texts[0], texts[1], atol=1e-5):
            raise InputError(f"--clip {name}: all letters look the same to it; are its tokenizer's files complete?")
        self._facts["dim"] = picture.shape[1]
        return self

    @abstractmethod
    def _encode_images(self, batch: list[np.ndarray]):
        """Features [n, D] of pixels."""

    @abstractmethod
    def _encode_texts(self, batch: list[str]):
        """Features [n, D] of texts."""

    def _run(self, encode: Callable, batch: list) -> np.ndarray:
        import torch

        from medmax_fast.model.arithmetic import repeatable

        with torch.inference_mode(), repeatable(self.device):
            return torch.nn.functional.normalize(encode(batch).float(), dim=-1).cpu().numpy()

    def _stack(self, rows: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros((0, self._facts["dim"]), np.float32), *rows])


class _OpenClip(Encoder):
    def __init__(self, model, preprocess: Callable, tokenizer, device, facts: dict):
        super().__init__(model, device, {**facts, "context": tokenizer.context_length})
        self.preprocess, self.tokenizer = preprocess, tokenizer

    def _encode_images(self, batch: list[np.ndarray]):
        import torch
        from PIL import Image

        pixels = torch.stack([self.preprocess(Image.fromarray(picture)) for picture in batch])
        return self.model.encode_image(pixels.to(self.device))

    def _encode_texts(self, batch: list[str]):
        return self.model.encode_text(self.tokenizer(batch).to(self.device))


class _Transformers(Encoder):
    def __init__(self, model, processor: Callable, tokenizer, device, facts: dict):
        positions = model.config.get_text_config().max_position_embeddings
        super().__init__(model, device, {**facts, "context": min(positions, tokenizer.model_max_length)})
        self.processor, self.tokenizer = processor, tokenizer
        self.siglip = model.config.model_type.startswith("siglip")

    def _encode_images(self, batch: list[np.ndarray]):
        inputs = self.processor(images=batch, input_data_format="channels_last", return_tensors="pt")
        return _pooled(self.model.get_image_features(**inputs.to(self.device)))

    def _encode_texts(self, batch: list[str]):
        # SigLIP was trained on lower case and attends to its padding; some of its tokenizers do not know either.
        if self.siglip:
            batch = [text.lower() for text in batch]
        options = {"padding": "max_length", "truncation": True, "max_length": self._facts["context"]}
        inputs = self.tokenizer(batch, return_tensors="pt", **options).to(self.device)
        if self.siglip:
            inputs = {"input_ids": inputs["input_ids"]}
        return _pooled(self.model.get_text_features(**inputs))


def open_encoder(name: str, device) -> Encoder:
    """Load a dual encoder in fp32 onto a torch.device.

    name: `biomedclip`; `hf-hub:OWNER/NAME`, an open_clip model of the hub; a folder with open_clip_config.json; a
    folder with config.json, or OWNER/NAME on the hub, for transformers (CLIP, SigLIP and their like). A folder of
    BiomedCLIP refers to its text model by a hub name; where the hub is out of reach, that model's config.json is
    looked for below the folder, in a folder of that name. InputError for what cannot be loaded or is no dual encoder.
    """
    if name == "biomedclip" or name.startswith(HUB_PREFIX):
        return _open_open_clip(BIOMEDCLIP if name == "biomedclip" else name, None, device)
    folder = Path(name)
    if folder.is_file():
        raise InputError(f"--clip {name}: a file, expected a folder or a name on the hub")
    if folder.is_dir():
        if (folder / OPEN_CLIP_CONFIG).exists():
            return _open_open_clip(name, folder, device)
        if not (folder / "config.json").exists():
            raise InputError(f"--clip {name}: neither {OPEN_CLIP_CONFIG} nor config.json in this folder")
        return _open_transformers(name, folder, device)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise InputError(f"--clip {name}: no such folder, and neither biomedclip, hf-hub:OWNER/NAME nor OWNER/NAME")
    return _open_transformers(name, None, device)


def available() -> str:
    """Empty where open_clip, and so BiomedCLIP, can be used; otherwise why not and what to install."""
    try:
        _import_open_clip()
    except InputError as error:
        return str(error)
    return ""


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of the angle between the rows of two arrays [N, D]: float64 [N]; NaN where a row is NaN or zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


# ---- loading ----


def _import_open_clip():
    try:
        import open_clip
    # A torchvision made for another torch raises any of these.
    except (ImportError, RuntimeError, OSError) as error:
        raise InputError(
            f"open_clip cannot be imported ({one_line(error)}): pip install 'medmax_fast[eval]', and a torchvision "
            "that belongs to this torch, which open_clip needs"
        ) from error
    return open_clip


def _open_open_clip(name: str, folder: Path | None, device) -> Encoder:
    open_clip = _import_open_clip()
    source = f"local-dir:{folder}" if folder else name
    hint, overrides = _text_model_here(folder) if folder else ("", {})
    with _loading(name, folder, hint):
        model, preprocess = open_clip.create_model_from_pretrained(source, **overrides)
        tokenizer = open_clip.get_tokenizer(source)
        facts = {"model": name, "library": "open_clip", "version": metadata.version("open_clip_torch")}
        facts |= _identity(name.removeprefix(HUB_PREFIX), folder, OPEN_CLIP_CONFIG)
        return _OpenClip(model, preprocess, tokenizer, device, facts).probe(name)


def _text_model_here(folder: Path) -> tuple[str, dict]:
    """Where the config of a text model with a hub name belongs, and open_clip's overrides if it lies there."""
    config = read_object(folder / OPEN_CLIP_CONFIG)
    try:
        text = config["model_cfg"]["text_cfg"]
        local = folder / text["hf_model_name"]
    except (KeyError, TypeError):
        # No such text model, or a broken file, of which open_clip says more.
        return "", {}
    if (local / "config.json").exists():
        return "", {"text_cfg": {**text, "hf_model_name": str(local), "hf_model_pretrained": False}}
    return f"; its text model {text['hf_model_name']} is looked for on the hub, for want of {local}/config.json", {}


def _open_transformers(name: str, folder: Path | None, device) -> Encoder:
    import torch
    import transformers

    bars_on_terminals_only()
    with _loading(name, folder):
        config = transformers.AutoConfig.from_pretrained(name)
        # Asked before gigabytes are read.
        model_class = transformers.MODEL_MAPPING.get(type(config), None)
        if not all(hasattr(model_class, part) for part in ("get_text_features", "get_image_features")):
            raise InputError(f"--clip {name}: a {config.model_type} model, expected a dual encoder as CLIP or SigLIP")
        options = {"config": config, "dtype": torch.float32, "output_loading_info": True}
        model, info = transformers.AutoModel.from_pretrained(name, **options)
        if info["missing_keys"]:
            raise InputError(f"--clip {name}: weights are missing, such as {min(info['missing_keys'])}")
        # The same pixels with and without torchvision.
        processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        facts = {"model": name, "library": "transformers", "version": transformers.__version__}
        facts |= _identity(name, folder, "config.json")
        return _Transformers(model, processor, tokenizer, device, facts).probe(name)


@contextlib.contextmanager
def _loading(name: str, folder: Path | None, hint: str = "") -> Iterator[None]:
    """What the libraries raise on files that are missing, broken or out of reach, as one line; a hint ends it."""
    import pickle

    from safetensors import SafetensorError

    broken = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError)
    try:
        yield
    except InputError:
        raise
    except (*broken, SafetensorError, pickle.UnpicklingError) as error:
        what = f"--clip {name}: cannot be loaded ({one_line(error)}){hint}"
        if not folder:
            what += "; where the Hugging Face hub cannot be reached, give a local folder with --clip"
        raise InputError(what) from error


def _identity(repository: str, folder: Path | None, config_name: str) -> dict:
    """What tells one set of weights from another: a hash of the folder, or the hub's revision that was loaded."""
    if folder:
        return {"sha256": hash_folder(folder)}
    from huggingface_hub import try_to_load_from_cache

    # .../snapshots/REVISION/config.json
    path = try_to_load_from_cache(repository, config_name)
    return {"revision": Path(path).parent.name if isinstance(path, str) else None}


# ---- computing ----


def _batches(items: Sequence) -> list[Sequence]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def read_pictures(pictures: Sequence[Picture]) -> tuple[list[np.ndarray], list[str | None]]:
    """Pixels of those that can be read, and an error or None for each."""
    pixels: list[np.ndarray] = []
    errors: list[str | None] = []
    for picture in pictures:
        try:
            if not isinstance(picture, np.ndarray):
                picture = decode(read_file(picture), os.fspath(picture), alpha="drop", packed=True).decoded
            assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3, picture.shape
            pixels.append(picture)
            errors.append(None)
        except ImageError as error:
            errors.append(str(error))
    return pixels, errors


def _pooled(output):
    """The embedding of get_*_features, which is a tensor or, in newer transformers, one field of an output object."""
    return getattr(output, "pooler_output", output)


def _utf8(text: str) -> str:
    """The tokenizers refuse half a surrogate pair, which a model's JSON reply may hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
