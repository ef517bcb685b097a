"""What the documentation says about several ranks runs as it is printed."""

import re
import textwrap
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import cabs
import cabs_torch
from tests.torch.engines import M, batch, gradients, network, share, weights
from tests.torch.gloo import Ranks

PAGE = Path(__file__).parents[2] / "docs" / "torch.rst"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("two"))
    yield ranks
    ranks.end()


def printed():
    """Return the programs of the section, in their order."""
    (section,) = re.findall(r"^Several ranks\n-+\n(.*?)\n^What is", PAGE.read_text(), re.M | re.S)
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", section, re.M)
    loop, averaged, microbatches = map(textwrap.dedent, blocks)
    return loop, averaged, microbatches


def names(model):
    """Return what the programs take from their surroundings."""
    inputs, labels = batch()
    return {
        "network": model,
        # Cut into odd batches, and at no epoch's end otherwise than for a single rank.
        "dataset": TensorDataset(inputs.repeat(5, 1)[:100], labels.repeat(5)[:100]),
        "controller": cabs.Controller(5, sizes=range(5, 55, 5)),
        "lr": 1.0,
        "m": M,
        "torch": torch,
        "dist": dist,
        "cabs_torch": cabs_torch,
        **{one.__name__: one for one in (DistributedDataParallel, nullcontext, cross_entropy)},
    }


def the_loop(how):
    program, known = printed()[0], names(network())
    if how == "fully_shard":
        fully_shard(known["network"])
        program = program.replace("DistributedDataParallel(network)", "network")
    if how == "alone":
        program = program.replace("DistributedDataParallel(network)", "network")
    known["optimizer"] = torch.optim.SGD(known["network"].parameters(), lr=known["lr"])
    for _ in range(3):
        exec(program, known)
    return known["controller"].state_dict(), known["statistics"].read(), weights(known["network"])


@pytest.mark.parametrize("how", ["ddp", "fully_shard"])
def test_the_loop_trains_as_one_process_does(two, how):
    state, statistics, expected = the_loop("alone")
    first, second = two.all(the_loop, how)
    assert first[:2] == second[:2]
    assert first[0]["state"]["batch_size"] == state["state"]["batch_size"] != 5
    assert first[1].variance_trace == pytest.approx(statistics.variance_trace)
    for found in (first, second):
        torch.testing.assert_close(found[2], expected, rtol=1e-9, atol=1e-9)


def the_averaged():
    known = names(network())
    model, (inputs, labels) = known["network"], batch()
    losses = cross_entropy(model(inputs[share(False)]), labels[share(False)], reduction="none")
    exec(printed()[1], known | {"model": model, "losses": losses}, found := {})
    return found["statistics"].read(), gradients(model)


def the_microbatches():
    model, (inputs, labels) = DistributedDataParallel(network()), batch()
    program = printed()[2].replace("64 *", "8 *")
    share_of = {"inputs": inputs[share(False)], "labels": labels[share(False)]}
    exec(program, names(model) | {"model": model, **share_of}, found := {})
    assert len(found["parts"]) == 2
    return found["statistics"].read(), gradients(model.module)


@pytest.mark.parametrize("case", [the_averaged, the_microbatches])
def test_other_ways_are_those_of_one_process(two, case):
    model, (inputs, labels) = network(), batch()
    losses = cross_entropy(model(inputs), labels, reduction="none")
    expected = cabs_torch.backward(losses).read()
    for statistics, gradient in two.all(case):
        assert statistics.variance_trace == pytest.approx(expected.variance_trace)
        assert statistics.loss == pytest.approx(expected.loss)
        torch.testing.assert_close(gradient, gradients(model))
