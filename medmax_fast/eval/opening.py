"""From flags to who takes part in an evaluation: the model that answers, the judge, and the image-text encoder."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmax_fast.config import PROTOCOLS, EvalConfig
from medmax_fast.eval.backends.openai import OpenAIBackend
from medmax_fast.eval.backends.protocol import NEW_TOKENS, Ask, Backend
from medmax_fast.eval.judge import Judge, load_prompts
from medmax_fast.eval.servers.chat import ChatClient, key_from_environment
from medmax_fast.eval.servers.spending import Meter, cost, price_of
from medmax_fast.eval.similarity import available
from medmax_fast.files import hash_file, hash_folder
from medmax_fast.runtime import InputError, comma_list, log, pick_device, pick_dtype, require_at_least

OPENAI = "https://api.openai.com/v1"
# Environment variables that hold keys, the first that is set.
KEYS = ("OPENAI_API_KEY",)
JUDGE_KEYS = ("MEDMAX_JUDGE_API_KEY", "OPENAI_API_KEY")
# Requests and replies of servers, kept in the run's folder.
REPLIES = "replies"
SERVER_BATCHES = 16
# What one image is reckoned to cost at a server, in ids. gpt-4o takes 85 and 170 for each tile of 512 x 512, of which
# there are four at most in most pictures; gpt-4o-mini 2,833 and 5,667, at a lower price.
SERVER_IMAGE_IDS = {"gpt-4o-mini": 25_500, "": 1000}


# Flags that mean something only with certain values of another one.
_GOES_WITH = (
    ("ckpt", "backend", ("native",)),
    ("vqgan", "backend", ("native",)),
    ("model", "backend", ("hf", "openai")),
    ("api_url", "backend", ("openai",)),
    ("price", "backend", ("openai",)),
    ("judge_url", "judge", ("openai",)),
    ("judge_prompts", "judge", ("openai",)),
    ("judge_price", "judge", ("openai",)),
)


@dataclass(frozen=True)
class Servers:
    """Connections that cost nothing until they are used: the model's, the judge's, and what both have cost so far.

    continued: whether replies from before are there.
    """

    backend: OpenAIBackend | None
    judge: Judge | None
    meter: Meter
    continued: bool
    prices: tuple[float, float] | None
    judge_prices: tuple[float, float] | None

    def announce(self, what: str, expected: dict, before: float | None = None) -> float:
        """Say what a server will cost at most, and return it.

        before: what is announced before it; given when nothing is asked yet, where more than the budget is an
        InputError. A run that is under way, or continued, has paid for a part, and goes on until the budget is spent.
        """
        usd, budget = expected["usd"], self.meter.budget
        if usd is None:
            price = "at a price that is not known"
        else:
            price = f"about {usd:.2f} USD" if usd >= 0.005 else "under 0.01 USD"
        tokens = f"{expected['prompt_tokens']:,} ids in and {expected['completion_tokens']:,} out"
        log(f"eval: {what}: at most {expected['calls']:,} requests, about {tokens}, {price}; retries come on top")
        if budget and usd is not None and before is not None and not self.continued and before + usd > budget:
            already = f", beside {before:.4f} USD before it" if before else ""
            what = f"{what} may cost about {usd:.4f} USD{already}"
            raise InputError(f"--budget {budget:g}: {what}; raise it, or ask less with --limit")
        return usd or 0.0


def check_flags(config: EvalConfig, backend: Backend | None) -> None:
    """InputError for flags that go with nothing, before any file is read."""
    if config.protocol not in PROTOCOLS:
        raise InputError(f"--protocol {config.protocol}: expected {' or '.join(PROTOCOLS)}")
    require_at_least(config, 1, "batch_size", "batch_tokens", "concurrency")
    require_at_least(config, 0, "max_new_tokens", "limit", "budget")
    if not math.isfinite(config.budget):
        raise InputError(f"--budget {config.budget}: expected US dollars")
    for flag, other, values in _GOES_WITH:
        if getattr(config, flag) and getattr(config, other) not in values:
            name, found = flag.replace("_", "-"), getattr(config, other)
            raise InputError(f"--{name} goes with --{other} {' or '.join(values)}, found --{other} {found}")
    if config.backend == "native" and backend is None and not config.ckpt:
        raise InputError("--ckpt: missing, needed with --backend native")
    if config.backend != "native" and not config.model:
        raise InputError(f"--model: missing, needed with --backend {config.backend}")
    if config.budget and "openai" not in (config.backend, config.judge):
        raise InputError("--budget: there is no server that costs anything; leave it out")
    if config.backend != "native" and config.prompt_form == "base":
        raise InputError(f"--prompt-form base: --backend {config.backend} asks in turns, expected chat or tuned")
    for flag in ("ckpt", "model"):
        folder = getattr(config, flag)
        if folder and Path(folder).is_dir() and Path(config.output).resolve().is_relative_to(Path(folder).resolve()):
            # The run would change the hash of the model that it is about.
            raise InputError(f"--output {config.output}: lies inside --{flag}, expected a folder of its own")
    if config.fid == "clip" and encoder_name(config) == "none":
        raise InputError("--fid clip: there is no image-text encoder, give one with --clip")


def encoder_name(config: EvalConfig) -> str:
    """The image-text encoder that --clip means on this machine, or `none`."""
    if config.clip == "auto":
        return "none" if available() else "biomedclip"
    return config.clip


def lacking(config: EvalConfig, backend: Backend | None) -> dict[str, str]:
    """Kind of task -> why this run cannot do it."""
    draws = backend.draws if backend else {"native": True, "hf": False, "openai": None}[config.backend]
    named = any(task.startswith("image_generation_") for task in comma_list(config.tasks))
    if draws is False:
        return {"drawing": f"the model of --backend {config.backend} does not draw"}
    if draws is None and not named:
        return {"drawing": "few servers draw; name the tasks in --tasks to ask for pictures all the same"}
    if encoder_name(config) == "none" and config.fid == "none":
        reason = available() if config.clip == "auto" else "--clip none"
        return {"drawing": f"there is no image-text encoder to compare pictures with ({reason})"}
    return {}


def can_draw(config: EvalConfig) -> bool:
    """Whether our engine could decode what it draws, looked up before weights are loaded; True for other backends."""
    if config.backend != "native":
        return True
    from medmax_fast.model.checkpoint import open_checkpoint

    return open_checkpoint(config.ckpt, config.vqgan).draws


def batch_budget(config: EvalConfig) -> int:
    """Ids of a batch; servers get larger ones, whose slowest answer holds up fewer others: replies are kept anyway."""
    return config.batch_tokens * (SERVER_BATCHES if config.backend == "openai" else 1)


def prompt_form(config: EvalConfig) -> str:
    """The form of questions that --prompt-form means with this backend."""
    if config.prompt_form == "auto":
        return "tuned" if config.backend == "native" else "chat"
    return config.prompt_form


def precision_name(config: EvalConfig) -> str | None:
    """The arithmetic that --precision means on this machine; None for a server's."""
    if config.backend == "openai":
        return None
    return str(pick_dtype(config.precision, pick_device(config.device))).removeprefix("torch.")


def open_servers(config: EvalConfig, cache: Path) -> Servers:
    """Clients of the servers that the flags name; nothing is sent yet. cache: folder for what they reply."""
    meter = Meter(config.budget)
    prices = price_of(config.model, config.price, "--price") if config.backend == "openai" else None
    judge_prices = price_of(config.judge_model, config.judge_price, "--judge-price")
    backend = judge = None
    options: dict[str, Any] = {"cache": cache, "meter": meter}
    if config.backend == "openai":
        key = key_from_environment(*KEYS)
        client = ChatClient(_url(config.api_url), config.model, key, prices=prices, flag="--api-url", **options)
        backend = OpenAIBackend(client, config.concurrency)
    if config.judge == "openai":
        url, key = _url(config.judge_url), key_from_environment(*JUDGE_KEYS)
        client = ChatClient(url, config.judge_model, key, prices=judge_prices, flag="--judge-url", **options)
        judge = Judge(client, load_prompts(config.judge_prompts), config.concurrency)
    if config.budget:
        meter.count_kept(cache, {config.model: prices, config.judge_model: judge_prices})
    return Servers(backend, judge, meter, cache.exists(), prices, judge_prices)


def _url(flag: str) -> str:
    return flag or os.environ.get("OPENAI_BASE_URL") or OPENAI


def open_backend(config: EvalConfig, servers: Servers) -> Backend:
    """The model, loaded; InputError names what is wrong with it."""
    if servers.backend:
        return servers.backend
    device = pick_device(config.device)
    if device.type == "cuda":
        import torch

        # Kernels and graphs run on the current device.
        torch.cuda.set_device(device)
    if config.backend == "hf":
        from medmax_fast.eval.backends.hf import HFBackend

        return HFBackend.from_pretrained(config.model, device, pick_dtype(config.precision, device))
    from medmax_fast.eval.backends.native import NativeBackend

    return NativeBackend.load(config.ckpt, config.vqgan, config.device, config.precision)


def model_hash(config: EvalConfig) -> str | None:
    """SHA-256 of the names and contents of a model folder's files; None for a model of a hub or a server."""
    name = config.ckpt or config.model
    if not name or config.backend == "openai":
        return None
    if config.backend == "native" and not Path(name).is_dir():
        raise InputError(f"--ckpt {name}: no such folder")
    return hash_path(name)


def hash_path(name: str) -> str | None:
    """SHA-256 of a file or folder; None for a name that is neither, as of a model on a hub."""
    path = Path(name)
    return hash_file(path) if path.is_file() else hash_folder(path) if path.is_dir() else None


def estimate_asks(asks: list[Ask], model: str, prices: tuple[float, float] | None) -> dict:
    """What asking a server takes: {"calls", "prompt_tokens", "completion_tokens", "usd" (None without prices)}.

    Four characters an id, SERVER_IMAGE_IDS an image, and answers as long as they may be.
    """
    pieces = [piece for ask in asks for piece in ask.content]
    image = next(ids for name, ids in SERVER_IMAGE_IDS.items() if model.startswith(name))
    prompt = sum(len(p["text"]) // 4 + 1 if p["type"] == "text" else image for p in pieces)
    completion = sum(ask.new_tokens or NEW_TOKENS for ask in asks)
    usd = cost(prompt, completion, prices)
    return {"calls": len(asks), "prompt_tokens": prompt, "completion_tokens": completion, "usd": usd}
