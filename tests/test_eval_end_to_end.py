"""Every kind of task on real pictures, through the command: our engine, a Hugging Face model, an unreliable server."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from assistant import Assistant
from chat_server import MODEL, PATIENCE, serve
from make_data import make_data
from tiny_clip import make_clip
from tiny_llava import make_llava

from medmax_fast import cli
from medmax_fast.eval.questions import load_questions
from medmax_fast.eval.servers.chat import ChatClient

TASKS = 20
# Seconds that a first retry waits at most for a server that fails; doubled each time.
BACKOFF = 0.1


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with evaluation data, a tiny checkpoint, a tiny CLIP and a tiny LLaVA."""
    folder = tmp_path_factory.mktemp("world")
    make_data(folder / "data")
    make_clip(folder / "clip")
    make_llava(folder / "llava")
    assert cli.main(["init", str(folder / "ckpt")]) == 0
    return folder


def arguments(world: Path, output: str, url: str, **flags) -> list[str]:
    """The command, with a CLIP model and a judge."""
    known = {"data": world / "data", "output": world / output, "clip": world / "clip", "device": "cpu"}
    known |= {"judge": "openai", "judge-model": MODEL, "judge-url": url} if url else {}
    known |= {name.replace("_", "-"): value for name, value in flags.items()}
    return ["eval", *(part for name, value in known.items() for part in (f"--{name}", str(value)))]


def run(*command, status: int = 0) -> None:
    assert cli.main(arguments(*command[:3], **command[3])) == status


def server_flags(url: str, **flags) -> dict:
    return {"backend": "openai", "model": MODEL, "api_url": url, **flags}


def results(world: Path, output: str) -> dict:
    return json.loads((world / output / "results.json").read_text())


def samples(world: Path, output: str) -> list[dict]:
    return [json.loads(line) for line in (world / output / "samples.jsonl").read_bytes().splitlines()]


@pytest.fixture(scope="module")
def good(world):
    """The table of a server that behaves, and the server."""
    with serve(Assistant(world / "data")) as server:
        run(world, "good", server.url, server_flags(server.url))
        yield server


@dataclass(frozen=True)
class Troubles:
    """How often a server gave which kind of answer, the judge's words that were no verdict, seconds waited for it."""

    counts: Counter
    prose: list[str]
    waits: list[float]


@pytest.fixture(scope="module")
def bad(world) -> Troubles:
    """The table of a server that fails."""
    assistant, prose, waits = Assistant(world / "data"), [], []

    def talkative(body):
        """Says something else than a verdict, to every fifth case when it is first put to it."""
        said = assistant(body)
        if body["messages"][0]["role"] == "system" and len(body["messages"]) == 2 and sum(map(ord, str(body))) % 5 == 0:
            prose.append(said)
            return f"Well, I should say {said}, on the whole."
        return said

    begin = ChatClient.__init__

    def noting(client, *arguments, **named):
        begin(client, *arguments, **named, backoff=BACKOFF)
        wait = client._stopped.wait
        client._stopped.wait = lambda seconds: waits.append(seconds) or wait(seconds)

    with pytest.MonkeyPatch.context() as patch, serve(talkative, fail=0.3, nonsense=0.05, seed=3) as server:
        patch.setattr(ChatClient, "__init__", noting)
        run(world, "bad", server.url, server_flags(server.url))
    return Troubles(server.counts, prose, waits)


def test_the_data_has_every_kind_of_task(world):
    data = load_questions(world / "data")
    assert len({q.task_id for q in data.questions}) == TASKS + 1
    assert {q.task.kind for q in data.questions} == {
        *("yes_no", "letter", "open", "caption", "drawing", "interleaved", "chat")
    }


def test_our_engine_does_every_task(world, good, capsys):
    flags = {"ckpt": world / "ckpt", "limit": 1, "max_new_tokens": 6, "fid": "clip"}
    run(world, "native", good.url, flags)
    out, err = capsys.readouterr()
    found = results(world, "native")
    assert (
        json.loads(out.splitlines()[-1])["tasks"] == found["tasks"]
        and "the judge: at most 7 requests, about" in err
        and "the judge afterwards: at most 7 requests" in err
    )
    assert len(found["tasks"]) == TASKS + 1 and not found["skipped"]
    assert found["coverage"]["failed"] == found["coverage"]["unjudged"] == 0
    rows = {sample["task"]: sample for sample in samples(world, "native")}
    for task, row in rows.items():
        drawing = task.startswith("image_generation")
        assert len(row["pictures"]) == drawing, task
        assert len(row["token_ids"]) == 1024 if drawing else len(row["token_ids"]) <= 6
        assert all((world / "native" / name).stat().st_size > 1000 for name in row["pictures"])
        if row["metric"] == "similarity":
            assert -1 <= row["scores"]["strict"] <= 1 and row["scores"]["strict"] != 0
    assert rows["mm_out_pmc"]["image_similarity"] == {"medmax-v1": None, "strict": 0.0}
    assert found["clip"]["library"] == "transformers" and len(found["clip"]["sha256"]) == 64
    # One picture is no set.
    assert "fid" not in found["tasks"]["image_generation_quilt"]
    before = (world / "native" / "results.json").stat().st_mtime_ns
    run(world, "native", good.url, flags)
    assert (world / "native" / "results.json").stat().st_mtime_ns == before


def test_a_hugging_face_model_does_every_task_but_drawing(world, good):
    run(world, "hf", good.url, {"backend": "hf", "model": world / "llava", "limit": 2, "max_new_tokens": 8})
    found = results(world, "hf")
    assert len(found["tasks"]) == TASKS + 1 - 3 and set(found["skipped"]) == {
        f"image_generation_{source}" for source in ("pmc_oa", "quilt", "report")
    }
    assert found["backend"]["kind"] == "hf" and found["prompt_form"] == "chat" and found["coverage"]["failed"] == 0
    assert found["tasks"]["visual_chat_conversation"]["relative_score"] > 0
    assert len(found["hashes"]["checkpoint"]) == 64


def test_a_server_that_fails_gives_the_table_of_one_that_behaves(world, good, bad):
    failures = sum(bad.counts[kind] for kind in ("429", "500", "503", "closed"))
    nonsense = sum(count for kind, count in bad.counts.items() if kind.startswith("nonsense"))
    total = sum(bad.counts.values())
    assert 0.2 < failures / total < 0.4 and nonsense > 0 and bad.prose
    # It fails at most so many times in a row, and asks for no wait.
    assert len(bad.waits) >= failures + nonsense and max(bad.waits) < BACKOFF * 2**PATIENCE
    assert (world / "bad" / "samples.jsonl").read_bytes() == (world / "good" / "samples.jsonl").read_bytes()
    tables = [results(world, name) for name in ("good", "bad")]
    for table in tables:
        for part in ("backend", "judge"):
            assert re.fullmatch(r"http://127.0.0.1:\d+/v1", *table[part].pop("url"))
            assert table[part]["reported"] == [MODEL]
    assert tables[0] == tables[1] and 0.3 < tables[0]["average"] < 0.9
    # The judge and the model alike were asked again until they answered.
    assert tables[0]["coverage"]["failed"] == tables[0]["coverage"]["unjudged"] == 0


def test_killed_in_the_middle_it_pays_for_nothing_twice(world, good):
    """kill -9 of real processes while they wait for a server; what was answered is not asked for again."""

    def slow(body):
        time.sleep(0.03)
        return Assistant.__call__(good.answer, body)

    with serve(slow) as server:
        flags = arguments(world, "killed", server.url, **server_flags(server.url, batch_tokens=3000, concurrency=2))
        command = [sys.executable, "-m", "medmax_fast", *flags]
        for requests in (5, 30, 75):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            while len(server.requests) < requests and process.poll() is None:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        assert cli.main(flags) == 0
        bodies = [json.dumps(request["body"]) for request in server.requests if request["path"].endswith("completions")]
    # At most the two requests in flight, at each of three kills.
    assert len(bodies) - len(set(bodies)) <= 3 * 2
    assert (world / "killed" / "samples.jsonl").read_bytes() == (world / "good" / "samples.jsonl").read_bytes()
    assert results(world, "killed")["tasks"] == results(world, "good")["tasks"]


def test_a_judge_that_is_down_is_asked_again(world, good, capsys, monkeypatch):
    monkeypatch.setitem(ChatClient.__init__.__kwdefaults__, "backoff", 0.01)
    monkeypatch.setitem(ChatClient.__init__.__kwdefaults__, "tries", 2)
    flags = server_flags(good.url, tasks="vqa_rad_open,visual_chat_conversation")
    assistant = Assistant(world / "data")
    down = True

    def judge(body):
        refused = (503, {"error": {"message": "down for the night"}})
        return refused if down and body["messages"][0]["role"] == "system" else assistant(body)

    with serve(judge) as server:
        run(world, "down", server.url, flags)
        assert results(world, "down")["coverage"]["unjudged"] == 5
        assert results(world, "down")["tasks"]["vqa_rad_open"]["accuracy"] is None
        assert "the judge gave no verdict on 5 of 5 answers, the first: " in capsys.readouterr().err
        down = False
        run(world, "down", server.url, flags)
    found, whole = results(world, "down")["tasks"], results(world, "good")["tasks"]
    assert found == {task: whole[task] for task in found} and len(found) == 2


def test_a_judge_that_refuses_is_asked_once(world, capsys):
    """What it will not judge is counted and said, and the run is finished."""
    assistant = Assistant(world / "data")

    def judge(body):
        filtered = "computed tomography" in str(body)
        refused = (400, {"error": {"message": "content filter"}})
        return refused if body["messages"][0]["role"] == "system" and filtered else assistant(body)

    with serve(judge) as server:
        flags = server_flags(server.url, tasks="vqa_rad_open")
        run(world, "refused", server.url, flags)
        found = results(world, "refused")
        assert found["coverage"]["unjudged"] == 1 and found["tasks"]["vqa_rad_open"]["counted"] == 2
        assert "the judge gave no verdict on 1 of 3 answers, the first: " in found["notes"][0]
        assert "again" not in found["notes"][0]
        asked = len(server.requests)
        run(world, "refused", server.url, flags)
        assert len(server.requests) == asked


def test_a_budget_ends_a_run_and_a_larger_one_continues_it(world, good, capsys):
    asked = len(good.requests)
    flags = server_flags(good.url, tasks="vqa_rad_closed", price="1,1")
    run(world, "budget", good.url, {**flags, "judge_price": "1,1", "budget": 0.001}, status=2)
    assert re.search(r"--budget 0.001: the questions may cost about 0.008\d USD; raise it", capsys.readouterr().err)
    assert len(good.requests) == asked
    run(world, "budget", good.url, {**flags, "judge_price": "1,1", "budget": 1})
    assert results(world, "budget")["n"] == 8


def test_the_report_shows_them_all(world, good, bad):
    runs = [str(world / name) for name in ("good", "bad")]
    assert cli.main(["report", *runs, "--output", str(world / "report")]) == 0
    page = (world / "report" / "report.html").read_text()
    assert "<script" not in page and "visual_chat_conversation" in page and "served-model-1" in page
    text = (world / "report" / "report.md").read_text()
    assert "MedMax-7B (published)" in text.replace("\\", "") and "medmax-v1" in text
