import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import pretend_processes
from PIL import ExifTags, Image, ImageOps
from torchvision import transforms as v1
from torchvision.transforms import v2

from datasets.imagenet import (
    MEAN,
    STD,
    CropLoader,
    ImageFolder,
    open_images,
    training_images,
    validation_images,
)
from datasets.images import BrokenFiles, DatasetError
from datasets.transforms import normalizer


@pytest.fixture
def folder(tmp_path):
    """Two classes of tiny images in train, one of them in val."""
    for place in ("train/cat/b.png", "train/cat/a.jpg", "train/dog/x/c.JPEG", "val/dog/d.png"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (255, 0, 0)).save(path)
    (tmp_path / "train/cat/notes.txt").write_text("no picture")
    (tmp_path / "train/readme.md").write_text("no class")
    return tmp_path


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise: like a photograph, it changes slowly."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3)).astype(np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


# Files


def test_items_are_images_with_the_number_of_their_class(folder):
    train = training_images(folder, 16, augment=False)
    assert train.classes == ["cat", "dog"]
    assert [(path.removeprefix(str(folder)), label) for path, label in train.samples] == [
        ("/train/cat/a.jpg", 0),
        ("/train/cat/b.png", 0),
        ("/train/dog/x/c.JPEG", 1),
    ]
    image, label = train[1]
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and label == 0
    assert (image == torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)).all()


def test_val_is_numbered_as_train_even_where_it_lacks_a_class(folder):
    val = validation_images(folder, 16, ["cat", "dog"])
    assert val.classes == ["cat", "dog"] and [label for _, label in val.samples] == [1]


def test_val_may_have_the_form_of_tiny_imagenet(folder, capsys):
    shutil.rmtree(folder / "val")
    (folder / "val/images").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (40, 30)).save(folder / f"val/images/val_{number}.JPEG")
    table = folder / "val/val_annotations.txt"
    table.write_text("val_0.JPEG\tdog\t0\t0\t62\t57\nval_1.JPEG\tcat\t0\t0\t62\t57\n")
    val = validation_images(folder, 16, ["cat", "dog"])
    names = [(path.rsplit("/", 1)[1], number) for path, number in val.samples]
    assert names == [("val_1.JPEG", 0), ("val_0.JPEG", 1)] and val.targets == [0, 1]
    assert "note: 1 of 3 files of" in capsys.readouterr().err
    table.write_text("val_0.JPEG\tfox\n")
    with pytest.raises(DatasetError, match=r"not trained on \(fox\)"):
        validation_images(folder, 16, ["cat", "dog"])
    # Sorted by hand, the table does not matter.
    (folder / "val/images").rename(folder / "val/cat")
    assert validation_images(folder, 16, ["cat", "dog"]).targets == [0, 0, 0]


def test_missing_folders_are_named(folder):
    with pytest.raises(DatasetError, match="nowhere does not exist"):
        training_images(folder / "nowhere", 16, augment=False)
    with pytest.raises(DatasetError, match="has no folder val"):
        validation_images(folder / "train", 16, ["cat"])
    (folder / "train/empty").mkdir()
    with pytest.raises(DatasetError, match=r"train/empty holds no images"):
        training_images(folder, 16, augment=False)
    (folder / "val/dog/d.png").unlink()
    with pytest.raises(DatasetError, match=r"val/dog holds no images"):
        validation_images(folder, 16, ["cat", "dog"])
    (folder / "val/dog").rmdir()
    with pytest.raises(DatasetError, match="val holds no folder"):
        validation_images(folder, 16, ["cat", "dog"])


def test_a_class_that_train_lacks_is_named(folder):
    with pytest.raises(DatasetError, match=r"a class that the network is not trained on \(dog\)"):
        validation_images(folder, 16, ["cat"])


# Crops


def as_array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("seed", range(8))
def test_a_crop_has_the_pixels_of_random_resized_crop(tmp_path, seed):
    """If the JPEG is decoded at its full size, only rounding differs."""
    path = str(tmp_path / "photo.jpg")
    photo(100, 75).save(path)
    torch.manual_seed(seed)
    ours = CropLoader(64, random=True)(path)
    torch.manual_seed(seed)
    plain = v1.RandomResizedCrop(64)(Image.open(path).convert("RGB"))
    assert ours.shape == (3, 64, 64) and ours.dtype == torch.uint8
    assert np.abs(as_array(ours) - np.asarray(plain, int)).max() <= 1


@pytest.mark.parametrize("turned", range(1, 9))
def test_a_large_photo_is_decoded_small_and_looks_the_same(tmp_path, turned):
    path, exif = str(tmp_path / "photo.jpg"), Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    photo(1203, 901).save(path, exif=exif, quality=95)
    crop = CropLoader(64, random=True)
    torch.manual_seed(turned)
    ours = crop(path)

    torch.manual_seed(turned)
    with Image.open(path) as image:
        box = crop.choose(image)
        image.load()
        smaller = round(1203 / image.width)
    # As small as can be while the crop still has 64 pixels each way.
    sides = box[2] - box[0], box[3] - box[1]
    assert smaller in (2, 4, 8) and min(sides) >= 63
    assert smaller == 8 or min(sides) <= 2 * 64
    # The crop is RandomResizedCrop's of the upright image, to whole pixels of the small one.
    whole = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    torch.manual_seed(turned)
    params = v2.RandomResizedCrop(64).make_params([whole])
    left, top, width, height = (params[name] for name in ("left", "top", "width", "height"))
    exact = np.array([left, top, left + width, top + height])
    assert np.abs(np.array(box) * smaller - exact).max() <= smaller / 2
    # Apart from the decoder's own scaling, the pixels are those of the whole photo.
    part = whole.crop([smaller * edge for edge in box])
    plain = np.asarray(part.resize((64, 64), Image.Resampling.BILINEAR), int)
    difference = np.abs(as_array(ours) - plain)
    # The last pixels of the small image are of a part of 8 pixels: turned, they shift the others.
    assert difference.mean() < (1 if turned == 1 else 8)
    assert turned > 1 or difference.max() < 12


def test_turned_photos_are_decoded_as_small_as_can_be(tmp_path):
    path, exif = str(tmp_path / "photo.jpg"), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo(1600, 400).save(path, exif=exif)
    torch.manual_seed(0)
    for _ in range(50):
        with Image.open(path) as image:
            whole = image.width
            box = CropLoader(64, random=True).choose(image)
            smaller = round(whole / image.width)
        width, height = box[2] - box[0], box[3] - box[1]
        assert min(width, height) >= 63 or smaller == 1
        assert min(width, height) <= 2 * 64 + 1 or smaller == 8


def test_val_shows_what_resize_and_center_crop_show(tmp_path):
    for width, height, most in ((256, 256, 0), (400, 300, 2), (300, 417, 2)):
        path = str(tmp_path / f"{width}.png")
        photo(width, height).save(path)
        ours = as_array(CropLoader(224, random=False)(path))
        chain = v1.Compose([v1.Resize(256), v1.CenterCrop(224)])
        plain = np.asarray(chain(Image.open(path)), int)
        # The sides of a resized image are rounded to whole pixels, which shifts it a little.
        assert np.abs(ours - plain).mean() <= most


def test_a_turned_photo_is_upright(tmp_path):
    image, exif = Image.new("RGB", (60, 80), "blue"), Image.Exif()
    image.paste("red", (0, 0, 60, 40))  # the upper half
    exif[ExifTags.Base.Orientation] = 6
    stored = image.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    seen = as_array(CropLoader(32, random=False)(str(tmp_path / "turned.jpg")))
    assert (seen[:14, :, 0] > 200).all() and (seen[18:, :, 2] > 200).all()


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("I;16", "png"), ("RGBA", "png"), ("LA", "png")],
)
def test_images_of_any_mode_load_as_rgb(tmp_path, mode, suffix):
    path = str(tmp_path / f"image.{suffix}")
    Image.new(mode, (50, 40)).save(path)
    for random in (True, False):
        image = CropLoader(24, random)(path)
        assert image.shape == (3, 24, 24) and image.dtype == torch.uint8


@pytest.mark.parametrize("turned", [3, 6])
def test_a_turned_tiff_is_upright(tmp_path, turned):
    """PIL turns it when it decodes it."""
    image, exif = Image.new("RGB", (60, 80), "blue"), Image.Exif()
    image.paste("red", (0, 0, 60, 40))
    exif[ExifTags.Base.Orientation] = turned
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[turned]
    image.transpose(back).save(tmp_path / "turned.tiff", exif=exif)
    seen = as_array(CropLoader(32, random=False)(str(tmp_path / "turned.tiff")))
    assert (seen[:14, :, 0] > 200).all() and (seen[18:, :, 2] > 200).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 4), (3, 1), (4, 1), (900, 1), (5, 700)])
def test_an_image_smaller_than_the_crop_is_enlarged(tmp_path, size):
    Image.new("RGB", size, (7, 8, 9)).save(tmp_path / "dot.png")
    for random in (True, False):
        image = CropLoader(24, random)(str(tmp_path / "dot.png"))
        assert image.shape == (3, 24, 24) and image.unique().tolist() == [7, 8, 9]


@pytest.mark.parametrize("content", ["", "text", "half"])
def test_a_broken_image_is_named(folder, content):
    path = folder / "train/cat/a.jpg"
    photo(200, 150).save(path)
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(half if content == "half" else content.encode())
    with pytest.raises(DatasetError, match=r"cat/a\.jpg cannot be read as an image"):
        training_images(folder, 16, augment=False)[0]


def test_augmentation_follows_the_recipe(folder):
    def names(augment):
        steps = training_images(folder, 16, augment).transform.transforms
        return [type(step).__name__ for step in steps]

    assert names(False) == ["RandomHorizontalFlip"]
    assert names(True) == ["RandomHorizontalFlip", "ToPILImage", "RandAugment", "PILToTensor"]
    assert training_images(folder, 16, augment=True)[0][0].shape == (3, 16, 16)


def test_images_are_normalised_as_everyone_does():
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    normalised = normalizer(MEAN, STD, torch.device("cpu"))(images)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert normalised.dtype == torch.float32 and normalised.shape == (2, 3, 4, 4)
    for channel, value in enumerate(expected):
        assert torch.allclose(normalised[:, channel], torch.tensor(value))


def test_a_folder_takes_any_loader(folder):
    assert ImageFolder(folder, "train", loader=str.upper)[0] == (
        str(folder / "train/cat/a.jpg").upper(),
        0,
    )


# Opening


def options(datadir, **changes) -> Namespace:
    values = {"dataset": "imagenet", "datadir": str(datadir), "size": 16, "recipe": "paper"}
    return Namespace(**(values | {"workers": 0, "skip_broken": False} | changes))


def test_the_images_of_a_run_are_opened_in_the_first_process(folder, monkeypatch):
    calls = pretend_processes(monkeypatch, 2)
    train, val = open_images(options(folder))
    assert len(calls) == 1 and len(train) == 3 and len(val) == 1
    assert train.classes == val.classes == ["cat", "dog"]
    assert len(train.transform.transforms) == 1
    modern, _ = open_images(options(folder, recipe="modern"))
    assert len(modern.transform.transforms) == 4


def test_broken_images_are_found_or_left_out(folder, capsys):
    (folder / "train/cat/b.png").write_bytes(b"")
    with pytest.raises(BrokenFiles, match=r"1 of 4 images .* the first: .*cat/b\.png"):
        open_images(options(folder))
    assert len(open_images(options(folder), check=False)[0]) == 3
    train, val = open_images(options(folder, skip_broken=True))
    assert [path.rsplit("/", 1)[1] for path, _ in train.samples] == ["a.jpg", "c.JPEG", "c.JPEG"]
    assert train.targets == [0, 1, 1] and len(val) == 1
    assert "left out: unreadable: " in capsys.readouterr().err


def test_one_class_is_too_few(folder):
    (folder / "train/dog").rename(folder / "away")
    (folder / "val/dog").rename(folder / "val/cat")
    with pytest.raises(DatasetError, match="has only one class: there is nothing to tell apart"):
        open_images(options(folder))


def test_the_drawn_shapes_are_made_once(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr("datasets.imagenet.make_shapes", lambda root, workers: made.append(root))
    with pytest.raises(DatasetError, match="shapes does not exist"):
        open_images(options(tmp_path / "shapes", dataset="shapes"))
    assert made == [str(tmp_path / "shapes")]
    assert "drawing shapes and textures into" in capsys.readouterr().out
