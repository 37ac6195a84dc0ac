"""Models beside their papers' formulas: what several formulas share, and the comparison."""

import torch
from torch import nn

from penstock.models import build_model
from penstock.types import FeatureShape


def make(config, num_numeric, dims, names=(), **options):
    names = names or [f"f{place}" for place in range(len(dims))]
    features = [FeatureShape(name, dim) for name, dim in zip(names, dims, strict=True)]
    return build_model(config, num_numeric, features, **options)


def inputs(batch_size, num_numeric, feature_dims, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(batch_size, num_numeric, generator=generator)
    embeddings = torch.randn(batch_size, sum(feature_dims), generator=generator)
    return dense, embeddings


def linear_by_loops(model, dense, weights):
    """Bias, numbers and the weights of the keys, of one sample."""
    part = model.first_order
    return (
        part.bias
        + sum(x * w for x, w in zip(dense, part.number_weights, strict=True))
        + sum(weights)
    )


def check_against(reference, model, dense, embeddings):
    """Logits and all gradients in float64, so that the tolerance is rounding alone."""
    model = model.double()
    for parameter in model.parameters():  # biases begin at zero and would hide a mistake
        nn.init.normal_(parameter, std=0.5)
    dense, embeddings = (
        part.double().requires_grad_(part.numel() > 0) for part in (dense, embeddings)
    )
    # A model may keep a parameter of no element for inputs that are not there.
    parts = (dense, embeddings, *model.parameters())
    wanted = [part for part in parts if part.requires_grad and part.numel()]
    results = []
    for forward in (model, lambda d, e: reference(model, d, e)):
        logits = forward(dense, embeddings)
        gradients = torch.autograd.grad(logits.sin().sum(), wanted, allow_unused=True)
        results.append([logits, *gradients])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def mlp_by_loops(mlp, row):
    for layer in mlp:
        row = row.relu() if isinstance(layer, nn.ReLU) else layer.weight @ row + layer.bias
    return row


def head_by_loops(head, row):
    return head.logit.weight[0] @ mlp_by_loops(head.hidden, row) + head.logit.bias[0]
