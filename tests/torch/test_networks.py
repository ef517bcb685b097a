"""Networks drawn layer by layer, with parameters that are tied and used again."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.torch.reference import assert_exact


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, hidden):
        return hidden * self.scale


class Places(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.table = nn.Embedding(16, width)

    def forward(self, hidden):
        return hidden + self.table(torch.arange(hidden.shape[1]))


class Attention(nn.Module):
    def __init__(self, width, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=batch_first)

    def forward(self, hidden):
        moved = hidden if self.attention.batch_first else hidden.transpose(0, 1)
        moved = self.attention(moved, moved, moved, need_weights=False)[0]
        return hidden + (moved if self.attention.batch_first else moved.transpose(0, 1))


class Along(nn.Module):
    """A layer that has the channels before the positions."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden):
        return self.layer(hidden.transpose(1, 2)).transpose(1, 2)


class Unrolled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.cell = nn.GRUCell(width, width)

    def forward(self, hidden):
        states = [hidden[:, 0]]
        for step in hidden.unbind(1):
            states.append(self.cell(step, states[-1]))
        return torch.stack(states[1:], dim=1)


class Rows(nn.Module):
    """A layer on rows, of all examples one after the other, or of all positions."""

    def __init__(self, layer, sequence_first):
        super().__init__()
        self.layer, self.sequence_first = layer, sequence_first

    def forward(self, hidden):
        if self.sequence_first:
            moved = hidden.transpose(0, 1)
            rows = self.layer(moved.reshape(-1, hidden.shape[-1]))
            return rows.view(*moved.shape).transpose(0, 1)
        return self.layer(hidden.flatten(0, 1)).view(hidden.shape)


WIDTH = 4
BLOCKS = {
    "matrix": lambda: nn.Linear(WIDTH, WIDTH),
    "rows": lambda: Rows(nn.Linear(WIDTH, WIDTH), sequence_first=False),
    "rows sequence first": lambda: Rows(nn.Linear(WIDTH, WIDTH), sequence_first=True),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "rms norm": lambda: nn.RMSNorm(WIDTH),
    "group norm": lambda: Along(nn.GroupNorm(2, WIDTH)),
    "instance norm": lambda: Along(nn.InstanceNorm1d(WIDTH, affine=True)),
    "slopes": lambda: Along(nn.PReLU(WIDTH)),
    "scale": lambda: Scale(WIDTH),
    "places": lambda: Places(WIDTH),
    "attention": lambda: Attention(WIDTH, batch_first=True),
    "attention sequence first": lambda: Attention(WIDTH, batch_first=False),
    "convolution": lambda: Along(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
    "depthwise": lambda: Along(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)),
    "wrapped": lambda: Along(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular")),
    "transposed": lambda: Along(nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1, groups=2)),
    "unrolled": lambda: Unrolled(WIDTH),
    "normalized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
}


class Network(nn.Module):
    """A table of words, blocks of which some are the same, and the table again, or a matrix."""

    def __init__(self, names, again, *, tied):
        super().__init__()
        self.table = nn.Embedding(9, WIDTH, padding_idx=0)
        self.blocks = nn.ModuleList(BLOCKS[name]() for name in names)
        self.order = [*range(len(names)), *(place % len(names) for place in again)]
        self.out = nn.Linear(WIDTH, 9, bias=False)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, words):
        hidden = self.table(words)
        for place in self.order:
            hidden = hidden + self.blocks[place](hidden).tanh()
        return self.out(hidden)


def word_losses(outputs, targets):
    losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(dim=1)


@settings(max_examples=150)
@given(
    st.integers(0, 2**31),
    st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), max_size=2),
    st.booleans(),
    st.integers(2, 6),
    st.none() | st.integers(3, 7),
)
def test_networks_are_exact(seed, names, again, tied, examples, length):
    torch.manual_seed(seed)
    # As many positions as examples in half of the draws.
    length = length or max(examples, 3)
    model = Network(names, again, tied=tied).double()
    words = torch.randint(9, (examples, length))
    assert_exact(model, word_losses, words, torch.randint(9, (examples, length)))
