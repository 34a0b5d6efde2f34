"""An evaluation folder, read and checked: everything wrong with it is named before a model is loaded.

The folder holds one Parquet or JSONL file (columns task_name, question_type, prompt, answer, image_path, and source if
there is one) beside its images. The `answer` of a visual chat is a dict, as a Python literal or JSON: a reference
answer, the figure's caption, the text that mentions it, and flags of its domain. It is parsed, never evaluated.
"""

import ast
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from medmax_fast.data.rows import column_names, place, read_rows, typed, unicode_text
from medmax_fast.eval.tasks import GOLD, Task, find_task, known_tasks
from medmax_fast.files import hash_file
from medmax_fast.progress import progress
from medmax_fast.runtime import InputError, comma_list

COLUMNS = ("task_name", "question_type", "prompt", "answer", "image_path")
SOURCE = "source"
# Problems named in one error message; the rest are counted.
NAMED_PROBLEMS = 5
_THREADS = 8


@dataclass(frozen=True)
class Question:
    """One row of the data.

    id: task id + row number (from 0). image: the path as given, path: the file (None without one). reference: what the
    answer is compared with; context: what else a judge is told; domains: kinds of image that the row is flagged as.
    """

    id: str
    task_id: str
    task: Task
    prompt: str
    answer: str
    image: str
    path: Path | None
    source: str
    reference: str
    context: str = ""
    domains: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvalData:
    """A checked evaluation folder: the questions to ask, those left out (task id -> count, reason), and file hashes.

    images: path -> SHA-256 of every image that a question shows or refers to.
    """

    folder: Path
    file: Path
    sha256: str
    questions: list[Question]
    skipped: dict[str, dict]
    images: dict[Path, str]

    def cluster(self, question: Question) -> str:
        """What questions about one image have in common: its SHA-256, or the id of a question without one."""
        return self.images.get(question.path, question.id) if question.path else question.id


def load_questions(
    folder: str | Path, tasks: str = "", limit: int = 0, lacking: dict[str, str] | None = None
) -> EvalData:
    """Read and check an evaluation folder.

    tasks: comma-separated task ids (empty: all). limit: questions per task (0: all). lacking: kind of task -> why this
    run cannot do it; rows of these are checked, counted and left out, or an InputError where `tasks` names them.
    InputError names missing columns and images, unknown tasks, and answers that cannot be scored, up to NAMED_PROBLEMS.
    """
    folder, lacking = Path(folder), lacking or {}
    file = _data_file(folder)
    names = column_names(file)
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise InputError(f"{file}: no column {missing[0]!r}, expected {', '.join(COLUMNS)}")
    wanted = comma_list(tasks)
    questions, problems, present = [], [], {}
    skipped: dict[str, dict] = {}
    for number, values in read_rows(file, (*COLUMNS, SOURCE)):
        where = place(file, number)
        try:
            row = {name: unicode_text(typed(values, name, str), name) or "" for name in (*COLUMNS, SOURCE)}
        except InputError as error:
            problems.append(f"{where}: {error}")
            continue
        task = find_task(row["task_name"], row["question_type"])
        if task is None:
            found, known = f"{row['task_name']!r} with question type {row['question_type']!r}", ", ".join(known_tasks())
            problems.append(f"{where}: unknown task {found}, expected one of {known}")
            continue
        task_id = f"{task.name}_{row['question_type']}"
        present[task_id] = task
        if wanted and task_id not in wanted:
            continue
        found = _question(row, task, f"{task_id}-{number:05d}", task_id, folder)
        if isinstance(found, str):
            problems.append(f"{where} ({task_id}): {found}")
        elif task.kind in lacking:
            skipped.setdefault(task_id, {"n": 0, "reason": lacking[task.kind]})["n"] += 1
        else:
            questions.append(found)
    if problems:
        more = len(problems) - NAMED_PROBLEMS
        raise InputError(
            f"{file}: " + "; ".join(problems[:NAMED_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
        )
    for task_id in wanted:
        if task_id not in present:
            raise InputError(f"--tasks {task_id}: no such rows in {file}; found {', '.join(sorted(present)) or 'none'}")
        if task_id in skipped:
            raise InputError(f"--tasks {task_id}: {skipped[task_id]['reason']}")
    if not questions:
        reasons = "".join(f"; {task_id}: {row['reason']}" for task_id, row in skipped.items()) or ", it has no rows"
        raise InputError(f"{file}: no question that this run can ask{reasons}")
    questions = _first(questions, limit)
    return EvalData(folder, file, hash_file(file), questions, skipped, _hash_images(questions))


def _data_file(folder: Path) -> Path:
    if folder.is_file():
        raise InputError(f"{folder}: a file, expected the folder that holds it (--data is a folder with one table)")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (--data is a folder with one Parquet or JSONL file beside images/)")
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".parquet", ".jsonl") and path.is_file()]
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise InputError(f"{folder}: expected one Parquet or JSONL file of questions, found {found}")
    return files[0]


def _question(row: dict, task: Task, identity: str, task_id: str, folder: Path) -> Question | str:
    """The question of a row, or what is wrong with it."""
    answer, image = row["answer"], row["image_path"]
    # Captions are asked for, and pictures described at length, in fixed words.
    if not row["prompt"].strip() and task.kind != "caption" and row["question_type"] != "detailed_description":
        return "empty prompt"
    if task.shows_image and not image:
        return "no image_path"
    if image and not _is_file(folder / image):
        return f"no image {image[:200]}"
    gold = GOLD.get(task.kind)
    # Another case or stray blanks pass here; scoring.py says what each protocol makes of them.
    if gold and answer.strip().lower() not in [word.lower() for word in gold]:
        return f"answer {answer!r}, expected {', '.join(gold[:-1])} or {gold[-1]}"
    if task.judged and not answer.strip():
        return "empty answer, expected the one to compare with"
    reference, context, domains = answer, "", ()
    if task.kind == "chat":
        try:
            reference, context, domains = read_chat_answer(answer)
        except ValueError as error:
            return f"answer: {error}"
    path, source = folder / image if image else None, row[SOURCE] or _source(task, row["question_type"])
    return Question(
        identity, task_id, task, row["prompt"], answer, image, path, source, reference, context, tuple(domains)
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # A name that no file can have, such as a whole sentence.
        return False


def _source(task: Task, question_type: str) -> str:
    """The data set that a question is from, where no column says it."""
    return question_type if task.kind in ("caption", "drawing", "interleaved") else task.name


def read_chat_answer(text: str) -> tuple[str, str, list[str]]:
    """(reference answer, context, domains) of a visual chat's `answer`; ValueError says what is wrong with it.

    The dict has `gpt4_answer`, and may have `fig_label`, `fig_caption`, `in_text_mention` (text, or lists and dicts of
    it) and flags of domains: true values under `domain` or beside the others.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError("neither a Python dict nor JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}, expected a dict with gpt4_answer")
    reference = found.get("gpt4_answer")
    if not isinstance(reference, str) or not reference.strip():
        raise ValueError("no gpt4_answer in it, expected the answer to compare with")
    parts = [" ".join(_texts(found.get(name))) for name in ("fig_label", "fig_caption", "in_text_mention")]
    nested = found.get("domain")
    flags = {**found, **(nested if isinstance(nested, dict) else {})}
    return reference, "\n".join(part for part in parts if part), [str(k) for k, v in flags.items() if v is True]


def _texts(value) -> list[str]:
    """All text in a value of lists and dicts, in order."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [text for entry in value for text in _texts(entry)] if isinstance(value, list | tuple) else []


def _first(questions: list[Question], limit: int) -> list[Question]:
    """The first `limit` questions of each task, and no more than the task itself takes."""
    kept, counts = [], Counter[str]()
    for question in questions:
        counts[question.task_id] += 1
        most = min(bound for bound in (limit, question.task.first, len(questions)) if bound > 0)
        if counts[question.task_id] <= most:
            kept.append(question)
    return kept


def _hash_images(questions: list[Question]) -> dict[Path, str]:
    paths = sorted({question.path for question in questions if question.path})
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = progress(pool.map(hash_file, paths), "hashing images", len(paths))
            return dict(zip(paths, digests, strict=True))
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error
