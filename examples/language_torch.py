"""A small GPT in PyTorch, with tied embeddings."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import cabs_torch
from training import Shape, Step


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

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.characters = nn.Embedding(shape.characters, shape.width)
        self.places = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.Sequential(*(Block(shape.width, shape.heads) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.out = nn.Linear(shape.width, shape.characters, bias=False)
        nn.init.normal_(self.characters.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.out.weight = self.characters.weight

    def forward(self, text: Tensor) -> Tensor:
        """Map (m, T) characters to (m, T, characters) scores of the next ones."""
        places = torch.arange(text.shape[1], device=text.device)
        hidden = self.characters(text) + self.places(places)
        return self.out(self.norm(self.blocks(hidden)))


class Trainer:
    """A GPT, trained by gradient descent."""

    def __init__(self, shape: Shape, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = GPT(shape)
        self.optimizer = torch.optim.SGD(self.model.parameters())

    def step(self, text: np.ndarray, learning_rate: float) -> Step:
        """Take one step on examples of shape (m, T + 1)."""
        codes = torch.from_numpy(text)
        scores = self.model(codes[:, :-1])
        losses = cross_entropy(scores.mT, codes[:, 1:], reduction="none").mean(dim=1)

        self.optimizer.zero_grad()
        statistics = cabs_torch.backward(losses)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        accuracy = (scores.argmax(dim=2) == codes[:, 1:]).float().mean()
        return Step(statistics, accuracy)
