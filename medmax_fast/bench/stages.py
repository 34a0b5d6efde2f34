"""What `medmax bench` measures: suites of stages, in the order of what a run that is stopped should have."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A benchmark (benchmarks/bench_<module>.py), or a section of one, which it runs alone with `--only NAME`.

    guards: the test modules (tests/test_<guard>.py) without which it has no speed.
    """

    name: str
    module: str
    guards: tuple[str, ...] = ()
    section: bool = True


def _sections(module: str, guards: dict[str, str]) -> list[Stage]:
    return [Stage(name, module, tuple(tests.split())) for name, tests in guards.items()]


KERNELS = {
    "vq": "vq",
    "remap": "remap",
    "resample": "resample",
    "group_norm": "group_norm",
    "norm_rope": "qk_norm_rope",
    "rms_norm": "rms_norm",
    "swiglu": "swiglu",
    "lora": "lora",
    "loss": "cross_entropy loss",
    "norm_rope_store": "norm_rope_store",
    "paged_attention": "paged_attention",
    "sampling": "sampling",
}
WHOLE = ("precision", "build", "packing", "collate", "train", "checkpoint", "generate", "eval")
SUITES = {
    "gpu": [
        *_sections("kernels", KERNELS),
        *_sections("collate", {"collate": "collate"}),
        *_sections("images", {"encoder": "vqgan vqgan_fused", "tokenize": "vqgan vqgan_fused resample tokenization"}),
        *_sections("generate", dict.fromkeys(("text", "pictures", "vqa"), "generate generate_command decoder")),
        *_sections("train", {"train": "attention loss gpu_training"}),
        *_sections("full", dict.fromkeys(("full", "short_rows"), "attention loss gpu_training")),
        *_sections("start", {"start": "generate decoder", "compile": "doctor"}),
    ],
    "cpu": [Stage("pixels", "images"), *(Stage(name, name, section=False) for name in WHOLE)],
}
