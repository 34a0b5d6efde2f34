"""Which steps a run consists of, and the learning rate of each: functions of the configuration and a step's number."""

import math
from collections.abc import Iterator

from medmax_fast.config import TrainConfig
from medmax_fast.data.loader import PackedLoader, Step


def planned_total(loader: PackedLoader, config: TrainConfig) -> int:
    """Optimizer steps of the whole run."""
    total = sum(loader.steps_per_epoch(epoch) for epoch in range(config.epochs))
    return min(total, config.max_steps) if config.max_steps else total


def planned_steps(loader: PackedLoader, last: int, done: int) -> Iterator[tuple[int, int, Step]]:
    """(number, epoch, step) of what is left after `done` steps; numbers count from 1 over all epochs."""
    first = epoch = 0
    while first < last:
        count = loader.steps_per_epoch(epoch)
        if done < first + count:
            for step in loader.epoch_steps(epoch, max(done - first, 0)):
                number = first + step.index + 1
                if number > last:
                    return
                yield number, epoch, step
        first += count
        epoch += 1


def learning_rate(number: int, last: int, peak: float, warmup_ratio: float) -> float:
    """Rate of step `number` (1..last): a linear rise, then half a cosine; no step of either has a rate of zero."""
    warmup = math.ceil(last * warmup_ratio)
    before = number - 1
    if before < warmup:
        return peak * number / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (before - warmup) / (last - warmup)))
