"""The whole path on real images, through the commands a user would type: what `make demo` runs.

Every command is printed before it runs. The tiny checkpoint is random, so this shows the machinery and not medicine:
the model learns these very questions and one picture by heart. Ends with status 1 if it did not.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from medmax_fast import TokenStore
from medmax_fast.data.summary import store_summary

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_images import NAMES, make_images  # noqa: E402
from questions import CAPTIONS, CHOICES, CLOSED, DESCRIBE, DRAWING_REPEATS, DRAWINGS  # noqa: E402

EOT = "<reserved08706>"
FILES = {Path(name).stem: name for name in NAMES}
TRAINING = Path(__file__).resolve().parents[1] / "recipes" / "demo_cpu.args"
# What must come out, or the demo fails.
LEAST_ACCURACY, LEAST_AGREEMENT = 0.9, 0.8


def questions() -> list[tuple[str, str, str, str, str]]:
    """(task, type, question, picture, answer) of every question."""
    found = []
    for task, question, yes, no in CLOSED:
        for answer, pictures in (("yes", yes), ("no", no)):
            found += [(task, "closed", question, picture, answer) for picture in pictures.split()]
    for task, question, pictures in CHOICES:
        found += [(task, "mcq", question, picture, answer) for picture, answer in zip(pictures, "ABCD", strict=True)]
    return found


def training_rows() -> list[dict]:
    """The questions, captions and drawings as rows of the published form."""
    rows = [(f"<image>{q}{EOT}{a}", picture, "vqa", task) for task, _, q, picture, a in questions()]
    rows += [(f"<image>{DESCRIBE}{EOT}{text}", picture, "captioning", "demo") for picture, text in CAPTIONS.items()]
    drawings = [(f"{prompt}{EOT}<image>", picture, "generation", "demo") for prompt, picture in DRAWINGS]
    rows += drawings * DRAWING_REPEATS
    names = ("text", "image_path", "task", "source")
    return [
        dict(zip(names, (text, f"evaluation/images/{FILES[p]}", task, source), strict=True))
        for text, p, task, source in rows
    ]


def write_inputs(folder: Path) -> None:
    """Pictures, image list, training rows, evaluation table and prompts; the same bytes every time."""
    make_images(folder / "evaluation" / "images")
    (folder / "images.csv").write_text("img_path\n" + "".join(f"evaluation/images/{name}\n" for name in NAMES))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in training_rows()))
    columns = zip(*[(t, k, q, a, f"images/{FILES[p]}") for t, k, q, p, a in questions()], strict=True)
    names = ("task_name", "question_type", "prompt", "answer", "image_path")
    table = pa.table(dict(zip(names, map(list, columns), strict=True)))
    pq.write_table(table, folder / "evaluation" / "questions.parquet")
    prompts = [
        {"id": p, "content": [{"type": "text", "text": prompt}], "reference": f"evaluation/images/{FILES[p]}"}
        for prompt, p in DRAWINGS
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


def medmax(folder: Path, seconds: dict, *arguments: str, done: str = "") -> None:
    """Run one command in `folder`, printed first; skipped if its result `done` exists and it could not continue."""
    print(f"\n$ medmax {shlex.join(arguments)}", flush=True)
    start = time.monotonic()
    if done and (folder / done).exists():
        print(f"{done} is there already")
    else:
        status = subprocess.run([sys.executable, "-m", "medmax_fast", *arguments], cwd=folder, check=False).returncode
        if status:
            sys.exit(f"medmax {arguments[0]} ended with status {status}")
    name = next(key for n in range(1, 99) if (key := f"{arguments[0]} {n}".removesuffix(" 1")) not in seconds)
    seconds[name] = round(time.monotonic() - start, 1)


def run(folder: Path) -> bool:
    """All stages; returns whether the model learned what it should."""
    seconds: dict[str, float] = {}
    folder.mkdir(parents=True, exist_ok=True)
    write_inputs(folder)

    def command(text: str, done: str = "") -> None:
        medmax(folder, seconds, *shlex.split(text), done=done)

    command("init base --size tiny", done="base")
    command("tokenize --input images.csv --ckpt base --output codes")
    write_targets(folder)
    command("decode --input targets.parquet --ckpt base --output decoded", done="decoded/reconstructions.png")
    command("build --input train.jsonl --ckpt base --codes codes --output store", done="store/manifest.json")
    command("inspect store")
    command("eval --data evaluation --ckpt base --output before")
    command(f"train @{shlex.quote(str(TRAINING))} --data store --ckpt base --output run")
    command("merge --ckpt base --adapter run --output tuned", done="tuned")
    command("convert --input tuned --output tuned_hf --to hf", done="tuned_hf")
    command("eval --data evaluation --ckpt tuned_hf --output after")
    # The tiny model's unconditioned stream is untrained, and the published scale of 3 would follow its noise.
    command("generate --ckpt tuned --prompts prompts.jsonl --output drawn --mode image --greedy --guidance-text 1.5")
    command("report before after run drawn decoded store --output report --title 'medmax_fast demo'")
    return summarize(folder, seconds)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_targets(folder: Path) -> None:
    """The codes of the pictures to be drawn, as a table of their own: decoding all pictures would take a minute."""
    codes = pq.read_table(folder / "codes" / "codes-00000.parquet")
    targets = [f"evaluation/images/{FILES[picture]}" for _, picture in DRAWINGS]
    pq.write_table(codes.filter(pc.is_in(codes["img_path"], pa.array(targets))), folder / "targets.parquet")


def compare_drawings(folder: Path) -> Iterator[tuple[float, float]]:
    """Per drawing: the share of codes that equal the target's, and the mean grey-level difference to its decoding."""
    targets = pq.read_table(folder / "targets.parquet").to_pydict()
    codes = dict(zip(targets["img_path"], targets["img_tokens"], strict=True))
    decoded = {entry["img_path"]: entry["file"] for entry in read_lines(folder / "decoded" / "index.jsonl")}
    for row in read_lines(folder / "drawn" / "outputs.jsonl"):
        target = f"evaluation/images/{FILES[row['id']]}"
        files = folder / "drawn" / row["content"][0]["path"], folder / "decoded" / decoded[target]
        drawn, wanted = (np.asarray(Image.open(file), dtype=float) for file in files)
        # Image ids start at 4.
        yield np.mean(np.array(row["token_ids"]) - 4 == np.array(codes[target])), np.abs(drawn - wanted).mean()


def summarize(folder: Path, seconds: dict[str, float]) -> bool:
    """Print what was learned and how long it took."""
    losses = read_lines(folder / "run" / "metrics.jsonl")
    images = [record["image_loss"] for record in losses if record["image_loss"] is not None]
    agreement, difference = zip(*compare_drawings(folder), strict=True)
    right = {
        name: [sample["scores"]["medmax-v1"] for sample in read_lines(folder / name / "samples.jsonl")]
        for name in ("before", "after")
    }
    accuracy = {name: np.mean(values) for name, values in right.items()}
    packing = store_summary(TokenStore(folder / "store"))["packing"]
    print(f"\nquestions answered right  {accuracy['before']:.0%} before, {accuracy['after']:.0%} after")
    print(f"loss of image targets     {images[0]:.2f} first, {images[-1]:.2f} last")
    print(f"codes as in the target    {min(agreement):.0%} (mean difference {max(difference):.1f} of 255 grey levels)")
    print("fill of packs             " + ", ".join(f"{p['capacity']}: {p['fill']:.0%}" for p in packing))
    print("seconds                   " + ", ".join(f"{name} {value:g}" for name, value in seconds.items()))
    print(f"total                     {sum(seconds.values()):.0f} s")
    print(f"report                    {(folder / 'report' / 'report.html').resolve()}")
    return accuracy["after"] >= LEAST_ACCURACY and min(agreement) >= LEAST_AGREEMENT


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="demo-output", help="folder for everything (default: demo-output)")
    if not run(Path(parser.parse_args().output)):
        sys.exit("the demo did not learn what it should; see the figures above")
