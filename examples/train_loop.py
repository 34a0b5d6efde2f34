"""A plain PyTorch training loop over packed rows: our loader, our attention, our loss, and nothing else.

    python examples/train_loop.py STORE CHECKPOINT [--steps 20] [--lr 1e-3]

STORE is made by `medmax build`. All weights are trained, in fp32, and the loss of each step is printed. `medmax train`
adds to this: DeepSpeed, adapters, 16-bit arithmetic, several ranks, checkpoints.
"""

import argparse
import itertools

import torch

from medmax_fast import PackedLoader, TokenStore, load_model, packed_loss
from medmax_fast.runtime import pick_device


def train(store: str, checkpoint: str, steps: int = 20, lr: float = 1e-3, packs_per_step: int = 4) -> list[float]:
    """Train for some optimizer steps; returns the mean loss per supervised id of each."""
    device = pick_device("auto")
    model = load_model(checkpoint, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    loader = PackedLoader(TokenStore(store), pack_length=4096, packs_per_step=packs_per_step, seed=0)
    # Epoch after epoch, each in an order of its own.
    stream = itertools.chain.from_iterable(loader.epoch_steps(epoch) for epoch in itertools.count())
    losses = []
    for step in itertools.islice(stream, steps):
        if step.target_tokens == 0:
            continue
        total = 0.0
        for batch in step.batches:
            # The last step of an epoch may have fewer packs.
            if batch is None:
                continue
            loss = packed_loss(model, batch.to_torch(device))
            # Summed losses over the targets of the whole step: how rows were packed makes no difference.
            (loss / step.target_tokens).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / step.target_tokens)
        print(f"step {len(losses):4d}  loss {losses[-1]:.4f}  targets {step.target_tokens}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a checkpoint on a token store with plain PyTorch.")
    parser.add_argument("store", help="token store made by `medmax build`")
    parser.add_argument("checkpoint", help="checkpoint folder, in either layout")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    arguments = parser.parse_args()
    train(arguments.store, arguments.checkpoint, arguments.steps, arguments.lr)
