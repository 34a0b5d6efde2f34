"""Evaluation runs with a scripted backend (restart, failures, several processes), and with the real engine."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from chat_server import serve
from eval_folder import CHAT, make_folder
from PIL import Image
from tiny_clip import make_clip

from medmax_fast.config import EvalConfig
from medmax_fast.eval import answering
from medmax_fast.eval import run as eval_run
from medmax_fast.eval.backends.protocol import Answer
from medmax_fast.eval.run import evaluate
from medmax_fast.runtime import InputError

# task_name, question_type, prompt, gold, image, what the scripted model answers
ROWS = [
    ("vqa_rad", "closed", "Is there a mass?", "yes", "images/a.png", " Yes"),
    ("vqa_rad", "closed", "Is it enlarged?", "no", "images/b.png", " normal"),
    ("vqa_rad", "closed", "Is it normal?", "no", "images/a.png", " yes"),
    ("pmc_vqa", "mcq", "Which? A: x B: y C: z D: w", "B", "images/b.png", " B"),
    ("pmc_vqa", "mcq", "What? A: x B: y C: z D: w", "A", "images/a.png", "A."),
    ("vqa_rad", "open", "What is shown?", "a lung", "images/a.png", "the lung"),
    ("image_captioning", "quilt", "", "A slide.", "images/b.png", "A slide."),
    ("mm_out", "pmc", "Draw it", "free text", "images/b.png", "text"),
    ("visual_chat", "conversation", "And this?", CHAT, "images/a.png", "A rib."),
]
OUTPUTS = {row[2] or "Please describe this picture.": row[5] for row in ROWS}


@dataclass
class Scripted:
    """Answers by the prompt's text; fails on images named in `broken`, and on prompts in `down` as a server would."""

    broken: tuple = ()
    down: tuple = ()
    stop_at: int | None = None
    draws: bool = True
    asked: list = field(default_factory=list)
    calls: int = 0

    def answer(self, asks, batch_size, done):
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.asked += asks
        done(len(asks))
        # Order must not matter.
        return [self._one(ask) for ask in asks][::-1]

    def _one(self, ask):
        *images, text = ask.content
        if images and Path(images[0]["path"]).name in self.broken:
            return Answer(ask.id, error=f"{images[0]['path']}: truncated")
        if text["text"] in self.down:
            return Answer(ask.id, error="server down", passing=True)
        content = [{"type": "text", "text": OUTPUTS[text["text"]]}]
        if ask.mode == "any":
            content.append({"type": "image", "pixels": np.full((8, 8, 3), 7, np.uint8)})
        return Answer(ask.id, content, [9000])

    def facts(self):
        return {"kind": "scripted", "model": "s", "usage": {"calls": self.calls}}


@pytest.fixture()
def config(tmp_path) -> EvalConfig:
    data = make_folder(tmp_path / "data", [row[:5] for row in ROWS])
    # Room for one image's questions: batches of several, of which there are several.
    return EvalConfig(data=str(data), output=str(tmp_path / "run"), clip="none", batch_tokens=1700)


def samples_of(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.output) / "samples.jsonl").read_text().splitlines()]


def results_of(config) -> dict:
    return json.loads((Path(config.output) / "results.json").read_text())


def files_of(config) -> dict[str, bytes]:
    return {name: (Path(config.output) / name).read_bytes() for name in ("samples.jsonl", "results.json")}


def batch_sizes(config) -> list[int]:
    files = sorted((Path(config.output) / "answers").glob("*.jsonl"))
    return [len(path.read_text().splitlines()) - 1 for path in files]


def test_results_by_hand(config):
    result = evaluate(config, Scripted())
    saved = results_of(config)
    assert {key: result[key] for key in saved} == saved
    rad, pmc = saved["tasks"]["vqa_rad_closed"], saved["tasks"]["pmc_vqa_mcq"]
    assert rad["accuracy"] == pytest.approx(2 / 3) and rad["by_protocol"]["strict"] == pytest.approx(1 / 3)
    assert rad["stderr"] == pytest.approx(1 / 3) and rad["n"] == rad["counted"] == 3 and rad["images"] == 2
    # Two questions of image a (right, wrong), one of b (right): residuals of the clusters are -1/3 and 1/3.
    assert rad["stderr_clustered"] == pytest.approx((2 * (1 / 9 + 1 / 9)) ** 0.5 / 3)
    assert rad["coverage"] == {"answered": 2, "unparsed": 1, "failed": 0, "unjudged": 0}
    assert rad["ci_method"] == "wilson" and rad["ci95"][0] < 2 / 3 < rad["ci95"][1]
    assert pmc["accuracy"] == 0.5 and pmc["by_protocol"]["strict"] == 1.0
    assert saved["average"] == pytest.approx((2 / 3 + 1 / 2) / 2) and saved["average_tasks"] == 2
    assert saved["average_by_protocol"]["strict"] == pytest.approx((1 / 3 + 1) / 2)
    # Shares of the mean: image a has (1 - 2 * 2/3) / 6 and (0 - 1/2) / 4, b the opposite.
    share = 1 / 18 + 1 / 8
    assert saved["average_stderr"] == pytest.approx((2 * 2 * share**2) ** 0.5)
    # The two intervals put together, wider by what the images do to both tasks alike.
    errors = [task["stderr_clustered"] for task in (rad, pmc)]
    wider = 2 * share / ((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)
    below, above = (wider * ((2 / 3 - rad["ci95"][k]) ** 2 + (1 / 2 - pmc["ci95"][k]) ** 2) ** 0.5 / 2 for k in (0, 1))
    assert wider > 1 and saved["average_ci95"] == pytest.approx([max(7 / 12 - below, 0), min(7 / 12 + above, 1)])
    assert saved["protocol"] == "medmax-v1" and saved["unit"] == "fraction" and saved["n"] == 9
    # Without a judge and an encoder: compared word by word.
    opened = saved["tasks"]["vqa_rad_open"]
    assert opened["accuracy"] is None and opened["counted"] == 0 and opened["text_metrics"]["exact_match"] == 1
    assert opened["text_metrics"]["token_recall"] == 1 and saved["tasks"]["mm_out_pmc"]["relative_score"] is None
    assert saved["tasks"]["image_captioning_quilt"]["text_metrics"]["exact_match"] == 1
    assert any("no judge" in note for note in saved["notes"])
    assert saved["groups"]["source"]["vqa_rad"]["n"] == 4 and saved["groups"]["source"]["pmc_vqa"]["accuracy"] == 0.5
    assert saved["backend"] == {"kind": "scripted", "model": "s", "draws": True} and saved["prompt_form"] == "tuned"
    assert all(len(saved["hashes"][name]) == 64 for name in ("data", "prompts", "images"))


def test_every_sample_is_logged(config):
    evaluate(config, Scripted())
    samples = samples_of(config)
    assert [sample["id"] for sample in samples][:2] == ["vqa_rad_closed-00000", "vqa_rad_closed-00001"]
    assert [sample["output"] for sample in samples] == [row[5] for row in ROWS]
    assert samples[1]["scores"] == {"medmax-v1": 1.0, "strict": 0.0} and samples[1]["status"] == "unparsed"
    (picture,) = samples[7]["pictures"]
    assert Image.open(Path(config.output) / picture).getpixel((0, 0)) == (7, 7, 7)


def test_a_failed_question_is_wrong_and_counted(config):
    result = evaluate(config, Scripted(broken=("b.png",)))
    rad = result["tasks"]["vqa_rad_closed"]
    assert rad["accuracy"] == pytest.approx(1 / 3) and rad["coverage"]["failed"] == 1
    assert result["coverage"]["failed"] == 3 and "truncated" in samples_of(config)[1]["error"]


def test_questions_of_a_server_that_was_down_are_asked_again(config, tmp_path, capsys):
    whole = replace(config, output=str(tmp_path / "whole"))
    evaluate(whole, Scripted())
    result = evaluate(config, Scripted(down=("Is it enlarged?", "Draw it")))
    assert result["coverage"]["failed"] == 2
    assert "2 of 9 questions got no answer, the first: vqa_rad_closed-00001: server down" in capsys.readouterr().err
    assert "the same command asks again" in result["notes"][0]
    backend = Scripted()
    evaluate(config, backend)
    # Only these, not those of the same batches that were answered.
    assert sum(batch_sizes(config)) == len(ROWS) and sorted(batch_sizes(config)) == [1, 3, 5]
    assert sorted(ask.content[-1]["text"] for ask in backend.asked) == ["Draw it", "Is it enlarged?"]
    assert files_of(config) == files_of(whole)


def test_restart_gives_the_same_files(config, tmp_path):
    whole = replace(config, output=str(tmp_path / "whole"))
    evaluate(whole, Scripted())
    for stop_at in (0, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(config, Scripted(stop_at=stop_at if stop_at < 2 else 0))
    backend = Scripted()
    evaluate(config, backend)
    assert 0 < len(backend.asked) < len(ROWS)
    assert files_of(config) == files_of(whole)
    # A third run asks nothing, so it needs no model that works.
    before = os.stat(Path(config.output) / "results.json").st_mtime_ns
    evaluate(config, Scripted(stop_at=0))
    assert os.stat(Path(config.output) / "results.json").st_mtime_ns == before


def test_scores_are_made_again_from_answers(config):
    evaluate(config, Scripted())
    first = files_of(config)
    for name in first:
        (Path(config.output) / name).unlink()
    evaluate(config, Scripted(stop_at=0))
    assert files_of(config) == first


class Slow(Scripted):
    """Takes its time, and writes down what it was asked."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def answer(self, asks, batch_size, done):
        time.sleep(0.2)
        with open(self.folder / f"asked-{os.getpid()}", "a") as file:
            file.writelines(f"{ask.id}\n" for ask in asks)
        return super().answer(asks, batch_size, done)


def work(config: EvalConfig, folder: Path, rank: int = 0, world: int = 1) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    evaluate(config, Slow(folder))


def asked(folder: Path) -> list[str]:
    return [line for path in folder.glob("asked-*") for line in path.read_text().splitlines()]


def start(*arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_work_and_give_the_same_files(config, tmp_path, world):
    alone = replace(config, output=str(tmp_path / "alone"))
    evaluate(alone, Scripted())
    processes = [start(config, tmp_path, rank, world) for rank in range(world)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(asked(tmp_path)) == sorted(sample["id"] for sample in samples_of(alone))
    assert files_of(config) == files_of(alone)


def test_killed_at_any_moment_it_ends_the_same(config, tmp_path):
    alone = replace(config, output=str(tmp_path / "alone"))
    evaluate(alone, Scripted())
    rng, kills = np.random.default_rng(), 0
    while kills < 40:
        process = start(config, tmp_path)
        process.join(float(rng.uniform(0.02, 0.5)))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    evaluate(config, Slow(tmp_path))
    assert files_of(config) == files_of(alone), kills
    counts = {name: asked(tmp_path).count(name) for name in asked(tmp_path)}
    # Each kill costs at most the batch under way.
    sizes = batch_sizes(config)
    assert len(sizes) > 2 and max(sizes) > 1
    assert len(counts) == len(ROWS) and sum(counts.values()) <= len(ROWS) + max(sizes) * kills


def test_a_killed_process_leaves_its_work_to_the_others(config, tmp_path):
    alone = replace(config, output=str(tmp_path / "alone"))
    evaluate(alone, Scripted())
    victim, survivor = start(config, tmp_path), start(config, tmp_path)
    time.sleep(0.3)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    survivor.join(60)
    assert survivor.exitcode == 0 and files_of(config) == files_of(alone)


def test_a_rank_that_starts_late_changes_nothing(config, tmp_path):
    """The first rank is done with what a server had left when the second one begins."""
    alone = replace(config, output=str(tmp_path / "alone"))
    evaluate(alone, Scripted())
    evaluate(config, Scripted(down=("Is it enlarged?",)))
    for rank in (0, 1, 1):
        process = start(config, tmp_path, rank, 2)
        process.join(60)
        assert process.exitcode == 0 and files_of(config) == files_of(alone)
    assert asked(tmp_path) == ["vqa_rad_closed-00001"]


def test_results_are_of_the_answers_that_are_there(config, tmp_path):
    """Answers that changed, by whomever, are scored again; half a rescue leaves no stale figure behind."""
    alone = replace(config, output=str(tmp_path / "alone"))
    evaluate(alone, Scripted())
    evaluate(config, Scripted(broken=("b.png",)))
    wrong = files_of(config)
    # As a message says that one may do.
    for path in (Path(config.output) / "answers").glob("*.jsonl"):
        path.unlink()
    assert files_of(config) == wrong
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, Scripted(stop_at=1))
    evaluate(config, Scripted())
    assert files_of(config) == files_of(alone)


def test_another_protocol_is_another_look_at_the_same_answers(config):
    evaluate(config, Scripted())
    strict = evaluate(replace(config, protocol="strict"), Scripted(stop_at=0))
    assert strict["average"] == pytest.approx((1 / 3 + 1) / 2) and results_of(config)["protocol"] == "strict"


def test_a_judge_may_come_later(config):
    """The answers stay; what only scores them may be another one, and each gives its own figures again."""
    evaluate(config, Scripted())
    alone = files_of(config)
    seen = []

    def judge(body):
        seen.append(body)
        return '{"correct": 1}' if '"correct"' in str(body) else '{"first": 8, "second": 4}'

    with serve(judge) as server:
        judged = replace(config, judge="openai", judge_url=server.url, judge_model="m")
        result = evaluate(judged, Scripted(stop_at=0))
        assert result["tasks"]["vqa_rad_open"]["accuracy"] == 1 and result["average_tasks"] == 3
        assert result["tasks"]["visual_chat_conversation"]["relative_score"] == 0.5
        with_judge, asked = files_of(config), len(seen)
        evaluate(config, Scripted(stop_at=0))
        assert files_of(config) == alone
        evaluate(judged, Scripted(stop_at=0))
        assert files_of(config) == with_judge and len(seen) == asked


def test_damaged_results_are_made_again(config):
    evaluate(config, Scripted())
    whole = files_of(config)
    for name, damage in (
        ("samples.jsonl", b"{}"),
        ("results.json", b"{broken"),
        ("results.json", b"[]"),
        ("samples.jsonl", None),
    ):
        path = Path(config.output) / name
        path.write_bytes(damage) if damage else path.unlink()
        evaluate(config, Scripted(stop_at=0))
        assert files_of(config) == whole


def test_nothing_is_scored_where_nothing_was_answered(config):
    down = Scripted(down=tuple(OUTPUTS))
    with pytest.raises(
        InputError, match="nothing to score: 9 of 9 questions got no answer, the first: .*: server down"
    ):
        evaluate(config, down)
    assert not (Path(config.output) / "results.json").exists()
    assert evaluate(config, Scripted())["coverage"]["failed"] == 0


def test_an_output_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        evaluate(replace(config, output=str(tmp_path / "file" / "x")), Scripted())


def test_rows_that_repeat_are_noted(config, tmp_path):
    data = make_folder(tmp_path / "twice", [row[:5] for row in (ROWS[0], ROWS[1], ROWS[0])])
    result = evaluate(replace(config, data=str(data), output=str(tmp_path / "o")), Scripted())
    assert result["notes"] == ["1 rows repeat an earlier one and count again, the first: vqa_rad_closed-00002"]


def test_each_protocol_averages_the_tasks_that_it_has(config, tmp_path):
    """Verdicts that cannot be read leave a task without a published accuracy, and with a strict one of 0."""
    rows = [ROWS[0][:5], ROWS[5][:5]]
    data = make_folder(tmp_path / "two", rows)
    with serve(lambda body: "no verdict of mine") as server:
        for protocol, tasks in (("medmax-v1", 1), ("strict", 2)):
            judge = {"judge": "openai", "judge_url": server.url, "judge_model": "m"}
            output = str(tmp_path / protocol)
            result = evaluate(replace(config, data=str(data), output=output, protocol=protocol, **judge), Scripted())
            assert result["average_by_protocol"] == {"medmax-v1": 1.0, "strict": 0.5}
            assert result["average_tasks"] == tasks and result["average"] == result["average_by_protocol"][protocol]
            assert result["tasks"]["vqa_rad_open"]["coverage"]["unparsed"] == 1
            assert "the judge's replies to 1 of 1 answers could not be read" in result["notes"][0]


def test_progress_is_shown_while_a_model_answers(config, monkeypatch):
    shown = []

    def update(self, done, note=str):
        if self.label == "eval (questions)":
            shown.append(done)

    monkeypatch.setattr(answering.Progress, "update", update)
    evaluate(config, Scripted())
    sizes = batch_sizes(config)
    # When a batch is kept, and before that as its answers come.
    assert shown[1::2] == np.cumsum(sizes).tolist() and len(shown) == 2 * len(sizes) > 4


def test_other_settings_or_data_are_refused(config):
    evaluate(config, Scripted())
    for changes, message in (
        ({"limit": 3}, "limit = 0, now 3"),
        ({"tasks": "pmc_vqa_mcq"}, "tasks = '', now 'pmc_vqa_mcq'"),
        ({"prompt_form": "base"}, "prompt_form = 'tuned', now 'base'"),
        ({"batch_tokens": 9}, "batch_tokens = 1700, now 9"),
    ):
        with pytest.raises(InputError, match=f"made with {message}"):
            evaluate(replace(config, **changes), Scripted())
    Image.new("RGB", (40, 30), "green").save(Path(config.data) / "images" / "a.png")
    with pytest.raises(InputError, match="made with sha256_images"):
        evaluate(config, Scripted())


def test_strict_protocol_and_selection(config):
    strict = replace(config, protocol="strict", tasks="pmc_vqa_mcq", limit=1)
    result = evaluate(strict, Scripted())
    assert list(result["tasks"]) == ["pmc_vqa_mcq"] and result["n"] == 1 and result["average"] == 1.0
    assert result["tasks"]["pmc_vqa_mcq"]["stderr"] is None and result["average_stderr"] is None
    limited = evaluate(replace(config, limit=2, output=config.output + "2"), Scripted())
    assert {task: row["n"] for task, row in limited["tasks"].items()}["vqa_rad_closed"] == 2


def test_what_a_run_cannot_do_is_said(config, tmp_path):
    rows = [row[:5] for row in ROWS] + [("image_generation", "quilt", "Draw", "", "")]
    drawing = replace(config, data=str(make_folder(tmp_path / "drawing", rows)), output=str(tmp_path / "d"))
    result = evaluate(drawing, Scripted(draws=False))
    assert result["skipped"]["image_generation_quilt"]["n"] == 1
    assert "does not draw" in result["skipped"]["image_generation_quilt"]["reason"]
    assert any("interleaved answers are text alone" in note for note in result["notes"])
    with pytest.raises(InputError, match="--tasks image_generation_quilt: .*does not draw"):
        evaluate(replace(drawing, tasks="image_generation_quilt"), Scripted(draws=False))
    result = evaluate(replace(drawing, output=str(tmp_path / "e")), Scripted())
    assert "no image-text encoder" in result["skipped"]["image_generation_quilt"]["reason"]


def test_gold_answers_in_another_case_are_noted(config, tmp_path):
    rows = [("vqa_rad", "closed", "Is there a mass?", gold, "images/a.png") for gold in ("Yes", "yes")]
    data = make_folder(tmp_path / "other", rows)
    result = evaluate(replace(config, data=str(data), output=str(tmp_path / "other run")), Scripted())
    assert result["tasks"]["vqa_rad_closed"]["by_protocol"] == {"medmax-v1": 0.5, "strict": 1.0}
    assert result["notes"] == [
        "1 gold answers are not written as yes, no or A to D exactly, the first 'Yes' of vqa_rad_closed-00000; "
        "medmax-v1 never counts such a row right"
    ]


def test_bad_flags(config, tmp_path):
    def refused(message, backend=None, **changes):
        with pytest.raises(InputError, match=message) as caught:
            evaluate(replace(config, **changes), backend)
        assert "\n" not in str(caught.value)

    refused("--protocol loose", protocol="loose")
    refused("--batch-size 0: expected 1 or more", batch_size=0)
    refused("--concurrency 0: expected 1 or more", concurrency=0)
    refused("--budget -1: expected 0 or more", budget=-1, ckpt="x")
    refused("--ckpt: missing, needed with --backend native")
    refused("--fid clip: there is no image-text encoder", Scripted(), fid="clip")
    refused("--ckpt .*: no such folder", ckpt=str(tmp_path / "none"))
    refused("no such folder", Scripted(), data=str(tmp_path / "none"))
    assert not Path(config.output).exists()
    with pytest.raises(InputError, match="--output .*: lies inside --ckpt, expected a folder of its own"):
        evaluate(replace(config, ckpt=str(tmp_path)))
    base = EvalConfig(config.data, config.output)
    for kind in ("hf", "openai"):
        other = replace(base, backend=kind)
        for changes, message in (
            ({"model": "m", "prompt_form": "base"}, f"--prompt-form base: --backend {kind} asks in turns"),
            ({}, f"--model: missing, needed with --backend {kind}"),
            ({"model": "m", "ckpt": "c"}, f"--ckpt goes with --backend native, found --backend {kind}"),
            ({"model": "m", "vqgan": "c"}, f"--vqgan goes with --backend native, found --backend {kind}"),
        ):
            with pytest.raises(InputError, match=message):
                evaluate(replace(other, **changes))
    for changes, message in (
        ({"model": "m"}, "--model goes with --backend hf or openai, found --backend native"),
        ({"ckpt": "c", "api_url": "http://x"}, "--api-url goes with --backend openai"),
        ({"ckpt": "c", "judge_prompts": "p.yaml"}, "--judge-prompts goes with --judge openai, found --judge none"),
        ({"ckpt": "c", "budget": 1.0}, "--budget: there is no server that costs anything"),
        ({"ckpt": "c", "budget": float("nan")}, "--budget nan: expected US dollars"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(replace(base, **changes))


def test_bad_data_is_named_before_a_model_is_looked_for(config, tmp_path):
    data = make_folder(tmp_path / "bad", [("vqa_rad", "closed", "Is it?", "perhaps", "images/a.png")])
    # The checkpoint exists but is none: reaching for it would be another error.
    with pytest.raises(InputError, match="row 0 .*: answer 'perhaps'"):
        evaluate(replace(config, data=str(data), ckpt=str(tmp_path / "bad")))
    assert not Path(config.output).exists()


@pytest.fixture(scope="module")
def real(golden, tmp_path_factory) -> EvalConfig:
    """Questions about two real images, one of which is cut off, for the golden checkpoint."""
    folder = tmp_path_factory.mktemp("real") / "data"
    folder.mkdir()
    (folder / "good.jpg").write_bytes((golden / "images" / "subsampled.jpg").read_bytes())
    # It exists, so it passes the check, but cannot be decoded.
    (folder / "truncated.jpg").write_bytes((golden / "images" / "gray.jpg").read_bytes()[:2000])
    names = ("task_name", "question_type", "prompt", "answer", "image_path")
    rows = [
        ("slake", "closed", "Is it?", "yes", "good.jpg"),
        ("path_mmu", "mcq", "Which one?", "A", "good.jpg"),
        ("slake", "closed", "And this?", "no", "truncated.jpg"),
        ("slake", "open", "What is it?", "a liver", "good.jpg"),
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    output = str(folder.parent / "together")
    ckpt = str(golden / "checkpoint")
    return EvalConfig(data=str(folder), output=output, ckpt=ckpt, device="cpu", max_new_tokens=4)


def test_with_the_real_engine(real, tmp_path):
    """A random model on real images: closed questions get one id, the same batched and one at a time."""
    result = evaluate(real)
    assert result["n"] == 4 and result["coverage"]["failed"] == 1 and len(result["hashes"]["checkpoint"]) == 64
    together = samples_of(real)
    assert [len(sample["token_ids"]) for sample in together[:3]] == [1, 1, 0] and 0 < len(together[3]["token_ids"]) <= 4
    assert [sample["error"] is None for sample in together] == [True, True, False, True]
    assert "truncated.jpg" in together[2]["error"]
    single = replace(real, output=str(tmp_path / "single"), batch_size=1, batch_tokens=1)
    evaluate(single)
    assert samples_of(single) == together
    assert results_of(single)["tasks"] == results_of(real)["tasks"]


def test_a_checkpoint_without_a_picture_decoder_does_the_rest(real, hf, tmp_path, monkeypatch):
    """It is known before weights are loaded, and the tasks are left out with a reason."""
    rows = [json.loads(line) for line in (Path(real.data) / "test.jsonl").read_text().splitlines()]
    drawing = {
        "task_name": "image_generation",
        "question_type": "quilt",
        "prompt": "Draw",
        "answer": "",
        "image_path": "",
    }
    data = tmp_path / "data"
    data.mkdir()
    (data / "good.jpg").write_bytes((Path(real.data) / "good.jpg").read_bytes())
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (rows[0], drawing)))
    ckpt = tmp_path / "ckpt"
    shutil.copytree(hf, ckpt)
    (ckpt / "vqgan_decoder.safetensors").unlink()
    folder = make_clip(tmp_path / "clip")
    config = replace(real, data=str(data), ckpt=str(ckpt), output=str(tmp_path / "run"), clip=str(folder))
    result = evaluate(config)
    assert list(result["tasks"]) == ["slake_closed"] and result["backend"]["draws"] is False
    assert "no VQGAN decoder" in result["skipped"]["image_generation_quilt"]["reason"]
    with pytest.raises(InputError, match="--tasks image_generation_quilt: .* no VQGAN decoder"):
        evaluate(replace(config, tasks="image_generation_quilt", output=str(tmp_path / "none")))


def test_one_new_id_costs_no_decode_step(real, monkeypatch, tmp_path):
    """Closed and mcq questions are answered by their prefill: the engine decodes nothing."""
    from medmax_fast.generate.steps import Steps

    steps = []
    monkeypatch.setattr(Steps, "decode", lambda self, slots: steps.append(slots))
    evaluate(replace(real, output=str(tmp_path / "run"), tasks="slake_closed,path_mmu_mcq"))
    assert steps == []


@pytest.mark.gpu
def test_a_gpu_gives_the_answers_of_the_cpu(real, tmp_path):
    if not Path(real.output, "results.json").exists():
        evaluate(real)
    config = replace(real, output=str(tmp_path / "run"), device="cuda", precision="fp32")
    evaluate(config)
    assert [row["token_ids"] for row in samples_of(config)] == [row["token_ids"] for row in samples_of(real)]


def test_under_torchrun(real, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "medmax_fast", "eval"]
    flags = {"data": real.data, "ckpt": real.ckpt, "output": str(tmp_path / "run"), "device": "cpu"}
    flags |= {"max-new-tokens": "4"}
    command += [part for name, value in flags.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["n"] == 4 and done.stdout.count('"tasks"') == 1
    other = replace(real, output=str(tmp_path / "run"))
    if not Path(real.output, "results.json").exists():
        evaluate(real)
    assert files_of(other) == files_of(real)


def test_a_run_that_is_scored_elsewhere_is_waited_for(config, tmp_path, monkeypatch):
    """Two processes finish together: one scores, the other reads what it wrote."""
    monkeypatch.setattr(eval_run, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(answering, "POLL_SECONDS", 0.05)
    processes = [start(config, tmp_path) for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(samples_of(config)) == len(ROWS)
