"""Files and output folders: written under a temporary name and renamed, hashed, refused where others made them."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from medmax_fast.progress import Progress, progress
from medmax_fast.runtime import InputError, versions

SETTINGS_FILE = "settings.json"
# What a full disk, a quota or a limit of a file system says, without naming the file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# Threads that hash files; hashing leaves the interpreter free.
_HASHERS = 8
# Of files with more bytes than this hashing shows its progress; bytes read at a time.
_LONG_FILE, _BLOCK = 2**30, 2**20


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write a file or folder at; it takes the final name only on success.

    InputError where `path` cannot be written, a full disk included.
    """
    path = Path(path)
    # Unique among the processes of all nodes that share the folder.
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if temporary.is_dir() and path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            os.replace(temporary, path)
        finally:
            remove(temporary)
    except OSError as error:
        # An error of what is read meanwhile names another file, and one of the network none.
        named = str(error.filename or "")
        ours = named.startswith(str(temporary)) or named in map(str, path.parents)
        if not ours and (named or error.errno not in _FULL):
            raise
        raise InputError(f"{path}: cannot be written ({_why(error)})") from error


def _why(error: OSError) -> str:
    # Of a file in the place of a folder the system says "File exists".
    in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
    return "a file is in the way" if in_the_way else error.strerror or str(error)


def input_error(error: OSError) -> InputError | None:
    """What to say of a path that cannot be used or of a full disk; None where it is another fault."""
    if error.filename is not None:
        return InputError(f"{error.filename}: cannot be used ({_why(error)})")
    if error.errno in _FULL:
        return InputError(f"a file cannot be written ({error.strerror}); make room and start again")
    return None


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_text(path: str | Path) -> str:
    """The text of a file; InputError if it is missing or not UTF-8."""
    try:
        return require_file(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from error


def read_json(path: str | Path) -> Any:
    """Parse a JSON file; InputError if it is missing or malformed."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        # ValueError: also a number of thousands of digits.
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not valid JSON ({error})") from error


def read_object(path: str | Path) -> dict:
    """Parse a JSON file that holds an object; InputError for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: {type(value).__name__}, expected a JSON object")
    return value


def require_file(path: str | Path) -> Path:
    """`path` as a Path; InputError if there is no such file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'a folder, expected a file' if path.is_dir() else 'no such file'}")
    return path


def hash_file(path: str | Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's bytes, with a progress bar where they are many."""
    with open(path, "rb") as file:
        return hash_rest(file, algorithm)


def hash_rest(file: BinaryIO, algorithm: str) -> str:
    """As `hash_file`, of the bytes of an open file that are not read yet."""
    digest, size = hashlib.new(algorithm), os.fstat(file.fileno()).st_size
    label = f"{algorithm} of {Path(file.name).name} (MiB)"
    with Progress(label, size >> 20) if size > _LONG_FILE else contextlib.nullcontext() as bar:
        while block := file.read(_BLOCK):
            digest.update(block)
            if bar:
                bar.update(file.tell() >> 20)
    return digest.hexdigest()


def hash_folder(folder: str | Path) -> str:
    """SHA-256 over the names and contents of all files below a folder that are not hidden."""
    folder = Path(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    with ThreadPoolExecutor(_HASHERS) as pool:
        found = pool.map(lambda name: hash_file(folder / name), names)
        digests = progress(found, f"hashing {folder.name} (files)", len(names))
        lines = [f"{name}\n{digest}\n" for name, digest in zip(names, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_output(folder: str | Path, command: str, settings: dict[str, Any]) -> Path:
    """Create or reopen a command's output folder.

    `settings` is what the output depends on. It is written to settings.json with the versions used; a folder that
    was made with other settings, or that holds something else, is refused with an InputError naming the difference.
    """
    folder = Path(folder)
    settings = json.loads(json.dumps(settings))
    path = folder / SETTINGS_FILE
    if not path.exists():
        try:
            require_new(folder)
        except InputError:
            # Unless another process of the same command has made the folder since.
            if not path.exists():
                raise
        else:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(path, {"command": command, "settings": settings, "versions": versions()})
            except OSError as error:
                raise InputError(f"{folder}: cannot be written ({_why(error)})") from error
            return folder
    found = read_object(path)
    before = {"command": found.get("command"), **found.get("settings", {})}
    now = {"command": command, **settings}
    # Hashes last, so that a changed flag is named before what it changes.
    for name in sorted(before.keys() | now.keys(), key=lambda name: (name.startswith("sha256_"), name)):
        if before.get(name) != now.get(name):
            raise InputError(
                f"{folder}: made with {name} = {before.get(name)!r}, now {now.get(name)!r}; "
                "choose another --output or the same settings"
            )
    return folder


def require_new(folder: str | Path) -> None:
    """InputError if `folder` is a file or holds anything (hidden leftovers of interrupted writes apart)."""
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"{folder}: a file is in the way, expected a folder to create")
    if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise InputError(f"{folder}: not empty and not made by this command; choose another --output")
