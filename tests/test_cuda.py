"""What a GPU must show. Other tests do not see one:

TEST_CUDA=1 python -m pytest -n 0 tests/test_cuda.py
"""

import json
import re
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import CAMVID_WEIGHTS, QUICK, after_step, read_log, run_script, send, street_scenes
from torch import Tensor, nn
from torch._dynamo.utils import counters

import utils.training
from models.deployed import deploy
from models.lednet import LEDNet, SSnbt
from utils.checkpoint import load_checkpoint, load_network
from utils.graphs import Graphed
from utils.speed import InPrecision
from utils.teacher import Teacher

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a GPU: TEST_CUDA=1 python -m pytest -n 0 tests/test_cuda.py",
)

HALF = torch.float16
# Everything that a step of training can do, in two epochs of three steps.
EVERYTHING = (
    *("--height", 64, "--batch-size", 2, "--workers", 0, "--augment", "strong", "--ema"),
    *("--iouTrain", "--aux-weight", 0.4, "--decoder", "--epochs", 2, "--device", "cuda"),
)


@pytest.fixture(scope="module")
def network() -> LEDNet:
    return load_network(CAMVID_WEIGHTS)[0].cuda().requires_grad_(False)


@pytest.fixture
def train(cityscapes, tmp_path) -> Callable[..., int]:
    """Train on the drawn scenes into tmp_path/run, or go on with --resume; returns the status."""

    def run(*options: object) -> int:
        argv = () if "--resume" in options else ("--datadir", cityscapes, *EVERYTHING)
        return run_script("main.py", *argv, *options, "--savedir", tmp_path / "run")

    return run


# Inference


def agreement(labels: Tensor, logits: Tensor) -> float:
    """Return the share of pixels that have the label of the logits, N x C x H x W.

    Pixels do not count, 5 % at most, where the two highest logits differ by less than half
    precision may change them.
    """
    highest = logits.topk(2, 1).values
    clear = highest[:, 0] - highest[:, 1] > 0.05
    assert clear.float().mean() > 0.95
    return (labels == logits.argmax(1))[clear].float().mean().item()


@pytest.mark.parametrize("form", ["eager", "deployed", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["float32", "float16"])
@torch.inference_mode()
def test_labels_are_those_of_a_cpu(network, form, dtype):
    images = street_scenes(2, (360, 480))
    expected = load_network(CAMVID_WEIGHTS)[0](images)
    model = InPrecision(network, dtype)
    if form != "eager":
        model = deploy(network, dtype=dtype, compiled=form == "compiled")
    logits = model(images.cuda())
    assert logits.is_cuda and logits.dtype == torch.float32
    assert agreement(logits.argmax(1).cpu(), expected) > 0.999


@torch.inference_mode()
def test_outputs_of_graphs_that_are_copied_stay_what_they_were(network):
    images = street_scenes(4, (128, 256)).cuda().split(1)
    served = deploy(network, labels=True, dtype=HALF)
    for _ in range(3):  # to compile, and to record
        served(images[0])
    kept = [served(image).clone() for image in images]
    without_graphs = deploy(network, dtype=HALF, compiled=False)
    for image, labels in zip(images, kept, strict=True):
        assert agreement(labels, without_graphs(image)) > 0.999


def test_scores_of_the_compiled_network_and_one_compilation(script, camvid, tmp_path):
    """In half precision, with label PNGs; what is timed is what was scored."""
    scores = {}
    for runtime, precision in (("torch", "float32"), ("compiled", "float16")):
        torch._dynamo.reset()
        counters.clear()
        result = script(
            *("eval_cityscapes_server.py", "--checkpoint", CAMVID_WEIGHTS, "--datadir", camvid),
            *("--runtime", runtime, "--precision", precision, "--device", "cuda"),
            *("--json", tmp_path / f"{runtime}.json", "--save-results", tmp_path / runtime),
        )
        assert result.status == 0, result.err
        scores[runtime] = json.loads((tmp_path / f"{runtime}.json").read_text())["class_miou"]
        assert len(list((tmp_path / runtime).rglob("*.png"))) == 3
    assert counters["stats"]["unique_graphs"] == 1
    assert scores["compiled"] == pytest.approx(scores["torch"], abs=0.01)


# Graphs in training


def losses_of(graphs: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Take six steps, of which one has a smaller batch; return their losses and the weights."""
    torch.manual_seed(0)
    model = LEDNet(5, 4).cuda().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    images = street_scenes(4, (64, 128)).cuda().to(memory_format=torch.channels_last)
    labels = (images.mean(1) * 5).long().clamp(0, 4)
    autocast = torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    with autocast:
        forward = Graphed(model, torch.zeros_like(images)) if graphs else model
    losses = []
    for count in (4, 4, 4, 2, 4, 4):
        with autocast:
            outputs = forward(images[:count])
        loss = nn.functional.cross_entropy(outputs.float(), labels[:count])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def test_graphs_train_like_no_graphs():
    """With the same dropout, and the same running statistics."""
    (losses, weights), (expected, expected_weights) = losses_of(True), losses_of(False)
    assert losses == pytest.approx(expected, rel=0.02)
    assert len({round(loss, 4) for loss in losses}) > 3
    for name, weight in weights.items():
        assert torch.allclose(weight, expected_weights[name], rtol=0.05, atol=0.02), name


def test_dropout_differs_from_step_to_step():
    block = SSnbt(8, 1, 0.5).cuda().train()
    images = torch.rand(2, 8, 16, 16, device="cuda")
    graphed = Graphed(block, torch.zeros_like(images))
    first, second = (graphed(images).detach().clone() for _ in range(2))
    assert not torch.equal(first, second)


def test_graphs_are_freed_with_their_stage(cityscapes, tmp_path, monkeypatch):
    """Those of stage 1, before those of stage 2 are recorded."""
    used = []

    def measured(model: nn.Module, sample: Tensor) -> Graphed:
        before = torch.cuda.memory_allocated()
        graphed = Graphed(model, sample)
        used.append((before, torch.cuda.memory_allocated()))
        return graphed

    monkeypatch.setattr(utils.training, "Graphed", measured)
    argv = ("--datadir", cityscapes, *QUICK, "--height", 256, "--device", "cuda")
    assert run_script("main.py", *argv, "--savedir", tmp_path / "run") == 0
    (before, recorded), (later, _) = used
    assert later - before < (recorded - before) / 4
    assert [row["stage"] for row in read_log(tmp_path / "run")] == ["1", "2"]


# Training


@pytest.fixture
def no_waiting(monkeypatch) -> Iterator[list[int]]:
    """Let steps of training fail that wait for the GPU, after the first two; returns all steps."""
    steps, train_step = [], utils.training.train_step

    def checked(state: utils.training.TrainState, *args: object) -> Tensor:
        # In the first two, kernels are searched and loaded.
        torch.cuda.set_sync_debug_mode("error" if len(steps) >= 2 else "default")
        try:
            loss = train_step(state, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        steps.append(state.step)
        return loss

    monkeypatch.setattr(utils.training, "train_step", checked)
    return steps


@pytest.mark.parametrize("loss", ["ce", "ohem"])
@pytest.mark.parametrize("graphs", ["--graphs", "--no-graphs"])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_step_does_not_wait_for_the_gpu(train, no_waiting, loss, graphs, amp):
    assert train("--loss", loss, graphs, "--amp", amp) == 0
    assert no_waiting == [1, 2, 3] * 2


@pytest.mark.parametrize("graphs", ["--graphs", "--no-graphs"])
def test_a_step_with_soft_labels_does_not_wait_for_the_gpu(
    train, no_waiting, trained, cityscapes, tmp_path, graphs
):
    argv = ("--checkpoint", trained / "best.pth", "--datadir", cityscapes)
    assert run_script("tools/write_soft_labels.py", *argv, "--output", tmp_path / "soft") == 0
    assert train("--soft-labels", tmp_path / "soft", graphs) == 0
    assert no_waiting == [1, 2, 3] * 2


def test_a_teacher_does_not_wait_for_the_gpu():
    network = Teacher(nn.Conv2d(3, 20, 1), [[0], [3, 4]]).cuda()
    images = torch.rand(2, 3, 70, 96, device="cuda")
    network(images)  # kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        network(images).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_of_pretraining_does_not_wait_for_the_gpu(shapes, tmp_path, no_waiting):
    argv = ("--size", 32, "--epochs", 2, "--batch-size", 4, "--workers", 0, "--recipe", "modern")
    run = ("--datadir", shapes, "--device", "cuda", "--savedir", tmp_path / "run")
    assert run_script("lednet_imagenet.py", *argv, *run) == 0
    assert no_waiting == [1, 2, 3] * 2


def test_a_run_with_workers_that_pin_memory(train, tmp_path):
    """In a thread, which calls CUDA at any moment."""
    assert train("--cache", "off", "--workers", 2) == 0
    assert len(read_log(tmp_path / "run")) == 2


@pytest.mark.parametrize("cache", ["ram", "off"])
def test_a_stopped_run_goes_on_from_its_state(train, tmp_path, capsys, cache):
    """To nearly the same end: not all operations of a GPU round the same way twice."""
    place = "step 2 of epoch 2 of stage 2"
    with after_step(place, send(signal.SIGTERM)):
        assert train("--cache", cache) == 128 + signal.SIGTERM
    stopped = load_checkpoint(tmp_path / "run/last.pth")
    assert (stopped["epoch"], stopped["step"]) == (1, 2)
    assert "cuda" in stopped["processes"][0]["rng"]
    capsys.readouterr()
    assert train("--resume") == 0
    out = capsys.readouterr().out
    assert f"resuming after {place}" in out and "note: " not in out
    resumed = [float(row["train_loss"]) for row in read_log(tmp_path / "run")]
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    assert train("--cache", cache) == 0
    whole = [float(row["train_loss"]) for row in read_log(tmp_path / "run")]
    assert resumed == pytest.approx(whole, rel=0.05)


def test_a_gpu_without_memory_is_one_line(cityscapes, tmp_path, capsys):
    """Of 300 MB, which the images of a batch and its first layer fill."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(3e8 / total)
    argv = ("--datadir", cityscapes, *QUICK, "--height", 1024, "--batch-size", 4)
    try:
        status = run_script("main.py", *argv, "--device", "cuda", "--savedir", tmp_path / "run")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and "a batch of 4 images of 2048x1024" in line
    assert re.search(r"the GPU ran out of memory.*--batch-size.*--no-graphs", line)
