"""What training has made of a base checkpoint's tensors: whole tensors, rows of them, LoRA pairs to be merged.

A merged weight is W + scale * B A, summed in fp32 and rounded once to its dtype, so it is off by half a unit in the
last place and by the error of the fp32 sum. scale = alpha / rank (alpha / sqrt(rank) with rsLoRA), read per module from
adapter_config.json with its rank and alpha patterns, as peft applies them. B A is computed in blocks of rows.
"""

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from medmax_fast.model.adapter import CONFIG_FILE
from medmax_fast.model.checkpoint import Checkpoint
from medmax_fast.model.files import is_finite
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IdLayout, read_vocab

# What peft, DeepSpeed and this package's trainer put in front of the names that transformers gives.
_NAME = re.compile(
    r"(?:module\.|base_model\.model\.|model\.)*?(model\.(?:embed_tokens|layers|norm|vqmodel)\..+|lm_head\..+)"
)
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
# Frozen copies that training keeps beside what it changes, and the picture encoder, which is never trained.
_FROZEN = re.compile(r"model\.vqmodel\..*|.+\.(?:base_layer|original_module)\..+|.+\.(?:before|after)")
# Elements of B A computed at a time.
_BLOCK = 1 << 22


class Trained:
    """What training has made of some tensors of a base checkpoint.

    names, tensor: the trained weights by the names they were saved under, read one at a time; path: for messages.
    rules: rank and alpha of LoRA pairs, as in adapter_config.json. InputError for a weight that the base has no place
    for, for an incomplete pair, and for targets or saved modules of the rules that are not there.
    """

    def __init__(
        self,
        names: Iterable[str],
        tensor: Callable[[str], torch.Tensor],
        path: Path,
        base: Checkpoint,
        rules: dict | None = None,
    ):
        self.path, self._tensor, self._rules = path, tensor, rules or {}
        self._first = IdLayout.from_vocab(read_vocab(base.tokenizer_path), str(base.tokenizer_path)).image_start
        # By name of the base: saved name of a whole tensor, of its trained rows, of a LoRA pair.
        self.whole: dict[str, str] = {}
        self.rows: dict[str, str] = {}
        self.lora: dict[str, dict[str, str]] = {}
        known = set(base.names())
        for saved in names:
            self._place(saved, known)
        self._check(known)

    def _place(self, saved: str, known: set[str]) -> None:
        match = _NAME.fullmatch(saved)
        name = match[1] if match else saved
        if _FROZEN.fullmatch(name):
            return
        name = re.sub(r"\.modules_to_save(\.[^.]+(?=\.(weight|bias)$))?", "", name)
        if pair := _LORA.fullmatch(name):
            if self.lora.setdefault(f"{pair[1]}.weight", {}).setdefault(pair[2], saved) != saved:
                raise InputError(f"{self.path}: several adapters on {pair[1]}, expected one")
        elif name.endswith(".rows"):
            self.rows[name.removesuffix("rows") + "weight"] = saved
        elif name in known:
            self.whole[name] = saved
        elif ".lora_" in name:
            raise InputError(f"{self.path}: tensor {saved} is of a kind of LoRA that cannot be merged here")
        else:
            raise InputError(f"{self.path}: adapts {name}, which the base checkpoint does not have")

    def _check(self, known: set[str]) -> None:
        for name in (*self.lora, *self.rows):
            if name not in known:
                raise InputError(f"{self.path}: adapts {name}, which the base checkpoint does not have")
        for name, pair in self.lora.items():
            if set(pair) != {"A", "B"}:
                raise InputError(f"{self.path}: {name.removesuffix('.weight')} lacks one of lora_A and lora_B")
        modules = [name.removesuffix(".weight") for name in self.lora]
        targets = self._rules.get("target_modules") or []
        # A text is a pattern, a list holds the ends of names.
        patterns = [targets] if isinstance(targets, str) else [rf"(.+\.)?{re.escape(name)}" for name in targets]
        for pattern in patterns:
            if not any(re.fullmatch(pattern, module) for module in modules):
                raise InputError(f"{self.path}: {CONFIG_FILE} targets {pattern}, and no tensor is for that")
        for module in modules if patterns else ():
            if not any(re.fullmatch(pattern, module) for pattern in patterns):
                raise InputError(f"{self.path}: holds a pair for {module}, which {CONFIG_FILE} does not target")
        for saved in self._rules.get("modules_to_save") or []:
            if not any(f".{name}".endswith(f".{saved}.weight") for name in self.whole):
                raise InputError(f"{self.path}: {CONFIG_FILE} saves {saved}, and no tensor is for that")

    def dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which `name` was trained; `dtype` if it was not, or by LoRA alone."""
        saved = self.whole.get(name) or self.rows.get(name)
        return self._tensor(saved).dtype if saved else dtype

    def apply(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor of a Hugging Face name after training, rounded once to `dtype` (None: as `self.dtype` says)."""
        dtype = dtype or self.dtype(name, tensor.dtype)
        if name in self.whole:
            whole = self._read(self.whole[name])
            # A norm that heads share is saved once.
            if whole.shape != tensor.shape and whole.shape != tensor.shape[1:]:
                found, wanted = tuple(whole.shape), tuple(tensor.shape)
                raise InputError(f"{self.path}: {name} has shape {found}, the base {wanted}")
            tensor = whole.expand_as(tensor)
        if name in self.rows:
            rows = self._read(self.rows[name]).to(dtype)
            tensor = tensor.to(dtype, copy=True)
            tensor[self._first : self._first + len(rows)] = rows
        return self._add_lora(name, tensor, dtype) if name in self.lora else tensor.to(dtype)

    def _read(self, saved: str) -> torch.Tensor:
        tensor = self._tensor(saved)
        if not is_finite(tensor):
            raise InputError(f"{self.path}: tensor {saved} holds NaN or infinity")
        return tensor

    def _add_lora(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        a, b = (self._read(self.lora[name][part]).float() for part in "AB")
        if (b.shape[0], a.shape[1]) != tensor.shape or a.shape[0] != b.shape[1]:
            found = (b.shape[0], a.shape[1])
            raise InputError(
                f"{self.path}: {name} would change by a matrix {found}, the base has {tuple(tensor.shape)}"
            )
        scale = self.scale(name.removesuffix(".weight"), a.shape[0])
        merged = torch.empty_like(tensor, dtype=dtype)
        size = max(1, _BLOCK // tensor.shape[1])
        for start in range(0, len(tensor), size):
            rows = slice(start, start + size)
            merged[rows] = torch.addmm(tensor[rows].float(), b[rows], a, alpha=scale)
        return merged

    def scale(self, module: str, rank: int) -> float:
        """The factor of B A for one module."""
        if "r" not in self._rules or "lora_alpha" not in self._rules:
            raise InputError(f"{self.path}: LoRA pairs, but no adapter_config.json or settings.json says their alpha")
        expected = self._pattern("rank_pattern", module, self._rules["r"])
        if rank != expected:
            raise InputError(f"{self.path}: {module} has rank {rank}, its configuration says {expected}")
        alpha = self._pattern("alpha_pattern", module, self._rules["lora_alpha"])
        return alpha / (math.sqrt(rank) if self._rules.get("use_rslora") else rank)

    def _pattern(self, table: str, module: str, default):
        """peft's rule: the first pattern that matches the end of the module's name."""
        for pattern, value in (self._rules.get(table) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default
