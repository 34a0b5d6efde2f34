"""From a request to the ids that are fed: bos, text and images in order, eot, and boi where a picture is due."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch import distributed

from medmax_fast.data.images import load_image
from medmax_fast.files import hash_file, require_file
from medmax_fast.generate import grammar
from medmax_fast.generate.requests import Request
from medmax_fast.model.checkpoint import Checkpoint
from medmax_fast.model.image_tokenizer import ImageTokenizer
from medmax_fast.model.picture_decoder import PictureDecoder
from medmax_fast.runtime import InputError
from medmax_fast.vocab import TextTokenizer

# Codes of the last images seen, 2 KB each: several questions about one image tokenize it once.
CACHED_IMAGES = 10_000
# Images encoded at a time, which bounds memory; threads that read them meanwhile.
ENCODE_BATCH = 8
THREADS = 8


class PromptEncoder:
    """Tokenizes the text and images of requests with one checkpoint; its VQGAN is loaded when first needed."""

    def __init__(self, checkpoint: Checkpoint, device="cpu"):
        self.checkpoint = checkpoint
        self.device = device
        self.tokenizer = TextTokenizer(checkpoint.tokenizer_path)
        self._image_tokenizer: ImageTokenizer | None = None
        self._pictures: PictureDecoder | None = None
        # By the hash of the file.
        self._codes: dict[str, np.ndarray] = {}

    @property
    def image_tokenizer(self) -> ImageTokenizer:
        """The checkpoint's VQGAN, in fp32."""
        if self._image_tokenizer is None:
            self._image_tokenizer = ImageTokenizer.from_checkpoint(self.checkpoint, self.device)
        return self._image_tokenizer

    @property
    def pictures(self) -> PictureDecoder:
        """The way back, from codes to pixels."""
        if self._pictures is None:
            self._pictures = PictureDecoder(self.image_tokenizer)
        return self._pictures

    def encode(self, request: Request) -> list[int]:
        """Prompt ids of a request; InputError for one that cannot be run."""
        (ids,) = self.encode_many([request])
        if isinstance(ids, InputError):
            raise ids
        return ids

    def encode_many(self, requests: list[Request], group=None) -> list[list[int] | InputError]:
        """Prompt ids of each request, or why it cannot be run; images are read in threads and encoded in batches.

        group: processes that all make this call; the first one's answer is everybody's.
        """
        answers: list = []
        if group is None or distributed.get_rank(group) == 0:
            codes = self._image_codes({path for request in requests for path in _image_paths(request)})
            answers = [self._encode(request, codes) for request in requests]
        if group is not None:
            shared = [answers]
            distributed.broadcast_object_list(shared, group=group, group_src=0)
            answers = shared[0]
        return answers

    def remember(self, file: bytes, codes: np.ndarray) -> None:
        """Take an image file of exactly these bytes for these codes [1024], as of a picture drawn from them."""
        self._codes[hashlib.sha256(file).hexdigest()] = codes.astype(np.uint16)
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        while len(self._codes) > CACHED_IMAGES:
            self._codes.pop(next(iter(self._codes)))

    def _encode(self, request: Request, codes: dict[str, np.ndarray | InputError]) -> list[int] | InputError:
        layout, most = self.tokenizer.layout, request.max_length
        try:
            request.check()
            if request.token_ids is not None:
                ids = self._check_ids(request.token_ids)
            else:
                # Request.check has seen that there is one or the other.
                ids = [layout.bos, *self._content_ids(request.content or [], codes)]
                if request.eot:
                    ids.append(layout.eot)
            if request.mode == "image":
                if ids[-1] != layout.boi:
                    ids.append(layout.boi)
                if not grammar.room_for_image(len(ids), most):
                    raise InputError(f"a prompt of {len(ids)} ids leaves no room for a picture in max_length {most}")
            elif len(ids) >= most:
                raise InputError(f"a prompt of {len(ids)} ids leaves no room in max_length {most}")
        except InputError as error:
            return error
        return ids

    def _check_ids(self, ids: list[int]) -> list[int]:
        size = self.tokenizer.layout.vocab_size
        if not ids:
            raise InputError("an empty prompt")
        for i in ids:
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < size:
                raise InputError(f"token id {i!r}, expected an integer in 0..{size - 1}")
        return list(ids)

    def _content_ids(self, content: list[dict], codes: dict) -> list[int]:
        ids: list[int] = []
        for piece in content:
            kind = piece.get("type") if isinstance(piece, dict) else None
            if kind == "text" and isinstance(piece.get("text"), str):
                new = self.tokenizer.encode(piece["text"])
                if self.tokenizer.layout.placeholder in new:
                    raise InputError("<image> in a text piece; give the image as a piece of its own")
                ids += new
            elif kind == "image" and isinstance(piece.get("path"), str):
                found = codes[piece["path"]]
                if isinstance(found, InputError):
                    raise found
                ids += self.tokenizer.layout.image_span(found).tolist()
            elif kind == "eot":
                ids.append(self.tokenizer.layout.eot)
            else:
                raise InputError(
                    f'content piece {piece!r}, expected {{"type": "text", "text"}}, {{"type": "image", "path"}} '
                    'or {"type": "eot"}'
                )
        if not ids:
            raise InputError("an empty prompt")
        return ids

    def _image_codes(self, paths: set[str]) -> dict[str, np.ndarray | InputError]:
        """Codes [1024] of each image file, or why there are none; equal files are encoded once."""
        found: dict[str, np.ndarray | InputError] = {}
        if not paths:
            return found
        with ThreadPoolExecutor(THREADS) as pool:
            keys = dict(zip(sorted(paths), pool.map(_hash, sorted(paths)), strict=True))
            missing = {key: path for path, key in keys.items() if isinstance(key, str) and key not in self._codes}
            batch: list[tuple[str, np.ndarray]] = []
            errors: dict[str, InputError] = {}
            for start in range(0, len(missing), ENCODE_BATCH):
                part = list(missing.items())[start : start + ENCODE_BATCH]
                batch = []
                for (key, _), pixels in zip(part, pool.map(_load, (path for _, path in part)), strict=True):
                    if isinstance(pixels, InputError):
                        errors[key] = pixels
                    else:
                        batch.append((key, pixels))
                if batch:
                    codes = self.image_tokenizer.encode(np.stack([pixels for _, pixels in batch]))
                    self._codes.update(zip((key for key, _ in batch), codes.astype(np.uint16), strict=True))
        for path, key in keys.items():
            if isinstance(key, InputError):
                found[path] = key
            else:
                found[path] = errors[key] if key in errors else self._codes[key]
        self._forget_oldest()
        return found


def _image_paths(request: Request) -> list[str]:
    """Paths in a request's content, whatever else is in it."""
    content = request.content if isinstance(request.content, list) else []
    pieces = [piece for piece in content if isinstance(piece, dict) and piece.get("type") == "image"]
    return [piece["path"] for piece in pieces if isinstance(piece.get("path"), str)]


def _hash(path: str) -> str | InputError:
    try:
        return hash_file(require_file(path))
    except InputError as error:
        return error
    except OSError as error:
        # Such as the upload of somebody who has gone meanwhile.
        return InputError(f"{path}: cannot be read ({error.strerror})")


def _load(path: str) -> np.ndarray | InputError:
    try:
        return load_image(path)
    except InputError as error:
        return error
