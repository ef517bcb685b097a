"""PyTorch's own ways to store a checkpoint hold a loader's state, as plain values."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import cabs
import cabs_torch
from tests.core.runs import controller, run


def made(**options):
    return cabs_torch.loader(torch.arange(120), controller(), lag=2, num_workers=1, **options)


@pytest.fixture
def whole():
    with made() as batches:
        return run(batches, 25)


def test_torch_save_holds_it_and_loads_it_safely(tmp_path, whole):
    path = tmp_path / "checkpoint.pt"
    with made() as batches:
        records = run(batches, 9)
        with cabs.runs.atomic_write(path) as file:
            torch.save({"weights": torch.ones(3), "loader": batches.state_dict()}, file)
    with made() as batches:
        # With weights only: nothing but plain values and tensors is in it.
        batches.load_state_dict(torch.load(path, weights_only=True)["loader"])
        assert run(batches, 25, records=records) == whole


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_distributed_checkpoints_hold_it(tmp_path, whole):
    def application(batches):
        return {"model": nn.Linear(2, 2), "loader": batches}

    with made() as batches:
        records = run(batches, 9)
        dcp.save(application(batches), checkpoint_id=tmp_path / "step-9")
    with made() as batches:
        run(batches, 3)
        dcp.load(application(batches), checkpoint_id=tmp_path / "step-9")
        assert run(batches, 25, records=records) == whole
