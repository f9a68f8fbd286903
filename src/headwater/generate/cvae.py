"""The conditional variational autoencoder of ICM-LoRA: adapter weights as one long signal, a task vector as condition.

"In-Context Meta LoRA Generation", arXiv:2501.17635.

    h = Linear(E(x));  mu = Linear([h, c]);  log var = Linear([h, c]);  z = mu + exp(log var / 2) eps
    x^ = D([z, c]);  loss = mean (x - x^)^2 + beta * KL(N(mu, var) || N(0, I))

E halves the signal's length at each convolution, D doubles it at each transposed one.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

CHANNELS = (8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8)
"""The authors' widths; each convolution halves the signal, so its length is a multiple of 2^12."""


def can_train(length: int, channels: tuple[int, ...], batch: int) -> bool:
    """Whether batch normalisation sees more than one value per channel where a batch of signals is shortest."""
    return batch > 1 or length > 2 ** len(channels)


class CVAE(nn.Module):
    """Encoder and decoder for signals of one length.

    Args:
        length: of the signals, before they are padded.
        condition: width of the condition vectors.
        latent: width of z.
        channels: of the encoder's convolutions, in order; the decoder has them in reverse.
    """

    def __init__(self, length: int, condition: int, latent: int = 256, channels: tuple[int, ...] = CHANNELS):
        super().__init__()
        shrink = 2 ** len(channels)
        self.length, self.condition, self.latent, self.channels = length, condition, latent, channels
        self.padded = -(-length // shrink) * shrink
        self.short = self.padded // shrink  # length behind the encoder's convolutions
        sizes = (1, *channels)
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(nn.Conv1d(before, after, 7, 2, 3), nn.BatchNorm1d(after), nn.LeakyReLU(0.01))
                for before, after in zip(sizes, channels, strict=False)
            )
        )
        self.bottleneck = nn.Linear(channels[-1] * self.short, latent)
        self.mean = nn.Linear(latent + condition, latent)
        self.log_variance = nn.Linear(latent + condition, latent)
        self.expand = nn.Linear(latent + condition, channels[-1] * self.short)
        back = (*channels[::-1], channels[0])
        self.decoder = nn.Sequential(
            *(
                nn.Sequential(nn.ConvTranspose1d(before, after, 7, 2, 3, 1), nn.BatchNorm1d(after), nn.ELU())
                for before, after in itertools.pairwise(back)
            ),
            nn.Conv1d(channels[0], 1, 7, padding=3),
        )

    def encode(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of z, `(batch, latent)` each, for signals `(batch, length)` and conditions."""
        signal = nn.functional.pad(x, (0, self.padded - self.length)).unsqueeze(1)
        h = torch.cat([self.bottleneck(self.encoder(signal).flatten(1)), c], dim=1)
        return self.mean(h), self.log_variance(h)

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        """Signals `(batch, length)` for z `(batch, latent)` and conditions `(batch, condition)`."""
        short = self.expand(torch.cat([z, c], dim=1)).unflatten(1, (-1, self.short))
        return self.decoder(short).squeeze(1)[:, : self.length]


def cvae_loss(
    model: CVAE, x: Tensor, c: Tensor, *, beta: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its reconstruction error and its KL term, each averaged over the batch.

    Every signal is compared with its own reconstruction. (The released code compares `(B, 1, L)` with `(B, L)`, which
    broadcasts to all pairs of the batch and trains the condition away.)

    Args:
        x: `(batch, length)`, normalised weights. c: `(batch, condition)`.
        beta: weight of the KL term. It must be strong: otherwise z carries the task, and c is ignored.
        generator: draws eps.
    """
    mean, log_variance = model.encode(x, c)
    eps = torch.empty_like(mean).normal_(generator=generator)
    rebuilt = model.decode(mean + torch.exp(log_variance / 2) * eps, c)
    error = (rebuilt - x).square().mean(1).mean()
    kl = (-0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)).mean()
    return error + beta * kl, error, kl
