"""The layers that people train: each exact, whatever stands before and after it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.torch.models import squares
from tests.torch.reference import assert_exact


class Sandwich(nn.Module):
    """A matrix, what is tested, and the squares of what comes out."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.first, self.run = nn.Linear(4, 4), forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, inputs):
        return self.run(self, self.first(inputs)).flatten(1)


def images(hidden):
    """(m, T, 4) as four channels of images."""
    # Contiguous: the gradient of torch's own batch normalization in eval mode is wrong for a batch
    # of one that is not.
    return hidden.transpose(1, 2).unflatten(2, (2, -1)).contiguous()


def normal(*shape):
    return nn.Parameter(torch.randn(*shape))


def randomized(module):
    """Give a normalization layer parameters and averages that are not 0 and 1."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(
                torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor)
            )
    return module


def cell(m, hidden):
    state = torch.zeros(len(hidden), 3, dtype=hidden.dtype)
    for step in hidden.unbind(1):
        state = m.cell(step, state)
    return state


def lstm_cell(m, hidden):
    state = (torch.zeros(len(hidden), 3, dtype=hidden.dtype),) * 2
    for step in hidden.unbind(1):
        state = m.cell(step, state)
    return state[0]


def twice(m, hidden):
    return m.layer(m.layer(hidden).tanh())


# Name: forward, modules, both built anew for each test.
LAYERS = {
    "layer norm": lambda: (lambda m, h: m.norm(h), {"norm": randomized(nn.LayerNorm(4))}),
    "layer norm over two axes": lambda: (
        lambda m, h: m.norm(h),
        {"norm": randomized(nn.LayerNorm((6, 4)))},
    ),
    "layer norm sequence first": lambda: (
        lambda m, h: m.norm(h.transpose(0, 1)).transpose(0, 1),
        {"norm": randomized(nn.LayerNorm(4))},
    ),
    "rms norm": lambda: (lambda m, h: m.norm(h), {"norm": randomized(nn.RMSNorm(4))}),
    "group norm": lambda: (
        lambda m, h: m.norm(images(h)),
        {"norm": randomized(nn.GroupNorm(2, 4))},
    ),
    "group norm of frames": lambda: (
        lambda m, h: m.norm(h.reshape(-1, 4)).reshape(h.shape),
        {"norm": randomized(nn.GroupNorm(2, 4))},
    ),
    "instance norm": lambda: (
        lambda m, h: m.norm(images(h)),
        {"norm": randomized(nn.InstanceNorm2d(4, affine=True))},
    ),
    "batch norm in eval mode": lambda: (
        lambda m, h: m.norm(images(h)),
        {"norm": randomized(nn.BatchNorm2d(4)).eval()},
    ),
    "prelu": lambda: (lambda m, h: m.slope(images(h)), {"slope": nn.PReLU(4)}),
    "one prelu": lambda: (lambda m, h: m.slope(h), {"slope": nn.PReLU()}),
    "a layer scale": lambda: (lambda m, h: h * m.scale, {"scale": normal(4)}),
    "a scale from the left": lambda: (lambda m, h: m.scale * h, {"scale": normal(6, 1)}),
    "one scale": lambda: (
        lambda m, h: h * m.scale.exp(),
        {"scale": nn.Parameter(torch.tensor(0.3))},
    ),
    "divided by a parameter": lambda: (
        lambda m, h: h / (m.scale * m.scale + 1),
        {"scale": normal(4)},
    ),
    "divided by the batch": lambda: (lambda m, h: m.scale / (h * h + 1), {"scale": normal(4)}),
    "subtracted twice": lambda: (lambda m, h: (m.shift - h) * 2 - m.shift, {"shift": normal(4)}),
    "a parameter chosen": lambda: (
        lambda m, h: torch.where(h > 0, h, m.other),
        {"other": normal(4)},
    ),
    "a parameter as exponent": lambda: (
        lambda m, h: (h.abs() + 0.1) ** m.power,
        {"power": normal(4)},
    ),
    "a class token": lambda: (
        lambda m, h: torch.cat([m.token.expand(len(h), -1, -1), h], 1),
        {"token": normal(1, 1, 4)},
    ),
    "a class token that is repeated": lambda: (
        lambda m, h: torch.cat([m.token.repeat(len(h), 2, 1), h], 1),
        {"token": normal(1, 2, 4)},
    ),
    "places": lambda: (lambda m, h: h + m.places[: h.shape[1]], {"places": normal(9, 4)}),
    "places looked up": lambda: (
        lambda m, h: h + m.places(torch.arange(h.shape[1]) // 2),
        {"places": nn.Embedding(9, 4)},
    ),
    "places indexed": lambda: (
        lambda m, h: h + m.places[torch.arange(h.shape[1]) // 2][None],
        {"places": normal(9, 4)},
    ),
    "a bias of scores": lambda: (
        lambda m, h: F.scaled_dot_product_attention(
            h[:, None], h[:, None], h[:, None], attn_mask=m.bias[torch.arange(6) // 3]
        ),
        {"bias": normal(2, 6)},
    ),
    "a matrix on the left": lambda: (lambda m, h: m.left @ h, {"left": normal(3, 6)}),
    "a matrix on the left of one": lambda: (
        lambda m, h: (m.left @ h[:, 0].T).T,
        {"left": normal(3, 4)},
    ),
    "a vector": lambda: (lambda m, h: h @ m.vector, {"vector": normal(4)}),
    "addmm with factors": lambda: (
        lambda m, h: torch.addmm(m.bias, h[:, 0], m.weight, alpha=2.0, beta=-3.0),
        {"bias": normal(5), "weight": normal(4, 5)},
    ),
    "experts": lambda: (
        lambda m, h: torch.einsum("bti,eij->betj", h, m.experts),
        {"experts": normal(3, 4, 2)},
    ),
    "experts one a position": lambda: (
        lambda m, h: torch.einsum("bti,tij->btj", h, m.experts),
        {"experts": normal(6, 4, 2)},
    ),
    "experts with bmm": lambda: (
        lambda m, h: torch.bmm(h.transpose(0, 1), m.experts).transpose(0, 1),
        {"experts": normal(6, 4, 2)},
    ),
    "experts with baddbmm": lambda: (
        lambda m, h: torch.baddbmm(
            m.bias, h.transpose(0, 1), m.experts, alpha=2.0, beta=3.0
        ).transpose(0, 1),
        {"experts": normal(6, 4, 2), "bias": normal(6, 1, 2)},
    ),
    "each example's own matrices": lambda: (
        lambda m, h: torch.bmm(h, (h * m.scale).mT),
        {"scale": normal(4)},
    ),
    "bilinear": lambda: (lambda m, h: m.form(h, h.flip(1)), {"form": nn.Bilinear(4, 4, 3)}),
    "attention": lambda: (
        lambda m, h: m.attention(h, h, h, need_weights=False)[0],
        {"attention": nn.MultiheadAttention(4, 2, batch_first=True)},
    ),
    "attention sequence first": lambda: (
        lambda m, h: m.attention(h.mT.mT.transpose(0, 1), *(h.transpose(0, 1),) * 2)[0].transpose(
            0, 1
        ),
        {"attention": nn.MultiheadAttention(4, 2, bias=False)},
    ),
    "attention to something else": lambda: (
        lambda m, h: m.attention(h, h.flip(1)[:, :3], h[:, :3])[0],
        {"attention": nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True)},
    ),
    "attention of other widths": lambda: (
        lambda m, h: m.attention(h, h[..., :3], h[..., 1:])[0],
        {"attention": nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True)},
    ),
    "a transformer layer": lambda: (
        lambda m, h: m.layer(h),
        {"layer": nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)},
    ),
    "a transformer layer that is causal": lambda: (
        lambda m, h: m.layer(
            h,
            src_mask=nn.Transformer.generate_square_subsequent_mask(6, dtype=h.dtype),
            is_causal=True,
        ),
        {"layer": nn.TransformerEncoderLayer(4, 2, 5, 0.0, norm_first=True, batch_first=True)},
    ),
    "a transformer": lambda: (
        lambda m, h: m.layer(h, h.flip(1)),
        {"layer": nn.Transformer(4, 2, 1, 1, 5, dropout=0.0, batch_first=True)},
    ),
    "a transposed convolution": lambda: (
        lambda m, h: m.up(images(h)),
        {"up": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)},
    ),
    "a depthwise convolution": lambda: (
        lambda m, h: m.layer(images(h)),
        {"layer": nn.Conv2d(4, 8, 2, groups=4)},
    ),
    "circular padding": lambda: (
        lambda m, h: m.layer(images(h)),
        {"layer": nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular")},
    ),
    "reflected padding": lambda: (
        lambda m, h: m.layer(images(h)),
        {"layer": nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect")},
    ),
    "replicated padding": lambda: (
        lambda m, h: m.layer(images(h)),
        {"layer": nn.Conv2d(4, 2, 3, padding=1, padding_mode="replicate")},
    ),
    "a wide convolution": lambda: (
        lambda m, h: m.layer(h.unflatten(2, (2, 2)).repeat(1, 4, 3, 3)),
        {"layer": nn.Conv2d(24, 5, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2))},
    ),
    "a lazily flattened convolution": lambda: (
        lambda m, h: m.layer(h.reshape(-1, 4, 1)).reshape(len(h), -1),
        {"layer": nn.Conv1d(4, 2, 1)},
    ),
    "a module called twice": lambda: (twice, {"layer": nn.Linear(4, 4)}),
    "a convolution called twice": lambda: (
        lambda m, h: twice(m, images(h)[..., :2]),
        {"layer": nn.Conv2d(4, 4, 2, padding=1)},
    ),
    "a norm called twice": lambda: (twice, {"layer": randomized(nn.LayerNorm(4))}),
    "a matrix and its transpose": lambda: (
        lambda m, h: F.linear(F.linear(h, m.weight).tanh(), m.weight.T),
        {"weight": normal(4, 4)},
    ),
    "halves of a matrix": lambda: (
        lambda m, h: F.linear(h, m.weight[:2]).tanh() @ m.weight[:, 1:3].T,
        {"weight": normal(4, 4)},
    ),
    "a low rank": lambda: (lambda m, h: h @ (m.a @ m.b), {"a": normal(4, 2), "b": normal(2, 4)}),
    "a low rank added": lambda: (
        lambda m, h: h @ (m.w + m.a @ m.b) + F.linear(h, m.a.T) @ m.b,
        {"w": normal(4, 4), "a": normal(4, 2), "b": normal(2, 4)},
    ),
    "weight normalization": lambda: (
        lambda m, h: m.layer(h),
        {"layer": nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))},
    ),
    "weight normalization of a convolution": lambda: (
        lambda m, h: m.layer(images(h)),
        {"layer": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 3, 2))},
    ),
    "weights that are standardized": lambda: (
        lambda m, h: F.linear(h, (m.w - m.w.mean(1, True)) / m.w.std(1, keepdim=True)),
        {"w": normal(4, 4)},
    ),
    "a masked weight": lambda: (
        lambda m, h: F.linear(h, m.w * torch.tensor([0, 1, 1, 0])),
        {"w": normal(4, 4)},
    ),
    "a penalty": lambda: (lambda m, h: h * 2 + m.first.weight.square().sum(), {}),
    "a cell of a recurrent network": lambda: (cell, {"cell": nn.GRUCell(4, 3)}),
    "a cell with a memory": lambda: (lstm_cell, {"cell": nn.LSTMCell(4, 3)}),
    "a recurrent network": lambda: (
        lambda m, h: m.cell(h)[0],
        {"cell": nn.RNN(4, 3, batch_first=True)},
    ),
    "gated recurrent units": lambda: (
        lambda m, h: m.cell(h)[1].transpose(0, 1),
        {"cell": nn.GRU(4, 3, num_layers=2, batch_first=True, bidirectional=True)},
    ),
    "long short-term memory": lambda: (
        lambda m, h: m.cell(h)[0],
        {"cell": nn.LSTM(4, 3, batch_first=True)},
    ),
    "long short-term memory sequence first": lambda: (
        lambda m, h: m.cell(h.transpose(0, 1))[1][0].transpose(0, 1),
        {"cell": nn.LSTM(4, 3, num_layers=2, bidirectional=True)},
    ),
    "a learned first state": lambda: (
        lambda m, h: m.cell(h, (m.state.expand(-1, len(h), -1).contiguous(),) * 2)[0],
        {"cell": nn.LSTM(4, 3, batch_first=True), "state": normal(1, 1, 3)},
    ),
    "the last of each sequence": lambda: (
        lambda _, h: h[torch.arange(len(h)), torch.full((len(h),), 3)],
        {},
    ),
    "written in place": lambda: (write, {"scale": normal(4)}),
    "windows of a sequence": lambda: (lambda _, h: h.unfold(1, 3, 1).prod(-1), {}),
    "patches": lambda: (lambda _, h: F.unfold(images(h), 2), {}),
    "a diagonal": lambda: (lambda _, h: h.diagonal(dim1=1, dim2=2), {}),
    "distances": lambda: (lambda _, h: torch.cdist(h, h + 1), {}),
    "a long axis of rows": lambda: (
        lambda m, h: m.layer(h.repeat(1, 20, 1)),
        {"layer": nn.Linear(4, 300)},
    ),
}


def write(m, hidden):
    written = hidden.clone()
    written[:, 1:3] = hidden[:, 3:5] * m.scale
    written[:, 0].mul_(2.0)
    return written


def build(name):
    torch.manual_seed(0)
    forward, modules = LAYERS[name]()
    return Sandwich(forward, **modules)


@pytest.mark.filterwarnings("ignore:RNN module weights are not part:UserWarning")
@pytest.mark.parametrize("examples", [2, 4, 6])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_exact(name, examples):
    model = build(name).double()
    assert_exact(
        model, squares, torch.randn(examples, 6, 4).double(), torch.randn(examples).double()
    )


@pytest.mark.filterwarnings("ignore:RNN module weights are not part:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_exact_in_single_precision(name):
    assert_exact(build(name), squares, torch.randn(3, 6, 4), torch.randn(3))


class Words(nn.Module):
    """Looks up words, and may use the same table for what comes out."""

    def __init__(self, count, width, *, tied, padding=None, bag=None, sparse=False):
        super().__init__()
        if bag is None:
            self.table = nn.Embedding(count, width, padding_idx=padding, sparse=sparse)
        else:
            self.table = nn.EmbeddingBag(count, width, mode=bag, padding_idx=padding)
        self.layer = nn.Linear(width, width)
        self.out = nn.Linear(width, count)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, words):
        return self.out(self.layer(self.table(words)).tanh())


@settings(max_examples=60)
@given(
    st.integers(0, 2**31),
    st.integers(2, 6),
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([None, 0]),
    st.sampled_from([None, "sum", "mean", "max"]),
)
def test_tables_are_exact_tied_or_not(seed, examples, length, count, width, tied, padding, bag):
    torch.manual_seed(seed)
    model = Words(count, width, tied=tied, padding=padding, bag=bag).double()
    words = torch.randint(count, (examples, length))
    assert_exact(model, squares, words, torch.randn(examples).double())


def test_gradients_that_are_sparse_are_exact():
    torch.manual_seed(0)
    model = Words(7, 3, tied=False, sparse=True).double()
    words, targets = torch.randint(7, (4, 5)), torch.randn(4).double()
    dense = Words(7, 3, tied=False).double()
    dense.load_state_dict(model.state_dict())
    import cabs_torch

    one, other = (
        cabs_torch.backward(squares(some(words), targets)).variance_trace for some in (model, dense)
    )
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0.0)
