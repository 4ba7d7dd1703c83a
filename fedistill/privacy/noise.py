"""Randomness that protects people: fresh from the operating system, and never recorded."""

from __future__ import annotations

import secrets

import torch
from torch import Tensor

from fedistill.privacy.accounting import Mechanism

# Of a Mersenne Twister in Torch's state of a CPU generator: the first byte, and the number of words of 32 bits in 8 bytes each.
_FIRST, _WORDS = 24, 624


def secret_generator(device: torch.device | None = None) -> torch.Generator:
    """A generator that nobody can start again. Known numbers would let anyone subtract the noise.

    On the CPU its whole state comes from the operating system: `manual_seed` keeps 32 bits of a seed, and so few can be tried
    one by one. Elsewhere the seed has 64 bits. Torch's generators are no cryptographic ones, and a release says so.
    """
    generator = torch.Generator(device or torch.device("cpu"))
    if generator.device.type != "cpu":
        return generator.manual_seed(secrets.randbits(64))
    state = generator.get_state()
    words = torch.tensor([secrets.randbits(32) for _ in range(_WORDS)], dtype=torch.int64)
    state[_FIRST : _FIRST + 8 * _WORDS] = words.view(torch.uint8)
    return generator.set_state(state)


def noisy(sums: Tensor, mechanism: Mechanism) -> Tensor:
    """`sums` plus Gaussian noise (float32) for contributions of at most `mechanism.clip_norm` in L2 norm, over all of `sums`.

    In float64, as half the sum of four draws (Holohan and Braghin, ESORICS 2021): what is rounded afterwards shows no gaps
    between the numbers that a float can be, and no tail that ends too early.
    """
    deviation = mechanism.noise_multiplier * mechanism.clip_norm
    four = torch.randn((4, *sums.shape), generator=secret_generator(), dtype=torch.float64)
    return (sums.double() + deviation * four.sum(0) / 2).float()
