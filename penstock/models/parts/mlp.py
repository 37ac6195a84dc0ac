"""The multi-layer perceptron that the models share, and how its weights begin."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def glorot_linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """Makes a linear layer: weights normal with variance 2 / (inputs + outputs), zero bias.

    As in the authors' DLRM, but for the bias: theirs is random with variance 1 / outputs, which
    puts the first logits (one output) a whole unit off.
    """
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_normal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Sequential):
    """Linear layers of the given widths, each followed by a ReLU: [B, inputs] -> [B, outputs].

    Without widths it is the identity. `regularize` puts more between the layers.
    """

    def __init__(self, inputs: int, widths: Sequence[int], *, is_gate: bool = False) -> None:
        """`is_gate`: it weighs what others compute, and is never regularized."""
        layers: list[nn.Module] = []
        self.outputs = inputs
        self.is_gate = is_gate
        for width in widths:
            layers += [glorot_linear(self.outputs, width), nn.ReLU()]
            self.outputs = width
        super().__init__(*layers)

    def regularize(self, dropout: float, *, batch_norm: bool) -> None:
        """Gives every layer batch norm before its activation, and dropout after it."""
        layers = regularized(list(self), dropout, batch_norm=batch_norm)
        super().__init__(*layers)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm that trains on a batch of one sample, too: by its running statistics, as they are.

    One sample has no variance, and torch refuses it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C] -> [B, C]."""
        if self.training and input.shape[0] < 2:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)


def regularized(
    layers: Sequence[nn.Module], dropout: float, *, batch_norm: bool
) -> list[nn.Module]:
    """Linear layers, each followed by its activation, with batch norm between, and dropout behind.

    Args:
      layers: linear, activation, linear, activation, ...
      dropout: share of outputs that is 0 in training; 0: no dropout.
      batch_norm: whether there is any.
    """
    out: list[nn.Module] = []
    for linear, activation in zip(layers[::2], layers[1::2], strict=True):
        assert isinstance(linear, nn.Linear)
        norm = [BatchNorm(linear.out_features)] if batch_norm else []
        out += [linear, *norm, activation, *([nn.Dropout(dropout)] if dropout else [])]
    return out


class LogitHead(nn.Module):
    """MLP, then one linear output: [B, inputs] -> logits [B]."""

    def __init__(self, inputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.hidden = MLP(inputs, widths)
        self.logit = glorot_linear(self.hidden.outputs, 1)

    def forward(self, values: Tensor) -> Tensor:
        """[B, inputs] -> [B]."""
        logits: Tensor = self.logit(self.hidden(values))
        return logits.squeeze(1)
