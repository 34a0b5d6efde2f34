"""`medmax eval`: ask a model the questions of an evaluation folder, keep every answer, score them both ways.

The data is checked before a model is loaded. Questions go to the model in batches, each of which is on disk before its
process begins another (eval/answers.py); any number of processes, under torchrun, deepspeed or started by hand, share
the batches of one folder by file locks. One of them then scores: verdicts and similarities come from the answers alone,
samples.jsonl and results.json from all three, so the files do not depend on who did what, or how often it was
interrupted. results.json names the answers that it was made from; where they have changed since, it is made again.
"""

import hashlib
import time
from pathlib import Path

from medmax_fast.config import EvalConfig, settings_of
from medmax_fast.data.claims import Claims
from medmax_fast.eval.answering import POLL_SECONDS, Answering, stable
from medmax_fast.eval.answers import Answers, write_lines
from medmax_fast.eval.asking import OPEN_END, ask_of, batches, prompts_hash
from medmax_fast.eval.backends.protocol import Backend
from medmax_fast.eval.distances import Features, distances, open_features
from medmax_fast.eval.judge import estimate
from medmax_fast.eval.notes import run_notes
from medmax_fast.eval.opening import (
    REPLIES,
    batch_budget,
    can_draw,
    check_flags,
    encoder_name,
    hash_path,
    lacking,
    model_hash,
    open_servers,
    precision_name,
    prompt_form,
)
from medmax_fast.eval.questions import EvalData, load_questions
from medmax_fast.eval.results import summarize, summary_table
from medmax_fast.eval.samples import Given, Measured, Similarities, judge_cases, make_sample, similarities
from medmax_fast.eval.similarity import Encoder, available, open_encoder
from medmax_fast.files import hash_file, open_output, read_object, write_json
from medmax_fast.progress import Progress
from medmax_fast.runtime import InputError, comma_list, kept, log, pick_device, rank_and_world, versions

SAMPLES_FILE = "samples.jsonl"
RESULTS_FILE = "results.json"


def evaluate(config: EvalConfig, backend: Backend | None = None) -> dict:
    """Run or continue an evaluation; returns what results.json holds, with a summary table and what servers cost.

    config: the flags of the command. `backend` is asked instead of one opened from the flags. InputError for bad data
    or settings, before any model is loaded; a question that gets no answer counts under `failed`, and the others go on.
    """
    check_flags(config, backend)
    missing_parts = lacking(config, backend)
    data = load_questions(config.data, config.tasks, config.limit, missing_parts)
    if backend is None and any(q.task.kind == "drawing" for q in data.questions) and not can_draw(config):
        reason = f"{config.ckpt} has no VQGAN decoder, so it cannot draw; --vqgan gives it one"
        data = load_questions(config.data, config.tasks, config.limit, {**missing_parts, "drawing": reason})
    run = EvalRun(config, data, backend)
    with kept(run.answering.kept):
        return run.run()


class EvalRun:
    """One process's part in an evaluation."""

    def __init__(self, config: EvalConfig, data: EvalData, backend: Backend | None):
        self.config, self.data = config, data
        self.form, self.encoder_name = prompt_form(config), encoder_name(config)
        self.asks = [ask_of(question, self.form, config.max_new_tokens) for question in data.questions]
        self.hashes = {
            "data": data.sha256,
            "prompts": prompts_hash(data, self.asks),
            "images": _images_hash(data),
            "checkpoint": model_hash(config),
            **({"vqgan": hash_path(config.vqgan)} if config.vqgan else {}),
        }
        self.servers = open_servers(config, Path(config.output) / REPLIES)
        self._kinds = {question.task.kind for question in data.questions}
        self.encoder: Encoder | None = None
        self._features: Features | None = None
        self.scoring = self._scoring()
        self.folder = open_output(config.output, "eval", self._settings())
        plan = [[self.asks[i] for i in batch] for batch in batches(data, self.asks, batch_budget(config))]
        self.answers = Answers(self.folder, [[ask.id for ask in batch] for batch in plan])
        self.answering = Answering(config, plan, self.answers, self.servers, backend)

    def run(self) -> dict:
        """Answer what is left, then score, or wait for the process that does."""
        if rank_and_world()[0]:
            # The first rank asks again, scores and reports.
            with Claims(self.answers.claims_path) as claims:
                self.answering.work(claims, {})
            return {}
        again = self.answers.to_ask_again()
        results = None if again else self._finished()
        if results is None:
            # Opened before the model answers for hours only to find that there is no encoder.
            self._open_measures()
            with Claims(self.answers.claims_path) as claims:
                self.answering.work(claims, again, self._expected_judge())
                while not claims.take(len(self.answers)):
                    time.sleep(POLL_SECONDS)
                # Another process started by hand may have been faster.
                results = self._finished() or self._score()
        for task_id, row in results["skipped"].items():
            log(f"eval: left out: {task_id}, {row['n']} rows: {row['reason']}")
        for note in results["notes"]:
            log(f"eval: note: {note}")
        usage = self.servers.meter.usage()
        cost = {"servers": usage} if usage["calls"] or usage["cached"] else {}
        about = {"output": str(self.folder), "model": results["backend"].get("model")}
        # The table says the rest.
        hidden = [name for name, value in results.items() if not isinstance(value, list | dict) and name != "protocol"]
        return {**about, **results, **cost, "summary": summary_table(results), "printed": hidden}

    def _finished(self) -> dict | None:
        """results.json, if it and samples.jsonl are of the answers that are there and no verdict is awaited."""
        path, samples = self.folder / RESULTS_FILE, self.folder / SAMPLES_FILE
        if self.answers.left() or not path.exists() or not samples.exists():
            return None
        try:
            results = read_object(path)
        except InputError:
            results = None
        made_from = {"answers": self.answers.digest(), "samples": hash_file(samples)}
        expected = {"hashes": {**self.hashes, **made_from}, "scoring": self.scoring, "awaited": 0}
        # It is made from what is here, so a damaged one is made again.
        same = isinstance(results, dict) and all(results.get(name) == value for name, value in expected.items())
        return results if same else None

    def _open_measures(self) -> None:
        """The image-text encoder and what FID needs, where there are questions for them."""
        device = pick_device(self.config.device)
        if self.encoder_name != "none" and self._kinds & {"caption", "drawing", "interleaved"}:
            self.encoder = open_encoder(self.encoder_name, device)
        if "drawing" in self._kinds:
            self._features = open_features(self.config.fid, self.encoder, device)

    # ---- scores ----

    def _expected_judge(self) -> dict | None:
        """What judging will take, before there are answers: as if each were as long as it may be."""
        if self.servers.judge is None:
            return None
        answers = {ask.id: Given("word " * (ask.new_tokens or OPEN_END)) for ask in self.asks}
        cases = judge_cases(self.data.questions, answers)
        return estimate(cases, self.servers.judge.prompts, self.servers.judge_prices)

    def _score(self) -> dict:
        """samples.jsonl and results.json from the answers; InputError where no question has one."""
        digest = self.answers.digest()
        facts, answers = self.answers.read()
        measured = Measured(self._judge(answers), self._compare(answers))
        samples = [make_sample(question, self.data, answers[question.id], measured) for question in self.data.questions]
        notes = run_notes(self.data, facts, answers, measured)
        if all(answers[sample["id"]].error is not None for sample in samples):
            raise InputError(f"nothing to score: {notes[0]}")
        results = {**summarize(samples, self.config.protocol), **self._facts(facts, notes)}
        if self._features:
            for task_id, found in self._distances(answers, self._features).items():
                results["tasks"][task_id]["fid"] = found
        write_lines(self.folder / SAMPLES_FILE, samples)
        made_from = {"answers": digest, "samples": hash_file(self.folder / SAMPLES_FILE)}
        write_json(self.folder / RESULTS_FILE, {**results, "hashes": {**self.hashes, **made_from}})
        return read_object(self.folder / RESULTS_FILE)

    def _judge(self, answers: dict[str, Given]) -> dict | None:
        cases = judge_cases(self.data.questions, answers)
        if self.servers.judge is None:
            return None
        if cases:
            self.servers.announce("the judge", estimate(cases, self.servers.judge.prompts, self.servers.judge_prices))
        with Progress("eval (verdicts)", len(cases)) as bar:
            return self.servers.judge.verdicts(cases, lambda: bar.update(bar.done + 1))

    def _compare(self, answers: dict[str, Given]) -> Similarities | None:
        if self.encoder is None:
            return None
        folders = {"data": self.data.folder, "run": self.folder}
        return similarities(self.data.questions, answers, folders, self.encoder)

    def _distances(self, answers: dict[str, Given], features: Features) -> dict[str, dict]:
        """FID and KID per task of drawings, between the pictures drawn and the images of its rows."""
        found = {}
        for task_id in dict.fromkeys(q.task_id for q in self.data.questions if q.task.kind == "drawing"):
            rows = [q for q in self.data.questions if q.task_id == task_id]
            drawn = [self.folder / name for q in rows for name in answers[q.id].pictures]
            measured = distances([q.path for q in rows if q.path], drawn, features)
            if measured:
                found[task_id] = measured
            else:
                log(f"eval: {task_id}: no FID, which takes at least two pictures drawn and two to compare with")
        return found

    # ---- facts ----

    def _settings(self) -> dict:
        """What answers depend on."""
        return {
            **settings_of(self.config, "ckpt", "vqgan", "backend", "model", "limit", "max_new_tokens", "batch_tokens"),
            "precision": precision_name(self.config),
            "prompt_form": self.form,
            "tasks": ",".join(sorted(comma_list(self.config.tasks))),
            # The prefix sorts behind the flags, so that a changed flag is named before the hashes that it changes.
            **{f"sha256_{name}": value for name, value in self.hashes.items()},
        }

    def _scoring(self) -> dict:
        """What scores depend on besides: other values make results.json again from the same answers."""
        judge = self.servers.judge
        return {
            **settings_of(self.config, "protocol", "judge", "fid"),
            "judge_model": judge and judge.client.model,
            "judge_prompts": judge and judge.prompts.sha256,
            "clip": self.encoder_name,
            "clip_sha256": hash_path(self.encoder_name),
        }

    def _facts(self, backend: dict, notes: list[str]) -> dict:
        """What results.json says beside figures."""
        judge = self.servers.judge
        if self.config.fid != "none" and not self._features:
            notes = [*notes, "no FID: no question asks for a picture"]
        # Of other tasks only drawings need one, and these are left out with a reason of their own.
        if self.config.clip == "auto" and self.encoder_name == "none" and self._kinds & {"caption", "interleaved"}:
            notes = [*notes, f"no image-text similarities: {available()}"]
        return {
            "skipped": self.data.skipped,
            "notes": notes,
            "data": str(self.data.folder.resolve()),
            **settings_of(self.config, "ckpt", "limit"),
            "backend": backend,
            "judge": stable(judge.facts()) if judge else None,
            "clip": self.encoder.facts() if self.encoder else None,
            "prompt_form": self.form,
            "scoring": self.scoring,
            "versions": versions(),
        }


def _images_hash(data: EvalData) -> str:
    return hashlib.sha256("".join(sorted(set(data.images.values()))).encode()).hexdigest()
