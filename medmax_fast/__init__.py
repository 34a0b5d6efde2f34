"""medmax_fast: mixed-modal biomedical assistants on Chameleon and Anole checkpoints, from images to report.

The public Python API, loaded on first use so that importing the package imports neither torch nor transformers:

    ImageTokenizer   images -> codes -> images (a checkpoint's VQGAN)
    TextTokenizer    text <-> ids, with the id layout of the vocabulary
    TokenStore       memory-mapped rows of ids, made by `medmax build`
    PackedLoader     packed batches of a store, resumable, the same on any number of ranks
    load_model       a checkpoint in either layout as a transformers Chameleon with packed attention
    packed_loss      summed cross-entropy of a packed batch over its supervised ids
    Engine, Request  batched text, image and interleaved generation; its pieces: TextPiece, PicturePiece, Result
    evaluate         the evaluation suite
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# For type checkers, which do not see what __getattr__ finds.
if TYPE_CHECKING:
    from medmax_fast.data.loader import PackedLoader as PackedLoader
    from medmax_fast.data.store import TokenStore as TokenStore
    from medmax_fast.eval.run import evaluate as evaluate
    from medmax_fast.generate.engine import Engine as Engine
    from medmax_fast.generate.requests import PicturePiece as PicturePiece
    from medmax_fast.generate.requests import Request as Request
    from medmax_fast.generate.requests import Result as Result
    from medmax_fast.generate.requests import TextPiece as TextPiece
    from medmax_fast.model.image_tokenizer import ImageTokenizer as ImageTokenizer
    from medmax_fast.model.load import load_model as load_model
    from medmax_fast.model.loss import packed_loss as packed_loss
    from medmax_fast.vocab import TextTokenizer as TextTokenizer

__version__ = "0.1.0"

_API = {
    "ImageTokenizer": "medmax_fast.model.image_tokenizer",
    "TextTokenizer": "medmax_fast.vocab",
    "TokenStore": "medmax_fast.data.store",
    "PackedLoader": "medmax_fast.data.loader",
    "load_model": "medmax_fast.model.load",
    "packed_loss": "medmax_fast.model.loss",
    "Engine": "medmax_fast.generate.engine",
    "Request": "medmax_fast.generate.requests",
    "TextPiece": "medmax_fast.generate.requests",
    "PicturePiece": "medmax_fast.generate.requests",
    "Result": "medmax_fast.generate.requests",
    "evaluate": "medmax_fast.eval.run",
}
__all__ = ["__version__", *_API]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_API[name]), name)
