"""What bench_train measures: rows of data, a random model in any state of fusion, and its optimizer steps.

Data (assumed, after the published counts): lengths as in bench_packing, rows of more than 2,048 ids left out, since the
published training cuts them; 40 % of the text is the prompt; 17 % of the rows with images draw, the others look: their
images come before the eot and are not supervised.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from medmax_fast.config import TrainConfig
from medmax_fast.data.collate import collate
from medmax_fast.data.packing import plan_epoch
from medmax_fast.model import attention, fused
from medmax_fast.model.adapter import LoraLinear, adapted, add_adapter
from medmax_fast.model.init import random_model
from medmax_fast.model.layout import ModelShape
from medmax_fast.model.load import shape_of
from medmax_fast.model.loss import IGNORE, packed_loss, target_losses
from medmax_fast.model.trainable import PackedModel, recompute_activations
from medmax_fast.training import engine as ds
from medmax_fast.training.speed import flops_per_token
from medmax_fast.vocab import IMAGE_CODES, IdLayout

PUBLISHED_LENGTH = 2048
PROMPT_SHARE, DRAWN_SHARE = 0.4, 0.17
CONFIG = TrainConfig(data="", ckpt="", output="", lora_dropout=0.0, lr=0.0)
# Called with a dict it fills that with gradients; returns the mean loss.
Step = Callable[[dict | None], float]


@dataclass(frozen=True)
class Row:
    """What a row of the table runs. batches: padded 1, padded 8, packed or long; norm, mlp: stock, ours or liger.

    attention: stock or ours; adapter: peft or ours.
    """

    name: str
    on: str = ""
    batches: str = "padded 1"
    all_logits: bool = True
    norm: str = "stock"
    mlp: str = "stock"
    attention: str = "stock"
    adapter: str = "peft"
    compiled: bool = False
    engine: bool = False
    recompute: str = "none"

    def then(self, name: str, **changes) -> "Row":
        return replace(self, name=name, on=self.name, **changes)


def make_rows(count: int, layout: IdLayout, shrink: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids uint16, offsets int64 [count + 1]) of the mix, with lengths divided by `shrink`."""
    rng = np.random.default_rng(0)
    rows: list[np.ndarray] = []
    pictured = 0
    while len(rows) < count:
        images = rng.choice([0, 1, 2], p=[0.09, 0.88, 0.03])
        words = int(min(rng.lognormal(np.log(125), 0.9), 1500)) // shrink
        pictures = []
        for _ in range(images):
            codes = layout.ids_from_codes(rng.integers(0, layout.num_codes, IMAGE_CODES // shrink))
            pictures += [[layout.boi], codes, [layout.eoi]]
        text = rng.integers(layout.text_start, layout.vocab_size, words)
        prompt, response = np.split(text, [int(PROMPT_SHARE * words)])
        # Not by chance, so that a few rows have the share too.
        drawn = images and int((pictured + 1) * DRAWN_SHARE) > int(pictured * DRAWN_SHARE)
        before, behind = ([], pictures) if drawn else (pictures, [])
        row = np.concatenate([[layout.bos], *before, prompt, [layout.eot], response, *behind, [layout.eos]])
        if len(row) <= PUBLISHED_LENGTH // shrink:
            rows.append(row.astype(np.uint16))
            pictured += images > 0
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


def make_batches(
    ids: np.ndarray, offsets: np.ndarray, layout: IdLayout, packs: dict[str, int], device, padded: tuple = (1, 8)
) -> dict:
    """All rows as lists of batches, by the name that Row.batches gives: padded, and packed by the lengths `packs`.

    padded: rows of a padded batch, a list for each.
    """
    made = {}
    for size in padded:
        made[f"padded {size}"] = []
        for start in range(0, len(offsets) - 1, size):
            rows = range(start, min(start + size, len(offsets) - 1))
            singles = [collate(ids, offsets, [row], layout.eot) for row in rows]
            length = max(len(single.input_ids) for single in singles)
            padding = {"input_ids": layout.pad, "labels": IGNORE, "attention_mask": 0}
            batch = {name: torch.full((len(singles), length), value) for name, value in padding.items()}
            for i, single in enumerate(singles):
                n = len(single.input_ids)
                batch["input_ids"][i, :n] = torch.from_numpy(single.input_ids)
                batch["labels"][i, :n] = torch.from_numpy(single.labels)
                batch["attention_mask"][i, :n] = 1
            made[f"padded {size}"].append({name: tensor.to(device) for name, tensor in batch.items()})
    for name, length in packs.items():
        plan = plan_epoch(np.diff(offsets), length, 0, 0)
        made[name] = [collate(ids, offsets, plan.pack(p), layout.eot).to_torch(device) for p in range(len(plan))]
    return made


def step_flop(shape: ModelShape, full: bool, ids: int, targets: float) -> float:
    """FLOP of the products of a step, the head's for the supervised ids alone."""
    return ids * flops_per_token(shape, full, targets / ids)


def leave_group() -> None:
    """End the process group that an engine was built in, at the end of the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Model:
    """A random model whose layers can be put together from stock and fused parts again and again.

    full: all of its weights are trained; else an adapter is, which it has then.
    """

    def __init__(self, size: str, device: torch.device, dtype: torch.dtype, full: bool = False):
        self.device, self.dtype = device, dtype
        self.model, self.layout = random_model(size, device, dtype)
        self.shape = shape_of(self.model)
        if not full:
            self._adapt()
        self.model.train()
        self._stock = [dict(layer.named_children()) for layer in self.model.model.layers]
        self._adapted = [] if full else [(*place, LoraLinear(place[-1])) for place in adapted(self.model)]
        self._norm = self.model.model.norm

    def _adapt(self) -> None:
        add_adapter(self.model, CONFIG)
        generator = torch.Generator(self.device).manual_seed(0)
        for parameter in self.trained().values():
            parameter.data = parameter.data.to(self.dtype)
            # What A and B add is then about a quarter of what the projection gives.
            parameter.data.normal_(0, 0.5 * parameter.shape[1] ** -0.5, generator=generator)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def dress(self, row: Row) -> None:
        """Give the model the parts that `row` names."""
        if row.compiled:
            # Layers of another row share code with these, and its recompilations would count here.
            torch.compiler.reset()
        norms = {"stock": lambda norm: norm, "ours": fused.RMSNorm, "liger": LigerNorm}
        mlps = {"stock": lambda mlp: mlp, "ours": fused.GatedMLP, "liger": LigerMLP}
        attend = {"stock": lambda stock: stock, "ours": fused.PackedAttention}[row.attention]
        # In the stock modules, from which the others take their projections.
        for parent, name, peft, ours in self._adapted:
            setattr(parent, name, ours if row.adapter == "ours" else peft)
        for layer, stock in zip(self.model.model.layers, self._stock, strict=True):
            layer.self_attn, layer.mlp = attend(stock["self_attn"]), mlps[row.mlp](stock["mlp"])
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(layer, name, norms[row.norm](stock[name]))
            # None calls the layer itself again, as before nn.Module.compile.
            layer._compiled_call_impl = None
            if row.compiled:
                layer.compile()
        self.model.model.norm = norms[row.norm](self._norm)
        self.model.config._attn_implementation = "sdpa" if row.batches.startswith("padded") else attention.NAME

    def loss(self, row: Row, batch: dict) -> torch.Tensor:
        """Summed loss of a batch, without DeepSpeed."""
        if not row.batches.startswith("padded"):
            return packed_loss(self.model, batch)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        hidden, labels = self.model.model(**inputs, use_cache=False).last_hidden_state, batch["labels"]
        if not row.all_logits:
            return target_losses(hidden.flatten(0, 1), labels.flatten(), (self.model.lm_head.weight,))[0]
        logits = self.model.lm_head(hidden).float()
        # transformers moves the labels instead of copying the logits.
        labels = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


class LigerNorm(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, self.weight, self.eps)


class LigerMLP(fused.GatedMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


@contextlib.contextmanager
def recomputing(model: Model, kind: str) -> Iterator[None]:
    """Activations are computed again in the backward pass, as `kind` says: none, selective or layers."""
    if kind != "none":
        recompute_activations(model.model, kind == "selective")
    try:
        yield
    finally:
        # The name before transformers 5.2x is the second one.
        getattr(model.model, "activation_checkpointing_disable", model.model.gradient_checkpointing_disable)()


@contextlib.contextmanager
def torch_step(model: Model, row: Row, batches: list[dict], targets: int) -> Iterator[Step]:
    """The optimizer step of `batches` in plain torch; its loss is divided by `targets`."""
    trained = model.trained()
    optimizer = torch.optim.AdamW(trained.values(), lr=CONFIG.lr, weight_decay=CONFIG.weight_decay, fused=True)

    def step(gradients: dict | None = None) -> float:
        total = 0.0
        for batch in batches:
            loss = model.loss(row, batch)
            (loss / targets).backward()
            total = total + loss.detach()
        if gradients is not None:
            gradients |= {name: p.grad.to("cpu", copy=True) for name, p in trained.items()}
        nn.utils.clip_grad_norm_(trained.values(), CONFIG.clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(total) / targets

    try:
        yield step
    finally:
        optimizer.zero_grad()


@contextlib.contextmanager
def engine_step(model: Model, row: Row, batches: list[dict], targets: int) -> Iterator[Step]:
    """The same through the engine that `medmax train` builds."""
    from deepspeed.utils import safe_get_full_grad

    packed = PackedModel(model.model, model.layout).train()
    config = replace(CONFIG, packs_per_step=len(batches), recompute=row.recompute)
    engine = ds.build_engine(packed, config, model.device, model.dtype, 1)

    def step(gradients: dict | None = None) -> float:
        total = 0.0
        for micro, batch in enumerate(batches):
            loss = engine(batch)[0]
            engine.backward(loss / targets, scale_wrt_gas=False)
            total = total + loss.detach()
            if micro + 1 < len(batches):
                engine.step()
        if gradients is not None:
            whole = {name: safe_get_full_grad(p) for name, p in model.trained().items()}
            gradients |= {name: grad.to("cpu", copy=True) for name, grad in whole.items()}
        ds.optimizer_step(engine)
        return float(total) / targets

    try:
        yield step
    finally:
        engine.destroy()
        model.model.zero_grad()
