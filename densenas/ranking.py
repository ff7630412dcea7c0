"""Networks as paths of a supernet, without training of their own: does it rank them as training does?"""

from __future__ import annotations

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
