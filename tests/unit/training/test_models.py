import subprocess
import sys

import pytest
import torch
from torch import nn

from penstock.config import (
    AutoIntConfig,
    CustomModel,
    DCNConfig,
    DeepFMConfig,
    DLRMConfig,
    FinalMLPConfig,
    MaskNetConfig,
    MMoEConfig,
    MultiTask,
    PLEConfig,
    SharedBottomConfig,
    WideDeepConfig,
    XDeepFMConfig,
)
from penstock.errors import ConfigError
from penstock.models import DCN, DLRM, DeepFM, WideDeep, build_model
from penstock.types import FeatureShape
from tests.unit.training.formulas import (
    check_against,
    head_by_loops,
    inputs,
    linear_by_loops,
    make,
    mlp_by_loops,
)

EVERY_MODEL = [
    DLRMConfig(),
    DCNConfig(),
    DCNConfig(structure="stacked"),
    DeepFMConfig(),
    WideDeepConfig(),
    AutoIntConfig(),
    AutoIntConfig(deep=(8,)),
    XDeepFMConfig(),
    FinalMLPConfig(),
    FinalMLPConfig(gate=None),
    MaskNetConfig(),
    MaskNetConfig(structure="serial", deep=()),
    SharedBottomConfig(),
    MMoEConfig(),
    PLEConfig(),
]


def dlrm_by_loops(model, dense, embeddings):
    """The paper's formula, one sample and one pair at a time."""
    logits = []
    for sample in range(dense.shape[0]):
        numbers = dense[sample : sample + 1]
        first = model.bottom(numbers)[0] if model.has_numeric else model.constant
        vectors = [first, *embeddings[sample].reshape(-1, model.dim)]
        dots = [torch.dot(vectors[i], vectors[j]) for i in range(len(vectors)) for j in range(i)]
        row = torch.cat([first, *(dot.reshape(1) for dot in dots)])
        logits.append(model.top(row.unsqueeze(0))[0])
    return torch.stack(logits)


def dcn_by_loops(model, dense, embeddings):
    logits = []
    for sample in range(dense.shape[0]):
        x0 = torch.cat((dense[sample], embeddings[sample]))
        x = x0
        for layer in model.cross:
            parts = layer.weight if isinstance(layer.weight, nn.Sequential) else [layer.weight]
            product = x
            for part in parts:
                product = part.weight @ product
            x = x0 * (product + parts[-1].bias) + x
        if model.is_parallel:
            x = torch.cat((x, model.deep(x0.unsqueeze(0))[0])) if model.has_deep else x
        logits.append(model.head(x.unsqueeze(0))[0])
    return torch.stack(logits)


def deepfm_by_loops(model, dense, embeddings):
    """The paper's formula, one sample and one pair of fields at a time."""
    logits = []
    for sample in range(dense.shape[0]):
        rows = embeddings[sample].reshape(-1, model.dim + 1)
        fields = [x * v for x, v in zip(dense[sample], model.numeric_vectors, strict=True)]
        fields += [row[:-1] for row in rows]
        linear = linear_by_loops(model, dense[sample], [row[-1] for row in rows])
        pairs = sum(torch.dot(fields[i], fields[j]) for i in range(len(fields)) for j in range(i))
        logits.append(linear + pairs + model.deep(torch.cat(fields).unsqueeze(0))[0])
    return torch.stack(logits)


def wide_deep_by_loops(feature_dims, wide):
    def forward(model, dense, embeddings):
        logits = []
        for sample in range(dense.shape[0]):
            weights, inputs = [], [dense[sample]]
            for row, is_wide in zip(embeddings[sample].split(feature_dims), wide, strict=True):
                weights += [row[-1]] if is_wide else []
                inputs.append(row[:-1] if is_wide else row)
            logit = linear_by_loops(model, dense[sample], weights)
            if model.deep is not None:
                logit = logit + model.deep(torch.cat(inputs).unsqueeze(0))[0]
            logits.append(logit)
        return torch.stack(logits)

    return forward


@pytest.mark.parametrize(
    ("num_numeric", "feature_dims", "bottom", "top"),
    [
        (13, (8,) * 5, (16, 8), (12, 4)),
        (1, (3,), (), ()),
        (0, (4, 4, 4), (16,), (8,)),
        (0, (5,), (16,), (8,)),
        (6, (), (16, 8), (12,)),
        (6, (), (), ()),
    ],
)
def test_dlrm_is_the_papers_formula(num_numeric, feature_dims, bottom, top):
    torch.manual_seed(0)
    model = make(DLRMConfig(bottom=bottom, top=top), num_numeric, feature_dims)
    assert isinstance(model, DLRM)
    check_against(dlrm_by_loops, model, *inputs(4, num_numeric, feature_dims))


@pytest.mark.parametrize("structure", ["parallel", "stacked"])
@pytest.mark.parametrize("low_rank", [None, 2])
@pytest.mark.parametrize("deep", [(), (7, 5)])
@pytest.mark.parametrize(("num_numeric", "feature_dims"), [(3, (4, 2, 1)), (0, (4,)), (3, ())])
def test_dcn_is_the_papers_formula(structure, low_rank, deep, num_numeric, feature_dims):
    torch.manual_seed(0)
    config = DCNConfig(cross_layers=2, low_rank=low_rank, deep=deep, structure=structure)
    model = make(config, num_numeric, feature_dims)
    assert isinstance(model, DCN)
    check_against(dcn_by_loops, model, *inputs(3, num_numeric, feature_dims))


@pytest.mark.parametrize(
    ("num_numeric", "feature_dims", "deep"),
    [(3, (8,) * 5, (12, 4)), (0, (4, 4, 4), (8,)), (0, (2,), ()), (1, (5,), ()), (4, (), (6,))],
)
def test_deepfm_is_the_papers_formula(num_numeric, feature_dims, deep):
    torch.manual_seed(0)
    model = make(DeepFMConfig(deep=deep, numeric_dim=3), num_numeric, feature_dims)
    assert isinstance(model, DeepFM)
    assert model.dim == (feature_dims[0] - 1 if feature_dims else 3)
    check_against(deepfm_by_loops, model, *inputs(4, num_numeric, feature_dims))


@pytest.mark.parametrize(
    ("num_numeric", "feature_dims", "patterns", "wide"),
    [
        (3, (8, 1, 4), ("*",), (True, True, True)),
        (3, (8, 1, 4), ("b", "c*"), (False, True, True)),
        (0, (8, 1, 4), (), (False, False, False)),
        (0, (1, 1, 1), ("*",), (True, True, True)),
        (2, (), ("*",), ()),
    ],
)
def test_wide_and_deep_is_the_papers_formula(num_numeric, feature_dims, patterns, wide):
    torch.manual_seed(0)
    config = WideDeepConfig(deep=(6, 3), wide=patterns)
    names = ("a", "b", "c")[: len(feature_dims)]
    model = make(config, num_numeric, feature_dims, names)
    assert isinstance(model, WideDeep)
    reference = wide_deep_by_loops(feature_dims, wide)
    check_against(reference, model, *inputs(4, num_numeric, feature_dims))


def shared_bottom_by_loops(model, dense, embeddings):
    outputs = []
    for row in torch.cat((dense, embeddings), 1):
        shared = mlp_by_loops(model.bottom, row)
        outputs.append(torch.stack([head_by_loops(tower, shared) for tower in model.towers]))
    return torch.stack(outputs)


def mmoe_by_loops(model, dense, embeddings):
    """The paper's formula (1) and (5) to (7), one sample, task and expert at a time."""
    outputs = []
    for row in torch.cat((dense, embeddings), 1):
        experts = [mlp_by_loops(expert, row) for expert in model.experts]
        of_tasks = []
        for gate, tower in zip(model.gates, model.towers, strict=True):
            powers = [(gate.weight[expert] @ row).exp() for expert in range(len(experts))]
            mix = sum(p / sum(powers) * e for p, e in zip(powers, experts, strict=True))
            of_tasks.append(head_by_loops(tower, mix))
        outputs.append(torch.stack(of_tasks))
    return torch.stack(outputs)


@pytest.mark.parametrize(("num_numeric", "dims"), [(3, (4, 2)), (0, (5,)), (2, ())])
@pytest.mark.parametrize("num_tasks", [1, 2, 3])
@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (SharedBottomConfig(bottom=(6, 5), towers=(3,)), shared_bottom_by_loops),
        (SharedBottomConfig(bottom=(), towers=()), shared_bottom_by_loops),
        (MMoEConfig(experts=3, expert=(6, 5), towers=(4,)), mmoe_by_loops),
        (MMoEConfig(experts=1, expert=(6,), towers=()), mmoe_by_loops),
    ],
)
def test_models_of_several_labels_are_their_formulas(
    config, reference, num_numeric, dims, num_tasks
):
    torch.manual_seed(0)
    model = make(config, num_numeric, dims, num_tasks=num_tasks)

    def one_or_several(*arguments):
        outputs = reference(*arguments)
        return outputs[:, 0] if num_tasks == 1 else outputs

    assert model(*inputs(4, num_numeric, dims)).shape == (
        (4,) if num_tasks == 1 else (4, num_tasks)
    )
    check_against(one_or_several, model, *inputs(4, num_numeric, dims))


@pytest.mark.parametrize(
    "config", [config for config in EVERY_MODEL if not isinstance(config, MultiTask)]
)
def test_a_model_of_one_label_refuses_several(config):
    with pytest.raises(ConfigError) as caught:
        make(config, 2, (4, 4), num_tasks=2)
    assert str(caught.value) == (
        f"model {config.kind} predicts one label, but data.label names 2; use model kind "
        "shared_bottom, mmoe, ple or esmm"
    )


@pytest.mark.parametrize("config", [*EVERY_MODEL])
def test_a_model_of_pooled_vectors_refuses_a_sequence(config):
    features = [FeatureShape("item", 4), FeatureShape("clicked", 4, 10)]
    with pytest.raises(ConfigError) as caught:
        build_model(config, 2, features)
    assert str(caught.value) == (
        f"model {config.kind} reads one vector a feature, but 'clicked' is a sequence; give it "
        "another pooling, or use model kind din or hstu"
    )


def test_a_feature_of_dim_1_enters_the_linear_model_alone():
    model = make(WideDeepConfig(), 0, (1, 4), ("cross", "item"))
    assert model.first_order.vector_dims == (0, 3)
    assert model.deep.hidden[0].in_features == 3


@pytest.mark.parametrize("config", EVERY_MODEL)
@pytest.mark.parametrize("batch_size", [0, 1, 33])
def test_logits_are_finite_of_one_number_a_sample_and_small_at_first(config, batch_size):
    torch.manual_seed(0)
    model = make(config, 4, (16,) * 8)
    dense, embeddings = inputs(batch_size, 4, (16,) * 8)
    logits = model(dense, 0.05 * embeddings)
    assert logits.shape == (batch_size,)
    assert logits.dtype == torch.float32
    assert bool((logits.abs() < 20).all())


@pytest.mark.parametrize("config", EVERY_MODEL)
def test_initial_weights_are_a_function_of_the_seed(config):
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(make(config, 3, (8, 8)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("config", EVERY_MODEL)
def test_the_graph_has_no_breaks(config):
    model = make(config, 3, (8, 8))
    dense, embeddings = inputs(5, 3, (8, 8))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(dense, embeddings), model(dense, embeddings))


def test_dlrm_refuses_several_dims():
    with pytest.raises(ConfigError) as caught:
        make(DLRMConfig(), 2, (16, 8), ("user", "item"))
    assert str(caught.value) == (
        "model dlrm needs one embedding dim for all features, got user 16, item 8; "
        "give their tables one `dim`, or use model kind dcn_v2, which takes any dims"
    )


@pytest.mark.parametrize(
    ("dims", "shown"), [((16, 8), "user 16, item 8"), ((1, 1), "user 1, item 1")]
)
def test_deepfm_refuses_dims_without_a_common_vector(dims, shown):
    with pytest.raises(ConfigError) as caught:
        make(DeepFMConfig(), 2, dims, ("user", "item"))
    assert str(caught.value) == (
        "model deepfm needs one embedding dim of at least 2 for all features (the last column is "
        f"the first-order weight), got {shown}; give their tables one `dim`, or use model kind "
        "wide_deep, which takes any dims"
    )


def test_a_wide_feature_that_is_not_there_is_refused():
    with pytest.raises(ConfigError) as caught:
        make(WideDeepConfig(wide=("item*", "age")), 2, (4, 4), ("user", "item"))
    assert str(caught.value) == ("model.wide: 'age' matches no feature; there are user, item")


def test_no_input_is_refused():
    with pytest.raises(ConfigError) as caught:
        make(DCNConfig(), 0, ())
    assert str(caught.value) == (
        "the model has no input: no numeric column and no feature matches; "
        "declare `data.numeric` or `features`"
    )


# What a user might write, in a module of its own on the Python path.
USER_MODULE = """
import torch
from torch import nn

class Wide(nn.Module):
    def __init__(self, num_numeric, feature_dims, hidden=4):
        super().__init__()
        self.layers = nn.Sequential(nn.LazyLinear(hidden), nn.Dropout(0.5), nn.Linear(hidden, 1))

    def forward(self, dense, embeddings):
        assert not (self.training and dense.shape[0] == 2)
        return self.layers(torch.cat((dense, embeddings), 1)).squeeze(1)

class Group:
    nested = Wide

def column(num_numeric, feature_dims):
    return nn.Sequential(Wide(num_numeric, feature_dims), nn.Unflatten(0, (-1, 1)))

class Integer(Wide):
    def forward(self, dense, embeddings):
        return torch.zeros(dense.shape[0], dtype=torch.int64)

class Pair(Wide):
    def forward(self, dense, embeddings):
        return dense, embeddings

class Broken(Wide):
    def forward(self, dense, embeddings):
        return self.missing

def nothing(num_numeric, feature_dims):
    return None

class Two(Wide):
    def __init__(self, num_numeric, feature_dims, num_tasks):
        super().__init__(num_numeric, feature_dims)

class Several(nn.Module):
    def __init__(self, num_numeric, feature_dims, sequences, num_tasks):
        super().__init__()
        self.given = num_numeric, feature_dims, sequences, num_tasks

    def forward(self, dense, embeddings, lengths):
        return embeddings[:, :self.given[3]] + lengths.sum(1, keepdim=True)
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_click_model.py").write_text(USER_MODULE)
    (tmp_path / "half_written.py").write_text("def model(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_click_model", None)


@pytest.mark.parametrize("name", ["my_click_model:Wide", "my_click_model:Group.nested"])
def test_a_users_module_takes_the_place_of_ours(user_module, name):
    config = CustomModel(factory=name, arguments={"hidden": 6})
    model = make(config, 3, (4, 2))
    assert model.training
    assert model.layers[0].weight.shape == (6, 9)  # the probe has given the lazy layer its shape
    assert model(*inputs(5, 3, (4, 2))).shape == (5,)


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        (
            "no_such_module:Wide",
            {},
            "model.factory 'no_such_module:Wide': cannot import 'no_such_module': "
            "ModuleNotFoundError: No module named 'no_such_module'; is its folder on PYTHONPATH?",
        ),
        (
            "half_written:model",
            {},
            "model.factory 'half_written:model': cannot import 'half_written': "
            "SyntaxError: invalid syntax (half_written.py, line 1); is its folder on PYTHONPATH?",
        ),
        (
            "my_click_model:Narrow",
            {},
            "model.factory 'my_click_model:Narrow': module 'my_click_model' has no 'Narrow'",
        ),
        (
            "my_click_model:Wide",
            {"depth": 3},
            "model.factory 'my_click_model:Wide': calling it with num_numeric=3, "
            "feature_dims=(4, 2), depth=3 failed: TypeError: Wide.__init__() got an unexpected "
            "keyword argument 'depth'",
        ),
        (
            "my_click_model:nothing",
            {},
            "model.factory 'my_click_model:nothing' returned NoneType; "
            "it must return a torch.nn.Module",
        ),
        (
            "my_click_model:column",
            {},
            "model.factory 'my_click_model:column': forward(dense [2, 3], embeddings [2, 6]) "
            "failed: TypeError: Sequential.forward() takes 2 positional arguments but 3 were given",
        ),
        (
            "my_click_model:Integer",
            {},
            "model.factory 'my_click_model:Integer': forward returned int64 [2] for 2 samples; "
            "it must return logits [2], one number a sample",
        ),
        (
            "my_click_model:Pair",
            {},
            "model.factory 'my_click_model:Pair': forward returned tuple for 2 samples; "
            "it must return logits [2], one number a sample",
        ),
        (
            "my_click_model:Broken",
            {},
            "model.factory 'my_click_model:Broken': forward(dense [2, 3], embeddings [2, 6]) "
            "failed: AttributeError: 'Broken' object has no attribute 'missing'",
        ),
    ],
)
def test_a_wrong_users_module_is_refused_by_name(user_module, factory, arguments, message):
    with pytest.raises(ConfigError) as caught:
        make(CustomModel(factory=factory, arguments=arguments), 3, (4, 2))
    assert str(caught.value) == message


SEQUENCES = [FeatureShape("a", 4), FeatureShape("b", 2, 5), FeatureShape("c", 3, 2)]


def test_a_users_module_hears_of_sequences_and_labels(user_module):
    config = CustomModel(factory="my_click_model:Several")
    model = build_model(config, 3, SEQUENCES, num_tasks=2)
    assert model.given == (3, (4, 10, 6), {"b": (5, 2), "c": (2, 3)}, 2)


def test_a_users_module_of_too_few_outputs_is_refused(user_module):
    with pytest.raises(ConfigError) as caught:
        make(CustomModel(factory="my_click_model:Two"), 3, (4, 2), num_tasks=2)
    assert str(caught.value) == (
        "model.factory 'my_click_model:Two': forward returned float32 [2] for 2 samples; "
        "it must return logits [2, 2], 2 numbers a sample"
    )


def test_models_import_no_other_plane():
    code = (
        "import sys, penstock.models; "
        "print(*sorted({name.split('.')[1] for name in sys.modules if name[:9] == 'penstock.'}))"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.split() == ["config", "errors", "models", "position", "types"]
