"""The `medmax` command: a table of commands, flags made from the configuration dataclasses, exit statuses.

Every command is a function from its frozen config to a summary dict. Standard output gets the summary as a short
table and, as its last line, as one JSON object; logs go to standard error. Exit status: 0 done, 2 bad usage or
input (one line, no traceback), 3 finished with more inputs rejected than allowed (or stages left out), 130 interrupted.
"""

import argparse
import functools
import json
import os
import shlex
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib import import_module

from medmax_fast import __version__, config
from medmax_fast.runtime import Incomplete, InputError, leave, log, print_table, table_cell
from medmax_fast.vocab import VocabError

# command -> (configuration, module, function); modules are imported when their command is called.
COMMANDS = {
    "init": (config.InitConfig, "medmax_fast.model.init", "init"),
    "doctor": (config.DoctorConfig, "medmax_fast.doctor", "doctor"),
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
    "report": (config.ReportConfig, "medmax_fast.report", "report"),
    "bench": (config.BenchConfig, "medmax_fast.bench.command", "bench"),
}


# Commands whose flags may also come from a file, given as @FILE: flags as on the command line, # begins a comment.
WITH_RECIPES = (config.TrainConfig,)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; every flag, its type, choices and default come from a dataclass field."""
    parser = argparse.ArgumentParser(prog="medmax", description="MedMax: tokenize, train, generate, evaluate.")
    parser.add_argument("--version", action="version", version=f"medmax_fast {__version__}")
    # The deepspeed launcher puts this first; the environment says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (cls, _, _) in COMMANDS.items():
        doc = cls.__doc__.strip()
        recipes = {"fromfile_prefix_chars": "@"} if cls in WITH_RECIPES else {}
        command = commands.add_parser(name, help=doc, description=doc, allow_abbrev=False, **recipes)
        command.convert_arg_line_to_args = functools.partial(shlex.split, comments=True)
        hints = typing.get_type_hints(cls)
        for field in fields(cls):
            _add_flag(command, field, hints[field.name])
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


def _plain_type(kind) -> type:
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    return kind


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
    parsed = vars(build_parser().parse_args(arguments))
    name = parsed.pop("command")
    parsed.pop("local_rank")
    cls, module, function = COMMANDS[name]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in parsed.items()}
    try:
        result = getattr(import_module(module), function)(cls(**values))
    except (InputError, VocabError) as error:
        log(f"medmax {name}: {error}")
        return 2
    except Incomplete as left:
        print_result(left.result)
        log(f"medmax {name}: {left}")
        return 3
    except KeyboardInterrupt as stop:
        log(f"medmax {name}: interrupted; {str(stop) or 'what was finished is kept, the same command continues'}")
        return 130
    if int(os.environ.get("RANK", 0)) == 0:
        print_result(result)
    return 0


def entry() -> None:
    """Console-script entry point."""
    leave(main())
