"""Scores of networks that were not trained on their own: do they rank them as training does?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densenas.method.architecture import Architecture
from densenas.method.supernet import SuperNet


class PathOf(nn.Module):
    """An architecture as a path of a supernet, by the supernet's own weights: images (B, 3, H, W) → logits.

    Its batch norm knows no averages, so that logits depend on the batch: its images must be of mixed classes.
    """

    def __init__(self, net: SuperNet, arch: Architecture) -> None:
        super().__init__()
        space = net.space
        start, *nodes, end = space.path_of(arch)
        layers: list[nn.Module] = [net.stem]
        before = start
        for node, block in zip(nodes, arch.routing_blocks, strict=True):
            edge = space.incoming(node).index(before)
            op = space.head_ops.index(block.head)
            layers.append(net.get_submodule(f"blocks.{node - 1}.heads.{edge}.{op}"))
            # Which of its layers a shorter stack skipped does not show in an architecture: the last ones.
            for layer, name in enumerate(block.stack):
                op = space.stack_ops.index(name)
                layers.append(net.get_submodule(f"blocks.{node - 1}.stack.{layer}.{op}"))
            before = node
        layers.append(net.final[space.incoming(end).index(before)])
        self.features = nn.Sequential(*layers)
        self.classifier = net.classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean(dim=(2, 3)))


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
