"""Logits and scores against the reference, through the model and through the command, on a GPU as on a CPU."""

import json

import numpy as np
import pytest
import torch

from medmax_fast.cli import main
from medmax_fast.data.collate import collate
from medmax_fast.model.load import load_model
from medmax_fast.model.loss import packed_hidden


@pytest.fixture(scope="module")
def expected(golden):
    return json.loads((golden / "logits.json").read_text())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_packed_logits_equal_the_reference(golden, expected, device):
    rows = [json.loads(line)["tokens"][:2048] for line in (golden / "sequences.jsonl").read_text().splitlines()]
    ids = np.concatenate(rows).astype(np.uint16)
    offsets = np.cumsum([0] + [len(row) for row in rows]).astype(np.int64)
    # All five rows in one pack, in another order than the file's.
    order = [3, 0, 4, 1, 2]
    batch = collate(ids, offsets, np.array(order), 8710)
    model = load_model(golden / "checkpoint", device)
    # torch's default, which leaves TF32 out of fp32 products on a GPU.
    assert torch.get_float32_matmul_precision() == "highest"
    with torch.inference_mode():
        hidden = packed_hidden(model, batch.to_torch(device))
        for i, row in enumerate(order):
            start, answer = int(batch.cu_seqlens[i]), expected[row]
            for p, top, values, total in zip(
                answer["positions"], answer["top5_ids"], answer["top5_logits"], answer["logsumexp"], strict=True
            ):
                logits = model.lm_head(hidden[start + p]).cpu()
                assert logits.topk(5).indices.tolist() == top
                torch.testing.assert_close(logits[top], torch.tensor(values), rtol=0, atol=1e-4)
                assert abs(logits.logsumexp(0).item() - total) < 1e-4


# A GPU adds up in another order: an ulp of a logit near 10 is 1e-7 of it, and of each of the losses that a row sums.
@pytest.mark.parametrize(("device", "relative"), [("cpu", 1e-6), pytest.param("cuda", 4e-6, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("pack_length", ["4096", "100"])
def test_score_command_equals_the_reference(golden, expected, tmp_path, capsys, pack_length, device, relative):
    command = ["score", "--ckpt", str(golden / "checkpoint"), "--input", str(golden / "sequences.jsonl")]
    command += ["--device", device, "--precision", "fp32", "--pack-length", pack_length]
    assert main([*command, "--output", str(tmp_path / "o.jsonl")]) == 0
    found = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["row"] for row in found] == list(range(5))
    for row, answer in zip(found, expected, strict=True):
        assert row["target_tokens"] == answer["target_tokens"]
        assert row["loss_sum"] == pytest.approx(answer["loss_sum"], rel=relative)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cut"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"tokens": [0, 10212]}', "id 10212 is outside the vocabulary of 10212"),
        ('{"tokens": []}', "tokens is not a list of integers"),
        ('{"text": "x"}', "tokens"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_rows(golden, tmp_path, capsys, line, message):
    (tmp_path / "rows.jsonl").write_text('{"tokens": [0, 8710, 9000]}\n' + line + "\n")
    command = ["score", "--ckpt", str(golden / "checkpoint"), "--input", str(tmp_path / "rows.jsonl")]
    assert main([*command, "--output", str(tmp_path / "o.jsonl")]) == 2
    error = capsys.readouterr().err
    assert message in error and "line 2" in error and error.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()
