"""Small models whose forward hides something from autograd's graph: regions, kernels, None."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Reentrant(nn.Module):
    """Reentrant checkpoints in a row, one in another, one of two inputs, one over a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.beside = nn.Linear(6, 6), nn.Linear(6, 6)
        self.outer, self.inner = nn.Linear(6, 6), nn.Linear(6, 6)
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.leave = nn.Linear(6, 2)

    def within(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x))

    def around(self, x: torch.Tensor) -> torch.Tensor:
        return x + checkpoint(self.within, torch.tanh(self.outer(x)), use_reentrant=True)

    def both(
        self, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left(x) * scale, F.linear(self.right(y), self.beside.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, y = checkpoint(self.around, self.enter(x), use_reentrant=True), self.beside(x)
        x, y = checkpoint(self.both, x, y, self.scale, use_reentrant=True)
        return self.leave(x + y)


class Recompute(torch.autograd.Function):
    """A library's own checkpoint, which does not tell autograd of the parameters in it."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor | None]:
        (x,) = (saved.detach().requires_grad_(saved.requires_grad) for saved in ctx.saved_tensors)
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, grad)
        return None, x.grad


class OwnCheckpoint(nn.Module):
    """Three blocks, each recomputed by a function that is not torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = Recompute.apply(block, x)
        return self.leave(x)


class NestedCheckpoints(nn.Module):
    """A checkpoint in a checkpoint, and a module that is used inside and outside of one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 6), nn.Linear(6, 2)
        self.outer, self.inner = nn.Linear(6, 6), nn.Linear(6, 6)

    def within(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x))

    def around(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.within, torch.tanh(self.outer(x)), use_reentrant=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(self.outer(checkpoint(self.around, self.enter(x), use_reentrant=False)))


class Sided(torch.autograd.Function):
    """Two results, one of them unused, and no gradient for the last of three inputs."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, weight)
        return x @ weight.T + shift, x.sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, rows: torch.Tensor) -> tuple[Any, Any, None]:
        x, weight = ctx.saved_tensors
        to_x = grad @ weight + rows[:, None] if ctx.needs_input_grad[0] else None
        return to_x, grad.T @ x if ctx.needs_input_grad[1] else None, None


class OneSided(nn.Module):
    """A hand-written product that computes only what is wanted, and keeps a gradient to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.shift, self.leave = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(Sided.apply(self.enter(x), self.weight, self.shift(x))[0])


class DetachedWeights(nn.Module):
    """Layers whose weights are used elsewhere, but not to be trained by that."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 6), nn.Linear(6, 2)
        self.detached, self.data, self.held = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(self.enter(x), self.detached.weight.detach() + 1)
        x = F.linear(torch.tanh(x), self.data.weight.data)
        with torch.no_grad():
            scale = self.held.weight.abs().mean()
        return self.leave(x * scale + self.held(x).detach())


class BiasedAttention(nn.Module):
    """A learnt position bias as an attention mask: torch's kernel hangs on whether it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.bias, self.leave = nn.Embedding(9, 2), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.query, self.key))
        steps = torch.arange(x.shape[1])
        bias = self.bias(steps[:, None] - steps[None] + 4).permute(2, 0, 1)[None]
        values = self.value(x).unflatten(-1, (2, 4)).transpose(1, 2)
        x = F.scaled_dot_product_attention(*heads, values, attn_mask=bias)
        return self.leave(x.transpose(1, 2).flatten(2))


class Two(nn.Module):
    """Two results of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left(x), self.right(y)


class BackwardHooks(nn.Module):
    """Full backward hooks, whose nodes hold together what does not hang together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.two = nn.Linear(6, 6), nn.Linear(6, 6), Two()
        self.leave, self.beside = nn.Linear(6, 2), nn.Linear(6, 2)
        self.two.register_full_backward_hook(lambda *_: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, y = self.two(self.first(x), self.second(x))
        return self.leave(x) + self.beside(y)


class Solvers(nn.Module):
    """Decompositions, whose backward multiplies though their forward does not seem to."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 6), nn.Linear(6, 2)
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.warp = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight + 9 * torch.eye(6)
        values = torch.linalg.svd(self.weight)[1]
        x = torch.linalg.solve(weight, self.enter(x).T).T @ torch.linalg.qr(weight)[0] * values
        grid = F.affine_grid(self.warp(x).view(-1, 2, 3), [x.shape[0], 1, 2, 3])
        return self.leave(x @ torch.linalg.matrix_exp(self.weight) + grid.flatten(1)[:, :6])


class Penalized(nn.Module):
    """A convolution's gradient by its input, as part of the loss: backward through backward."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 6), nn.Linear(24, 1)
        self.critic = nn.Conv1d(1, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        seen = x.detach().requires_grad_()
        judged = self.leave(torch.tanh(self.critic(seen[:, None])).flatten(1))
        (slope,) = torch.autograd.grad(judged.sum(), seen, create_graph=True)
        return slope.square().sum() + judged.mean() + x.mean()


class Slopes(nn.Module):
    """torch.func.grad in a forward, which takes no hooks on what is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.energy, self.leave = nn.Linear(6, 6), nn.Linear(6, 1), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        return self.leave(x + torch.func.grad(lambda x: self.energy(torch.tanh(x)).sum())(x))


class Queue(nn.Module):
    """A momentum encoder and a queue whose place is a number that the forward asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(6, 4), nn.Linear(6, 4)
        self.register_buffer("queue", torch.randn(4, 8))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.query(x)
        with torch.no_grad():
            for own, other in zip(self.query.parameters(), self.key.parameters(), strict=True):
                other.mul_(0.9).add_(own, alpha=0.1)
            key = self.key(x)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone()], 1)
        place = int(self.place)
        self.queue[:, place : place + 4] = key.T
        self.place[0] = (place + 4) % 8
        return F.cross_entropy(logits, torch.zeros(4, dtype=torch.long))


@dataclasses.dataclass
class Answer:
    """What a forward gives back."""

    name: str
    values: torch.Tensor


class Answering(nn.Module):
    """A dataclass as its result, and a parameter that is made anew by each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> Answer:
        self.scale = nn.Parameter(torch.ones(6))
        return Answer("values", self.leave(self.enter(x) * self.scale))


HIDDEN = {
    "reentrant checkpoints": lambda: (Reentrant(), torch.randn(4, 6)),
    "a library's checkpoint": lambda: (OwnCheckpoint(), torch.randn(4, 6)),
    "nested checkpoints": lambda: (NestedCheckpoints(), torch.randn(4, 6)),
    "one-sided function": lambda: (OneSided(), torch.randn(4, 6)),
    "detached weights": lambda: (DetachedWeights(), torch.randn(4, 6)),
    "biased attention": lambda: (BiasedAttention(), torch.randn(2, 5, 8)),
    "backward hooks": lambda: (BackwardHooks(), torch.randn(4, 6)),
    "solvers": lambda: (Solvers(), torch.randn(4, 6)),
    "gradient penalty": lambda: (Penalized(), torch.randn(4, 6)),
    "slopes": lambda: (Slopes(), torch.randn(4, 6)),
    "momentum queue": lambda: (Queue(), torch.randn(4, 6)),
    "dataclass": lambda: (Answering(), torch.randn(4, 6)),
}
