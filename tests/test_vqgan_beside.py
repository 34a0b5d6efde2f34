"""Hugging Face folders without a picture decoder, and a vqgan.ckpt that makes up for it: given, or put beside."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from medmax_fast.cli import main
from medmax_fast.generate.engine import Engine
from medmax_fast.model.checkpoint import DECODER_FILE, VQ_PREFIX, VQGAN_FILE, open_checkpoint
from medmax_fast.model.image_tokenizer import ImageTokenizer
from medmax_fast.runtime import InputError


@pytest.fixture(scope="module")
def without(hf, tmp_path_factory):
    """As stock folders are: no decoder."""
    folder = shutil.copytree(hf, tmp_path_factory.mktemp("vqgan") / "without")
    (folder / DECODER_FILE).unlink()
    return folder


@pytest.fixture(scope="module")
def rounded(without):
    """As folders saved in 16 bits are: the encoder rounded, which makes other codes."""
    folder = shutil.copytree(without, without.with_name("rounded"))
    weights = load_file(folder / "model.safetensors")
    changed = {n: t.bfloat16() if n.startswith(VQ_PREFIX) else t for n, t in weights.items()}
    assert any(not torch.equal(changed[n].float(), weights[n].float()) for n in weights)
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def vqgan(golden):
    return golden / "checkpoint" / "tokenizer" / VQGAN_FILE


@pytest.fixture(scope="module")
def codes():
    return np.random.default_rng(0).integers(0, 8192, (1, 1024))


@pytest.fixture(scope="module")
def pixels(golden, codes):
    """What the original checkpoint draws."""
    return ImageTokenizer.from_checkpoint(golden / "checkpoint").decode(codes)


def state_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_no_decoder_no_picture(without, codes):
    tokenizer = ImageTokenizer.from_checkpoint(without)
    with pytest.raises(InputError, match="no VQGAN decoder.*--vqgan"):
        tokenizer.decode(codes)


@pytest.mark.parametrize("folder", ["hf", "without", "rounded"])
def test_vqgan_given_draws_as_the_original(request, golden, vqgan, codes, pixels, folder):
    checkpoint = open_checkpoint(request.getfixturevalue(folder), vqgan)
    tokenizer = ImageTokenizer.from_checkpoint(checkpoint)
    assert np.array_equal(tokenizer.decode(codes), pixels)
    assert tokenizer.sha256 == ImageTokenizer.from_checkpoint(golden / "checkpoint").sha256


def test_rounded_copy_is_not_taken_for_the_original(golden, rounded):
    found = ImageTokenizer.from_checkpoint(rounded).sha256
    assert found != ImageTokenizer.from_checkpoint(golden / "checkpoint").sha256


def test_vqgan_beside_is_found(rounded, vqgan, codes, pixels, tmp_path):
    folder = shutil.copytree(rounded, tmp_path / "hf")
    shutil.copyfile(vqgan, folder / VQGAN_FILE)
    assert np.array_equal(ImageTokenizer.from_checkpoint(folder).decode(codes), pixels)
    # What is given comes before what lies there.
    (folder / VQGAN_FILE).write_bytes(b"nothing")
    assert np.array_equal(ImageTokenizer.from_checkpoint(open_checkpoint(folder, vqgan)).decode(codes), pixels)
    with pytest.raises(InputError, match=f"{VQGAN_FILE}: cannot be read"):
        ImageTokenizer.from_checkpoint(folder)


def test_a_checkpoint_without_a_decoder_draws_nothing(without, capsys):
    assert main(["generate", "--ckpt", str(without), "--mode", "image", "--prompt", "A slide."]) == 2
    assert "no VQGAN decoder, so it cannot draw; --vqgan gives it one" in capsys.readouterr().err


def test_decode_command(without, vqgan, codes, pixels, tmp_path, capsys):
    table = pa.table({"img_path": ["a.png"], "img_tokens": [codes[0].tolist()]})
    pq.write_table(table, tmp_path / "codes.parquet")
    command = ["decode", "--ckpt", str(without), "--input", str(tmp_path / "codes.parquet")]
    assert main([*command, "--output", str(tmp_path / "none")]) == 2
    assert "no VQGAN decoder, so it cannot draw; --vqgan" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert main([*command, "--output", str(tmp_path / "drawn"), "--vqgan", str(vqgan)]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "drawn" / "a.png")), pixels[0])


def test_generation_draws_with_it(without, vqgan, codes, pixels):
    engine = Engine.from_checkpoint(open_checkpoint(without, vqgan), "cpu", "fp32")
    assert np.array_equal(engine.decode_images(codes[:1])[0], pixels[0])


@pytest.mark.parametrize("folder", ["without", "rounded"])
@pytest.mark.parametrize("to", ["chameleon", "hf"])
def test_convert_makes_it_whole_again(request, golden, vqgan, tmp_path, folder, to):
    source, output = request.getfixturevalue(folder), tmp_path / "out"
    command = ["convert", "--input", str(source), "--output", str(output), "--to", to, "--vqgan", str(vqgan)]
    assert main(command) == 0
    expected = state_of(vqgan)
    found = state_of(output / "tokenizer" / VQGAN_FILE) if to == "chameleon" else open_checkpoint(output).vqgan_state()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert open_checkpoint(output).sha256() == open_checkpoint(golden / "checkpoint").sha256()


def test_convert_without_it_says_so(without, tmp_path, capsys):
    command = ["convert", "--input", str(without), "--output", str(tmp_path / "out"), "--to", "chameleon"]
    assert main(command) == 0
    assert "no picture decoder, so the result cannot draw; --vqgan" in capsys.readouterr().err
    found = state_of(tmp_path / "out" / "tokenizer" / VQGAN_FILE)
    assert found and not any(name.startswith("decoder.") for name in found)


ANOTHER = {"codebook": "quantize.embedding.weight", "encoder": "encoder.mid.block_1.conv1.weight"}


@pytest.mark.parametrize("part", ANOTHER)
@pytest.mark.parametrize("folder", ["without", "rounded", "golden_checkpoint"])
def test_another_vqgan_is_refused_by_name(request, vqgan, tmp_path, capsys, part, folder):
    state = state_of(vqgan)
    # Three units in bf16's last place, which rounding does not hide.
    state[ANOTHER[part]].view(-1)[-1] *= 1 + 3 / 128
    torch.save({"state_dict": state}, tmp_path / "other.ckpt")
    source = str(request.getfixturevalue(folder))
    # Making the folder may have said something.
    capsys.readouterr()
    command = ["convert", "--input", source, "--output", str(tmp_path / "out"), "--to", "chameleon"]
    assert main([*command, "--vqgan", str(tmp_path / "other.ckpt")]) == 2
    error = capsys.readouterr().err
    assert f"other.ckpt: {ANOTHER[part]} differs from that of {source}" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main([*command, "--vqgan", str(tmp_path / "none.ckpt")]) == 2
    assert "none.ckpt: no such file" in capsys.readouterr().err


def damage(kind, state):
    if kind == "decoder alone":
        return {name: tensor for name, tensor in state.items() if name.startswith("decoder.")}
    if kind == "tensor missing":
        return {name: tensor for name, tensor in state.items() if name != "decoder.conv_in.weight"}
    return state | {"decoder.conv_in.weight": torch.ones(3)}


@pytest.mark.parametrize("kind", ["decoder alone", "tensor missing", "misshaped"])
def test_incomplete_vqgan_is_refused(without, vqgan, tmp_path, kind):
    torch.save({"state_dict": damage(kind, state_of(vqgan))}, tmp_path / "part.ckpt")
    command = ["convert", "--input", str(without), "--output", str(tmp_path / "out"), "--to", "chameleon"]
    assert main([*command, "--vqgan", str(tmp_path / "part.ckpt")]) == 2


def test_channels_last_vqgan_keeps_its_values(without, vqgan, tmp_path):
    state = state_of(vqgan)
    last = {n: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for n, t in state.items()}
    torch.save({"state_dict": last}, tmp_path / "last.ckpt")
    command = ["convert", "--input", str(without), "--output", str(tmp_path / "out"), "--to", "chameleon"]
    assert main([*command, "--vqgan", str(tmp_path / "last.ckpt")]) == 0
    found = state_of(tmp_path / "out" / "tokenizer" / VQGAN_FILE)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
