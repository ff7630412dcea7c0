"""The published transforms, from an image of any size to the square that a network sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

ELONGATION = 16  # times as long as wide an image is used as a whole, of longer ones the middle


def middle(image: Tensor) -> Tensor:
    """The image (3, H, W); of one more than `ELONGATION` times as long as wide its middle.

    Enlarged to 224 pixels, a line of 20000×4 would take a gigabyte, of which a crop needs little.
    """
    height, width = image.shape[1:]
    longest = ELONGATION * min(height, width)
    top = max(0, height - longest) // 2
    left = max(0, width - longest) // 2
    return image[:, top : top + longest, left : left + longest]


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's own for one uint8 (3, H, W): the same crop, resized 1.5 times as fast for being channels_last."""

    def forward(self, image: Tensor) -> Tensor:
        crop = self.make_params([image])
        rows = slice(crop["top"], crop["top"] + crop["height"])
        columns = slice(crop["left"], crop["left"] + crop["width"])
        pixels = image[None, :, rows, columns].contiguous(memory_format=torch.channels_last)
        return F.interpolate(pixels, self.size, mode="bilinear", antialias=True)[0]


def resized(size: int) -> v2.Transform:
    """From uint8 (3, H, W) to (3, size, size): resized as a whole, the centre cropped."""
    return v2.Compose([middle, v2.Resize(size, antialias=True), v2.CenterCrop(size)])


def transform(augment: str | None, size: int) -> v2.Transform:
    """The published transforms from uint8 (3, H, W) to (3, size, size), without the mirror.

    None is for validation. Their numbers are for 224 pixels and scale with `size`: 256 and 480 are
    8/7 and 15/7 of it.
    """
    shorter = size * 8 // 7
    longer = size * 15 // 7
    if augment == "random_sized":
        return RandomResizedCrop(size, scale=(0.08, 1.0))
    if augment == "rand_scale":
        resize = v2.RandomShortestSize(range(shorter, longer + 1))
        return v2.Compose([middle, resize, v2.RandomCrop(size)])
    resize = v2.Resize(shorter, antialias=True)
    crop = v2.RandomCrop(size) if augment == "weak" else v2.CenterCrop(size)
    return v2.Compose([middle, resize, crop])
