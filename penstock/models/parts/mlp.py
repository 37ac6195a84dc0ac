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

    Without widths it is the identity.
    """

    def __init__(self, inputs: int, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        self.outputs = inputs
        for width in widths:
            layers += [glorot_linear(self.outputs, width), nn.ReLU()]
            self.outputs = width
        super().__init__(*layers)


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
