"""Reading the weights of a DeepSpeed checkpoint folder without DeepSpeed and without running code from it.

What DeepSpeed writes into a tag folder (global_step500/, or engine/ in a checkpoint of this package), W ranks:

    stage 0     mp_rank_00_model_states.pt: `module`, whole tensors by name, buffers among them (`buffer_names`)
    stage 1, 2  the same file, with `param_shapes` of each optimizer group, and per rank
                [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt. There each group is one flat fp32 tensor: all its
                parameters one behind the other, cut into W equal shares. Zeros fill up the end, in some versions all
                but those that the last shares lack; `param_alignment_paddings` tells of any between parameters
    stage 3     zero_pp_rank_R_mp_rank_00_model_states.pt and ..._optim_states.pt per rank: each parameter by itself is
                cut into W parts of ceil(numbers / W), and a rank's parts follow one another in its flat tensors
    universal   zero/NAME/fp32.pt, a parameter each: {"param": tensor}, or from stage 3 a flat tensor whose shape is
                in the model_states.pt beside it

Parameters without an optimizer are in `module` (stages 0 to 2) or, cut as above, in `frozen_param_fragments` (stage 3).
Names in `shared_params` stand for another one's tensor. So every weight is a row of slices of tensors in some files;
these are memory-mapped, and reading a weight copies its slices and nothing else.
"""

import pickle
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

import torch

from medmax_fast.model.files import reason_of
from medmax_fast.runtime import InputError

_FILE = r"(?:(?:bf16_|fp16_)?zero_pp_rank_(\d+)_)?mp_rank_(\d+)_{}_states\.pt"
# The rank of a file that is there once for all ranks.
_ALL = -1
_OPTIMIZER = "optimizer_state_dict"
_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}
_WAY_OUT = "where you trust it, run DeepSpeed's zero_to_fp32.py --safe_serialization and use what that writes"
_BROKEN = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError)


class _Unread:
    """Stands for objects that no weight depends on."""

    def __init__(self, *_):
        pass


def _stage(kind: type, name: str) -> int:
    """In the place of getattr, with which some versions of Python 3.11 have written members of an enumeration."""
    if kind is not int or name not in _STAGES:
        raise pickle.UnpicklingError("Unsupported global: GLOBAL getattr")
    return _STAGES[name]


_STAND_INS: list[tuple[Callable, str]] = [
    (_Unread, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Unread, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Unread, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_stage, "builtins.getattr"),
]


@dataclass(frozen=True)
class _Slice:
    """`count` numbers from `start` of a tensor, flattened, that lies in a file's nested dicts and lists at `keys`."""

    file: Path
    keys: tuple[str | int, ...]
    start: int
    count: int


def find_zero(path: str | Path) -> Path | None:
    """The tag folder for whatever a user points at: itself, or one level down; None if there is none.

    Of several, a file `latest` names the one to take; InputError without it.
    """
    path = Path(path)
    if not path.is_dir():
        return None
    if _is_tag(path):
        return path
    below = sorted(p for p in path.iterdir() if p.is_dir() and _is_tag(p))
    latest = path / "latest"
    named = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else None
    chosen = [p for p in below if p.name == named] or below
    if len(chosen) > 1:
        names = ", ".join(p.name for p in chosen)
        raise InputError(f"{path}: {len(chosen)} DeepSpeed checkpoints ({names}), expected one; give its own folder")
    return chosen[0] if chosen else None


def _is_tag(path: Path) -> bool:
    patterns = ("*mp_rank_*_model_states.pt", "*zero_pp_rank_*_optim_states.pt", "zero/*/fp32.pt")
    return any(True for pattern in patterns for _ in path.glob(pattern))


class ZeroWeights:
    """The trained weights in a DeepSpeed checkpoint folder, whole, read one at a time.

    path: the folder with the .pt files. kind: "zero-0" to "zero-3", or "universal". frozen: the names of weights that
    are known to have had no optimizer, and may be rounded.
    InputError names the file that is missing, damaged, of another checkpoint, or asks for code. Checkpoints of model,
    pipeline or expert parallelism are refused. The fp32 weights behind 16-bit training at stage 0 are not read:
    DeepSpeed has not written which is whose.
    """

    path: Path
    kind: str
    frozen: set[str]

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.kind, self.frozen = "zero-0", set()
        self._mapped: dict[Path, Any] = {}
        self._weights: dict[str, tuple[torch.Size, list[_Slice]]] = {}
        models, shares = self._by_rank("model"), self._by_rank("optim")
        universal = {} if shares else {file.parent.name: file for file in sorted(self.path.glob("zero/*/fp32.pt"))}
        if len(models) > 1 and _ALL in models:
            raise InputError(f"{models[_ALL]}: beside {models[max(models)].name}, expected one checkpoint in a folder")
        if universal:
            self._read_universal(universal, models)
        elif _ALL in models or not models:
            # Without any such file, the one that cannot be read is named.
            self._read_whole(models.get(_ALL, self.path / "mp_rank_00_model_states.pt"), shares)
        else:
            self._read_split(models, shares)

    def names(self) -> list[str]:
        """Module parameter names: those of the optimizer in its order, then frozen ones, other names, and the rest."""
        return list(self._weights)

    def shape(self, name: str) -> torch.Size:
        """The shape of a weight; InputError if there is none of this name."""
        return self._weight(name)[0]

    def tensor(self, name: str) -> torch.Tensor:
        """A weight as a contiguous tensor of its own on the CPU: the optimizer's, in fp32, or else the module's."""
        shape, slices = self._weight(name)
        flat = [self._tensor(s.file, *s.keys).reshape(-1)[s.start : s.start + s.count] for s in slices]
        return torch.cat(flat).view(shape)

    def release(self) -> None:
        """Forget the mapped files, whose pages count as this process's memory; they are opened again when needed."""
        self._mapped.clear()

    def _weight(self, name: str) -> tuple[torch.Size, list[_Slice]]:
        if name not in self._weights:
            raise InputError(f"{self.path}: no weight {name}")
        return self._weights[name]

    # Each kind of folder, as slices.

    def _read_whole(self, model: Path, shares: dict[int, Path]) -> None:
        """Stages 0 to 2, with a file of the module's own."""
        groups = self._groups(model)
        files = self._complete(shares, (1, 2) if groups else (0,)) if groups or shares else []
        for index, shapes in enumerate(groups):
            given, paddings = (_OPTIMIZER, "param_alignment_paddings"), [0] * len(shapes)
            if self._given(files[0], *given, of=list):
                paddings = self._at(files[0], *given, index, of=list)
            self._add_joined(files, (_OPTIMIZER, "single_partition_of_fp32_groups", index), shapes, paddings)
        self._add_others([model])
        buffers = self._given(model, "buffer_names", of=list)
        for name, value in self._at(model, "module").items():
            if isinstance(value, torch.Tensor) and name not in buffers and name not in self._weights:
                self._weights[name] = value.shape, [_Slice(model, ("module", name), 0, value.numel())]
                if groups:
                    self.frozen.add(name)

    def _read_split(self, models: dict[int, Path], shares: dict[int, Path]) -> None:
        """Stage 3."""
        files = self._complete(shares, (3,))
        ordered = self._of_ranks(models, len(files))
        for index, shapes in enumerate(self._groups(ordered[0])):
            self._add_parts(files, (_OPTIMIZER, "fp32_flat_groups", index), shapes)
        self._add_others(ordered)

    def _read_universal(self, files: dict[str, Path], models: dict[int, Path]) -> None:
        """files: fp32.pt by parameter; models: files of the checkpoint it was made from, which need not be there."""
        self.kind, ordered, buffers = "universal", list(models.values()), ()
        if ordered and _ALL not in models:
            ordered = self._of_ranks(models, self._at(ordered[0], "dp_world_size", of=int))
        if ordered:
            for shapes in self._groups(ordered[0]):
                for name, shape in shapes.items():
                    self._add_file(name, files.get(name, self.path / "zero" / name / "fp32.pt"), shape)
            self._add_others(ordered, files)
            buffers = self._given(ordered[0], "buffer_names", of=list)
        for name, file in files.items():
            if name not in buffers and name not in self._weights:
                self._add_file(name, file, None)

    def _add_joined(self, files: list[Path], keys: tuple, shapes: dict, paddings: list[int]) -> None:
        """Parameters that follow one another in one flat tensor, of which each file has a share at `keys`."""
        if len(paddings) != len(shapes):
            raise InputError(f"{files[0]}: {len(paddings)} paddings in group {keys[-1]}, expected {len(shapes)}")
        sizes = [self._tensor(file, *keys).numel() for file in files]
        end = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            self._weights[name] = shape, _spread(files, sizes, keys, end, shape.numel())
            end += shape.numel() + padding
        # The shares are made equal, and even.
        if not end <= sum(sizes) < end + 2 * len(files):
            found = f"{' + '.join(map(str, sizes))} numbers in group {keys[-1]} of the ranks"
            raise InputError(f"{files[0]}: {found}, expected {end} and less than {2 * len(files)} to fill up")

    def _add_parts(self, files: list[Path], keys: tuple, shapes: dict) -> None:
        """Parameters each cut into a part per file, which there follow one another in a flat tensor at `keys`."""
        start = 0
        for name, shape in shapes.items():
            part = -(-shape.numel() // len(files))
            counts = [min(part, max(shape.numel() - rank * part, 0)) for rank in range(len(files))]
            slices = [_Slice(file, keys, start, count) for file, count in zip(files, counts, strict=True)]
            self._weights[name] = shape, [s for s in slices if s.count] or slices[:1]
            start += part
        for file in files:
            size = self._tensor(file, *keys).numel()
            if size != start:
                raise InputError(f"{file}: {size} numbers in {_dotted(keys)}, expected {start} with {len(files)} ranks")

    def _add_file(self, name: str, file: Path, shape: torch.Size | None) -> None:
        """One parameter of a universal checkpoint; shape: where the folder tells it."""
        value = self._at(file, of=dict | torch.Tensor)
        keys = ("param",) if isinstance(value, dict) else ()
        tensor = self._tensor(file, *keys)
        # A vocabulary has lost the rows that only filled it up.
        if keys and (shape is None or value.get("vocab_tensor")):
            shape = tensor.shape
        if shape is None or shape.numel() != tensor.numel():
            expected = f"{tuple(shape)}" if shape is not None else "the model_states.pt that has its shape"
            raise InputError(f"{file}: a tensor {tuple(tensor.shape)}, expected {expected}")
        self._weights[name] = shape, [_Slice(file, keys, 0, tensor.numel())]

    def _add_others(self, models: list[Path], elsewhere: Collection[str] = ()) -> None:
        """Frozen parameters, but for those `elsewhere`, and the second names of shared ones."""
        model = models[0]
        for name, shape in self._shapes(model, self._given(model, "frozen_param_shapes", of=dict)).items():
            self.frozen.add(name)
            if name not in elsewhere:
                self._add_parts(models, ("frozen_param_fragments", name), {name: shape})
        for name, other in self._given(model, "shared_params", of=dict).items():
            # DeepSpeed takes all parameters without any number for one.
            if str(other) in self._weights and name not in self._weights:
                self._weights[name] = self._weights[other]

    # Files, and what is in them.

    def _by_rank(self, role: str) -> dict[int, Path]:
        """The files of a role by data-parallel rank, _ALL for the one that all ranks share."""
        found: dict[int, Path] = {}
        for file in sorted(self.path.glob(f"*{role}_states.pt")):
            match = re.fullmatch(_FILE.format(role), file.name)
            if not match or int(match[2]):
                raise InputError(f"{file}: of model, pipeline or expert parallelism, expected ranks of data only")
            rank = int(match[1]) if match[1] else _ALL
            if rank in found:
                raise InputError(f"{file}: of the same rank as {found[rank].name}, expected one checkpoint in a folder")
            found[rank] = file
        return found

    def _complete(self, shares: dict[int, Path], stages: tuple[int, ...]) -> list[Path]:
        """The optimizer's files in order of rank; `kind` becomes theirs."""
        world = 1
        for rank, file in shares.items():
            state = self._at(file, _OPTIMIZER)
            # bf16's own optimizer of stage 1 does not say.
            stage = state.get("zero_stage", 1)
            if stage not in stages:
                expected = f"{' or '.join(map(str, stages))} as of the model_states.pt beside it"
                raise InputError(f"{file}: of ZeRO stage {stage}, expected {expected}")
            counts = self._at(file, _OPTIMIZER, "partition_count", of=int | list)
            counts = set(counts) if isinstance(counts, list) else {counts}
            if len(counts) != 1 or state.get("ds_zero_partition_groups") is not None:
                raise InputError(f"{file}: of expert parallelism, expected ranks of data only")
            if rank == min(shares):
                self.kind, world = f"zero-{stage}", *counts
            elif counts != {world}:
                raise InputError(f"{file}: written by {counts.pop()} ranks, expected {world} as of the others")
        return self._of_ranks(shares, world)

    def _of_ranks(self, files: dict[int, Path], world: int) -> list[Path]:
        """Files of ranks 0 to world - 1, in this order."""
        example = files[max(files)].name if files else "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        for rank in range(world):
            if rank not in files:
                missing = re.sub(r"pp_rank_\d+", f"pp_rank_{rank}", example)
                raise InputError(f"{self.path / missing}: no such file, expected those of ranks 0 to {world - 1}")
        if len(files) != world:
            raise InputError(f"{files[max(files)]}: of another checkpoint, expected ranks 0 to {world - 1}")
        return [files[rank] for rank in range(world)]

    def _groups(self, model: Path) -> list[dict[str, torch.Size]]:
        """Shapes by name of each of the optimizer's groups, [] at stage 0."""
        state = self._at(model)
        if state.get("mp_world_size") not in (None, 1) or state.get("ds_autoep_layers") is not None:
            raise InputError(f"{model}: of model or expert parallelism, expected ranks of data only")
        return [self._shapes(model, group) for group in self._at(model, "param_shapes", of=list | None) or ()]

    def _shapes(self, model: Path, shapes: dict) -> dict[str, torch.Size]:
        try:
            return {name: torch.Size(shape) for name, shape in shapes.items()}
        except (AttributeError, TypeError) as error:
            raise InputError(f"{model}: param_shapes does not list sizes by parameter ({error})") from error

    def _tensor(self, file: Path, *keys: str | int) -> torch.Tensor:
        return self._at(file, *keys, of=torch.Tensor).detach()

    def _given(self, file: Path, *keys: str, of: type) -> Any:
        """As `_at`, but an empty `of` if the last key is missing, as by older versions, or None."""
        if self._at(file, *keys[:-1]).get(keys[-1]) is None:
            return of()
        return self._at(file, *keys, of=of)

    def _at(self, file: Path, *keys: str | int, of: type | UnionType = dict) -> Any:
        """What a file holds at `keys`; InputError if it is not an `of`."""
        if file not in self._mapped:
            self._mapped[file] = _load(file)
        value = self._mapped[file]
        for key in keys:
            try:
                value = value[key]
            except (LookupError, TypeError) as error:
                raise InputError(f"{file}: no {_dotted(keys)}, expected a checkpoint of DeepSpeed") from error
        if not isinstance(value, of):
            kind = getattr(of, "__name__", of)
            raise InputError(f"{file}: {_dotted(keys)} is {type(value).__name__}, expected {kind}")
        return value


def _spread(files: list[Path], sizes: list[int], keys: tuple, start: int, count: int) -> list[_Slice]:
    """A range of the tensor that the files have in shares of these sizes."""
    slices, before = [], 0
    for file, size in zip(files, sizes, strict=True):
        first, last = max(start, before), min(start + count, before + size)
        if first < last:
            slices.append(_Slice(file, keys, first - before, last - first))
        before += size
    return slices or [_Slice(files[0], keys, 0, 0)]


def _dotted(keys: tuple) -> str:
    return ".".join(map(str, keys)) or "the file"


def _load(file: Path) -> Any:
    """What a file holds, its tensors memory-mapped and objects of DeepSpeed's left out; InputError if it needs code."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file, expected one of a DeepSpeed checkpoint") from error
    except _BROKEN as error:
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"{file}: asks for {asked[1]}, and no code is run from a checkpoint; {_WAY_OUT}"
            ) from error
        raise InputError(f"{file}: cannot be read, expected a whole file of torch.save ({reason_of(error)})") from error
