"""Makers of tiny random dual encoders, complete with tokenizer and image processor, for tests that need no download."""

from pathlib import Path

CONTEXT = 24
WORDS = ["a", "the", "lung", "heart", "shows", "normal", "abnormal", "opacity", "chest", "liver", "cell", "nucleus"]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP checkpoint of transformers: 16-dimensional embeddings, 32 x 32 pixels, 24 ids of text."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges = [("l", "u"), ("lu", "n"), ("lun", "g</w>"), ("t", "h"), ("th", "e</w>"), ("c", "e"), ("ce", "l")]
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**TOWER, **ids, "vocab_size": len(vocab), "max_position_embeddings": CONTEXT}
    vision = {**TOWER, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _save(folder, seed, CLIPModel, config, tokenizer, processor)


def make_siglip(folder: Path, seed: int = 0) -> Path:
    """A SigLIP checkpoint of transformers, with a tokenizer that keeps capitals and gives an attention mask."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    tokenizer = word_tokenizer(CONTEXT)
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    text |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = SiglipConfig(text_config=text, vision_config={**TOWER, "image_size": 32, "patch_size": 8})
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return _save(folder, seed, SiglipModel, config, tokenizer, processor)


def word_tokenizer(length: int):
    """A tokenizer of transformers with an id per word and case, and [SEP] at the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[SEP]", "[UNK]", "[CLS]", *WORDS, *(word.upper() for word in WORDS)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 1)])
    names = {"pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, **names)


def _save(folder: Path, seed: int, model_class: type, config, *parts) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        # As drawn, the embeddings of two texts or pictures hardly differ.
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.data.normal_(std=weights.shape[-1] ** -0.5)
    for part in (model, *parts):
        part.save_pretrained(folder)
    return folder
