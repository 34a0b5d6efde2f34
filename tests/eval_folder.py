"""A small evaluation folder of every kind of task, for tests."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NAMES = ("task_name", "question_type", "prompt", "answer", "image_path")
CHAT = repr({"gpt4_answer": "A rib.", "fig_caption": "A scan.", "in_text_mention": ["See it."], "domain": {"ct": True}})
ROWS = [
    ("vqa_rad", "closed", "Is there a mass?", "yes", "images/a.png"),
    ("vqa_rad", "closed", "Is it enlarged?", "no", "images/b.png"),
    ("pmc_vqa", "mcq", "Which? A: x B: y C: z D: w", "B", "images/b.png"),
    ("vqa_rad", "open", "What is shown?", "a lung", "images/a.png"),
    ("image_captioning", "quilt", "", "A slide.", "images/a.png"),
    ("image_generation", "report", "Draw a chest.", "", "images/b.png"),
    ("mm_out", "anything", "Draw it", "free text", ""),
    ("visual_chat", "conversation", "What is it?", CHAT, "images/a.png"),
    ("visual_chat", "detailed_description", "", CHAT, "images/a.png"),
]


def make_folder(folder: Path, rows=ROWS, form="parquet", names=NAMES) -> Path:
    (folder / "images").mkdir(parents=True)
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 30), color).save(folder / "images" / f"{name}.png")
    table = [dict(zip(names, row, strict=True)) for row in rows]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(table), folder / "test.parquet")
    else:
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return folder
