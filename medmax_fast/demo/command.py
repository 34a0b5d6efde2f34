"""`medmax demo`: the page on an address of this machine until Ctrl-C or SIGTERM; then every file is deleted."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from medmax_fast.config import DemoConfig
from medmax_fast.demo.talk import Service, Visitors
from medmax_fast.generate.engine import Engine
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.runtime import InputError, log, require_at_least
from medmax_fast.serving.command import Terminated, listening, names_of, sigterm_raises
from medmax_fast.serving.dispatcher import Dispatcher
from medmax_fast.serving.uploads import Uploads

AUTH_NAME = "MEDMAX_AUTH"
# Threads for handlers beside those that wait for an answer.
_THREADS = 32
# Seconds between two looks at whether the engine is still running.
_PULSE = 0.5


@dataclass(frozen=True)
class Demo:
    """A page that is being served. folder: where all that visitors see lies, beside the uploads' own."""

    url: str
    dispatcher: Dispatcher
    visitors: Visitors
    uploads: Uploads
    folder: Path


def demo(config: DemoConfig) -> dict:
    """Serve the page until SIGTERM, then return a summary; Ctrl-C ends it in the same way, as an interrupt."""
    begun = time.monotonic()
    try:
        with sigterm_raises(), serving(config) as running:
            print(f"medmax demo: {running.url} (Ctrl-C ends it)", flush=True)
            while running.dispatcher.alive:
                time.sleep(_PULSE)
        raise RuntimeError("the engine has stopped, as told above")
    except Terminated:
        return {"seconds": round(time.monotonic() - begun, 1)}
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("the page has ended; uploads and pictures are deleted") from stop


@contextmanager
def serving(config: DemoConfig) -> Iterator[Demo]:
    """The page, served by threads of this process; on leaving all answers are ended and all files deleted."""
    require_at_least(config, 1, "batch_size")
    require_at_least(config, 0, "waiting", "cache_gb")
    users = users_from_environment() if config.auth else []
    # Gradio listens by itself; what is wrong with the address is said before a model is loaded.
    with listening(config.host, config.port) as listener:
        port, here = listener.getsockname()[1], names_of(listener)
    uploads = Uploads(config.max_upload_mb, config.max_pixels)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="medmax-"))).resolve()
        page = _page_module(folder)
        stack.enter_context(uploads)
        checkpoint = open_checkpoint(config.ckpt, config.vqgan)
        engine = Engine.from_checkpoint(checkpoint, config.device, config.precision, config.quantize, config.cache_gb)
        dispatcher = stack.enter_context(Dispatcher(engine, config.batch_size, config.waiting))
        visitors = Visitors(Service(dispatcher, engine.tokenizer, checkpoint.draws, uploads, folder))
        blocks = page.build(visitors, Path(config.ckpt).resolve().name, checkpoint.draws)
        stack.callback(blocks.close, verbose=False)
        # Left before the page is closed, whose handlers would go on waiting for their answers.
        stack.enter_context(visitors)
        limits = {"max_file_size": uploads.max_bytes, "max_threads": config.batch_size + config.waiting + _THREADS}
        names = () if config.share else here
        url = page.launch(blocks, config.host, port, config.share, users, names, **limits)
        if not users and (config.share or not here):
            log(f"medmax demo: whoever reaches {url} may use this page; --auth asks for a name and a password")
        yield Demo(url, dispatcher, visitors, uploads, folder)


def users_from_environment() -> list[tuple[str, str]]:
    """(name, password) pairs of MEDMAX_AUTH; InputError, without what it holds, for anything else."""
    text = os.environ.get(AUTH_NAME, "")
    if not text.strip():
        raise InputError(f"--auth: {AUTH_NAME} is not set, expected name:password, several separated by commas")
    pairs = [entry.strip().partition(":") for entry in text.split(",")]
    for number, (name, _, password) in enumerate(pairs, 1):
        if not (name and password):
            raise InputError(f"{AUTH_NAME}: entry {number} of {len(pairs)} is not of the form name:password")
    return [(name, password) for name, _, password in pairs]


def _page_module(folder: Path):
    """The module that needs Gradio, which reads its settings from the environment."""
    os.environ.update(GRADIO_TEMP_DIR=str(folder), GRADIO_ANALYTICS_ENABLED="False", GRADIO_HEARTBEAT_INTERVAL="3")
    try:
        from medmax_fast.demo import page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise InputError("gradio is missing, needed for the demo: pip install 'medmax_fast[demo]'") from error
    return page
