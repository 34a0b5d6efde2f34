"""The backend of transformers models on tiny ones made here: against generate() by hand, batches, failures, loading."""

import importlib.util
import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_llava import make_idefics, make_llava

from medmax_fast.data import images as image_files
from medmax_fast.eval.backends import hf
from medmax_fast.eval.backends.hf import HFBackend
from medmax_fast.eval.backends.protocol import Ask
from medmax_fast.runtime import InputError


def quiet(_: int) -> None:
    """Told of answers as they come."""


MAKERS = {"llava": make_llava, "idefics": make_idefics}
SIZES = [(40, 30), (100, 64), (28, 28), (64, 90)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints that are not to be changed."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    """Files of SIZES, patches of random colours."""
    folder, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng()
    for number, (width, height) in enumerate(SIZES):
        patches = noise.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(len(SIZES))]


@pytest.fixture()
def llava(folders) -> HFBackend:
    return load(folders["llava"])


def load(folder) -> HFBackend:
    return HFBackend.from_pretrained(str(folder), torch.device("cpu"), torch.float32)


def load_or_skip(folder) -> HFBackend:
    """transformers 5.17 has Idefics3's image processor with torchvision only."""
    try:
        return load(folder)
    except InputError as error:
        if "its processor needs torchvision" not in str(error):
            raise
        pytest.skip(str(error))


def ask(name, *pieces, new_tokens=12, **options) -> Ask:
    """Texts, and images by their paths."""
    content = [
        {"type": "image", "path": piece} if piece.endswith((".png", ".dcm")) else {"type": "text", "text": piece}
        for piece in pieces
    ]
    return Ask(name, content, new_tokens=new_tokens, **options)


def ragged(pictures, count=17) -> list[Ask]:
    """Questions of random lengths, with no, one or two images."""
    asks = []
    for number in range(count):
        text = " ".join(random.choices(("Is", "there", "a", "large", "mass", "in the lung?"), k=random.randint(1, 25)))
        pieces = [*random.choices(pictures, k=number % 3), text]
        random.shuffle(pieces)
        asks.append(ask(f"q{number}", *pieces, new_tokens=random.choice((6, 12))))
    return asks


def by_hand(folder: Path, prompt: str, paths: list[str], new_tokens: int) -> list[int]:
    """New ids of one prompt by plain steps: the whole sequence through the model for each id."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    opened = [Image.open(path).convert("RGB") for path in paths] or None
    inputs = dict(processor(text=prompt, images=opened, return_tensors="pt", add_special_tokens=False))
    new = []
    while len(new) < new_tokens and 2 not in new:
        with torch.inference_mode():
            new.append(int(model(**inputs, use_cache=False).logits[0, -1].argmax()))
        for name, last in (("input_ids", new[-1]), ("attention_mask", 1)):
            inputs[name] = torch.cat([inputs[name], torch.tensor([[last]])], 1)
    return new


@pytest.mark.parametrize("name", MAKERS)
def test_one_prompt_by_hand(folders, pictures, name):
    folder, backend = folders[name], load_or_skip(folders[name])
    first, second = pictures[1], pictures[3]
    tokenizer = backend.processor.tokenizer
    cases = [
        (ask("a", first, "Is it a mass?"), "<s>USER: <image>\nIs it a mass? ASSISTANT:", [first]),
        (
            ask("b", "This", second, "or that", first, "?"),
            "<s>USER: This<image>\nor that<image>\n? ASSISTANT:",
            [second, first],
        ),
        (ask("c", "Only text", turn=False, mode="any"), "<s>USER: Only text ASSISTANT:", []),
    ]
    for question, prompt, paths in cases:
        (answer,) = backend.answer([question], 4, quiet)
        ids = by_hand(folder, prompt, paths, 12)
        assert answer.error is None and answer.id == question.id and answer.token_ids == ids
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert "</s>" not in answer.text and answer.pictures == []


@pytest.mark.parametrize("name", MAKERS)
def test_answers_do_not_depend_on_the_batch(folders, pictures, name):
    backend, asks = load_or_skip(folders[name]), ragged(pictures)
    alone = backend.answer(asks, 1, quiet)
    assert [answer.id for answer in alone] == [question.id for question in asks]
    assert backend.answer(asks, 8, quiet) == alone
    shuffled = random.sample(asks, len(asks))
    assert {answer.id: answer for answer in backend.answer(shuffled, 5, quiet)} == {
        answer.id: answer for answer in alone
    }
    # Otherwise this shows nothing: some end early, some do not, and they differ.
    assert len({tuple(answer.token_ids) for answer in alone}) > 5


def test_the_image_matters(llava, pictures):
    answers = llava.answer([ask(path, path, "What is shown?") for path in pictures], 4, quiet)
    assert len({answer.text for answer in answers}) > 1


def test_budgets(llava, pictures, monkeypatch):
    assert hf.NEW_TOKENS == 1024
    monkeypatch.setattr(hf, "NEW_TOKENS", 99)
    budgets = [1, 5, 1, 0, 30, 5]
    # No end of text in the way.
    llava._settings["suppress_tokens"] = [2]
    asks = [ask(str(i), pictures[i % 4], "Why?", new_tokens=budget) for i, budget in enumerate(budgets)]
    answers = llava.answer(asks, 4, quiet)
    assert [len(answer.token_ids) for answer in answers] == [1, 5, 1, 99, 30, 5]
    assert answers[4].token_ids[:5] == answers[0].token_ids + answers[4].token_ids[1:5]


def test_an_answer_ends_with_its_first_eos(folders, pictures, tmp_path):
    folder = shutil.copytree(folders["llava"], tmp_path / "model")
    asks = ragged(pictures)
    plain = load(folder).answer(asks, 6, quiet)
    # The commonest id becomes one more eos.
    ids = [new for answer in plain for new in answer.token_ids if new != 2]
    common = max(set(ids), key=ids.count)
    edit(folder / "generation_config.json", eos_token_id=[2, common])
    for answer, before in zip(load(folder).answer(asks, 6, quiet), plain, strict=True):
        cut = before.token_ids.index(common) + 1 if common in before.token_ids else len(before.token_ids)
        assert answer.token_ids == before.token_ids[:cut]
    # An end that only the tokenizer names ends an answer as well.
    edit(folder / "generation_config.json", eos_token_id=common)
    assert all(2 not in answer.token_ids[:-1] for answer in load(folder).answer(asks, 6, quiet))


def test_the_models_own_decoding_is_overridden(folders, pictures, tmp_path, caplog):
    from transformers.utils import logging as library

    folder, asks = shutil.copytree(folders["llava"], tmp_path / "model"), ragged(pictures)
    own = {"do_sample": True, "temperature": 3.0, "top_p": 0.7, "top_k": 9, "repetition_penalty": 1.8}
    own |= {"no_repeat_ngram_size": 2, "max_length": 20, "min_length": 9, "use_cache": False}
    edit(folder / "generation_config.json", **own)
    library.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            assert load(folder).answer(asks, 4, quiet) == load(folders["llava"]).answer(asks, 4, quiet)
    finally:
        library.disable_propagation()
    assert not caplog.records, caplog.text


def test_failures_stay_with_their_asks(llava, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes(Path(pictures[0]).read_bytes()[:60])
    good = ragged(pictures, 7)
    bad = [
        ask("broken", str(tmp_path / "broken.png"), "What?"),
        ask("half", pictures[0], str(tmp_path / "absent.png"), "What?"),
        ask("spelled", pictures[0], "an <image> in words"),
        ask("drawn", "A picture of a lung", mode="image"),
    ]
    asks = random.sample(good + bad, len(good + bad))
    answers = {answer.id: answer for answer in llava.answer(asks, 8, quiet)}
    assert "broken.png: broken image" in answers["broken"].error
    assert answers["half"].error == f"{tmp_path}/absent.png: no such file"
    assert answers["spelled"].error.startswith("the model refuses the prompt (")
    assert "text only" in answers["drawn"].error
    assert all(answers[a.id].content == [] and answers[a.id].token_ids == [] for a in bad)
    assert [answers[a.id] for a in good] == llava.answer(good, 8, quiet)
    assert llava.answer([], 8, quiet) == [] and [answer.id for answer in llava.answer(bad, 1, quiet)] == [
        a.id for a in bad
    ]


def test_files_are_decoded_once_and_as_everywhere(llava, pictures, tmp_path, monkeypatch):
    deep = tmp_path / "deep.png"
    Image.fromarray(np.random.default_rng().integers(0, 65536, (50, 40), dtype=np.uint16)).save(deep)
    read, seen = [], []
    monkeypatch.setattr(hf, "read_file", lambda path: read.append(path) or image_files.read_file(path))
    process = type(llava.processor.image_processor).preprocess

    def preprocess(self, images, *args, **kwargs):
        seen.extend(np.asarray(image) for nested in images for image in nested)
        return process(self, images, *args, **kwargs)

    monkeypatch.setattr(type(llava.processor.image_processor), "preprocess", preprocess)
    asks = [ask(str(i), path, "What? " * i) for i in range(5) for path in (*pictures, str(deep))]
    llava.answer([*asks, ask("twice", str(deep), str(deep), "the same?")], 4, quiet)
    assert sorted(read) == sorted([*pictures, str(deep)])
    expected = image_files.decode(deep.read_bytes(), "deep", packed=True).pixels
    assert sum(pixels.shape == expected.shape and (pixels == expected).all() for pixels in seen) == 7


def test_batches_shrink_where_memory_is_short(llava, pictures, monkeypatch, capsys):
    asks = [ask(str(i), pictures[i % 4], "What? " * i) for i in range(16)]
    expected, sizes, generate = llava.answer(asks, 8, quiet), [], llava.model.generate

    def limited(input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(llava.model, "generate", limited)
    assert llava.answer(asks, 8, quiet) == expected
    # The second batch was ready before the first had failed; in the next call none is too large.
    assert sizes[:3] == [8, 4, 2] and sum(size for size in sizes if size <= 2) == 16
    assert capsys.readouterr().err.count("out of GPU memory with 8 prompts at a time, going on with 4") == 1
    sizes.clear()
    assert llava.answer(asks, 8, quiet) == expected and set(sizes) == {2}
    monkeypatch.setattr(llava.model, "generate", lambda **_: limited(torch.zeros(3, 1)))
    assert {answer.error for answer in llava.answer(asks, 8, quiet)} == {"out of GPU memory with this prompt alone"}


def test_facts(llava, folders, tmp_path):
    facts = llava.facts()
    assert json.loads(json.dumps(facts)) == facts and not HFBackend.draws
    assert (facts["kind"], facts["model"], facts["dtype"]) == ("hf", str(folders["llava"]), "float32")
    assert facts["revision"] is None and facts["architecture"] == "LlavaForConditionalGeneration"
    half = HFBackend.from_pretrained(str(folders["llava"]), torch.device("cpu"), torch.bfloat16)
    assert half.facts()["dtype"] == "bfloat16" and half.answer([ask("a", "What?")], 1, quiet)[0].text


def test_the_commit_of_a_model_from_the_hub(folders, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--tiny--llava"
    shutil.copytree(folders["llava"], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    backend = load("tiny/llava")
    assert backend.facts()["revision"] == commit and backend.facts()["model"] == "tiny/llava"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def template(text: str):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def as_qwen(folder: Path) -> None:
    edit(folder / "processor_config.json", processor_class="Qwen2_5_VLProcessor")
    edit(folder / "processor_config.json", image_processor={"image_processor_type": "Qwen2VLImageProcessor"})
    edit(folder / "processor_config.json", video_processor={"video_processor_type": "Qwen2VLVideoProcessor"})
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')


def deeper(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config={**text, "num_hidden_layers": 3})


DAMAGE = {
    "text model": (lambda f: edit(f / "config.json", model_type="llama"), "a llama model, expected a decoder"),
    "unknown": (lambda f: edit(f / "config.json", model_type="llava_mistral"), "model type `llava_mistral`"),
    "own code": (
        lambda f: edit(f / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "runs code of its own, which is never done",
    ),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    "plain template": (template("{% for m in messages %}{{ m.content }}{% endfor %}"), "places no images"),
    "adding template": (template("{% for m in messages %}{{ 'x' + m.content }}{% endfor %}"), "takes no list"),
    "blind template": (template("{{ messages[0].content[-1].text }}"), "places no images"),
    "broken template": (template("{% for m in"), "takes no list"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:9999]),
        "cannot be loaded",
    ),
    "missing weights": (deeper, "9 weights are missing, such as model.language_model.layers.2."),
    "no processor": (lambda f: (f / "processor_config.json").unlink(), "cannot be loaded"),
    "no config": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
}
if importlib.util.find_spec("torchvision") is None:
    DAMAGE["torchvision"] = (as_qwen, "its processor needs torchvision")


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_loaded(folders, tmp_path, damage):
    folder = shutil.copytree(folders["llava"], tmp_path / "model")
    change, expected = DAMAGE[damage]
    change(folder)
    with pytest.raises(InputError) as error:
        load(folder)
    assert str(error.value).startswith(f"--model {folder}: ") and expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "nobody/nothing", "not a name!"])
def test_names_that_lead_nowhere(name):
    with pytest.raises(InputError, match=f"--model {name}: (no such folder|cannot be loaded)"):
        load(name)
