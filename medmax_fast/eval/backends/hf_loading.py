"""From a folder or a name on the hub to a transformers model with its processor, or one line that says why not.

Only what can answer with text about images gets through: a decoder with all its weights, and a processor whose chat
template places an image. Code that comes with a checkpoint is never run. torchvision is not imported here; transformers
takes its image processors where it is installed, and its own PIL ones, which resample a little differently, elsewhere.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medmax_fast.progress import bars_on_terminals_only
from medmax_fast.runtime import InputError, one_line

# What a processor, its template or a model raises on a prompt that it cannot take; torch's shapes are RuntimeErrors.
REFUSALS = (ValueError, LookupError, ArithmeticError, StopIteration, TypeError, RuntimeError)


def load_model(name: str, device, dtype) -> tuple:
    """(model, processor, commit) of a folder or of the hub, as a torch.dtype on a torch.device; InputError if not so.

    commit: of the hub, None for a folder.
    """
    import transformers
    from huggingface_hub import hf_hub_download

    bars_on_terminals_only()
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise InputError(f"--model {name}: no such folder")
    with _loading(name):
        commit = None
        options: dict[str, Any] = {"trust_remote_code": False}
        if not os.path.isdir(name):
            # All files from one commit, even if the hub moves on meanwhile; the cache has a folder of that name.
            commit = options["revision"] = Path(hf_hub_download(name, "config.json")).parent.name
        config = transformers.AutoConfig.from_pretrained(name, **options)
        if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or config.is_encoder_decoder:
            raise InputError(
                f"--model {name}: a {config.model_type} model, expected a decoder that answers with text about "
                "images (transformers' AutoModelForImageTextToText)"
            )
        processor = transformers.AutoProcessor.from_pretrained(name, **options)
        check_processor(processor, name)
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True, **options
        )
        model.to(device)
    # transformers goes on with random numbers in the place of what it does not find.
    absent = sorted(report["missing_keys"])
    if absent:
        raise InputError(f"--model {name}: {len(absent)} weights are missing, such as {absent[0]}")
    return model.eval(), processor, commit


def refusals() -> tuple[type[Exception], ...]:
    """REFUSALS with the errors of templates."""
    from jinja2 import TemplateError

    return (*REFUSALS, TemplateError)


def check_processor(processor, name: str) -> None:
    """InputError for a processor that cannot put an image and a text into a prompt."""
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise InputError(f"--model {name}: has a {type(processor).__name__}, expected a processor of images and text")
    # Older checkpoints keep it with the tokenizer alone.
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if not processor.chat_template:
        raise InputError(f"--model {name}: its processor has no chat template, expected chat_template.jinja beside it")
    text = {"type": "text", "text": "a probing text"}
    failures: tuple[type[Exception], ...] = (*refusals(), TypeError)
    try:
        with_image, without = (
            processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            for content in ([{"type": "image"}, text], [text])
        )
    except failures as error:
        raise InputError(
            f"--model {name}: its chat template takes no list of images and texts ({one_line(error)})"
        ) from error
    # A template made for plain strings prints the list as Python does.
    if with_image == without or text["text"] not in with_image or "'type'" in with_image:
        raise InputError(f"--model {name}: its chat template places no images, expected one made for images and text")


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """What transformers raises on a model that it cannot load, as an InputError of one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    try:
        yield
    except InputError:
        raise
    except OutOfMemoryError as error:
        raise InputError(f"--model {name}: does not fit the GPU's memory ({one_line(error)})") from error
    except (
        ImportError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        RuntimeError,
        StrictDataclassError,
        SafetensorError,
    ) as error:
        reason = "cannot be loaded, expected a folder or a hub model of transformers"
        if "trust_remote_code" in str(error):
            reason = "runs code of its own, which is never done here; expected a model that transformers knows itself"
        elif "torchvision" in str(error).lower():
            reason = "its processor needs torchvision; install the one made for this torch"
        raise InputError(f"--model {name}: {reason} ({one_line(error)})") from error
