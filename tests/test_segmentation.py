import numpy as np
import pytest
import torch
from PIL import Image

from datasets import DATASETS
from datasets.camvid import CamVid
from datasets.images import DatasetError
from datasets.segmentation import Classes, ranges, resize_label, resized_size, write_label
from utils.checkpoint import load_checkpoint, save_checkpoint

CLASSES = Classes(
    names=["road", "sky", "tree"],
    colors=[(1, 2, 3), (4, 5, 6), (7, 8, 9)],
    label_ids=[7, 0, 200],
    ignored_ids=[5],
    categories=["flat", "far", "nature"],
)

# Classes


def test_label_ids_become_train_ids():
    table = CLASSES.to_train_ids()
    assert table.shape == (256,) and table.dtype == np.uint8
    found = {value: train_id for value, train_id in enumerate(table.tolist()) if train_id != 254}
    assert found == {7: 0, 0: 1, 200: 2, 5: 255, 255: 255}


@pytest.mark.parametrize(
    "classes", [CLASSES, *(kind.CLASSES for kind in DATASETS.values() if kind.CLASSES)]
)
def test_classes_come_back_from_a_checkpoint(classes, tmp_path):
    save_checkpoint(classes.to_checkpoint() | {"model": {}}, tmp_path / "classes.pth")
    back = Classes.from_checkpoint(load_checkpoint(tmp_path / "classes.pth"))
    assert (back.to_train_ids() == classes.to_train_ids()).all()
    assert list(back.names) == list(classes.names)
    assert [tuple(color) for color in back.colors] == [tuple(color) for color in classes.colors]
    assert list(back.label_ids) == list(classes.label_ids)
    assert list(back.categories) == list(classes.categories)
    assert back.to_checkpoint() == classes.to_checkpoint()


def test_old_checkpoints_lack_categories_and_ignored_ids():
    stated = CLASSES.to_checkpoint()
    del stated["ignored_ids"], stated["categories"]
    back = Classes.from_checkpoint(stated)
    assert back.to_train_ids()[5] == 254 and not back.categories


# Items


def test_items_are_bytes_and_train_ids(camvid):
    train = CamVid(camvid, "train")
    for index, paths in enumerate(train.pairs):
        image, label = train[index]
        assert image.dtype == label.dtype == torch.uint8
        pixels, ids = (np.array(Image.open(path)) for path in paths)
        assert (image.numpy() == pixels.transpose(2, 0, 1)).all()
        assert (label.numpy() == np.where(ids == 11, 255, ids)).all()


def test_images_are_resized_as_pil_does_and_labels_with_them(camvid):
    whole, half = CamVid(camvid, "train"), CamVid(camvid, "train", height=36)
    image, label = half[0]
    with Image.open(half.pairs[0][0]) as stored:
        expected = np.asarray(stored.resize((48, 36), Image.Resampling.BILINEAR))
    assert (image.numpy() == expected.transpose(2, 0, 1)).all()
    assert torch.equal(label, resize_label(whole[0][1], (36, 48)))


def test_labels_may_keep_their_size(camvid):
    image, label = CamVid(camvid, "val", height=36, resize_labels=False)[0]
    assert image.shape == (3, 36, 48)
    assert torch.equal(label, CamVid(camvid, "val")[0][1]) and label.shape == (72, 96)


def test_other_classes_may_be_given(camvid_copy):
    label = camvid_copy / "trainannot/0000TP_000000.png"
    Image.fromarray(np.full((72, 96), 200, np.uint8)).save(label)
    train = CamVid(camvid_copy, "train", CLASSES)
    assert (train[0][1] == 2).all() and train.classes is CLASSES


def put_ids(path, *values: int) -> None:
    """Change the first pixels of a label map."""
    label = np.array(Image.open(path))
    label[0, : len(values)] = values
    Image.fromarray(label).save(path)


def test_unknown_label_ids_are_named_with_their_file(camvid_copy):
    train = CamVid(camvid_copy, "train")
    path = train.pairs[3][1]
    put_ids(path, 255, 12, 200)
    message = f"{path} holds the label id 12, 200, which .* label ids are 0 to 11, and 255 is"
    with pytest.raises(DatasetError, match=message):
        train[3]
    put_ids(path, 255, 0, 0)
    assert train[3][1][0, :3].tolist() == [255, 0, 0]


def test_a_label_of_another_size_is_named(camvid_copy):
    train = CamVid(camvid_copy, "train")
    Image.new("L", (40, 30)).save(train.pairs[0][1])
    with pytest.raises(DatasetError, match="png is 40x30 but its image is 96x72"):
        train[0]


def test_unknown_splits_and_missing_folders(camvid, tmp_path):
    with pytest.raises(ValueError, match="split is 'training', not one of train, val"):
        CamVid(camvid, "training")
    with pytest.raises(DatasetError, match="nowhere does not exist"):
        CamVid(tmp_path / "nowhere")


def test_ranges():
    assert ranges([]) == "" and ranges([3]) == "3"
    assert ranges([0, 1, 2, 5]) == "0 to 2, 5"
    assert ranges([1, 3, 4, 9]) == "1, 3 to 4, 9"


# Labels


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_labels_take_the_pixel_at_the_centre(factor):
    """torchvision's own Resize takes the top-left pixel of each block: half a block off."""
    label = torch.arange(64 * 64).view(64, 64)
    small = resize_label(label, (64 // factor, 64 // factor))
    centre = factor // 2
    assert torch.equal(small, label[centre::factor, centre::factor])
    pil = Image.fromarray(label.numpy().astype(np.int32)).resize(
        (64 // factor, 64 // factor), Image.Resampling.NEAREST
    )
    assert small.tolist() == np.asarray(pil).tolist()


@pytest.mark.parametrize("size", [(37, 91), (128, 300), (5, 5)])
def test_resized_labels_hold_no_new_value(size):
    label = torch.tensor([0, 18, 255], dtype=torch.uint8)[torch.randint(3, (64, 128))]
    resized = resize_label(label, size)
    assert resized.shape == size and resized.dtype == torch.uint8
    assert set(resized.unique().tolist()) <= {0, 18, 255}
    batch = resize_label(torch.stack([label, label.flip(0)]), size)
    assert batch.shape == (2, *size) and torch.equal(batch[0], resized)


def test_resized_size_keeps_the_proportions():
    assert resized_size(1024, 2048, 512) == (512, 1024)
    assert resized_size(360, 480, 100) == (100, 133)
    assert resized_size(1000, 1, 10) == (10, 1)


def test_a_prediction_is_written_in_the_data_sets_own_ids(tmp_path):
    prediction = torch.tensor([[0, 1], [2, 0], [1, 1]])
    write_label(tmp_path / "label.png", prediction, CLASSES)
    with Image.open(tmp_path / "label.png") as label:
        assert label.mode == "L"
        assert np.array(label).tolist() == [[7, 0], [200, 7], [0, 0]]


def test_a_result_has_the_stem_of_its_image(camvid):
    val = CamVid(camvid, "val")
    assert [val.result_name(index) for index in range(3)] == [
        f"0001TP_00000{number}.png" for number in range(3)
    ]
