"""`medmax init`: a random checkpoint in the Chameleon layout with the real id layout, without any download.

The language model is random. The VQGAN is not (init_vqgan.py): its codes are mean colours, so that pictures can be
looked at. The tokenizer is a byte-level BPE learned from the sentences below, over the published special tokens.
"""

import json
import tempfile
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from medmax_fast.config import InitConfig
from medmax_fast.model.checkpoint import Checkpoint
from medmax_fast.model.convert import write_checklist
from medmax_fast.model.init_vqgan import colour_vqgan
from medmax_fast.model.layout import GLOBAL_KEYS, Key, ModelShape, keys
from medmax_fast.model.load import load_model
from medmax_fast.model.vqgan import VQConfig
from medmax_fast.runtime import atomic_path, progress, require_new
from medmax_fast.vocab import EOT_TEXT, IMAGE_TEXT, PLACEHOLDER_NAMES, IdLayout, code_name

# One picture costs about 0.3 s to encode and 3 s to decode on two CPU cores at this width.
TINY_VQ = VQConfig(ch=128, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=0, z_channels=8, embed_dim=8)
REAL_VQ = VQConfig()
TINY_TEXT_IDS = 1000
REAL_VOCAB = 65536
# See random_weights.
EMBEDDING_STD, HEAD_GAIN, LOCALITY = 0.2, 2.0, 1.2

SENTENCES = """
Is this an image of the retina? yes. Is the optic disc visible? yes. Is a tumor seen in this image? no.
Is this a histology slide with brown staining of the nuclei? yes. Is this a chest radiograph? no.
What organ is shown in this image? The brain. Which imaging modality was used? A. CT B. MRI C. Microscopy D. Fundus
Which stain was used? Answer with the letter. A B C D. Please describe this picture.
Generate an image of a histology slide. Draw a fundus photograph of the retina. Create a picture of cells.
The fundus photograph shows the retina with the optic disc, the macula and the blood vessels.
The computed tomography slice shows the abdomen of the patient with the kidneys, the liver and the spine.
The magnetic resonance image shows the head in an axial plane. The microscopy image shows cells with dark nuclei.
Immunohistochemistry of the tissue with brown positive staining and blue counterstain. Microaneurysms are seen.
A phantom was used for the reconstruction. Bright and dark regions, normal and abnormal findings, left and right.
There is no evidence of a lesion. The lesion is in the left lobe. Are the nuclei stained? yes no yes no yes no
"""


def init(config: InitConfig) -> dict:
    """Create the checkpoint folder; returns its shape. InputError if the folder holds something."""
    require_new(config.dir)
    tiny = config.size == "tiny"
    generator = torch.Generator().manual_seed(config.seed)
    tokenizer = make_tokenizer(None if tiny else REAL_VOCAB)
    layout = IdLayout.from_vocab(tokenizer["model"]["vocab"])
    shape, vq = _shape(config.size, layout.vocab_size), TINY_VQ if tiny else REAL_VQ
    dtype = torch.float32 if tiny else torch.bfloat16
    with atomic_path(config.dir) as folder:
        model, text = folder / "models" / "7b", folder / "tokenizer"
        model.mkdir(parents=True)
        text.mkdir()
        torch.save(random_weights(shape, dtype, generator), model / "consolidated.pth")
        (model / "params.json").write_text(json.dumps(shape.to_params()))
        (model / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": 1}))
        write_checklist(model)
        torch.save({"state_dict": colour_vqgan(vq, generator).state_dict()}, text / "vqgan.ckpt")
        (text / "vqgan.yaml").write_text(yaml.safe_dump(vq.to_yaml()))
        _write_tokenizers(text, tokenizer)
        write_checklist(text)
    parameters = sum(_rows_columns(key, shape)[0] * _rows_columns(key, shape)[1] for key in keys(shape.layers))
    return {
        "checkpoint": config.dir,
        "parameters": parameters,
        "layers": shape.layers,
        "dim": shape.dim,
        "vocabulary": shape.vocab_size,
    }


def _shape(size: str, vocab_size: int) -> ModelShape:
    if size == "tiny":
        return ModelShape(dim=128, layers=2, heads=4, kv_heads=4, hidden=352, vocab_size=vocab_size)
    return ModelShape(dim=4096, layers=32, heads=32, kv_heads=32, hidden=11008, vocab_size=vocab_size)


def _rows_columns(key: Key, shape: ModelShape) -> tuple[int, int]:
    """Shape of a tensor in the Chameleon layout; vectors are (1, n)."""
    name = key.chameleon.split(".", 2)[-1] if key.chameleon.startswith("layers.") else key.chameleon
    kv = shape.kv_heads * shape.head_dim
    matrices = {
        "tok_embeddings.weight": (shape.vocab_size, shape.dim),
        "output.weight": (shape.vocab_size, shape.dim),
        "attention.wq.weight": (shape.dim, shape.dim),
        "attention.wk.weight": (kv, shape.dim),
        "attention.wv.weight": (kv, shape.dim),
        "attention.wo.weight": (shape.dim, shape.dim),
        "feed_forward.w1.weight": (shape.hidden, shape.dim),
        "feed_forward.w3.weight": (shape.hidden, shape.dim),
        "feed_forward.w2.weight": (shape.dim, shape.hidden),
    }
    return matrices.get(name, (1, shape.head_dim if key.kind == "qk_norm" else shape.dim))


def random_weights(shape: ModelShape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A state dict in the Chameleon layout: matrices of variance 1 / fan-in, norms of one, and what an adapter needs.

    A random model that learns in two minutes, with all but its adapter frozen, takes three things (measured on the
    demo, where they raise the accuracy after the same steps from 45 to 75 %). Embeddings are small, so that what
    attention brings outweighs them. The first layer's query and key norms have a bias, which under rotary positions
    makes it attend to its neighbourhood: otherwise a question of ten ids drowns in an image of 1,024. And the head's
    rows are long enough for a state that points at one of them to stand out among all ids.
    """
    table = progress(keys(shape.layers), "random weights")
    return {key.chameleon: _random_tensor(key, shape, dtype, generator) for key in table}


def _random_tensor(key: Key, shape: ModelShape, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """One tensor of random_weights, on the generator's device."""
    rows, columns = _rows_columns(key, shape)
    options = {"dtype": dtype, "device": generator.device}
    if rows > 1:
        embeddings, _, head = GLOBAL_KEYS
        std = EMBEDDING_STD if key == embeddings else columns**-0.5 * (HEAD_GAIN if key == head else 1.0)
        return torch.empty(rows, columns, **options).normal_(0, std, generator=generator)
    if key.chameleon.endswith(".bias"):
        return torch.full((columns,), LOCALITY if key.chameleon.startswith("layers.0.") else 0.0, **options)
    return torch.ones(columns, **options)


def random_model(size: str, device="cpu", dtype: torch.dtype = torch.float32, seed: int = 0):
    """(model as load_model gives it, IdLayout): weights as random_weights, drawn on `device`, without a checkpoint.

    size: as in InitConfig. The same seed draws other values on another kind of device, and than `init` does.
    """
    tokenizer = make_tokenizer(None if size == "tiny" else REAL_VOCAB)
    layout = IdLayout.from_vocab(tokenizer["model"]["vocab"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(tokenizer))
        generator = torch.Generator(device).manual_seed(seed)
        checkpoint = _RandomCheckpoint(path, _shape(size, layout.vocab_size), dtype, generator)
        return load_model(checkpoint, device, dtype), layout


class _RandomCheckpoint(Checkpoint):
    """A checkpoint whose tensors are drawn as they are asked for; it has no VQGAN."""

    layout = "random"
    vq_config = TINY_VQ

    def __init__(self, tokenizer_path: Path, shape: ModelShape, dtype: torch.dtype, generator: torch.Generator):
        self.path = self.tokenizer_path = tokenizer_path
        self.shape, self.params = shape, shape.to_params()
        self._dtype, self._generator = dtype, generator
        self._table = {key.hf: key for key in keys(shape.layers)}

    def tensor(self, name: str) -> torch.Tensor:
        # Rotary order does not matter here: rows are alike, and the biases of a norm are all the same.
        value = _random_tensor(self._table[name], self.shape, self._dtype, self._generator)
        if self._table[name].kind != "qk_norm":
            return value
        return value.expand(self.shape.heads if ".q_norm" in name else self.shape.kv_heads, -1)


def make_tokenizer(vocab_size: int | None) -> dict:
    """A tokenizers file (as a dict) with the published ids 0..8711 and BPE text ids after them.

    vocab_size: pad the text ids up to it with names that are never generated; None leaves what was learned.
    """
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_TEXT_IDS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=1,
        show_progress=False,
    )
    learned.train_from_iterator(SENTENCES.strip().splitlines(), trainer)
    spec = json.loads(learned.to_str())
    codes = [code_name(c) for c in range(8192)]
    reserved = [f"<reserved{i - 4:05d}>" for i in range(8198, 8711)]
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    names = special + codes + ["<eoss>", "<racm3:break>"] + reserved + [IMAGE_TEXT]
    assert names[8710] == EOT_TEXT and len(names) == 8712
    text = [name for name, _ in sorted(spec["model"]["vocab"].items(), key=lambda item: item[1])]
    text += [f"<unused{i:05d}>" for i in range(len(names) + len(text), vocab_size or 0)]
    spec["model"]["vocab"] = {name: i for i, name in enumerate(names + text)}
    spec["model"]["unk_token"] = "<unk>"
    spec["added_tokens"] = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, name in enumerate(names)
        if not name.startswith("IMGIMG")
    ]
    return spec


def _write_tokenizers(folder: Path, modified: dict) -> None:
    plain = json.dumps(modified).replace(json.dumps(IMAGE_TEXT), json.dumps(PLACEHOLDER_NAMES[0]))
    (folder / "text_tokenizer.json").write_text(plain)
    (folder / "text_tokenizer_modified.json").write_text(json.dumps(modified))
