"""The whole evaluation on a laptop: every kind of task, three kinds of model, and a server that fails 30 % of calls.

    python examples/evaluation/run.py --output evaluation-output

Makes a small evaluation folder of real pictures and tiny random models, then runs the commands a user would type, each
printed before it runs: our engine, a Hugging Face model, and a server on this machine that also plays the judge, once
well-behaved and once failing 30 % of its calls and talking nonsense in 5 %. The last two must give the same table. The
models are random and the server is a script, so the figures show that everything works and say nothing about medicine.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from assistant import Assistant  # noqa: E402
from chat_server import MODEL, serve  # noqa: E402
from make_data import make_data  # noqa: E402
from tiny_clip import make_clip  # noqa: E402
from tiny_llava import make_llava  # noqa: E402

# Short answers: a random model never ends one by itself.
SHORT = "--max-new-tokens 24"


def medmax(folder: Path, text: str) -> None:
    """Run one command in `folder`, printed first."""
    print(f"\n$ medmax {text}", flush=True)
    status = subprocess.run(
        [sys.executable, "-m", "medmax_fast", *shlex.split(text)], cwd=folder, check=False
    ).returncode
    if status:
        sys.exit(f"medmax {text.split()[0]} ended with status {status}")


def run(folder: Path) -> bool:
    """All stages; returns whether the unreliable server's table is that of the well-behaved one."""
    folder.mkdir(parents=True, exist_ok=True)
    make_data(folder / "data")
    for name, make in (("clip", make_clip), ("llava", make_llava)):
        if not (folder / name).exists():
            make(folder / name)
    if not (folder / "ckpt").exists():
        medmax(folder, "init ckpt")
    with serve(Assistant(folder / "data")) as good:
        judge = f"--clip clip --judge openai --judge-model {MODEL} --judge-url {good.url}"
        medmax(folder, f"eval --data data --ckpt ckpt --output native {SHORT} {judge}")
        medmax(folder, f"eval --data data --backend hf --model llava --output hf {SHORT} {judge}")
        medmax(
            folder, f"eval --data data --backend openai --model {MODEL} --api-url {good.url} --output server {judge}"
        )
    with serve(Assistant(folder / "data"), fail=0.3, nonsense=0.05) as bad:
        judge = f"--clip clip --judge openai --judge-model {MODEL} --judge-url {bad.url}"
        server = f"--backend openai --model {MODEL} --api-url {bad.url}"
        medmax(folder, f"eval --data data {server} --output unreliable_server {judge}")
        print(f"\nthe unreliable server: {dict(bad.counts)}")
    medmax(folder, "report native hf server unreliable_server --output report --title 'medmax_fast evaluation example'")
    tables = [json.loads((folder / name / "results.json").read_text()) for name in ("server", "unreliable_server")]
    same = tables[0]["tasks"] == tables[1]["tasks"] and tables[0]["average"] == tables[1]["average"]
    print(f"\nthe unreliable server's table is that of the good one: {'yes' if same else 'NO'}")
    print(f"report  {(folder / 'report' / 'report.html').resolve()}")
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="evaluation-output", help="folder for everything")
    if not run(Path(parser.parse_args().output)):
        sys.exit(1)
