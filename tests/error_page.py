"""Writes docs/errors.md: every error message by stage, each with an example as a test has produced it.

`make errors` runs it. The examples of new messages come from the last sessions of pytest (run the test of yours first);
those of old ones stay as they are in the page, as long as they fit.
"""

import json
import re

from error_recorder import KEPT
from error_sites import MARK, ROOT, Message, messages

PAGE = ROOT / "docs" / "errors.md"
TOP = """# Error messages

Every message that tells of bad usage or bad input, in the order of the pipeline. `{names}` stand for what is filled in;
below each message is one as a test of this repository has produced it, and the test. A command prints one such line
on standard error, after `medmax COMMAND:`, and ends with status 2, or with 3 where more inputs were rejected than
allowed. Reasons for single images and rows are in `rejected.jsonl`. What is in parentheses at the end are often the
words of a library.

This page is written by `make errors` from the sources and the tests, never by hand.
"""
# Heading, what to know of all its messages, and the files: the longest that a file's name begins with counts.
STAGES = (
    ("Any command", "", ("cli.py", "runtime.py", "files.py", "interruption.py")),
    ("Checkpoints", "`init`, `convert`, `merge`, and every command with `--ckpt`.", ("vocab.py", "model/")),
    ("Tables and archives", "", ("data/rows.py", "data/image_list.py", "data/archive.py", "data/parts.py")),
    ("Images", "", ("data/images.py", "data/dicom.py", "data/dali.py")),
    (
        "Codes: tokenize and decode",
        "",
        ("tokenization.py", "encoding.py", "decode.py", "data/codes.py", "data/shards.py", "data/journal.py")
        + ("model/image_tokenizer.py", "model/picture_decoder.py"),
    ),
    ("Token stores: build and inspect", "", ("data/", "inspection.py")),
    (
        "Training",
        "",
        ("train.py", "training/", "data/loader.py", "data/collate.py")
        + ("model/trainable.py", "model/adapter.py", "model/probe.py"),
    ),
    ("Scores", "", ("score.py",)),
    ("Generation", "", ("generate/",)),
    ("Evaluation", "", ("eval/",)),
    ("Server and demo", "", ("serving/", "demo/")),
    ("Doctor, reports and benchmarks", "", ("doctor/", "report.py", "figures/", "bench/")),
)
# What to do, by template, where a message has no room for it.
ADVICE = {
    "{path}: no such file": "A relative path in a table starts from the table's folder.",
    "{path}: not UTF-8 text ({error})": "Save the file as UTF-8.",
    "{count} inputs rejected, {limit} allowed": "`rejected.jsonl` says why; `--max-rejected` allows more.",
    "{path}: corrupt Parquet ({error})": "Write or download the file again.",
    "{name}: gzip data is cut off, expected more (incomplete, or parts are missing)": "Download the archive again.",
    "{path}: not a safetensors file ({error})": "Compare its size with the original's.",
    "{folder}: no tokenizer file, expected {tokenizer_files}": "Give the checkpoint's own folder.",
    "needs {need} positions of the cache, which holds {have}; lower max_length": "Or raise `--cache-gb`.",
    "{flag} {url}: no server found there ({error})": "Start the server first, and check the port.",
    "a file cannot be written ({strerror}); make room and start again": "What was finished is kept.",
}


# A code span; text with backticks takes two.
_SPAN = r"(`` .*? ``|`[^`]*`)"
_ITEM = re.compile(rf"- {_SPAN}(?: \({_SPAN}\))?")
_EXAMPLE = re.compile(rf"    {_SPAN} \({_SPAN}\)")

# (heading, template) -> (text, test)
Examples = dict[tuple[str, str], tuple[str, str]]


def stage_of(file: str) -> str:
    """The heading under which the messages of a file stand."""
    fits = [(len(part), heading) for heading, _, parts in STAGES for part in parts if file.startswith(part)]
    if not fits:
        raise SystemExit(f"medmax_fast/{file}: give it a place in STAGES of tests/error_page.py")
    return max(fits)[1]


def shown() -> list[Message]:
    """All messages that have words of their own; the others hand on a message made elsewhere."""
    return [m for m in messages() if re.search("[A-Za-z]{2}", re.sub(f"{MARK}.*?{MARK}", "", m.marked))]


def examples_of(page: str) -> Examples:
    """What a page shows."""
    found, heading, template = {}, "", ""
    for line in page.split("\n"):
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif item := _ITEM.fullmatch(line):
            template = _plain(item[1])
            if item[2]:
                found[heading, template] = template, _plain(item[2])
        elif example := _EXAMPLE.fullmatch(line):
            found[heading, template] = _plain(example[1]), _plain(example[2])
    return found


def render(examples: Examples) -> str:
    """The page; SystemExit where a message has no example, or none that fits."""
    lines, lacking, by_stage = [TOP], [], {heading: {} for heading, _, _ in STAGES}
    for message in shown():
        by_stage[stage_of(message.file)].setdefault(message.template, message)
    for heading, words, _ in STAGES:
        lines += [f"## {heading}\n", *([words + "\n"] if words else [])]
        for template, message in by_stage[heading].items():
            text, test = examples.get((heading, template), ("", ""))
            if not message.fits(text):
                lacking.append(f"medmax_fast/{message.file}:{message.first}: {template}")
            elif text == template:
                lines.append(f"- {_code(template)} ({_code(test)})\n")
            else:
                lines += [f"- {_code(template)}\n", f"    {_code(text)} ({_code(test)})\n"]
            if advice := ADVICE.get(template):
                lines.append(f"    {advice}\n")
    if unknown := ADVICE.keys() - {message.template for message in shown()}:
        raise SystemExit(f"ADVICE of tests/error_page.py for messages that are gone: {sorted(unknown)}")
    if lacking:
        raise SystemExit(
            "\n".join(["no example of these; run the tests that produce them, then `make errors`:", *lacking])
        )
    return "\n".join(lines).rstrip() + "\n"


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _plain(code: str) -> str:
    return code[3:-3] if code.startswith("`` ") else code[1:-1]


def from_tests() -> Examples:
    """What the last sessions of pytest in this checkout have seen."""
    path = ROOT / ".pytest_cache" / "v" / KEPT
    kept = json.loads(path.read_text()) if path.exists() else {}
    return {(stage_of(f), t): tuple(example) for f, texts in kept.items() for t, example in texts.items()}


def tests() -> set[str]:
    """Such as test_rows.py::test_broken_files."""
    files = (ROOT / "tests").glob("test_*.py")
    return {f"{file.name}::{name}" for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}


def main() -> None:
    known = tests()
    old = examples_of(PAGE.read_text()) if PAGE.exists() else {}
    old = {place: example for place, example in old.items() if example[1] in known}
    PAGE.write_text(render(from_tests() | old))


if __name__ == "__main__":
    main()
