import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets.loading import Batch
from utils.evaluation import (
    OutOfMemory,
    argmax_classes,
    evaluate,
    evaluate_classifier,
    label_map,
    memory_errors,
)
from utils.metrics import ConfusionMatrix


def identity(images: Tensor) -> Tensor:
    return images


def batches_of(images: Sequence[Tensor], labels: Sequence[Tensor], size: int) -> Iterator[Batch]:
    for start in range(0, len(images), size):
        indices = list(range(len(images))[start : start + size])
        yield Batch(
            [images[i] for i in indices], [labels[i] for i in indices], [0] * size, indices, []
        )


def pixels(count: int, label_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return random images with labels of another size, some of them ignored."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 16, 24, generator=generator)
    labels = torch.randint(0, 4, (count, *label_size), generator=generator)
    labels[:, :3] = 255
    return images, labels


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))


# Segmentation


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_are_scored_at_the_resolution_of_their_labels(model, batch_size):
    """As by hand, one image at a time; a last batch that is smaller counts too."""
    (images, labels), weight = pixels(5, (40, 50)), torch.tensor([1.0, 2.0, 0.5, 1.0])
    seen = []
    loss, confusion = evaluate(
        model,
        batches_of(images, labels, batch_size),
        identity,
        4,
        "",
        5,
        weight,
        on_image=lambda *shown: seen.append(shown),
    )
    assert not model.training
    expected, all_logits = ConfusionMatrix(4), []
    with torch.no_grad():
        for image, label in zip(images, labels, strict=True):
            logits = F.interpolate(
                model(image[None]), (40, 50), mode="bilinear", align_corners=True
            )
            expected.update(logits.argmax(1)[0], label)
            all_logits.append(logits)
    assert torch.equal(confusion.counts, expected.counts)
    assert confusion.counts.sum() == 5 * 37 * 50
    whole = F.cross_entropy(torch.cat(all_logits), labels, weight, ignore_index=255)
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    assert len(seen) == 5
    for index, (image, prediction, label) in enumerate(seen):
        assert torch.equal(image, images[index]) and torch.equal(label, labels[index])
        assert prediction.shape == (40, 50)


def test_without_class_weights_there_is_no_loss_and_the_same_score(model):
    images, labels = pixels(3, (16, 24))
    loss, confusion = evaluate(model, batches_of(images, labels, 2), identity, 4, "", 3)
    assert math.isnan(loss)
    _, weighted = evaluate(model, batches_of(images, labels, 2), identity, 4, "", 3, torch.ones(4))
    assert torch.equal(confusion.counts, weighted.counts)


def test_neighbours_of_one_size_run_together(model):
    """Each is normalised and scored as it would be alone; labels may be bytes."""
    sizes = [(16, 24), (16, 24), (20, 24), (16, 24), (8, 8)]
    torch.manual_seed(1)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
    labels = [torch.randint(4, (30, 40), dtype=torch.uint8) for _ in sizes]
    run, seen = [], []

    def normalize(batch: Tensor) -> Tensor:
        run.append(tuple(batch.shape))
        return batch.float() / 255

    _, together = evaluate(
        model,
        batches_of(images, labels, 5),
        normalize,
        4,
        "",
        5,
        on_image=lambda *shown: seen.append(shown),
    )
    assert run == [(2, 3, 16, 24), (1, 3, 20, 24), (1, 3, 16, 24), (1, 3, 8, 8)]
    assert together.counts.sum() == 5 * 30 * 40
    for image, label, (image_seen, prediction, label_seen) in zip(
        images, labels, seen, strict=True
    ):
        assert image_seen is image and torch.equal(label_seen, label)
        with torch.no_grad():
            logits = F.interpolate(
                model(image[None] / 255), (30, 40), mode="bilinear", align_corners=True
            )
        assert (logits.argmax(1)[0] == prediction).float().mean() > 0.99


class Searching(nn.Conv2d):
    """Notes for which batches cuDNN may search for kernels."""

    def forward(self, images: Tensor) -> Tensor:
        self.searched.append((len(images), images.shape[-1], torch.backends.cudnn.benchmark))
        return super().forward(images)


def test_kernels_are_searched_for_the_shape_of_the_first_batch(monkeypatch):
    """Not for a smaller last batch, nor for another size."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    model = Searching(3, 4, 1)
    model.searched = []
    images = [torch.rand(3, 16, width) for width in (24, 24, 32, 24, 24, 24, 24)]
    labels = [torch.zeros(16, image.shape[-1], dtype=torch.int64) for image in images]
    evaluate(model, batches_of(images, labels, 2), identity, 4, "t", len(images))
    expected = [(2, 24, True), (1, 32, False), (1, 24, False), (2, 24, True), (1, 24, False)]
    assert model.searched == expected
    assert torch.backends.cudnn.benchmark
    model.searched.clear()
    images = torch.rand(5, 3, 16, 24).split(2)
    batches = [
        Batch(some, torch.zeros(len(some), dtype=torch.int64), [], [], []) for some in images
    ]
    pooled = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    evaluate_classifier(pooled, batches, identity, "t", 5)
    assert model.searched == [(2, 24, True), (2, 24, True), (1, 24, False)]


def test_half_precision_scores(model):
    images, labels = pixels(4, (16, 24))
    more = (identity, 4, "", 4, torch.ones(4))
    half, _ = evaluate(model, batches_of(images, labels, 2), *more, torch.bfloat16)
    full, _ = evaluate(model, batches_of(images, labels, 2), *more)
    assert half != full and half == pytest.approx(full, rel=0.05)


@pytest.mark.parametrize("size", [(9, 14), (40, 60), (257, 33), (5, 7), (1, 1)])
@pytest.mark.parametrize("rows", [7, 64])
def test_a_label_map_is_the_argmax_of_the_upsampled_logits(size, rows):
    logits = torch.randn(6, 9, 14, generator=torch.Generator().manual_seed(0))
    labels = label_map(logits, size, rows)
    upsampled = F.interpolate(logits[None], size, mode="bilinear", align_corners=True)[0]
    assert labels.dtype == torch.uint8 and labels.shape == size
    chosen = upsampled.gather(0, labels[None].long())[0]
    assert torch.allclose(chosen, upsampled.amax(0), atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_of_equal_logits_the_first_is_the_argmax(memory_format):
    """Like torch's own argmax on a CPU, for any memory format."""
    logits = torch.randint(0, 4, (1, 7, 33, 45), generator=torch.Generator().manual_seed(0))
    logits = logits.float().contiguous(memory_format=memory_format)[0]
    before = logits.clone()
    assert torch.equal(argmax_classes(logits), logits.argmax(0).byte())
    assert torch.equal(logits, before)


# Image classification


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_classifier_is_scored_as_by_hand(batch_size):
    rows = torch.tensor([[9, 1, 5], [2, 6, 4], [3, 3, 8], [7, 0, 1]], dtype=torch.uint8)
    images, labels = rows[..., None, None], torch.tensor([0, 2, 2, 1])
    model, seen = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False)), []
    model[1].weight.data = torch.eye(3)
    batches = [
        Batch(images[start : start + batch_size], labels[start : start + batch_size], [], [], [])
        for start in range(0, 4, batch_size)
    ]
    scores = evaluate_classifier(
        model,
        batches,
        lambda x: x.float() / 2,
        "",
        4,
        on_batch=lambda batch, logits: seen.append((batch, logits)),
    )
    assert scores["val_top1"] == 0.5 and scores["val_top5"] == 1.0  # there are only three classes
    losses = [
        math.log(sum(math.exp(x / 2 - row[label] / 2) for x in row))
        for row, label in zip(rows.tolist(), labels.tolist(), strict=True)
    ]
    assert scores["val_loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert [batch for batch, _ in seen] == batches and not model.training
    assert torch.equal(torch.cat([logits for _, logits in seen]), rows / 2)


# Memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    ],
)
def test_a_gpu_without_memory_says_which_batch_was_too_large(error):
    with pytest.raises(OutOfMemory, match=r"with a batch of 2 images of 24x16$"):
        with memory_errors(torch.zeros(2, 3, 16, 24)):
            raise error


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="multiplied"), memory_errors(torch.zeros(2, 3, 16, 24)):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
