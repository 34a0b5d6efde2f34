"""Markdown to one self-contained HTML page: pictures inlined, no script, no external asset, readable on a phone.

Raw HTML in the Markdown is shown as text, never passed on, so model outputs and questions cannot inject any. The parts
of long sections fold (<details>); on a narrow screen the rows of tables of samples become cards.
"""

import base64
import re
from html import escape
from pathlib import Path

# A cell of an OUTPUT column that begins with one of these words in bold is marked; it stays readable without colour.
VERDICTS = ("right", "wrong", "unparsed", "failed", "unjudged")
OUTPUT = ": output"
# Below these third-level headings, fourth-level ones fold what follows them, up to a rule at the latest.
FOLDING = ("Runs in detail", "Samples, wrong ones first")
# A row whose first cell ends like this shows figures of others.
PUBLISHED_MARK = "(published)"

# Underscores inside a word (vqa_rad) are no markup and stay as they are.
_MARKUP = re.compile(r"[\\`*\[\]<>|~&#!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}

_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.25; margin: 1.6em 0 .5em; }
h2 { border-bottom: 1px solid #ccc; padding-bottom: .2em; }
img { max-width: min(100%, 52rem); height: auto; vertical-align: middle; }
code, pre { font-size: .85em; background: #f3f3f3; overflow-wrap: anywhere; }
pre { padding: .6em; overflow-x: auto; }
.table { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; font-size: .875rem; width: max-content; }
th, td { padding: .35em .6em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; background: #fff; }
td { max-width: min(26rem, 60vw); overflow-wrap: anywhere; }
td:first-child, th:first-child { position: sticky; left: 0; background: #fff; max-width: min(16rem, 38vw); }
td img { display: block; max-width: 16rem; }
.outputs { width: 100%; }
.outputs td { max-width: none; min-width: 7rem; }
.outputs em { display: block; margin-top: .3em; color: #555; font-size: .9em; }
tr.published td { background: #f1f1f1; font-style: italic; color: #444; }
td.right strong { color: #0b4f7d; }
td.wrong strong { color: #a33b00; }
td.wrong { box-shadow: inset 3px 0 #a33b00; }
td.unparsed strong, td.failed strong, td.unjudged strong { color: #555; }
li, p { overflow-wrap: anywhere; }
hr { border: 0; border-top: 1px solid #ccc; margin: 2em 0 1em; }
details { border: 1px solid #ccc; border-radius: .3em; margin: .6em 0; padding: 0 .8em; }
summary { cursor: pointer; padding: .5em 0; overflow-wrap: anywhere; }
@media (max-width: 45rem) {
  .outputs thead { display: none; }
  .outputs, .outputs tbody, .outputs tr, .outputs td { display: block; width: auto; }
  .outputs tr { border-top: 2px solid #888; padding: .4em 0; }
  .outputs td, .outputs td:first-child { position: static; max-width: none; border: 0; padding: .25em .6em; }
  .outputs td img { margin: .2em 0; }
  .outputs td::before { content: attr(data-label); display: block; color: #666; font-size: .75rem; }
}
"""


def html_page(title: str, markdown: str, folder: str | Path) -> str:
    """The page of a Markdown text whose picture paths are relative to `folder`."""
    from markdown_it import MarkdownIt

    # linkify and typographer stay off: the text is data and is to be shown as it is.
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", _open_table)
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    _mark_tables(tokens)
    tokens = _fold(tokens)
    for token in tokens:
        for child in token.children or []:
            if child.type == "image":
                child.attrSet("src", data_url(Path(folder) / str(child.attrGet("src"))))
    body = parser.renderer.render(tokens, parser.options, {})
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def data_url(path: Path) -> str:
    """A picture file as a data: URL; an empty picture if there is no such file of a known kind."""
    kind = _MIME.get(path.suffix.lower())
    if kind is None or not path.is_file():
        return "data:,"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def plain(text: str) -> str:
    """`text` with every character that Markdown could take as markup escaped, on one line."""
    return " ".join(_MARKUP.sub(r"\\\g<0>", str(text)).split())


def table(rows: list[dict]) -> str:
    """Rows of equal keys as a Markdown table; the cells are Markdown already, the headings plain text."""
    assert rows and all(row.keys() == rows[0].keys() for row in rows)
    lines = [[plain(name) for name in rows[0]], ["---"] * len(rows[0])]
    lines += [[str(cell) for cell in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _open_table(_, tokens: list, i: int, *__) -> str:
    kind = ' class="outputs"' if tokens[i].attrGet("class") else ""
    return f'<div class="table"><table{kind}>\n'


def _mark_tables(tokens: list) -> None:
    """Give cells the name of their column, and tables, rows and cells the classes by which the style marks them."""
    names: list[str] = []
    column = 0
    for i, token in enumerate(tokens):
        if token.type == "table_open":
            names, whole = [], token
        elif token.type == "tr_open":
            row, column = token, 0
        elif token.type == "th_open":
            names.append("".join(child.content for child in tokens[i + 1].children))
            if names[-1].endswith(OUTPUT):
                whole.attrSet("class", "outputs")
        elif token.type == "td_open":
            text = tokens[i + 1].content
            token.attrSet("data-label", names[column])
            word, bold, _ = text.removeprefix("**").partition(":**")
            if bold and word in VERDICTS and names[column].endswith(OUTPUT):
                token.attrSet("class", word)
            if text.endswith(PUBLISHED_MARK) and column == 0:
                row.attrSet("class", "published")
            column += 1


def _fold(tokens: list) -> list:
    """The tokens with the parts of FOLDING sections as <details>, the first of each section open."""
    from markdown_it.token import Token

    folded, inside, parts, depth = [], False, 0, 0
    for i, token in enumerate(tokens):
        top = token.level == 0 and token.type in ("heading_open", "hr")
        if top and depth:
            folded.append(Token("details_close", "details", -1, block=True))
            depth = 0
        if top and token.tag != "h4":
            inside, parts = token.tag == "h3" and tokens[i + 1].content in FOLDING, 0
        elif top and inside:
            details = Token("details_open", "details", 1, block=True)
            if parts == 0:
                details.attrSet("open", "")
            folded.append(details)
            parts, depth = parts + 1, 1
            token.tag = tokens[i + 2].tag = "summary"
        folded.append(token)
    return folded + [Token("details_close", "details", -1, block=True)] * depth
