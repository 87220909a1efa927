import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from datasets.check import check_files, labels_without_image
from datasets.cityscapes import Cityscapes
from datasets.images import DatasetError

CLASSES = Cityscapes.CLASSES


def test_class_table():
    assert len(CLASSES) == len(CLASSES.names) == len(CLASSES.colors) == 19
    assert len(CLASSES.categories) == 19 and len(set(CLASSES.categories)) == 7
    assert CLASSES.names[0] == "road" and CLASSES.names[18] == "bicycle"
    assert CLASSES.colors[13] == (0, 0, 142)


def test_label_ids_map_to_train_ids():
    table = CLASSES.to_train_ids()
    for c in torchvision.datasets.Cityscapes.classes:
        # The license plate has trainId -1, which is ignored like the 255 of others.
        assert table[c.id] == (c.train_id if c.train_id >= 0 else 255), c.name
    assert (table[34:255] == 254).all()
    assert (table[list(CLASSES.label_ids)] == np.arange(19)).all()


def test_items_are_pairs_in_the_order_of_their_names(cityscapes):
    train = Cityscapes(cityscapes, "train")
    assert len(train) == 6
    assert train.pairs == sorted(train.pairs)
    for image, label in train.pairs:
        assert label == image.replace("leftImg8bit", "gtFine").replace(
            "_gtFine.png", "_gtFine_labelIds.png"
        )
    image, label = train[2]
    assert image.dtype == label.dtype == torch.uint8
    stored, ids = (np.array(Image.open(path)) for path in train.pairs[2])
    assert (image.numpy() == stored.transpose(2, 0, 1)).all() and stored.shape == (64, 128, 3)
    assert (label.numpy() == CLASSES.to_train_ids()[ids]).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fine", [("gtFine/train", 6)]),
        ("coarse", [("gtCoarse/train", 6), ("gtCoarse/train_extra", 3)]),
        ("fine+coarse", [("gtFine/train", 6), ("gtCoarse/train_extra", 3)]),
    ],
)
def test_parts_to_train_on(cityscapes, name, expected):
    parts = [Cityscapes(cityscapes, split) for split in Cityscapes.TRAIN_ON[name]]
    assert [len(part) for part in parts] == [count for _, count in expected]
    for part, (folder, _) in zip(parts, expected, strict=True):
        split = folder.split("/")[1]
        assert all(f"/leftImg8bit/{split}/" in image for image, _ in part.pairs)
        assert all(f"/{folder}/" in label for _, label in part.pairs)


def test_val_has_coarse_labels_too(cityscapes):
    fine, coarse = Cityscapes(cityscapes, "val"), Cityscapes(cityscapes, "val_coarse")
    assert [image for image, _ in fine.pairs] == [image for image, _ in coarse.pairs]
    assert all("/gtCoarse/val/" in label for _, label in coarse.pairs)


def test_test_labels_are_not_read(cityscapes_copy):
    shutil.rmtree(cityscapes_copy / "gtFine/test")
    test = Cityscapes(cityscapes_copy, "test")
    image, label = test[0]
    assert len(test) == 2 and image.shape == (3, 64, 128)
    assert [path for _, path in test.pairs] == [None, None]
    assert label.shape == (64, 128) and (label == 255).all()


def test_other_files_are_not_listed(cityscapes_copy):
    folder = next((cityscapes_copy / "leftImg8bit/val").iterdir())
    (folder / "Thumbs.db").write_bytes(b"")
    assert len(Cityscapes(cityscapes_copy, "val")) == 3


def test_the_broken_image_is_left_out_with_a_warning(cityscapes_copy):
    images = next((cityscapes_copy / "leftImg8bit/train_extra").iterdir())
    labels = next((cityscapes_copy / "gtCoarse/train_extra").iterdir())
    (images / "troisdorf_000000_000073_leftImg8bit.png").write_bytes(b"broken")
    (labels / "troisdorf_000000_000073_gtCoarse_labelIds.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="troisdorf_000000_000073"):
        train_extra = Cityscapes(cityscapes_copy, "train_extra")
    assert len(train_extra) == 3 and labels_without_image(train_extra) == []


def test_an_image_without_its_label_is_named(cityscapes_copy):
    label = Cityscapes(cityscapes_copy, "train").pairs[1][1]
    (cityscapes_copy / label).unlink()
    with pytest.raises(DatasetError, match=f"1 of 6 images .* have no label.*{label}"):
        Cityscapes(cityscapes_copy, "train")


def test_missing_folders_are_named(tmp_path):
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
    path = train.pairs[0][1]
    put_id(path, 77)
    with pytest.raises(DatasetError, match=f"{path} holds the label id 77"):
        train[0]


def test_255_is_ignored(cityscapes_copy):
    train = Cityscapes(cityscapes_copy, "train")
    put_id(train.pairs[0][1], 255)
    assert train[0][1][3, 4] == 255


def test_a_label_of_another_size_is_found(cityscapes_copy):
    train = Cityscapes(cityscapes_copy, "train")
    assert check_files(train.pairs) == [(64, 128)] * 6
    path = train.pairs[5][1]
    Image.new("L", (64, 64)).save(path)
    with pytest.raises(DatasetError, match=f"{path} is 64x64"):
        check_files(train.pairs)
    with pytest.raises(DatasetError, match=f"{path} is 64x64"):
        train[5]
