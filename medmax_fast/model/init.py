"""`medmax init`: a random checkpoint in the Chameleon layout with the real id layout, without any download.

The language model is random. The VQGAN is not (init_vqgan.py): its codes are mean colours, so that pictures can be
looked at. The tokenizer is a byte-level BPE learned from the sentences below, over the published special tokens.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from medmax_fast.config import InitConfig
from medmax_fast.files import require_new
from medmax_fast.model.checkpoint import Checkpoint
from medmax_fast.model.convert import write_checkpoint
from medmax_fast.model.init_vqgan import colour_vqgan
from medmax_fast.model.layout import GLOBAL_KEYS, Key, ModelShape, keys, to_hf
from medmax_fast.model.load import load_model
from medmax_fast.model.vqgan_config import VQConfig
from medmax_fast.vocab import EOT_TEXT, IMAGE_TEXT, IdLayout, code_name, read_vocab

# One picture costs about 0.3 s to encode and 3 s to decode on two CPU cores at this width.
TINY_VQ = VQConfig(ch=128, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=0, z_channels=8, embed_dim=8)
REAL_VQ = VQConfig()
TINY_TEXT_IDS = 1000
SHAPES = {
    # As many ids as the tokenizer learns.
    "tiny": ModelShape(dim=128, layers=2, heads=4, kv_heads=4, hidden=352, vocab_size=0),
    # No published one: 1.1e9 weights, for benchmarks of full fine-tuning on one GPU.
    "1b": ModelShape(dim=2048, layers=16, heads=16, kv_heads=16, hidden=5504, vocab_size=65536),
    "7b": ModelShape(dim=4096, layers=32, heads=32, kv_heads=32, hidden=11008, vocab_size=65536),
}
# See RandomCheckpoint.
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
    with tempfile.TemporaryDirectory() as folder:
        dtype, vq_config = (torch.float32, TINY_VQ) if tiny else (torch.bfloat16, REAL_VQ)
        checkpoint = RandomCheckpoint(Path(folder), SHAPES[config.size], generator, dtype, vq_config)
        write_checkpoint(checkpoint, config.dir, "chameleon")
    return {
        "checkpoint": config.dir,
        "parameters": sum(checkpoint.meta(name).numel() for name in checkpoint.names()),
        "layers": checkpoint.shape.layers,
        "dim": checkpoint.shape.dim,
        "vocabulary": checkpoint.shape.vocab_size,
    }


def random_model(size: str, device="cpu", dtype: torch.dtype = torch.float32, seed: int = 0):
    """(model as load_model gives it, IdLayout): a RandomCheckpoint drawn on `device`, without files.

    size: of SHAPES. The same seed draws other values on another kind of device.
    """
    with tempfile.TemporaryDirectory() as folder:
        generator = torch.Generator(device).manual_seed(seed)
        checkpoint = RandomCheckpoint(Path(folder), SHAPES[size], generator, dtype)
        layout = IdLayout.from_vocab(read_vocab(checkpoint.tokenizer_path))
        return load_model(checkpoint, device, dtype), layout


class RandomCheckpoint(Checkpoint):
    """A checkpoint whose tensors are drawn when they are asked for: matrices of variance 1 / fan-in, norms of one, and
    what an adapter needs.

    A random model that learns in two minutes, with all but its adapter frozen, takes three things (measured on the
    demo, where they raise the accuracy after the same steps from 45 to 75 %). Embeddings are small, so that what
    attention brings outweighs them. The first layer's query and key norms have a bias, which under rotary positions
    makes it attend to its neighbourhood: otherwise a question of ten ids drowns in an image of 1,024. And the head's
    rows are long enough for a state that points at one of them to stand out among all ids.

    folder: where its tokenizer is written. shape: with as many ids as the tokenizer learns if vocab_size is 0.
    generator: on the device where tensors are drawn.
    """

    layout = "random"

    def __init__(
        self,
        folder: Path,
        shape: ModelShape,
        generator: torch.Generator,
        dtype: torch.dtype,
        vq_config: VQConfig = TINY_VQ,
    ):
        tokenizer = make_tokenizer(shape.vocab_size or None)
        self.path, self.tokenizer_path = folder, folder / "tokenizer.json"
        self.tokenizer_path.write_text(json.dumps(tokenizer))
        self.shape = replace(shape, vocab_size=len(tokenizer["model"]["vocab"]))
        self.params = self.shape.to_params()
        self.vq_config = vq_config
        self._generator, self._dtype = generator, dtype
        self._table = {key.hf: key for key in keys(shape.layers)}

    def meta(self, name: str) -> torch.Tensor:
        return torch.empty(self._table[name].size(self.shape), dtype=self._dtype, device="meta")

    def tensor(self, name: str) -> torch.Tensor:
        key = self._table[name]
        return to_hf(key, [self._draw(key)], self.shape)

    def _draw(self, key: Key) -> torch.Tensor:
        size = key.part_size(self.shape, 1)
        options = {"dtype": self._dtype, "device": self._generator.device}
        if len(size) == 2:
            embeddings, _, head = GLOBAL_KEYS
            std = EMBEDDING_STD if key == embeddings else size[1] ** -0.5 * (HEAD_GAIN if key == head else 1.0)
            return torch.empty(size, **options).normal_(0, std, generator=self._generator)
        if key.chameleon.endswith(".bias"):
            return torch.full(size, LOCALITY if key.chameleon.startswith("layers.0.") else 0.0, **options)
        return torch.ones(size, **options)

    def _own_vqgan(self) -> dict[str, torch.Tensor]:
        # A generator of its own, so that the weights do not depend on which is drawn first.
        generator = torch.Generator().manual_seed(self._generator.initial_seed())
        return colour_vqgan(self.vq_config, generator).state_dict()


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
