"""The drawer of settings: which fields of a Request it offers, in what range, with the Request's own defaults."""

import secrets
from dataclasses import dataclass, fields
from typing import Any

from medmax_fast.generate.requests import Request
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_IDS

DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Request)}
# Positions that are kept free for an answer in text, and beside a picture in an interleaved one.
_ROOM_FOR_TEXT = 128


@dataclass(frozen=True)
class Setting:
    """A slider: the field of a Request that it sets, its label and a line that explains it, and its range."""

    name: str
    label: str
    info: str
    least: float
    most: float
    step: float


# Within what Request.check allows, as far as anyone would want to go.
SETTINGS = (
    Setting("temperature", "Temperature", "of text", 0, 2, 0.05),
    Setting("top_p", "Top-p", "of text; 1: every word", 0.05, 1, 0.05),
    Setting("repetition_penalty", "Repetition penalty", "of text; 1: none", 1, 2, 0.05),
    Setting("image_temperature", "Image temperature", "of pictures", 0, 2, 0.05),
    Setting("image_top_p", "Image top-p", "of pictures", 0.05, 1, 0.05),
    Setting("guidance_text", "Guidance by text", "follow the words closely", 0, 10, 0.1),
    Setting("guidance_image", "Guidance by image", "follow the images closely", 0, 10, 0.1),
    Setting("max_new_tokens", "Longest text", "tokens, afresh after a picture", 1, 2048, 1),
)
NAMES = (*(setting.name for setting in SETTINGS), "greedy", "seed")


def published() -> list:
    """What the controls show at first, in the order of NAMES; no seed means another one for every answer."""
    return [*(DEFAULTS[setting.name] for setting in SETTINGS), DEFAULTS["greedy"], ""]


def request_fields(values: list) -> dict:
    """Keywords of a Request from the controls' values, in the order of NAMES; an emptied control means its default.

    InputError for a seed that is no number.
    """
    chosen = {name: DEFAULTS[name] if value is None else value for name, value in zip(NAMES, values, strict=True)}
    chosen["max_new_tokens"] = int(chosen["max_new_tokens"])
    seed = chosen["seed"].strip()
    if seed and not (seed.isascii() and seed.isdecimal()):
        raise InputError(f"seed {seed!r}: expected a whole number, or nothing for another one each time")
    chosen["seed"] = int(seed) if seed else secrets.randbits(31)
    return chosen


def room_for_answer(mode: str, max_new_tokens: int) -> int:
    """Positions that a prompt leaves free, so that an answer of this mode finds room."""
    text = min(max_new_tokens, _ROOM_FOR_TEXT)
    return {"text": text, "image": IMAGE_IDS, "any": IMAGE_IDS + text}[mode]
