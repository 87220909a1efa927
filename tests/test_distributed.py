"""Several processes compute what one does: each case runs in one process and in two."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import fork_two
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from datasets.loading import ShuffledSeeds, batch_loader
from models.lednet import AuxiliaryHead, LEDNet
from utils import distributed
from utils.evaluation import evaluate, evaluate_classifier
from utils.losses import cross_entropy, ohem_cross_entropy, with_auxiliary

CPU = torch.device("cpu")
CLASSES, BATCH, SIZE = 5, 4, (64, 80)
WEIGHT = torch.tensor([1.0, 3.0, 0.2, 2.0, 7.0])


def frozen(model: nn.Module) -> nn.Module:
    """Make the result for an image independent of the rest of its batch, and of the order of sums.

    Batch norm uses its running statistics, dropout is off, and double precision rounds finely.
    """
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


def sharpened(logits: Tensor) -> Tensor:
    """Raise the contrast of an untrained network by pixel, so that OHEM tells pixels apart."""
    count, _, height, width = logits.shape
    generator = torch.Generator().manual_seed(3)
    contrast = torch.rand(BATCH, 1, height, width, generator=generator, dtype=torch.float64)
    return 60 * logits * (contrast if count == BATCH else of_this_process(contrast))


def of_this_process(batch: Tensor) -> Tensor:
    """Return the items that ShuffledSeeds would give this process."""
    return batch[distributed.rank() :: distributed.processes()]


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(BATCH, 3, *SIZE, generator=generator, dtype=torch.float64)


def uneven_labels() -> Tensor:
    """Label almost nothing in the images of the second process, and that with one class."""
    labels = torch.randint(CLASSES, (BATCH, *SIZE), generator=torch.Generator().manual_seed(2))
    labels[0, :9] = 255
    labels[1::2] = 255
    labels[1::2, 0, :11] = 4
    return labels


def hard_in_the_second_process() -> Tensor:
    """Label the images of the first process as the network sees them, and the others wrongly."""
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
    """Return the gradients of a training step, and the loss as its mean over the processes."""
    model = network(auxiliary)
    forward = distributed.parallel(model, CPU)
    assert isinstance(forward, DistributedDataParallel) == (distributed.processes() > 1)
    outputs = forward(of_this_process(images()))
    outputs = tuple(map(sharpened, outputs)) if auxiliary else sharpened(outputs)
    loss = loss_function(outputs, of_this_process(labels()))
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    return found | {"loss": distributed.total(loss.detach()) / distributed.processes()}


class Noisy(Dataset):
    """Images and labels drawn at random when they are read."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        label = torch.randint(CLASSES, SIZE)
        label[index * 7 :] = 255  # unevenly
        return torch.rand(3, *SIZE), label


def gradients_of_loaded_batches() -> dict[str, Tensor]:
    """Return the sum of the gradients over an epoch, whose last batch is not whole and left out."""
    count = distributed.processes()
    sampler = ShuffledSeeds(len(Noisy()), 5, distributed.rank(), count)
    sampler.begin(3)
    loader = batch_loader(Noisy(), sampler, 4 // count, 0, drop_last=True)
    model = network()
    forward, loss_function = distributed.parallel(model, CPU), partial(cross_entropy, weight=WEIGHT)
    batches = list(loader)
    assert len(batches) == 2
    for batch in batches:
        inputs, labels = torch.stack(batch.images).double(), torch.stack(batch.labels)
        loss_function(forward(inputs), labels).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def scores() -> tuple[float, Tensor]:
    """Score five images, which two processes cannot share evenly, of several sizes."""
    sizes = [(64, 80), (64, 96), (64, 80), (72, 64), (64, 64)]
    generator = torch.Generator().manual_seed(4)
    items = []
    for place, size in enumerate(sizes):
        label = torch.randint(CLASSES, size, generator=generator)
        label[place * 10 :, :50] = 255
        items.append((torch.rand(3, *size, generator=generator), label))
    loader = batch_loader(distributed.share(items), None, 2, 0)
    model = network().float()
    loss, confusion = evaluate(model, loader, lambda i: i, CLASSES, "", len(items), WEIGHT)
    return loss, confusion.counts


def scores_of_a_classifier() -> dict[str, float]:
    inputs = torch.rand(7, 6, generator=torch.Generator().manual_seed(4))
    items = list(zip(inputs, [0, 1, 2, 3, 4, 5, 0], strict=True))
    torch.manual_seed(0)
    loader = batch_loader(distributed.share(items), None, 2, 0, stacked=True)
    return evaluate_classifier(nn.Linear(6, 8), loader, lambda i: i, "", len(items))


def exchanged() -> dict[str, Any]:
    """Return what each function that exchanges something between the processes returns."""
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
    """Return what ends each process if the function that the first one calls fails."""

    def fail() -> None:
        raise ValueError("no such folder")

    try:
        distributed.first(fail)
    except BaseException as end:
        return repr(end)
    return "nothing"


def failures() -> list[str | None]:
    """Return the message about a failure elsewhere, before and after it was announced."""
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
    # With no pixel below the threshold, the hardest share counts.
    "ohem, by share": partial(ohem_cross_entropy, threshold=1e-30),
}
LOSSES = {name: partial(loss, weight=WEIGHT) for name, loss in LOSSES.items()}
STEPS = {
    f"{name}, {labels.__name__}": partial(gradients, LOSSES[name], labels)
    for name in LOSSES
    for labels in (uneven_labels, hard_in_the_second_process)
} | {
    f"{name}, two heads": partial(
        gradients, with_auxiliary(LOSSES[name], 0.4), uneven_labels, auxiliary=True
    )
    for name in ("ce", "ohem")
}
CASES: dict[str, Callable[[], Any]] = STEPS | {
    function.__name__: function
    for function in (
        *(gradients_of_loaded_batches, scores, scores_of_a_classifier),
        *(exchanged, failing_first, failures),
    )
}


@pytest.fixture(scope="module")
def in_two(tmp_path_factory) -> Callable[[str], list[Any]]:
    """Return what a case came to in each of two processes."""
    folder = tmp_path_factory.mktemp("two")

    def run_cases() -> None:
        distributed.start(CPU)
        print(f"process {distributed.rank()} prints")
        for name, case in CASES.items():
            torch.save(case(), folder / f"{name} {distributed.rank()}")
        distributed.stop()

    results = fork_two(run_cases, folder)
    assert [result.status for result in results] == [0, 0], results
    assert [result.out for result in results] == ["process 0 prints\n", ""]
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


def test_two_processes_have_the_gradients_of_one_on_loaded_batches(in_two):
    one = gradients_of_loaded_batches()
    for two in in_two("gradients_of_loaded_batches"):
        assert_same(two, one)


def test_the_losses_of_these_tests_depend_on_the_process_and_the_rule():
    """Otherwise the gradients above would agree even if the processes exchanged nothing."""
    with torch.no_grad():
        logits = sharpened(network()(images()))
    for labels in (uneven_labels(), hard_in_the_second_process()):
        for function in LOSSES.values():
            whole = function(logits, labels)
            halves = [function(logits[n::2], labels[n::2]) for n in range(2)]
            assert abs(sum(halves) / 2 - whole) > 0.01 * whole
    losses = [function(logits, uneven_labels()).item() for function in LOSSES.values()]
    assert losses[0] < 0.99 * losses[1] and losses[1] < 0.99 * losses[2]


def test_two_processes_score_a_network_like_one(in_two):
    loss, counts = scores()
    for loss_of_two, counts_of_two in in_two("scores"):
        assert torch.equal(counts_of_two, counts)
        assert loss_of_two == pytest.approx(loss, rel=1e-6)


def test_two_processes_score_a_classifier_like_one(in_two):
    one = scores_of_a_classifier()
    assert 0 < one["val_top1"] < one["val_top5"] < 1
    for two in in_two("scores_of_a_classifier"):
        assert two["val_loss"] == pytest.approx(one.pop("val_loss", two["val_loss"]), rel=1e-6)
        assert {name: two[name] for name in one} == one


def test_processes_exchange_values(in_two):
    zero, one = in_two("exchanged")
    assert zero["rank"] == (0, 2, True) and one["rank"] == (1, 2, False)
    assert zero["share"] == ["a", "c", "e"] and one["share"] == ["b", "d"]
    for found in (zero, one):
        assert found["first"] == {"of": 0, "path": "a"}
        assert found["agree"] == [1, 0, 3]
        assert found["gather"] == [{"rank": 0}, {"rank": 1}]
        assert found["total"].tolist() == [2, 5]
        assert found["joined"].tolist() == [[0] * 3] * 2 + [[1] * 3] * 2
        assert found["buffers"].tolist() == [1] * 3


def test_a_single_process_exchanges_nothing():
    found = exchanged()
    assert found["rank"] == (0, 1, True) and found["first"]["of"] == 0
    assert found["agree"] == [0, 0, 3] and found["gather"] == [{"rank": 0}]
    assert found["total"].tolist() == [1, 2] and found["joined"].tolist() == [[0] * 3] * 2
    assert found["share"] == list("abcde") and found["buffers"].tolist() == [1] * 3
    assert distributed.failure_elsewhere(RuntimeError("gloo")) is None
    assert not dist.is_initialized()


def test_if_the_first_process_fails_the_others_end_silently(in_two):
    assert in_two("failing_first") == ["ValueError('no such folder')", "SystemExit(2)"]


def test_a_failure_may_name_a_file_of_any_name(monkeypatch):
    monkeypatch.setattr(distributed, "_store", dist.HashStore())
    distributed.announce("ava\udcfflon.png is broken")
    assert distributed.failure_elsewhere(RuntimeError()) == "ava\\udcfflon.png is broken"


def test_a_failure_elsewhere_is_reported(in_two):
    silent = "another process ended without reporting an error: was it killed, or out of memory?"
    for found in in_two("failures"):
        assert found == [None, silent, "process 1: the disk is full"]
