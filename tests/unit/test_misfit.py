"""What a model or loss raises on a batch is the data's fault only where that can be told."""

from typing import Any

import pytest
import torch
from torch import nn

from app.freezing.errors import InvalidDocument
from app.jobs.worker import describe_failure
from app.sources.models import BuiltModel
from app.training.judge import compute_loss
from app.training.misfit import Misfits


class Silly(nn.Module):
    """Two classes of three values, unless it is told to raise."""

    def __init__(self, raises: Exception | None = None) -> None:
        super().__init__()
        self.head, self.raises = nn.Linear(3, 2), raises

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.raises is not None:
            raise self.raises
        return self.head(x)


FITTING = [torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)]
EXAMPLE = torch.zeros(2, 3)


def step(built: BuiltModel, batch: Any, then: Exception | None = None) -> None:
    with Misfits(built, [batch]) as misfits:
        misfits.output = built.model(batch[0])
        if then is not None:
            raise then
        compute_loss(built, misfits.output, batch)


def test_a_batch_of_another_shape_than_the_example_is_the_datas_fault() -> None:
    with pytest.raises(InvalidDocument, match=r"takes float32 \[3\], .* gives float32 \[5\]") as e:
        step(BuiltModel(Silly(), EXAMPLE), [torch.zeros(4, 5), FITTING[1]])
    assert isinstance(e.value.__cause__, RuntimeError)
    assert describe_failure(e.value)["reason"] == "data_error"


@pytest.mark.parametrize("example", [EXAMPLE, torch.zeros(2, 7), None])
def test_what_a_users_forward_raises_is_the_users(example: Any) -> None:
    error = ValueError("no such luck")
    with pytest.raises(ValueError, match="no such luck") as e:
        step(BuiltModel(Silly(error), example), FITTING)
    assert e.value is error
    assert describe_failure(e.value)["reason"] == "user_code"


def test_without_an_example_nobody_can_tell() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        step(BuiltModel(Silly()), [torch.zeros(4, 5), FITTING[1]])


def test_what_a_users_loss_raises_is_the_users() -> None:
    def loss(output: Any, batch: Any) -> torch.Tensor:
        raise KeyError("weights")

    with pytest.raises(KeyError):
        step(BuiltModel(Silly(), EXAMPLE, loss=loss), [torch.zeros(9, 3), FITTING[1]])


def test_a_label_that_a_gpu_met_is_told_from_the_host() -> None:
    """A GPU tells only later that something was outside, and answers nothing more."""
    error = RuntimeError("CUDA error: device-side assert triggered")
    batch = [FITTING[0], torch.tensor([0, 1, -100, 7])]
    with pytest.raises(InvalidDocument, match="label 7, outside the model's head of 2") as e:
        step(BuiltModel(Silly(), EXAMPLE), batch, then=error)
    assert describe_failure(e.value)["reason"] == "data_error"
    with pytest.raises(RuntimeError) as e:
        step(BuiltModel(Silly(), EXAMPLE), FITTING, then=error)
    assert describe_failure(e.value)["reason"] == "cuda_fatal"
