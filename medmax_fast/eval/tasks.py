"""The evaluation tasks as one table, and the reading and checking of an evaluation folder.

An evaluation folder holds one Parquet or JSONL file (columns task_name, question_type, prompt, answer, image_path)
beside its images. A task is a row of TASKS when it differs from another only in name and answer type; the task id
is task_name + "_" + question_type. Everything wrong with the data is named before a model is loaded, since loading
one takes minutes. Rows of known tasks that this version cannot score are counted and reported, never dropped
silently.
"""

from dataclasses import dataclass
from pathlib import Path

from medmax_fast.data.rows import column_names, place, read_rows, typed
from medmax_fast.runtime import InputError, comma_list, hash_file

COLUMNS = ("task_name", "question_type", "prompt", "answer", "image_path")
# Problems named in one error message; the rest are counted.
NAMED_PROBLEMS = 5


@dataclass(frozen=True)
class Task:
    """One kind of question: how it is answered and scored.

    `score` is `yes_no` or `letter` (scored here), `judge` (needs an LLM judge) or `similarity` (needs an image-text
    encoder); `new_tokens` is the text budget (0: to the end of the answer); `question_type` "*" stands for any.
    """

    name: str
    question_type: str
    score: str
    new_tokens: int = 0

    @property
    def lacks(self) -> str:
        """What this version needs to score the task; empty if it can."""
        return {"judge": "an LLM judge", "similarity": "an image-text encoder"}.get(self.score, "")


TASKS = (
    *(Task(name, "closed", "yes_no", 1) for name in ("vqa_rad", "slake", "pathvqa", "quilt_vqa", "probmed")),
    *(Task(name, "mcq", "letter", 1) for name in ("pmc_vqa", "omnimed_vqa", "path_mmu")),
    *(Task(name, "open", "judge", 60) for name in ("vqa_rad", "slake", "pathvqa", "quilt_vqa")),
    *(Task("image_captioning", kind, "similarity") for kind in ("pmc_oa", "quilt", "report")),
    *(Task("image_generation", kind, "similarity") for kind in ("pmc_oa", "quilt", "report")),
    Task("mm_out", "*", "judge", 1024),
    *(Task("visual_chat", kind, "judge") for kind in ("conversation", "detailed_description")),
)

GOLD = {"yes_no": ("yes", "no"), "letter": ("A", "B", "C", "D")}


@dataclass(frozen=True)
class Question:
    """One row of the data: `id` is task id + row number (from 0), `image` the path as given, `path` the file."""

    id: str
    task_id: str
    task: Task
    prompt: str
    answer: str
    image: str
    path: Path


@dataclass(frozen=True)
class EvalData:
    """A checked evaluation folder: the questions to ask, and what was left out and why (task id -> count, reason)."""

    folder: Path
    file: Path
    sha256: str
    questions: list[Question]
    skipped: dict[str, dict]


def find_task(name: str, question_type: str) -> Task | None:
    """The table's row for a task name and question type, or None."""
    for task in TASKS:
        if task.name == name and task.question_type in (question_type, "*"):
            return task
    return None


def load_questions(folder: str | Path, tasks: str = "", limit: int = 0) -> EvalData:
    """Read and check an evaluation folder.

    `tasks` is a comma-separated list of task ids (empty: all that can be scored), `limit` the number of questions
    per task (0: all). InputError names missing columns and images, unknown tasks, and answers that no output could
    match, up to NAMED_PROBLEMS of them.
    """
    folder = Path(folder)
    file = _data_file(folder)
    missing = [name for name in COLUMNS if name not in column_names(file)]
    if missing:
        raise InputError(f"{file}: no column {missing[0]!r}, expected {', '.join(COLUMNS)}")
    wanted = comma_list(tasks)
    questions, skipped, problems, present = [], {}, [], {}
    for number, values in read_rows(file, COLUMNS):
        where = place(file, number)
        row = {name: typed(values, name, str, f"{file}: {where}") or "" for name in COLUMNS}
        task = find_task(row["task_name"], row["question_type"])
        if task is None:
            problems.append(f"{where}: unknown task {row['task_name']!r} with question type {row['question_type']!r}")
            continue
        task_id = f"{task.name}_{row['question_type']}"
        present[task_id] = task
        if task.lacks:
            reason = f"needs {task.lacks}, which this version does not have"
            skipped.setdefault(task_id, {"n": 0, "reason": reason})["n"] += 1
        elif not wanted or task_id in wanted:
            problem = _row_problem(row, task, folder)
            if problem:
                problems.append(f"{where} ({task_id}): {problem}")
                continue
            image, identity = row["image_path"], f"{task_id}-{number:05d}"
            questions.append(Question(identity, task_id, task, row["prompt"], row["answer"], image, folder / image))
    if problems:
        more = len(problems) - NAMED_PROBLEMS
        rest = f"; and {more} more" if more > 0 else ""
        raise InputError(f"{file}: " + "; ".join(problems[:NAMED_PROBLEMS]) + rest)
    _check_wanted(wanted, present, file)
    if not questions:
        what = f"; its rows are of {', '.join(sorted(skipped))}" if skipped else ""
        raise InputError(f"{file}: no closed or mcq question that this version can score{what}")
    return EvalData(folder, file, hash_file(file), _first(questions, limit), skipped)


def _data_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (--data is a folder with one Parquet or JSONL file beside images/)")
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".parquet", ".jsonl") and path.is_file()]
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise InputError(f"{folder}: expected one Parquet or JSONL file of questions, found {found}")
    return files[0]


def _row_problem(row: dict, task: Task, folder: Path) -> str:
    gold = GOLD[task.score]
    # Another case or stray blanks pass here; scoring.py says what each protocol makes of them.
    if row["answer"].strip().lower() not in [word.lower() for word in gold]:
        return f"answer {row['answer']!r}, expected {', '.join(gold[:-1])} or {gold[-1]}"
    if not row["prompt"].strip():
        return "empty prompt"
    if not row["image_path"]:
        return "no image_path"
    if not (folder / row["image_path"]).is_file():
        return f"no image {row['image_path']}"
    return ""


def _check_wanted(wanted: list[str], present: dict[str, Task], file: Path) -> None:
    for task_id in wanted:
        if task_id not in present:
            raise InputError(f"--tasks {task_id}: no such rows in {file}; found {', '.join(sorted(present))}")
        if present[task_id].lacks:
            raise InputError(f"--tasks {task_id}: needs {present[task_id].lacks}, which this version does not have")


def _first(questions: list[Question], limit: int) -> list[Question]:
    if limit <= 0:
        return questions
    kept, counts = [], {}
    for question in questions:
        counts[question.task_id] = counts.get(question.task_id, 0) + 1
        if counts[question.task_id] <= limit:
            kept.append(question)
    return kept
