import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.lednet import (
    APN,
    AuxiliaryHead,
    Downsampler,
    Encoder,
    EncoderClassifier,
    ImageClassifier,
    LEDNet,
    SSnbt,
    shuffle,
)
from utils.speed import count_parameters


def test_parameters_match_the_design():
    assert count_parameters(LEDNet(19, 20)) == 951_835
    assert count_parameters(LEDNet(19, 128)) == 2_358_751
    assert count_parameters(Encoder()) == 911_436


@pytest.mark.parametrize("size", [(512, 1024), (360, 480), (1024, 2048), (97, 131), (64, 64)])
def test_output_has_the_input_size(size):
    network = LEDNet().eval()
    with torch.inference_mode():
        logits = network(torch.rand(1, 3, *size))
    assert logits.shape == (1, 19, *size)
    assert logits.isfinite().all()


def test_encoder_computes_what_the_public_code_computes():
    """Figures of the public LEDNet code's encoder, float64, weights and input from seed 7."""
    encoder = Encoder().eval()
    rng = np.random.default_rng(7)

    def draw(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32))

    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, torch.nn.Conv2d):
                shape = tuple(module.weight.shape)
                fan_in = shape[1] * shape[2] * shape[3]
                module.weight.copy_(draw(rng.standard_normal(shape) / np.sqrt(fan_in)))
                module.bias.copy_(draw(rng.standard_normal(shape[0]) * 0.1))
            elif isinstance(module, torch.nn.BatchNorm2d):
                channels = module.num_features
                module.weight.copy_(draw(rng.uniform(0.5, 1.5, channels)))
                module.bias.copy_(draw(rng.standard_normal(channels) * 0.1))
                module.running_mean.copy_(draw(rng.standard_normal(channels) * 0.1))
                module.running_var.copy_(draw(rng.uniform(0.5, 1.5, channels)))
        image = draw(rng.random((1, 3, 64, 128))).double()
        features = encoder.double()(image)

    assert features.shape == (1, 128, 8, 16)
    assert features.mean().item() == pytest.approx(0.7505969679741957, abs=1e-6)
    assert features.max().item() == pytest.approx(6.203614787179953, abs=1e-6)
    points = [
        (0, 0, 0, 0.12164018399241239),
        (1, 0, 0, 1.0933466591952627),
        (5, 3, 7, 0.46212223138693526),
        (31, 7, 15, 0.33890731150762543),
        (64, 4, 8, 0.6483593515887472),
        (100, 2, 3, 1.2231771277078838),
        (127, 7, 15, 0.0),
        (90, 0, 15, 1.4865527268345002),
    ]
    for channel, row, column, value in points:
        assert features[0, channel, row, column].item() == pytest.approx(value, abs=1e-6)


def test_every_parameter_gets_a_finite_gradient():
    network = LEDNet()
    network(torch.rand(2, 3, 64, 96)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias before a batch norm has no effect; all else must learn.
        if parameter.dim() > 1:
            assert parameter.grad.abs().sum() > 0, name


def test_dropout_follows_the_stages():
    rates = [block.left[-1].p for block in Encoder() if isinstance(block, SSnbt)]
    assert rates == [0.03] * 5 + [0.3] * 8
    encoder = LEDNet(dropout=0.1).encoder
    rates = [block.right[-1].p for block in encoder if isinstance(block, SSnbt)]
    assert rates == [0.03] * 5 + [0.1] * 8
    dilations = [block.right[5].dilation[0] for block in Encoder() if isinstance(block, SSnbt)]
    assert max(dilations) == 17 and dilations[5:] == [1, 2, 5, 9, 2, 5, 9, 17]


@pytest.mark.parametrize("size", [(64, 64), (65, 71), (7, 9)])
def test_downsampler_rounds_odd_sizes_up(size):
    halved = Downsampler(3, 32)(torch.rand(2, 3, *size))
    assert halved.shape == (2, 32, -(-size[0] // 2), -(-size[1] // 2))


def test_block_keeps_shape_and_shuffles_the_halves():
    block = SSnbt(4, dilation=2, dropout=0.3).eval()
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.rand(1, 4, 8, 8)
    # With dead branches only the residual path and the shuffle are left.
    assert torch.equal(block(x), x[:, [0, 2, 1, 3]])


def test_the_shuffle_keeps_channels_last():
    x = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    shuffled = shuffle(x)
    assert torch.equal(shuffled, F.channel_shuffle(x, groups=2))
    assert shuffled.is_contiguous(memory_format=torch.channels_last)


def test_logits_are_upsampled_in_float32():
    """Also under autocast, in training and in evaluation; the auxiliary logits are small."""
    network, images = AuxiliaryHead(LEDNet(3)), torch.rand(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits, auxiliary = network(images)
        assert logits.dtype == network.eval()(images).dtype == torch.float32
    assert auxiliary.dtype == torch.bfloat16
    values = logits[0, 0].detach().flatten()
    assert not torch.equal(values, values.bfloat16().float()), "rounded to half precision"


def test_stage_1_head_works_at_an_eighth():
    model = EncoderClassifier(Encoder(), 5)
    assert model(torch.rand(2, 3, 72, 100)).shape == (2, 5, 9, 13)


def test_a_second_head_trains_beside_the_network_and_is_no_part_of_it():
    network = LEDNet(5, 4, dropout=0.1)
    own, images = network.state_dict().keys(), torch.rand(2, 3, 72, 100)
    model = AuxiliaryHead(network, 5)
    logits, auxiliary = model.train()(images)
    assert logits.shape == (2, 5, 72, 100) and auxiliary.shape == (2, 5, 9, 13)
    assert network.state_dict().keys() == own
    assert count_parameters(model) == count_parameters(network) + 5 * 128 + 5
    (auxiliary.square().mean() + logits.square().mean()).backward()
    assert model.head.weight.grad.abs().sum() > 0
    with torch.inference_mode():
        assert torch.equal(model.eval()(images), network(images))


def test_a_second_head_sees_the_features_of_the_network():
    network = LEDNet(5, 4)
    model, images = AuxiliaryHead(network, 5).train(), torch.rand(2, 3, 64, 64)
    torch.manual_seed(0)  # of dropout
    logits, auxiliary = model(images)
    torch.manual_seed(0)
    assert torch.equal(logits, network(images))
    torch.manual_seed(0)
    assert torch.equal(auxiliary, model.head(network.encoder(images)))


def test_attention_multiplies_and_context_is_added():
    """The APN by hand: attention x reduced + context, then the classifier."""
    decoder = APN(128, 8, 3).eval()
    features = torch.rand(1, 128, 16, 16)
    parts = {}
    for name in ("reduce", "lateral1", "lateral2", "lateral3", "context"):
        module = getattr(decoder, name)
        module.register_forward_hook(lambda _m, _i, out, name=name: parts.update({name: out}))
    with torch.inference_mode():
        logits = decoder(features)

        def up(x, size):
            return torch.nn.functional.interpolate(
                x, (size, size), mode="bilinear", align_corners=True
            )

        attention = up(parts["lateral3"], 4) + parts["lateral2"]
        attention = up(up(attention, 8) + parts["lateral1"], 16)
        expected = decoder.classifier(attention * parts["reduce"] + parts["context"])
    assert [parts[f"lateral{n}"].shape[-1] for n in (1, 2, 3)] == [8, 4, 2]
    assert torch.allclose(logits, expected)


def test_image_classifier_pools_and_averages_the_encoders_output():
    model = ImageClassifier(Encoder(), 5).eval()
    images = torch.rand(2, 3, 64, 48)
    with torch.inference_mode():
        largest = F.max_pool2d(model.encoder(images), 2)  # 2 x 128 x 4 x 3
        assert largest.shape == (2, 128, 4, 3)
        expected = largest.flatten(2).mean(2) @ model.head.weight.T + model.head.bias
        assert torch.allclose(model(images), expected, atol=1e-5)
