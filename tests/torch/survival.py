"""Kills a training run at random moments, and compares it with one that was left alone.

    python tests/torch/survival.py FOLDER --kills 30 --workers 2

The run has workers, random augmentation, dropout, momentum and a batch size that changes often. It
appends what it did at each step to a journal, and saves a checkpoint now and then. SIGKILL hits at
a random moment, and each third time in the middle of writing a checkpoint. Then a new process goes
on from the checkpoint. At the end, for every step: all that any of the processes wrote about it
(indices, inputs, batch size, decision, loss) is the same to the bit as in the run that was left
alone, and so are the run log and the final weights; in every epoch each example was there once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import sys
import time
import traceback
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import cabs
import cabs_torch

EXAMPLES, EPOCHS, RATE = 900, 5, 0.3
# A checkpoint after so many steps.
EVERY = 4


class Digits(torch.utils.data.Dataset):
    """Noise around a pattern of each class, another noise in each epoch."""

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        label = index % 10
        image = torch.zeros(16)
        image[label] = 3.0
        return index, image + 1.5 * torch.randn(16), label


def train(
    folder: Path, workers: int, drop_last: bool, pause: float, dies_in_save: int | None
) -> None:
    """Train, from the checkpoint if there is one, to the end, or to the middle of a save."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.5)
    controller = cabs.Controller(4, sizes=cabs.BatchSizes.range(4, 64), smoothing=0.7)
    loader = cabs_torch.loader(
        Digits(),
        controller,
        lag=0 if not workers else 2 if drop_last else 1,
        num_workers=workers,
        drop_last=drop_last,
        seed=5,
    )
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        torch.set_rng_state(saved["random"])

    saves = 0

    def save() -> None:
        nonlocal saves
        saves += 1
        content = io.BytesIO()
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "loader": loader.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(state, content)
        half = len(content.getvalue()) // 2
        with cabs.runs.atomic_write(checkpoint) as file:
            file.write(content.getvalue()[:half])
            file.flush()
            if saves == dies_in_save:
                os.kill(os.getpid(), signal.SIGKILL)
            file.write(content.getvalue()[half:])

    journal = open(folder / "journal.jsonl", "ab", buffering=0)  # noqa: SIM115
    # A line that a kill has cut ends here.
    journal.write(b"\n")
    with loader, journal, cabs.RunLog(folder / "run.jsonl", controller, mode="a") as log:
        while loader.epoch < EPOCHS:
            for indices, images, labels in loader:
                losses = cross_entropy(model(images), labels, reduction="none")
                optimizer.zero_grad()
                statistics = cabs_torch.backward(losses)
                optimizer.step()
                decision = controller.update(
                    learning_rate=RATE,
                    variance_trace=statistics.variance_trace,
                    loss=losses.mean(),
                )
                log.write(decision, examples=len(labels))
                line = {
                    "step": decision.step,
                    "epoch": loader.batch.epoch,
                    "indices": indices.tolist(),
                    "inputs": images.double().sum(dim=1).tolist(),
                    "lag": loader.batch.lag,
                    "asked": loader.batch.asked,
                    "decided": decision.batch_size,
                    "trace": decision.observation.variance_trace[0].hex(),
                    "loss": decision.observation.loss.hex(),
                }
                journal.write(json.dumps(line).encode() + b"\n")
                time.sleep(pause)
                if controller.step % EVERY == 0:
                    save()
    with cabs.runs.atomic_write(folder / "weights.pt") as file:
        torch.save(model.state_dict(), file)


def in_a_process(function, *arguments) -> int:
    """Start a process that runs a function; return its number."""
    sys.stdout.flush()
    number = os.fork()
    if number == 0:
        status = 1
        try:
            function(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    return number


def read_journal(folder: Path) -> dict[int, list[dict]]:
    """Return what was written about each step."""
    steps: dict[int, list[dict]] = {}
    for line in (folder / "journal.jsonl").read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:  # cut by a kill, or empty
            continue
        steps.setdefault(record["step"], []).append(record)
    return steps


def main() -> None:
    """Run, kill, restart, compare; an assertion fails where anything differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--drop-last", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet, killed = options.folder / "quiet", options.folder / "killed"
    quiet.mkdir(parents=True)
    killed.mkdir()

    torch.set_num_threads(1)
    # What PyTorch imports at this moment, each process would have to.
    torch.optim.SGD(nn.Linear(1, 1).parameters())
    number = in_a_process(train, quiet, options.workers, options.drop_last, 0.0, None)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 0
    steps = len(read_journal(quiet))

    moments = random.Random(options.seed)
    kills, workers = 0, options.workers
    # Slow enough that the run outlasts its kills.
    pause = 0.6 * options.kills / steps
    while True:
        in_save = moments.randint(1, 8) if kills % 3 == 2 and kills < options.kills else None
        number = in_a_process(train, killed, workers, options.drop_last, pause, in_save)
        if kills < options.kills and in_save is None:
            time.sleep(moments.uniform(0.02, 0.8))
            os.kill(number, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        if status == 0:
            break
        assert status == -signal.SIGKILL, f"the run ended with status {status}"
        kills += 1
        # Goes on with another number of workers, as on another machine.
        workers = 1 + kills % max(options.workers, 1) if options.workers else 0

    expected, found = read_journal(quiet), read_journal(killed)
    assert sorted(found) == sorted(expected), "steps are missing, or there are too many"
    for step, (record,) in expected.items():
        for again in found[step]:
            assert again == record, f"step {step} was {again}, and is {record} when left alone"
    records = [record for (record,) in expected.values()]
    inputs: dict[int, set[float]] = {}
    for epoch in range(EPOCHS):
        of_epoch = [record for record in records if record["epoch"] == epoch]
        seen = [index for record in of_epoch for index in record["indices"]]
        whole = len(set(seen)) if options.drop_last else EXAMPLES
        assert sorted(seen) == sorted(set(seen)), f"epoch {epoch} repeats examples"
        assert len(seen) == whole > EXAMPLES - 64, f"epoch {epoch} is not whole"
        for record in of_epoch:
            for index, value in zip(record["indices"], record["inputs"], strict=True):
                inputs.setdefault(index, set()).add(value)
    # What would be compared in vain, if it were always the same.
    changes = sum(one["asked"] != other["asked"] for one, other in pairwise(records))
    assert changes > steps / 4, f"the batch size changed at {changes} of {steps} steps only"
    assert min(map(len, inputs.values())) >= EPOCHS - 2, "augmentations are not random"
    weights = [torch.load(one / "weights.pt", weights_only=True) for one in (quiet, killed)]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), f"{name} differs"
    logs = [cabs.read_run(one / "run.jsonl") for one in (quiet, killed)]
    assert logs[0].decisions == logs[1].decisions
    saves = len(list(killed.glob("*.partial")))
    repeated = sum(len(records) - 1 for records in found.values())
    sizes = sorted({record["asked"] for (record,) in expected.values()})
    print(
        f"{kills} kills, {saves} of them in a save; {steps} steps, {repeated} of them made again; "
        f"{len(sizes)} batch sizes from {sizes[0]} to {sizes[-1]}; all equal to the bit"
    )
    assert kills == options.kills, f"the run ended after {kills} kills"
    assert saves >= kills // 3, f"{saves} kills hit a save"
    assert repeated >= kills // 2, f"{repeated} steps were made again"


if __name__ == "__main__":
    main()
