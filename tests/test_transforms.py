import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from datasets.loading import Batch
from datasets.segmentation import resize_label
from datasets.transforms import Augment, Paper, Strong, jittered, noisy, normalizer

CPU = torch.device("cpu")
RECIPES = {"paper": Paper(), "strong": Strong((64, 128))}


def make_pair(height: int, width: int, block: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose red channel is its label times 13, so that each pixel shows its label."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 19, (-(-height // block), -(-width // block)))
    label = np.kron(blocks, np.ones((block, block)))[:height, :width].astype(np.uint8)
    image = np.stack([label * 13, label * 0 + 100, label * 0 + 50])
    return torch.from_numpy(image.astype(np.uint8)), torch.from_numpy(label)


def batch_of(pairs, seeds) -> Batch:
    images, labels = zip(*pairs, strict=True)
    return Batch(list(images), list(labels), list(seeds), [0] * len(images), [])


def augmented(recipe, pair, seed: int = 0, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair, its image as a recipe leaves it."""
    augment = Augment(recipe, lambda images: images, CPU, **options)
    images, labels = augment(batch_of([pair], [seed]))
    return images[0], labels[0]


# A batch


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_a_batch_becomes_two_tensors(recipe, jitter):
    augment = Augment(RECIPES[recipe], normalizer([0.0] * 3, [1.0] * 3, CPU), CPU, jitter)
    images, labels = augment(batch_of([make_pair(64, 128)] * 2, [1, 2]))
    assert images.shape == (2, 3, 64, 128) and images.dtype == torch.float32
    assert labels.shape == (2, 64, 128) and labels.dtype == torch.int64
    assert 0 <= images.min() and 0.3 < images.max() <= 1
    assert set(labels.unique().tolist()) <= {*range(19), 255}


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_image_follows_its_seed_alone(recipe):
    """Not its batch, nor the random state of training."""
    options = {"jitter": 0.4, "noise": 10.0}
    augment = Augment(RECIPES[recipe], lambda images: images, CPU, **options)
    pairs = [make_pair(64, 128), make_pair(64, 128, block=16)]
    images, labels = augment(batch_of(pairs, [5, 2**62 - 1]))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    for number, seed in enumerate([5, 2**62 - 1]):
        image, label = augmented(RECIPES[recipe], pairs[number], seed, **options)
        assert torch.equal(image, images[number]) and torch.equal(label, labels[number])
        other, _ = augmented(RECIPES[recipe], pairs[number], seed - 1, **options)
        assert not torch.equal(other, image)
    assert torch.equal(torch.rand(3), expected)


def test_a_cached_image_is_not_changed():
    image, label = make_pair(64, 128)
    kept = image.clone(), label.clone()
    for recipe in RECIPES.values():
        for seed in range(4):
            augmented(recipe, (image, label), seed, jitter=0.4)
    assert torch.equal(image, kept[0]) and torch.equal(label, kept[1])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_the_memory_format_changes_nothing(recipe, jitter):
    image, label = make_pair(64, 128)
    channels_last = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert channels_last.stride() != image.stride()
    augment = Augment(RECIPES[recipe], normalizer([0.1] * 3, [0.3] * 3, CPU), CPU, jitter)
    ours, expected = (
        augment(batch_of([(same, label)] * 8, range(8)))[0] for same in (channels_last, image)
    )
    assert torch.equal(ours, expected)


def test_stage_1_labels_have_the_resolution_of_the_encoder():
    pair = make_pair(70, 101)
    _, whole = augmented(Paper(), pair, seed=3)
    image, label = augmented(Paper(), pair, seed=3, label_stride=8)
    assert image.shape == (3, 70, 101) and label.shape == (9, 13) and label.dtype == torch.int64
    assert torch.equal(label.byte(), resize_label(whole.byte(), (9, 13)))


# The published recipe


def test_paper_recipe_moves_image_and_label_together():
    """The red channel shows each pixel's label, and black the ignored border."""
    pair = make_pair(64, 128)
    seen = set()
    for seed in range(40):
        image, label = augmented(Paper(), pair, seed)
        inside = label != 255
        assert torch.equal(image[0][inside].long(), 13 * label[inside])
        assert (image[:, ~inside] == 0).all()
        seen.add((inside.sum(0).max().item(), inside.sum(1).max().item()))
    assert len(seen) > 4


def test_paper_recipe_flips_half_and_shifts_by_every_offset_up_to_two_pixels():
    """A flip exchanges the sides of two dots."""
    dots = torch.zeros(64, 128, dtype=torch.uint8)
    dots[30, 20], dots[30, 107] = 5, 18  # 107 is where a flip takes 20
    offsets, flips = set(), 0
    for seed in range(400):
        _, label = augmented(Paper(), (dots.expand(3, -1, -1), dots), seed)
        (row, left), (other_row, right) = ((label == dot).nonzero()[0].tolist() for dot in (5, 18))
        flips += left > right
        assert row == other_row and abs(right - left) == 87
        offsets.add((row - 30, min(left, right) - 20))
    assert 160 < flips < 240
    assert offsets == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}


# The stronger one


def test_strong_recipe_scales_and_pads():
    pair = make_pair(64, 128)
    ignored = [
        (augmented(Strong((64, 128)), pair, seed)[1] == 255).float().mean().item()
        for seed in range(60)
    ]
    # Images scaled below 1 leave a border, down to a quarter of the plane filled.
    assert 0.5 < max(ignored) <= 0.76
    assert 15 < sum(share == 0 for share in ignored) < 45


def test_strong_recipe_keeps_image_and_label_together():
    pair = make_pair(128, 256, block=64)
    for seed in range(10):
        image, label = augmented(Strong((64, 128)), pair, seed)
        inside = label != 255
        # Bilinear blending moves the red of pixels near a border; all others stay what they were.
        agrees = (image[0] / 13).round()[inside] == label[inside].float()
        assert agrees.float().mean() > 0.85


def test_strong_recipe_crops_anywhere():
    """At scale 1, from an image whose channels show the row and column of each pixel."""
    row, column = torch.meshgrid(torch.arange(128), torch.arange(256), indexing="ij")
    image, classes = torch.stack([row, column, row]).byte(), (row + 2 * column) % 19
    tops, lefts, flips = [], [], 0
    for seed in range(200):
        part, label = augmented(Strong((48, 64), (1, 1)), (image, classes.byte()), seed)
        flipped = part[1, 0, 0] > part[1, 0, -1]
        part, label = (part.flip(-1), label.flip(-1)) if flipped else (part, label)
        top, left = part[:2, 0, 0].round().int().tolist()
        expected = image[:, top : top + 48, left : left + 64].float()
        assert torch.allclose(part, expected, rtol=0, atol=0.05)
        assert torch.equal(label, classes[top : top + 48, left : left + 64])
        tops.append(top)
        lefts.append(left)
        flips += flipped.item()
    assert 70 < flips < 130
    assert min(tops) < 5 and max(tops) > 75 and min(lefts) < 10 and max(lefts) > 182


def test_strong_recipe_enlarges_by_its_scale():
    image, label = make_pair(64, 128, block=1)
    _, double = augmented(Strong((64, 128), (2, 2)), (image, label), seed=1)
    small = double[::2, ::2].byte()
    assert torch.equal(small.repeat_interleave(2, 0).repeat_interleave(2, 1), double.byte())
    windows = label.unfold(0, 32, 1).unfold(1, 64, 1).flatten(0, 1)
    assert any(torch.equal(small, window) for window in (*windows, *windows.flip(-1)))


def test_scales_are_drawn_evenly_by_their_logarithm():
    """The number of rows that a crop shows gives its scale."""
    rows = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 256)
    shown, scales = torch.stack([rows] * 3), []
    for seed in range(200):
        image, _ = augmented(Strong((64, 64), (0.25, 4)), (shown, rows), seed)
        scales.append(64 / (int(image.max()) - int(image.min()) + 1))
    assert 0.25 <= min(scales) < 0.28 and 3.6 < max(scales) < 4.5
    assert 70 < sum(scale < 1 for scale in scales) < 130
    assert 35 < sum(scale < 0.5 for scale in scales) < 65


def test_strong_recipe_makes_images_of_several_sizes_one_size():
    pairs = [make_pair(40, 50), make_pair(64, 128), make_pair(200, 90)]
    augment = Augment(Strong((64, 80)), lambda images: images, CPU)
    images, labels = augment(batch_of(pairs, [1, 2, 3]))
    assert images.shape == (3, 3, 64, 80) and labels.shape == (3, 64, 80)
    for number, pair in enumerate(pairs):
        image, label = augmented(Strong((64, 80)), pair, number + 1)
        assert torch.equal(images[number], image) and torch.equal(labels[number], label)


@pytest.mark.parametrize("size", [(64, 128), (90, 70)])
def test_strong_recipe_is_a_crop_a_resize_and_a_flip(size):
    """As torchvision does each of them, without smoothing."""
    image, label = torch.randint(256, (3, 75, 112), dtype=torch.uint8), make_pair(75, 112, 4)[1]
    strong, flips = Strong(size), set()
    for seed in range(60):
        *window, flipped = strong.draw(label, torch.Generator().manual_seed(seed))
        expected = F.resize_image(F.crop_image(image.float(), *window), list(size), antialias=False)
        # As classes from 1, since a crop fills with 0.
        expected_label = resize_label(F.crop_image(label[None] + 1, *window)[0], size)
        expected_label = torch.where(expected_label == 0, 255, expected_label.long() - 1)
        if flipped:
            expected, expected_label = expected.flip(-1), expected_label.flip(-1)
        ours, our_label = augmented(strong, (image, label), seed)
        # At its border, resize_image repeats pixels of the crop; ours come from beyond it.
        inside = (slice(None), slice(3, -3), slice(3, -3))
        assert torch.allclose(ours[inside], expected[inside], rtol=0, atol=0.1)
        assert torch.equal(our_label, expected_label)
        flips.add(flipped)
    assert flips == {True, False}


# Colours


def test_jitter_changes_colours_as_torchvision_does():
    images = torch.randint(256, (3, 3, 8, 9), dtype=torch.uint8)
    factors = torch.tensor([[0.7, 1.3, 0.6], [1.4, 0.6, 1.3], [1.2, 0.9, 1.0]])
    ours = jittered(images, factors)
    assert ours.dtype == torch.float32
    for image, changed, (brightness, contrast, saturation) in zip(
        images, ours, factors.tolist(), strict=True
    ):
        expected = F.adjust_brightness(image / 255, brightness)
        expected = F.adjust_saturation(F.adjust_contrast(expected, contrast), saturation)
        assert torch.allclose(changed, 255 * expected, atol=0.01)


def test_factors_of_1_change_nothing():
    images = torch.randint(256, (2, 3, 8, 9), dtype=torch.uint8)
    assert torch.allclose(jittered(images, torch.ones(2, 3)), images.float(), atol=1e-3)


def test_jitter_reaches_its_limits():
    """Contrast and saturation do nothing to a grey plane."""
    grey = torch.full((3, 64, 64), 100, dtype=torch.uint8), torch.zeros(64, 64, dtype=torch.uint8)
    whole = Strong((64, 64), (1, 1))
    found = [augmented(whole, grey, seed, jitter=0.3)[0].mean().item() for seed in range(100)]
    assert 69.9 < min(found) < 78 and 122 < max(found) < 130.1
    assert torch.allclose(augmented(whole, grey)[0], torch.tensor(100.0))


# The input of the network


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalisation(dtype):
    images = torch.randint(256, (2, 3, 6, 8)).to(dtype)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    normalised = normalizer(mean, std, CPU)(images)
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert normalised.dtype == torch.float32
    assert torch.allclose(normalised, expected, atol=1e-6)
    assert normalised.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalisation_does_not_change_its_argument(dtype):
    images = torch.full((1, 3, 4, 4), 51).to(dtype, memory_format=torch.channels_last)
    assert normalizer([0.1] * 3, [0.5] * 3, CPU)(images).mean().item() == pytest.approx(0.2)
    assert (images == 51).all()


def test_images_that_are_not_normalised_lie_between_0_and_1():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    scaled = normalizer([0.0] * 3, [1.0] * 3, CPU)(images)
    assert torch.allclose(scaled, images / 255) and scaled.min() == 0 and scaled.max() == 1


def test_noise_is_grey_and_of_a_random_strength():
    grey, strengths = torch.full((2, 3, 96, 128), 100.0), []
    for seed in range(0, 60, 2):
        randoms = [torch.Generator().manual_seed(seed + n) for n in range(2)]
        found = noisy(grey, randoms, 10.0) - 100
        assert (found == found[:, :1]).all() and abs(found.mean()) < 0.3
        first, second = found[:, 0]
        shifted = torch.stack([first, second]).flatten(1).corrcoef()[0, 1]
        assert abs(shifted) < 0.1  # no two images have the same noise
        right = torch.stack([first[:, 1:], first[:, :-1]]).flatten(1).corrcoef()[0, 1]
        assert abs(right) < 0.1  # nor two pixels
        strengths += [first.std().item(), second.std().item()]
    assert min(strengths) < 1 and 9 < max(strengths) < 10.5 and 3.5 < np.mean(strengths) < 6.5
    randoms = [torch.Generator().manual_seed(n) for n in range(2)]
    extremes = torch.tensor([0.0, 255.0]).expand(2, 3, 96, 2)
    assert 0 <= noisy(extremes, randoms, 10.0).min() and noisy(extremes, randoms, 10.0).max() <= 255
