"""The pictures of a report: figures drawn for it and thumbnails of data, as files that Markdown refers to."""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from medmax_fast.page import plain

# ![caption](path) or ![caption](<path with blanks>) of a file; addresses with a scheme are left alone.
_MARKDOWN_PICTURE = re.compile(r"!\[([^\]]*)\]\((?!\w+:)<?([^)>]+)>?\)")


class Pictures:
    """Writes pictures into `folder` and returns Markdown that refers to them under `prefix`."""

    def __init__(self, folder: Path, prefix: str):
        self.folder, self.prefix = folder, prefix
        self._thumbnails: dict[tuple[Path, int], str] = {}
        folder.mkdir(parents=True)

    def draw(self, caption: str, figure: Callable, *arguments) -> str:
        """Markdown of a figure: calls figure(*arguments, path)."""
        path = self.folder / f"{_stem(caption)}.png"
        figure(*arguments, path)
        return self._markdown(caption, path)

    def thumbnail(self, source: Path, size: int) -> str:
        """Markdown of a JPEG of at most size x size pixels, transparency over white; a word where there is none."""
        from PIL import Image, UnidentifiedImageError

        source = source.resolve()
        if (source, size) not in self._thumbnails:
            path = self.folder / f"{_stem(source.stem, f'{source} {size}')}.jpg"
            try:
                with Image.open(source) as image:
                    image = image.convert("RGBA")
            except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
                return "(no picture)"
            image.thumbnail((size, size))
            whole = Image.new("RGB", image.size, "white")
            whole.paste(image, mask=image.getchannel("A"))
            whole.save(path, quality=85)
            self._thumbnails[source, size] = self._markdown(source.stem, path)
        return self._thumbnails[source, size]

    def adopt(self, markdown: str, folder: Path) -> str:
        """A Markdown text with the pictures that it names (relative to `folder`) copied into the report."""

        def copy(match: re.Match) -> str:
            source = folder / match[2]
            if not source.is_file():
                return f"(no picture {plain(match[2])})"
            path = self.folder / f"{_stem(source.stem, str(source.resolve()))}{source.suffix.lower()}"
            shutil.copyfile(source, path)
            return self._markdown(match[1], path)

        return _MARKDOWN_PICTURE.sub(copy, markdown).strip()

    def _markdown(self, caption: str, path: Path) -> str:
        return f"![{plain(caption)}]({self.prefix}/{path.name})"


def _stem(name: str, identity: str = "") -> str:
    """A short file name of harmless characters, different for different names or identities."""
    word = re.sub(r"[^a-z0-9]+", "_", name.lower())[:24].strip("_")
    return f"{word}_{hashlib.sha256(f'{name} {identity}'.encode()).hexdigest()[:8]}"
