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
        self.repeated = 0

    def __call__(self, module: nn.Module, samples: tuple[Tensor]) -> nn.Module:
        for _ in range(4):
            module(*samples)
        module.forward = self.counted(module.forward)
        return module

    def counted(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def repeat(images: Tensor) -> Tensor:
            self.repeated += 1
            return forward(images)

        return repeat


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorder)
    return recorder


def images_of(count: int, width: int = 12) -> Tensor:
    return torch.rand(count, 8, 10, width, generator=torch.Generator().manual_seed(count))


@pytest.fixture
def model() -> nn.Module:
    """A block with batch norms and dropout."""
    torch.manual_seed(0)
    return SSnbt(8, 2, 0.5).train()


def test_only_batches_of_the_shape_that_was_recorded_are_repeated(model, recorder):
    graphed = Graphed(model, images_of(4))
    for count, width, repeated in [(3, 12, 0), (4, 12, 1), (4, 12, 2), (1, 12, 2), (4, 14, 2)]:
        assert graphed(images_of(count, width)).shape == (count, 8, 10, width)
        assert recorder.repeated == repeated


def test_recording_changes_nothing_of_the_training(model, recorder):
    """Neither running statistics nor random numbers."""
    expected = SSnbt(8, 2, 0.5).train()
    expected.load_state_dict(model.state_dict())
    buffers = list(model.buffers())
    torch.manual_seed(1)
    outputs = [expected(images_of(count)) for count in (4, 4, 2)]
    torch.manual_seed(1)
    graphed = Graphed(model, torch.zeros(4, 8, 10, 12))
    for count, output in zip((4, 4, 2), outputs, strict=True):
        assert torch.equal(graphed(images_of(count)), output)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name
    # A graph writes to the memory that they had when it was recorded.
    assert all(now is before for now, before in zip(model.buffers(), buffers, strict=True))


def test_the_model_itself_stays_as_it_is(model, recorder):
    """It is scored and saved without graphs."""
    names = list(model.state_dict())
    Graphed(model, images_of(4))(images_of(4))
    model(images_of(4))
    assert recorder.repeated == 1 and list(model.state_dict()) == names
    assert "forward" not in vars(model)
