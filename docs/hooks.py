"""What the site shows of files that lie elsewhere, so that no fact is written twice: run by mkdocs, see mkdocs.yml."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Page of the site -> the file that it is made from.
PAGES = {"roofline.md": ROOT / "benchmarks" / "roofline.md", "changelog.md": ROOT / "CHANGELOG.md"}
# In performance.md, the place of the README's table; the same words stand around that table in the README.
TABLE = re.compile(r"<!-- rendered by python -m benchmarks.render -->\n(.*?)<!-- end of what is rendered -->", re.S)


def on_files(files, config):
    """Add the pages whose text is elsewhere in the repository."""
    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=source.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Put the measured table of the README into its place, and point links that GitHub follows to the site's pages."""
    for name, source in PAGES.items():
        markdown = markdown.replace(f"(../{source.relative_to(ROOT)}", f"({name}")
    if not TABLE.search(markdown):
        return markdown
    table = TABLE.search((ROOT / "README.md").read_text(encoding="utf-8"))
    return TABLE.sub(lambda _: table[1], markdown)
