"""The `medmax` command: a table of commands, flags made from the configuration dataclasses, exit statuses.

Every command is a function from its frozen config to a summary dict. Standard output gets the summary as a short
table and, as its last line, as one JSON object; logs go to standard error. Exit status: 0 done, 2 bad usage or
input (one line, no traceback), 3 finished with more inputs rejected than allowed (or stages left out, or kernels that
fail their self-test), 130 interrupted, 141 nobody reads standard output any more.

Ctrl-C ends with one line: what is kept, and the command line that continues, which is the launcher's under torchrun.
"""

import argparse
import contextlib
import json
import math
import select
import shlex
import signal
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from importlib import import_module

from medmax_fast import __version__, config
from medmax_fast.files import input_error
from medmax_fast.interruption import command_line, leaving_at_once, raise_again
from medmax_fast.progress import close_bars
from medmax_fast.runtime import (
    Incomplete,
    InputError,
    discard,
    leave,
    log,
    one_line,
    print_table,
    quiet,
    rank_and_world,
    table_cell,
)
from medmax_fast.vocab import VocabError

# command -> (configuration, module, function); modules are imported when their command is called.
COMMANDS = {
    "init": (config.InitConfig, "medmax_fast.model.init", "init"),
    "doctor": (config.DoctorConfig, "medmax_fast.doctor.command", "doctor"),
    "tokenize": (config.TokenizeConfig, "medmax_fast.tokenization", "tokenize_images"),
    "decode": (config.DecodeConfig, "medmax_fast.decode", "decode_images"),
    "build": (config.BuildConfig, "medmax_fast.data.build", "build"),
    "inspect": (config.InspectConfig, "medmax_fast.inspection", "inspect"),
    "train": (config.TrainConfig, "medmax_fast.train", "train"),
    "merge": (config.MergeConfig, "medmax_fast.model.merge", "merge"),
    "convert": (config.ConvertConfig, "medmax_fast.model.convert", "convert"),
    "score": (config.ScoreConfig, "medmax_fast.score", "score"),
    "generate": (config.GenerateConfig, "medmax_fast.generate.command", "generate"),
    "eval": (config.EvalConfig, "medmax_fast.eval.run", "evaluate"),
    "serve": (config.ServeConfig, "medmax_fast.serving.command", "serve"),
    "demo": (config.DemoConfig, "medmax_fast.demo.command", "demo"),
    "report": (config.ReportConfig, "medmax_fast.report", "report"),
    "bench": (config.BenchConfig, "medmax_fast.bench.command", "bench"),
}


# Commands whose flags may also come from a file, given as @FILE: flags as on the command line, # begins a comment.
WITH_RECIPES = (config.TrainConfig,)
# Commands that, started again with the same flags, go on where they were stopped. The others leave a result or none.
CONTINUING = ("tokenize", "decode", "build", "train", "generate", "eval")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        """One line, as for all bad usage, in place of argparse's list of every flag."""
        self.exit(2, f"{self.prog}: {one_line(message)}; see {self.prog} --help\n")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Flags of a line of a recipe, as a shell would part them."""
        return shlex.split(arg_line, comments=True)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; every flag, its type, choices and default come from a dataclass field."""
    parser = _Parser(prog="medmax", description="MedMax: tokenize, train, generate, evaluate.")
    parser.add_argument("--version", action="version", version=f"medmax_fast {__version__}")
    # The deepspeed launcher puts this first; the environment says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "no progress, and no lines but warnings, errors and the result (default: off)"
    for name, (cls, _, _) in COMMANDS.items():
        doc = (cls.__doc__ or "").strip()
        recipes: dict[str, typing.Any] = {"fromfile_prefix_chars": "@"} if cls in WITH_RECIPES else {}
        command = commands.add_parser(name, help=doc, description=doc, allow_abbrev=False, **recipes)
        hints = typing.get_type_hints(cls)
        for field in fields(cls):
            _add_flag(command, field, hints[field.name])
        command.add_argument("--quiet", action="store_true", help=text)
    return parser


def _add_flag(parser: argparse.ArgumentParser, field, kind) -> None:
    text = field.metadata["help"].replace("%", "%%")
    flag = "--" + field.name.replace("_", "-")
    if kind is bool:
        if off := field.metadata.get("off"):
            either = parser.add_mutually_exclusive_group()
            either.add_argument(flag, action="store_true", default=field.default, help=text)
            text = f"the opposite of {flag} (default)"
            either.add_argument(f"--{off}", dest=field.name, action="store_false", help=text)
            return
        text += f" (default: {'on' if field.default else 'off'})"
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        return
    options = {"help": text, "type": str if kind == tuple[str, ...] else _plain_type(kind)}
    if field.metadata["choices"]:
        options["choices"] = field.metadata["choices"]
    elif field.default is MISSING:
        # What is required and has no choices is a path.
        options["type"] = _path
    if field.metadata.get("positional"):
        if kind == tuple[str, ...]:
            options["nargs"] = "+" if field.default is MISSING else "*"
        parser.add_argument(field.name, metavar=field.name.upper(), **options)
        return
    if field.default is MISSING:
        options["required"] = True
    else:
        options["default"] = field.default
        if field.default not in ("", None):
            options["help"] += f" (default: {field.default})"
    parser.add_argument(flag, **options)


def _plain_type(kind) -> Callable[[str], str | int | float]:
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    return {int: _whole_number, float: _number}.get(kind, kind)


def _whole_number(text: str) -> int:
    with contextlib.suppress(ValueError):
        # Of 64 bits, as libraries take them.
        if abs(int(text)) < 2**63:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number")


def _path(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}, expected a path")
    return text


def _number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}, expected a finite number")


def print_result(result: dict) -> None:
    """The summary as `name  value` lines and small tables, then as one line of JSON.

    Its entry `printed`, if any, names those that the command itself has printed; it is left out.
    """
    printed = result.pop("printed", ())
    width = max((len(name) for name in result), default=0)
    for name, value in result.items():
        if name in printed:
            continue
        if isinstance(value, list) and value and isinstance(value[0], dict):
            print_table(value)
        elif not isinstance(value, list | dict):
            print(f"{name:<{width}}  {table_cell(value)}")
    print(json.dumps(result, ensure_ascii=False), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parsed = vars(build_parser().parse_args(given))
    name = parsed.pop("command")
    parsed.pop("local_rank")
    silent = parsed.pop("quiet")
    cls, module, function = COMMANDS[name]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in parsed.items()}
    continues = name in CONTINUING and bool(parsed.get("prompts", True))
    first = rank_and_world()[0] == 0
    try:
        with quiet(silent):
            with leaving_at_once(f"medmax {name}: interrupted; nothing was begun" if first else ""):
                command = getattr(import_module(module), function)
            return _finish(name, lambda: command(cls(**values)))
    except (InputError, VocabError) as error:
        log(f"medmax {name}: {error}")
        return 2
    except KeyboardInterrupt as stop:
        close_bars()
        if first:
            log(_interrupted(name, str(stop), continues, given))
        return 130
    except BrokenPipeError:
        if not _reader_gone():
            raise
        return 141
    except OSError as error:
        if not (said := input_error(error)):
            raise
        log(f"medmax {name}: {said}")
        return 2
    finally:
        close_bars()


def _finish(name: str, run: Callable[[], dict]) -> int:
    """Run a command and print its result."""
    try:
        result, left = run(), None
    except Incomplete as incomplete:
        result, left = incomplete.result, incomplete
    close_bars()
    if left or rank_and_world()[0] == 0:
        print_result(result)
    if left:
        log(f"medmax {name}: {left}")
    return 3 if left else 0


def _reader_gone() -> bool:
    """Whether it is standard output that nobody reads any more; it is then let go."""
    look = select.poll()
    look.register(sys.stdout, 0)
    gone = any(event & select.POLLERR for _, event in look.poll(0))
    if gone:
        discard(sys.stdout)
    return gone


def _interrupted(name: str, words: str, continues: bool, given: list[str]) -> str:
    """What is said of an interrupted command; `words`: what it says itself of what is kept."""
    line = f"medmax {name}: interrupted"
    if continues:
        return f"{line}; {words or 'what was finished is kept'}; to continue: {command_line(given)}"
    return f"{line}; {words}" if words else f"{line}; no result is kept; to run it again: {command_line(given)}"


def entry() -> None:
    """Console-script entry point."""
    raise_again()
    try:
        status = main()
    except KeyboardInterrupt:
        # Before the command was known, or again while an interruption was being answered.
        status = 130
    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    leave(status)
