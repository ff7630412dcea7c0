"""Scores of networks that were not trained on their own: do they rank them as training does?"""

from __future__ import annotations

import torch
from torch import nn

from densenas.method.architecture import Architecture


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
