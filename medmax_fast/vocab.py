"""The id layout of a Chameleon vocabulary, read from its tokenizer file.

Two number spaces meet here and nowhere else: `codes` are VQGAN codebook entries (0..8191), `ids` are vocabulary
ids. The tokenizer names code c `IMGIMG` + the decimal digits of c written as letters A..J + `Z`; every published
checkpoint puts code c at id c + 4, and everything downstream (one uint16 subtraction in the kernels and the C++
collator) depends on that offset being constant, so it is read from the names and verified, never assumed.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# One image is a 32 x 32 grid of codes, row by row; boi and eoi stand around it in a sequence.
IMAGE_SIDE = 32
IMAGE_CODES = IMAGE_SIDE * IMAGE_SIDE
IMAGE_IDS = IMAGE_CODES + 2

EOT_TEXT = "<reserved08706>"
IMAGE_TEXT = "<image>"
# The id of the image placeholder bears one of two names: the first in text_tokenizer.json, the second in
# text_tokenizer_modified.json and in Hugging Face folders.
PLACEHOLDER_NAMES = ("<reserved08707>", IMAGE_TEXT)

_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")


class VocabError(ValueError):
    """A tokenizer file whose ids are not laid out as a Chameleon vocabulary."""


@dataclass(frozen=True)
class IdLayout:
    """Where each kind of id lies; the field names are the ones used throughout the package.

    `image_start + code` is the id of `code` for 0 <= code < num_codes; text ids run from `text_start` up to
    `vocab_size` (exclusive).
    """

    bos: int
    pad: int
    eos: int
    unk: int
    image_start: int
    num_codes: int
    eoi: int
    boi: int
    eot: int
    placeholder: int
    text_start: int
    vocab_size: int

    @classmethod
    def from_file(cls, path: str | Path) -> "IdLayout":
        """Read the layout from a tokenizer JSON; raises VocabError if the file is not such a vocabulary."""
        return cls.from_vocab(read_vocab(path), str(path))

    @classmethod
    def from_vocab(cls, vocab: dict[str, int], where: str = "vocabulary") -> "IdLayout":
        """Build the layout from a name -> id mapping and assert that it is the monotone one."""

        def find(*names: str) -> int:
            for name in names:
                if name in vocab:
                    return vocab[name]
            raise VocabError(f"{where}: no token named {' or '.join(names)}; expected a Chameleon vocabulary")

        num_codes = sum(name.startswith("IMGIMG") for name in vocab)
        if num_codes == 0:
            raise VocabError(f"{where}: no image tokens (IMGIMG..Z); expected a Chameleon vocabulary")
        image_start = find(code_name(0))
        for code in range(num_codes):
            if vocab.get(code_name(code)) != image_start + code:
                raise VocabError(
                    f"{where}: image code {code} has id {vocab.get(code_name(code))}, expected {image_start + code} "
                    "(the ids of image codes must be consecutive)"
                )
        layout = cls(
            bos=find("<s>"),
            pad=find("<pad>"),
            eos=find("</s>"),
            unk=find("<unk>"),
            image_start=image_start,
            num_codes=num_codes,
            eoi=find("<eoss>"),
            boi=find("<racm3:break>"),
            eot=find(EOT_TEXT),
            placeholder=find(*PLACEHOLDER_NAMES),
            text_start=find(*PLACEHOLDER_NAMES) + 1,
            vocab_size=max(vocab.values()) + 1,
        )
        layout._check(vocab, where)
        return layout

    def _check(self, vocab: dict[str, int], where: str) -> None:
        if len(set(vocab.values())) != self.vocab_size:
            raise VocabError(f"{where}: {len(set(vocab.values()))} ids for a vocabulary of {self.vocab_size}")
        order = [self.bos, self.pad, self.eos, self.unk, self.image_start, self.image_end, self.boi, self.eot]
        order += [self.placeholder, self.text_start]
        if order != sorted(order) or self.eoi != self.image_end:
            raise VocabError(f"{where}: special ids are not in Chameleon's order: {asdict(self)}")

    @property
    def image_end(self) -> int:
        """One past the last image id."""
        return self.image_start + self.num_codes

    # NumPy is imported where it is used, since every start of the command line reads this module.

    def ids_from_codes(self, codes: "np.ndarray") -> "np.ndarray":
        """Vocabulary ids (int64) of an array of codes; ValueError outside 0..num_codes-1."""
        import numpy as np

        codes = np.asarray(codes, dtype=np.int64)
        if codes.size and (codes.min() < 0 or codes.max() >= self.num_codes):
            bad = codes[(codes < 0) | (codes >= self.num_codes)].flat[0]
            raise ValueError(f"image code {bad} is outside 0..{self.num_codes - 1}")
        return codes + self.image_start

    def codes_from_ids(self, ids: "np.ndarray") -> "np.ndarray":
        """Codes (int64) of an array of image ids; ValueError for an id that is not an image id."""
        import numpy as np

        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and (ids.min() < self.image_start or ids.max() >= self.image_end):
            bad = ids[(ids < self.image_start) | (ids >= self.image_end)].flat[0]
            raise ValueError(f"id {bad} is not an image id ({self.image_start}..{self.image_end - 1})")
        return ids - self.image_start

    def image_span(self, codes: "np.ndarray") -> "np.ndarray":
        """[boi] + the ids of one image's codes + [eoi], int64 [1026]; ValueError for another number of codes."""
        import numpy as np

        codes = np.asarray(codes)
        if codes.shape != (IMAGE_CODES,):
            raise ValueError(f"an image of {codes.size} codes, expected {IMAGE_CODES}")
        return np.concatenate([[self.boi], self.ids_from_codes(codes), [self.eoi]])


def code_name(code: int) -> str:
    """The tokenizer's name of an image code: 5678 -> IMGIMGFGHIZ."""
    return "IMGIMG" + str(code).translate(_LETTERS) + "Z"


def read_vocab(path: str | Path) -> dict[str, int]:
    """The name -> id mapping of a tokenizers JSON file; VocabError if it is not one."""
    try:
        spec = json.loads(Path(path).read_text(encoding="utf-8"))
        vocab = dict(spec["model"]["vocab"])
        vocab.update({token["content"]: token["id"] for token in spec["added_tokens"]})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise VocabError(f"{path}: not a tokenizers JSON file ({error})") from error
    return vocab


class TextTokenizer:
    """The text side of the vocabulary: encode and decode strings, special names included.

    path: a tokenizers JSON file of a checkpoint; VocabError if its ids are not laid out as Chameleon's.
    Both spellings of the placeholder are accepted in text, whichever of the two tokenizer files was opened.
    """

    def __init__(self, path: str | Path):
        from tokenizers import Tokenizer

        self.path = Path(path)
        self.layout = IdLayout.from_file(path)
        self._tokenizer = Tokenizer.from_file(str(path))
        self._placeholder_name = str(self._tokenizer.id_to_token(self.layout.placeholder))
        # The reference takes every name that begins with "<" (but "<" itself) for a special token and never
        # generates it, ordinary text such as "</" included; kept, so that generation agrees with it id for id.
        self.unwritable = sorted(
            i
            for name, i in self._tokenizer.get_vocab().items()
            if name.startswith("<") and name != "<" and i >= self.layout.text_start
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos; `<image>` becomes the placeholder id."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        for name in PLACEHOLDER_NAMES:
            texts = [text.replace(name, self._placeholder_name) for text in texts]
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; special and image ids are left out."""
        return self._tokenizer.decode([int(i) for i in ids if i >= self.layout.text_start])

    def sha256(self) -> str:
        """Hash of the name -> id mapping and merges, the same for both spellings of the placeholder."""
        spec = json.loads(self.path.read_text(encoding="utf-8"))
        vocab = {("<image>" if k in PLACEHOLDER_NAMES else k): v for k, v in read_vocab(self.path).items()}
        text = json.dumps([sorted(vocab.items()), spec["model"].get("merges")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
