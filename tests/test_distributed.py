"""Several processes compute what one does: each case runs in two, which gloo joins, and in one."""

import os
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset

from datasets.loading import Seeded, ShuffledSeeds, as_lists, training_loader
from models.lednet import AuxiliaryHead, LEDNet
from utils import distributed
from utils.evaluation import evaluate, evaluate_classifier
from utils.losses import build_loss, cross_entropy, ohem_cross_entropy, with_auxiliary

CPU = torch.device("cpu")
CLASSES, BATCH, SIZE = 5, 4, (64, 80)
WEIGHT = torch.tensor([1.0, 3.0, 0.2, 2.0, 7.0])
SECONDS = 600  # that the two processes may take for all cases together

# Sharpened, so that OHEM leaves out some pixels of an untrained network, and keeps others.
SHARPER = 60


def frozen(model: nn.Module) -> nn.Module:
    """A model that treats each image of a batch on its own, and always in the same way; in double
    precision, since sums that are rounded in another order would differ by more than 1e-6."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    return model.double()


def network(auxiliary: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = LEDNet(CLASSES, 4)
    return frozen(AuxiliaryHead(model, CLASSES) if auxiliary else model)


def of_this_process(batch: Tensor) -> Tensor:
    """The items that ShuffledSeeds would give this process."""
    return batch[distributed.rank() :: distributed.processes()]


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(BATCH, 3, *SIZE, generator=generator, dtype=torch.float64)


def uneven_labels() -> Tensor:
    """Of the images that the second process gets, almost nothing is labelled, and of one class."""
    labels = torch.randint(CLASSES, (BATCH, *SIZE), generator=torch.Generator().manual_seed(2))
    labels[0, :9] = 255
    labels[1::2] = 255
    labels[1::2, 0, :11] = 4
    return labels


def hard_in_the_second_process() -> Tensor:
    """The images of the first process are labelled as the network sees them, the others not."""
    model = network()
    with torch.no_grad():
        logits = model(images())
    labels = logits.argmax(1)
    labels[1::2] = logits[1::2].argmin(1)
    labels[:, :3] = 255
    return labels


def gradients(
    loss_function: Callable, labels: Callable[[], Tensor], auxiliary: bool = False
) -> dict[str, Tensor]:
    """Of one step of training; with the loss, whose mean over the processes is the batch's."""
    model = network(auxiliary)
    forward = distributed.parallel(model, CPU)
    assert isinstance(forward, DistributedDataParallel) == (distributed.processes() > 1)
    outputs = forward(of_this_process(images()))
    sharper = tuple(SHARPER * logits for logits in outputs) if auxiliary else SHARPER * outputs
    loss = loss_function(sharper, of_this_process(labels()))
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    return found | {"loss": distributed.total(loss.detach()) / distributed.processes()}


class Noisy(Dataset):
    """Images and labels that are drawn when they are read."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        label = torch.randint(CLASSES, SIZE)
        label[index * 7 :] = 255  # unevenly
        return torch.rand(3, *SIZE), label


def gradients_of_loaded_batches() -> dict[str, Tensor]:
    """The sum of them over an epoch, of which a batch is left out where it is not whole."""
    count = distributed.processes()
    sampler = ShuffledSeeds(len(Noisy()), 5, distributed.rank(), count)
    sampler.begin(3)
    loader = training_loader(Seeded(Noisy()), sampler, batch_size=4 // count, drop_last=True)
    model = network()
    forward, loss_function = distributed.parallel(model, CPU), build_loss("ce", WEIGHT)
    batches = list(loader)
    assert len(batches) == 2
    for inputs, labels, *_ in batches:
        loss_function(forward(inputs.double()), labels).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def scores() -> tuple[float, Tensor]:
    """Of a number of images that 2 does not divide, of several sizes."""
    sizes = [(64, 80), (64, 96), (64, 80), (72, 64), (64, 64)]
    generator = torch.Generator().manual_seed(4)
    items = []
    for place, size in enumerate(sizes):
        label = torch.randint(CLASSES, size, generator=generator)
        label[place * 10 :, :50] = 255
        items.append((torch.rand(3, *size, generator=generator), label))
    loader = DataLoader(distributed.share(items), batch_size=2, collate_fn=as_lists)
    loss, confusion = evaluate(network().float(), loader, lambda i: i, CLASSES, "", WEIGHT)
    return loss, confusion.counts


def scores_of_a_classifier() -> dict[str, float]:
    generator = torch.Generator().manual_seed(4)
    inputs, labels = torch.rand(7, 6, generator=generator), torch.tensor([0, 1, 2, 3, 4, 5, 0])
    torch.manual_seed(0)
    model = nn.Linear(6, 8)
    loader = DataLoader(distributed.share(TensorDataset(inputs, labels)), batch_size=2)
    return evaluate_classifier(model, loader, lambda i: i, "")


def words() -> dict[str, Any]:
    """What the processes tell each other."""
    rank = distributed.rank()
    model = nn.BatchNorm1d(3)
    model.running_mean.fill_(rank + 1)
    distributed.share_buffers(model)
    return {
        "rank": (rank, distributed.processes(), distributed.is_first()),
        "first": distributed.first(lambda: {"of": rank, "path": "a"}),
        "agree": [distributed.agree(rank), distributed.agree(-rank), distributed.agree(3)],
        "gather": distributed.gather({"rank": rank}),
        "total": distributed.total(torch.tensor([1, rank + 2])),
        "joined": distributed.joined(torch.full((2, 3), rank)),
        "share": list(distributed.share("abcde")),
        "buffers": model.running_mean,
    }


def failing_first() -> str:
    """What each process ends with where the first one's function fails."""

    def fail() -> None:
        raise ValueError("no such folder")

    try:
        distributed.first(fail)
    except BaseException as end:
        return repr(end)
    return "nothing"


def failures() -> list[str | None]:
    """What is said of a failure: before and after the second process left word."""
    found = [distributed.failure_elsewhere(ValueError("a mistake of its own"))]
    found.append(distributed.failure_elsewhere(RuntimeError("[gloo/transport] Connection closed")))
    distributed.gather(None)
    if distributed.rank() == 1:
        distributed.announce("the disk is full")
    distributed.gather(None)
    found.append(distributed.failure_elsewhere(RuntimeError("Connection closed by peer")))
    return found


LOSSES = {
    "ce": cross_entropy,
    "ohem": ohem_cross_entropy,
    # A pixel below the threshold is hard; where there are too few, the hardest of all.
    "ohem, by the least share": partial(ohem_cross_entropy, threshold=1e-30),
}
STEPS = {
    f"{loss}, {labels.__name__}{', two heads' if auxiliary else ''}": (
        *(loss, labels, auxiliary),
        partial(
            gradients,
            with_auxiliary(partial(LOSSES[loss], weight=WEIGHT), 0.4)
            if auxiliary
            else partial(LOSSES[loss], weight=WEIGHT),
            labels,
            auxiliary,
        ),
    )
    for loss in LOSSES
    for labels in (uneven_labels, hard_in_the_second_process)
    for auxiliary in (False, True)
}
CASES: dict[str, Callable[[], Any]] = {name: step for name, (*_, step) in STEPS.items()} | {
    function.__name__: function
    for function in (
        *(gradients_of_loaded_batches, scores, scores_of_a_classifier),
        *(words, failing_first, failures),
    )
}


def run_cases(rank: int, port: int, folder: Path) -> None:
    """One of the two processes."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    distributed.start(CPU)
    print(f"process {rank} prints")
    for name, case in CASES.items():
        torch.save(case(), folder / f"{name} {rank}")
    distributed.stop()


@pytest.fixture(scope="module")
def in_two(tmp_path_factory) -> Callable[[str], list[Any]]:
    """What a case came to in each of two processes."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    both = mp.start_processes(run_cases, (port, folder), nprocs=2, join=False)
    try:
        while not both.join(timeout=1):
            assert time.monotonic() - started < SECONDS, "the processes wait for each other"
    finally:
        for process in both.processes:
            process.kill()
    return lambda name: [
        torch.load(folder / f"{name} {rank}", weights_only=True) for rank in range(2)
    ]


def assert_same(two: dict[str, Tensor], one: dict[str, Tensor]) -> None:
    assert two.keys() == one.keys()
    assert sum(bool(expected.any()) for expected in one.values()) > 200
    for name, expected in one.items():
        scale = max(1, expected.abs().max())
        assert (two[name] - expected).abs().max() <= 1e-6 * scale, name


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_have_the_gradients_of_one(in_two, name):
    one = CASES[name]()
    for two in in_two(name):
        assert_same(two, one)


def test_two_processes_have_the_gradients_of_one_on_batches_that_are_loaded(in_two):
    one = gradients_of_loaded_batches()
    for two in in_two("gradients_of_loaded_batches"):
        assert_same(two, one)


def test_the_losses_of_these_tests_differ_by_process_and_by_rule():
    """Or the gradients above would be the same without a word between the processes."""
    with torch.no_grad():
        logits = SHARPER * network()(images())
    for labels in (uneven_labels(), hard_in_the_second_process()):
        for function in LOSSES.values():
            whole = function(logits, labels, WEIGHT)
            halves = [function(logits[n::2], labels[n::2], WEIGHT) for n in range(2)]
            assert abs(sum(halves) / 2 - whole) > 0.01 * whole
    losses = [function(logits, uneven_labels(), WEIGHT).item() for function in LOSSES.values()]
    assert losses[0] < 0.99 * losses[1] and losses[1] < 0.99 * losses[2]


def test_two_processes_score_as_one(in_two):
    loss, counts = scores()
    for loss_of_two, counts_of_two in in_two("scores"):
        assert torch.equal(counts_of_two, counts)
        assert loss_of_two == pytest.approx(loss, rel=1e-6)


def test_two_processes_score_a_classifier_as_one(in_two):
    one = scores_of_a_classifier()
    assert 0 < one["val_top1"] < one["val_top5"] < 1
    for two in in_two("scores_of_a_classifier"):
        assert two["val_loss"] == pytest.approx(one.pop("val_loss", two["val_loss"]), rel=1e-6)
        assert {name: two[name] for name in one} == one


def test_processes_tell_each_other(in_two):
    zero, one = in_two("words")
    assert zero["rank"] == (0, 2, True) and one["rank"] == (1, 2, False)
    assert zero["share"] == ["a", "c", "e"] and one["share"] == ["b", "d"]
    for found in (zero, one):
        assert found["first"] == {"of": 0, "path": "a"}
        assert found["agree"] == [1, 0, 3]
        assert found["gather"] == [{"rank": 0}, {"rank": 1}]
        assert found["total"].tolist() == [2, 5]
        assert found["joined"].tolist() == [[0] * 3] * 2 + [[1] * 3] * 2
        assert found["buffers"].tolist() == [1] * 3


def test_one_process_has_nothing_to_tell():
    found = words()
    assert found["rank"] == (0, 1, True) and found["first"]["of"] == 0
    assert found["agree"] == [0, 0, 3] and found["gather"] == [{"rank": 0}]
    assert found["total"].tolist() == [1, 2] and found["joined"].tolist() == [[0] * 3] * 2
    assert found["share"] == list("abcde") and found["buffers"].tolist() == [1] * 3
    assert distributed.failure_elsewhere(RuntimeError("gloo")) is None
    assert not dist.is_initialized()


def test_where_the_first_fails_the_others_end_without_a_word(in_two):
    assert in_two("failing_first") == ["ValueError('no such folder')", "SystemExit(2)"]


def test_a_message_may_name_a_file_of_any_name(monkeypatch):
    monkeypatch.setattr(distributed, "_store", dist.HashStore())
    distributed.announce("ava\udcfflon.png is broken")
    assert distributed.failure_elsewhere(RuntimeError()) == "ava\\udcfflon.png is broken"


def test_a_failure_elsewhere_is_told(in_two):
    silent = "another process ended without a word: was it killed, or out of memory?"
    for found in in_two("failures"):
        assert found == [None, silent, "process 1: the disk is full"]
