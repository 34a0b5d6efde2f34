"""Writing a checkpoint in either layout, from an open one; `medmax convert` is that and nothing else.

Tensors are taken one by one from the memory-mapped source, optionally replaced (a merged adapter, trained weights),
and put in the order of the target layout. The result is written under a temporary name and renamed.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from medmax_fast.config import ConvertConfig
from medmax_fast.model.checkpoint import DECODER_FILE, VQ_PREFIX, Checkpoint, open_checkpoint
from medmax_fast.model.layout import interleave, keys
from medmax_fast.model.load import hf_config
from medmax_fast.model.vqgan import VQGAN
from medmax_fast.runtime import InputError, atomic_path, hash_file, progress, require_new
from medmax_fast.vocab import PLACEHOLDER_NAMES

# transformers' own limit for one safetensors file.
SHARD_BYTES = 5 * 10**9

Transform = Callable[[str, torch.Tensor], torch.Tensor]


def convert(config: ConvertConfig) -> dict:
    """Convert a checkpoint to the other layout (or copy it to the same one); returns a summary."""
    source = open_checkpoint(config.input)
    source.verify()
    write_checkpoint(source, config.output, config.to, average_qk_norm=config.average_qk_norm)
    return {"input": config.input, "layout": source.layout, "output": config.output, "to": config.to}


def write_checkpoint(
    source: Checkpoint,
    output: str | Path,
    layout: str,
    transform: Transform | None = None,
    average_qk_norm: bool = False,
) -> None:
    """Write `source` to a new folder in `layout` ("hf" or "chameleon").

    transform(name, tensor): gives the tensor to write in place of the one read, both in Hugging Face names and
    order. InputError if query/key norms differ between heads, which the Chameleon layout cannot hold, unless
    `average_qk_norm`.
    """
    require_new(output)
    transform = transform or (lambda _, tensor: tensor)
    with atomic_path(output) as folder:
        folder.mkdir()
        if layout == "hf":
            _write_hf(source, folder, transform)
        else:
            _write_chameleon(source, folder, transform, average_qk_norm)


def _write_chameleon(source: Checkpoint, folder: Path, transform: Transform, average: bool) -> None:
    model, tokenizer = folder / "models" / "7b", folder / "tokenizer"
    model.mkdir(parents=True)
    tokenizer.mkdir()
    # The published files carry an empty entry for the rotary frequencies.
    state: dict[str, torch.Tensor | None] = {}
    for key in progress(keys(source.shape.layers), "writing tensors"):
        tensor = transform(key.hf, source.tensor(key.hf))
        if key.kind == "rotary":
            tensor = interleave(tensor, source.shape.head_dim)
        elif key.kind == "qk_norm":
            tensor = interleave(_shared_by_heads(key.hf, tensor, average))
        state[key.chameleon] = tensor.contiguous().clone()
        if key.chameleon == "output.weight":
            state["rope.freqs"] = None
    torch.save(state, model / "consolidated.pth")
    _write_json(model / "params.json", source.params)
    _write_json(model / "consolidate_params.json", {"model_parallel_size": 1})
    write_checklist(model)
    vqgan = source.vqgan_state()
    with torch.device("meta"):
        order = list(VQGAN(source.vq_config).state_dict())
    vqgan = {name: vqgan[name].contiguous().clone() for name in sorted(vqgan, key=_position(order))}
    torch.save({"state_dict": vqgan}, tokenizer / "vqgan.ckpt")
    (tokenizer / "vqgan.yaml").write_text(yaml.safe_dump(source.vq_config.to_yaml()))
    for name, spelling in zip(("text_tokenizer.json", "text_tokenizer_modified.json"), PLACEHOLDER_NAMES, strict=True):
        _write_json(tokenizer / name, _spell_placeholder(source.tokenizer_path, spelling))
    write_checklist(tokenizer)


def _position(order: list[str]) -> Callable[[str], int]:
    places = {name: i for i, name in enumerate(order)}
    return lambda name: places.get(name, len(order))


def _shared_by_heads(name: str, tensor: torch.Tensor, average: bool) -> torch.Tensor:
    first = tensor[0]
    if torch.equal(tensor, first.expand_as(tensor)):
        return first
    apart = (tensor.float() - first.float()).abs().max().item()
    if not average:
        raise InputError(
            f"{name}: heads differ by up to {apart:.3g}, and the Chameleon layout holds one vector for all; "
            "--average-qk-norm averages them (lossy)"
        )
    return tensor.float().mean(0).to(tensor.dtype)


def _write_hf(source: Checkpoint, folder: Path, transform: Transform) -> None:
    config = hf_config(source)
    config.architectures = ["ChameleonForConditionalGeneration"]
    vqgan = source.vqgan_state()
    names = list(source.names())
    config.dtype = source.tensor(names[0]).dtype
    config.save_pretrained(folder)
    decoder = {name: vqgan.pop(name).contiguous() for name in list(vqgan) if name.startswith("decoder.")}
    if decoder:
        save_file(decoder, folder / DECODER_FILE, metadata={"format": "pt"})
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map, written, size = {}, 0, 0

    def flush() -> None:
        # Named when all are known: transformers wants the total in every name.
        save_file(shards.pop(), folder / f"part-{written:05d}.safetensors", metadata={"format": "pt"})

    def tensors():
        for name in names:
            yield name, transform(name, source.tensor(name))
        for name, tensor in vqgan.items():
            yield VQ_PREFIX + name, tensor

    for name, tensor in progress(tensors(), "writing tensors", len(names) + len(vqgan)):
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and sum(t.numel() * t.element_size() for t in shards[-1].values()) + nbytes > SHARD_BYTES:
            flush()
            shards.append({})
            written += 1
        shards[-1][name] = tensor.contiguous()
        weight_map[name] = written
        size += nbytes
    flush()
    _name_shards(folder, written + 1, weight_map, size)
    _write_json(folder / "params.json", source.params)
    _write_hf_text_side(source, folder, config)


def _name_shards(folder: Path, count: int, weight_map: dict[str, int], size: int) -> None:
    if count == 1:
        (folder / "part-00000.safetensors").rename(folder / "model.safetensors")
        return
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, file in enumerate(files):
        (folder / f"part-{i:05d}.safetensors").rename(folder / file)
    index = {"metadata": {"total_size": size}, "weight_map": {name: files[i] for name, i in weight_map.items()}}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_hf_text_side(source: Checkpoint, folder: Path, config) -> None:
    from transformers import ChameleonImageProcessor, ChameleonProcessor, GenerationConfig, PreTrainedTokenizerFast

    spelled = folder / "tokenizer.json"
    _write_json(spelled, _spell_placeholder(source.tokenizer_path, "<image>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(spelled),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        sep_token="<reserved08706>",
        image_token="<image>",
        boi_token="<racm3:break>",
        eoi_token="<eoss>",
    )
    ChameleonProcessor(ChameleonImageProcessor(), tokenizer, image_token="<image>").save_pretrained(folder)
    # save_pretrained rewrites tokenizer.json in its own way; ours is the file that came in.
    _write_json(spelled, _spell_placeholder(source.tokenizer_path, "<image>"))
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)


def _spell_placeholder(path: Path, spelling: str) -> dict:
    """The tokenizer file with the image placeholder under the given one of its two names."""
    spec = json.loads(path.read_text(encoding="utf-8"))
    old = next(name for name in PLACEHOLDER_NAMES if name in spec["model"]["vocab"])
    spec["model"]["vocab"] = {spelling if k == old else k: v for k, v in spec["model"]["vocab"].items()}
    for token in spec["added_tokens"]:
        if token["content"] == old:
            token["content"] = spelling
    return spec


def write_checklist(folder: Path) -> None:
    """Record the md5 of every file of a folder in its checklist.chk, as the published checkpoints do."""
    lines = [f"{hash_file(f, 'md5')}  {f.name}\n" for f in sorted(folder.iterdir()) if f.name != "checklist.chk"]
    (folder / "checklist.chk").write_text("".join(lines))


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
