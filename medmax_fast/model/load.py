"""A checkpoint in either layout as a transformers Chameleon with packed attention, without its VQGAN."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from medmax_fast.model import attention
from medmax_fast.model.checkpoint import Checkpoint, open_checkpoint
from medmax_fast.model.layout import MAX_POSITIONS, ModelShape
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IdLayout, read_vocab

if TYPE_CHECKING:
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration


def hf_config(checkpoint: Checkpoint) -> "ChameleonConfig":
    """The transformers ChameleonConfig of a checkpoint, vocabulary map included."""
    from transformers import ChameleonConfig

    shape, vocab = checkpoint.shape, read_vocab(checkpoint.tokenizer_path)
    layout = IdLayout.from_vocab(vocab, str(checkpoint.tokenizer_path))
    if layout.vocab_size > shape.vocab_size:
        raise InputError(
            f"{checkpoint.path}: the tokenizer has {layout.vocab_size} ids, the model {shape.vocab_size} embeddings"
        )
    vocab = {name: i for name, i in vocab.items() if i != layout.placeholder} | {"<image>": layout.placeholder}
    return ChameleonConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        max_position_embeddings=MAX_POSITIONS,
        swin_norm=shape.swin_norm,
        # transformers' own default for bos is 1, which is this vocabulary's pad.
        bos_token_id=layout.bos,
        eos_token_id=layout.eos,
        pad_token_id=layout.pad,
        tie_word_embeddings=False,
        vocabulary_map=vocab,
        vq_config=checkpoint.vq_config.to_hf(),
    )


def empty_model(checkpoint: Checkpoint) -> "ChameleonForConditionalGeneration":
    """The language model on the meta device, VQGAN removed, packed attention chosen."""
    from transformers import ChameleonForConditionalGeneration

    attention.register()
    config = hf_config(checkpoint)
    with torch.device("meta"):
        model = ChameleonForConditionalGeneration._from_config(config, attn_implementation=attention.NAME)
    # Pictures become codes before they get here; the encoder would only take memory.
    model.model.vqmodel = None
    return model


def load_model(
    path: str | Path | Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> "ChameleonForConditionalGeneration":
    """ChameleonForConditionalGeneration with the checkpoint's weights, in eval mode.

    path: a folder in either layout (or an open Checkpoint). Weights go straight from the memory-mapped file to
    (device, dtype); on a CPU, in the dtype of the file, they stay views of it where the layouts agree: written to,
    they become copies, and the file stays as it is. Every parameter is trainable-by-default, as transformers leaves
    it. InputError names a missing, unexpected, mis-shaped or not finite tensor. The forward pass takes packed batches:
    see loss.packed_hidden.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    checkpoint.check_names()
    model = empty_model(checkpoint)
    state, bounds = {}, []
    for key in checkpoint.stream("loading"):
        state[key.hf] = checkpoint.tensor(key.hf).to(device=device, dtype=dtype)
        bounds.append(torch.stack(state[key.hf].aminmax()))
    # One question to the device for all tensors.
    finite = torch.stack(bounds).isfinite().all(1).tolist()
    if not all(finite):
        name = list(state)[finite.index(False)]
        raise InputError(f"{checkpoint.path}: tensor {name} holds NaN or infinity in {dtype}")
    model.load_state_dict(state, assign=True)
    # Rotary frequencies are computed, not stored: built on the meta device they have no values yet.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    return model.eval()


def shape_of(model: "ChameleonForConditionalGeneration") -> ModelShape:
    """The ModelShape of a loaded model."""
    return ModelShape.from_hf(model.config.to_dict())
