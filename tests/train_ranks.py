"""Run by test_train.py under torchrun: several trainings on every rank, one process start for all of them.

    torchrun --nproc-per-node 2 train_ranks.py PLAN

PLAN is a JSON file: a list of {"config": TrainConfig fields, "interrupt_after": logged step or 0}. The last one goes
through the command line, so that its result is the last line of standard output.
"""

import json
import sys
from pathlib import Path

from medmax_fast import cli
from medmax_fast.config import TrainConfig
from medmax_fast.runtime import leave
from medmax_fast.train import train
from medmax_fast.training.run import Run


def flags(config: dict) -> list[str]:
    """A configuration as command-line arguments."""
    words = []
    for name, value in config.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return words


def main() -> None:
    runs = json.loads(Path(sys.argv[1]).read_text())
    log = Run._log
    for run in runs[:-1]:

        def interrupted(self, record, *rest, after=run["interrupt_after"]):
            log(self, record, *rest)
            if record["step"] == after:
                raise KeyboardInterrupt

        Run._log = interrupted
        try:
            train(TrainConfig(**run["config"]))
        except KeyboardInterrupt:
            assert run["interrupt_after"]
    Run._log = log
    leave(cli.main(["train", *flags(runs[-1]["config"])]))


if __name__ == "__main__":
    main()
