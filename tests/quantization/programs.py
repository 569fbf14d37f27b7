"""Small models whose forwards are written in many ways: every entry is a module and an item of data for it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Program(nn.Module):
    """Convolutions ``a`` to ``d``, a linear layer, a parameter and a buffer; a subclass writes the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(256, 5)
        self.gamma = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.register_buffer("offset", torch.randn(4, 1, 1))
        self.shuffle, self.opaque = Shuffle(), Opaque()


class Shuffle(nn.Module):
    """Only moves data."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return F.max_pool2d(x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w), 3, 1, 1)


class Opaque(nn.Module):
    """Cannot be traced, and does not change its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.shape[0]) < 0 or len(x) < 0 else x.tanh()


PROGRAMS: dict[str, tuple[type[Program], Any, dict[str, Any]]] = {}
"""By name: the class, an item of data, and what to expect: `float`, names that run in float; if there are none, nothing does."""


def program(item: Any = None, **expect: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the forward of a program."""

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        name = forward.__name__
        kind = type(name, (Program,), {"forward": forward, "__module__": __name__})
        generator = torch.Generator().manual_seed(0)
        PROGRAMS[name] = (kind, torch.randn(2, 4, 8, 8, generator=generator) if item is None else item, expect)
        return forward

    return register


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# -- overwriting values in place ------------------------------------------------------------------------------------------------


@program(float=[])
def relu_in_place_and_the_value_again(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    y = F.relu(x, inplace=True)
    return self.b(y) + x


@program(float=[])
def method_in_place_as_a_statement(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    x.mul_(2)
    return self.b(x)


@program(float=[])
def several_in_place_one_after_the_other(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    y = x.relu_()
    x.add_(1)
    y.mul_(0.5)
    return self.b(x) + self.c(y)


@program(float=[])
def addition_in_place_seen_under_another_name(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    v = x
    x += self.b(x)
    return self.c(x * v)


@program(float=["mul_"])
def view_in_place(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    x[:, 0].mul_(3.0)
    return self.b(x)


@program()
def view_in_place_by_an_argument(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    F.relu(x[:, 0], inplace=True)
    return self.b(x)


@program(float=["iadd"])
def view_in_place_and_other_readers_before(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    y = self.c(x)
    v = x.flatten(1)
    v += 1.0
    return self.b(x) + y


@program(float=[])
def product_in_place(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    x *= self.b(x)
    return self.c(x)


# -- shapes and other values that are not tensors -------------------------------------------------------------------------------


@program(float=[])
def arithmetic_of_sizes(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(F.interpolate(x, size=(x.shape[2] * 2, x.size(3) * 2)))


@program()
def views_by_sizes(self: Any, x: Tensor) -> Tensor:
    b, c, h, w = self.a(x).size()
    return self.b(self.a(x).view(b, c, h * w).reshape(b, c, h, -1))


@program()
def scale_from_a_size(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(x * (1.0 / x.shape[1]))


@program(float=["gt", "mul"])
def mask(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(x * (x > 0))


@program((_x(2, 4, 8, 8), 0.5), float=["mul"])
def number_as_an_argument(self: Any, x: Tensor, alpha: float) -> Tensor:
    return self.b(self.a(x) * alpha)


@program({"x": _x(2, 4, 8, 8), "flip": True})
def flag_as_an_argument(self: Any, x: Tensor, flip: bool = False) -> Tensor:
    x = self.a(x)
    return self.b(x.flip(-1) if flip else x)


@program(float=["argmax", "mul"])
def indices(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(x * x.argmax(1, keepdim=True))


@program(float=["max_1", "mul"])
def values_and_indices(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    best = torch.max(x, 1, keepdim=True)
    return self.b(x * best[1] + best[0])


@program(float=[])
def channels_by_index(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)[:, torch.tensor([1, 0, 3, 2])])


# -- operators ------------------------------------------------------------------------------------------------------------------


@program(float=[])
def parameter_as_operand(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x) * self.gamma + self.offset)


@program(float=[])
def keywords(self: Any, x: Tensor) -> Tensor:
    x = F.interpolate(input=F.max_pool2d(input=self.a(x), kernel_size=2), scale_factor=2)
    return self.fc(torch.flatten(input=self.b(input=x), start_dim=1))


@program(float=[])
def bilinear(self: Any, x: Tensor) -> Tensor:
    return self.b(F.interpolate(self.a(x), scale_factor=2.0, mode="bilinear", align_corners=False))


@program(float=["interpolate"])
def bicubic(self: Any, x: Tensor) -> Tensor:
    return self.b(F.interpolate(self.a(x), scale_factor=2.0, mode="bicubic", align_corners=False))


@program(float=["softmax"])
def softmax_between(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x).softmax(1))


@program(float=["matmul", "softmax", "matmul_1"])
def attention(self: Any, x: Tensor) -> Tensor:
    q, k, v = (m(x).flatten(2) for m in (self.a, self.b, self.c))
    weights = (q.transpose(1, 2) @ k).softmax(-1)
    return self.fc((v @ weights).flatten(1))


@program(float=["layer_norm"])
def layer_norm(self: Any, x: Tensor) -> Tensor:
    return self.b(F.layer_norm(self.a(x), (8, 8)))


@program(float=["sqrt", "log"])
def functions_that_some_numbers_lack(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    return self.b(torch.sqrt(x)) + self.c(torch.log(x + 1))


@program(float=[])
def tables(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(1 / (F.silu(x) + 5) + torch.tanh(x) ** 2 + (2 - x.sigmoid()))


@program(float=[])
def squeeze_and_excite(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    return self.b(y * torch.sigmoid(self.c(y.mean((2, 3), keepdim=True))))


@program(float=[])
def broadcast_sum(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(self.c(F.adaptive_avg_pool2d(x, 1)) + x)


@program(float=[])
def the_same_operand_twice(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(x + x) + self.c(x * x)


@program(float=[])
def parts_and_cat(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    left, right = y.chunk(2, 1)
    return self.d(torch.cat([right, F.relu(left), self.b(y)], 1))


@program(float=["cat"])
def cat_of_a_tuple(self: Any, x: Tensor) -> Tensor:
    return self.b(torch.cat(self.a(x).chunk(2, 1)[::-1], 1))


@program(float=[])
def moves(self: Any, x: Tensor) -> Tensor:
    x = self.a(x).permute(0, 2, 3, 1).contiguous().transpose(1, 3).unsqueeze(0).squeeze(0)
    x = F.pad(F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), (1, 1, 1, 1), mode="reflect")
    return self.b(torch.roll(x.mT, 1, -1).mT[..., 1:-1, 1:-1].expand(2, 4, 8, 8))


@program(float=["stack", "sum_1"])
def stack(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(torch.stack([x, F.relu(x)]).sum(0))


@program(float=["new_zeros"])
def fresh_tensors(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.d(torch.cat([x, x.new_zeros(2, 4, 8, 8)], 1))


@program(float=[])
def module_that_only_moves(self: Any, x: Tensor) -> Tensor:
    return self.b(self.shuffle(self.a(x)))


@program(float=["opaque"])
def module_that_cannot_be_traced(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(self.opaque(x)) + self.c(x)


# -- structure ------------------------------------------------------------------------------------------------------------------


@program(float=[])
def tuple_of_parts_as_output(self: Any, x: Tensor) -> Any:
    x = self.a(x)
    return x.chunk(2, 1), self.b(x)


@program(float=[])
def nested_outputs(self: Any, x: Tensor) -> Any:
    x = self.a(x)
    return {"a": x, "b": (self.b(x), [x, x.shape[0], None])}


@program((_x(2, 4, 8, 8), 10 * _x(2, 4, 8, 8)), float=[])
def two_inputs(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return self.a(x) + self.b(y)


@program({"pair": (_x(2, 4, 8, 8), _x(2, 4, 8, 8))}, float=[])
def tuple_as_input(self: Any, pair: Any) -> Tensor:
    return self.a(pair[0]) + self.b(pair[1])


@program(float=[])
def shared_module(self: Any, x: Tensor) -> Tensor:
    return self.a(F.relu(self.a(self.a(x))))


@program(float=[])
def result_nobody_reads(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    self.b(x)
    return self.c(x)


@program(float=["_generated_sub_0", "_generated_truediv_0"])
def preprocessing(self: Any, x: Tensor) -> Tensor:
    return self.a((x - 0.5) / 0.25)


@program(float=["_generated_sigmoid_0", "_generated_mean_0"])
def postprocessing(self: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(self.a(x)).mean((2, 3))


@program()
def control_flow(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(x) if float(x.sum()) > -1e9 else x


@program()
def assignment_to_a_part(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    x[:, 0] = 0
    return self.b(x)


@program(float=[])
def operators_as_functions(self: Any, x: Tensor) -> Tensor:
    x = operator.neg(operator.add(operator.mul(self.a(x), 2.0), self.b(x)))
    return self.c(torch.clamp(x, -1.0, 1.0))


@program(float=[])
def dropout(self: Any, x: Tensor) -> Tensor:
    return self.b(F.dropout(self.a(x), 0.5, self.training))
