"""What the documentation says about large trainers runs as it is printed."""

import os
import re
import sys
import textwrap
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import cabs
import cabs_torch
from tests.processes import finished
from tests.torch.engines import network, weights
from tests.torch.gloo import Ranks

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "trainers.rst"
EACH, STEPS = 3, 4


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("two"))
    yield ranks
    ranks.end()


def printed(section):
    """Return the first program of a section."""
    text = PAGE.read_text().split(f"\n{section}\n")[1]
    block = re.findall(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", text, re.M)[0]
    return textwrap.dedent(block)


def data(count=300):
    inputs = torch.randn(count, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return inputs, inputs[:, :3].argmax(dim=1)


def known(model, ranks):
    """Return what the programs take from their surroundings; one rank has two ranks' sizes."""
    exec(printed("=============="), names := {"cabs": cabs, "each": EACH, "ranks": 2})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    controller = cabs.Controller(12, sizes=names["sizes"])
    return {
        "model": model,
        "optimizer": optimizer,
        "controller": controller,
        "each": EACH,
        "ranks": ranks,
        "steps": STEPS,
        "lr": 1.0,
        "torch": torch,
        "cabs_torch": cabs_torch,
        **{one.__name__: one for one in (FSDPModule, cross_entropy, clip_grad_norm_, islice)},
    }


def a_loop_like_torchtitans(is_alone, is_clipped=True):
    model, program = network(), printed("A loop like torchtitan's")
    if not is_clipped:
        program = program.replace("clip_grad_norm_(model.parameters(), 1.0)", "pass")
    ranks, rank = (1, 0) if is_alone else (2, dist.get_rank())
    if is_alone:
        program = program.replace("model.set_requires_gradient_sync(is_last)", "pass")
    else:
        for layer in model:
            if list(layer.parameters()):
                fully_shard(layer)
        fully_shard(model)
    inputs, labels = data()
    pieces = zip(inputs.split(EACH), labels.split(EACH), strict=True)
    names = known(model, ranks) | {"batches": islice(pieces, rank, None, ranks)}
    exec(program, names)
    return names["controller"].state_dict(), names["statistics"].read(), weights(model)


def test_a_loop_like_torchtitans_trains_as_one_process_does(two):
    state, statistics, expected = a_loop_like_torchtitans(True)
    assert state["state"]["batch_size"] != 12
    for found in two.all(a_loop_like_torchtitans, False):
        assert found[0]["state"]["batch_size"] == state["state"]["batch_size"]
        assert found[1].variance_trace == pytest.approx(statistics.variance_trace)
        assert found[1].loss == pytest.approx(statistics.loss)
        torch.testing.assert_close(found[2], expected, rtol=1e-9, atol=1e-9)


def a_pipeline(schedule):
    """Run the program on two stages, of which the first has three layers and the second one."""
    model, rank = network(), dist.get_rank()
    part = model[3:] if rank else model[:3]
    names = known(part, 1)
    controller, (inputs, labels) = names["controller"], data()

    def batches():
        place = 0
        while True:
            mine = slice(place, place := place + controller.batch_size)
            yield inputs[mine], labels[mine]

    names |= {
        "stage": PipelineStage(part, rank, 2, torch.device("cpu")),
        "ScheduleGPipe": schedule,
        "batches": batches(),
        "cabs": cabs,
        "dist": dist,
    }
    exec(printed("A pipeline"), names)
    return names["controller"].state_dict(), names["statistics"], weights(part)


@pytest.mark.parametrize("schedule", [ScheduleGPipe, Schedule1F1B])
def test_a_pipeline_trains_as_one_process_does(two, schedule):
    state, statistics, expected = a_loop_like_torchtitans(True, is_clipped=False)
    found = two.all(a_pipeline, schedule)
    for other, measured, _ in found:
        assert other["state"]["batch_size"] == state["state"]["batch_size"] != 12
        assert measured.groups == statistics.groups
        assert measured.variance_trace == pytest.approx(statistics.variance_trace)
        assert measured.loss == pytest.approx(statistics.loss)
    trained = torch.cat([one for *_, one in found])
    torch.testing.assert_close(trained, expected, rtol=1e-9, atol=1e-9)


def divided_by_the_schedule():
    model = network()
    part = model[3:] if dist.get_rank() else model[:3]
    stage = PipelineStage(part, dist.get_rank(), 2, torch.device("cpu"))
    inputs, labels = data(12)
    schedule = ScheduleGPipe(stage, n_microbatches=4, loss_fn=cross_entropy)
    with cabs_torch.Microbatches(part, batch_size=12, process_group=False) as groups:
        schedule.step(*(() if dist.get_rank() else (inputs,)), target=labels)
    groups.complete()


def test_gradients_that_a_schedule_divides_are_an_error(two):
    for said in two.run(divided_by_the_schedule):
        assert "or divide them, as a pipeline's scale_grads does" in said


# A process of its own, since these libraries keep what they know of one in global state.
# It ends before what it has made is torn down: of a hundred runs under load, two hung where the
# model and the process group of gloo that it holds are taken apart.
ALONE = """
import os, sys
sys.path.insert(0, {root!r})
from tests.torch import test_trainers_documentation as tests
kept = tests.{call}
os._exit(0)
"""


def run_alone(call, tmp_path, ranks=1):
    program = tmp_path / "program.py"
    program.write_text(ALONE.format(root=str(PAGE.parents[1]), call=call))
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(starter if ranks > 1 else []), program]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    done = finished(command, limit=300.0, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def by_accelerate(engine):
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    accelerator, model = Accelerator(cpu=True), network()
    if engine == "fully_shard":
        # Accelerate leaves it to GPUs, unless its state says otherwise.
        AcceleratorState._shared_state |= {
            "distributed_type": DistributedType.FSDP,
            "fsdp_plugin": FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1
            ),
        }
    names = known(model, 1)
    dataset = torch.utils.data.TensorDataset(*data())
    loader = torch.utils.data.DataLoader(dataset, batch_size=EACH)
    prepared = accelerator.prepare(model, names["optimizer"], loader)
    names |= dict(zip(("model", "optimizer", "loader"), prepared, strict=True))
    kinds = {"ddp": DistributedDataParallel, "fully_shard": FSDPModule}
    assert isinstance(names["model"], kinds.get(engine, nn.Sequential))
    exec(printed("Hugging Face Accelerate"), names | {"accelerator": accelerator}, names)
    trace = names["statistics"].read().variance_trace
    found = names["controller"].batch_size, trace, weights(names["model"])
    torch.save(found, f"{accelerator.process_index}.pt")
    accelerator.end_training()
    return names


@pytest.mark.parametrize(("engine", "ranks"), [(None, 1), ("ddp", 2), ("fully_shard", 2)])
def test_accelerate_trains_as_a_loop_of_ones_own(tmp_path, engine, ranks):
    pytest.importorskip("accelerate")
    run_alone(f"by_accelerate({engine!r})", tmp_path, ranks)
    state, statistics, expected = a_loop_like_torchtitans(True)
    for rank in range(ranks):
        size, trace, trained = torch.load(tmp_path / f"{rank}.pt")
        assert size == state["state"]["batch_size"] != 12
        assert trace == pytest.approx(statistics.variance_trace)
        torch.testing.assert_close(trained, expected)


class Model(nn.Module):
    """A model as Trainer calls it."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, inputs, labels):
        return {"loss": cross_entropy(self.inner(inputs), labels)}


def by_trainer():
    from transformers import Trainer, TrainerCallback, TrainingArguments

    names = known(Model(), 1) | {"folder": "runs"}
    names |= {"TrainerCallback": TrainerCallback, "TrainingArguments": TrainingArguments}
    names["others"] = {"max_steps": 2, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    names["others"] |= {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    exec(printed("Hugging Face Trainer"), names)
    inputs, labels = data(24)
    dataset = [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    measured, seen = names["Measured"](), []

    def collate(rows):
        seen.append(torch.stack([one["inputs"] for one in rows]))
        return {name: torch.stack([one[name] for one in rows]) for name in ("inputs", "labels")}

    trainer = Trainer(
        names["model"],
        names["arguments"],
        train_dataset=dataset,
        data_collator=collate,
        callbacks=[measured],
    )
    trainer.train()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in (seen[:4], seen[4:]):
        optimizer.zero_grad()
        accumulation = cabs_torch.Accumulation(model.parameters(), batch_size=12)
        for piece in step:
            loss = cross_entropy(model(piece), piece[:, :3].argmax(dim=1))
            accumulation.backward(loss, examples=3)
        expected = accumulation.complete().read()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert measured.statistics.read().variance_trace == pytest.approx(expected.variance_trace)
    torch.testing.assert_close(weights(names["model"]), weights(model))


def test_a_callback_of_trainer_measures(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    run_alone("by_trainer()", tmp_path)
