"""From a request to the ids that are fed: bos, text and images in order, eot, and boi where a picture is due."""

import numpy as np

from medmax_fast.data.images import load_image
from medmax_fast.generate import grammar
from medmax_fast.model.checkpoint import Checkpoint
from medmax_fast.model.image_tokenizer import ImageTokenizer
from medmax_fast.runtime import InputError, hash_file, require_file
from medmax_fast.vocab import TextTokenizer

# Codes of the last images seen, 2 KB each: several questions about one image tokenize it once.
CACHED_IMAGES = 10_000


class PromptEncoder:
    """Tokenizes the text and images of requests with one checkpoint; its VQGAN is loaded when first needed."""

    def __init__(self, checkpoint: Checkpoint, device="cpu"):
        self.checkpoint = checkpoint
        self.device = device
        self.tokenizer = TextTokenizer(checkpoint.tokenizer_path)
        self._image_tokenizer: ImageTokenizer | None = None
        self._codes: dict[str, np.ndarray] = {}

    @property
    def image_tokenizer(self) -> ImageTokenizer:
        """The checkpoint's VQGAN, in fp32."""
        if self._image_tokenizer is None:
            self._image_tokenizer = ImageTokenizer.from_checkpoint(self.checkpoint, self.device)
        return self._image_tokenizer

    def encode(self, request) -> list[int]:
        """Prompt ids of an engine Request; InputError for a prompt that cannot be run."""
        layout = self.tokenizer.layout
        if request.mode not in grammar.MODES:
            raise InputError(f"mode {request.mode!r}, expected one of {', '.join(grammar.MODES)}")
        if (request.content is None) == (request.token_ids is None):
            raise InputError("a prompt has either content or token_ids")
        if request.token_ids is not None:
            ids = self._check_ids(request.token_ids)
        else:
            ids = [layout.bos, *self._content_ids(request.content)]
            if request.eot:
                ids.append(layout.eot)
        if request.mode == "image":
            if ids[-1] != layout.boi:
                ids.append(layout.boi)
            if not grammar.room_for_image(len(ids), request.max_length):
                raise InputError(f"a prompt of {len(ids)} ids leaves no room for a picture in {request.max_length}")
        elif len(ids) >= request.max_length:
            raise InputError(f"a prompt of {len(ids)} ids leaves no room in {request.max_length}")
        return ids

    def _check_ids(self, ids: list[int]) -> list[int]:
        size = self.tokenizer.layout.vocab_size
        if not ids:
            raise InputError("an empty prompt")
        for i in ids:
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < size:
                raise InputError(f"token id {i!r}, expected an integer in 0..{size - 1}")
        return list(ids)

    def _content_ids(self, content: list[dict]) -> list[int]:
        ids: list[int] = []
        if not content:
            raise InputError("an empty prompt")
        for piece in content:
            kind = piece.get("type") if isinstance(piece, dict) else None
            if kind == "text" and isinstance(piece.get("text"), str):
                new = self.tokenizer.encode(piece["text"])
                if self.tokenizer.layout.placeholder in new:
                    raise InputError("<image> in a text piece; give the image as a piece of its own")
                ids += new
            elif kind == "image" and isinstance(piece.get("path"), str):
                ids += self.tokenizer.layout.image_span(self.image_codes(piece["path"])).tolist()
            else:
                raise InputError(
                    f'content piece {piece!r}, expected {{"type": "text", "text"}} or {{"type": "image", "path"}}'
                )
        if not ids:
            raise InputError("an empty prompt")
        return ids

    def image_codes(self, path: str) -> np.ndarray:
        """Codes [1024] of an image file; InputError if it is unreadable."""
        key = hash_file(require_file(path))
        if key not in self._codes:
            if len(self._codes) >= CACHED_IMAGES:
                self._codes.pop(next(iter(self._codes)))
            self._codes[key] = self.image_tokenizer.encode(load_image(path)[None])[0].astype(np.uint16)
        return self._codes[key]
