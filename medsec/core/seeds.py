"""Random streams: a seed of its own for every purpose."""

import hashlib

import torch
from torch import Tensor

__all__ = ["derive_seed", "torch_generator"]


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed for one purpose, such as ``derive_seed(seed, "train", client, round)``.

    Every (seed, keys) has its own stream, so a resumed run draws what an uninterrupted one would have drawn.
    """
    plain = [key if isinstance(key, str) else int(key) for key in (seed, *keys)]  # numpy integers have another repr
    digest = hashlib.sha256(repr(tuple(plain)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def torch_generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU `torch.Generator` seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


def stream(seed: int, purpose: str, round: int, x: Tensor) -> torch.Generator:
    """The random numbers of one purpose for one batch in one round; drawn on the CPU, so that every device gets the same."""
    return torch_generator(seed, purpose, round, fingerprint(x))


def fingerprint(x: Tensor) -> str:
    """Sixteen hexadecimal digits of what a tensor holds."""
    return hashlib.sha256(x.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
