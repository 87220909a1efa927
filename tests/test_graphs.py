"""Without a GPU: what is around the recording. tests/test_cuda.py records."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from models.lednet import SSnbt
from utils.graphs import Graphed


class Recorder:
    """Stands for torch.cuda.make_graphed_callables: warms up, and counts what is repeated."""

    def __init__(self) -> None:
        self.recorded: list[tuple[int, ...]] = []
        self.repeated = 0

    def __call__(self, module: nn.Module, samples: tuple[Tensor]) -> nn.Module:
        self.recorded.append(tuple(samples[0].shape))
        for _ in range(4):
            module(*samples)
        module.forward = self.counted(module.forward)
        return module

    def counted(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def repeat(images: Tensor) -> Tensor:
            self.repeated += 1
            return forward(images)

        return repeat


def images_of(count: int, width: int = 12) -> Tensor:
    return torch.rand(count, 8, 10, width, generator=torch.Generator().manual_seed(count))


@pytest.fixture
def model() -> nn.Module:
    """A block with batch norms and dropout."""
    torch.manual_seed(0)
    return SSnbt(8, 2, 0.5).train()


def test_only_full_batches_of_one_shape_are_repeated(model):
    recorder = Recorder()
    graphed = Graphed(model, 4, recorder)
    for count, width, repeated in [(3, 12, 0), (4, 12, 1), (4, 12, 2), (1, 12, 2), (4, 14, 2)]:
        assert graphed(images_of(count, width)).shape == (count, 8, 10, width)
        assert recorder.repeated == repeated
    assert recorder.recorded == [(4, 8, 10, 12)]


def test_recording_changes_nothing_of_the_training(model):
    """Neither running statistics nor random numbers."""
    expected = SSnbt(8, 2, 0.5).train()
    expected.load_state_dict(model.state_dict())
    buffers = list(model.buffers())
    torch.manual_seed(1)
    outputs = [expected(images_of(count)) for count in (4, 4, 2)]
    torch.manual_seed(1)
    graphed = Graphed(model, 4, Recorder())
    for count, output in zip((4, 4, 2), outputs, strict=True):
        assert torch.equal(graphed(images_of(count)), output)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name
    # A graph writes to the memory that they had when it was recorded.
    assert all(now is before for now, before in zip(model.buffers(), buffers, strict=True))


def test_the_model_itself_stays_as_it_is(model):
    """It is scored and saved without graphs."""
    names, recorder = list(model.state_dict()), Recorder()
    Graphed(model, 4, recorder)(images_of(4))
    model(images_of(4))
    assert recorder.repeated == 1 and list(model.state_dict()) == names
    assert "forward" not in vars(model)


def test_the_batch_itself_is_not_recorded(model):
    """Later batches are copied into the memory of what is recorded."""
    samples = []

    def record(module: nn.Module, args: tuple[Tensor]) -> nn.Module:
        samples.extend(args)
        return Recorder()(module, args)

    images = images_of(4)
    Graphed(model, 4, record)(images)
    assert samples[0] is not images and torch.equal(samples[0], images)
