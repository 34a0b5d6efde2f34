"""DeepSpeed checkpoints read without DeepSpeed: bit for bit the weights that were trained, and no code run from them.

The folders are DeepSpeed's own, made by one run of zero_folders.py per number of ranks.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ports import free_port

from medmax_fast.model.zero import ZeroWeights, find_zero
from medmax_fast.runtime import InputError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "tests" / "zero_folders.py")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
SPREAD = {"round_robin_gradients": True, "parameter_alignment": True}
CASES = {
    "0": {"stage": 0},
    "0-bf16": {"stage": 0, "dtype": "bf16", "accumulate": "bf16", "frozen": True},
    "1": {"stage": 1, "frozen": True},
    # With gradients in fp32 DeepSpeed has another optimizer for bf16, which keeps the filling.
    "1-bf16": {"stage": 1, "dtype": "bf16", "frozen": True, "groups": 2, "own": True, "universal": True},
    "1-bf16-apart": {"stage": 1, "dtype": "bf16", "accumulate": "bf16", "frozen": True, "exclude": True},
    # A group with a single number leaves one of two ranks nothing.
    "2": {"stage": 2, "groups": 6},
    "2-bf16": {"stage": 2, "dtype": "bf16", "frozen": True, "own": True, "universal": True},
    "2-aligned": {"stage": 2, "frozen": True, "exclude": True, "groups": 2, "zero": SPREAD},
    "3": {"stage": 3, "frozen": True, "exclude": True, "groups": 6, "own": True, "universal": True},
    "3-bf16": {"stage": 3, "dtype": "bf16", "frozen": True, "own": True, "universal": True},
    "3-cut": {"stage": 3, "dtype": "bf16", "zero": {"sub_group_size": 20}},
}
WORLDS = (1, 2)
EVERY = [(world, name) for world in WORLDS for name in CASES]
UNIVERSAL = [(world, name) for world, name in EVERY if "universal" in CASES[name]]
MODEL, MODEL_0, MODEL_1 = (
    "mp_rank_00_model_states.pt",
    *(f"zero_pp_rank_{i}_mp_rank_00_model_states.pt" for i in (0, 1)),
)
SHARE_0, SHARE_1, SHARE_2 = (f"zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in range(3))


def place(base, world, name):
    """Where the checkpoint is: as in a run's folder of this package, or as DeepSpeed's users have it."""
    return base / f"{world}-{name}" / ("checkpoints/step-000010" if CASES[name].get("own") else "checkpoint-2")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("zero")
    started = []
    for world in WORLDS:
        plan = [{**case, "path": str(place(base, world, name))} for name, case in CASES.items()]
        for spec in plan:
            spec.update({"universal": spec["path"] + "-universal"} if "universal" in spec else {})
        (base / f"plan-{world}.json").write_text(json.dumps(plan))
        port = free_port()
        for rank in range(world):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            environment = ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1"} | {key: str(n) for key, n in numbers.items()}
            with open(base / f"{world}-{rank}.log", "w") as log:
                command = [sys.executable, SCRIPT, str(base / f"plan-{world}.json")]
                options = {"stdout": log, "stderr": log, "env": os.environ | environment}
                started.append((subprocess.Popen(command, **options), log.name))
    for process, log in started:
        assert process.wait(timeout=300) == 0, Path(log).read_text()[-3000:]
    return base


def same(found, expected):
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)


@pytest.mark.parametrize(("world", "name"), EVERY)
def test_weights_are_those_that_were_trained(base, world, name):
    case, folder = CASES[name], place(base, world, name)
    expected = torch.load(folder / "expected.pt")
    weights = ZeroWeights(find_zero(folder))
    assert weights.path == folder / ("engine" if case.get("own") else "global_step2")
    assert weights.kind == f"zero-{case['stage']}"
    assert set(weights.names()) == set(expected) and len(weights.names()) == len(expected)
    assert len(expected) == 7 + 2 * (not case.get("exclude")) + 2 * (case["stage"] < 3)
    for weight in weights.names():
        found = weights.tensor(weight)
        assert found.shape == weights.shape(weight) and found.is_contiguous() and not found.requires_grad
        # A tensor of its own, and not a mapped file with others in it.
        assert found.untyped_storage().nbytes() == found.numel() * found.element_size()
        assert same(found, expected[weight]), weight
    trained = [weights.tensor(weight) for weight in ("layer.weight", "gain", "head.weight", "table.weight")]
    assert torch.equal(trained[2], trained[3])
    if case["stage"]:
        assert all(tensor.dtype == torch.float32 for tensor in trained)
        # What the module has in 16 bits would not pass for them.
        assert all(tensor.bfloat16().float().ne(tensor).any() for tensor in trained)
        model = next(weights.path.glob("*model_states.pt"))
        order = [weight for group in torch.load(model, weights_only=False)["param_shapes"] for weight in group]
        assert weights.names()[: len(order)] == order


@pytest.mark.parametrize(("world", "name"), UNIVERSAL)
def test_universal_checkpoints(base, world, name):
    folder = place(base, world, name)
    expected = torch.load(folder / "expected.pt")
    target = folder.with_name(folder.name + "-universal")
    assert find_zero(target) == find_zero(target / "engine") == target / "engine"
    weights = ZeroWeights(target / "engine")
    assert weights.kind == "universal" and set(weights.names()) == set(expected)
    for weight, tensor in expected.items():
        # Before stage 3, all is converted to fp32.
        assert same(weights.tensor(weight), tensor.float() if CASES[name]["stage"] < 3 else tensor), weight
    if CASES[name]["stage"] < 3:
        alone = target.parent / "alone"
        shutil.copytree(target / "engine" / "zero", alone / "zero")
        bare = ZeroWeights(find_zero(alone))
        assert set(bare.names()) == {*expected, "count"}
        assert all(same(bare.tensor(n), t.float()) for n, t in expected.items() if n != "head.weight")


@pytest.mark.parametrize(("world", "name"), EVERY)
def test_as_deepspeed_exports_them(base, world, name, monkeypatch):
    case = CASES[name]
    if name in ("0", "0-bf16", "1-bf16"):
        pytest.skip("DeepSpeed exports none without a stage in the optimizer's files")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights = ZeroWeights(find_zero(place(base, world, name)))
    exported = get_fp32_state_dict_from_zero_checkpoint(weights.path.parent, weights.path.name)
    del exported["count"]
    still = {"still.weight", "still.bias"} if name == "1" else set()
    module_only = still | {"none", "nothing"} if case["stage"] == 1 or name == "2-aligned" else set()
    assert set(weights.names()) - set(exported) == module_only
    for weight, tensor in exported.items():
        # It takes one parameter without numbers for the other.
        assert weight == "nothing" or same(weights.tensor(weight), tensor), weight


def test_folders_that_users_point_at(base, tmp_path):
    tag = find_zero(place(base, 2, "2"))
    assert tag.name == "global_step2" and find_zero(tag) == find_zero(str(tag)) == tag
    for nothing in (tmp_path, tmp_path / "missing", tag / MODEL, place(base, 2, "2").parent):
        assert find_zero(nothing) is None
    shutil.copytree(place(base, 2, "2"), tmp_path / "run")
    shutil.copytree(tag, tmp_path / "run" / "global_step1")
    assert find_zero(tmp_path / "run").name == "global_step2"
    (tmp_path / "run" / "latest").write_text("global_step1\n")
    assert find_zero(tmp_path / "run").name == "global_step1"
    (tmp_path / "run" / "latest").unlink()
    with pytest.raises(InputError, match=r"run: 2 DeepSpeed checkpoints \(global_step1, global_step2\), expected one"):
        find_zero(tmp_path / "run")


def mapped(folder):
    return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line}


@pytest.mark.parametrize("name", ["2", "3"])
def test_files_are_mapped_until_released(base, name):
    weights = ZeroWeights(find_zero(place(base, 2, name)))
    before = weights.tensor("layer.weight")
    assert len(mapped(weights.path)) == 3
    weights.release()
    assert not mapped(weights.path)
    assert same(weights.tensor("layer.weight"), before) and len(mapped(weights.path)) == 2
    with pytest.raises(InputError, match="no weight layer$"):
        weights.tensor("layer")


def test_deepspeed_need_not_be_there(base):
    program = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from medmax_fast.model.zero import ZeroWeights, find_zero\n"
        "for path in sys.argv[1:]:\n"
        "    weights = ZeroWeights(find_zero(path)); print(sum(weights.tensor(n).numel() for n in weights.names()))\n"
        "assert not [name for name in sys.modules if name.startswith('deepspeed.')]\n"
    )
    paths = [str(place(base, 2, name)) for name in CASES]
    done = subprocess.run(
        [sys.executable, "-c", program, *paths], env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    numbers = [sum(t.numel() for t in torch.load(Path(path) / "expected.pt").values()) for path in paths]
    assert (done.returncode, done.stdout.split()) == (0, [str(number) for number in numbers]), done.stderr


class Call:
    """Pickled as a call of a function, which unpickling would make."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def change(file, edit):
    """Have a file hold what it held, changed by `edit`."""
    state = torch.load(file, weights_only=False)
    edit(state)
    torch.save(state, file)


@pytest.fixture()
def copy(base, tmp_path):
    """A function that copies the tag folder of a case of two ranks, to be damaged."""

    def copy(name, universal=False):
        folder = place(base, 2, name)
        source = find_zero(folder.with_name(folder.name + "-universal") if universal else folder)
        return Path(shutil.copytree(source, tmp_path / "copy"))

    return copy


FILES = [("2", SHARE_1), ("2", MODEL), ("3", SHARE_0), ("2-bf16", "zero/norm/fp32.pt")]


@pytest.mark.parametrize(("name", "file"), FILES)
def test_no_code_is_run(copy, tmp_path, name, file):
    folder, marker = copy(name, universal=file.startswith("zero/")), tmp_path / "ran"
    calls = (Call(getattr, torch.Size, "numel"), "getattr"), (Call(os.system, f"touch {marker}"), "posix.system")
    for call, asked in calls:
        change(folder / file, lambda state, call=call: state.update(extra=call))
        with pytest.raises(InputError) as caught:
            ZeroWeights(folder)
        assert str(caught.value).startswith(f"{folder / file}: asks for {asked}") and "\n" not in str(caught.value)
    assert not marker.exists()
    torch.load(folder / file, weights_only=False)
    assert marker.exists()


def test_a_stage_written_by_name(copy, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import ZeroStageEnum

    folder, stage = copy("2"), Call(getattr, ZeroStageEnum, "gradients")
    for file in (SHARE_0, SHARE_1):
        change(folder / file, lambda state: state["optimizer_state_dict"].update(zero_stage=stage))
    assert ZeroWeights(folder).kind == "zero-2"


# What happens to a copy: functions of its folder and of `base`.


def gone(pattern):
    return lambda folder, _: [p.unlink() if p.is_file() else shutil.rmtree(p) for p in [*folder.glob(pattern)]]


def put(file, source, name=None, world=2):
    """`file` becomes another one of the folder, or one of the case `name` as `world` ranks have saved it."""

    def act(folder, base):
        shutil.copy((find_zero(place(base, world, name)) if name else folder) / source, folder / file)

    return act


def cut(file, divisor=2):
    return lambda folder, _: os.truncate(folder / file, (folder / file).stat().st_size // divisor)


def shorten(file, key, index):
    """A flat tensor of an optimizer's file loses its last number."""

    def edit(state):
        flat = state["optimizer_state_dict"][key]
        flat[index] = flat[index].detach()[:-1].clone()

    return lambda folder, _: change(folder / file, edit)


def shapeless(folder, _):
    change(folder / MODEL, lambda state: state.pop("param_shapes"))


def other(file, *keys, **entries):
    """Entries of what a file holds at `keys` are replaced."""

    def edit(state):
        for key in keys:
            state = state[key]
        state.update(entries)

    return lambda folder, _: change(folder / file, edit)


FLAT = "single_partition_of_fp32_groups"
OPTIMIZER = "optimizer_state_dict"
DAMAGE = {
    "share": ("2", gone(SHARE_1), f"{SHARE_1}: no such file, expected those of ranks 0 to 1"),
    "first share": ("3", gone(SHARE_0), f"{SHARE_0}: no such file"),
    "shares": ("1", gone("*optim_states.pt"), f"{SHARE_0}: no such file"),
    "model": ("2", gone(MODEL), f"{MODEL}: no such file"),
    "model of a rank": ("3-bf16", gone(MODEL_1), f"{MODEL_1}: no such file"),
    "cut": ("2", cut(SHARE_1), f"{SHARE_1}: cannot be read"),
    "cut model": ("0", cut(MODEL), f"{MODEL}: cannot be read"),
    "empty": ("3", cut(SHARE_1, 10**9), f"{SHARE_1}: cannot be read"),
    "text": ("2", lambda folder, _: (folder / MODEL).write_text("hello\n"), f"{MODEL}: cannot be read"),
    "ranks": ("3", put(SHARE_0, SHARE_0, "3", 1), f"{SHARE_1}: written by 2 ranks, expected 1 as of the others"),
    "more ranks": ("2", put(SHARE_2, SHARE_1), f"{SHARE_2}: of another checkpoint, expected ranks 0 to 1"),
    "numbers": ("2", shorten(SHARE_1, FLAT, 2), f"{SHARE_0}: 18 . 14 numbers in group 2 of the ranks, expected 33"),
    "numbers of 3": ("3", shorten(SHARE_1, "fp32_flat_groups", 0), f"{SHARE_1}: 0 numbers in .*, expected 1 with 2"),
    "frozen": ("3-bf16", put(MODEL_1, MODEL_0, "3-bf16", 1), f"{MODEL_1}: 35 numbers in frozen_.*, expected 18"),
    "stage": ("2", put(SHARE_1, SHARE_1, "3"), f"{SHARE_1}: of ZeRO stage 3, expected 1 or 2"),
    "stages": ("3", put(MODEL, MODEL, "2"), f"{MODEL}: beside {MODEL_1}, expected one checkpoint in a folder"),
    "precisions": ("2", put("bf16_" + SHARE_0, SHARE_0), f"{SHARE_0}: of the same rank as bf16_{SHARE_0}"),
    "model parallel": ("2", put("mp_rank_01_model_states.pt", MODEL), "mp_rank_01_model_states.pt: of model, pipeline"),
    "pipeline": ("2", put("layer_00-model_00-model_states.pt", MODEL), "00-model_states.pt: of model, pipeline or"),
    "paddings": ("2", other(SHARE_0, OPTIMIZER, param_alignment_paddings=[[0] * 9] * 9), f"{SHARE_0}: 9 paddings in"),
    "experts": ("2", other(SHARE_0, OPTIMIZER, partition_count=[1, 2]), f"{SHARE_0}: of expert parallelism, expected"),
    "tensor parallel": ("2", other(MODEL, mp_world_size=2), f"{MODEL}: of model or expert parallelism, expected ranks"),
    "no shapes": (
        "2",
        other(MODEL, param_shapes=[3]),
        f"{MODEL}: param_shapes does not list sizes by parameter .'int'",
    ),
    "no list": ("2", other(MODEL, param_shapes=3), f"{MODEL}: param_shapes is int, expected list . None"),
    "shapes": ("2", shapeless, f"{MODEL}: no param_shapes, expected a checkpoint of DeepSpeed"),
    "universal": ("3-bf16", gone("zero/norm"), "zero/norm/fp32.pt: no such file"),
    "universal cut": ("2-bf16", cut("zero/norm/fp32.pt"), "zero/norm/fp32.pt: cannot be read"),
    "universal size": ("2-bf16", put("zero/norm/fp32.pt", "zero/gain/fp32.pt"), r"a tensor \(1,\), expected \(5,\)"),
    "universal shapes": ("3-bf16", gone("*.pt"), "fp32.pt: a tensor .*, expected the model_states.pt"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(base, copy, damage):
    name, act, expected = DAMAGE[damage]
    folder = copy(name, universal=damage.startswith("universal"))
    ZeroWeights(folder)
    act(folder, base)
    assert find_zero(folder) == folder
    with pytest.raises(InputError, match=expected) as caught:
        ZeroWeights(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)
