"""The search steps written the obvious way, straight after the method: what ours are measured against, and tested.

Sampled candidates are wrapped in new modules every step and multiplied by their weights, also by a weight of one; the
cost is a recursion over scalars; maps are NCHW; optimisers are PyTorch's at their defaults; metrics are `.item()`.
Weights and the draw of candidates are the supernet's, an MBConv is its modules one after the other, all gradients are
PyTorch's.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenas import Choice, CostTable, SuperNet
from densenas.method import ops
from densenas.recipes import SearchRecipe


class MixedOp(nn.Module):
    """Σ weight · op(x) over the sampled ops."""

    def __init__(self, sampled: list[nn.Module]) -> None:
        super().__init__()
        self.ops = nn.ModuleList(sampled)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(weight * op(x) for weight, op in zip(weights, self.ops, strict=True))


class MBConv(ops.MBConv):
    """An inverted residual module by module."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.project_conv(self.depthwise_conv(self.expand_conv(x)))
        return y + x if self.residual else y


class Plain(nn.Module):
    """A copy of a supernet, with a forward pass, a cost and two kinds of step of its own."""

    def __init__(
        self, net: SuperNet, table: CostTable, recipe: SearchRecipe, precision: str = "fp32"
    ) -> None:
        super().__init__()
        self.net, self.table, self.recipe, self.precision = (
            copy.deepcopy(net),
            table,
            recipe,
            precision,
        )
        self.net.to(memory_format=torch.contiguous_format)
        for module in self.net.modules():
            if isinstance(module, ops.MBConv):
                module.__class__ = MBConv
        self.space, self.last = net.space, net.space.num_blocks
        self.costs = table.nested()[1]  # for each block (edges × head ops, layers × stack ops)
        decay, arch_decay = recipe.weight_decay, recipe.arch_weight_decay
        weights, arch = self.net.weight_parameters(), self.net.arch_parameters()
        self.sgd = torch.optim.SGD(weights, recipe.lr, recipe.momentum, weight_decay=decay)
        self.adam = torch.optim.Adam(
            arch, recipe.arch_lr, recipe.arch_betas, weight_decay=arch_decay
        )

    def p(self, i: int, j: int) -> Tensor:
        """Probability of the edge from block i to node j."""
        return torch.softmax(self.net.beta[i] / self.net.temperature, dim=0)[
            self.space.outgoing(i).index(j)
        ]

    def wrap(
        self, candidates: nn.ModuleList, choice: list[list[list[int]]], part: str
    ) -> nn.ModuleList:
        """The sampled candidates of all layers, in new modules."""
        layers = (getattr(block, part) for block in candidates)
        return nn.ModuleList(
            nn.ModuleList(
                MixedOp([layer[index] for index in row])
                for layer, row in zip(block, rows, strict=True)
            )
            for block, rows in zip(layers, choice, strict=True)
        )

    def forward(self, images: Tensor, choice: Choice) -> Tensor:
        heads = self.wrap(self.net.blocks, choice.head, "heads")
        stacks = self.wrap(self.net.blocks, choice.stack, "stack")
        outputs = [self.net.stem(images)]
        for j in range(1, self.last):
            x = 0
            for edge, i in enumerate(self.space.incoming(j)):
                weights = torch.softmax(
                    self.net.alpha_head[j - 1][edge][choice.head[j - 1][edge]], dim=0
                )
                x = x + self.p(i, j) * heads[j - 1][edge](outputs[i], weights)
            for layer, mixed in enumerate(stacks[j - 1]):
                x = mixed(
                    x,
                    torch.softmax(
                        self.net.alpha_stack[j - 1][layer][choice.stack[j - 1][layer]], dim=0
                    ),
                )
            outputs.append(x)
        incoming = self.space.incoming(self.last)
        shares = torch.softmax(torch.stack([self.p(i, self.last) for i in incoming]), dim=0)
        x = sum(
            share * branch(outputs[i]).mean(dim=(2, 3))
            for share, branch, i in zip(shares, self.net.final, incoming, strict=True)
        )
        return self.net.classifier(x)

    def cost(self, choice: Choice) -> Tensor:
        """The chained cost, block by block: C_i = Σ_j p_ij (head_ij + stack_j + C_j)."""
        known = {self.last: 0.0}

        def layer(alpha: Tensor, costs: list[float], active: list[int]) -> Tensor:
            shares = torch.softmax(alpha[active], dim=0)
            return sum(share * costs[index] for share, index in zip(shares, active, strict=True))

        def entering(i: int, j: int) -> Tensor:
            edge = self.space.incoming(j).index(i)
            if j == self.last:
                return self.table.final[edge]
            head_costs, stack_costs = self.costs[j - 1]
            head = layer(
                self.net.alpha_head[j - 1][edge],
                head_costs[edge],
                choice.head[j - 1][edge],
            )
            rows = zip(
                self.net.alpha_stack[j - 1],
                stack_costs,
                choice.stack[j - 1],
                strict=False,
            )
            return head + sum(layer(*row) for row in rows)

        def onward(i: int) -> Tensor:
            if i not in known:
                known[i] = sum(
                    self.p(i, j) * (entering(i, j) + onward(j)) for j in self.space.outgoing(i)
                )
            return known[i]

        return self.table.stem + onward(0) + self.table.classifier

    def classify(self, images: Tensor, labels: Tensor, choice: Choice) -> tuple[Tensor, float]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self(images, choice)
            loss = F.cross_entropy(logits, labels)
        return loss, (logits.argmax(dim=1) == labels).float().mean().item()

    def weight_step(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        loss, top1 = self.classify(images, labels, self.net.sample(1))
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        return loss.item(), top1

    def arch_step(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        choice = self.net.sample(2)
        loss, top1 = self.classify(images, labels, choice)
        penalty = (
            self.recipe.sub_loss_factor
            * torch.log(self.cost(choice))
            / math.log(self.recipe.log_base)
        )
        self.adam.zero_grad()
        (loss + penalty).backward()
        sampled = [
            (alpha[row], active)
            for alphas, rows in (
                (self.net.alpha_head, choice.head),
                (self.net.alpha_stack, choice.stack),
            )
            for alpha, block in zip(alphas, rows, strict=True)
            for row, active in enumerate(block)
        ]
        with torch.no_grad():
            before = [alpha[active].exp().sum() for alpha, active in sampled]
            self.adam.step()
            for (alpha, active), mass in zip(sampled, before, strict=True):
                alpha[active] += (mass / alpha[active].exp().sum()).log()
        return loss.item(), top1
