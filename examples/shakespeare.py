"""Trains a small GPT with tied embeddings on text, while CABS sets the batch size.

    python examples/shakespeare.py --text DIR/tinyshakespeare/input.txt
    python examples/shakespeare.py --text any.txt --steps 50 --layers 2

Leaves the run log, run.jsonl, and a figure, run.png, in the folder given by --out.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import cabs
import cabs_torch
from cabs.plot import plot_run


class Block(nn.Module):
    """Attention to what came before, and a small network at each position."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (m, T, width) to the same shape."""
        packed = self.query_key_value(self.first(hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(seen.transpose(1, 2).flatten(2))
        return hidden + self.network(self.second(hidden))


class GPT(nn.Module):
    """Predicts the next character; the table of characters is also the matrix at the end."""

    def __init__(self, characters: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, characters, bias=False)
        nn.init.normal_(self.characters.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.out.weight = self.characters.weight

    def forward(self, text: Tensor) -> Tensor:
        """Map (m, T) characters to (m, T, characters) scores of the next ones."""
        hidden = self.characters(text) + self.places(torch.arange(text.shape[1]))
        return self.out(self.norm(self.blocks(hidden)))


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="a file of plain text")
    parser.add_argument("--learning-rate", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--length", type=int, default=32, help="characters in an example")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/shakespeare"))
    return parser.parse_args()


def windows(path: Path, length: int) -> tuple[Tensor, int]:
    """Return a text as examples, shape (n, length + 1), and how many characters there are."""
    if not path.exists():
        raise SystemExit(f"there is no {path}; --text must be a file of plain text")
    characters, codes = np.unique(list(path.read_text(encoding="utf-8")), return_inverse=True)
    count = (len(codes) - 1) // length
    if count < 2:
        raise SystemExit(f"{path} must hold more than {2 * length} characters, got {len(codes)}")
    starts = np.arange(count)[:, None] * length
    return torch.from_numpy(codes[starts + np.arange(length + 1)]), len(characters)


def main() -> None:
    """Train, show progress, and leave the log and the figure."""
    options = arguments()
    torch.manual_seed(options.seed)
    examples, characters = windows(options.text, options.length)
    model = GPT(characters, options.length, options.width, options.heads, options.layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate)

    # An example is many characters, whose gradients are averaged: few examples are enough.
    sizes = cabs.BatchSizes.range(4, min(512, len(examples)))
    controller = cabs.Controller(min(16, len(examples)), sizes=sizes)
    sampler = cabs.BatchSampler(len(examples), controller, seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "run.jsonl"

    with (
        cabs.RunLog(path, controller, mode="w") as log,
        tqdm(total=options.steps, unit=" steps") as progress,
    ):
        while progress.n < options.steps:
            for indices in islice(sampler, options.steps - progress.n):
                batch = examples[indices]
                scores = model(batch[:, :-1])
                losses = cross_entropy(scores.mT, batch[:, 1:], reduction="none").mean(dim=1)

                optimizer.zero_grad()
                statistics = cabs_torch.backward(losses)
                optimizer.step()
                decision = controller.update(
                    learning_rate=options.learning_rate,
                    variance_trace=statistics.variance_trace,
                    loss=losses.mean(),
                )
                # Below 1 only where the rule asks for more than the largest batch.
                rate = options.learning_rate * decision.learning_rate_factor
                optimizer.param_groups[0]["lr"] = rate
                log.write(decision, examples=len(indices))
                progress.update()
                progress.set_postfix(
                    loss=f"{decision.observation.loss:.3f}", batch=decision.batch_size
                )

    run = cabs.read_run(path)
    used = [numbers["examples"] for numbers in run.measurements]
    figure = options.out / "run.png"
    plot_run(run).savefig(figure, dpi=150)
    seen = [decision.observation.loss for decision in run.decisions]
    tenth = max(1, len(seen) // 10)
    print(f"batch sizes from {min(used)} to {max(used)} in {len(used)} steps")
    print(f"loss {np.mean(seen[:tenth]):.3f} at first, {np.mean(seen[-tenth:]):.3f} at last")
    print(f"log {path}, figure {figure}")


if __name__ == "__main__":
    main()
