"""Every error message in the sources of the package, read from their syntax trees.

A message is known by its file and its template: its text, with `{names}` for what is filled in. Where the text hangs
on a condition, or on a local variable that is only ever given words, each wording is a message of its own.
"""

import ast
import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import medmax_fast

ROOT = Path(__file__).resolve().parents[1]
# Of the package that the tests import, which may be an installed copy.
PACKAGE = Path(medmax_fast.__file__).parent
# Exceptions whose text a person gets to read, as the one line of a command or as a reason in a file, and their homes.
SHOWN = {
    "InputError": "runtime",
    "Incomplete": "runtime",
    "VocabError": "vocab",
    "ApiError": "serving.protocol",
    "_Refused": "data.dicom",
    "NoCodes": "data.assemble",
    "ChatError": "eval.servers.chat",
    "_Failed": "eval.servers.chat",
    "NotAReply": "eval.servers.chat_reply",
}
# Where argparse's own messages are noted, whose templates no source of ours holds; the place is that of no line.
PARSER = "cli.py"
_ARGPARSE = (
    "the following arguments are required: {flags}",
    "argument {flag}: expected one argument",
    "argument {flag}: not allowed with argument {other}",
    "argument {flag}: {value}, expected a path",
    "argument {flag}: {value}, expected a whole number",
    "argument {flag}: {value}, expected a finite number",
    "argument {flag}: invalid choice: {value} (choose from {choices})",
    "[Errno 2] No such file or directory: {path}",
)
ARGPARSE = [f"medmax {{command}}: {text}; see medmax {{command}} --help" for text in _ARGPARSE]
ARGPARSE += ["medmax: unrecognized arguments: {arguments}; see medmax --help"]
DERIVED = {"ImageError": "{path}: ", "BudgetSpent": "", "TooManyRejected": "{count} inputs rejected, {limit} allowed"}
# Around the names of what is filled in; a text may hold braces of its own.
MARK = "\x00"
# Names of what some functions give; of others it is the name of their argument.
CALLS = {"len": "count", "sum": "count", "asdict": "ids", "getattr": "value", "place": "row"}
# More wordings of one message are not told apart.
MOST = 6


@dataclass(frozen=True)
class Message:
    """One wording at lines first..last of `file`, which is relative to the package; `marked` has MARKs."""

    file: str
    first: int
    last: int
    marked: str

    @functools.cached_property
    def template(self) -> str:
        return re.sub(f"{MARK}(.*?){MARK}", r"{\1}", self.marked)

    def fits(self, text: str) -> bool:
        """Whether a text is this template filled in."""
        parts = self.marked.split(MARK)
        pattern = "".join(".*" if i % 2 else re.escape(part) for i, part in enumerate(parts))
        return re.fullmatch(pattern, text, re.DOTALL) is not None


@functools.cache
def messages() -> list[Message]:
    """All of them, by file and line."""
    of_parser = [Message(PARSER, 0, 0, re.sub(r"[{}]", MARK, text)) for text in ARGPARSE]
    return of_parser + [message for path in sorted(PACKAGE.rglob("*.py")) for message in _Source(path).messages()]


class _Source:
    def __init__(self, path: Path):
        self.name = path.relative_to(PACKAGE).as_posix()
        self._tree = _parse(path)
        self._functions = {node.name: node for node in self._tree.body if isinstance(node, ast.FunctionDef)}
        self._constants = _constants(path)

    def messages(self) -> list[Message]:
        # A call in an inner function is met again, and belongs to the last that holds it.
        scopes = [node for node in _nodes(self._tree) if isinstance(node, (ast.Module, ast.FunctionDef))]
        calls = {node: scope for scope in scopes for node in _nodes(scope) if _is_message(node)}
        found = {(call.lineno, call.end_lineno): self._wordings_of(call, scope) for call, scope in calls.items()}
        return [Message(self.name, *lines, text) for lines, texts in sorted(found.items()) for text in texts]

    def _wordings_of(self, call: ast.Call, scope: ast.AST) -> list[str]:
        name = call.func.id
        if name == "TooManyRejected":
            return [re.sub(r"[{}]", MARK, DERIVED[name])]
        # ImageError takes a path first and Incomplete a result, ChatError and _Failed something more last.
        text = call.args[1 if name in ("ImageError", "Incomplete") else 0]
        before = re.sub(r"[{}]", MARK, DERIVED.get(name, ""))
        return list(dict.fromkeys(before + words for words in self._wordings(text, scope, whole=True)))

    def _wordings(self, node: ast.expr, scope: ast.AST, whole: bool = False) -> list[str]:
        """The texts an expression may give; what is not known before it runs stands between MARKs."""
        texts = [MARK + _name(node) + MARK]
        if isinstance(node, ast.Constant):
            texts = [str(node.value)]
        elif isinstance(node, ast.JoinedStr):
            # A part is a Constant or what stands between braces; both have a value.
            parts = [[p.value] if isinstance(p, ast.Constant) else self._wordings(p.value, scope) for p in node.values]
            texts = ["".join(chosen) for chosen in itertools.product(*parts)]
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and any(map(_has_words, _sides(node))):
            texts = [a + b for a, b in itertools.product(*(self._wordings(side, scope) for side in _sides(node)))]
        elif isinstance(node, ast.IfExp):
            texts = [text for side in _sides(node) for text in self._wordings(side, scope)]
        elif isinstance(node, ast.Name) and node.id in self._constants:
            texts = [self._constants[node.id]]
        elif isinstance(node, ast.Name):
            texts = self._given(_assigned(node.id, scope), scope) or texts
        elif whole and isinstance(node, ast.Call) and getattr(node.func, "id", "") in self._functions:
            function = self._functions[node.func.id]
            returned = [n.value for n in ast.walk(function) if isinstance(n, ast.Return)]
            texts = self._given(returned, function) or texts
        return texts if len(texts) <= MOST else [MARK + _name(node) + MARK]

    def _given(self, values: list[ast.expr | None], scope: ast.AST) -> list[str]:
        """The wordings of values which are all words, else none."""
        if not all(_has_words(value) for value in values):
            return []
        return [text for value in values for text in self._wordings(value, scope)]


def _is_message(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") in {*SHOWN, *DERIVED}


@functools.cache
def _nodes(scope: ast.AST) -> list[ast.AST]:
    return list(ast.walk(scope))


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _sides(node: ast.BinOp | ast.IfExp) -> tuple[ast.expr, ast.expr]:
    return (node.left, node.right) if isinstance(node, ast.BinOp) else (node.body, node.orelse)


def _has_words(node: ast.expr | None) -> bool:
    if isinstance(node, ast.IfExp):
        return any(map(_has_words, _sides(node)))
    return isinstance(node, ast.JoinedStr) or _is_text(node)


def _is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _assigned(name: str, scope: ast.AST) -> list[ast.expr | None]:
    """What is assigned to a local variable; None where it is also bound in another way."""
    nodes = _nodes(scope)
    given = [n.value for n in nodes if isinstance(n, ast.Assign) and any(_is(t, name) for t in n.targets)]
    bound = sum(
        _is(n, name) and isinstance(n.ctx, ast.Store) or isinstance(n, ast.arg) and n.arg == name for n in nodes
    )
    caught = any(isinstance(n, ast.ExceptHandler) and n.name == name for n in nodes)
    return given if bound == len(given) and not caught else [None]


def _is(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


@functools.cache
def _constants(path: Path) -> dict[str, str]:
    """Module-level constants that are words, those imported from modules of ours included."""
    found = {}
    for node in _parse(path).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medmax_fast."):
            other = PACKAGE / (node.module.removeprefix("medmax_fast.").replace(".", "/") + ".py")
            names = [alias.name for alias in node.names if alias.name.isupper()]
            theirs = _constants(other) if names and other.exists() else {}
            found |= {name: theirs[name] for name in names if name in theirs}
        elif isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            pairs = zip(target.elts, value.elts, strict=True) if several else [(target, value)]
            found |= {t.id: v.value for t, v in pairs if isinstance(t, ast.Name) and _is_text(v)}
    return found


def _name(node: ast.AST) -> str:
    """A short name for what an expression gives, "" for none."""
    if isinstance(node, ast.Name):
        return node.id.strip("_").lower()
    if isinstance(node, ast.Attribute):
        return "type" if node.attr == "__name__" else node.attr.strip("_").lower()
    if isinstance(node, ast.Subscript):
        return _key(node.slice) or _name(node.value)
    if not isinstance(node, ast.Call):
        return next((name for child in ast.iter_child_nodes(node) if (name := _name(child))), "")
    function = getattr(node.func, "id", getattr(node.func, "attr", ""))
    if function in CALLS:
        return CALLS[function]
    if function == "get" and _key(node.args[0]):
        return _key(node.args[0])
    return next(
        (name for argument in node.args if (name := _name(argument))), _name(getattr(node.func, "value", node.func))
    )


def _key(node: ast.expr) -> str:
    return node.value if _is_text(node) else ""
