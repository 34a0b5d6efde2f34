"""A small evaluation folder in the published form, with every kind of task, of the real pictures of the demo.

    python examples/evaluation/make_data.py FOLDER

The questions are ours and the pictures few, so figures on them show that everything works and say nothing of a model.
"""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from make_images import NAMES, make_images  # noqa: E402
from questions import CHOICES, CLOSED  # noqa: E402

FILES = {Path(name).stem: name for name in NAMES}

# (task, question, {picture: answer})
OPEN = (
    (
        "vqa_rad",
        "Which imaging modality is this?",
        {"ct_head_bone": "computed tomography", "mr_abdomen": "MRI", "bone_scan": "bone scintigraphy"},
    ),
    ("slake", "Which part of the body is shown?", {"ct_skull_base": "head", "ct_spine_soft": "spine"}),
    ("slake", "Which large organ lies on the left of the picture?", {"mr_abdomen": "liver"}),
    ("pathvqa", "What is the bright round area called?", {"fundus_disc": "optic disc"}),
    ("pathvqa", "What is shown on the dark background?", {"cell": "a single cell"}),
    ("quilt_vqa", "What colour is the stain?", {"ihc_glands": "brown", "ihc_round_gland": "brown and blue"}),
)
# source -> {picture: caption}; also what is drawn.
CAPTIONS = {
    "pmc_oa": {
        "microaneurysms": "Dark spots of microaneurysms in the retina.",
        "cell": "A single bright cell on a dark background.",
    },
    "quilt": {
        "ihc_glands": "Histology slide with brown stained glands.",
        "ihc_stroma": "Histology slide of blue stained stroma.",
    },
    "report": {
        "ct_spine_bone": "Axial CT of the spine in a bone window. No fracture is seen.",
        "mr_abdomen": "Axial MR image of the abdomen with liver and both kidneys.",
    },
}
# source -> [(prompt, answer, picture)]
INTERLEAVED = {
    "pmc": [
        (
            "Explain what immunohistochemistry shows, with a picture.",
            "Immunohistochemistry stains a protein brown where an antibody binds it; nuclei are blue.",
            "ihc_overview",
        ),
        (
            "Show and describe a normal fundus.",
            "A normal fundus has a bright optic disc, from which vessels branch, and a darker macula.",
            "fundus",
        ),
    ],
}
# (kind, picture, question, reference answer, caption, mention, domain)
CHATS = (
    (
        "conversation",
        "ct_head_bone",
        "Is there a sign of a fracture?",
        "No. In the bone window the skull is continuous and no fracture line is seen.",
        "Axial CT of the head, bone window.",
        ["The skull was intact on CT."],
        "ct_scan",
    ),
    (
        "conversation",
        "us_lymph_node",
        "What does the ultrasound image show?",
        "It shows an oval, mostly dark structure with a bright centre, as a lymph node has.",
        "Ultrasound of a lymph node.",
        [],
        "ultrasound",
    ),
    (
        "detailed_description",
        "ihc_overview",
        "Describe the picture in detail.",
        "The slide shows glands cut across, with brown membranes, blue nuclei, and pale stroma between them.",
        "Colonic glands, immunohistochemistry.",
        ["The glands were stained brown.", "Nuclei were counterstained."],
        "histology",
    ),
    (
        "detailed_description",
        "mr_abdomen",
        "Describe the picture in detail.",
        "An axial section of the upper abdomen with the liver on the left, both kidneys, and the spine behind.",
        "MR image of the abdomen.",
        [],
        "mri",
    ),
)


def rows() -> list[dict]:
    """Rows in the published columns."""
    found = []

    def add(task: str, kind: str, prompt: str, answer: str, picture: str) -> None:
        names = ("task_name", "question_type", "prompt", "answer", "image_path")
        values = (task, kind, prompt, answer, f"images/{FILES[picture]}")
        found.append(dict(zip(names, values, strict=True)))

    for task, question, yes, no in CLOSED:
        for answer, pictures in (("yes", yes), ("no", no)):
            for picture in pictures.split():
                add(task, "closed", question, answer, picture)
    add("probmed", "closed", "Is this an MR image?", "yes", "mr_small")
    add("probmed", "closed", "Is this an MR image?", "no", "fundus")
    for task, question, pictures in CHOICES:
        for picture, answer in zip(pictures, "ABCD", strict=True):
            add(task, "mcq", question, answer, picture)
    for task, question, answers in OPEN:
        for picture, answer in answers.items():
            add(task, "open", question, answer, picture)
    for source, captions in CAPTIONS.items():
        for picture, caption in captions.items():
            add("image_captioning", source, "Please describe this picture.", caption, picture)
            add("image_generation", source, f"Generate an image: {caption}", caption, picture)
    for source, entries in INTERLEAVED.items():
        for prompt, answer, picture in entries:
            add("mm_out", source, prompt, answer, picture)
    for kind, picture, question, reference, caption, mentions, domain in CHATS:
        answer = {
            "gpt4_answer": reference,
            "fig_label": "Figure 1",
            "fig_caption": caption,
            "in_text_mention": mentions,
        }
        # A Python literal, as published.
        add("visual_chat", kind, question, repr({**answer, "domain": {domain: True, "gross": False}}), picture)
    return found


def make_data(folder: Path) -> Path:
    """Write pictures and questions into `folder`; the same bytes every time."""
    make_images(folder / "images")
    pq.write_table(pa.Table.from_pylist(rows()), folder / "questions.parquet")
    return folder


if __name__ == "__main__":
    print(make_data(Path(sys.argv[1])), json.dumps({"rows": len(rows())}))
