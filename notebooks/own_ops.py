"""Ops of one's own: copy this file, change it, and name its functions in a space's `head_ops` or `stack_ops`.

A function is called with the channels that come in, the width that shall leave, the stride (1 or 2), and `norm`, which
makes the batch norm of so many channels as the supernet or the derived network wants it.
"""

from torch import nn
from torchvision.ops import SqueezeExcitation


class SEMBConv(nn.Module):
    """An MBConv of expansion 3 that weighs its hidden channels by what the whole map holds (Hu et al., 2018)."""

    def __init__(self, in_channels, width, stride, norm, kernel):
        super().__init__()
        hidden = 3 * in_channels
        padding = kernel // 2
        self.residual = stride == 1 and in_channels == width
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            norm(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, kernel, stride, padding, groups=hidden, bias=False),
            norm(hidden),
            nn.ReLU6(inplace=True),
            SqueezeExcitation(hidden, max(1, hidden // 4)),
            nn.Conv2d(hidden, width, 1, bias=False),
            norm(width),
        )

    def forward(self, x):
        y = self.layers(x)
        return x + y if self.residual else y


def se_k3(in_channels, width, stride, norm):
    return SEMBConv(in_channels, width, stride, norm, kernel=3)


def se_k5(in_channels, width, stride, norm):
    return SEMBConv(in_channels, width, stride, norm, kernel=5)
