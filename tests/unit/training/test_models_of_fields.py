"""AutoInt, xDeepFM, FinalMLP, MaskNet, PLE and ESMM are what their papers say, number by number."""

import pytest
import torch
from torch import nn

from penstock.config import (
    AutoIntConfig,
    ESMMConfig,
    FinalMLPConfig,
    MaskNetConfig,
    PLEConfig,
    XDeepFMConfig,
)
from penstock.errors import ConfigError
from penstock.models import ESMM, PLE, AutoInt, FinalMLP, MaskNet, XDeepFM
from penstock.models.multi_task.esmm import logit_of_product
from tests.unit.training.formulas import (
    check_against,
    head_by_loops,
    inputs,
    linear_by_loops,
    make,
    mlp_by_loops,
)


def fields_of(model, dense, vectors):
    """The vectors of numbers, then those of the features, of one sample."""
    return [x * v for x, v in zip(dense, model.numeric_vectors, strict=True)] + list(vectors)


def softmax(scores):
    powers = [score.exp() for score in scores]
    return [power / sum(powers) for power in powers]


def autoint_by_loops(model, dense, embeddings):
    """Formulas (5) to (9), one sample, layer, field and head at a time."""
    logits = []
    for sample in range(dense.shape[0]):
        before = fields_of(model, dense[sample], embeddings[sample].reshape(-1, model.dim))
        fields = before
        for layer in model.attention:
            heads = [
                part.weight.chunk(layer.heads) for part in (layer.query, layer.key, layer.value)
            ]
            behind = []
            for field in fields:
                mixed = []
                for query, key, value in zip(*heads, strict=True):
                    shares = softmax([(query @ field) @ (key @ other) for other in fields])
                    mixed.append(
                        sum(a * (value @ other) for a, other in zip(shares, fields, strict=True))
                    )
                is_same = isinstance(layer.residual, nn.Identity)
                kept = field if is_same else layer.residual.weight @ field
                behind.append((torch.cat(mixed) + kept).relu())
            fields = behind
        logit = head_by_loops(model.head, torch.cat(fields))
        if model.deep is not None:
            logit = logit + head_by_loops(model.deep, torch.cat(before))
        logits.append(logit)
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("num_numeric", "dims", "options"),
    [
        (3, (4,) * 3, {"layers": 2, "heads": 2, "attention": 6}),
        (2, (6, 6), {"layers": 2, "heads": 3, "attention": 6, "deep": (5,)}),
        (0, (4,), {"layers": 1, "heads": 1, "attention": 3}),
        (2, (), {"layers": 1, "heads": 2, "attention": 4, "numeric_dim": 3}),
    ],
)
def test_autoint_is_the_papers_formula(num_numeric, dims, options):
    torch.manual_seed(0)
    model = make(AutoIntConfig(**options), num_numeric, dims)
    assert isinstance(model, AutoInt)
    check_against(autoint_by_loops, model, *inputs(3, num_numeric, dims))


def xdeepfm_by_loops(model, dense, embeddings):
    """Formulas (6) to (9), one sample, layer and pair of vectors at a time."""
    logits = []
    for sample in range(dense.shape[0]):
        rows = embeddings[sample].reshape(-1, model.dim + 1)
        fields = fields_of(model, dense[sample], [row[:-1] for row in rows])
        vectors, sums = fields, []
        for layer in model.interactions.layers:
            weights = layer.weight.reshape(-1, len(vectors), len(fields))
            vectors = [
                sum(
                    weight[i, j] * vectors[i] * fields[j]
                    for i in range(len(vectors))
                    for j in range(len(fields))
                )
                for weight in weights
            ]
            sums += [vector.sum() for vector in vectors]
        explicit = model.of_interactions.weight[0] @ torch.stack(sums)
        linear = linear_by_loops(model, dense[sample], [row[-1] for row in rows])
        logits.append(linear + explicit + head_by_loops(model.deep, torch.cat(fields)))
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("num_numeric", "dims", "interactions", "deep"),
    [(2, (4,) * 3, (3, 2), (6,)), (0, (3,), (2,), ()), (3, (), (2, 3, 2), (4,))],
)
def test_xdeepfm_is_the_papers_formula(num_numeric, dims, interactions, deep):
    torch.manual_seed(0)
    config = XDeepFMConfig(interactions=interactions, deep=deep, numeric_dim=3)
    model = make(config, num_numeric, dims)
    assert isinstance(model, XDeepFM)
    check_against(xdeepfm_by_loops, model, *inputs(3, num_numeric, dims))


def final_mlp_by_loops(contexts):
    def forward(model, dense, embeddings):
        logits = []
        for sample in range(dense.shape[0]):
            x = torch.cat((dense[sample], embeddings[sample]))
            streams = []
            for number, stream in enumerate(model.streams):
                gated = x
                if len(model.gates):
                    gate = model.gates[number]
                    context = embeddings[sample][contexts[number]]
                    context = context if len(context) else gate.constant
                    hidden = mlp_by_loops(gate.hidden, context)
                    scores = gate.weights.weight @ hidden + gate.weights.bias
                    gated = x * 2 / (1 + (-scores).exp())
                streams.append(mlp_by_loops(stream, gated))
            fusion = model.fusion
            logit = fusion.linear.weight[0] @ torch.cat(streams) + fusion.linear.bias[0]
            parts = [stream.chunk(len(fusion.bilinear)) for stream in streams]
            for first, weight, second in zip(parts[0], fusion.bilinear, parts[1], strict=True):
                logit = logit + first @ weight @ second
            logits.append(logit)
        return torch.stack(logits)

    return forward


@pytest.mark.parametrize(
    ("num_numeric", "dims", "options", "contexts"),
    [
        (2, (4, 1, 3), {"gate": None, "heads": 1}, ([], [])),
        (2, (4, 1, 3), {"gate": (5,), "heads": 2}, ([], [])),
        (
            2,
            (4, 1, 3),
            {"gate": (), "heads": 2, "first_context": ("f0",), "second_context": ("f[12]",)},
            ([0, 1, 2, 3], [4, 5, 6, 7]),
        ),
        (0, (4,), {"gate": (5,), "heads": 2, "second_context": ("*",)}, ([], [0, 1, 2, 3])),
        (3, (), {"gate": (5,), "heads": 2}, ([], [])),
    ],
)
def test_final_mlp_is_the_papers_formula(num_numeric, dims, options, contexts):
    torch.manual_seed(0)
    model = make(FinalMLPConfig(first=(5, 4), second=(6,), **options), num_numeric, dims)
    assert isinstance(model, FinalMLP)
    check_against(final_mlp_by_loops(contexts), model, *inputs(3, num_numeric, dims))


def test_the_gates_of_final_mlp_learn_from_the_first_step():
    torch.manual_seed(0)
    model = make(FinalMLPConfig(first=(8,), second=(8,)), 2, (4, 4))
    model(*inputs(16, 2, (4, 4))).square().sum().backward()
    for gate in model.gates:
        assert gate.constant.grad.abs().max() > 0
        assert gate.hidden[0].weight.grad.abs().max() > 0


def normalized(x):
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()


def masknet_by_loops(model, dense, embeddings):
    logits = []
    for sample in range(dense.shape[0]):
        fields = fields_of(model, dense[sample], embeddings[sample].reshape(-1, model.dim))
        emb = torch.cat(fields)
        normed = torch.cat([
            scale * normalized(field) + shift
            for field, scale, shift in zip(fields, model.norm.scale, model.norm.shift, strict=True)
        ])
        x, outputs = normed, []
        for block in model.blocks:
            mask = mlp_by_loops(block.mask, emb)
            linear, norm, _ = block.hidden
            hidden = normalized(linear.weight @ (mask * (normed if model.is_parallel else x)))
            x = (norm.weight * hidden + norm.bias).relu()
            outputs.append(x)
        logits.append(head_by_loops(model.head, torch.cat(outputs) if model.is_parallel else x))
    return torch.stack(logits)


def test_a_mask_has_a_hidden_column_at_least():
    model = make(MaskNetConfig(blocks=(3,), deep=(), reduction=0.01, numeric_dim=2), 0, (2, 2))
    assert model.blocks[0].mask[0].out_features == 1


@pytest.mark.parametrize("structure", ["parallel", "serial"])
@pytest.mark.parametrize(("num_numeric", "dims"), [(2, (4,) * 3), (0, (3,)), (3, ())])
@pytest.mark.parametrize(("blocks", "deep"), [((5, 4), (6,)), ((5,), ())])
def test_masknet_is_the_papers_formula(structure, num_numeric, dims, blocks, deep):
    torch.manual_seed(0)
    config = MaskNetConfig(
        structure=structure, blocks=blocks, deep=deep, reduction=1.5, numeric_dim=3
    )
    model = make(config, num_numeric, dims)
    assert isinstance(model, MaskNet)
    # round(12 * 1.5) and so on.
    assert model.blocks[0].mask[0].out_features == round(model.blocks[0].mask[2].out_features * 1.5)
    check_against(masknet_by_loops, model, *inputs(3, num_numeric, dims))


def ple_by_loops(model, dense, embeddings):
    """Section 4 of the paper, one sample, layer, label and expert at a time."""
    outputs = []
    for row in torch.cat((dense, embeddings), 1):
        of_tasks, of_all = [row] * len(model.towers), row
        for layer in model.layers:
            own = [
                [mlp_by_loops(expert, x) for expert in experts]
                for experts, x in zip(layer.of_tasks, of_tasks, strict=True)
            ]
            shared = [mlp_by_loops(expert, of_all) for expert in layer.shared]
            mixed = []
            for gate, x, experts in zip(layer.gates, of_tasks, own, strict=True):
                shares = softmax(list(gate.weight @ x))
                mixed.append(sum(a * e for a, e in zip(shares, [*experts, *shared], strict=True)))
            if layer.shared_gate is not None:
                every = [expert for experts in own for expert in experts] + shared
                shares = softmax(list(layer.shared_gate.weight @ of_all))
                of_all = sum(a * e for a, e in zip(shares, every, strict=True))
            of_tasks = mixed
        outputs.append(
            torch.stack([
                head_by_loops(tower, x) for tower, x in zip(model.towers, of_tasks, strict=True)
            ])
        )
    return torch.stack(outputs)


@pytest.mark.parametrize(("num_numeric", "dims"), [(3, (4, 2)), (0, (5,)), (2, ())])
@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"layers": 1, "shared_experts": 1, "task_experts": 2, "towers": ()},
        {"layers": 3, "shared_experts": 2, "task_experts": 1, "towers": (3,)},
    ],
)
def test_ple_is_the_papers_formula(num_numeric, dims, num_tasks, options):
    torch.manual_seed(0)
    model = make(PLEConfig(expert=(6, 4), **options), num_numeric, dims, num_tasks=num_tasks)
    assert isinstance(model, PLE)
    assert [layer.shared_gate is None for layer in model.layers][-1]

    def one_or_several(*arguments):
        outputs = ple_by_loops(*arguments)
        return outputs[:, 0] if num_tasks == 1 else outputs

    check_against(one_or_several, model, *inputs(3, num_numeric, dims))


def esmm_by_loops(model, dense, embeddings):
    outputs = []
    for row in torch.cat((dense, embeddings), 1):
        product, logits = 1, []
        for tower in model.towers:
            product = product / (1 + (-head_by_loops(tower, row)).exp())
            logits.append((product / (1 - product)).log())
        outputs.append(torch.stack(logits))
    return torch.stack(outputs)


@pytest.mark.parametrize(("num_numeric", "dims"), [(3, (4, 2)), (0, (5,)), (2, ())])
@pytest.mark.parametrize("num_tasks", [2, 3])
@pytest.mark.parametrize("towers", [(), (6, 3)])
def test_esmm_is_the_papers_formula(num_numeric, dims, num_tasks, towers):
    torch.manual_seed(0)
    model = make(ESMMConfig(towers=towers), num_numeric, dims, num_tasks=num_tasks)
    assert isinstance(model, ESMM)
    check_against(esmm_by_loops, model, *inputs(3, num_numeric, dims))


def test_a_product_of_probabilities_has_a_logit_at_the_ends_too():
    first = torch.tensor([-200.0, 200.0, 200.0, 0.0, 90.0], requires_grad=True)
    second = torch.tensor([-100.0, 150.0, -3.0, 0.0, 0.0], requires_grad=True)
    logits = logit_of_product(first, second)
    expected = [-300.0, 150.0, -3.0, -torch.tensor(3.0).log().item(), 0.0]
    torch.testing.assert_close(logits, torch.tensor(expected))
    logits.sum().backward()
    assert first.grad.isfinite().all() and second.grad.isfinite().all()
    # Far below: the logit is the sum, and moves as much as either.
    assert first.grad[0] == second.grad[0] == 1.0


@pytest.mark.parametrize("batch_size", [0, 1, 33])
def test_esmm_ranks_what_comes_later_lower(batch_size):
    torch.manual_seed(0)
    model = make(ESMMConfig(), 4, (16,) * 8, num_tasks=3)
    logits = model(*inputs(batch_size, 4, (16,) * 8))
    assert logits.shape == (batch_size, 3)
    assert bool((logits.diff(dim=1) < 0).all())


@pytest.mark.parametrize(
    ("config", "dims", "message"),
    [
        (
            AutoIntConfig(),
            (16, 8),
            "model autoint needs one embedding dim for all features, got user 16, item 8; give "
            "their tables one `dim`, or use model kind dcn_v2, which takes any dims",
        ),
        (
            XDeepFMConfig(),
            (1, 1),
            "model xdeepfm needs one embedding dim of at least 2 for all features (the last column "
            "is the first-order weight), got user 1, item 1; give their tables one `dim`, or use "
            "model kind wide_deep, which takes any dims",
        ),
        (
            MaskNetConfig(),
            (1, 1),
            "model masknet needs one embedding dim of at least 2 for all features (each is "
            "normalized by itself), got user 1, item 1; give their tables one `dim`, or use model "
            "kind final_mlp, which takes any dims",
        ),
        (
            FinalMLPConfig(first_context=("item", "age")),
            (4, 2),
            "model.first_context: 'age' matches no feature; there are user, item",
        ),
        (
            ESMMConfig(),
            (4, 2),
            "model esmm learns labels that happen one after the other; give it at least 2",
        ),
    ],
)
def test_features_that_do_not_fit_are_refused(config, dims, message):
    with pytest.raises(ConfigError) as caught:
        make(config, 2, dims, ("user", "item"))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (AutoIntConfig, {"heads": 3, "attention": 64}, "heads 3 does not divide attention 64"),
        (
            FinalMLPConfig,
            {"heads": 4, "second": (8, 6)},
            "heads 4 does not divide 6, the last width of second",
        ),
        (
            FinalMLPConfig,
            {"gate": None, "first_context": ("a",)},
            "first_context and second_context are read by gates, and gate is null",
        ),
    ],
)
def test_widths_that_do_not_fit_are_refused(config, fields, message):
    with pytest.raises(ConfigError, match=message):
        config(**fields)
