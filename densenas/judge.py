"""How accurate is a network that was not trained on its own, by the weights of a supernet?"""

from __future__ import annotations

from itertools import islice

import torch

from densenas.images.data import ImageData
from densenas.images.loading import Batches
from densenas.method.supernet import Choice, SuperNet
from densenas.ranks import rank_and_world

JUDGED = 10_000  # images of val at most, for the accuracy of a path


class Judge:
    """Tests networks on images of val as paths of a supernet, by its weights; every process on the same ones.

    A supernet normalises by the batch, which is here as large as in training.
    """

    def __init__(self, data: ImageData, batch_size: int, device: torch.device) -> None:
        _, world = rank_and_world()
        size = min(batch_size // world, len(data.val), JUDGED)
        self.batches = Batches(data, "val", size, device, rank=0, world=1)
        self.steps = min(len(data.val), JUDGED) // size

    @torch.no_grad()
    def top1(self, net: SuperNet, network: Choice) -> float:
        """The share of correct predictions, at most of the first `JUDGED` images."""
        hits = []
        for images, labels in islice(self.batches.epoch(0), self.steps):
            hits.append((net(images, network).argmax(dim=1) == labels).float().mean())
        return float(torch.stack(hits).mean())
