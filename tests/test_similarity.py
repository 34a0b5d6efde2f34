"""Embeddings are those of the libraries themselves, each on its own; FID and KID agree with their formulas."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import CONTEXT, WORDS, make_clip, make_siglip, word_tokenizer

from medmax_fast.eval.distances import KID_SUBSET, distances, feature_distances, open_features
from medmax_fast.eval.similarity import BATCH, available, cosine, open_encoder
from medmax_fast.runtime import InputError

CPU = torch.device("cpu")
RNG = np.random.default_rng()
MAKERS = {"clip": make_clip, "siglip": make_siglip}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


@pytest.fixture(scope="module", params=sorted(MAKERS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def encoder(folders, kind):
    return open_encoder(str(folders[kind]), CPU)


def random_pixels() -> np.ndarray:
    height, width = RNG.integers(20, 90, 2)
    small = Image.fromarray(RNG.integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(small.resize((width, height)))


def random_text(words: int) -> str:
    return " ".join(RNG.choice(WORDS, words))


# ---- embeddings ----


def test_embeddings_are_those_of_transformers(encoder, folders, kind, tmp_path):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder, path = folders[kind], tmp_path / "picture.png"
    pixels, texts = [random_pixels() for _ in range(3)], [random_text(n) for n in (1, 3, 7)]
    Image.fromarray(pixels[0]).save(path)
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder, backend="pil")
    options = {"padding": "max_length", "max_length": CONTEXT, "truncation": True}
    inputs = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", **options)
    inputs |= processor([Image.fromarray(p) for p in pixels], return_tensors="pt")
    if kind == "siglip":
        del inputs["attention_mask"]
    with torch.inference_mode():
        expected = model(**inputs)
    found, errors = encoder.images([path, *pixels[1:]])
    assert errors == [None] * 3 and found.dtype == np.float32
    np.testing.assert_allclose(found, expected.image_embeds, atol=2e-6)
    np.testing.assert_allclose(encoder.texts(texts), expected.text_embeds, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    # Guards against a model to which everything looks the same.
    assert cosine(found[:1], found[1:2])[0] < 0.999 and cosine(found, encoder.texts(texts)).std() > 0.01


def test_an_embedding_depends_on_its_own_input_only(encoder):
    pictures = [random_pixels() for _ in range(BATCH + 5)]
    texts = [random_text(1 + i % 20) for i in range(BATCH + 5)]
    images, words = encoder.images(pictures)[0], encoder.texts(texts)
    np.testing.assert_array_equal(encoder.images(pictures)[0], images)
    np.testing.assert_array_equal(encoder.texts(texts), words)
    order = RNG.permutation(len(pictures))
    np.testing.assert_allclose(encoder.images([pictures[i] for i in order])[0], images[order], atol=2e-6)
    np.testing.assert_allclose(encoder.texts([texts[i] for i in order]), words[order], atol=2e-6)
    for i in (0, BATCH, BATCH + 4):
        np.testing.assert_allclose(encoder.images([pictures[i]])[0][0], images[i], atol=2e-6)
        np.testing.assert_allclose(encoder.texts([texts[i]])[0], words[i], atol=2e-6)


def test_pictures_that_cannot_be_read_are_named_and_the_others_go_on(encoder, tmp_path):
    whole, cut, missing = tmp_path / "whole.jpg", tmp_path / "cut.jpg", tmp_path / "missing.png"
    Image.fromarray(random_pixels()).save(whole)
    cut.write_bytes(whole.read_bytes()[:-200])
    pixels = random_pixels()
    found, errors = encoder.images([cut, whole, str(missing), pixels])
    assert [error is None for error in errors] == [False, True, False, True]
    assert str(cut) in errors[0] and "no such file" in errors[2]
    assert np.isnan(found[[0, 2]]).all() and not np.isnan(found[[1, 3]]).any()
    np.testing.assert_allclose(found[[1, 3]], encoder.images([whole, pixels])[0], atol=2e-6)
    assert np.isnan(encoder.images([missing] * 2)[0]).all()


def test_alpha_is_dropped_as_by_the_encoders_own_preprocessing(encoder, tmp_path):
    pixels = random_pixels()
    rgba = np.concatenate([pixels, RNG.integers(0, 256, (*pixels.shape[:2], 1), np.uint8)], -1)
    path = tmp_path / "alpha.png"
    Image.fromarray(rgba).save(path)
    found = encoder.images([path, pixels])[0]
    np.testing.assert_allclose(found[0], found[1], atol=2e-6)


def test_texts_are_cut_off_at_the_context(encoder, kind):
    assert encoder.facts()["context"] == CONTEXT
    text = random_text(200)
    found = encoder.texts([text, text + " heart", "", "lung \ud83d"])
    np.testing.assert_allclose(found[0], found[1], atol=2e-6)
    assert np.isfinite(found).all() and cosine(found[:1], found[2:3])[0] < 0.999


def test_siglip_reads_lower_case_whatever_its_tokenizer_does(folders):
    encoder, text = open_encoder(str(folders["siglip"]), CPU), random_text(5)
    np.testing.assert_array_equal(encoder.texts([text.upper()]), encoder.texts([text]))


def test_nothing_gives_no_rows(encoder):
    dim = encoder.facts()["dim"]
    assert encoder.texts([]).shape == (0, dim)
    found, errors = encoder.images([])
    assert found.shape == (0, dim) and errors == []


def test_facts_tell_the_weights(folders, tmp_path):
    facts = open_encoder(str(folders["clip"]), CPU).facts()
    assert facts["model"] == str(folders["clip"]) and facts["library"] == "transformers" and facts["dim"] == 16
    again, other = make_clip(tmp_path / "again"), make_clip(tmp_path / "other", seed=1)
    (again / ".cache").mkdir()
    (again / ".cache" / "lock").touch()
    assert open_encoder(str(again), CPU).facts()["sha256"] == facts["sha256"]
    assert open_encoder(str(other), CPU).facts()["sha256"] != facts["sha256"]
    json.dumps(facts)


def test_facts_of_a_hub_model_tell_its_revision(folders, tmp_path, monkeypatch):
    revision, cached = "ab" * 20, tmp_path / "models--owner--name"
    shutil.copytree(folders["clip"], cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    facts = open_encoder("owner/name", CPU).facts()
    assert facts["revision"] == revision and "sha256" not in facts


def test_cosine_is_in_float64():
    a, b = RNG.normal(size=(2, 50, 7)).astype(np.float32)
    expected = [
        np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y)) for x, y in zip(*map(np.float64, (a, b)), strict=True)
    ]
    assert cosine(a, b).dtype == np.float64
    np.testing.assert_allclose(cosine(a, b), expected, rtol=1e-12)
    a[3] = np.nan
    assert np.isnan(cosine(a, b)).tolist() == [i == 3 for i in range(50)]


# ---- what cannot be opened ----


def refused(name: str, *parts: str) -> None:
    with pytest.raises(InputError) as error:
        open_encoder(name, CPU)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in ("--clip", name, *parts)), message


def test_names_that_mean_nothing(tmp_path):
    refused(str(tmp_path / "missing"), "no such folder")
    refused("./missing", "no such folder")
    refused(str(tmp_path), "config.json")


def test_models_that_are_no_dual_encoder(tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)).save_pretrained(
        tmp_path
    )
    refused(str(tmp_path), "bert", "expected a dual encoder")


@pytest.mark.parametrize(
    "damage", ["no weights", "cut weights", "other weights", "no tokenizer", "no processor", "config"]
)
def test_broken_folders(damage, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_clip(tmp_path)
    weights = folder / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-500])
    elif damage == "other weights":
        tensors = load_file(weights)
        del tensors["visual_projection.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "config":
        (folder / "config.json").write_text("{")
    else:
        for path in folder.glob("*token*" if damage == "no tokenizer" else "*processor*"):
            path.unlink()
    refused(str(folder), {"other weights": "visual_projection", "no tokenizer": "tokenizer"}.get(damage, ""))


def test_hub_out_of_reach():
    refused("owner/name", "give a local folder with --clip")


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is not None, reason="open_clip is installed")
def test_without_open_clip(tmp_path):
    assert "pip install" in available() and "torchvision" in available()
    (tmp_path / "open_clip_config.json").write_text("{}")
    for name in ("biomedclip", "hf-hub:owner/name", str(tmp_path)):
        with pytest.raises(InputError, match=r"pip install 'medmax_fast\[eval\]'"):
            open_encoder(name, CPU)


# ---- sets of pictures ----


def fid_ref(a: np.ndarray, b: np.ndarray) -> float:
    """The definition; the trace of the root of a b is that of root(a) b root(a), which is symmetric."""
    (mu, sigma), (mu2, sigma2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(sigma)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    between = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    return ((mu - mu2) ** 2).sum() + np.trace(sigma + sigma2) - 2 * between


def kid_ref(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased estimate of the squared MMD under the kernel (x y / D + 1)^3, over all pairs."""
    aa, bb, ab = (((x @ y.T) / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    n = len(a)
    return sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (aa, bb)) - 2 * ab.mean()


def test_fid_and_kid_equal_their_formulas():
    a, b = RNG.normal(size=(60, 8)), RNG.normal(0.3, 1.5, (60, 8))
    found = feature_distances(a, b)
    np.testing.assert_allclose([found["fid"], found["kid"]], [fid_ref(a, b), kid_ref(a, b)], rtol=1e-8)
    assert found["kid_std"] < 1e-12 and (found["n_real"], found["n_drawn"]) == (60, 60)
    # Fewer pictures than features: the covariances are singular.
    a, b = RNG.normal(size=(5, 40)), RNG.normal(size=(6, 40))
    np.testing.assert_allclose(feature_distances(a, b)["fid"], fid_ref(a, b), rtol=1e-4)


def test_kid_draws_the_same_subsets_and_leaves_the_generator_alone():
    a, b = RNG.normal(size=(KID_SUBSET + 30, 8)), RNG.normal(0.3, 1, (KID_SUBSET + 10, 8))
    torch.manual_seed(int(RNG.integers(1 << 30)))
    state = torch.get_rng_state()
    first = feature_distances(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert feature_distances(a, b) == first
    assert 0 < first["kid_std"] < abs(first["kid"]) + 1


def test_distances_between_pictures(encoder, tmp_path):
    real, drawn = [random_pixels() for _ in range(9)], [random_pixels() for _ in range(6)]
    features = open_features("clip", encoder, torch.device("cpu"))
    found = distances([*real, tmp_path / "missing.png"], drawn, features)
    assert (found["features"], found["n_real"], found["n_drawn"]) == ("clip", 9, 6)
    a, b = (encoder.images(side)[0].astype(np.float64) for side in (real, drawn))
    np.testing.assert_allclose(found["fid"], fid_ref(a, b), rtol=1e-3, atol=1e-6)
    assert abs(distances(real, real, features)["fid"]) < 1e-6
    assert distances(real, drawn[:1], features) is None
    assert distances([], drawn, features) is None


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_inception_without_torch_fidelity():
    with pytest.raises(InputError, match="pip install torch-fidelity"):
        open_features("inception", None, torch.device("cpu"))


# ---- open_clip, where it is installed ----


PREPROCESSING = {
    "mean": (0.4, 0.5, 0.6),
    "std": (0.3, 0.2, 0.25),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def make_open_clip(folder, text: dict, context: int):
    """A folder as open_clip's own hub repositories have it, with random weights and the given text tower."""
    import open_clip

    vision = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
    vision |= {"image_size": 160}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {**text, "context_length": context}}
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 160, **PREPROCESSING}})
    )
    local = dict(config["text_cfg"])
    if "hf_model_name" in local:
        local |= {"hf_model_name": str(folder / local["hf_model_name"]), "hf_model_pretrained": False}
    model = open_clip.create_model(f"local-dir:{folder}", text_cfg=local, pretrained_text=False)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder, model.eval()


def plain_clip(folder):
    return make_open_clip(folder, {"width": 32, "heads": 2, "layers": 2, "vocab_size": 49408}, 20)


def biomedclip_like(folder):
    """A BERT text tower whose config lies under the hub name that open_clip_config.json has for it."""
    from transformers import BertConfig

    name = "owner/bert"
    tokenizer = word_tokenizer(512)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **size).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder)
    text = {"hf_model_name": name, "hf_tokenizer_name": name, "hf_proj_type": "mlp"}
    return make_open_clip(folder, {**text, "hf_pooler_type": "cls_last_hidden_state_pooler"}, 64)


@pytest.mark.parametrize("make", [plain_clip, biomedclip_like])
def test_embeddings_are_those_of_open_clip(make, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    assert available() == ""
    folder, model = make(tmp_path / "model")
    encoder = open_encoder(str(folder), CPU)
    facts = encoder.facts()
    context = {plain_clip: 20, biomedclip_like: 64}[make]
    assert (facts["library"], facts["dim"], facts["context"]) == ("open_clip", 24, context)
    assert len(facts["sha256"]) == 64
    preprocess = open_clip.image_transform(160, False, **PREPROCESSING)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pictures, texts = [random_pixels() for _ in range(BATCH + 2)], [random_text(1 + i) for i in range(BATCH + 2)]
    with torch.inference_mode():
        images = model.encode_image(torch.stack([preprocess(Image.fromarray(p)) for p in pictures]), normalize=True)
        words = model.encode_text(tokenizer(texts, context_length=context), normalize=True)
    found, errors = encoder.images(pictures)
    assert errors == [None] * len(pictures)
    np.testing.assert_allclose(found, images, atol=5e-6)
    np.testing.assert_allclose(encoder.texts(texts), words, atol=5e-6)
    np.testing.assert_allclose(encoder.texts(texts[-1:])[0], words[-1], atol=5e-6)
    long = random_text(300)
    np.testing.assert_array_equal(encoder.texts([long]), encoder.texts([long + " heart"]))


def test_open_clip_folders_and_names_that_cannot_be_loaded(tmp_path):
    pytest.importorskip("open_clip")
    for name in ("biomedclip", "hf-hub:owner/name"):
        with pytest.raises(InputError, match="give a local folder with --clip"):
            open_encoder(name, CPU)
    folder, _ = biomedclip_like(tmp_path / "model")
    (folder / "owner" / "bert" / "config.json").rename(folder / "owner" / "config.json")
    refused(str(folder), "owner/bert")
    (folder / "owner" / "config.json").rename(folder / "owner" / "bert" / "config.json")
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"nothing")
    refused(str(folder))
    (folder / "open_clip_pytorch_model.bin").unlink()
    refused(str(folder))
    (folder / "open_clip_config.json").write_text("[]")
    refused(str(folder))


@pytest.mark.gpu
def test_a_gpu_gives_the_embeddings_of_the_cpu(tmp_path):
    folder = str(make_clip(tmp_path / "clip"))
    pictures, texts = [random_pixels() for _ in range(5)], ["lung", "a brain and a lung"]
    cpu, gpu = (open_encoder(folder, torch.device(device)) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(gpu.images(pictures)[0], cpu.images(pictures)[0], atol=1e-5)
    np.testing.assert_allclose(gpu.texts(texts), cpu.texts(texts), atol=1e-5)
