"""Small models of the kinds that trip a trace: shared, in-place, checkpointed, recurrent."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint


class SharedModules(nn.Module):
    """One module called twice, one under two names, one whose weight another ties."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.other = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.alias = self.again
        self.other.weight = self.first.weight
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(torch.tanh(self.first(x)))
        return self.norm(self.alias(torch.tanh(x)) + self.other(x))


class InPlace(nn.Module):
    """In-place operations on results, on views of them, and by index."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu_()
        x = x * self.scale + 1
        x[:, :3] += self.second(x.clone())
        x[0] = 0.5
        x.index_put_((torch.tensor([1]),), self.scale * 2)
        half = x.view(2, -1)
        half.mul_(2)
        return self.third(x)


class Scale(torch.autograd.Function):
    """A product by a learnt number, whose backward is written by hand."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, by)
        return (x @ torch.eye(x.shape[-1])) * by

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, by = ctx.saved_tensors
        return grad * by, (grad * x).sum()


class CustomFunction(nn.Module):
    """A custom autograd function between two layers, with a parameter of the parent's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)
        self.by = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(Scale.apply(self.first(x), self.by))


class Checkpointed(nn.Module):
    """Non-reentrant checkpointing around a block with dropout and a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 8))
            for _ in range(2)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class Grouped(nn.Module):
    """Grouped, depthwise, dilated and transposed convolutions in one to three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.depth = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.line = nn.Conv1d(6, 3, 3, padding=1, groups=3)
        self.back = nn.ConvTranspose1d(3, 4, 3, padding=1)
        self.space = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(F.relu(self.norm(self.depth(self.down(x)))))
        x = self.back(self.line(x.flatten(2)))
        return self.space(x.view(x.shape[0], 1, 4, 16, 16)).mean((2, 3, 4))


class UNet(nn.Module):
    """Two levels with skip connections, pooling, interpolation and group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
        self.deep = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True))
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.leave = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        deep = F.silu(self.deep(F.max_pool2d(x, 2)))
        return self.leave(torch.cat([x, self.up(deep)], 1))


class Recurrent(nn.Module):
    """An embedding, a two-way LSTM of two layers, and a tied head."""

    def __init__(self, kind: str = "LSTM") -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.rnn = getattr(nn, kind)(6, 5, 2, batch_first=True, bidirectional=True)
        self.project = nn.Linear(10, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.project(self.rnn(self.embedding(tokens))[0]))


class Packed(nn.Module):
    """A GRU over packed sequences, then cells stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 6, batch_first=True)
        self.cell = nn.LSTMCell(6, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(x, torch.tensor([4, 3, 2]), batch_first=True)
        rows, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        h = c = rows.new_zeros(rows.shape[0], 5)
        for row in rows.unbind(1):
            h, c = self.cell(row, (h, c))
        return self.head(h)


class StateSpace(nn.Module):
    """A linear recurrence with complex poles, read out by hand, between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 3)
        self.log_decay = nn.Parameter(torch.rand(6))
        self.frequency = nn.Parameter(torch.rand(6))
        self.mix = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        self.skip = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        pole = torch.exp(torch.complex(-self.log_decay.exp(), self.frequency))
        state = torch.zeros(x.shape[0], 6, dtype=torch.complex64)
        rows = []
        for row in x.unbind(1):
            state = state * pole + row
            rows.append((state * self.mix).real + row * self.skip)
        return self.leave(torch.stack(rows, 1))


class Experts(nn.Module):
    """Top-two routing over experts by index, with an expert's rows added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.always = nn.Parameter(torch.randn(6, 6) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.einsum("nd,de->ne", x, self.always)
        for number, expert in enumerate(self.experts):
            share = (weights * (chosen == number)).sum(-1, keepdim=True)
            out = out + share * expert(x)
        return out


class Parametrized(nn.Module):
    """Weight norm and spectral norm, whose weights are computed in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(6, 6))
        self.spectral = parametrizations.spectral_norm(nn.Linear(6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.spectral(torch.tanh(self.normed(x))))


class Functional(nn.Module):
    """Layers used without being called: by F, by expand, by a tensor made of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        self.gate = nn.ParameterList([nn.Parameter(torch.zeros(6)), nn.Parameter(torch.ones(6))])
        self.table = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(6))})
        self.norm = nn.RMSNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(x.shape[0], 1, 6), x], 1)
        x = F.linear(x, self.first.weight + self.second.weight.T, self.first.bias)
        x = self.norm(x) * (1 + self.gate[0] * self.gate[1]) + self.table["bias"]
        return F.linear(x, self.second.weight, self.second.bias)


class Attentive(nn.Module):
    """nn.MultiheadAttention and nn.Transformer, whose projections no hook sees called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=6)
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
        self.key = nn.Linear(8, 6)
        self.bilinear = nn.Bilinear(8, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = self.key(x)
        attended, _ = self.attention(x, key, key, need_weights=False)
        return self.bilinear(self.transformer(attended, x), x)


class Barriers(nn.Module):
    """Detached and no_grad branches, a teacher, a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(6, 4), nn.Linear(6, 4)
        self.cut, self.unused = nn.Linear(6, 6), nn.Linear(2, 2)
        self.target = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = self.teacher(x)
        student = self.student(self.cut(x).detach() + x)
        return F.mse_loss(student, wanted) + F.mse_loss(self.target(x), student.detach())


class Hooked(nn.Module):
    """A forward hook that replaces a result, and an input that requires a gradient itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)
        self.offset = nn.Parameter(torch.zeros(6))
        self.first.register_forward_hook(lambda _module, _args, result: result + self.offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        return self.second(torch.tanh(self.first(x)))


class Vmapped(nn.Module):
    """An ensemble by torch.func: one module's call over stacked parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 4)
        self.weight = nn.Parameter(torch.randn(3, 4, 4))
        self.bias = nn.Parameter(torch.zeros(3, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        each = torch.func.vmap(lambda w, b: torch.tanh(F.linear(x, w, b)))(self.weight, self.bias)
        return self.head(each.mean(0))


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def tokens(*shape: int, below: int = 11) -> torch.Tensor:
    return torch.randint(0, below, shape)


OWN = {
    "shared modules": lambda: (SharedModules(), rows(4, 6)),
    "in-place operations": lambda: (InPlace(), rows(4, 6)),
    "custom function": lambda: (CustomFunction(), rows(4, 6)),
    "checkpointed": lambda: (Checkpointed(), rows(4, 6)),
    "grouped convolutions": lambda: (Grouped(), rows(2, 4, 16, 16)),
    "u-net": lambda: (UNet(), rows(2, 3, 8, 8)),
    "lstm": lambda: (Recurrent("LSTM"), tokens(2, 7)),
    "gru": lambda: (Recurrent("GRU"), tokens(2, 7)),
    "packed sequences": lambda: (Packed(), rows(3, 4, 4)),
    "state space by hand": lambda: (StateSpace(), rows(2, 5, 4)),
    "experts": lambda: (Experts(), rows(5, 6)),
    "parametrizations": lambda: (Parametrized(), rows(4, 6)),
    "functional": lambda: (Functional(), rows(2, 3, 6)),
    "nn.Transformer": lambda: (Attentive(), rows(2, 5, 8)),
    "barriers": lambda: (Barriers(), rows(4, 6)),
    "hooks": lambda: (Hooked(), rows(4, 6)),
    "vmap": lambda: (Vmapped(), rows(4, 6)),
}
