"""The networks. All take and give images in [0, 1]; normalisation lives inside the model."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Generator", "SmallResNet"]


def one_hot_signs(labels: Tensor, n_classes: int) -> Tensor:
    """(N,) class indices -> (N, n_classes) of −1 and +1."""
    return 2.0 * F.one_hot(labels, n_classes).float() - 1.0


def doublings(size: int) -> int:
    """How often a GAN for ``size`` px doubles its resolution: from a map of 7 px or a little more, at least twice.

    Raises:
        ValueError: ``size`` is no multiple of 4 (the least number of doublings is two).
    """
    if size % 4:
        raise ValueError(f"image size {size} must be a multiple of 4")
    n = 2
    while size % 2 ** (n + 1) == 0 and size // 2 ** (n + 1) >= 7:
        n += 1
    return n


class Generator(nn.Module):
    """Label-conditional DCGAN generator (after Radford et al. 2016; conditioning after Mirza & Osindero 2014).

    ``forward(z, y)``: z (N, z_dim) standard normal, y (N,) int64 -> images (N, C, size, size) in [0, 1].
    """

    def __init__(self, size: int, channels: int, n_classes: int, z_dim: int = 32, width: int = 16):
        super().__init__()
        n = doublings(size)
        self.z_dim, self.n_classes = z_dim, n_classes
        maps = [width * 2**k for k in reversed(range(n))]
        base = size // 2**n
        self.start = nn.Sequential(
            nn.Linear(z_dim + n_classes, maps[0] * base * base),
            nn.Unflatten(1, (maps[0], base, base)),
            nn.BatchNorm2d(maps[0]),
            nn.ReLU(),
        )
        blocks = []
        for before, after in itertools.pairwise(maps):
            blocks += [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.up = nn.Sequential(*blocks, nn.ConvTranspose2d(maps[-1], channels, 4, 2, 1))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        hidden = self.start(torch.cat([z, one_hot_signs(y, self.n_classes)], 1))
        return 0.5 + 0.5 * torch.tanh(self.up(hidden))


class Discriminator(nn.Module):
    """Label-conditional DCGAN discriminator; the label enters as constant planes beside the image.

    ``forward(x, y)``: x (N, C, size, size) in [0, 1], y (N,) int64 -> logits (N,), positive for "real".
    """

    norm: type[nn.Module] = nn.BatchNorm2d

    def __init__(self, size: int, channels: int, n_classes: int, width: int = 16):
        super().__init__()
        n = doublings(size)
        self.n_classes = n_classes
        layers: list[nn.Module] = [nn.Conv2d(channels + n_classes, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for k in range(1, n):
            before, after = width * 2 ** (k - 1), width * 2**k
            layers += [nn.Conv2d(before, after, 4, 2, 1), self.norm(after), nn.LeakyReLU(0.2)]
        base = size // 2**n
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 2 ** (n - 1) * base * base, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        planes = one_hot_signs(y, self.n_classes)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.net(torch.cat([2.0 * x - 1.0, planes], 1)).squeeze(1)


class InstanceNorm(nn.InstanceNorm2d):
    """Each image's maps by their own statistics, then a scale and a shift that are learnt."""

    def __init__(self, maps: int):
        super().__init__(maps, affine=True)


class Critic(Discriminator):
    """`Discriminator` for a gradient penalty, which asks of D that it judges each image by itself."""

    norm = InstanceNorm


class UpGenerator(Generator):
    """The same in and out; upsampling and 3 × 3 convolutions in the place of transposed ones, which leave a checkerboard
    (Odena et al. 2016).
    """

    def __init__(self, size: int, channels: int, n_classes: int, z_dim: int = 32, width: int = 16):
        super().__init__(size, channels, n_classes, z_dim, width)
        maps = [width * 2**k for k in reversed(range(doublings(size)))]
        blocks: list[nn.Module] = []
        for before, after in itertools.pairwise(maps):
            blocks += [nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.up = nn.Sequential(*blocks, nn.Upsample(scale_factor=2), nn.Conv2d(maps[-1], channels, 3, 1, 1))
        self.to(memory_format=torch.channels_last)  # half the time on a CPU


class ProjectionDiscriminator(nn.Module):
    """Spectral norm on every layer (Miyato et al. 2018), no BatchNorm; the label enters by projection (Miyato & Koyama 2018).

    ``forward(x, y)``: as of `Discriminator`.
    """

    def __init__(self, size: int, channels: int, n_classes: int, width: int = 16):
        super().__init__()
        normed, n = nn.utils.parametrizations.spectral_norm, doublings(size)
        self.n_classes = n_classes
        layers: list[nn.Module] = [normed(nn.Conv2d(channels, width, 4, 2, 1)), nn.LeakyReLU(0.2)]
        for k in range(1, n):
            layers += [normed(nn.Conv2d(width * 2 ** (k - 1), width * 2**k, 4, 2, 1)), nn.LeakyReLU(0.2)]
        features = width * 2 ** (n - 1) * (size // 2**n) ** 2
        self.net = nn.Sequential(*layers, nn.Flatten())
        self.linear = normed(nn.Linear(features, 1))
        self.embed = normed(nn.Linear(n_classes, features, bias=False))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.net(2.0 * x - 1.0)
        projected = (hidden * self.embed(F.one_hot(y, self.n_classes).float())).sum(1)
        return self.linear(hidden).squeeze(1) + projected


class Residual(nn.Module):
    """Basic residual block (He et al. 2016) with a stride-2 entry."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.skip = nn.Sequential()
        if stride != 1 or before != after:
            self.skip = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.skip(x))


class SmallResNet(nn.Module):
    """ResNet-8 (stem of stride 2, three residual blocks, global mean) for 28 to 224 px; about 77,000 parameters.

    ``forward(x)``: x (N, C, H, W) in [0, 1] -> logits (N, n_classes). ``features(x)`` -> (N, 64).
    """

    n_features = 64

    def __init__(self, channels: int, n_classes: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2))
        self.head = nn.Linear(64, n_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem((x - 0.5) / 0.25)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
