"""Finds what README.md and docs/*.md tell a reader to type: blocks of commands, of Python, and commands in a line."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("sh", "bash", "console", "shell")
# Blocks that show what a file or a program says.
SHOWN = ("json", "jsonl", "text", "yaml", "http")
# Before a block that is not run, with the reason.
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """Lines between fences, or indented by four; `number` is the first one's in the page, `language` may be ""."""

    page: Path
    number: int
    language: str
    lines: tuple[str, ...]
    not_run: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.number}"

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    at, not_run = 0, ""
    while at < len(lines):
        line, before = lines[at], lines[at - 1] if at else ""
        if fence := re.fullmatch(r"```(\w*)", line.strip()):
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == "```")
            found.append(Block(page, at + 2, fence[1], tuple(lines[at + 1 : end]), not_run))
            at, not_run = end + 1, ""
        elif line.startswith("    ") and not before.strip() and not _belongs_to_text(lines, at):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = tuple(line[4:] for line in lines[at:end])
            while not text[-1].strip():
                text = text[:-1]
            found.append(Block(page, at + 1, "", text, not_run))
            at, not_run = end, ""
        else:
            if match := NOT_RUN.fullmatch(line.strip()):
                not_run = match[1]
            at += 1
    return found


def _belongs_to_text(lines: list[str], at: int) -> bool:
    """Whether an indented line goes on with an item of a list, or with options of a `:::` directive."""
    before = next((line for line in reversed(lines[:at]) if line.strip()), "")
    in_list = re.match(r" *([-*]|\d+\.) | +\S", before) and not lines[at].startswith("     ")
    return bool(in_list) or before.startswith(":::")


def commands(block: Block) -> list[tuple[int, str]]:
    """(line number, command) of a block of shell commands: lines joined where they go on, without prompts."""
    found, pending, start = [], "", 0
    for number, line in enumerate(block.lines, block.number):
        line = line.removeprefix("$ ") if not pending else line
        start = start if pending else number
        if line.endswith("\\"):
            pending += line[:-1] + " "
            continue
        if _is_open(pending + line):
            pending += line + "\n"
            continue
        if (pending + line).strip() and not (pending + line).lstrip().startswith("#"):
            found.append((start, pending + line))
        pending = ""
    assert not pending, f"{block.place}: the last command goes on behind the block"
    return found


def _is_open(command: str) -> bool:
    """Whether a quotation has not been closed yet."""
    try:
        words(command)
    except ValueError:
        return True
    return False


def words(command: str) -> list[str]:
    """A command's words, without a comment behind it."""
    return shlex.split(command, comments=True)


def inline_commands(page: Path) -> list[str]:
    """What stands in backquotes and begins with a command, outside of blocks."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        indented = "\n".join(f"    {line}" if line else line for line in block.lines)
        text = text.replace(block.text if block.language else indented, "")
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```\w*\n```", "", text))
    return [" ".join(span.split()) for span in spans if re.match(r"(medmax|make|pip install|python -m) ", span)]
