"""Markdown to one self-contained HTML page: pictures inlined, no script, no external asset, readable on a phone.

Raw HTML in the Markdown is shown as text, never passed on, so model outputs and questions cannot inject any.
"""

import base64
import re
from html import escape
from pathlib import Path

# A table cell that begins with one of these words and a colon is emphasised; it stays readable without colour.
VERDICTS = ("right", "wrong", "unparsed", "failed")
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
td:first-child, th:first-child { position: sticky; left: 0; background: #fff; max-width: min(12rem, 35vw); }
td img { display: block; min-width: 5rem; max-width: 16rem; }
tr.published td { background: #f1f1f1; font-style: italic; color: #444; }
td.right { color: #0b4f7d; }
td.wrong { color: #a33b00; font-weight: bold; }
td.unparsed, td.failed { color: #555; font-weight: bold; }
"""


def html_page(title: str, markdown: str, folder: str | Path) -> str:
    """The page of a Markdown text whose picture paths are relative to `folder`."""
    from markdown_it import MarkdownIt

    # linkify and typographer stay off: the text is data and is to be shown as it is.
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    _mark_tables(tokens)
    for token in tokens:
        for child in token.children or []:
            if child.type == "image":
                child.attrSet("src", data_url(Path(folder) / child.attrGet("src")))
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


def _mark_tables(tokens: list) -> None:
    row = None
    for i, token in enumerate(tokens):
        if token.type == "tr_open":
            row = token
        elif token.type == "td_open":
            text = tokens[i + 1].content
            word, colon, _ = text.partition(":")
            if colon and word in VERDICTS:
                token.attrSet("class", word)
            if text.endswith(PUBLISHED_MARK) and tokens[i - 1] is row:
                row.attrSet("class", "published")
