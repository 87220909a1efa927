"""Which files are data: what people, cameras, labelling tools and file servers put beside them."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from datasets.camvid import CamVid
from datasets.check import labels_without_image
from datasets.cityscapes import Cityscapes
from datasets.class_file import read_classes
from datasets.folder import Folder
from datasets.imagenet import ImageFolder
from datasets.images import DatasetError
from datasets.listing import list_pictures, matched_files
from datasets.pictures import find_pictures

STRAYS = [
    *("._x.png", ".DS_Store", ".ipynb_checkpoints/x-checkpoint.png", "Thumbs.db", "desktop.ini"),
    *("@eaDir/x.png/SYNOPHOTO_THUMB_M.jpg", "@eaDir/x.png", "__MACOSX/._x.png", "__MACOSX/x.png"),
    *("x.png~", "x.png:Zone.Identifier", "__pycache__/x.png"),
    *("readme.txt", "LICENSE", "notes.md", "#recycle/x.png", "$RECYCLE.BIN/x.png"),
]


def put_strays(*folders: Path) -> None:
    """Put what is no data into folders, each with broken pictures in it."""
    for folder in folders:
        for name in STRAYS:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_dir():
                path.write_bytes(b"no picture")


def put(folder: Path, *names: str, mode: str = "RGB") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = Image.registered_extensions().get(path.suffix.lower())
        if kind is None:
            path.write_bytes(b"")
        else:
            Image.new(mode, (8, 6)).save(path, kind)


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Three images and their labels, one more label, and strays in each folder."""
    images, labels = tmp_path / "images", tmp_path / "labels"
    put(images, "b.png", "a.JPG", "c.d.jpeg")
    put(labels, "a.png", "b.png", "c.d.png", "unused.png", mode="L")
    put_strays(images, labels)
    return images, labels


def names_of(pairs, images: Path, labels: Path) -> dict[str, str]:
    """Names of the labels by those of their images."""
    return {
        str(Path(image).relative_to(images)): str(Path(label).relative_to(labels))
        for image, label in pairs
    }


# Strays


def test_strays_are_ignored_in_own_data_and_camvid(fields_copy, camvid_copy, capsys):
    classes = read_classes(fields_copy / "classes.txt")

    def opened() -> list:
        camvid = [CamVid(camvid_copy, split) for split in ("train", "val", "test")]
        return camvid + [Folder(fields_copy, split, classes) for split in ("train", "val")]

    before = opened()
    put_strays(*(path for path in [*fields_copy.glob("*/*"), *camvid_copy.iterdir()]))
    for one, other in zip(before, opened(), strict=True):
        assert one.pairs == other.pairs and labels_without_image(other) == []
    assert not capsys.readouterr().err


def test_strays_are_ignored_in_cityscapes(cityscapes_copy, capsys):
    before = [Cityscapes(cityscapes_copy, split).pairs for split in Cityscapes.SPLITS]
    places = [*cityscapes_copy.glob("*/*"), *cityscapes_copy.glob("*/*/*")]
    put_strays(*places)
    for place in places:
        if "leftImg8bit" in str(place):
            (place / "._x_leftImg8bit.png").write_bytes(b"no picture")
    assert [Cityscapes(cityscapes_copy, split).pairs for split in Cityscapes.SPLITS] == before
    assert labels_without_image(Cityscapes(cityscapes_copy, "train")) == []
    assert not capsys.readouterr().err


def test_strays_are_neither_images_nor_classes(shapes_copy, capsys):
    before = ImageFolder(shapes_copy, "train", str)
    put_strays(*shapes_copy.glob("*"), *shapes_copy.glob("*/*"))
    after = ImageFolder(shapes_copy, "train", str)
    assert after.classes == before.classes and after.samples == before.samples
    assert ImageFolder(shapes_copy, "val", str, classes=before.classes).classes == before.classes
    assert not capsys.readouterr().err


def test_strays_are_not_segmented(folders, capsys):
    images, _ = folders
    found = [path.removeprefix(f"{images}/") for path, _ in find_pictures([str(images)])]
    assert found == ["a.JPG", "b.png", "c.d.jpeg"] and not capsys.readouterr().err
    found = [path.removeprefix(f"{images}/") for path, _ in find_pictures([f"{images}/**"])]
    assert found == ["LICENSE", "a.JPG", "b.png", "c.d.jpeg"]
    # Whoever names one means it.
    assert find_pictures([str(images / "._x.png")]) == [(str(images / "._x.png"), "._x")]


def test_a_class_of_strays_alone_is_empty(tmp_path):
    put(tmp_path / "train", "cat/a.png")
    put_strays(tmp_path / "train/dog")
    with pytest.raises(DatasetError, match="dog holds no images"):
        ImageFolder(tmp_path, "train", str)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path, "a/b.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied", f"{path}/a")

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DatasetError, match=r"/a cannot be listed \(Permission denied\)"):
        list_pictures(tmp_path)


def test_a_link_to_the_folder_around_it_is_not_followed(tmp_path):
    put(tmp_path / "a", "b/c.png")
    (tmp_path / "a/b/up").symlink_to(tmp_path)
    (tmp_path / "a/here").symlink_to(".")
    (tmp_path / "other").symlink_to("a")
    found = [str(Path(path).relative_to(tmp_path)) for path in list_pictures(tmp_path)]
    assert found == ["a/b/c.png", "other/b/c.png"]


# Kinds of pictures


def test_every_kind_at_any_depth_is_read(tmp_path):
    names = ["a.png", "b.JPG", "c.bmp", "d.tif", "e.webp", "f.jfif", "g.gif", "h.TIFF", "i.ppm"]
    names = sorted([*names, "j.jp2", "k.tga", "sub/a.png", "sub/deep/l.PNG", "v1.2/m.jpe"])
    put(tmp_path / "images/train", *names)
    labels = [f"{name.rsplit('.', 1)[0]}.png" for name in names]
    put(tmp_path / "labels/train", *labels, mode="L")
    train = Folder(tmp_path, "train", CamVid.CLASSES)
    images = tmp_path / "images/train"
    found = names_of(train.pairs, images, tmp_path / "labels/train")
    assert found == dict(zip(names, labels, strict=True))
    for index in range(len(train)):
        image, label = train[index]
        assert image.shape == (3, 6, 8) and label.shape == (6, 8)
    # Results of one name in two folders do not replace each other.
    assert sorted(map(train.result_name, range(len(train)))) == sorted(labels)


def test_results_of_camvid_keep_their_folders(camvid_copy):
    for kind in ("val", "valannot"):
        put(camvid_copy / kind, "drive/x.png", mode="RGB" if kind == "val" else "L")
    for split in ("val", "trainval"):
        dataset = CamVid(camvid_copy, split)
        names = [dataset.result_name(index) for index in range(len(dataset))]
        assert names[-1] == "drive/x.png" and names[-2] == "0001TP_000002.png"


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["a.heic", "b.HEIC", "sub/c.heic"], "3 of 4 files of {} are left out: .heic is not read"),
        (["a.svg", "b.cr2", "c.cr2"], "3 of 4 files of {} are left out: .cr2, .svg is not read"),
    ],
)
def test_pictures_that_are_left_out_are_told(tmp_path, capsys, others, message):
    put(tmp_path, "x.png", *others, "readme.txt")
    assert list_pictures(tmp_path) == [str(tmp_path / "x.png")]
    assert capsys.readouterr().err == f"note: {message.format(tmp_path)}\n"


def test_pictures_outside_the_layout_are_told(cityscapes_copy, shapes_copy, capsys):
    city = next((cityscapes_copy / "leftImg8bit/val").iterdir())
    put(city, "x_leftImg8bit.jpg", "y.png")
    assert len(Cityscapes(cityscapes_copy, "val")) == 3
    message = "note: 2 of 5 files of .*val are left out: Cityscapes has <city>/.*_leftImg8bit.png"
    assert re.search(message, capsys.readouterr().err)
    put(shapes_copy / "train", "loose.png")
    count = len(ImageFolder(shapes_copy, "train", str))
    assert f"1 of {count + 1} files" in capsys.readouterr().err


# Labels


def test_images_and_labels_are_matched_by_their_stems(folders):
    images, labels = folders
    assert matched_files(images, labels) == [
        (str(images / "a.JPG"), str(labels / "a.png")),
        (str(images / "b.png"), str(labels / "b.png")),
        (str(images / "c.d.jpeg"), str(labels / "c.d.png")),
    ]
    assert [label for _, label in matched_files(images, None)] == [None] * 3


def test_an_image_that_exists_twice_is_named(folders):
    images, labels = folders
    put(images, "b.jpg")
    with pytest.raises(DatasetError, match=f"{images} holds b twice, as .jpg and .png: remove"):
        matched_files(images, labels)


def test_missing_and_empty_folders_are_named(folders, tmp_path):
    images, labels = folders
    for pair in ((images, tmp_path / "none"), (tmp_path / "none", labels)):
        with pytest.raises(DatasetError, match="none does not exist"):
            matched_files(*pair)
    shutil.rmtree(images)
    put_strays(images)
    with pytest.raises(DatasetError, match="holds no images"):
        matched_files(images, labels)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (["a.jpg", "b.jpg"], ["a_mask.png", "b_mask.png"]),
        (["a.jpg", "b.jpg"], ["a-gt.PNG", "b-gt.tif"]),
        (["a.jpg", "b.jpg"], ["a.bmp", "b.TIF"]),
        (["a.jpg", "b.jpg"], ["a.PNG", "b.gif"]),
        (["a.jpg", "b.jpg"], ["mask_a.png", "mask_b.png"]),
        (["a.jpg", "b.jpg"], ["masks/a.png", "masks/b.png"]),
        (["a.jpg", "b.jpg"], ["a/label.png", "b/label.png"]),
        (["s/a.jpg", "t/a.jpg"], ["s/a_seg.png", "t/a_seg.png"]),
        (["s/a.jpg", "sa/a.jpg"], ["s/gt/a.png", "sa/gt/a.png"]),
        # The name of an image may begin with that of another.
        (["a.png", "a_1.png"], ["a.png", "a_1.png"]),
        (["a.png", "a_1.png"], ["a_mask.png", "a_1_mask.png"]),
        (["1.png", "11.png", "2.png"], ["1_L.png", "11_L.png", "2_L.png"]),
    ],
)
def test_labels_are_found_by_the_names_that_people_give(tmp_path, images, labels):
    put(tmp_path / "images", *images)
    # Pictures of labels may lie beside them.
    put(tmp_path / "labels", *labels, *(f"{label}.vis.jpg" for label in labels), mode="L")
    pairs = matched_files(tmp_path / "images", tmp_path / "labels")
    found = names_of(pairs, tmp_path / "images", tmp_path / "labels")
    assert found == dict(zip(images, labels, strict=True))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (["x_sat.jpg", "y_sat.jpg"], ["x_mask.png", "y_mask.png"]),
        (["img_1.jpg", "img_2.jpg", "img_11.jpg"], ["mask_1.png", "mask_2.png", "mask_11.png"]),
        (["img1.jpg", "img2.jpg"], ["mask1.png", "mask2.png"]),
        (["img (1).jpg", "img (2).jpg"], ["mask (1).png", "mask (2).png"]),
        (["img_1.jpg", "img_2.jpg"], ["1.png", "2.png"]),
        (["img_1_rgb.jpg", "img_2_rgb.jpg"], ["lbl_1_ids.png", "lbl_2_ids.png"]),
        (["s/a_sat.jpg", "t/b_sat.jpg"], ["s/a_mask.png", "t/b_mask.png"]),
        (["s/rgb.jpg", "t/rgb.jpg"], ["s/ids.png", "t/ids.png"]),
    ],
)
def test_labels_may_have_something_else_in_their_names(tmp_path, images, labels, capsys):
    put(tmp_path / "images", *images)
    put(tmp_path / "labels", *labels, "other_7.png", mode="L")
    pairs = matched_files(tmp_path / "images", tmp_path / "labels")
    found = names_of(pairs, tmp_path / "images", tmp_path / "labels")
    assert found == dict(zip(images, labels, strict=True))
    first = " for ".join(Path(name).with_suffix("").as_posix() for name in (labels[0], images[0]))
    assert f"labels are called {first}, and so on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (["img_1.jpg", "img_2.jpg"], ["mask_1.png"]),  # not all
        (["img_01.jpg", "img_02.jpg"], ["mask_1.png", "mask_2.png"]),
        (["x_1.jpg", "x_2.jpg"], ["y_1_2.png"]),
        (["x_sat.jpg"], ["y_mask.png"]),  # of one image, nothing is known to be common
        (["a.jpg", "b.jpg"], ["x.png", "y.png"]),
    ],
)
def test_labels_of_other_names_are_not_guessed(tmp_path, images, labels):
    put(tmp_path / "images", *images)
    put(tmp_path / "labels", *labels, mode="L")
    for image, label in matched_files(tmp_path / "images", tmp_path / "labels"):
        assert label == image.replace("images", "labels").replace(".jpg", ".png")


def test_a_single_label_that_is_missing_is_named_by_what_the_others_are_called(tmp_path):
    put(tmp_path / "images/train", *(f"img_{n:02}.png" for n in range(25)))
    put(tmp_path / "labels/train", *(f"mask_{n:02}.png" for n in range(24)), mode="L")
    with pytest.raises(DatasetError, match=r"1 of 25 .* first missing: .*/mask_24.png "):
        Folder(tmp_path, "train", CamVid.CLASSES)


def test_a_png_is_the_label_where_there_are_other_kinds(tmp_path):
    put(tmp_path / "images", "a.jpg")
    put(tmp_path / "labels", "a.png", "a.bmp", "a.jpg", "a_color.png", mode="L")
    ((_, label),) = matched_files(tmp_path / "images", tmp_path / "labels")
    assert label == str(tmp_path / "labels/a.png")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a.jpg", "b.jpg"], "a.jpg is a JPEG, which blurs class ids"),
        (["a_mask.JPG", "b_mask.JPG"], "a_mask.JPG is a JPEG"),
        (["a.png", "b.jfif"], "b.jfif is a JPEG"),
        (["a.bmp", "a.tif", "b.bmp"], "a.bmp and .*a.tif are labels of one image"),
        (["a_color.png", "a_ids.png", "b_color.png", "b_ids.png"], "a_color for a or a_ids for a"),
        (["x_1.png", "x_2.png", "y_1.png", "y_2.png"], "x_1 for z_1 or y_1 for z_1"),
    ],
)
def test_labels_that_are_not_clear_are_refused(tmp_path, labels, message):
    put(tmp_path / "images", *(("z_1.png", "z_2.png") if "z_1" in message else ("a.png", "b.png")))
    put(tmp_path / "labels", *labels, mode="L")
    with pytest.raises(DatasetError, match=message):
        matched_files(tmp_path / "images", tmp_path / "labels")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ["a.png", "b_mask.png"],
            "1 of 2 .* first missing: .*/b.png .there lies b_mask.png, a.png.",
        ),
        (["a_mask.png"], "1 of 2 .* first missing: .*/b_mask.png .there lies a_mask.png."),
        (["x.png", "y.png"], "2 of 2 .* first missing: .*/a.png .there lies x.png, y.png."),
        (["a_1.png", "b.png"], "1 of 2 .* first missing: .*/a.png .there lies a_1.png, b.png."),
        (["ab.png", "bc.png"], "2 of 2 .* first missing: .*/a.png .there lies ab.png, bc.png."),
        (["sub/readme.txt"], "2 of 2 .* first missing: .*/a.png .there lies sub."),
    ],
)
def test_what_lies_there_is_said_where_a_label_is_missing(tmp_path, labels, message):
    put(tmp_path / "images/train", "a.png", "b.png")
    put(tmp_path / "labels/train", *labels, mode="L")
    with pytest.raises(DatasetError, match=message):
        Folder(tmp_path, "train", CamVid.CLASSES)
    assert len(Folder(tmp_path, "train", CamVid.CLASSES, need_labels=False)) == 2


def test_labels_of_another_name_are_trained_on(fields_copy):
    classes = read_classes(fields_copy / "classes.txt")
    expected = [label.numpy() for _, label in Folder(fields_copy, "train", classes)]
    for path in (fields_copy / "labels/train").iterdir():
        Image.open(path).save(path.with_name(f"{path.stem}_mask.tif"))
        path.unlink()
    train = Folder(f"{fields_copy}/.", "train", classes)
    assert labels_without_image(train) == []
    for (_, label), before in zip(train, expected, strict=True):
        assert (label.numpy() == before).all()
