"""Models of a user: what forward and backward do is set by a test."""

import torch
from torch import nn


class Backward(torch.autograd.Function):
    """The identity, whose gradient a test may spoil."""

    @staticmethod
    def forward(ctx, values, model):
        ctx.model = model
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.model.act("backward")
        return grad, None


class UsersModel(nn.Module):
    """Dropout and batch normalisation: a forward pass draws numbers and changes buffers."""

    acts = {}  # noqa: RUF012 (set by tests)
    """By place: the call at which something happens (from 1), and what."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Linear(width, 1)
        self.calls = {}

    def forward(self, dense, embeddings):
        hidden = self.dropout(self.norm(torch.cat([dense, embeddings], 1)))
        logits = Backward.apply(self.last(hidden)[:, 0], self)
        replaced = self.act("forward" if self.training else "evaluation")
        return logits if replaced is None else replaced(logits)

    def act(self, place):
        self.calls[place] = self.calls.get(place, 0) + 1
        call, act = self.acts.get(place, (0, None))
        return act() if self.calls[place] == call else None


def make(num_numeric, feature_dims):
    return UsersModel(num_numeric + sum(feature_dims))
