"""Candidate operations: what a mixed layer chooses from, with the Mult-Adds of each.

Supernet and derived networks are built from the same modules. They differ in their batch norm only: in the
supernet it has neither affine parameters nor running statistics (weights are shared between paths, so
averages over them mean nothing), in a derived network it has both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from densenas.files import refuse

aten = torch.ops.aten
MBCONV = re.compile(r"mbconv_k([357])_t([136])")
SKIP = "skip_connect"
KNOWN = "mbconv_k{3,5,7}_t{1,3,6}, basic_block, bottleneck, skip_connect"

NetType = Literal["mbv2", "res"]
Norm = Callable[..., nn.Module]  # channels → their batch norm


def net_type(op: str) -> NetType | None:
    """The family an op belongs to; None for a skip. Raises ValueError for an unknown op."""
    if MBCONV.fullmatch(op):
        return "mbv2"
    families = {"basic_block": "res", "bottleneck": "res", SKIP: None}
    refuse(op not in families, f"unknown op {op!r}, known are {KNOWN}")
    return families[op]


def family(names: Iterable[str]) -> NetType:
    """The one family of these ops, skips aside; raises ValueError where they are of several."""
    convolutions = {op for op in names if op != SKIP}
    families = {net_type(op) for op in convolutions}
    refuse(len(families) > 1, "MobileNetV2 and ResNet ops are mixed, one family is needed")
    mixed = {"basic_block", "bottleneck"} <= convolutions
    refuse(mixed, "basic_block and bottleneck leave different widths, so they cannot be mixed")
    return families.pop()


def out_channels(op: str, width: int) -> int:
    """Channels that really leave an op of nominal `width`: four times as many for a Bottleneck."""
    return 4 * width if op == "bottleneck" else width


def mult_adds(op: str, in_channels: int, width: int, size: int, stride: int) -> int:
    """Multiply-adds of one op on one image, convolutions only (no BN, no biases, as published).

    `size` is the side of the square input map in pixels, `in_channels` the real channels, `width` the nominal ones.
    """
    before, after = size**2, math.ceil(size / stride) ** 2
    if op == SKIP:
        return 0
    if op == "conv1_1":
        return in_channels * width * before
    if match := MBCONV.fullmatch(op):
        kernel, expansion = map(int, match.groups())
        hidden = in_channels * expansion
        expand = in_channels * hidden * before if expansion > 1 else 0
        return expand + hidden * kernel**2 * after + hidden * width * after
    out = out_channels(op, width)
    downsample = in_channels * out * after if stride > 1 or in_channels != out else 0
    if op == "basic_block":
        return 9 * in_channels * width * after + 9 * width * width * after + downsample
    return (
        in_channels * width * before + 9 * width * width * after + width * out * after + downsample
    )


def cheapest(names: Sequence[str]) -> list[int]:
    """The index of the op with the fewest Mult-Adds, the same at any width and map; none of no ops."""
    return sorted(range(len(names)), key=lambda index: mult_adds(names[index], 64, 64, 14, 1))[:1]


def batch_norm(affine: bool, **settings: float) -> Norm:
    """Batch norm as a network wants it: without `affine` it has no running statistics either.

    The few layers that have parameters even in the supernet take `partial(norm, affine=True)`.
    """
    return partial(nn.BatchNorm2d, affine=affine, track_running_stats=affine, **settings)


class _NormActConv(torch.autograd.Function):
    """conv(relu6(norm(x))) in training, which keeps x alone for its backward pass.

    What the convolution reads is as large as x, and two passes over x make it again: kept, it would be half of all
    that a step keeps. Only here is the gradient of relu6 known to be nobody else's, so that it is masked in place.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor, norm, conv
    ) -> Tensor:
        statistics = norm.running_mean, norm.running_var
        y, mean, invstd = torch.native_batch_norm(
            x, scale, shift, *statistics, True, norm.momentum, norm.eps
        )
        ctx.save_for_backward(x, scale, shift, weight, mean, invstd)
        ctx.eps, ctx.conv = (
            norm.eps,
            (conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups),
        )
        return torch.convolution(F.hardtanh_(y, 0.0, 6.0), weight.to(y.dtype), None, *ctx.conv)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight, mean, invstd = ctx.saved_tensors
        trained, (stride, *_, groups) = ctx.needs_input_grad[3], ctx.conv
        y = torch.native_batch_norm(x, scale, shift, mean, invstd.pow(-2), False, 0.0, 0.0)[0]
        if trained:
            F.hardtanh_(y, 0.0, 6.0)
        # oneDNN's own weight gradient of such a convolution takes many times its forward pass.
        own = (
            trained
            and groups > 1
            and weight.shape[-1] > 3
            and x.device.type == "cpu"
            and x.dtype == torch.float32
        )
        wanted = [True, trained and not own, False]
        grad_y, grad_weight, _ = aten.convolution_backward.default(
            grad, y, weight.to(y.dtype), None, *ctx.conv, wanted
        )
        if own:
            grad_weight = _depthwise_weight_gradient(y, weight, grad, stride[0])
        aten.hardtanh_backward.grad_input(grad_y, y, 0.0, 6.0, grad_input=grad_y)
        del y
        statistics = None, None, mean, invstd, True, ctx.eps
        grads = aten.native_batch_norm_backward.default(
            grad_y, x, scale, *statistics, ctx.needs_input_grad[:3]
        )
        return *grads, grad_weight, None, None


def _depthwise_weight_gradient(x: Tensor, weight: Tensor, grad: Tensor, stride: int) -> Tensor:
    """The weight gradient of a depthwise convolution is one, too: each image's channel convolved with its gradient."""
    kernel, total = weight.shape[-1], torch.zeros_like(weight)
    # Large images one by one, as they lie in memory; of small ones all at once, laid out plane by plane.
    share = 1 if x[0].numel() > 100_000 else len(x)
    for images, grads in zip(x.split(share), grad.split(share), strict=True):
        planes = len(images) * len(weight)
        image, kernels = (
            images.reshape(1, planes, *x.shape[2:]),
            grads.reshape(planes, 1, *grad.shape[2:]),
        )
        each = F.conv2d(image, kernels, padding=kernel // 2, dilation=stride, groups=planes)
        total += each[..., :kernel, :kernel].reshape(-1, *weight.shape).sum(dim=0)
    return total


def norm_act_conv(x: Tensor, norm: nn.BatchNorm2d, conv: nn.Conv2d) -> Tensor:
    """conv(relu6(norm(x))) as a training step computes it."""
    if type(norm) is not nn.BatchNorm2d or not norm.training:  # somebody froze or replaced it
        return conv(F.relu6(norm(x)))
    if norm.track_running_stats:
        norm.num_batches_tracked.add_(1)
    return _NormActConv.apply(x, norm.weight, norm.bias, conv.weight, norm, conv)


def conv_norm(
    in_channels: int, out: int, norm: Norm, act: type[nn.Module] | None = None, **conv: int
) -> nn.Sequential:
    """Convolution without bias (1×1 unless told otherwise), batch norm and, where given, an activation."""
    kernel = conv.pop("kernel_size", 1)
    layers = [
        nn.Conv2d(in_channels, out, kernel, padding=kernel // 2, bias=False, **conv),
        norm(out),
    ]
    return nn.Sequential(*layers, *([act(inplace=True)] if act else []))


class MBConv(nn.Module):
    """Inverted residual: 1×1 expand, depthwise k×k, linear 1×1 project (MobileNetV2)."""

    def __init__(
        self, in_channels: int, out: int, stride: int, kernel: int, expansion: int, norm: Norm
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out
        self.expand_conv = (
            conv_norm(in_channels, hidden, norm, nn.ReLU6) if expansion > 1 else nn.Identity()
        )
        depthwise = {"kernel_size": kernel, "stride": stride, "groups": hidden}
        self.depthwise_conv = conv_norm(hidden, hidden, norm, nn.ReLU6, **depthwise)
        # Without an expansion its last batch norm has affine parameters even in the supernet.
        self.project_conv = conv_norm(
            hidden, out, partial(norm, affine=True) if expansion == 1 else norm
        )

    def forward(self, x: Tensor) -> Tensor:
        expand, depthwise, project = self.expand_conv, self.depthwise_conv, self.project_conv
        if self.training and torch.is_grad_enabled():
            expanded = not isinstance(expand, nn.Identity)
            hidden = (
                norm_act_conv(expand[0](x), expand[1], depthwise[0])
                if expanded
                else depthwise[0](x)
            )
            y = project[1](norm_act_conv(hidden, depthwise[1], project[0]))
        else:
            y = project(depthwise(expand(x)))
        return y + x if self.residual else y


def build_op(op: str, in_channels: int, width: int, stride: int, norm: Norm) -> nn.Module:
    """The module of an op that maps real `in_channels` to nominal `width` with `stride`."""
    if op == SKIP:
        return nn.Identity()
    if match := MBCONV.fullmatch(op):
        kernel, expansion = map(int, match.groups())
        return MBConv(in_channels, width, stride, kernel, expansion, norm)
    from torchvision.models.resnet import (  # takes more than a second, which others need not wait
        BasicBlock,
        Bottleneck,
    )

    out = out_channels(op, width)
    shortcut = (
        conv_norm(in_channels, out, norm, stride=stride)
        if stride > 1 or in_channels != out
        else None
    )
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
            nn.init.zeros_(module.bias)
