import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from datasets.transforms import (
    ResizeToHeight,
    eval_transforms,
    resize_label,
    resized_size,
    train_transforms,
)


def make_pair(height: int, width: int, block: int = 8) -> tuple[Image.Image, tv_tensors.Mask]:
    """An image whose red channel is its label times 13, so that a pixel shows where it belongs."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 19, (height // block, width // block))
    label = np.kron(blocks, np.ones((block, block))).astype(np.uint8)
    image = np.stack([label * 13, label * 0 + 100, label * 0 + 50], axis=-1).astype(np.uint8)
    return Image.fromarray(image), tv_tensors.Mask(torch.from_numpy(label))


@pytest.mark.parametrize("augment", ["paper", "strong"])
def test_results_are_tensors_of_the_contract(augment):
    pair = make_pair(128, 256)
    image, label = train_transforms(augment, (64, 128))(*pair)
    assert type(image) is torch.Tensor and type(label) is torch.Tensor
    assert image.shape == (3, 64, 128) and image.dtype == torch.float32
    assert label.shape == (64, 128) and label.dtype == torch.int64
    assert 0 <= image.min() and image.max() <= 1
    assert set(label.unique().tolist()) <= {*range(19), 255}


def test_paper_recipe_moves_image_and_label_together():
    """Without resizing the red channel tells each pixel's label, and black the ignored border."""
    pair = make_pair(64, 128)
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        image, label = train_transforms("paper", (64, 128))(*pair)
        inside = label != 255
        assert torch.equal((image[0] * 255 / 13).round()[inside], label[inside].float())
        assert (image[:, ~inside] == 0).all()
        seen.add((inside.sum(0).max().item(), inside.sum(1).max().item()))
    assert len(seen) > 4


def test_paper_recipe_flips_half_of_the_images():
    pair = make_pair(64, 128)
    flip = v2.Compose(train_transforms("paper", (64, 128)).transforms[:3])
    whole = v2.functional.pil_to_tensor(pair[0])
    flipped = sum(not torch.equal(flip(*pair)[0], whole) for _ in range(200))
    assert 60 < flipped < 140


def test_paper_recipe_shifts_by_every_offset_up_to_two_pixels():
    torch.manual_seed(0)
    dot = np.zeros((64, 128), np.uint8)
    dot[30, 64] = 18
    pair = Image.fromarray(np.stack([dot] * 3, -1)), tv_tensors.Mask(torch.from_numpy(dot))
    transforms, offsets = train_transforms("paper", (64, 128)), set()
    for _ in range(600):
        _, label = transforms(*pair)
        row, column = (label == 18).nonzero()[0].tolist()
        # A flip takes column 64 to 63.
        flipped = column - 63 if column < 62 else None
        offsets.add((row - 30, column - 64 if flipped is None else flipped))
    rows = {row for row, _ in offsets}
    columns = {column for _, column in offsets}
    assert rows == set(range(-2, 3)) and columns <= set(range(-3, 3)) and len(columns) >= 5


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_labels_take_the_pixel_at_the_centre(factor):
    """torchvision's own Resize takes the top-left pixel of each block: half a block off."""
    label = torch.arange(64 * 64).view(64, 64)
    small = resize_label(tv_tensors.Mask(label), (64 // factor, 64 // factor))
    centre = factor // 2
    assert torch.equal(small.as_subclass(torch.Tensor), label[centre::factor, centre::factor])
    pil = Image.fromarray(label.numpy().astype(np.int32)).resize(
        (64 // factor, 64 // factor), Image.Resampling.NEAREST
    )
    assert small.tolist() == np.asarray(pil).tolist()


@pytest.mark.parametrize("size", [(37, 91), (128, 300), (5, 5)])
def test_resized_labels_hold_no_new_value(size):
    label = tv_tensors.Mask(
        torch.tensor([0, 18, 255], dtype=torch.uint8)[torch.randint(3, (64, 128))]
    )
    resized = resize_label(label, size)
    assert isinstance(resized, tv_tensors.Mask)
    assert resized.shape == size and resized.dtype == torch.uint8
    assert set(resized.unique().tolist()) <= {0, 18, 255}


def test_stage_1_labels_have_the_resolution_of_the_encoder():
    pair = make_pair(72, 104)
    torch.manual_seed(3)
    _, whole = train_transforms("paper", (70, 101))(*pair)
    torch.manual_seed(3)
    image, label = train_transforms("paper", (70, 101), label_stride=8)(*pair)
    assert image.shape == (3, 70, 101) and label.shape == (9, 13) and label.dtype == torch.int64
    assert torch.equal(
        label, resize_label(tv_tensors.Mask(whole), (9, 13)).as_subclass(torch.Tensor)
    )


def test_strong_recipe_scales_and_pads():
    pair = make_pair(128, 256)
    torch.manual_seed(0)
    ignored = [
        (train_transforms("strong", (64, 128))(*pair)[1] == 255).float().mean().item()
        for _ in range(60)
    ]
    # Images scaled below 1 leave a border, down to a quarter of the plane filled.
    assert 0.5 < max(ignored) <= 0.76
    assert 15 < sum(share == 0 for share in ignored) < 55


def test_strong_recipe_keeps_image_and_label_together():
    pair = make_pair(128, 256, block=64)
    steps = train_transforms("strong", (64, 128)).transforms
    geometry = v2.Compose([s for s in steps if not isinstance(s, v2.ColorJitter)])
    for seed in range(10):
        torch.manual_seed(seed)
        image, label = geometry(*pair)
        inside = label != 255
        # Bilinear blending moves the red of pixels near a border; all others stay what they were.
        agrees = (image[0] * 255 / 13).round()[inside] == label[inside].float()
        assert agrees.float().mean() > 0.85


def test_eval_keeps_the_label_at_full_size():
    pair = make_pair(128, 256)
    image, label = eval_transforms(64)(*pair)
    assert image.shape == (3, 64, 128)
    assert label.shape == (128, 256) and torch.equal(
        label, pair[1].long().as_subclass(torch.Tensor)
    )


def test_images_are_resized_as_pil_does():
    image, label = make_pair(128, 256)
    resized, _ = ResizeToHeight(64)(image, label)
    assert np.array_equal(np.asarray(resized), np.asarray(image.resize((128, 64), Image.BILINEAR)))


def test_normalisation():
    image, label = make_pair(64, 128)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    plain, _ = eval_transforms(64)(image, label)
    normalised, same = eval_transforms(64, mean, std)(image, label)
    expected = (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(normalised, expected)
    assert torch.equal(same, label.long().as_subclass(torch.Tensor))


def test_resized_size_keeps_the_proportions():
    assert resized_size(1024, 2048, 512) == (512, 1024)
    assert resized_size(360, 480, 100) == (100, 133)
    assert resized_size(1000, 1, 10) == (10, 1)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="'weak'"):
        train_transforms("weak", (64, 128))
