"""Writing a checkpoint in either layout, from an open one; `medmax convert` is that and nothing else.

Tensors pass through one at a time: a part of the mapped source is put in the order of the target layout, appended to
the target's files and let go, so memory is that of the largest tensor with what it is made of. Before anything is
written, names, heads and disk space are checked. The result is written under a temporary name and renamed.
"""

import contextlib
import json
import shutil
from pathlib import Path

import torch
import yaml

from medmax_fast.config import ConvertConfig, MergeConfig
from medmax_fast.files import atomic_path, require_new
from medmax_fast.model.checkpoint import DECODER_FILE, VQ_PREFIX, VQGAN_FILE, Checkpoint, open_checkpoint
from medmax_fast.model.file_writers import SafetensorsWriter, TorchWriter, write_checklist
from medmax_fast.model.layout import Disagreement, can_split, keys, to_chameleon
from medmax_fast.model.load import hf_config
from medmax_fast.model.vqgan import VQGAN
from medmax_fast.runtime import InputError, log, require_at_least
from medmax_fast.vocab import PLACEHOLDER_NAMES

# transformers' own limit for one safetensors file.
SHARD_BYTES = 5 * 10**9
# What the folder holds beside the weights, generously.
_OTHER_BYTES = 50 * 10**6


def convert(config: ConvertConfig) -> dict:
    """Convert a checkpoint to the other layout (or copy it to the same one); returns a summary."""
    check_target(config, config.to)
    source = open_checkpoint(config.input, config.vqgan)
    source.verify()
    write_checkpoint(source, config.output, config.to, config.shards, config.average_qk_norm)
    return {"input": config.input, "layout": source.layout, "output": config.output, "to": config.to}


def check_target(config: ConvertConfig | MergeConfig, layout: str) -> None:
    """InputError for an output that exists, or for shards that `layout` cannot have; before anything large is read."""
    require_at_least(config, 0, "shards")
    if config.shards and layout == "hf":
        raise InputError(f"--shards {config.shards}: only with --to chameleon; safetensors files hold 5 GB each")
    require_new(config.output)


def write_checkpoint(
    source: Checkpoint, output: str | Path, layout: str, shards: int = 0, average_qk_norm: bool = False
) -> None:
    """Write `source` to a new folder in `layout` ("hf" or "chameleon").

    shards: files of the Chameleon layout (0: as many as the source had before it was converted). InputError if heads
    that share a norm in the Chameleon layout do not agree on it, unless `average_qk_norm`; if the source lacks a
    tensor or has one too many; if the disk is too small.
    """
    require_new(output)
    source.check_names()
    vqgan = source.vqgan_state()
    if not any(name.startswith("decoder.") for name in vqgan):
        log(f"{source.path}: has no picture decoder, so the result cannot draw; --vqgan {VQGAN_FILE} gives it one")
    _check_space(source, Path(output), vqgan)
    if layout == "chameleon":
        shards = shards or source.params.get("model_parallel_size") or 1
        _check_heads(source, shards, average_qk_norm)
    with atomic_path(output) as folder:
        folder.mkdir()
        if layout == "hf":
            _write_hf(source, vqgan, folder)
        else:
            _write_chameleon(source, vqgan, folder, shards, average_qk_norm)


def _check_space(source: Checkpoint, output: Path, vqgan: dict[str, torch.Tensor]) -> None:
    needed = _OTHER_BYTES + sum(source.meta(name).nbytes for name in source.names())
    needed += sum(tensor.nbytes for tensor in vqgan.values())
    parent = next(p for p in output.absolute().parents if p.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"{output}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")


def _check_heads(source: Checkpoint, shards: int, average: bool) -> None:
    """InputError if not every shard's heads agree on their norms, saying by how much at most, and what would help."""
    if not can_split(source.shape, shards):
        heads = f"{source.shape.heads} heads and {source.shape.kv_heads} key/value heads"
        raise InputError(f"{source.path}: a model of {heads} cannot be cut into {shards} equal shards")
    apart = {} if average else _disagreements(source, shards)
    if not apart:
        return
    worst = max(apart, key=apart.__getitem__)
    differ = f"{source.path}: the heads of {len(apart)} query/key norms differ, by up to {apart[worst]:.3g} in {worst}"
    for more in (2, 4, 8):
        if more > shards and can_split(source.shape, more) and not _disagreements(source, more):
            raise InputError(f"{differ}, and agree in {more} groups as in the shards of Chameleon-30B: --shards {more}")
    raise InputError(f"{differ}; the Chameleon layout holds one vector for them, --average-qk-norm averages (lossy)")


def _disagreements(source: Checkpoint, shards: int) -> dict[str, float]:
    """By how much heads differ that would share a norm in so many shards, by the norm's name."""
    apart = {}
    for key in keys(source.shape.layers):
        if key.kind == "qk_norm":
            try:
                to_chameleon(key, source.tensor(key.hf), source.shape, shards)
            except Disagreement as error:
                apart[key.hf] = error.apart
    return apart


def _write_chameleon(
    source: Checkpoint, vqgan: dict[str, torch.Tensor], folder: Path, shards: int, average: bool
) -> None:
    # The published names; nothing reads the size from them.
    model, tokenizer = folder / "models" / ("7b" if shards == 1 else "30b"), folder / "tokenizer"
    model.mkdir(parents=True)
    tokenizer.mkdir()
    meta: dict[str, torch.Tensor | None] = {}
    for key in keys(source.shape.layers):
        meta[key.chameleon] = source.meta(key.hf).new_empty(key.part_size(source.shape, shards))
        if key.chameleon == "output.weight":
            # The published files carry an empty entry for the rotary frequencies.
            meta["rope.freqs"] = None
    names = ["consolidated.pth"] if shards == 1 else [f"consolidated.{i:02d}.pth" for i in range(shards)]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(TorchWriter(model / name, meta)) for name in names]
        for key in source.stream("writing tensors"):
            _write_parts(writers, to_chameleon(key, source.tensor(key.hf), source.shape, shards, average))
    same = source.params.get("model_parallel_size", 1) == shards
    _write_json(model / "params.json", source.params if same else source.params | {"model_parallel_size": shards})
    _write_json(model / "consolidate_params.json", {"model_parallel_size": shards})
    write_checklist(model)
    with torch.device("meta"):
        places = {name: i for i, name in enumerate(VQGAN(source.vq_config).state_dict())}
    vqgan = {name: vqgan[name] for name in sorted(vqgan, key=lambda name: places.get(name, len(places)))}
    meta = {name: tensor.to("meta") for name, tensor in vqgan.items()}
    with TorchWriter(tokenizer / VQGAN_FILE, meta, inside="state_dict") as writer:
        for tensor in vqgan.values():
            writer.write(tensor)
    (tokenizer / "vqgan.yaml").write_text(yaml.safe_dump(source.vq_config.to_yaml()))
    for name, spelling in zip(("text_tokenizer.json", "text_tokenizer_modified.json"), PLACEHOLDER_NAMES, strict=True):
        _write_json(tokenizer / name, _spell_placeholder(source.tokenizer_path, spelling))
    write_checklist(tokenizer)


def _write_parts(writers: list[TorchWriter], parts: list[torch.Tensor]) -> None:
    """A part into each file; none is kept alive by a variable, which would keep its mapped file alive."""
    for writer in writers:
        writer.write(parts.pop(0))


def _write_hf(source: Checkpoint, vqgan: dict[str, torch.Tensor], folder: Path) -> None:
    config = hf_config(source)
    config.architectures = ["ChameleonForConditionalGeneration"]
    decoder = {name: vqgan.pop(name) for name in list(vqgan) if name.startswith("decoder.")}
    encoder = {VQ_PREFIX + name: tensor for name, tensor in vqgan.items()}
    meta = {name: source.meta(name) for name in source.names()}
    config.dtype = next(iter(meta.values())).dtype
    config.save_pretrained(folder)
    if decoder:
        _write_safetensors(folder / DECODER_FILE, decoder)
    files = _plan_files(meta | {name: tensor.to("meta") for name, tensor in encoder.items()})
    stream = source.stream("writing tensors")
    for file, part in files.items():
        with SafetensorsWriter(folder / file, part) as writer:
            for name in part:
                if name in encoder:
                    writer.write(encoder[name])
                else:
                    assert next(stream).hf == name
                    writer.write(source.tensor(name))
    assert next(stream, None) is None
    if len(files) > 1:
        places = {name: file for file, part in files.items() for name in part}
        size = sum(like.nbytes for part in files.values() for like in part.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "params.json", source.params)
    _write_hf_text_side(source, folder, config)


def _plan_files(meta: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each safetensors file, in their order, under transformers' names for several."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    for name, like in meta.items():
        if parts[-1] and sum(t.nbytes for t in parts[-1].values()) + like.nbytes > SHARD_BYTES:
            parts.append({})
        parts[-1][name] = like
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)}


def _write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with SafetensorsWriter(path, {name: tensor.to("meta") for name, tensor in tensors.items()}) as writer:
        for tensor in tensors.values():
            writer.write(tensor)


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


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
