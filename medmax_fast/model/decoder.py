"""The language model as generation runs it: packed ids in, last hidden states out, few and large operations.

Weights come straight from the checkpoint, one tensor at a time, without transformers. Query, key and value projections
lie in one matrix, gate and up in another, so that a layer is four products with the fused operations of kernels/
between them. Where keys and values are kept, and what a position attends to, is the caller's (`attend`). Over several
ranks each holds its share of heads and of the MLP's width (Megatron's split: two sums over ranks a layer); embeddings,
norms and the head are whole on each.

Shapes: T ids, C model width, K width of a query, key and value together, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import distributed, nn

from medmax_fast.kernels.rms_norm import add_rms_norm_, rms_norm
from medmax_fast.kernels.swiglu import swiglu
from medmax_fast.model.checkpoint import Checkpoint
from medmax_fast.model.layout import MAX_POSITIONS, Key, ModelShape
from medmax_fast.runtime import InputError

# transformers' ChameleonLayerNorm, and Meta's code, normalise queries and keys with this one.
QK_NORM_EPS = 1e-5
# Where the tensors of a layer go: module, rows before them (of the same module), axis that ranks split.
_HOMES = {
    "self_attn.q_proj": ("qkv", (), 0),
    "self_attn.k_proj": ("qkv", ("dim",), 0),
    "self_attn.v_proj": ("qkv", ("dim", "kv_dim"), 0),
    "self_attn.o_proj": ("out", (), 1),
    "mlp.gate_proj": ("gate_up", (), 0),
    "mlp.up_proj": ("gate_up", ("hidden",), 0),
    "mlp.down_proj": ("down", (), 1),
}
QUANTIZATIONS = ("none", "int8", "fp8")


class Layer(nn.Module):
    """One layer's weights on one of `world` ranks; `heads` and `kv_heads` are this rank's."""

    def __init__(self, shape: ModelShape, world: int, device, dtype: torch.dtype):
        super().__init__()
        self.heads, self.kv_heads = shape.heads // world, shape.kv_heads // world

        def linear(rows: int, columns: int) -> nn.Linear:
            return nn.utils.skip_init(nn.Linear, columns, rows, bias=False, device=device, dtype=dtype)

        def vector(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*size, device=device, dtype=dtype), requires_grad=False)

        self.qkv = linear((shape.dim + 2 * shape.kv_dim) // world, shape.dim)
        self.out = linear(shape.dim, shape.dim // world)
        self.gate_up = linear(2 * shape.hidden // world, shape.dim)
        self.down = linear(shape.dim, shape.hidden // world)
        self.input_layernorm, self.post_attention_layernorm = vector(shape.dim), vector(shape.dim)
        self.q_weight, self.q_bias = (vector(self.heads, shape.head_dim) for _ in range(2))
        self.k_weight, self.k_bias = (vector(self.kv_heads, shape.head_dim) for _ in range(2))

    def mlp(self, x_TC: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x_TC).chunk(2, -1)
        return self.down(swiglu(gate, up))


# attend(index, layer, qkv [T, K]) -> [T, heads * head_dim]
Attend = Callable[[int, Layer, torch.Tensor], torch.Tensor]


class Decoder(nn.Module):
    """A checkpoint's language model on one device, or this rank's part of it; inference only."""

    def __init__(self, shape: ModelShape, device, dtype: torch.dtype, group=None):
        super().__init__()
        self.shape, self.dtype, self.device, self.group = shape, dtype, torch.device(device), group
        self.rank = distributed.get_rank(group) if group else 0
        self.world = distributed.get_world_size(group) if group else 1
        for name in ("heads", "kv_heads", "hidden"):
            if getattr(shape, name) % self.world:
                raise InputError(f"{self.world} ranks cannot share the model's {getattr(shape, name)} {name} evenly")
        self.embedding = torch.empty(shape.vocab_size, shape.dim, device=device, dtype=dtype)
        self.head = torch.empty_like(self.embedding)
        self.norm = torch.empty(shape.dim, device=device, dtype=dtype)
        self.layers = nn.ModuleList(Layer(shape, self.world, device, dtype) for _ in range(shape.layers))
        self.cos_PF, self.sin_PF = rotary_tables(shape, self.device)

    @classmethod
    def load(cls, checkpoint: Checkpoint, device, dtype: torch.dtype, group=None, quantize: str = "none") -> "Decoder":
        """The checkpoint's weights; InputError names a tensor that is missing, unexpected, mis-shaped or not finite.

        group: the process group that shares the layers. quantize: weights of the layers' products in 8 bits, by
        torchao; activations stay in dtype.
        """
        if quantize not in QUANTIZATIONS:
            raise InputError(f"--quantize {quantize}: expected {', '.join(QUANTIZATIONS)}")
        checkpoint.check_names()
        model = cls(checkpoint.shape, device, dtype, group)
        model.requires_grad_(False)
        bounds = []
        for key in checkpoint.stream("loading"):
            target, part = model._home(key), checkpoint.tensor(key.hf)
            target.copy_(model._share(key, part))
            bounds.append((key.hf, torch.stack(target.aminmax())))
        # One question to the device for all tensors.
        finite = torch.stack([pair for _, pair in bounds]).isfinite().all(1).tolist()
        if not all(finite):
            raise InputError(
                f"{checkpoint.path}: tensor {bounds[finite.index(False)][0]} holds NaN or infinity in {dtype}"
            )
        if quantize != "none":
            _quantize(model.layers, quantize)
        return model.eval()

    def _home(self, key: Key) -> torch.Tensor:
        """Where a tensor's part goes, a view of this rank's weights."""
        if not key.hf.startswith("model.layers."):
            names = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm", "lm_head.weight": "head"}
            return getattr(self, names[key.hf])
        _, _, number, name = key.hf.split(".", 3)
        layer, (module, _, kind) = self.layers[int(number)], name.rpartition(".")
        if key.kind == "qk_norm":
            return getattr(layer, f"{module[len('self_attn.')]}_{kind}")
        if module not in _HOMES:
            return getattr(layer, module)
        target, before, axis = _HOMES[module]
        weight = getattr(layer, target).weight
        if axis == 1:
            return weight
        start = sum(getattr(self.shape, field) for field in before) // self.world
        return weight[start : start + getattr(self.shape, key.rows) // self.world]

    def _share(self, key: Key, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor."""
        if key.kind == "qk_norm":
            return tensor.chunk(self.world)[self.rank]
        split = _HOMES.get(key.hf.removesuffix(".weight").split(".", 3)[-1])
        return tensor.chunk(self.world, split[2])[self.rank] if split else tensor

    def forward(self, ids_T: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Normalised last hidden states [T, C] of ids int64 [T]."""
        x = self.embedding[ids_T]
        run = self._swin_layers if self.shape.swin_norm else self._layers
        return run(x, attend)

    def _layers(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        eps, delta = self.shape.norm_eps, None
        for i, layer in enumerate(self.layers):
            if delta is None:
                y = rms_norm(x, layer.input_layernorm, eps)
            else:
                y = add_rms_norm_(x, delta, layer.input_layernorm, eps)
            delta = self._summed(layer.out(attend(i, layer, layer.qkv(y))))
            y = add_rms_norm_(x, delta, layer.post_attention_layernorm, eps)
            delta = self._summed(layer.mlp(y))
        return add_rms_norm_(x, delta, self.norm, eps)

    def _swin_layers(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        # Norms come after attention and MLP, as in the 30B model.
        eps = self.shape.norm_eps
        for i, layer in enumerate(self.layers):
            delta = self._summed(layer.out(attend(i, layer, layer.qkv(x))))
            x = x + rms_norm(delta, layer.input_layernorm, eps)
            x = x + rms_norm(self._summed(layer.mlp(x)), layer.post_attention_layernorm, eps)
        return rms_norm(x, self.norm, eps)

    def _summed(self, x_TC: torch.Tensor) -> torch.Tensor:
        if self.world > 1:
            distributed.all_reduce(x_TC, group=self.group)
        return x_TC

    def least(self, value: int) -> int:
        """The smallest of the ranks' values."""
        if self.world == 1:
            return value
        values = torch.tensor([value], device=self.device)
        distributed.all_reduce(values, distributed.ReduceOp.MIN, group=self.group)
        return int(values)

    def step_bytes(self) -> int:
        """Bytes of weights that one decode step of text reads: everything but the embeddings."""
        return sum(_nbytes(weight) for weight in (*self.layers.parameters(), self.head, self.norm))


def rotary_tables(shape: ModelShape, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 [positions, head_dim / 2], as transformers computes them (Su et al. 2021)."""
    D = shape.head_dim
    frequency = 1.0 / shape.rope_theta ** (torch.arange(0, D, 2, dtype=torch.int64).float() / D)
    angle = torch.arange(MAX_POSITIONS).float()[:, None] * frequency
    return angle.cos().to(device), angle.sin().to(device)


def _nbytes(weight: torch.Tensor) -> int:
    """Bytes held, of a quantized weight too, which is several tensors."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    parts = (getattr(weight, name) for name in weight.__tensor_flatten__()[0])
    return sum(_nbytes(part) for part in parts if part is not None)


def _quantize(layers: nn.Module, kind: str) -> None:
    """Weights of all linear modules in 8 bits, in place."""
    try:
        from torchao import quantization as ao
    except ImportError as error:
        raise InputError(f"--quantize needs torchao ({error}): pip install 'medmax_fast[quant]'") from error
    config = ao.Int8WeightOnlyConfig() if kind == "int8" else ao.Float8WeightOnlyConfig()
    ao.quantize_(layers, config)
