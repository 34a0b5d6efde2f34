"""A pytest plugin that notes every error message of the package that the tests produce; conftest.py registers it.

After the whole suite the session fails, with their list, if messages were left that no test has produced, and if one
did not come on a single line. What was seen is kept in pytest's cache, from which error_page.py takes its examples.
"""

import argparse
import functools
import os
import re
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import pytest
from error_sites import PACKAGE, PARSER, ROOT, SHOWN, Message, messages

# In pytest's cache: file -> template -> [text, test].
KEPT = "medmax/errors"
# Folders that say nothing about a message, such as those of one test, and what differs from run to run.
_TEST = rf"{re.escape(tempfile.gettempdir())}/(pytest-of-[^/\s]+/pytest-\d+/(popen-gw\d+/)?+)?+[^/\s:,;')]++"
SCRUBBED = [
    (re.compile(rf"{_TEST}/"), ""),
    (re.compile(_TEST), "folder"),
    (re.compile(rf"({re.escape(str(ROOT))}|{re.escape(str(ROOT.parent / 'shared'))})/"), ""),
    (re.compile(r"(127\.0\.0\.1|localhost):\d+"), r"\1:8000"),
    (re.compile(r"\b([0-9a-f]{8})[0-9a-f]{24,}\b"), r"\1..."),
    (re.compile(r"\.([^/\s]+)\.[0-9a-f]{12}\.tmp\b"), r"\1"),
    (re.compile(r"0x[0-9a-f]{6,}"), "0x..."),
    (re.compile(r"(.)\1{40,}"), r"\1\1\1..."),
]


def scrubbed(text: str) -> str:
    """A message in ASCII, without what another run would have otherwise."""
    for pattern, replacement in SCRUBBED:
        text = pattern.sub(replacement, text)
    return "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in text)


class ErrorRecorder:
    """Watches the exceptions of SHOWN, in tests and in their fixtures, and what argparse says for a command."""

    def __init__(self, config: pytest.Config):
        self._config = config
        # (file, line, text) -> the first test that made it
        self._seen: dict[tuple[str, int, str], str] = {}
        self._deselected = 0
        self._complaints: list[str] = []
        for name, module in SHOWN.items():
            self._watch(getattr(import_module(f"medmax_fast.{module}"), name))
        self._watch_parser()

    def _watch(self, kind: type) -> None:
        before = kind.__init__

        @functools.wraps(before)
        def noting(error, *arguments, **named):
            before(error, *arguments, **named)
            frame = sys._getframe(1)
            # A subclass's own constructor is not the place.
            while frame.f_code.co_name == "__init__" and frame.f_locals.get("self") is error:
                frame = frame.f_back
            place = Path(frame.f_code.co_filename)
            if place.is_relative_to(PACKAGE):
                self._note(place.relative_to(PACKAGE).as_posix(), frame.f_lineno, str(error))

        kind.__init__ = noting

    def _watch_parser(self) -> None:
        before = argparse.ArgumentParser.exit

        def noting(parser, status=0, message=None):
            if parser.prog.split()[0] == "medmax" and message:
                self._note(PARSER, 0, message.strip())
            before(parser, status, message)

        argparse.ArgumentParser.exit = noting

    def _note(self, file: str, line: int, text: str) -> None:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        self._seen.setdefault((file, line, text), test)

    # ---- hooks ----

    def pytest_deselected(self, items) -> None:
        self._deselected += len(items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error) -> None:
        """A worker of xdist has ended."""
        output = getattr(node, "workeroutput", {})
        self._deselected += output.get("deselected", 0)
        for *place, test in output.get("errors", ()):
            self._seen.setdefault(tuple(place), test)

    def pytest_sessionfinish(self, session, exitstatus) -> None:
        if hasattr(self._config, "workeroutput"):
            self._config.workeroutput["errors"] = [[*place, test] for place, test in self._seen.items()]
            self._config.workeroutput["deselected"] = self._deselected
            return
        whole = exitstatus == 0 and self._whole()
        if not whole and not self._seen:
            return
        produced = {message: self._examples(message) for message in messages()}
        self._keep(produced)
        if whole:
            self._complaints = [
                f"{m.file}:{m.first}: no test produces: {m.template}" for m in produced if not produced[m]
            ]
            self._complaints += [f"{f}:{line}: several lines: {text!r}" for f, line, text in self._seen if "\n" in text]
        if self._complaints:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self._complaints:
            terminalreporter.section("error messages (tests/error_recorder.py)")
            for complaint in self._complaints:
                terminalreporter.write_line(complaint, red=True)

    # ---- what was seen ----

    def _examples(self, message: Message) -> list[tuple[str, str]]:
        return [
            (text, test)
            for (file, line, text), test in self._seen.items()
            if file == message.file and message.first <= line <= message.last and message.fits(text)
        ]

    def _whole(self) -> bool:
        options = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "collectonly")
        chosen = self._config.args_source is pytest.Config.ArgsSource.ARGS
        return not (chosen or self._deselected or any(self._config.getoption(o, None) for o in options))

    def _keep(self, produced: dict[Message, list[tuple[str, str]]]) -> None:
        cache = getattr(self._config, "cache", None)
        if cache is None or not any(produced.values()):
            return
        kept = cache.get(KEPT, {})
        for message, examples in produced.items():
            shown = [[scrubbed(text), test.partition("[")[0].removeprefix("tests/")] for text, test in examples if test]
            # The shortest of this session: the same whatever the order of the tests was.
            if shown := [(text, test) for text, test in shown if message.fits(text) and text == text.strip()]:
                kept.setdefault(message.file, {})[message.template] = min(shown, key=lambda e: (len(e[0]), e))
        cache.set(KEPT, kept)
