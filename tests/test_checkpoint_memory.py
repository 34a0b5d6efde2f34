"""Memory of conversion and merging: that of the largest tensor with its copy, however large the model is."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medmax_fast.model.convert import write_checkpoint
from medmax_fast.model.init import RandomCheckpoint
from medmax_fast.model.layout import ModelShape, keys

SHAPE = ModelShape(dim=512, layers=24, heads=8, kv_heads=8, hidden=1408, vocab_size=16384)
# bf16, in MB: an embedding table, and the whole model.
LARGEST = 16384 * 512 * 2 / 1e6
WHOLE = sum(torch.empty(key.size(SHAPE), device="meta").numel() for key in keys(SHAPE.layers)) * 2 / 1e6
# A vocabulary as Python objects, buffers, the heap's own slack.
OTHER = 25

SCRIPT = """
    import json, sys, torch
    from medmax_fast.cli import main

    def status(name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024 / 1e6

    small, large = json.loads(sys.argv[1])
    # Imports and what they keep do not count.
    assert main(small) == 0
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    assert main(large) == 0
    print(json.dumps(status("VmHWM") - before))
"""


def write(folder, shape, shards):
    generator = torch.Generator().manual_seed(0)
    text = folder.parent / f"text of {folder.name}"
    text.mkdir(parents=True)
    write_checkpoint(RandomCheckpoint(text, shape, generator, torch.bfloat16), folder, "chameleon", shards)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small and a large checkpoint in four shards and in one file, and an adapter for each."""
    root = tmp_path_factory.mktemp("memory")
    for size, shape in (("small", ModelShape(64, 1, 4, 4, 192, 0)), ("large", SHAPE)):
        write(root / size / "four", shape, 4)
        write(root / size / "one", shape, 1)
        state = {}
        for key in keys(shape.layers):
            if "_proj." in key.hf:
                rows, columns = key.size(shape)
                name = f"base_model.model.{key.hf.removesuffix('.weight')}"
                state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = (
                    torch.ones(2, columns),
                    torch.ones(rows, 2),
                )
        (root / size / "adapter").mkdir()
        save_file(state, root / size / "adapter" / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
        (root / size / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return root


COMMANDS = {
    "four to hf": ("convert --input {}/four --output {}/a --to hf", 2),
    "one to hf": ("convert --input {}/one --output {}/b --to hf", 1),
    "one to four": ("convert --input {}/one --output {}/c --to chameleon --shards 4", 2),
    "merge": ("merge --ckpt {}/one --adapter {}/adapter --output {}/d --to hf", 2),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells how much memory was used")
@pytest.mark.parametrize("kind", COMMANDS)
def test_peak_is_that_of_the_largest_tensor(root, kind):
    command, copies = COMMANDS[kind]
    arguments = [command.replace("{}", str(root / size)).split() for size in ("small", "large")]
    run = [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps(arguments)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = float(done.stdout.splitlines()[-1])
    # What makes the test one: the model itself does not fit.
    assert 2 * (copies * LARGEST * 1.2 + OTHER) < WHOLE
    assert peak < copies * LARGEST * 1.2 + OTHER, (peak, WHOLE)
