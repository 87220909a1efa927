import math

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
from PIL import Image

from datasets.cityscapes import Cityscapes
from datasets.segmentation import write_label
from utils.metrics import ConfusionMatrix, TopKAccuracy, mean_score


def test_worked_example():
    labels = torch.tensor([[0, 0, 1], [1, 255, 2]])
    predictions = torch.tensor([[0, 1, 1], [1, 0, 1]])
    confusion = ConfusionMatrix(4)
    confusion.update(predictions, labels)
    assert confusion.counts.dtype == torch.int64
    assert confusion.counts.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0] * 4]
    iou = confusion.class_iou()
    assert iou[:3].tolist() == [1 / 2, 2 / 4, 0]
    assert iou[3].isnan()  # absent from truth and prediction: not in the mean
    assert mean_score(iou) == confusion.summary()["miou"] == pytest.approx(1 / 3)
    assert confusion.pixel_accuracy() == 3 / 5
    assert confusion.mean_accuracy() == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert confusion.category_iou(["a", "b", "b", "c"]) == pytest.approx(
        {"a": 1 / 2, "b": 3 / 4, "c": math.nan}, nan_ok=True
    )


def test_updates_add_up():
    labels, predictions = torch.randint(0, 5, (2, 4, 9, 9))
    together, apart = ConfusionMatrix(5), ConfusionMatrix(5)
    logits = torch.nn.functional.one_hot(predictions, 5).movedim(-1, 1)
    together.update_from_logits(logits, labels)
    for prediction, label in zip(predictions, labels, strict=True):
        apart.update(prediction, label)
    assert torch.equal(together.counts, apart.counts)
    assert together.counts.sum() == labels.numel()


def test_counting_does_not_wait_for_a_gpu():
    """Reading a value would wait, and fails for tensors on the device "meta"."""
    labels = torch.zeros(2, 4, 4, dtype=torch.int64, device="meta")
    ConfusionMatrix(3, "meta").update_from_logits(torch.rand(2, 3, 4, 4, device="meta"), labels)
    TopKAccuracy(device="meta").update_from_logits(torch.rand(2, 3, device="meta"), labels[:, 0, 0])


def test_agrees_with_the_official_evaluation(tmp_path, monkeypatch):
    """Class and category IoU of the same PNGs, with ignored labels and absent classes."""
    rng = np.random.default_rng(0)
    confusion, classes = ConfusionMatrix(19), Cityscapes.CLASSES
    truths, predictions = [], []
    for number in range(3):
        truth = rng.integers(0, 34, (40, 80)).astype(np.uint8)
        truth[truth == 33] = 7  # no bicycle in the truth, but in the prediction
        truth[truth == 31] = 7  # no train in either
        right = rng.random((40, 80)) < 0.6
        guess = rng.choice([i for i in range(19) if i != 16], (40, 80))
        known = classes.to_train_ids()[truth]
        train_ids = np.where(right & (known < 19), known, guess).astype(np.uint8)
        confusion.update(torch.from_numpy(train_ids).long(), torch.from_numpy(known).long())

        name = f"town_{number:06d}_000019"
        truths.append(str(tmp_path / f"{name}_gtFine_labelIds.png"))
        predictions.append(str(tmp_path / f"{name}_pred_labelIds.png"))
        Image.fromarray(truth).save(truths[-1])
        Image.fromarray(truth).save(truths[-1].replace("labelIds", "instanceIds"))
        write_label(predictions[-1], torch.from_numpy(train_ids), classes)

    # Its instance scores need an older numpy; class and category IoU do not depend on them.
    monkeypatch.setattr(official.args, "evalInstLevelScore", False)
    monkeypatch.setattr(official.args, "JSONOutput", False)
    monkeypatch.setattr(official.args, "quiet", True)
    result = official.evaluateImgLists(predictions, truths, official.args)

    ours = dict(zip(classes.names, confusion.class_iou().tolist(), strict=True))
    assert math.isnan(ours["train"]) and ours["bicycle"] == 0
    for name, iou in ours.items():
        assert iou == pytest.approx(result["classScores"][name], abs=1e-12, nan_ok=True)
    categories = confusion.category_iou(classes.categories)
    assert len(categories) == 7
    for name, iou in categories.items():
        assert iou == pytest.approx(result["categoryScores"][name], abs=1e-12)
    assert mean_score(list(ours.values())) == pytest.approx(
        result["averageScoreClasses"], abs=1e-12
    )
    assert mean_score(list(categories.values())) == pytest.approx(
        result["averageScoreCategories"], abs=1e-12
    )


def test_top_k_worked_example():
    accuracy = TopKAccuracy(ks=(1, 2, 3))
    logits = torch.tensor(
        [[5.0, 1, 2, 4], [1, 5, 4, 2], [4, 2, 5, 1], [1, 2, 4, 5], [5, 4, 2, 1], [2, 1, 4, 5]]
    )
    # The label is the 1st, 2nd, 4th, 1st, 3rd and 2nd of each row.
    labels = torch.tensor([0, 2, 3, 3, 2, 2])
    accuracy.update_from_logits(logits[:4], labels[:4])
    assert accuracy.summary() == {"top1": 2 / 4, "top2": 3 / 4, "top3": 3 / 4}
    accuracy.update_from_logits(logits[4:], labels[4:])
    assert accuracy.summary() == {"top1": 2 / 6, "top2": 4 / 6, "top3": 5 / 6}
    assert accuracy.counts[-1] == 6  # images


def test_top_5_of_fewer_classes_always_hits():
    accuracy = TopKAccuracy()
    assert all(math.isnan(share) for share in accuracy.summary().values())
    accuracy.update_from_logits(torch.tensor([[1.0, 2, 3], [3, 2, 1]]), torch.tensor([0, 0]))
    assert accuracy.summary() == {"top1": 0.5, "top5": 1.0}
