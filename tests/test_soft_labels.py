"""Soft labels: writing, reading and cropping them, learning from them; and teachers."""

import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, after_step, read_log, run_script, same_weights, send, street_scenes
from torch.nn import functional as F

from datasets.camvid import CamVid
from datasets.cityscapes import Cityscapes
from datasets.images import DatasetError, FileError
from datasets.loading import SeededItems
from datasets.soft_labels import SoftLabels
from datasets.transforms import Paper, Strong, Window, crop_soft_labels
from models.lednet import LEDNet
from utils.checkpoint import load_checkpoint, load_network, save_checkpoint
from utils.losses import cross_entropy, divergence, with_soft_labels
from utils.teacher import MEAN, WEIGHTS, Teacher, build_teacher, load_teacher

WRITE, TRAIN = "tools/write_soft_labels.py", "tools/train_teacher.py"


# The loss


def test_the_loss_is_the_divergence_of_softened_probabilities():
    logits = torch.randn(2, 5, 8, 12, requires_grad=True)
    p = torch.randn(2, 5, 2, 3).softmax(1)
    loss = divergence(logits, p)
    q = (logits.reshape(2, 5, 2, 4, 3, 4).mean((3, 5)) / 2).softmax(1)  # of 4x4 pixels
    assert torch.allclose(loss, (p * (p / q).log()).sum(1).mean(), atol=1e-6)
    loss.backward()
    assert logits.grad.abs().sum() > 0


def test_a_network_that_agrees_has_no_loss():
    logits = torch.randn(2, 5, 10, 13)
    p = (F.adaptive_avg_pool2d(logits, (3, 4)) / 2).softmax(1)
    assert divergence(logits, p).item() == pytest.approx(0, abs=1e-6)


def test_pixels_without_soft_labels_add_nothing():
    logits, p = torch.randn(2, 5, 8, 12, requires_grad=True), torch.zeros(2, 5, 2, 3)
    p[0] = torch.randn(5, 2, 3).softmax(0)
    loss = divergence(logits, p)
    assert torch.allclose(loss, divergence(logits[:1], p[:1]) / 2)
    loss.backward()
    assert logits.grad[1].abs().sum() == 0


def test_the_mean_of_the_parts_of_a_batch_is_that_of_the_batch():
    """As several processes have it."""
    logits, p = torch.randn(4, 5, 8, 12), torch.randn(4, 5, 2, 3).softmax(1)
    halves = [divergence(logits[n::2], p[n::2]) for n in range(2)]
    assert torch.allclose(sum(halves) / 2, divergence(logits, p), rtol=1e-6)
    assert abs(halves[0] - halves[1]) > 1e-3


def test_labels_count_once_and_soft_labels_twice():
    logits, labels = torch.randn(2, 5, 8, 12), torch.randint(5, (2, 8, 12))
    p = torch.randn(2, 5, 2, 3).softmax(1)

    def loss(logits, labels):
        return cross_entropy(logits, labels, torch.ones(5))

    expected = loss(logits, labels) + 2 * divergence(logits, p)
    assert torch.equal(with_soft_labels(loss)(logits, labels, p), expected)
    both = with_soft_labels(lambda outputs, labels: loss(outputs[0], labels))
    assert torch.equal(both((logits, None), labels, p), expected)


def test_a_network_learns_from_soft_labels_alone(street_network):
    torch.manual_seed(0)
    student, images = LEDNet(19, 4, 0.0), street_scenes(4, (64, 128))
    with torch.no_grad():
        p = F.adaptive_avg_pool2d(load_network(street_network)[0](images), (16, 32)).softmax(1)
    optimizer, losses = torch.optim.Adam(student.parameters(), 0.01), []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(divergence(student(images), p))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# Cropping


def waves(height: int, width: int) -> torch.Tensor:
    """A smooth image, 3 x H x W, uint8, that is not its own mirror image."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    return (127 + 120 * torch.stack([(9 * x).sin(), (7 * y).sin(), (5 * x + 6 * y).cos()])).byte()


@pytest.mark.parametrize("recipe", [Paper(), Strong((96, 128), (0.67, 1.5))], ids=["paper", "s"])
def test_soft_labels_go_the_way_of_their_image(recipe):
    """With an image of its own colours as soft labels."""
    shapes = [(120, 160)] * 3 if isinstance(recipe, Paper) else [(120, 160), (90, 200), (64, 64)]
    images = [waves(*shape) for shape in shapes]
    labels = [torch.zeros(shape, dtype=torch.uint8) for shape in shapes]
    # Whatever their resolution, as that of the image may change after they are written.
    soft = [F.adaptive_avg_pool2d(image.float(), (40, 50)).round().byte() for image in images]
    whole = 0
    for seed in range(10):
        randoms = [torch.Generator().manual_seed(seed + 100 * n) for n in range(3)]
        windows = [recipe.draw(*pair) for pair in zip(labels, randoms, strict=True)]
        crops, masks = recipe(images, labels, windows)
        found = crop_soft_labels(soft, shapes, windows, masks.shape[1:])
        expected = F.avg_pool2d(crops.float(), 4) / 255
        assert found.shape == expected.shape and found.dtype == torch.float32
        inside = -F.max_pool2d(-(masks == 0).float()[:, None], 20, 4, 8) == 1
        off = (found - expected).abs().amax(1, keepdim=True)
        assert off[inside].max() < 0.03
        outside = F.max_pool2d((masks == 0).float()[:, None], 20, 4, 8) == 0
        assert (found.amax(1, keepdim=True)[outside] == 0).all()
        whole += inside.sum()
    assert whole > 5000


def test_soft_labels_of_sizes_that_four_does_not_divide():
    soft = [torch.full((2, 18, 23), 51, dtype=torch.uint8)]
    found = crop_soft_labels(soft, [(70, 90)], [Window(0, 0, 70, 90, True)], (70, 90))
    assert found.shape == (1, 2, 18, 23) and torch.allclose(found, torch.tensor(0.2))


# Files


@pytest.fixture
def folder(tmp_path) -> Path:
    """Soft labels of data/a.png, but not of data/b.png, for two classes."""
    (tmp_path / "soft").mkdir()
    (tmp_path / "soft/classes.txt").write_text("road\nsky")
    np.save(tmp_path / "soft/a.png.npy", np.arange(8, dtype=np.uint8).reshape(2, 2, 2))
    return tmp_path / "soft"


def open_soft(folder: Path, names=("road", "sky"), images=("a.png", "b.png")) -> SoftLabels:
    return SoftLabels(str(folder), "data", [f"data/{name}" for name in images], names)


def test_soft_labels_are_found_by_the_path_of_the_image(folder):
    soft = open_soft(folder)
    assert soft.count() == 1 and soft[0].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert soft[1].tolist() == [[[0]], [[0]]]


def test_wrong_soft_labels_are_refused(folder):
    with pytest.raises(DatasetError, match=r"of other classes than the data set: road, sky"):
        open_soft(folder, ["sky", "road"])
    with pytest.raises(DatasetError, match=r"has no b\.png\.npy, nor that of any other image"):
        open_soft(folder, images=["b.png"])
    for content in (np.zeros((3, 2, 2), np.uint8), np.zeros((2, 2, 2)), np.zeros(2, np.uint8)):
        np.save(folder / "a.png.npy", content)
        with pytest.raises(FileError, match="does not hold probabilities of 2 classes"):
            open_soft(folder)[0]
    whole = (folder / "a.png.npy").read_bytes()
    for content in (whole[:-1], whole[:20], b"noise" * 99, b"", whole.replace(b"(2,)", b"(2e9")):
        (folder / "a.png.npy").write_bytes(content)
        with pytest.raises(FileError, match="is damaged: write the soft labels again"):
            open_soft(folder)[0]
    (folder / "classes.txt").write_bytes(b"\xff")
    with pytest.raises(DatasetError, match=r"classes\.txt cannot be read"):
        open_soft(folder)
    (folder / "classes.txt").unlink()
    with pytest.raises(DatasetError, match="holds no soft labels"):
        open_soft(folder)


def test_an_image_read_in_place_of_a_broken_one_brings_its_soft_labels(folder):
    class Half(list):
        def __getitem__(self, index):
            if index == 1:
                raise DatasetError("broken")
            return "image", "label"

    batch = SeededItems(Half("ab"), skip_broken=True, soft_labels=open_soft(folder))[1, 0]
    assert batch.indices == [0] and batch.soft_labels[0].sum() == 28


def test_the_tool_writes_what_the_network_sees(script, fails, cityscapes, trained, tmp_path):
    data = shutil.copytree(cityscapes, tmp_path / "data")
    city = Cityscapes(data, "train", height=64)
    first, last = Path(city.pairs[0][0]), Path(city.pairs[-1][0])
    last.unlink()
    last.symlink_to(first)
    argv = ("--checkpoint", trained / "best.pth", "--datadir", "data", "--output", "soft")
    result = script(WRITE, *argv)
    assert result.status == 0
    assert f"of {len(city) - 1} images, which {len(city)} paths lead to" in result.out
    soft = SoftLabels("soft", str(data), [image for image, _ in city.pairs], city.classes.names)
    network, about = load_network(trained / "best.pth")
    for index in range(2):
        image = about.normalizer(torch.device("cpu"))(city[index][0][None])
        with torch.no_grad():
            expected = F.avg_pool2d((network(image) / 2).softmax(1), 4)[0]
        assert (soft[index] / 255 - expected).abs().max() < 0.6 / 255
    assert soft.paths[-1].is_symlink() and os.path.samefile(soft.paths[-1], soft.paths[0])
    assert "soft exists" in fails(WRITE, *argv)
    assert "--train-on val: give fine or" in fails(WRITE, *argv[:-1], "new", "--train-on", "val")


# Training


@pytest.fixture(scope="module")
def soft(cityscapes, trained, tmp_path_factory):
    """Soft labels for the drawn Cityscapes; not to be changed."""
    folder = tmp_path_factory.mktemp("soft") / "labels"
    argv = ("--checkpoint", trained / "best.pth", "--datadir", cityscapes, "--output", folder)
    assert run_script(WRITE, *argv) == 0
    return folder


@pytest.fixture(scope="module")
def taught(soft, cityscapes):
    return ("--datadir", cityscapes, *QUICK, "--D", 4, "--soft-labels", soft)


def test_training_uses_soft_labels_in_stage_2(script, taught, tmp_path):
    result = script("main.py", *taught, "--savedir", "a")
    assert result.status == 0 and "soft labels: of 6 of the 6 images" in result.out
    assert script("main.py", *taught[:-2], "--savedir", "b").status == 0
    rows = [read_log(tmp_path / "save" / name) for name in "ab"]
    first, second = zip(*rows, strict=True)
    assert first[0]["train_loss"] == first[1]["train_loss"]
    assert float(second[0]["train_loss"]) > float(second[1]["train_loss"]) + 0.01
    saved = load_checkpoint(tmp_path / "save/a/last.pth")
    assert saved["model"].keys() == LEDNet(19, 4).state_dict().keys()


def test_workers_read_the_same_soft_labels(script, taught, tmp_path):
    for workers in (0, 2):
        argv = (*taught, "--workers", workers, "--savedir", f"w{workers}")
        strong = ("--preset", "camvid", "--crop", 64, 64, "--cache", "off")
        assert script("main.py", *argv, *strong).status == 0
    weights = [load_checkpoint(tmp_path / f"save/w{n}/last.pth")["model"] for n in (0, 2)]
    assert same_weights(*weights)


def test_a_resumed_run_is_the_same_with_its_soft_labels_elsewhere(script, fails, taught, tmp_path):
    assert script("main.py", *taught, "--savedir", "whole").status == 0
    shutil.copytree(taught[-1], tmp_path / "s")
    argv = (*taught[:-1], "s", "--savedir", "cut")
    with after_step("step 1 of epoch 1 of stage 2", send(signal.SIGTERM)):
        assert script("main.py", *argv).status == 128 + signal.SIGTERM
    (tmp_path / "s").rename(tmp_path / "moved")
    resume = ("--savedir", "cut", "--resume")
    assert "s has no classes.txt" in fails("main.py", *resume)
    assert script("main.py", *resume, "--soft-labels", "moved").status == 0
    weights = [load_checkpoint(tmp_path / f"save/{name}/last.pth") for name in ("whole", "cut")]
    assert same_weights(weights[0]["training_model"], weights[1]["training_model"])


def test_images_may_have_no_soft_labels_or_damaged_ones(script, fails, taught, tmp_path):
    folder = Path(shutil.copytree(taught[-1], tmp_path / "soft"))
    files = sorted(folder.glob("**/*.npy"))
    files[0].unlink()
    result = script("main.py", *taught[:-1], folder, "--savedir", "a")
    assert result.status == 0 and "soft labels: of 5 of the 6 images" in result.out
    files[1].write_bytes(b"")
    argv = (*taught[:-1], folder, "--savedir", "b")
    message = fails("main.py", *argv)
    assert f"{files[1]} is damaged: write the soft labels again; --skip-broken" in message
    result = script("main.py", *argv[:-1], "c", "--skip-broken")
    assert result.status == 0 and "left out" in result.out


def test_images_of_several_sizes_have_soft_labels(script, fields, tmp_path):
    data = ("--dataset", "folder", "--classes", fields / "classes.txt", "--datadir", fields)
    argv = (*data, "--preset", "camvid", "--height", 72, "--crop", 64, 64, "--epochs", 1, "--D", 4)
    assert script("main.py", *argv, "--savedir", "teacher").status == 0
    checkpoint = ("--checkpoint", "save/teacher/last.pth", "--datadir", fields)
    assert script(WRITE, *checkpoint, "--output", "soft").status == 0
    shapes = {np.load(path).shape for path in (tmp_path / "soft").glob("**/*.npy")}
    assert len(shapes) > 2 and all(shape[:2] == (3, 18) for shape in shapes)
    result = script("main.py", *argv, "--soft-labels", "soft", "--savedir", "s")
    assert result.status == 0 and "soft labels: of 4 of the 4 images" in result.out


# A teacher from EdgeNets

NETWORK = """
from torch import nn

class ESPNetv2Segmentation(nn.Module):
    def __init__(self, args, classes, dataset):
        super().__init__()
        assert args.s == 2.0 and dataset == "city"
        self.conv = nn.Conv2d(3, classes, 3, padding=1)

    def forward(self, x):
        assert all(length % 32 == 0 for length in x.shape[2:])
        return self.conv(x)
"""


@pytest.fixture(scope="module")
def edgenets(tmp_path_factory) -> Path:
    """A small network where a clone of EdgeNets has its own; not to be changed."""
    root = tmp_path_factory.mktemp("edgenets")
    code = root / "model/segmentation/espnetv2.py"
    (root / WEIGHTS).parent.mkdir(parents=True)
    code.write_text(NETWORK)
    torch.manual_seed(1)
    save_checkpoint(
        torch.nn.ModuleDict({"conv": torch.nn.Conv2d(3, 20, 3)}).state_dict(), root / WEIGHTS
    )
    return root


@pytest.fixture(scope="module")
def lesson(camvid, edgenets):
    data = ("--dataset", "camvid", "--datadir", camvid, "--preset", "camvid", "--epochs", 1)
    return (*data, "--height", 72, "--crop", 64, 64, "--batch-size", 2, "--workers", 0)


@pytest.fixture(scope="module")
def teacher(lesson, edgenets, tmp_path_factory):
    """The folder of a short run of tools/train_teacher.py; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    assert run_script(TRAIN, *lesson, "--edgenets", edgenets, "--savedir", folder) == 0
    return folder


def test_a_teacher_adds_up_the_parts_of_each_class(edgenets):
    teacher = build_teacher(str(edgenets), "camvid", CamVid.CLASSES)
    start = load_checkpoint(edgenets / WEIGHTS)["model"]
    assert same_weights(teacher.network.state_dict(), start)
    names = Cityscapes.CLASSES.names
    assert [names[i] for i in teacher.outputs.tolist()[11:15]] == ["car", "truck", "bus", "train"]
    images = torch.rand(2, 3, 64, 96)
    p, parts = (x.exp() for x in (teacher(images), teacher.network(images)))
    assert torch.allclose(p[:, 0], parts[:, 10]) and torch.allclose(p[:, 1], parts[:, 2:4].sum(1))
    assert torch.allclose(p.sum(1), parts[:, :19].sum(1))  # all classes once, no background
    whole = build_teacher(str(edgenets), "cityscapes", Cityscapes.CLASSES)
    assert whole.outputs.tolist() == list(range(19)) and whole.lengths == [1] * 19


@pytest.mark.parametrize("size", [(64, 96), (70, 101)])
def test_a_teacher_answers_at_the_size_of_the_images(size):
    network = Teacher(torch.nn.Conv2d(3, 20, 1), [[0], [3, 4]])
    assert network(torch.rand(2, 3, *size)).shape == (2, 2, *size)


def test_a_network_learns_from_a_trained_teacher(
    script, fails, lesson, edgenets, teacher, tmp_path
):
    saved = load_checkpoint(teacher / "last.pth")
    assert saved["mean"] == MEAN and saved["apn_channels"] == 0
    start = load_checkpoint(edgenets / WEIGHTS)["model"]["conv.weight"]
    assert not torch.equal(saved["model"]["network.conv.weight"], start)
    loaded, _ = load_teacher(teacher / "last.pth", str(edgenets))
    assert same_weights(loaded.state_dict(), saved["model"])
    data = ("--datadir", lesson[3], "--output", "soft")
    argv = ("--checkpoint", teacher / "last.pth", *data)
    assert "holds a teacher, which needs a clone of EdgeNets" in fails(WRITE, *argv)
    assert script(WRITE, *argv, "--edgenets", edgenets).status == 0
    result = script("main.py", *lesson, "--D", 4, "--soft-labels", "soft", "--savedir", "s")
    assert result.status == 0 and "soft labels: of 6 of the 6 images, soft" in result.out
    network, _ = load_network(tmp_path / "save/s/best.pth")
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 11, 64, 64)
    argv = ("--checkpoint", teacher / "last.pth", "--input", ".")
    assert "holds a teacher: tools/write_soft_labels.py" in fails("predict.py", *argv)


def test_a_resumed_teacher_is_the_same(script, lesson, edgenets, teacher, tmp_path):
    with after_step("step 1 of epoch 1 of stage 2", send(signal.SIGTERM)):
        argv = (*lesson, "--edgenets", edgenets, "--savedir", "t")
        assert script(TRAIN, *argv).status == 128 + signal.SIGTERM
    result = script(TRAIN, "--savedir", "t", "--resume")
    command = f"--checkpoint save/t/last.pth --datadir {lesson[3]} --output SOFT"
    assert result.status == 0 and command in result.out
    weights = [load_checkpoint(run / "last.pth") for run in (teacher, tmp_path / "save/t")]
    assert same_weights(weights[0]["training_model"], weights[1]["training_model"])


def test_each_program_resumes_its_own_runs(fails, teacher, trained, tmp_path):
    wrong = {"main.py": (teacher, "a run of another program"), TRAIN: (trained, "a run of main.py")}
    for program, (run, message) in wrong.items():
        folder = shutil.copytree(run, tmp_path / run.name)
        before = (folder / "args.json").read_bytes()
        assert f"holds {message}" in fails(program, "--savedir", folder, "--resume")
        assert (folder / "args.json").read_bytes() == before


@pytest.mark.parametrize(
    "option",
    [("--D", 20), ("--init", "a"), ("--decoder",), ("--dropout", 0.1), ("--std", 1, 1, 1)],
    ids=lambda option: option[0],
)
def test_options_of_lednet_are_refused(fails, lesson, edgenets, option):
    argv = (*lesson, "--edgenets", edgenets, "--savedir", "u")
    assert "is for main.py alone" in fails(TRAIN, *argv, *option)


def test_a_teacher_needs_edgenets_and_the_classes_of_cityscapes(
    fails, lesson, edgenets, fields, monkeypatch
):
    assert "give --edgenets" in fails(TRAIN, *lesson)
    assert "is not a clone of EdgeNets" in fails(TRAIN, *lesson, "--edgenets", fields)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "model.segmentation.espnetv2", None)
        assert "cannot be imported: " in fails(TRAIN, *lesson, "--edgenets", edgenets)
    data = ("--dataset", "folder", "--classes", fields / "classes.txt", "--datadir", fields)
    message = fails(TRAIN, *data, "--edgenets", edgenets, "--savedir", "u")
    assert "knows the classes of Cityscapes, not grass, water, dirt road" in message


def test_a_resumed_teacher_keeps_its_classes(script, edgenets, fields_copy, tmp_path):
    """Whatever becomes of the file of classes."""
    names = fields_copy / "classes.txt"
    names.write_text("road\nsky\nignore\n\ncar\n")
    data = ("--dataset", "folder", "--classes", names, "--datadir", fields_copy)
    argv = (*data, "--edgenets", edgenets, "--preset", "camvid", "--height", 72, "--crop", 64, 64)
    with after_step("step 1 of epoch 1 of stage 2", send(signal.SIGTERM)):
        run = script(TRAIN, *argv, "--epochs", 2, "--batch-size", 2, "--savedir", "t")
        assert run.status == 128 + signal.SIGTERM
    names.write_text("sky\nroad\nignore\n\ncar\n")
    assert script(TRAIN, "--savedir", "t", "--resume").status == 0
    assert load_checkpoint(tmp_path / "save/t/last.pth")["class_names"] == ["road", "sky", "car"]
