import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import tv_tensors

from datasets.cityscapes import (
    CATEGORIES,
    CLASS_NAMES,
    COLORS,
    LABEL_ID_TO_TRAIN_ID,
    TRAIN_ID_TO_LABEL_ID,
    Cityscapes,
    check_files,
    training_parts,
)
from datasets.files import DatasetError


def test_class_table():
    assert len(CLASS_NAMES) == len(COLORS) == 19 and len(set(CATEGORIES)) == 7
    assert CLASS_NAMES[0] == "road" and CLASS_NAMES[18] == "bicycle"
    assert COLORS[13] == (0, 0, 142)


def test_label_ids_map_to_train_ids():
    for c in torchvision.datasets.Cityscapes.classes:
        # The license plate has trainId -1, which is ignored like the 255 of others.
        assert LABEL_ID_TO_TRAIN_ID[c.id] == (c.train_id if c.train_id >= 0 else 255), c.name
    assert (LABEL_ID_TO_TRAIN_ID[34:255] == 254).all()
    assert (LABEL_ID_TO_TRAIN_ID[TRAIN_ID_TO_LABEL_ID] == np.arange(19)).all()


def test_items_are_pairs_in_the_order_of_their_names(cityscapes):
    train = Cityscapes(cityscapes, "train")
    assert len(train) == 6
    assert train.images == sorted(train.images)
    for image, (label,) in zip(train.images, train.targets, strict=True):
        assert label == image.replace("leftImg8bit", "gtFine").replace(
            "_gtFine.png", "_gtFine_labelIds.png"
        )
    image, label = train[2]
    assert image.size == (128, 64) and image.mode == "RGB"
    assert isinstance(label, tv_tensors.Mask) and label.dtype == torch.uint8
    stored = np.array(Image.open(train.targets[2][0]))
    assert (label.numpy() == LABEL_ID_TO_TRAIN_ID[stored]).all()


@pytest.mark.parametrize(
    ("annotations", "parts"),
    [
        ("fine", [("gtFine", "train", 6)]),
        ("coarse", [("gtCoarse", "train", 6), ("gtCoarse", "train_extra", 3)]),
        ("fine+coarse", [("gtFine", "train", 6), ("gtCoarse", "train_extra", 3)]),
    ],
)
def test_annotations_choose_the_parts(cityscapes, annotations, parts):
    found = training_parts(cityscapes, annotations)
    assert [(part.mode, part.split, len(part)) for part in found] == parts
    for part in found:
        assert all(f"/{part.mode}/{part.split}/" in target[0] for target in part.targets)


def test_test_labels_are_not_read(cityscapes_copy):
    for label in (cityscapes_copy / "gtFine/test").rglob("*.png"):
        label.unlink()
    test = Cityscapes(cityscapes_copy, "test")
    image, label = test[0]
    assert len(test) == 2 and image.size == (128, 64)
    assert label.shape == (64, 128) and (label == 255).all()


def test_stray_files_are_no_images(cityscapes_copy):
    folder = next((cityscapes_copy / "leftImg8bit/val").iterdir())
    (folder / "Thumbs.db").write_bytes(b"")
    assert len(Cityscapes(cityscapes_copy, "val")) == 3


def test_the_broken_image_is_left_out_with_a_warning(cityscapes_copy):
    folder = next((cityscapes_copy / "leftImg8bit/train_extra").iterdir())
    (folder / "troisdorf_000000_000073_leftImg8bit.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="troisdorf_000000_000073"):
        assert len(Cityscapes(cityscapes_copy, "train_extra", "coarse")) == 3


def test_an_image_without_its_label_is_named(cityscapes_copy):
    label = Cityscapes(cityscapes_copy, "train").targets[1][0]
    (cityscapes_copy / label).unlink()
    with pytest.raises(DatasetError, match=f"1 of 6 images .* have no label.*{label}"):
        Cityscapes(cityscapes_copy, "train")


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(DatasetError, match="nowhere does not exist"):
        Cityscapes(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="no folder leftImg8bit/train"):
        Cityscapes(tmp_path, "train")
    (tmp_path / "leftImg8bit/train").mkdir(parents=True)
    with pytest.raises(DatasetError, match="no folder gtFine/train"):
        Cityscapes(tmp_path, "train")
    (tmp_path / "gtFine/train").mkdir(parents=True)
    with pytest.raises(DatasetError, match="holds no <city>"):
        Cityscapes(tmp_path, "train")


def put_id(path: str, value: int) -> None:
    """Change one pixel of a label map."""
    label = np.array(Image.open(path))
    label[3, 4] = value
    Image.fromarray(label).save(path)


def test_an_unknown_id_is_named_with_its_file(cityscapes_copy):
    train = Cityscapes(cityscapes_copy, "train")
    path = train.targets[0][0]
    put_id(path, 77)
    with pytest.raises(DatasetError, match=f"{path} holds the label id 77"):
        train[0]


def test_255_is_ignored(cityscapes_copy):
    train = Cityscapes(cityscapes_copy, "train")
    put_id(train.targets[0][0], 255)
    assert train[0][1][3, 4] == 255


def test_check_files_finds_a_label_of_another_size(cityscapes_copy):
    train = Cityscapes(cityscapes_copy, "train")
    check_files(train)
    Image.new("L", (64, 64)).save(train.targets[5][0])
    with pytest.raises(DatasetError, match=f"{train.targets[5][0]} is 64x64"):
        check_files(train)
    with pytest.raises(DatasetError, match=f"{train.targets[5][0]} is 64x64"):
        train[5]


def test_check_files_compares_the_sizes_of_all_parts(cityscapes_copy):
    parts = training_parts(cityscapes_copy, "fine+coarse")
    check_files(*parts)
    for path, mode in ((parts[1].images[2], "RGB"), (parts[1].targets[2][0], "L")):
        Image.new(mode, (64, 64)).save(path)
    with pytest.raises(DatasetError, match="must have one size"):
        check_files(*parts)
