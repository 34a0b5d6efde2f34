"""`medmax eval`: ask a model the questions of an evaluation folder, log every answer, score both ways.

The data is checked before a model is loaded. Questions go to the engine in batches, in the order of the file, as
[bos, image, question, eot], greedy with repetition penalty 1.2 and one new id. Each batch's answers are appended to
samples.jsonl and synced to disk before the next is asked, so a killed run repeats at most one batch and ends with
the same files. results.json is computed from samples.jsonl alone. Accuracies are fractions 0..1.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Protocol

from medmax_fast.config import EvalConfig, settings_of
from medmax_fast.eval.published import PUBLISHED
from medmax_fast.eval.scoring import PROTOCOLS, plain_mean, score, task_result
from medmax_fast.eval.tasks import GOLD, EvalData, Question, load_questions
from medmax_fast.runtime import InputError, hash_file, log, open_output, progress, rank_and_world, versions, write_json

SAMPLES_FILE = "samples.jsonl"
RESULTS_FILE = "results.json"
# What the published evaluation used for every task of this version.
PROMPT_FORM = "[bos, image, question, eot]"
REPETITION_PENALTY = 1.2


class Answers(Protocol):
    """What a backend offers: one result per request, each with `id`, `content` pieces, `token_ids` and `error`."""

    def generate(self, requests: list, batch_size: int) -> list:
        """Answer all requests; a request that cannot be answered gets an `error`, the others go on."""


def evaluate(config: EvalConfig, engine: Answers | None = None) -> dict:
    """Run or continue an evaluation; returns what results.json holds, with a summary table.

    `engine` is used instead of one opened from `config.ckpt`. InputError for bad data or settings, before any model
    is loaded; a question whose image cannot be read counts as wrong and under `failed`.
    """
    if config.protocol not in PROTOCOLS:
        raise InputError(f"--protocol {config.protocol}: expected {' or '.join(PROTOCOLS)}")
    if config.batch_size < 1:
        raise InputError(f"--batch-size {config.batch_size}: expected at least 1")
    if rank_and_world()[1] > 1:
        raise InputError("medmax eval: runs as one process; start it without torchrun or deepspeed")
    if engine is None and not config.ckpt:
        raise InputError("--ckpt: missing, needed with --backend native")
    data = load_questions(config.data, config.tasks, config.limit)
    hashes = _hashes(data, config.ckpt)
    settings = settings_of(config, "ckpt", "backend", "tasks", "limit", "protocol", "precision")
    # The prefix sorts behind the flags, so that a changed flag is named before the hashes that it changes.
    folder = open_output(config.output, "eval", {**settings, **{f"sha256_{k}": v for k, v in hashes.items()}})
    done = read_samples(folder / SAMPLES_FILE, data.questions)
    todo = [question for question in data.questions if question.id not in done]
    if todo:
        if done:
            log(f"eval: {len(done)} of {len(data.questions)} questions are already answered in {folder}")
        _ask(todo, engine or _open_engine(config), config.batch_size, folder / SAMPLES_FILE)
        done = read_samples(folder / SAMPLES_FILE, data.questions)
    results = {
        **summarize([done[question.id] for question in data.questions], config.protocol),
        "skipped": data.skipped,
        "notes": _notes(data),
        "data": str(data.folder.resolve()),
        **settings_of(config, "ckpt", "backend", "limit"),
        "prompt_form": PROMPT_FORM,
        "hashes": hashes,
        "versions": versions(),
    }
    write_json(folder / RESULTS_FILE, results)
    return {"output": str(folder), **results, "summary": _summary_table(results)}


def read_samples(path: Path, questions: list[Question]) -> dict[str, dict]:
    """Answers logged so far, by question id; a last line that a killed run left unfinished is cut off the file."""
    if not path.exists():
        return {}
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    known = {question.id for question in questions}
    samples = {}
    # Not as text, where an answer may hold other ends of lines.
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            sample = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {number}: not valid JSON ({error})") from error
        if sample["id"] not in known or sample["id"] in samples:
            raise InputError(f"{path}: line {number}: id {sample['id']!r} is unknown or given twice")
        samples[sample["id"]] = sample
    return samples


def summarize(samples: list[dict], protocol: str) -> dict:
    """The figures of results.json from samples in data order: per task, and their plain mean under both protocols."""
    by_task = {}
    for sample in samples:
        by_task.setdefault(sample["task"], []).append(sample)
    tasks = {task_id: task_result(group, protocol) for task_id, group in by_task.items()}
    averages = {name: plain_mean([task["by_protocol"][name] for task in tasks.values()]) for name in PROTOCOLS}
    return {
        "protocol": protocol,
        "unit": "fraction",
        "average": averages[protocol],
        "average_tasks": len(tasks),
        "average_by_protocol": averages,
        "n": len(samples),
        "unparsed": sum(task["unparsed"] for task in tasks.values()),
        "failed": sum(task["failed"] for task in tasks.values()),
        "tasks": tasks,
    }


def _ask(questions: list[Question], engine: Answers, batch_size: int, path: Path) -> None:
    from medmax_fast.generate.requests import Request

    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    with open(path, "a", encoding="utf-8") as file:
        for batch in progress(batches, "eval batches"):
            requests = [
                Request(
                    id=question.id,
                    content=[
                        {"type": "image", "path": str(question.path)},
                        {"type": "text", "text": question.prompt},
                    ],
                    mode="text",
                    greedy=True,
                    repetition_penalty=REPETITION_PENALTY,
                    max_new_tokens=question.task.new_tokens,
                )
                for question in batch
            ]
            results = {result.id: result for result in engine.generate(requests, batch_size=batch_size)}
            assert results.keys() == {question.id for question in batch}, "the backend lost or invented answers"
            for question in batch:
                file.write(json.dumps(_sample(question, results[question.id]), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _sample(question: Question, result) -> dict:
    pieces = [] if result.error else result.content
    output = "".join(piece["text"] for piece in pieces if piece["type"] == "text")
    verdict = score(question.task.score, question.answer, output)
    return {
        "id": question.id,
        "task": question.task_id,
        "question": question.prompt,
        "answer": question.answer,
        "output": output,
        # A question that could not be asked is wrong even where an empty output would match nothing anyway.
        "correct": {name: verdict[name] and not result.error for name in PROTOCOLS},
        "parsed": verdict["parsed"],
        "error": result.error,
        "image": question.image,
        "token_ids": [] if result.error else [int(i) for i in result.token_ids],
    }


def _open_engine(config: EvalConfig) -> Answers:
    from medmax_fast.generate.engine import Engine

    return Engine.from_checkpoint(config.ckpt, device=config.device, precision=config.precision)


def _hashes(data: EvalData, ckpt: str) -> dict:
    """SHA-256 of everything that the answers depend on; of the checkpoint, every file's name and content."""
    prompts, images = hashlib.sha256(PROMPT_FORM.encode()), hashlib.sha256()
    for question in data.questions:
        prompts.update(json.dumps([question.id, question.prompt, question.answer, question.image]).encode())
    for path in sorted({question.path for question in data.questions}):
        images.update(bytes.fromhex(hash_file(path)))
    hashes = {"data": data.sha256, "prompts": prompts.hexdigest(), "images": images.hexdigest(), "checkpoint": None}
    if ckpt:
        weights, root = hashlib.sha256(), Path(ckpt)
        if not root.is_dir():
            raise InputError(f"--ckpt {ckpt}: no such folder")
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            weights.update(f"{path.relative_to(root)}\n{hash_file(path)}\n".encode())
        hashes["checkpoint"] = weights.hexdigest()
    return hashes


def _notes(data: EvalData) -> list[str]:
    odd = sum(question.answer not in GOLD[question.task.score] for question in data.questions)
    if not odd:
        return []
    return [f"{odd} gold answers are not written as yes, no or A to D exactly; medmax-v1 never counts such a row right"]


def _summary_table(results: dict) -> list[dict]:
    """One row per task in percent, for people, with MedMax-7B's published figure beside ours."""
    published = PUBLISHED["MedMax-7B"]["tasks"]
    rows = []
    for task_id, task in results["tasks"].items():
        low, high = task["ci95"]
        rows.append(
            {
                "task": task_id,
                "n": task["n"],
                "accuracy %": round(100 * task["accuracy"], 1),
                "95 % interval": f"{100 * low:.1f}-{100 * high:.1f}",
                **{f"{name} %": round(100 * task["by_protocol"][name], 1) for name in PROTOCOLS},
                "unparsed": task["unparsed"],
                "failed": task["failed"],
                "MedMax-7B published %": published.get(task_id, ""),
            }
        )
    return rows
