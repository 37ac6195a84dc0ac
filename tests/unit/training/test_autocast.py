"""Autocast of every model: in bfloat16 inside, float32 outside, near what float32 gives."""

import copy

import pytest
import torch

from penstock.training.precision import autocast
from tests.unit.training.test_regularized_models import KINDS, build, inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_every_model(kind):
    plain = build(kind, batch_norm=True)
    model = copy.deepcopy(plain)
    autocast(model, CPU, torch.bfloat16)
    found = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, out: found.append(out.dtype))
    x = tuple(one.requires_grad_() if one.is_floating_point() else one for one in inputs(kind, 16))
    outputs, expected = model(*x), plain(*x)
    assert set(found) == {torch.bfloat16} and outputs.dtype == torch.float32
    assert not torch.equal(outputs, expected)
    # 8 bits of each number, and sums of a few: a few hundredths of the outputs' size.
    torch.testing.assert_close(
        outputs, expected, rtol=0, atol=0.05 * float(expected.detach().abs().max()) + 0.02
    )
    outputs.square().sum().backward()
    assert x[1].grad.dtype == torch.float32
    assert all(one.dtype == torch.float32 for one in model.parameters())
    assert all(
        one.grad.dtype == torch.float32 for one in model.parameters() if one.grad is not None
    )


def test_towers_are_called_alone_too():
    model = build("two_tower")
    plain = copy.deepcopy(model)
    autocast(model, CPU, torch.bfloat16)
    dense, embeddings = inputs("two_tower", 8)
    for got, expected in (
        (model.users(dense, embeddings), plain.users(dense, embeddings)),
        (model.items(embeddings), plain.items(embeddings)),
    ):
        assert got.dtype == torch.float32 and not torch.equal(got, expected)
        torch.testing.assert_close(got, expected, rtol=0, atol=0.03)
