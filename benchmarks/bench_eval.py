"""Evaluation: questions a second of `medmax eval` against one question at a time, with the answers compared.

    PYTHONPATH=. python -m benchmarks.bench_eval [--only closed,open,server] [--quick]
        [--size tiny|7b] [--output FILE.json]

Weights are random (`medmax init`), images real (those of the demo), each with several questions, as in VQA-RAD (2 an
image), PathVQA (8) or SLAKE (11); the table says how many. All forms of a section answer the same questions, every turn
on images of its own, turned by its number so that nothing is found in a cache. What was answered is compared first:
`differing` of `ids` (fp32: none may differ; in 16 bits near ties fall either way, and the row says how many did).

- published: the published loop. Each question's image is read, made 512 x 512 by Pillow and encoded in a batch of one,
  then the model runs in transformers; an open answer feeds one id after the other with a cache of its own.
- one at a time: the engine, asked one question a call; it has room for one sequence, and the next question is about
  another image, so nothing is shared.
- medmax eval: the whole command but for loading the model: reading and checking the folder, hashing, asking in batches
  by image, keeping answers on the disk, scoring, statistics.
- server: an OpenAI-protocol server on this machine that takes 50 ms a reply, one request at a time and eight.

p20, p50 and p80 are seconds a question. times: as fast as the published loop on the same questions.
"""

import json
import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness import percentiles, report
from benchmarks.sections import section_parser
from benchmarks.stages.generate_forms import DEFAULTS, Models, compare
from benchmarks.stages.generate_sections import seconds
from medmax_fast.config import EvalConfig
from medmax_fast.data.images import load_image
from medmax_fast.eval.backends.native import NativeBackend
from medmax_fast.eval.backends.openai import OpenAIBackend
from medmax_fast.eval.backends.protocol import Ask
from medmax_fast.eval.run import evaluate
from medmax_fast.eval.servers.chat import ChatClient
from medmax_fast.generate.engine import Engine
from medmax_fast.generate.requests import Request
from medmax_fast.runtime import pick_device

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path += [str(EXAMPLES / "demo"), str(EXAMPLES / "evaluation")]
from chat_server import serve  # noqa: E402
from make_images import make_images  # noqa: E402

# Seconds that the server takes for a reply.
LATENCY = 0.05


@dataclass(frozen=True)
class Size:
    """Timed turns after one that warms up, images of a turn, questions of each (open ones: the middle), ids of an
    open answer."""

    repeats: int
    images: int
    questions: tuple[int, ...]
    new: int


FULL, QUICK = Size(2, 8, (2, 8, 11), 16), Size(1, 2, (1, 3, 4), 4)


@dataclass
class Bench:
    models: Models
    size: Size
    folder: Path

    def data(self, turn: int, kind: str, questions: int) -> Path:
        """An evaluation folder: the first images of the demo, turned as no other turn's are."""
        folder = self.folder / f"{kind}{questions}-{turn}"
        (folder / "images").mkdir(parents=True)
        sources = sorted((self.folder / "pictures").iterdir())[: self.size.images]
        rows = []
        for i, source in enumerate(sources):
            with Image.open(source) as image:
                pixels = np.rot90(np.asarray(image.convert("RGB")), turn % 4)
            Image.fromarray(np.ascontiguousarray(pixels)).save(folder / "images" / f"{i}.png")
        for question in range(questions):
            for i in range(len(sources)):
                task = {"task_name": "vqa_rad", "question_type": kind, "answer": "yes"}
                prompt = f"Is finding number {question} of case {turn}-{i} seen here?"
                rows.append({**task, "prompt": prompt, "image_path": f"images/{i}.png"})
        (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    def engine(self) -> Engine:
        """An engine with room for a turn."""
        return self.models.engine(self.size.images * max(self.size.questions), 1200)


def published(bench: Bench, folder: Path, new: int) -> list[list[int]]:
    """New ids of every question, by the shape of the published inference."""
    models, stock, found = bench.models, bench.models.stock, []
    layout, tokenizer = models.layout, models.encoder.tokenizer
    for line in (folder / "questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        codes = models.encoder.image_tokenizer.encode(load_image(folder / row["image_path"])[None])[0]
        ids = [layout.bos, *layout.image_span(codes).tolist(), *tokenizer.encode(row["prompt"]), layout.eot]
        found.append([stock.answer(ids)] if new == 1 else stock.generate([ids], new)[0])
    return found


def alone(bench: Bench, folder: Path, new: int) -> list[list[int]]:
    """New ids of every question by the engine, one a call."""
    found, engine = [], bench.models.engine(1, 1200)
    for line in (folder / "questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        content = [{"type": "image", "path": str(folder / row["image_path"])}, {"type": "text", "text": row["prompt"]}]
        bench.models.encoder._codes.clear()
        request = Request("q", content, greedy=True, max_new_tokens=new, repetition_penalty=DEFAULTS.repetition_penalty)
        (result,) = engine.generate([request], 1)
        assert not result.error, result.error
        found.append(result.token_ids)
    return found


def command(bench: Bench, folder: Path, new: int) -> list[list[int]]:
    """New ids of every question by the command, as samples.jsonl has them."""
    bench.models.encoder._codes.clear()
    output = folder / "run"
    config = EvalConfig(data=str(folder), output=str(output), clip="none", max_new_tokens=new)
    with redirect_stderr(StringIO()):
        evaluate(config, NativeBackend(bench.engine(), "random"))
    return [json.loads(line)["token_ids"] for line in (output / "samples.jsonl").read_text().splitlines()]


def section(bench: Bench, kind: str, new: int, questions: int) -> list[dict]:
    """Rows of one kind of question, so many of them an image."""
    forms = {"published": published, "one at a time": alone, "medmax eval": command}
    took, ids = ({name: [] for name in forms} for _ in range(2))
    count = bench.size.images * questions
    for turn in range(bench.size.repeats + 1):
        folder = bench.data(turn, kind, questions)
        for name, work in forms.items():
            lasted, found = seconds(work, bench, folder, new)
            if turn:
                took[name].append(lasted / count)
                ids[name] += found
    rows = []
    for name in forms:
        row = {"row": name, "questions_an_image": questions, "new_ids": new, **percentiles(took[name])}
        row |= {"questions_per_s": 1 / row["p50_s"], "times": (rows or [row])[0]["p50_s"] / row["p50_s"]}
        found = compare(ids[name], ids["published"])
        rows.append(row | {key: found[key] for key in ("ids", "differing", "rows_differing")})
    assert bench.models.dtype.itemsize < 4 or not any(row["differing"] for row in rows), rows
    return rows


def closed(bench: Bench) -> list[dict]:
    return [row for questions in bench.size.questions for row in section(bench, "closed", 1, questions)]


def free(bench: Bench) -> list[dict]:
    return section(bench, "open", bench.size.new, bench.size.questions[1])


def server(bench: Bench) -> list[dict]:
    """A server that takes its time, asked by one request after the other and by several at once."""
    asks = [Ask(f"{i}", [{"type": "text", "text": f"Question {i}?"}]) for i in range(bench.size.images * 8)]

    def answer(body: dict) -> str:
        time.sleep(LATENCY)
        return body["messages"][0]["content"].upper()

    rows, said = [], []
    with serve(answer) as running:
        for concurrency in (1, 8):
            took = []
            for _ in range(bench.size.repeats):
                backend = OpenAIBackend(ChatClient(running.url, "m", cache=None), concurrency)
                lasted, answers = seconds(backend.answer, asks, len(asks), lambda _: None)
                took.append(lasted / len(asks))
                backend.client.close()
            texts = {answer.id: answer.text for answer in answers}
            said.append([texts[ask.id] for ask in asks])
            row = {"row": f"{concurrency} at a time", **percentiles(took)}
            row |= {"questions_per_s": 1 / row["p50_s"], "times": (rows or [row])[0]["p50_s"] / row["p50_s"]}
            different = sum(a != b for a, b in zip(said[0], said[-1], strict=True))
            rows.append(row | {"answers": len(asks), "differing": different})
    assert not any(row["differing"] for row in rows), rows
    return rows


SECTIONS = {"closed": closed, "open": free, "server": server}


def main() -> None:
    arguments = section_parser(
        "evaluation: the command against one question at a time", SECTIONS, sized=True
    ).parse_args()
    device = pick_device("auto")
    name = arguments.size or ("7b" if device.type == "cuda" else "tiny")
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "pictures")
        models = Models(name, device, folder)
        bench = Bench(models, QUICK if arguments.quick else FULL, Path(folder))
        rows = [{"section": part, **row} for part in arguments.only for row in SECTIONS[part](bench)]
    names = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{key: row.get(key) for key in names} for row in rows]
    report("eval", rows, arguments.output, size=name, dtype=str(models.dtype).removeprefix("torch."))


if __name__ == "__main__":
    main()
