import json

import numpy as np
import pytest
from conftest import FIELD_SIZES, run_script, same_weights
from PIL import Image

from datasets.folder import MAX_CLASSES, Folder, read_classes
from datasets.images import DatasetError
from utils.checkpoint import load_checkpoint

# Files of classes


def classes_of(tmp_path, text: str, name: str = "classes.txt"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_classes(tmp_path / name)


def test_a_text_file_has_a_line_for_each_value(fields):
    classes = read_classes(fields / "classes.txt")
    assert list(classes.names) == ["grass", "water", "dirt road"]
    assert list(classes.label_ids) == [0, 1, 3] and list(classes.ignored_ids) == [2]
    assert classes.colors[:2] == [(90, 160, 60), (0, 80, 200)]
    assert classes.to_train_ids()[:5].tolist() == [0, 1, 255, 2, 254]


@pytest.mark.parametrize(
    "content",
    [
        [{"name": "grass", "color": [9, 8, 7]}, "ignore", {"name": "dirt road"}],
        {"grass": [9, 8, 7], "ignore": None, "dirt road": None},
        [{"name": "grass", "color": [9, 8, 7]}, {"name": "ignore"}, {"name": "dirt road"}],
    ],
)
def test_a_json_file_has_one_of_several_forms(tmp_path, content):
    classes = classes_of(tmp_path, json.dumps(content), "classes.json")
    assert list(classes.names) == ["grass", "dirt road"]
    assert list(classes.label_ids) == [0, 2] and list(classes.ignored_ids) == [1]
    assert classes.colors[0] == (9, 8, 7)


@pytest.mark.parametrize("name", ["ignore", "ignored", "Unlabeled", "unlabelled", "VOID"])
def test_classes_are_ignored_by_name(tmp_path, name):
    classes = classes_of(tmp_path, f"road\n{name} 0 0 0\nsky\n")
    assert list(classes.names) == ["road", "sky"] and list(classes.ignored_ids) == [1]


def test_a_file_of_windows_is_read(tmp_path):
    """With a byte order mark, and other line ends."""
    for name, text in (("a.txt", "road 1 2 3\r\nsky\r\n"), ("b.json", '["road", "sky"]')):
        (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
        assert list(read_classes(tmp_path / name).names) == ["road", "sky"]


def test_names_may_hold_spaces_letters_of_any_language_and_numbers(tmp_path):
    classes = classes_of(tmp_path, "traffic light 250 170 30\nWeg Straße\nlane 2\n木 1,2,3\n")
    assert list(classes.names) == ["traffic light", "Weg Straße", "lane 2", "木"]
    assert classes.colors[0] == (250, 170, 30) and classes.colors[3] == (1, 2, 3)


@pytest.mark.parametrize("count", [2, 3, 20, MAX_CLASSES])
def test_classes_without_a_colour_get_a_unique_one(tmp_path, count):
    classes = classes_of(tmp_path, "".join(f"class-{n}\n" for n in range(count)))
    assert len(classes) == count == len(set(classes.colors))
    for color in classes.colors:
        assert len(color) == 3 and all(type(v) is int and 0 <= v <= 255 for v in color)
    assert list(classes.label_ids) == list(range(count))
    assert classes.to_train_ids()[count:255].tolist() == [254] * (255 - count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("road\nsky\nroad\n", "every class needs a unique name, 'road' is not"),
        ("ignore\na\nb\nignore\n", "'ignore' is not"),
        ("road 1 2 256\nsky\n", r"the colour of road is \[1, 2, 256\]: give three integers"),
        ("road 1 2 3\n", "has 1 classes: give 2 to 254"),
        ("road\nignore\n", "has 1 classes"),
        ("# road\n\n", "has 0 classes"),
        ("".join(f"c{n}\n" for n in range(255)), "has 255 classes"),
    ],
)
def test_wrong_text_files(tmp_path, text, message):
    with pytest.raises(DatasetError, match=rf"classes\.txt.*{message}"):
        classes_of(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["road", "sky"', "is not a JSON list of"),
        ("5", "is not a JSON list of"),
        ('"road and sky"', "is not a JSON list of"),
        ("[1, 2]", "is not a JSON list of"),
        ('[{"color": [1, 2, 3]}, "sky"]', "is not a JSON list of"),
        ('{"road": 7, "sky": 8}', "is not a JSON list of"),
        ('["road", "road"]', "'road' is not"),
        ('["road", ""]', "'' is not"),
        ('["road"]', "has 1 classes"),
        ('{"road": [1, 2], "sky": null}', r"the colour of road is \[1, 2\]"),
        ('{"road": [1, 2, 3.5], "sky": null}', r"the colour of road is \[1, 2, 3.5\]"),
        ('{"road": [1, 2, -3], "sky": null}', r"the colour of road is \[1, 2, -3\]"),
        ('{"road": [1, 2, true], "sky": null}', r"the colour of road is \[1, 2, True\]"),
        ('{"road": "red", "sky": null}', "the colour of road is"),
    ],
)
def test_wrong_json_files(tmp_path, text, message):
    with pytest.raises(DatasetError, match=rf"classes\.json.*{message}"):
        classes_of(tmp_path, text, "classes.json")


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Straße\nWeg\n".encode("latin-1"))
    for name in ("none.txt", "latin.txt", ""):
        with pytest.raises(DatasetError, match=f"{name} cannot be read as a file of classes"):
            read_classes(tmp_path / name)


# The data set


def test_splits_are_pairs_of_two_folders(fields):
    classes = read_classes(fields / "classes.txt")
    for split, sizes in FIELD_SIZES.items():
        dataset = Folder(fields, split, classes)
        assert len(dataset) == len(sizes) == len(dataset.pairs)
        for index, (image, label) in enumerate(dataset.pairs):
            assert image.startswith(f"{fields}/images/{split}/{index}.")
            assert label == f"{fields}/labels/{split}/{index}.png"
            assert dataset[index][1].shape == sizes[index]
            stored = np.array(Image.open(label))
            assert (dataset[index][1].numpy() == classes.to_train_ids()[stored]).all()


def test_test_may_come_without_labels(fields_copy):
    classes = read_classes(fields_copy / "classes.txt")
    (fields_copy / "images/val").rename(fields_copy / "images/test")
    test = Folder(fields_copy, "test", classes)
    assert [label for _, label in test.pairs] == [None, None]
    assert (test[0][1] == 255).all() and test[0][1].shape == (72, 96)
    (fields_copy / "labels/val").rename(fields_copy / "labels/test")
    assert (Folder(fields_copy, "test", classes)[0][1] != 255).any()


def test_train_needs_its_labels(fields_copy):
    (fields_copy / "labels/train").rename(fields_copy / "labels/away")
    with pytest.raises(DatasetError, match="labels/train does not exist"):
        Folder(fields_copy, "train", read_classes(fields_copy / "classes.txt"))


def test_an_image_without_its_label_is_named(fields_copy):
    classes, missing = read_classes(fields_copy / "classes.txt"), fields_copy / "labels/train/2.png"
    missing.unlink()
    message = f"1 of 4 images of train have no label, first missing: {missing} .*; unpack"
    with pytest.raises(DatasetError, match=message):
        Folder(fields_copy, "train", classes)
    assert len(Folder(fields_copy, "train", classes, need_labels=False)) == 4


# Training and scoring

QUICK = ("--preset", "camvid", "--height", 72, "--crop", 64, 64, "--batch-size", 2, "--D", 4)
QUICK += ("--epochs", 1, "--workers", 0)


def argv_of(root, *options) -> tuple:
    return ("--datadir", root, "--classes", root / "classes.txt", *QUICK, *options)


@pytest.fixture(scope="module")
def run_folder(fields, tmp_path_factory):
    """The folder of a short run on images of several sizes; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "fields"
    assert run_script("main.py", *argv_of(fields, "--savedir", folder)) == 0
    return folder


def test_a_checkpoint_describes_its_data(run_folder):
    best = load_checkpoint(run_folder / "best.pth")
    assert best["dataset"] == "folder" and best["class_names"] == ["grass", "water", "dirt road"]
    assert best["label_ids"] == [0, 1, 3] and best["ignored_ids"] == [2]
    assert best["colors"][0] == [90, 160, 60] and len(best["colors"]) == 3
    assert best["model"]["decoder.classifier.weight"].shape[0] == 3
    counts = json.loads((run_folder / "class_counts.json").read_text())
    assert list(counts) == ["grass", "water", "dirt road", "ignored"]
    assert sum(counts.values()) == sum(height * width for height, width in FIELD_SIZES["train"])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_images_of_several_sizes_are_scored(run_folder, script, fields, tmp_path, batch_size):
    argv = ("--checkpoint", run_folder / "best.pth", "--datadir", fields, "--json", "f.json")
    argv += ("--save-results", "out", "--workers", 0, "--batch-size", batch_size)
    result = script("eval_cityscapes_server.py", *argv)
    assert result.status == 0, result.err
    figures = json.loads((tmp_path / "f.json").read_text())
    assert list(figures["class_iou"]) == ["grass", "water", "dirt road"]
    best = load_checkpoint(run_folder / "best.pth")["best"]
    assert figures["class_miou"] == pytest.approx(best["miou"], abs=1e-3)
    for name, size in zip(("0.png", "1.png"), FIELD_SIZES["val"], strict=True):
        found = np.array(Image.open(tmp_path / "out" / name))
        assert found.shape == size and set(np.unique(found)) <= {0, 1, 3}


def test_fine_tuning_from_other_classes(trained, script, fields, tmp_path):
    argv = argv_of(fields, "--init", trained / "best.pth", "--D", 20, "--lr", 1e-9)
    result = script("main.py", *argv, "--savedir", "a")
    assert result.status == 0, result.err
    assert "since the classes differ: decoder.classifier.weight" in result.out
    tuned = load_checkpoint(tmp_path / "save/a/best.pth")
    assert tuned["class_names"] == ["grass", "water", "dirt road"]
    start = load_checkpoint(trained / "best.pth")["model"]
    # All else began as it was: so small a rate changes hardly anything.
    name = "encoder.3.left.0.weight"
    assert abs(tuned["model"][name] - start[name]).max() < 1e-6
    assert tuned["model"]["decoder.classifier.weight"].shape[0] == 3


def test_a_resumed_run_keeps_its_classes(run_folder, script, fields_copy, tmp_path):
    """Whatever their file says by then; and comes to the same weights."""
    argv = argv_of(fields_copy, "--epochs", 2, "--savedir", tmp_path / "a")
    assert script("main.py", *argv).status == 0
    weights = load_checkpoint(tmp_path / "a/last.pth")["model"]
    (tmp_path / "a/last.pth").unlink()
    (fields_copy / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    result = script("main.py", *argv, "--resume")
    assert result.status == 0, result.err
    stored = load_checkpoint(tmp_path / "a/last.pth")
    assert stored["class_names"] == ["grass", "water", "dirt road"]
    assert same_weights(stored["model"], weights)


def test_refused_runs_leave_no_folder(fails, fields_copy, tmp_path):
    """The other mistakes are those of open_splits and read_classes."""
    Image.new("RGB", (96, 72)).save(fields_copy / "images/train/0.jpg")
    argv = argv_of(fields_copy, "--savedir", "refused")
    assert "holds 0 twice" in fails("main.py", *argv)
    (fields_copy / "images/train/0.jpg").unlink()
    (fields_copy / "labels/val/1.png").unlink()
    assert "first missing: " in fails("main.py", *argv)
    assert "none.txt cannot be read" in fails("main.py", *argv, "--classes", "none.txt")
    assert not (tmp_path / "save").exists()
