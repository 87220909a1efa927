import math
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import utils.evaluation
from datasets.loading import as_lists
from utils.errors import UserError
from utils.evaluation import (
    Waiting,
    evaluate,
    evaluate_classifier,
    label_map,
    largest,
    train_one_epoch,
)
from utils.interrupts import Diverged, Watch
from utils.losses import build_loss
from utils.metrics import ConfusionMatrix
from utils.training import Training


class Pixels(torch.utils.data.Dataset):
    """Random images with labels of another size, in part ignored."""

    def __init__(self, count: int, label_size: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(count, 3, 16, 24, generator=generator)
        self.labels = torch.randint(0, 4, (count, *label_size), generator=generator)
        self.labels[:, :3] = 255

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]


def as_it_is(images: torch.Tensor) -> torch.Tensor:
    return images


def as_they_are(*batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return batch


def in_lists(data: torch.utils.data.Dataset, batch_size: int = 2) -> DataLoader:
    return DataLoader(data, batch_size=batch_size, collate_fn=as_lists)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluate_scores_at_the_labels_resolution(model, batch_size):
    """The same by hand, one image at a time; the last batch is part of it."""
    data, weight = Pixels(5, (40, 50)), torch.tensor([1.0, 2.0, 0.5, 1.0])
    seen = []
    loss, confusion = evaluate(
        model,
        in_lists(data, batch_size),
        as_it_is,
        4,
        "",
        weight,
        on_image=lambda image, prediction, label: seen.append((image, prediction, label)),
    )
    model.eval()
    expected, all_logits = ConfusionMatrix(4), []
    with torch.no_grad():
        for image, label in data:
            logits = F.interpolate(
                model(image[None]), (40, 50), mode="bilinear", align_corners=True
            )
            expected.update(logits.argmax(1)[0], label)
            all_logits.append(logits)
    assert torch.equal(confusion.counts, expected.counts)
    assert confusion.counts.sum() == 5 * 37 * 50
    whole = F.cross_entropy(torch.cat(all_logits), data.labels, weight, ignore_index=255)
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    assert len(seen) == 5
    for index, (image, prediction, label) in enumerate(seen):
        assert torch.equal(image, data.images[index]) and torch.equal(label, data.labels[index])
        assert prediction.shape == (40, 50)


def test_evaluate_scores_without_a_loss(model):
    loader = in_lists(Pixels(3, (16, 24)))
    loss, confusion = evaluate(model, loader, as_it_is, 4, "")
    assert math.isnan(loss)
    weighted = evaluate(model, loader, as_it_is, 4, "", torch.ones(4))[1]
    assert torch.equal(confusion.counts, weighted.counts)


def test_evaluate_runs_neighbours_of_one_size_together(model):
    """Each is prepared and scored as it would be alone; labels of bytes will do."""
    sizes = [(16, 24), (16, 24), (20, 24), (16, 24), (8, 8)]
    torch.manual_seed(1)
    items = [
        (
            torch.randint(256, (3, *size), dtype=torch.uint8),
            torch.randint(4, (30, 40), dtype=torch.uint8),
        )
        for size in sizes
    ]
    batches, seen = [], []

    def prepare(images):
        batches.append(tuple(images.shape))
        return images.float() / 255

    _, together = evaluate(
        model, in_lists(items, 5), prepare, 4, "", on_image=lambda *panels: seen.append(panels)
    )
    assert batches == [(2, 3, 16, 24), (1, 3, 20, 24), (1, 3, 16, 24), (1, 3, 8, 8)]
    assert together.counts.sum() == 5 * 30 * 40
    for (image, label), (image_seen, prediction, label_seen) in zip(items, seen, strict=True):
        assert image_seen is image and torch.equal(label_seen, label)
        with torch.no_grad():
            logits = F.interpolate(
                model(image[None] / 255), (30, 40), mode="bilinear", align_corners=True
            )
        assert (logits.argmax(1)[0] == prediction).float().mean() > 0.99


class Numbered(torch.utils.data.Dataset):
    """Items as they come to be trained on: with their index, and nothing that they stand in for."""

    def __init__(self, items: torch.utils.data.Dataset) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple:
        return *self.items[index], index, ""


def train(model, data, dtype=None, count=None, batch_size=2, scaled=False, **options):
    """Train for one epoch; returns its figures and sums, and the state that it leaves."""
    loader = DataLoader(Numbered(data), batch_size=batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    training = Training(
        model,
        model,
        optimizer,
        torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=2 * len(loader)),
        torch.amp.GradScaler("cpu", enabled=scaled),
        batch_size,
        len(loader),
        options.pop("ema", None),
        dtype,
    )
    watch = Watch(Path("last.pth"), math.inf, "python main.py", lambda index: [f"{index}.png"], ())
    watch.begin(training, save=lambda: None)
    training.begin_epoch()
    prepare = options.pop("prepare", as_they_are)
    loss = options.pop("loss_function", build_loss("ce", torch.ones(4)))
    forward = options.pop("forward", model)
    figures = train_one_epoch(
        training, forward, loader, prepare, loss, watch, "epoch", 1, count, **options
    )
    totals = training.totals
    figures["train_loss"] = (totals["loss"] / totals["images"]).item()
    return figures, training


def test_training_lowers_the_loss_and_steps_the_schedule_with_each_batch(model):
    data = Pixels(6, (16, 24))
    data.labels = (data.images[:, 0] > 0.5).long()
    first, training = train(model, data)
    assert training.step == 3 and training.totals["images"] == 6
    assert training.scheduler.get_last_lr()[0] == pytest.approx(0.25)  # 3 of 6 steps
    second, _ = train(model, data)
    assert second["train_loss"] < first["train_loss"]
    assert first["images_per_second"] > 0
    assert model.training


def test_train_loss_is_the_mean_over_images(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model[1].weight.requires_grad_(True)
    model[1].weight.data.zero_()
    model[1].bias.data = torch.tensor([2.0, 0.0, 0.0, 0.0])
    model[1].weight.register_hook(torch.zeros_like)
    data = Pixels(3, (16, 24))
    figures, _ = train(model, data)  # a batch of two and one of one
    logits = torch.tensor([2.0, 0.0, 0.0, 0.0]).log_softmax(0)
    losses = [-logits[label[label != 255]].mean() for label in data.labels]
    pair = -logits[data.labels[:2][data.labels[:2] != 255]].mean()
    assert figures["train_loss"] == pytest.approx(((2 * pair + losses[2]) / 3).item(), rel=1e-5)


def test_training_counts_its_predictions_where_asked(model):
    confusion = ConfusionMatrix(4)
    train(model, Pixels(5, (16, 24)), count=confusion.update_from_logits)
    assert confusion.counts.sum() == 5 * 13 * 24


def test_mixed_precision_on_cpu(model):
    data = Pixels(4, (16, 24))
    figures, _ = train(model, data, torch.bfloat16)
    assert 0 < figures["train_loss"] < 10
    assert all(p.dtype == torch.float32 for p in model.parameters())
    loss, _ = evaluate(model, in_lists(data), as_it_is, 4, "", torch.ones(4), torch.bfloat16)
    assert 0 < loss < 10


def test_scaled_gradients_train_as_plain_ones():
    """With fp16's gradient scaler, here on the CPU: the same steps as without."""

    def trained(enabled: bool) -> tuple[torch.Tensor, dict]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3, padding=1)
        _, training = train(model, Pixels(4, (16, 24)), scaled=enabled)
        assert training.totals["skipped_steps"] == 0
        return model.weight, training.scaler.state_dict()

    (scaled, state), (plain, nothing) = trained(True), trained(False)
    assert torch.allclose(scaled, plain, atol=1e-6)
    assert state["_growth_tracker"] == 2 and nothing == {}


def test_progress_in_a_log_is_lines(model, capsys):
    train(model, Pixels(6, (16, 24)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("epoch: step 1/3, loss ") and "images/s" in lines[0]
    assert re.search(r", waiting for data \d+ %, ", lines[0])


def test_steps_that_the_scaler_skips_are_counted_and_shown(model, capsys):
    """A gradient that is not finite where the loss is: the weights stay, the run goes on."""
    before = model[0].weight.detach().clone()
    model[0].weight.register_hook(lambda gradient: gradient * math.inf)
    _, training = train(model, Pixels(4, (16, 24)), scaled=True)
    assert training.totals["skipped_steps"] == 2
    assert torch.equal(model[0].weight, before)
    assert "skipped steps 2" in capsys.readouterr().out.splitlines()[-1]


def test_one_process_of_several_counts_the_skipped_steps(model, monkeypatch):
    """All skip the same ones, and the sums of an epoch are taken over the processes."""
    monkeypatch.setattr(utils.evaluation.distributed, "is_first", lambda: False)
    model[0].weight.register_hook(lambda gradient: gradient * math.inf)
    _, training = train(model, Pixels(4, (16, 24)), scaled=True)
    assert training.totals["skipped_steps"] == 0


def test_a_loss_that_is_not_finite_is_named_with_its_files(model):
    data = Pixels(6, (16, 24))
    data.images[3] = math.nan
    with pytest.raises(Diverged) as raised:
        train(model, data)
    assert "the loss is nan in step 2 of epoch 1, of 2.png, 3.png: " in str(raised.value)
    assert "no checkpoint was written yet" in str(raised.value)


def test_a_gpu_without_memory_says_what_was_asked_of_it(model):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    for part in ("forward", "prepare"):
        with pytest.raises(UserError, match=r"of 2 images of 24x16: .*--batch-size or --height;"):
            train(model, Pixels(4, (16, 24)), **{part: full})


def test_cuda_libraries_without_memory_are_told_as_well(model):
    def full(images):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")

    def wrong(images):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(UserError, match="--batch-size or --crop;"):
        train(model, Pixels(4, (16, 24)), forward=full, size_option="--crop")
    with pytest.raises(RuntimeError, match="multiplied"):
        train(model, Pixels(4, (16, 24)), forward=wrong)


def linear_classifier():
    """Images of 3 x 1 x 1 whose bytes are the logits, once they are halved."""
    images = torch.tensor([[9, 1, 5], [2, 6, 4], [3, 3, 8], [7, 0, 1]], dtype=torch.uint8)
    labels = torch.tensor([0, 2, 2, 1])
    return TensorDataset(images[..., None, None], labels), lambda x: x.float() / 2


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_classifier_is_scored_by_hand(batch_size):
    data, prepare = linear_classifier()
    model, seen = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False)), []
    model[1].weight.data = torch.eye(3)
    loader = DataLoader(data, batch_size=batch_size)
    scores = evaluate_classifier(
        model, loader, prepare, "", on_batch=lambda images, *rest: seen.append(images)
    )
    assert scores["val_top1"] == 0.5 and scores["val_top5"] == 1.0  # two of four; all of 3 classes
    losses = [
        math.log(sum(math.exp(x / 2 - row[label] / 2) for x in row))
        for row, label in (([9, 1, 5], 0), ([2, 6, 4], 2), ([3, 3, 8], 2), ([7, 0, 1], 1))
    ]
    assert scores["val_loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert torch.equal(torch.cat(seen), data.tensors[0]) and not model.training


def test_training_prepares_batches_and_averages_after_each_step():
    data, prepare = linear_classifier()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    weights, given, counted = [], [], []

    def keep(images, labels):
        given.append((images, labels))
        if len(given) > 1:
            weights.append(model[1].weight.detach().clone())
        return prepare(images), 2 - labels

    train(
        model,
        data,
        prepare=keep,
        loss_function=nn.CrossEntropyLoss(),
        ema=ema,
        count=lambda logits, labels: counted.append((logits.shape, labels)),
    )
    weights.append(model[1].weight.detach())
    assert torch.equal(torch.cat([images for images, _ in given]), data.tensors[0])
    # What is trained on and counted is what was prepared.
    assert torch.equal(torch.cat([labels for _, labels in counted]), 2 - data.tensors[1])
    assert [shape for shape, _ in counted] == [(2, 3), (2, 3)]
    assert not torch.equal(*weights)
    assert torch.allclose(ema.module[1].weight, (weights[0] + weights[1]) / 2)


def test_a_loss_gets_whatever_the_model_returns():
    class TwoHeads(nn.Conv2d):
        def forward(self, images):
            return super().forward(images), images.mean()

    seen = []
    figures, _ = train(
        TwoHeads(3, 4, 1),
        Pixels(2, (16, 24)),
        loss_function=lambda outputs, labels: outputs[0].square().mean() + 3,
        count=lambda outputs, labels: seen.append(type(outputs)),
    )
    assert figures["train_loss"] > 3 and seen == [tuple]


def test_waiting_is_the_time_until_each_batch():
    def slow():
        for number in range(3):
            time.sleep(0.05)
            yield number

    waiting, started, taken = Waiting(torch.device("cpu")), time.perf_counter(), []
    for number in waiting.through(slow()):
        taken.append(number)
        time.sleep(0.1)
    assert taken == [0, 1, 2]
    assert 0.15 <= waiting.seconds() <= time.perf_counter() - started - 0.3


def test_the_start_of_a_loader_is_waiting_too():
    class Loader:
        def __iter__(self):
            time.sleep(0.1)
            return iter([1])

    waiting = Waiting(torch.device("cpu"))
    assert list(waiting.through(Loader())) == [1]
    assert waiting.seconds() >= 0.1


def test_waiting_is_a_share_of_the_epoch(model):
    class Slow(Pixels):
        def __getitem__(self, index):
            time.sleep(0.2)
            return super().__getitem__(index)

    figures, _ = train(model, Slow(4, (16, 24)))
    assert 0.5 < figures["data_wait"] <= 1


def test_on_a_gpu_its_own_clock_tells_the_waiting(monkeypatch):
    """As a program sees it that runs ahead: the GPU works from 0 to 5 and from 7 to 9 seconds."""
    times = iter([0.0, 0.0, 5.0, 7.0, 9.0])  # before and after each of two batches, and at the end

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = next(times)

        def elapsed_time(self, later):
            return 1000 * (later.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waiting = Waiting(torch.device("cuda"))
    assert list(waiting.through("ab")) == ["a", "b"]
    assert waiting.seconds() == 2 and waiting.seconds() == 2


@pytest.mark.parametrize("size", [(9, 14), (40, 60), (257, 33), (5, 7), (1, 1)])
@pytest.mark.parametrize("rows", [7, 64])
def test_a_label_map_is_the_largest_of_the_upsampled_logits(size, rows):
    logits = torch.randn(6, 9, 14, generator=torch.Generator().manual_seed(0))
    labels = label_map(logits, size, rows)
    upsampled = F.interpolate(logits[None], size, mode="bilinear", align_corners=True)[0]
    assert labels.dtype == torch.uint8 and labels.shape == size
    chosen = upsampled.gather(0, labels[None].long())[0]
    assert torch.allclose(chosen, upsampled.amax(0), atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_largest_logit_is_the_first_of_equals(memory_format):
    """As torch's own argmax on a CPU, whichever way the planes lie in memory."""
    logits = torch.randint(0, 4, (1, 7, 33, 45), generator=torch.Generator().manual_seed(0))
    logits = logits.float().contiguous(memory_format=memory_format)[0]
    before = logits.clone()
    assert torch.equal(largest(logits), logits.argmax(0).byte())
    assert torch.equal(logits, before)


def test_a_worker_that_dies_interrupts_no_step():
    """The loader finds it when it waits for the next batch, not by a signal at any moment."""
    batches = Waiting(torch.device("cpu")).through(DataLoader(range(4), num_workers=1))
    assert next(batches).item() == 0
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
