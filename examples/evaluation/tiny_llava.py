"""Tiny image-text-to-text checkpoints with random weights, of under a megabyte each, for tests and examples.

Their answers are nonsense made of whole words, because the head favours those, and depend on image and prompt. Needs
torch, transformers and tokenizers.
"""

from pathlib import Path

# Each becomes one id, beside those of the 256 bytes.
WORDS = ("yes", "no", "A", "B", "C", "D", "left", "right", "lung", "liver", "heart", "normal", "mass", "large", "small")
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
ROWS = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | upper }}: {% for piece in message.content %}"
    "{% if piece.type == 'image' %}<image>\n{% else %}{{ piece.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_llava(folder: str | Path, seed: int = 0) -> Path:
    """A LLaVA: CLIP of 28 x 28 pixels in 16 patches, Llama of two layers, and the template `USER: ... ASSISTANT:`."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = _tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_text_config(tokenizer),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=16,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return _save(LlavaForConditionalGeneration(config), processor, Path(folder), seed)


def make_idefics(folder: str | Path, seed: int = 0) -> Path:
    """An Idefics3, whose images become one tile or several by their size: 28 x 28 pixels in 4 patches a tile."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = _tokenizer()
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = Idefics3Config(
        vision_config={**vision, "image_size": 28, "patch_size": 7},
        text_config=_text_config(tokenizer),
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(size={"longest_edge": 84}, max_image_size={"longest_edge": 28}),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=TEMPLATE,
    )
    return _save(Idefics3ForConditionalGeneration(config), processor, Path(folder), seed)


def _tokenizer():
    """Byte-level BPE with the words above; bos is written by the template, as in LLaVA's own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL + ROWS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f" {word}" for word in WORDS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="right",
    )


def _text_config(tokenizer):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _save(model, processor, folder: Path, seed: int) -> Path:
    import torch

    generator = torch.Generator().manual_seed(seed)
    tokenizer = processor.tokenizer
    wanted = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in WORDS]
    assert all(len(ids) == 1 for ids in wanted), "a word of several ids"
    wanted = torch.tensor([ids[0] for ids in wanted] + [tokenizer.eos_token_id])
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                # Large enough for answers that differ, and that rounding does not change.
                weight.normal_(0, 1.5 / weight[0].numel() ** 0.5, generator=generator)
        head = model.get_output_embeddings().weight
        scale = torch.full((len(head), 1), 0.1)
        scale[wanted] = 3.0
        head.mul_(scale)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
