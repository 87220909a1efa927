import pytest
import torch
from torch import nn

from models.lednet import LEDNet
from utils.speed import count_multiply_adds, count_parameters, device_of, measure_latency


class Counter(nn.Conv2d):
    """Counts its passes."""

    passes = 0

    def forward(self, x):
        self.passes += 1
        assert x.shape == (1, 3, 64, 96) and not torch.is_grad_enabled()
        return super().forward(x)


def test_multiply_adds_of_one_convolution():
    conv = nn.Conv2d(3, 5, (3, 1), padding=(1, 0))
    assert count_multiply_adds(conv, (10, 20)) == 10 * 20 * 5 * 3 * 3
    assert count_parameters(conv) == 5 * 3 * 3 + 5


def test_multiply_adds_of_the_network_scale_with_its_input():
    network = LEDNet().eval().to("meta")  # shapes alone
    half = count_multiply_adds(network, (256, 512))
    whole = count_multiply_adds(network, (512, 1024))
    assert whole == pytest.approx(4 * half, rel=1e-3)
    assert whole == pytest.approx(22.5e9 / 2, rel=0.05)


def test_latency_counts_every_pass():
    model = Counter(3, 3, 1)
    latency = measure_latency(model, (64, 96), passes=20, warmup=4)
    assert latency.passes == 20 and model.passes == 24
    assert 0 < latency.median_ms <= latency.p95_ms
    assert latency.fps == pytest.approx(1e3 / latency.median_ms)


def test_slow_models_are_timed_fewer_times():
    model = Counter(3, 3, 1)
    assert measure_latency(model, (64, 96), passes=50, seconds=0).passes == 5
    assert model.passes == 10


def test_runtimes_without_parameters_are_on_the_cpu():
    assert device_of(nn.Identity()) == torch.device("cpu")
    assert device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")
