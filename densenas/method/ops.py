"""Candidate operations: what a mixed layer chooses from, with the Mult-Adds of each.

Supernet and derived networks are built from the same modules. They differ in their batch norm only: in the
supernet it has neither affine parameters nor running statistics (weights are shared between paths, so
averages over them mean nothing), in a derived network it has both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from densenas import own
from densenas.method.kernels import norm_act_conv

MBCONV = re.compile(r"mbconv_k([357])_t([136])")  # kernel, expansion
SKIP = "skip_connect"
KNOWN = "mbconv_k{3,5,7}_t{1,3,6}, basic_block, bottleneck, skip_connect, one's own package.module:function"
TRIED = 32  # pixels of a side, where an op of one's own is tried before it is built

NetType = Literal["mbv2", "res"]
Norm = Callable[..., nn.Module]  # channels → their batch norm


def net_type(op: str) -> NetType | None:
    """The family an op belongs to; None for a skip and for an op of one's own. ValueError for an unknown op."""
    if op == SKIP or own.is_own(op):
        return None
    if op in ("basic_block", "bottleneck"):
        return "res"
    if MBCONV.fullmatch(op):
        return "mbv2"
    raise ValueError(f"unknown op {op!r}, known are {KNOWN}")


def family(names: Iterable[str]) -> NetType | None:
    """The one family of these ops, None where none belongs to one; raises ValueError where they are of several."""
    names = {*names}
    families = {net_type(op) for op in names}
    if {"mbv2", "res"} <= families:
        raise ValueError("MobileNetV2 and ResNet ops are mixed, one family is needed")
    if {"basic_block", "bottleneck"} <= names:
        raise ValueError("basic_block and bottleneck leave different widths and cannot be mixed")
    if "bottleneck" in names and any(own.is_own(op) for op in names):
        leaves = "bottleneck leaves four times its width, an op of one's own its width"
        raise ValueError(f"{leaves}: they cannot be mixed")
    if "res" in families:
        return "res"
    return "mbv2" if "mbv2" in families else None


def out_channels(op: str, width: int) -> int:
    """Channels that really leave an op of nominal `width`: four times as many for a Bottleneck."""
    return 4 * width if op == "bottleneck" else width


def mult_adds(op: str, in_channels: int, width: int, size: int, stride: int) -> int:
    """Multiply-adds of one op on one image, convolutions only (no BN, no biases, as published).

    Those of an op of one's own are half of the FLOPs that PyTorch counts, matrix products included.
    `size` is the side of the square input map in pixels, `in_channels` the real channels, `width` the nominal ones.
    """
    before = size**2
    after = math.ceil(size / stride) ** 2
    if op == SKIP:
        return 0
    if own.is_own(op):
        return _own_mult_adds(op, own.code(op), in_channels, width, size, stride)
    if op == "conv1_1":
        return in_channels * width * before
    if match := MBCONV.fullmatch(op):
        kernel, expansion = int(match[1]), int(match[2])
        hidden = in_channels * expansion
        expand = in_channels * hidden * before if expansion > 1 else 0
        return expand + hidden * kernel**2 * after + hidden * width * after
    out = out_channels(op, width)
    shortcut = in_channels * out * after if stride > 1 or in_channels != out else 0
    if op == "basic_block":
        return 9 * in_channels * width * after + 9 * width * width * after + shortcut
    return in_channels * width * before + 9 * width * width * after + width * out * after + shortcut


@cache
def _own_mult_adds(op: str, _: str, in_channels: int, width: int, size: int, stride: int) -> int:
    """Counted on shapes alone, anew for other code; ValueError where the op makes another shape than asked for."""
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.random.fork_rng(devices=[]), torch.no_grad():
        module = _build_own(op, in_channels, width, stride, batch_norm(affine=True)).eval()
        images = torch.empty(1, in_channels, size, size)
        try:
            with counter:
                maps = module(images)
        except Exception as error:
            raise ValueError(f"op '{op}' of {tuple(images.shape)}: {own.reason(error)}") from None
    after = math.ceil(size / stride)
    found = tuple(maps.shape) if isinstance(maps, Tensor) else f"a {type(maps).__name__}"
    if found != (1, width, after, after):
        asked = f"{(1, width, after, after)}, its width {width} at stride {stride}"
        raise ValueError(f"op '{op}' makes {found} of {tuple(images.shape)}, expected {asked}")
    return counter.get_total_flops() // 2


def _build_own(op: str, in_channels: int, width: int, stride: int, norm: Norm) -> nn.Module:
    call = f"({in_channels}, {width}, {stride}, norm)"
    return own.module("op", op, call, in_channels, width, stride, norm)


def batch_norm(affine: bool, eps: float = 1e-5, momentum: float = 0.1) -> Norm:
    """Batch norm as a network wants it: without `affine` it has no running statistics either.

    The few layers that have parameters even in the supernet take `partial(norm, affine=True)`.
    """
    tracked = {"affine": affine, "track_running_stats": affine}
    return partial(nn.BatchNorm2d, eps=eps, momentum=momentum, **tracked)


def conv_norm(
    in_channels: int,
    out: int,
    norm: Norm,
    act: type[nn.ReLU | nn.ReLU6] | None = None,
    kernel_size: int = 1,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """Convolution without bias, batch norm and, where given, an activation."""
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, out, kernel_size, stride, padding, groups=groups, bias=False)
    layers = nn.Sequential(conv, norm(out))
    if act is not None:
        layers.append(act(inplace=True))
    return layers


class MBConv(nn.Module):
    """Inverted residual: 1×1 expand, depthwise k×k, linear 1×1 project (MobileNetV2)."""

    def __init__(
        self, in_channels: int, out: int, stride: int, kernel: int, expansion: int, norm: Norm
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out
        self.expand_conv: nn.Module = nn.Identity()
        project_norm = norm
        if expansion > 1:
            self.expand_conv = conv_norm(in_channels, hidden, norm, nn.ReLU6)
        else:
            # Without an expansion its last batch norm has affine parameters even in the supernet.
            project_norm = partial(norm, affine=True)
        self.depthwise_conv = conv_norm(hidden, hidden, norm, nn.ReLU6, kernel, stride, hidden)
        self.project_conv = conv_norm(hidden, out, project_norm)

    def forward(self, x: Tensor) -> Tensor:
        # TorchScript can read no function with a backward of its own.
        if (
            torch.jit.is_scripting()
            or torch.jit.is_tracing()
            or not self.training
            or not torch.is_grad_enabled()
        ):
            y = self.project_conv(self.depthwise_conv(self.expand_conv(x)))
        else:
            y = self._trained(x)
        return y + x if self.residual else y

    def _trained(self, x: Tensor) -> Tensor:
        expand, depthwise, project = self.expand_conv, self.depthwise_conv, self.project_conv
        if any(one._forward_hooks or one._forward_pre_hooks for one in self.modules()):
            return project(depthwise(expand(x)))  # somebody prunes or watches it
        if isinstance(expand, nn.Sequential):
            hidden = norm_act_conv(expand[0](x), expand[1], expand[2], depthwise[0])
        else:
            hidden = depthwise[0](x)
        return project[1](norm_act_conv(hidden, depthwise[1], depthwise[2], project[0]))


def build_op(op: str, in_channels: int, width: int, stride: int, norm: Norm) -> nn.Module:
    """The module of an op that maps real `in_channels` to nominal `width` with `stride`.

    One's own is called with (in_channels, width, stride, norm), `norm` being the batch norm of a number of channels.
    """
    if op == SKIP:
        return nn.Identity()
    if own.is_own(op):
        # Refuses what would fail later.
        _own_mult_adds(op, own.code(op), in_channels, width, TRIED, stride)
        return _build_own(op, in_channels, width, stride, norm)
    if match := MBCONV.fullmatch(op):
        kernel, expansion = int(match[1]), int(match[2])
        return MBConv(in_channels, width, stride, kernel, expansion, norm)
    # Takes more than a second, which those without a ResNet need not wait.
    from torchvision.models.resnet import BasicBlock, Bottleneck

    out = out_channels(op, width)
    shortcut = None
    if stride > 1 or in_channels != out:
        shortcut = conv_norm(in_channels, out, norm, stride=stride)
    if op == "basic_block":
        return BasicBlock(in_channels, width, stride, shortcut, norm_layer=norm)
    # Its inner batch norms have affine parameters even in the supernet.
    return Bottleneck(in_channels, width, stride, shortcut, norm_layer=partial(norm, affine=True))


def init_weights(net: nn.Module) -> None:
    """normal(0, sqrt(2 / (k·k·out / groups))), for a ResNet, which has no groups, Kaiming's fan-out; linear 0.01."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels / module.groups
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
