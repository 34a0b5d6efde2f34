"""The VQGAN as it runs on a GPU, in the interpreter where there is none: sums left to the norms that read them."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from medmax_fast.kernels import group_norm
from medmax_fast.kernels.sums import Sum, sum_ref
from medmax_fast.model.arithmetic import repeatable
from medmax_fast.model.vqgan import AttnBlock, Decoder, Downsample, Encoder, ResBlock
from medmax_fast.model.vqgan_config import VQConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
overflow = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
pytestmark = [pytest.mark.gpu(required=False), pytest.mark.usefixtures("bf16_to_nearest"), overflow]
# A shortcut at the second level; attention after every block; two blocks a level; no block but the middle's.
CONFIGS = {
    "small": VQConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=16, resolution=32),
    "attention": VQConfig(
        ch=32, ch_mult=(1, 2), num_res_blocks=2, z_channels=8, resolution=32, attn_resolutions=(32, 16)
    ),
    "empty": VQConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=0, z_channels=8, resolution=32),
}
# Of the largest value; on a GPU the two layouts have other convolutions.
CLOSE = 3e-6 if DEVICE == "cpu" else 3e-5
HALVES = {"encoder": Encoder, "decoder": Decoder}


def made(half, config, seed=0):
    """A network with random weights, norms' too, and (batch, height, width) -> random input."""
    generator = torch.Generator().manual_seed(seed)
    network = HALVES[half](config).requires_grad_(False).eval()
    for parameter in network.parameters():
        bound = (parameter[0].numel() if parameter.ndim > 1 else 4) ** -0.5
        parameter.uniform_(-bound, bound, generator=generator)
    channels = config.in_channels if half == "encoder" else config.z_channels
    return network.to(
        DEVICE
    ), lambda *size: torch.rand(size[0], channels, *size[1:], generator=generator).to(DEVICE) * 2 - 1


def in_dtype(network, dtype):
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.to(dtype)
    return network


@torch.no_grad()
def plain(network, x):
    """With torch's own operations, channels first."""
    with repeatable(x.device):
        return network.to(memory_format=torch.contiguous_format)(x.contiguous())


@contextmanager
def kernels_taken():
    """As on a GPU: "auto" takes the kernels; and nothing may fall back to torch."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(group_norm, "use_triton", lambda impl, tensor: True)
        for name in ("group_norm_silu_ref", "sum_ref"):
            patch.setattr(group_norm, name, lambda *_: pytest.fail("torch instead of a kernel"))
        yield


@torch.no_grad()
def fused(network, x):
    x = x if isinstance(x, Sum) else x.contiguous(memory_format=torch.channels_last)
    with repeatable(torch.device(DEVICE)), kernels_taken():
        return network.to(memory_format=torch.channels_last)(x)


@pytest.mark.parametrize("size", [(1, 32, 32), (3, 23, 14)], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("half", HALVES)
def test_equals_torch_s_own_operations(half, config, size, poisoned):
    network, draw = made(half, CONFIGS[config])
    if half == "decoder":
        size = (size[0], size[1] // 4, size[2] // 3)
    x = draw(*size)
    expected, found = plain(network, x), fused(network, x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("half", HALVES)
def test_sixteen_bits_are_as_good_as_torch_s(half, dtype, poisoned):
    network, draw = made(half, CONFIGS["attention"], seed=1)
    x = draw(2, 9, 7).to(dtype)
    in_dtype(network, dtype)
    own, found = plain(network, x), fused(network, x)
    # The same rounded weights, all else in fp32.
    exact = plain(network.float(), x.float())
    assert found.dtype == dtype
    away, own_away = ((y.float() - exact).norm() for y in (found, own))
    # Sums are rounded once, where torch rounds after each addition; which rounding hits whom is luck.
    assert 0 < away < 1.3 * own_away, (away.item(), own_away.item())


def test_fresh_values(fresh_seed, poisoned):
    network, draw = made("encoder", CONFIGS["small"], fresh_seed)
    generator = torch.Generator().manual_seed(fresh_seed)
    batch, *sides = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 4), (9, 40), (9, 40)))
    x = draw(batch, *sides)
    expected = plain(network, x)
    torch.testing.assert_close(fused(network, x), expected, rtol=0, atol=3 * CLOSE * expected.abs().max().item())


@pytest.mark.parametrize("sides", [(8, 8), (9, 8), (6, 13), (11, 5), (2, 3)], ids=str)
def test_windows_of_a_strided_convolution(sides):
    generator = torch.Generator().manual_seed(0)
    layer = Downsample(32).requires_grad_(False).to(DEVICE)
    # Small integers: every order of summation is exact.
    for tensor in (layer.conv.weight, layer.conv.bias):
        tensor.copy_(torch.randint(-3, 4, tensor.shape, generator=generator))
    x = torch.randint(-3, 4, (2, 32, *sides), generator=generator).float().to(DEVICE)
    expected = plain(layer, x)
    left = fused(layer, Sum(x.contiguous(memory_format=torch.channels_last)))
    assert isinstance(left, Sum) and left.residual_BCHW is None and left.shift is layer.conv.bias
    assert expected.shape == (2, 32, sides[0] // 2, sides[1] // 2)
    assert torch.equal(sum_ref(left), expected)


def test_a_picture_does_not_depend_on_its_batch():
    network, draw = made("encoder", CONFIGS["small"])
    x = draw(3, 17, 12)
    together = fused(network, x)
    for i in range(3):
        torch.testing.assert_close(fused(network, x[i : i + 1])[0], together[i], rtol=0, atol=CLOSE)


def test_the_input_is_left_as_it_was():
    # Sums are written over what convolutions made, and over nothing else.
    for half in HALVES:
        network, draw = made(half, CONFIGS["attention"])
        x = draw(2, 8, 6).contiguous(memory_format=torch.channels_last)
        before, weights = x.clone(), {name: tensor.clone() for name, tensor in network.state_dict().items()}
        fused(network, x)
        assert torch.equal(x, before)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    "block", [ResBlock(32, 32), ResBlock(32, 64), AttnBlock(32)], ids=["same", "wider", "attention"]
)
def test_a_block_of_a_picture_leaves_the_picture(block):
    # To which nothing is added, and which is the block's residual.
    block = block.requires_grad_(False).to(DEVICE)
    x = torch.randn(2, 32, 7, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    before, expected = x.clone(), plain(block, x)
    found = fused(block, Sum(x))
    with kernels_taken():
        total = group_norm.add_up_(found)
    assert torch.equal(x, before)
    torch.testing.assert_close(total, expected, rtol=0, atol=CLOSE * expected.abs().max().item())


class Passes(TorchDispatchMode):
    """Which operations make or change a tensor of at least so many values, outside of kernels and of attention."""

    def __init__(self, size, patch):
        super().__init__()
        self.size, self.names, self.biased, self.inside = size, [], [], False
        for name in ("_group_statistics_kernel", "_group_norm_kernel"):
            patch.setattr(group_norm, name, Launched(self, name, getattr(group_norm, name)))
        patch.setattr(F, "scaled_dot_product_attention", self.aside(F.scaled_dot_product_attention))

    def aside(self, function):
        """The function, whose own operations are not noted."""

        def call(*arguments, **settings):
            self.inside = True
            made = function(*arguments, **settings)
            self.inside = False
            return made

        return call

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        if not self.inside and isinstance(made, torch.Tensor) and made.numel() >= self.size:
            self.names.append(function.overloadpacket.__name__)
            if function is torch.ops.aten.convolution.default and arguments[2] is not None:
                self.biased.append(arguments[1])
        return made


class Launched:
    """A kernel whose launches are noted; what the interpreter does with tensors is not."""

    def __init__(self, passes, name, kernel):
        self.passes, self.name, self.kernel = passes, name, kernel

    def __getitem__(self, grid):
        self.passes.names.append(self.name)
        return self.passes.aside(self.kernel[grid])


# What passes over values, and what only names memory.
MADE = {"convolution", "upsample_nearest2d", "_group_statistics_kernel", "_group_norm_kernel"}
VIEWS = {"empty_like", "slice", "select", "view", "transpose", "unsqueeze", "detach"}


@pytest.mark.parametrize("half", HALVES)
def test_nothing_but_convolutions_and_kernels_passes_over_activations(half, monkeypatch):
    config = CONFIGS["attention"]
    network, draw = made(half, config)
    x = draw(1, 16, 16)
    # Of the coarsest level, where an activation is smallest.
    smallest = 64 * 8 * 8 if half == "encoder" else 64 * 16 * 16
    with Passes(smallest, monkeypatch) as passes:
        plain(network, x)
    blocks = sum(isinstance(module, ResBlock | AttnBlock) for module in network.modules())
    # The guard: torch's path has an addition for each, and its padding.
    assert passes.names.count("add") == blocks
    assert passes.names.count("constant_pad_nd") == (len(config.ch_mult) - 1 if half == "encoder" else 0)
    network.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    with Passes(smallest, monkeypatch) as passes:
        fused(network, x)
    assert set(passes.names) - VIEWS == MADE - ({"upsample_nearest2d"} if half == "encoder" else set())
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in network.modules())
    resized = len(config.ch_mult) - 1
    assert passes.names.count("_group_norm_kernel") == norms
    assert passes.names.count("_group_statistics_kernel") == norms + resized
    # Left with their bias: queries, keys and values, and what the network returns.
    heads = [m for m in network.modules() if isinstance(m, AttnBlock)]
    kept = {id(conv.weight) for m in heads for conv in (m.q, m.k, m.v)} | {id(network.conv_out.weight)}
    assert {id(weight) for weight in passes.biased} <= kept


@pytest.mark.parametrize("half", HALVES)
def test_with_gradients_all_is_torch(half, monkeypatch):
    network, draw = made(half, CONFIGS["small"])
    x = draw(1, 8, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    network.to(memory_format=torch.channels_last)
    monkeypatch.setattr(group_norm, "use_triton", lambda impl, tensor: True)
    monkeypatch.setattr(group_norm, "_sum_triton", lambda *_: pytest.fail("a kernel without a gradient"))
    # torch 2.13 crashes on a CPU when of a channels-last GroupNorm only the input wants a gradient.
    network.requires_grad_()
    network(x).square().sum().backward()
    assert x.grad.abs().max() > 0 and network.conv_in.bias.grad.abs().max() > 0


def test_what_is_not_channels_last_is_torch():
    network, draw = made("encoder", CONFIGS["small"])
    x = draw(2, 9, 8)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        expected = network(x)
        patch.setattr(group_norm, "use_triton", lambda impl, tensor: True)
        patch.setattr(group_norm, "_sum_triton", lambda *_: pytest.fail("a kernel for planes"))
        assert torch.equal(network(x), expected)


def test_pixels_of_a_pad_are_zero_not_the_bias():
    # A convolution pads the picture, which has its bias by then.
    layer = Downsample(32).requires_grad_(False).to(DEVICE)
    x = torch.randn(1, 32, 6, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    bias = torch.full((32,), 100.0, device=DEVICE)
    expected = F.conv2d(F.pad(x + bias[:, None, None], (0, 1, 0, 1)), layer.conv.weight, layer.conv.bias, stride=2)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), repeatable(x.device), kernels_taken():
        found = group_norm.add_up_(layer(Sum(x, bias)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
