"""The evaluation tasks as one table: what is asked, how the answer is scored, and how many new ids it may take.

A task is a row of TASKS when it differs from another only in name and answer type; its id is
task_name + "_" + question_type. Budgets and the first 100 of each kind of drawing are the published ones.
"""

from dataclasses import dataclass

# kind -> (what results.json calls its figure, whether the question shows the image)
KINDS = {
    "yes_no": ("accuracy", True),
    "letter": ("accuracy", True),
    "open": ("accuracy", True),
    "caption": ("similarity", True),
    "drawing": ("similarity", False),
    "interleaved": ("relative_score", False),
    "chat": ("relative_score", True),
}


@dataclass(frozen=True)
class Task:
    """One kind of question.

    kind: of KINDS. `yes_no` and `letter` are scored by their text, `open` by a judge as right or wrong, `interleaved`
    and `chat` by a judge in relation to a reference, `caption` and `drawing` by an image-text encoder. new_tokens: the
    text budget (0: to the end of the answer). first: how many questions of a task are asked (0: all). question_type
    "*" stands for any.
    """

    name: str
    question_type: str
    kind: str
    new_tokens: int = 0
    first: int = 0

    @property
    def metric(self) -> str:
        """`accuracy`, `similarity` or `relative_score`."""
        return KINDS[self.kind][0]

    @property
    def shows_image(self) -> bool:
        """Whether the image is part of the question; elsewhere drawings are compared with it, if there is one."""
        return KINDS[self.kind][1]

    @property
    def mode(self) -> str:
        """What the model makes: `text`, `image`, or `any` of both."""
        return {"drawing": "image", "interleaved": "any"}.get(self.kind, "text")

    @property
    def judged(self) -> str:
        """Which of the judge's two prompts scores it: `accuracy`, `relative`, or none."""
        return {"open": "accuracy", "interleaved": "relative", "chat": "relative"}.get(self.kind, "")


_SOURCES = ("pmc_oa", "quilt", "report")
TASKS = (
    *(Task(name, "closed", "yes_no", 1) for name in ("vqa_rad", "slake", "pathvqa", "quilt_vqa", "probmed")),
    *(Task(name, "mcq", "letter", 1) for name in ("pmc_vqa", "omnimed_vqa", "path_mmu")),
    *(Task(name, "open", "open", 60) for name in ("vqa_rad", "slake", "pathvqa", "quilt_vqa")),
    *(Task("image_captioning", source, "caption") for source in _SOURCES),
    *(Task("image_generation", source, "drawing", first=100) for source in _SOURCES),
    Task("mm_out", "*", "interleaved", 1024),
    *(Task("visual_chat", kind, "chat") for kind in ("conversation", "detailed_description")),
)

GOLD = {"yes_no": ("yes", "no"), "letter": ("A", "B", "C", "D")}


def known_tasks() -> list[str]:
    """Task names with their question types, such as `slake (closed, open)`."""
    kinds: dict[str, list[str]] = {}
    for task in TASKS:
        kinds.setdefault(task.name, []).append("any" if task.question_type == "*" else task.question_type)
    return [f"{name} ({', '.join(types)})" for name, types in kinds.items()]


def find_task(name: str, question_type: str) -> Task | None:
    """The table's row for a task name and question type, or None."""
    for task in TASKS:
        if task.name == name and task.question_type in (question_type, "*"):
            return task
    return None
