"""The demo's own questions, captions and drawing prompts about the pictures of make_images.py.

Every question is asked of several pictures with different answers, in equal numbers, so that neither the question
alone nor the commonest answer scores above chance: half of the closed answers are yes, and each letter is right for a
quarter of the others. Names are those of make_images.NAMES without suffix.
"""

# (evaluation task, question, pictures where the answer is yes, pictures where it is no)
CLOSED = (
    ("vqa_rad", "Is this a CT image?", "ct_spine_soft ct_skull_base", "mr_abdomen us_heart"),
    ("vqa_rad", "Is the skull visible?", "ct_head_bone ct_skull_base", "ct_spine_bone bone_scan"),
    ("slake", "Is a vertebra visible?", "ct_spine_bone ct_spine_soft", "ct_head_bone mr_small"),
    ("slake", "Are both kidneys visible?", "mr_abdomen", "ct_skull_base"),
    ("pathvqa", "Is the optic disc visible?", "fundus fundus_disc", "fundus_macula fundus_periphery"),
    ("pathvqa", "Is this a fundus photograph?", "fundus fundus_macula", "cell phantom"),
    ("pathvqa", "Is a whole cell visible?", "cell", "cell_background"),
    ("quilt_vqa", "Is brown staining seen?", "ihc_glands ihc_round_gland", "cell microaneurysms"),
    ("quilt_vqa", "Is one round gland in the centre?", "ihc_round_gland", "ihc_overview"),
)

# (evaluation task, question, one picture for each of the answers A, B, C, D)
CHOICES = (
    (
        "pmc_vqa",
        "Which imaging modality was used? A. CT B. MRI C. Ultrasound D. Microscopy",
        ("ct_spine_bone", "mr_small", "us_lymph_node", "ihc_overview"),
    ),
    (
        "omnimed_vqa",
        "What part of the body is this? A. Head B. Abdomen C. Heart D. Eye",
        ("ct_skull_base", "mr_abdomen", "us_heart", "fundus_periphery"),
    ),
    (
        "omnimed_vqa",
        "What does the picture show? A. A lymph node B. A spine C. A retina D. A phantom",
        ("us_lymph_node", "ct_spine_soft", "fundus", "phantom"),
    ),
    (
        "path_mmu",
        "What is typical of this picture? A. Brown glands B. Blue stroma C. Dark vessels D. A white disc",
        ("ihc_glands", "ihc_stroma", "microaneurysms", "cell"),
    ),
)

DESCRIBE = "Please describe this picture."
CAPTIONS = {
    "cell": "A single bright cell on a dark background.",
    "phantom": "The Shepp-Logan phantom, a drawing of a head.",
    "mr_abdomen": "MR image of the abdomen with liver and kidneys.",
}

# (prompt, picture): what the model learns to draw. A picture has 1,024 targets and must be right in nearly all of
# them, or one wrong id leads the rest astray, so it stands in every epoch DRAWING_REPEATS times.
DRAWINGS = (("Generate a histology slide with brown glands.", "ihc_overview"),)
DRAWING_REPEATS = 10
