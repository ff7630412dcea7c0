"""Does a supernet rank networks as training does? Their accuracy as paths of it, without training of their own."""

from __future__ import annotations

from torch import Tensor, nn

from densenas.images.data import ImageData
from densenas.method.architecture import Architecture
from densenas.method.supernet import SuperNet
from densenas.runs.progress import quiet
from densenas.train import evaluate


def one_shot(
    net: SuperNet, networks: list[Architecture], data: ImageData, device: str = "auto"
) -> list[float]:
    """Accuracy on val, a share, of each network as a path of the supernet."""
    with quiet():
        return [
            evaluate(PathOf(net, arch), data, "val", device=device)["top1"] for arch in networks
        ]


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
