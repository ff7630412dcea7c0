"""Batch norm, ReLU6 and a convolution as one function, which keeps half of what its three modules would keep."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten
LARGE = 100_000  # numbers in an image's maps, from where convolving images one by one is faster


def norm_act_conv(x: Tensor, norm: nn.Module, act: nn.Module, conv: nn.Module) -> Tensor:
    """conv(act(norm(x))) as a training step computes it."""
    if [type(norm), type(act), type(conv)] != [nn.BatchNorm2d, nn.ReLU6, nn.Conv2d]:
        return conv(act(norm(x)))  # somebody replaced one
    if not norm.training or norm.momentum is None or conv.bias is not None:
        return conv(act(norm(x)))
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return _NormActConv.apply(x, norm.weight, norm.bias, conv.weight, norm, conv)


class _NormActConv(torch.autograd.Function):
    """conv(relu6(norm(x))) in training, which keeps x alone for its backward pass.

    What the convolution reads is as large as x, and two passes over x make it again: kept, it would be half of all
    that a step keeps. Only here is the gradient of relu6 known to be nobody else's, so that it is masked in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        weight: Tensor,
        norm: nn.BatchNorm2d,
        conv: nn.Conv2d,
    ) -> Tensor:
        statistics = norm.running_mean, norm.running_var
        y, mean, invstd = torch.native_batch_norm(
            x, scale, shift, *statistics, True, norm.momentum or 0.0, norm.eps
        )
        F.hardtanh_(y, 0.0, 6.0)
        ctx.save_for_backward(x, scale, shift, weight, mean, invstd)
        ctx.eps = norm.eps
        ctx.conv = conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups
        return torch.convolution(y, weight.to(y.dtype), None, *ctx.conv)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # by create_graph: somebody wants its gradient, too
            return _differentiable_backward(ctx, grad)
        x, scale, shift, weight, mean, invstd = ctx.saved_tensors
        stride, *_, groups = ctx.conv
        weight_wanted = ctx.needs_input_grad[3]
        y = torch.native_batch_norm(x, scale, shift, mean, invstd.pow(-2), False, 0.0, 0.0)[0]
        if weight_wanted:
            F.hardtanh_(y, 0.0, 6.0)
        # oneDNN's own weight gradient of such a convolution takes many times its forward pass.
        slow = groups > 1 and weight.shape[-1] > 3
        slow = slow and x.device.type == "cpu" and x.dtype == torch.float32
        wanted = [True, weight_wanted and not slow, False]
        grad_y, grad_weight, _ = aten.convolution_backward.default(
            grad, y, weight.to(y.dtype), None, *ctx.conv, wanted
        )
        if weight_wanted and slow:
            grad_weight = _depthwise_weight_gradient(y, weight, grad, stride[0])
        aten.hardtanh_backward.grad_input(grad_y, y, 0.0, 6.0, grad_input=grad_y)
        del y  # the memory is needed
        statistics = None, None, mean, invstd, True, ctx.eps
        asked = ctx.needs_input_grad[:3]
        found = aten.native_batch_norm_backward.default(grad_y, x, scale, *statistics, asked)
        # A GPU's kernel also returns those that nobody asked for, which autograd refuses.
        grads = [grad if wanted else None for grad, wanted in zip(found, asked, strict=True)]
        return *grads, grad_weight, None, None


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradients by the modules' own operations, which autograd can go through once more."""
    x, scale, shift, weight, *_ = ctx.saved_tensors
    y = F.relu6(F.batch_norm(x, None, None, scale, shift, True, 0.0, ctx.eps))
    y = torch.convolution(y, weight.to(y.dtype), None, *ctx.conv)
    sources = x, scale, shift, weight
    wanted = [source for source in sources if source is not None and source.requires_grad]
    found = dict(zip(wanted, torch.autograd.grad(y, wanted, grad, create_graph=True), strict=True))
    return *(found.get(source) for source in sources), None, None


def _depthwise_weight_gradient(x: Tensor, weight: Tensor, grad: Tensor, stride: int) -> Tensor:
    """The weight gradient of a depthwise convolution is one, too: each image's channel convolved with its gradient."""
    kernel = weight.shape[-1]
    total = torch.zeros_like(weight)
    # Large images one by one, as they lie in memory; of small ones all at once, laid out plane by plane.
    share = 1 if x[0].numel() > LARGE else len(x)
    for images, grads in zip(x.split(share), grad.split(share), strict=True):
        planes = len(images) * len(weight)
        image = images.reshape(1, planes, *x.shape[2:])
        kernels = grads.reshape(planes, 1, *grad.shape[2:])
        each = F.conv2d(image, kernels, padding=kernel // 2, dilation=stride, groups=planes)
        total += each[..., :kernel, :kernel].reshape(-1, *weight.shape).sum(dim=0)
    return total
