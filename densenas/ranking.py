"""Scores of networks that were not trained on their own: do they rank them as training does?"""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn

from densenas.images.data import ImageData
from densenas.images.loading import Batches
from densenas.method.architecture import Architecture
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


def synaptic_flow(arch: Architecture, input_size: int, num_classes: int) -> float:
    """The logarithm of the synaptic flow of a network that has seen no image (Tanaka et al., 2020).

    All weights of a new network are made positive and an image of ones is sent through; the score is the sum over all
    weights of weight · gradient of the summed logits. Batch norm of a new network in evaluation mode passes everything
    on; ReLU6 would cut the flow off, so ReLU takes its place.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = arch.build(num_classes).double().eval()
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
    with torch.no_grad():
        for weight in net.parameters():
            weight.abs_()
    image = torch.ones(1, 3, input_size, input_size, dtype=torch.float64)
    net(image).sum().backward()
    flow = torch.zeros((), dtype=torch.float64)
    for weight in net.parameters():
        if weight.grad is not None:
            flow += (weight.detach() * weight.grad).sum()
    return float(flow.log())
