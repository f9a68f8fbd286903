"""The autoencoder and its loss, against plain readings, and what the published code gets wrong."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from headwater.generate.cvae import CHANNELS, CVAE, cvae_loss


def small(length: int = 50, condition: int = 3, latent: int = 5) -> CVAE:
    torch.manual_seed(0)
    return CVAE(length, condition, latent, (4, 6, 4)).double()


def test_sizes_are_the_papers():
    """ICM-LoRA's released autoencoder at L = 1,929,928 and a condition of 768: 7,508,369 parameters."""
    with torch.device("meta"):
        model = CVAE(1_929_928, 768)
    assert model.padded == math.ceil(1_929_928 / 4096) * 4096
    assert sum(p.numel() for p in model.parameters()) == 7_508_369
    assert len(CHANNELS) == 12


def test_it_is_the_papers_stack_of_layers():
    """Convolutions of stride 2, normalised, LeakyReLU; back through transposed ones, normalised, ELU; and one more."""
    model, draw = small().eval(), torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.normal_(generator=draw)
            module.running_var.uniform_(0.5, 2, generator=draw)
    x, c = torch.randn(2, 50, dtype=torch.double), torch.randn(2, 3, dtype=torch.double)

    def normed(h, norm):
        mean, variance, weight, bias = (
            t[:, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        return (h - mean) / (variance + 1e-5).sqrt() * weight + bias

    h = torch.cat([x, torch.zeros(2, 6, dtype=torch.double)], 1)[:, None]  # 56 is the next multiple of 2^3
    for convolution, norm, _ in model.encoder:
        h = normed(F.conv1d(h, convolution.weight, convolution.bias, stride=2, padding=3), norm)
        h = torch.where(h > 0, h, 0.01 * h)
    given = torch.cat([model.bottleneck(h.flatten(1)), c], 1)
    z, log_variance = model.encode(x, c)
    torch.testing.assert_close(z, model.mean(given))
    torch.testing.assert_close(log_variance, model.log_variance(given))

    *blocks, last = model.decoder
    h = model.expand(torch.cat([z, c], 1)).view(2, 4, 7)
    for convolution, norm, _ in blocks:
        weight, bias = convolution.weight, convolution.bias
        h = normed(F.conv_transpose1d(h, weight, bias, stride=2, padding=3, output_padding=1), norm)
        h = torch.where(h > 0, h, h.exp() - 1)
    h = F.conv1d(h, last.weight, last.bias, padding=3)
    torch.testing.assert_close(model.decode(z, c), h[:, 0, :50])


def test_the_loss_compares_every_signal_with_its_own_reconstruction():
    model = small().eval()
    x, c = torch.randn(3, 50, dtype=torch.double), torch.randn(3, 3, dtype=torch.double)
    _, error, kl = cvae_loss(model, x, c, beta=0.1, generator=torch.Generator().manual_seed(1))
    mean, log_variance = model.encode(x, c)
    eps = torch.empty_like(mean).normal_(generator=torch.Generator().manual_seed(1))
    errors, kls = [], []
    for i in range(3):
        rebuilt = model.decode((mean[i] + (log_variance[i] / 2).exp() * eps[i])[None], c[i : i + 1])[0]
        errors.append(sum(float(rebuilt[j] - x[i, j]) ** 2 for j in range(50)) / 50)
        kls.append(sum(-0.5 * float(1 + v - m**2 - math.exp(v)) for m, v in zip(mean[i], log_variance[i], strict=True)))
    assert error.item() == pytest.approx(sum(errors) / 3, rel=1e-10)
    assert kl.item() == pytest.approx(sum(kls) / 3, rel=1e-10)


def test_kl_is_zero_at_the_prior_and_known_elsewhere():
    model = small()
    for layer in (model.mean, model.log_variance):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    x, c = torch.randn(2, 50, dtype=torch.double), torch.zeros(2, 3, dtype=torch.double)
    assert cvae_loss(model, x, c, beta=1.0)[2].item() == pytest.approx(0, abs=1e-12)
    torch.nn.init.constant_(model.mean.bias, 2.0)
    torch.nn.init.constant_(model.log_variance.bias, math.log(3.0))
    expected = 5 * 0.5 * (4 + 3 - 1 - math.log(3.0))
    assert cvae_loss(model, x, c, beta=1.0)[2].item() == pytest.approx(expected, rel=1e-12)


def test_signals_of_any_length_come_back_in_their_length():
    for length in (1, 7, 8, 9, 50):
        model = small(length)
        c = torch.zeros(2, 3, dtype=torch.double)
        x = torch.zeros(2, length, dtype=torch.double)
        assert model.decode(model.encode(x, c)[0], c).shape == (2, length)
        assert model.padded % 8 == 0
        assert length <= model.padded < length + 8
