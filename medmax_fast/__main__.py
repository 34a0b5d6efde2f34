"""`python -m medmax_fast`, which launchers that start modules need: `torchrun ... -m medmax_fast train ...`."""

from medmax_fast.cli import entry

if __name__ == "__main__":
    entry()
