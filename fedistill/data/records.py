"""Who is protected: each image by itself, or each patient with all images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Records:
    """The record `(n,)` of each image, numbered from 0 without a gap."""

    of_image: Tensor

    @staticmethod
    def of_images(n: int) -> Records:
        """Every image is a record of its own."""
        return Records(torch.arange(n))

    @staticmethod
    def of_patients(patient: Tensor) -> Records:
        """Images `(n,)` with the same number are one record."""
        return Records(patient.unique(return_inverse=True)[1])

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def sizes(self) -> Tensor:
        """Images of each record `(R,)`."""
        return torch.bincount(self.of_image)

    @property
    def share(self) -> Tensor:
        """The weight `(n,)` float64 of each image: those of a record add up to 1."""
        return 1 / self.sizes.double()[self.of_image]

    def one_each(self, records: Tensor, u: Tensor) -> Tensor:
        """The position of one image of each of `records` `(k,)`: uniform where `u` `(k,)` is uniform in 0..1, 1 excluded."""
        sizes = self.sizes[records]
        return self._order[self._first[records] + (u * sizes).long().clamp(max=sizes - 1)]

    @cached_property
    def _order(self) -> Tensor:
        return self.of_image.argsort(stable=True)

    @cached_property
    def _first(self) -> Tensor:
        return self.sizes.cumsum(0) - self.sizes
