"""DeepSpeed checkpoints of a tiny module, for test_zero.py; a run makes them all, as starting DeepSpeed takes seconds.

    RANK=0 WORLD_SIZE=1 python zero_folders.py PLAN     on every rank; PLAN is a JSON file

PLAN lists folders: "path", and as below. Each gets DeepSpeed's checkpoint and expected.pt, made from the live weights:
{name: the fp32 weight, or the module's where the optimizer has none}. "universal" is where to convert it to.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from medmax_fast.runtime import rank_and_world
from medmax_fast.training.engine import save_engine, start_processes, to_universal


class Tiny(nn.Module):
    """Odd sizes, a shared weight, a frozen layer, buffers, and parameters without numbers."""

    def __init__(self, frozen: bool, empty: bool):
        super().__init__()
        self.table = nn.Embedding(11, 3)
        self.layer = nn.Linear(3, 7)
        self.gain = nn.Parameter(torch.randn(1))
        if empty:
            self.none, self.nothing = nn.Parameter(torch.randn(0, 3)), nn.Parameter(torch.randn(2, 0))
        self.still = nn.Linear(7, 5)
        self.norm = nn.Parameter(torch.randn(5))
        self.back = nn.Linear(5, 3, bias=False)
        self.head = nn.Linear(3, 11, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("count", torch.arange(4))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.still.requires_grad_(not frozen)

    def forward(self, ids):
        hidden = self.still(self.layer(self.table(ids)) * self.gain) * self.norm
        return self.head(self.back(hidden)).float().square().mean()


def main(plan: list[dict]) -> None:
    start_processes(torch.device("cpu"), torch.float32)
    for spec in plan:
        make(**spec)


def make(
    path: str,
    stage: int,
    dtype: str = "fp32",
    frozen: bool = False,
    exclude: bool = False,
    groups: int = 1,
    accumulate: str = "fp32",
    zero: dict | None = None,
    own: bool = False,
    universal: str = "",
) -> None:
    """One checkpoint after two steps. own: saved as this package does, in engine/, else with a tag and `latest`."""
    torch.manual_seed(1)
    # Between ranks of stage 3, DeepSpeed cannot gather parameters without numbers.
    model = Tiny(frozen, empty=stage < 3)
    # Those without numbers come last, as DeepSpeed needs others in every group.
    trained = sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel() == 0)
    options = [{"params": trained[i::groups], "weight_decay": 0.1 * i} for i in range(groups)]
    optimizer = torch.optim.AdamW(options, lr=0.01)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "overlap_comm": False, **(zero or {})},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bf16"},
        "data_types": {"grad_accum_dtype": accumulate},
        "steps_per_print": 2**62,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    rank = rank_and_world()[0]
    for step in range(2):
        engine.backward(engine(torch.arange(6).roll(step + rank)))
        engine.step()
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if own:
        save_engine(engine, folder, exclude)
    else:
        engine.save_checkpoint(path, exclude_frozen_parameters=exclude)
    expected = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not (exclude and not parameter.requires_grad):
            value = safe_get_full_fp32_param(parameter) if stage and parameter.requires_grad else None
            if value is None:
                with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                    value = parameter.detach().clone()
            expected[name] = value.detach().clone()
    if rank == 0:
        torch.save(expected, folder / "expected.pt")
        if universal:
            to_universal(folder, Path(universal))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
