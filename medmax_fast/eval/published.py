"""The published figures of MedMax and the models it was compared with, as data.

As printed by their authors under their own scoring (`medmax-v1`; a gpt-4o-mini judge; similarities are cosines by
BiomedCLIP). They were not measured by this package, and every table that shows them says so. Accuracies and relative
scores are in percent, cosines plain.
"""

from typing import Any

SOURCE = "MedMax (Bansal et al., NeurIPS 2025 Datasets and Benchmarks; arXiv 2412.12661), table of the project page"
URL = "https://mint-medmax.github.io/"

# The order of the columns of the published table.
TASK_IDS = (
    "vqa_rad_closed",
    "slake_closed",
    "pathvqa_closed",
    "quilt_vqa_closed",
    "vqa_rad_open",
    "slake_open",
    "pathvqa_open",
    "quilt_vqa_open",
    "pmc_vqa_mcq",
    "omnimed_vqa_mcq",
    "path_mmu_mcq",
    "probmed_closed",
)

# model -> (printed average, accuracies in the order of TASK_IDS). The printed average of LLaVA-Med differs from the
# mean of its own row, 36.9; it is kept as printed.
_ROWS = {
    "Chameleon-7B": (39.4, (48.6, 59.1, 58.9, 71.4, 32.0, 5.3, 18.0, 15.3, 31.0, 45.7, 34.5, 52.8)),
    "LLaVA-Med-v1.5-7B": (36.6, (61.0, 48.7, 62.7, 63.0, 23.0, 25.1, 6.2, 17.2, 18.9, 28.7, 29.8, 58.5)),
    "GPT-4o-mini": (38.5, (55.8, 50.4, 48.7, 38.5, 13.0, 49.3, 7.3, 28.0, 39.6, 45.1, 35.6, 50.6)),
    "GPT-4o": (42.0, (54.2, 50.1, 59.2, 44.6, 17.6, 63.7, 9.1, 36.1, 40.8, 40.9, 39.1, 48.3)),
    "HuatuoGPT-Vision-7B": (52.4, (74.5, 70.7, 65.9, 55.7, 19.0, 53.3, 6.0, 22.2, 51.6, 75.6, 55.4, 78.7)),
    "MedMax-7B": (65.5, (75.3, 88.4, 91.8, 61.2, 46.5, 82.2, 40.6, 26.0, 49.0, 99.5, 49.3, 75.8)),
}

# model -> {"average": printed mean of the 12 tasks, "tasks": task id -> accuracy}, in percent.
PUBLISHED: dict[str, dict[str, Any]] = {
    model: {"average": average, "tasks": dict(zip(TASK_IDS, values, strict=True))}
    for model, (average, values) in _ROWS.items()
}

# model -> task id -> cosine of the image and the text. The published column CXR is the question type `report`.
SIMILARITY = {
    "Chameleon-7B": {
        "image_captioning_pmc_oa": 0.25,
        "image_captioning_quilt": 0.24,
        "image_captioning_report": 0.36,
        "image_generation_pmc_oa": 0.10,
        "image_generation_quilt": 0.21,
        "image_generation_report": 0.20,
    },
    "MedMax-7B": {
        "image_captioning_pmc_oa": 0.37,
        "image_captioning_quilt": 0.32,
        "image_captioning_report": 0.41,
        "image_generation_pmc_oa": 0.20,
        "image_generation_quilt": 0.24,
        "image_generation_report": 0.30,
    },
}

# model -> relative score of the text in percent, and cosine of the drawn and the reference image, over all of mm_out.
INTERLEAVED = {
    "Chameleon-7B": {"text": 75.2, "image": 0.35},
    "MedMax-7B": {"text": 94.2, "image": 0.46},
}

# model -> relative score in percent over all of visual_chat. Printed as a plot only, and read off it.
VISUAL_CHAT = {
    "Chameleon-7B": 26.4,
    "LLaVA-Med-v1.5-7B": 62.4,
    "HuatuoGPT-Vision-7B": 60.4,
    "MedMax-7B": 60.3,
}


def published_value(model: str, task_id: str) -> float | None:
    """The published figure of a task, a fraction or a cosine; None where there is none of this task alone."""
    if task_id in TASK_IDS:
        return PUBLISHED[model]["tasks"][task_id] / 100
    return SIMILARITY.get(model, {}).get(task_id)
