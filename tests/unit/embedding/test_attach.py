"""`attach`: one optimizer.step() for dense part and tables, as of torch's own embeddings."""

import copy
import gc
import io
import pickle
import types

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd

from penstock import (
    FTRL,
    SGD,
    Adagrad,
    Adam,
    ConfigError,
    EmbeddingCollection,
    FeatureConfig,
    Jagged,
    KeyedJagged,
    NonFiniteError,
    Schedule,
    TableConfig,
)
from penstock.embedding.host_store import HostStore
from penstock.errors import CapacityError

NUM_KEYS, DIM = 40, 4
RULES = {
    "sgd": (SGD, torch.optim.SGD),
    "adagrad": (Adagrad, torch.optim.Adagrad),
    "adam": (Adam, torch.optim.SparseAdam),
}
RATE = 0.25
# float32 of a few steps; sums of a row run in another order.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


class Ours(nn.Module):
    """Two tables, of different pooling, and a dense part."""

    def __init__(self, rule=None, other_rule=None):
        super().__init__()
        torch.manual_seed(1)
        rule = rule or SGD(learning_rate=RATE)
        tables = [
            TableConfig(name="t", dim=DIM, optimizer=rule),
            TableConfig(name="u", dim=DIM, optimizer=other_rule or rule),
        ]
        features = [
            FeatureConfig(name="x", table="t"),
            FeatureConfig(name="y", table="u", pooling="mean"),
        ]
        self.embeddings = EmbeddingCollection(tables, features)
        self.head = nn.Sequential(nn.Linear(2 * DIM, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, keys):
        bags = Jagged.from_dense(keys)
        return self.head(self.embeddings(KeyedJagged.pack({"x": bags, "y": bags})))[:, 0]

    def rows(self):
        keys = torch.arange(NUM_KEYS)
        return torch.stack([self.embeddings.find(name, keys).values for name in "tu"])


class Twin(nn.Module):
    """The same over nn.EmbeddingBag."""

    def __init__(self, ours, *, sparse=False):
        super().__init__()
        bags = []
        for weight, mode in zip(ours.rows(), ("sum", "mean"), strict=True):
            bags.append(nn.EmbeddingBag(NUM_KEYS, DIM, mode=mode, sparse=sparse, _weight=weight))
        self.bags = nn.ModuleList(bags)
        self.head = copy.deepcopy(ours.head)

    def forward(self, keys):
        return self.head(torch.cat([bag(keys) for bag in self.bags], 1))[:, 0]

    def rows(self):
        return torch.stack([bag.weight.detach() for bag in self.bags])


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        keys = torch.randint(0, NUM_KEYS, (16, 3), generator=generator)
        yield keys, (keys.sum(1) % 2).float()


def loss_of(model, keys, label):
    return nn.functional.binary_cross_entropy_with_logits(model(keys), label)


def assert_same(ours, twin):
    torch.testing.assert_close(ours.rows(), twin.rows(), **CLOSE)
    for mine, theirs in zip(ours.head.parameters(), twin.head.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def pair(kind="sgd", **options):
    """A model with its optimizer, attached, and a twin with optimizers of its own."""
    config, plain = RULES[kind]
    ours = Ours(config(learning_rate=RATE))
    twin = Twin(ours, sparse=kind == "adam")
    optimizer = torch.optim.Adam(ours.head.parameters(), lr=0.01, **options)
    ours.embeddings.attach(optimizer)
    theirs = [
        torch.optim.Adam(twin.head.parameters(), lr=0.01),
        plain(twin.bags.parameters(), lr=RATE, **({"eps": 1e-8} if kind == "adagrad" else {})),
    ]
    return ours, optimizer, twin, theirs


def group_of(optimizer):
    return next(group for group in optimizer.param_groups if "tables" in group)


@pytest.mark.parametrize("kind", RULES)
def test_a_step_is_that_of_torch(kind):
    ours, optimizer, twin, theirs = pair(kind)
    for keys, label in batches(6):
        for model, optimizers in ((ours, [optimizer]), (twin, theirs)):
            for each in optimizers:
                each.zero_grad()
            loss_of(model, keys, label).backward()
            for each in optimizers:
                each.step()
        assert_same(ours, twin)
    assert ours.embeddings.step == 6
    assert ours.embeddings.anchor.grad is None


def test_the_group_holds_the_largest_rate_and_moves_all_with_it():
    ours = Ours(SGD(learning_rate=0.5), SGD(learning_rate=0.125))
    before = ours.rows()
    optimizer = torch.optim.SGD(ours.head.parameters(), lr=0.0)
    ours.embeddings.attach(optimizer)
    assert group_of(optimizer)["lr"] == 0.5
    assert group_of(optimizer)["tables"] == ["t", "u"]
    group_of(optimizer)["lr"] = 0.25
    keys = torch.arange(NUM_KEYS).view(-1, 1)
    with torch.no_grad():
        for parameter in ours.head.parameters():
            parameter.fill_(1.0)
    ours.head[1] = nn.Identity()
    ours(keys).sum().backward()
    optimizer.step()
    # The gradient of every column is 8.
    torch.testing.assert_close(
        before - ours.rows(), torch.tensor([2.0, 0.5]).expand(DIM, NUM_KEYS, 2).permute(2, 1, 0)
    )


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda each: torch.optim.lr_scheduler.StepLR(each, 2, gamma=0.5),
        lambda each: torch.optim.lr_scheduler.LambdaLR(each, lambda step: min(1.0, step / 3)),
        lambda each: torch.optim.lr_scheduler.ReduceLROnPlateau(each, patience=0, factor=0.1),
    ],
)
@pytest.mark.parametrize("kind", RULES)
def test_schedulers_move_the_tables_rate(kind, scheduler):
    ours, optimizer, twin, theirs = pair(kind)
    schedulers = {id(each): scheduler(each) for each in (optimizer, *theirs)}
    for keys, label in batches(6):
        for model, optimizers in ((ours, [optimizer]), (twin, theirs)):
            loss_of(model, keys, label).backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
                metric = [1.0] if "Plateau" in type(schedulers[id(each)]).__name__ else []
                schedulers[id(each)].step(*metric)
    assert_same(ours, twin)
    assert group_of(optimizer)["lr"] == theirs[1].param_groups[0]["lr"]


def test_a_tables_own_schedule_goes_on_beside():
    rates = []
    for attached in (False, True):
        ours = Ours(SGD(learning_rate=RATE, schedule=Schedule(warmup_steps=4)))
        optimizer = torch.optim.SGD(ours.head.parameters(), lr=0.1)
        if attached:
            ours.embeddings.attach(optimizer)
        for keys, label in batches(4):
            loss_of(ours, keys, label).backward()
            optimizer.step()
            optimizer.zero_grad()
            if not attached:
                ours.embeddings.apply_gradients()
        rates.append(ours.rows())
    assert torch.equal(*rates)


@pytest.mark.parametrize("kind", RULES)
def test_gradients_accumulate_to_one_step(kind):
    ours, optimizer, twin, theirs = pair(kind)
    for n, (keys, label) in enumerate(batches(6)):
        for model in (ours, twin):
            (loss_of(model, keys, label) / 3).backward()
        if n % 3 == 2:
            for each in (optimizer, *theirs):
                each.step()
                each.zero_grad()
    assert_same(ours, twin)
    assert ours.embeddings.step == 2


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("who", ["optimizer", "module", "collection"])
def test_zero_grad_drops_what_is_pending(who, set_to_none):
    ours, optimizer, _, _ = pair()
    keys, label = next(batches(1))
    loss_of(ours, keys, label).backward()
    assert len(ours.embeddings.pending) == 1
    zeroed = {"optimizer": optimizer, "module": ours, "collection": ours.embeddings}[who]
    zeroed.zero_grad(set_to_none=set_to_none)
    before = ours.rows()
    optimizer.step()
    assert torch.equal(ours.rows(), before)
    assert ours.embeddings.step == 0
    # And nothing of it is left for the next step.
    twin, theirs = Twin(ours), None
    twin.head.load_state_dict(ours.head.state_dict())
    theirs = torch.optim.SGD(twin.bags.parameters(), lr=RATE)
    ours.zero_grad(set_to_none=set_to_none)
    for model in (ours, twin):
        loss_of(model, keys, label).backward()
    optimizer.step()
    theirs.step()
    torch.testing.assert_close(ours.rows(), twin.rows(), **CLOSE)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_was_dropped_is_not_added_to(set_to_none):
    ours, optimizer, twin, theirs = pair()
    for keys, label in batches(3):
        for model in (ours, twin):
            model.zero_grad(set_to_none=set_to_none)
            loss_of(model, keys, label).backward()
    assert len(ours.embeddings.pending) == 1
    for each in (optimizer, *theirs):
        each.step()
    assert_same(ours, twin)


def test_a_graph_that_is_kept_adds_to_what_was_scaled():
    ours, optimizer, twin, theirs = pair()
    keys, label = next(batches(1))
    for model in (ours, twin):
        loss = loss_of(model, keys, label)
        for _ in range(3):
            loss.backward(retain_graph=True)
            for parameter in model.parameters():
                parameter.grad.mul_(0.5)
    for each in (optimizer, *theirs):
        each.step()
    assert_same(ours, twin)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_all_parameters_of_the_model_may_be_given(make):
    """The anchor among them moves to the tables' group, with names or without."""
    for parameters in ("parameters", "named_parameters"):
        ours = Ours()
        optimizer = make(getattr(ours, parameters)(), lr=0.01, weight_decay=0.1)
        ours.embeddings.attach(optimizer)
        assert [len(group["params"]) for group in optimizer.param_groups] == [4, 1]
        for keys, label in batches(2):
            loss_of(ours, keys, label).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert ours.embeddings.anchor.tolist() == [0.0]
        assert ours.embeddings.anchor not in optimizer.state
        assert ours.embeddings.step == 2
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("kind", RULES)
def test_closures(kind):
    ours, optimizer, twin, theirs = pair(kind)
    for keys, label in batches(4):

        def closure(keys=keys, label=label):
            optimizer.zero_grad()
            loss = loss_of(ours, keys, label)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        for each in theirs:
            each.zero_grad()
        expected = loss_of(twin, keys, label)
        expected.backward()
        for each in theirs:
            each.step()
        torch.testing.assert_close(loss, expected, **CLOSE)
        assert_same(ours, twin)


def test_a_closure_that_is_called_again_is_refused():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            with torch.enable_grad():
                closure()
                closure()

    ours = Ours()
    optimizer = Twice(ours.head.parameters(), lr=0.1)
    ours.embeddings.attach(optimizer)
    keys, label = next(batches(1))
    with pytest.raises(ConfigError, match="Twice calls its closure more than once"):
        optimizer.step(lambda: loss_of(ours, keys, label).backward())


@pytest.mark.parametrize("kind", RULES)
def test_state_goes_through_a_file_and_training_goes_on(kind):
    def train(ours, optimizer, scheduler, seed):
        for keys, label in batches(3, seed):
            loss_of(ours, keys, label).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    def made():
        ours, optimizer, _, _ = pair(kind)
        return ours, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)

    whole = made()
    train(*whole, 0)
    file = io.BytesIO()
    torch.save([each.state_dict() for each in whole], file)
    train(*whole, 1)
    file.seek(0)
    resumed = made()
    for each, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        each.load_state_dict(state)
    train(*resumed, 1)
    assert torch.equal(resumed[0].rows(), whole[0].rows())
    assert group_of(resumed[1])["lr"] == group_of(whole[1])["lr"] != RATE


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copied_pair_is_attached_anew(copied):
    ours, optimizer, _, _ = pair("adagrad")
    group_of(optimizer)["lr"] = RATE / 2
    keys, label = next(batches(1))
    loss_of(ours, keys, label).backward()
    twin, of_twin = copied((ours, optimizer))
    optimizer.step()
    with pytest.raises(ConfigError, match="is a copy"):
        twin(keys)
    twin.eval()(keys)
    twin.train().embeddings.attach(of_twin)
    assert len(of_twin.param_groups) == 2
    assert group_of(of_twin)["lr"] == RATE / 2
    loss_of(twin, keys, label).backward()
    of_twin.step()
    assert torch.equal(twin.rows(), ours.rows())


def test_a_copied_model_may_be_trained_without():
    ours, _, _, _ = pair()
    twin = copy.deepcopy(ours)
    twin.embeddings.detach_optimizer()
    keys, label = next(batches(1))
    before = twin.rows()
    loss_of(twin, keys, label).backward()
    twin.embeddings.apply_gradients()
    assert not torch.equal(twin.rows(), before)


class TestRefused:
    def test_a_second_optimizer(self):
        ours, optimizer, _, _ = pair()
        other = torch.optim.SGD(ours.head.parameters(), lr=0.1)
        for again in (optimizer, other):
            with pytest.raises(ConfigError, match="attached to an optimizer already"):
                ours.embeddings.attach(again)
        assert len(other.param_groups) == 1
        ours.embeddings.detach_optimizer()
        assert len(optimizer.param_groups) == 1
        ours.embeddings.attach(other)
        keys, label = next(batches(1))
        before = ours.rows()
        loss_of(ours, keys, label).backward()
        optimizer.step()
        assert torch.equal(ours.rows(), before)
        other.step()
        assert not torch.equal(ours.rows(), before)

    def test_an_optimizer_that_is_gone(self):
        ours = Ours()
        optimizer = torch.optim.SGD(ours.head.parameters(), lr=0.1)
        ours.embeddings.attach(optimizer)
        del optimizer
        gc.collect()
        keys, _ = next(batches(1))
        with pytest.raises(ConfigError, match="the optimizer is gone"):
            ours(keys)
        ours.embeddings.attach(torch.optim.SGD(ours.head.parameters(), lr=0.1))

    def test_apply_gradients_beside(self):
        ours, _, _, _ = pair()
        with pytest.raises(ConfigError, match=r"step\(\) updates the tables"):
            ours.embeddings.apply_gradients()

    def test_lbfgs(self):
        ours = Ours()
        with pytest.raises(ConfigError, match="LBFGS moves all parameters back and forth"):
            ours.embeddings.attach(torch.optim.LBFGS(ours.head.parameters()))

    def test_what_is_no_optimizer(self):
        ours = Ours()
        with pytest.raises(ConfigError, match=r"expected a torch.optim.Optimizer"):
            ours.embeddings.attach(ours.head)

    def test_a_scheduler_made_before(self):
        ours = Ours()
        optimizer = torch.optim.SGD(ours.head.parameters(), lr=0.1)
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        with pytest.raises(ConfigError, match="attach first, then make the scheduler"):
            ours.embeddings.attach(optimizer)

    @pytest.mark.parametrize(
        ("rate", "rule"), [(-1.0, SGD()), (float("nan"), SGD()), (0.0, FTRL())]
    )
    def test_a_rate_that_is_none(self, rate, rule):
        ours = Ours(rule)
        optimizer = torch.optim.SGD(ours.head.parameters(), lr=0.1)
        ours.embeddings.attach(optimizer)
        group_of(optimizer)["lr"] = rate
        keys, label = next(batches(1))
        loss_of(ours, keys, label).backward()
        head = copy.deepcopy(ours.head.state_dict())
        with pytest.raises(ConfigError, match="the learning rate of the tables' group is"):
            optimizer.step()
        assert all(torch.equal(head[name], value) for name, value in ours.head.state_dict().items())

    @pytest.mark.parametrize(
        "change",
        [
            lambda grad: grad.add_(1.0),
            lambda grad: grad.copy_(torch.ones(1)),
            lambda grad: grad.clamp_(max=1.0),
            lambda grad: grad.nan_to_num_(),
        ],
    )
    def test_a_gradient_that_is_changed_but_not_scaled(self, change):
        ours, optimizer, _, _ = pair()
        keys, label = next(batches(1))
        loss_of(ours, keys, label).backward()
        with pytest.raises(ConfigError, match="stands for the tables"):
            change(ours.embeddings.anchor.grad)
        with pytest.raises(ConfigError, match="stands for the tables"):
            torch.nn.utils.clip_grad_value_(ours.parameters(), 0.1)
        optimizer.zero_grad()

    def test_a_gradient_that_is_replaced(self):
        ours, optimizer, _, _ = pair()
        keys, label = next(batches(1))
        loss_of(ours, keys, label).backward()
        ours.embeddings.anchor.grad = torch.ones(1)
        with pytest.raises(ConfigError, match="was replaced by a Tensor"):
            optimizer.step()

    def test_compiled_autograd(self):
        ours = Ours()
        keys, label = next(batches(1))
        loss = loss_of(ours, keys, label)
        with (
            compiled_autograd._enable(torch.compile(backend="eager")),
            pytest.raises(ConfigError, match="compiled autograd runs the backward pass"),
        ):
            loss.backward()


def test_a_rate_of_0_moves_no_row_and_fills_the_state():
    ours, optimizer, twin, theirs = pair("adagrad")
    for rate in (0.0, RATE):
        group_of(optimizer)["lr"] = theirs[1].param_groups[0]["lr"] = rate
        keys, label = next(batches(1))
        for model, optimizers in ((ours, [optimizer]), (twin, theirs)):
            loss_of(model, keys, label).backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
    assert_same(ours, twin)


def test_gradients_may_be_scaled_by_hand():
    ours, optimizer, twin, theirs = pair()
    keys, label = next(batches(1))
    for model in (ours, twin):
        loss_of(model, keys, label).backward()
        for parameter in model.parameters():
            parameter.grad.mul_(0.5)
            parameter.grad /= 2
    torch._foreach_mul_([p.grad for p in ours.parameters()], 3.0)
    torch._foreach_mul_([p.grad for p in twin.parameters()], 3.0)
    for each in (optimizer, *theirs):
        each.step()
    assert_same(ours, twin)


class Broken(torch.optim.Optimizer):
    """SGD that raises where `is_broken`, after the dense part has moved."""

    is_broken = False

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        self.descend()

    @torch.no_grad()
    def descend(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad
        if self.is_broken:
            raise RuntimeError("broken")


def broken_step(optimizer):
    optimizer.is_broken = True
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    optimizer.is_broken = False


class TestAStepThatRaises:
    """Gradients of tables are where those of the dense part are: still there."""

    def pair(self):
        ours = Ours()
        twin = Twin(ours)
        optimizer = Broken(ours.head.parameters(), lr=0.1)
        ours.embeddings.attach(optimizer)
        theirs = [
            torch.optim.SGD(twin.head.parameters(), lr=0.1),
            torch.optim.SGD(twin.bags.parameters(), lr=RATE),
        ]
        return ours, optimizer, twin, theirs

    def backward(self, *models, scale=1.0):
        keys, label = next(batches(1))
        for model in models:
            (loss_of(model, keys, label) * scale).backward()

    def test_may_be_taken_again(self):
        ours, optimizer, twin, theirs = self.pair()
        self.backward(ours, twin)
        before, norm = ours.rows(), float(ours.embeddings.gradient_norm())
        broken_step(optimizer)
        assert torch.equal(ours.rows(), before)
        assert float(ours.embeddings.anchor.grad) == norm > 0
        theirs[0].step()
        optimizer.step()
        for each in theirs:
            each.step()
        assert_same(ours, twin)

    def test_is_clipped_before_it_is_taken_again(self):
        ours, optimizer, twin, theirs = self.pair()
        self.backward(ours, twin, scale=100.0)
        broken_step(optimizer)
        theirs[0].step()
        norms = [nn.utils.clip_grad_norm_(each.parameters(), 0.01) for each in (ours, twin)]
        torch.testing.assert_close(*norms, **CLOSE)
        for each in (optimizer, *theirs):
            each.step()
        assert_same(ours, twin)

    @pytest.mark.parametrize("set_to_none", [True, False])
    @pytest.mark.parametrize("who", ["optimizer", "module"])
    def test_is_given_up_by_zero_grad(self, who, set_to_none):
        ours, optimizer, twin, theirs = self.pair()
        self.backward(ours, twin)
        broken_step(optimizer)
        theirs[0].step()
        {"optimizer": optimizer, "module": ours}[who].zero_grad(set_to_none=set_to_none)
        twin.zero_grad()
        self.backward(ours, twin, scale=0.5)
        for each in (optimizer, *theirs):
            each.step()
        assert_same(ours, twin)
        assert ours.embeddings.step == 1

    def test_is_added_to_by_another_pass(self):
        ours, optimizer, twin, theirs = self.pair()
        self.backward(ours, twin)
        broken_step(optimizer)
        theirs[0].step()
        self.backward(ours, twin)
        for each in (optimizer, *theirs):
            each.step()
        assert_same(ours, twin)

    def test_of_two_collections(self):
        ours = Both()
        optimizer = Broken(ours.parameters(), lr=0.01)
        for each in (ours.first, ours.second):
            each.embeddings.attach(optimizer)
        keys, _ = next(batches(1))
        ours(keys).sum().backward()
        broken_step(optimizer)
        assert all(float(each.embeddings.anchor.grad) for each in (ours.first, ours.second))

    def test_where_the_step_is_the_users_own(self):
        """It stands before the class's, so that nobody is told: nothing is lost in silence."""
        ours = Ours()

        class Unknown(Broken):
            def step(self):
                self.descend()

        optimizer = Unknown(ours.head.parameters(), lr=0.1)
        optimizer.step = types.MethodType(Unknown.step, optimizer)
        ours.embeddings.attach(optimizer)
        self.backward(ours)
        broken_step(optimizer)
        with pytest.raises(ConfigError, match=r"the last optimizer.step\(\) raised"):
            ours.embeddings.gradient_norm()
        ours.embeddings.discard_gradients()
        before = ours.rows()
        self.backward(ours)
        optimizer.step()
        assert not torch.equal(ours.rows(), before)


def test_without_memory_the_gradients_stay(monkeypatch):
    ours, optimizer, twin, theirs = pair()
    keys, label = next(batches(1))
    for model in (ours, twin):
        loss_of(model, keys, label).backward()
    before = ours.rows()

    def full(*_, **__):
        raise CapacityError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(HostStore, "apply_gradients", full)
        with pytest.raises(CapacityError):
            optimizer.step()
    assert torch.equal(ours.rows(), before)
    for parameter in ours.head.parameters():
        parameter.grad = None
    optimizer.step()
    for each in theirs:
        each.step()
    torch.testing.assert_close(ours.rows(), twin.rows(), **CLOSE)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(backend):
    ours, optimizer, twin, theirs = pair()
    compiled = torch.compile(ours, backend=backend)
    for keys, label in batches(3):
        for model, optimizers in ((compiled, [optimizer]), (twin, theirs)):
            for each in optimizers:
                each.zero_grad()
            loss_of(model, keys, label).backward()
            loss_of(model, keys, label).backward()
            for each in optimizers:
                each.step()
        assert_same(ours, twin)


def test_a_compiled_step_with_all_that_is_in_it():
    torch._dynamo.reset()
    ours, optimizer, twin, theirs = pair()

    @torch.compile(backend="aot_eager")
    def step(keys, label):
        optimizer.zero_grad()
        loss_of(ours, keys, label).backward()
        optimizer.step()

    for keys, label in batches(3):
        step(keys, label)
        for each in theirs:
            each.zero_grad()
        loss_of(twin, keys, label).backward()
        for each in theirs:
            each.step()
        assert_same(ours, twin)
    assert ours.embeddings.step == 3
    assert ours.embeddings.anchor.tolist() == [0.0]


class TestGradScaler:
    @pytest.mark.parametrize("kind", RULES)
    @pytest.mark.parametrize("options", [{}, {"fused": True}])
    def test_unscales_and_skips(self, kind, options):
        ours, optimizer, twin, theirs = pair(kind, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
        for n, (keys, label) in enumerate(batches(6)):
            optimizer.zero_grad()
            scaler.scale(loss_of(ours, keys, label)).backward()
            is_skipped = n in {1, 4}
            if is_skipped:
                ours.head[0].weight.grad[0, 0] = float("inf")
            before = ours.rows()
            scaler.step(optimizer)
            scaler.update()
            if is_skipped:
                assert torch.equal(ours.rows(), before)
                continue
            for each in theirs:
                each.zero_grad()
            loss_of(twin, keys, label).backward()
            for each in theirs:
                each.step()
            assert_same(ours, twin)
        assert ours.embeddings.step == 4

    @pytest.mark.parametrize("options", [{}, {"fused": True}])
    def test_tables_make_it_skip(self, options):
        ours, optimizer, _, _ = pair(**options)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        keys, _ = next(batches(1))
        pooled = ours.embeddings(KeyedJagged.pack(dict.fromkeys("xy", Jagged.from_dense(keys))))
        before, head = ours.rows(), copy.deepcopy(ours.head.state_dict())
        loss = (pooled * torch.tensor([1.0, float("inf")] * DIM)).sum() + sum(
            each.sum() for each in ours.head.parameters()
        )
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(ours.rows(), before)
        assert all(torch.equal(head[name], value) for name, value in ours.head.state_dict().items())
        assert scaler.get_scale() == 512.0
        assert float(ours.embeddings.gradient_norm()) == 0

    def test_clipping_after_unscaling(self):
        ours, optimizer, twin, theirs = pair()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        keys, label = next(batches(1))
        scaler.scale(loss_of(ours, keys, label)).backward()
        loss_of(twin, keys, label).backward()
        scaler.unscale_(optimizer)
        norms = [nn.utils.clip_grad_norm_(each.parameters(), 0.01) for each in (ours, twin)]
        torch.testing.assert_close(*norms, **CLOSE)
        scaler.step(optimizer)
        for each in theirs:
            each.step()
        assert_same(ours, twin)


class TestNonFinite:
    @pytest.mark.parametrize("attached", [False, True])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_is_refused_before_anything_is_updated(self, attached, value):
        ours = Ours()
        optimizer = torch.optim.SGD(ours.head.parameters(), lr=0.1)
        if attached:
            ours.embeddings.attach(optimizer)
        keys, label = next(batches(1))
        sparse = KeyedJagged.pack(dict.fromkeys("xy", Jagged.from_dense(keys)))
        factor = torch.ones(len(keys), 2 * DIM)
        factor[5, DIM + 1] = value
        before, head = ours.rows(), copy.deepcopy(ours.head.state_dict())
        (
            ours.head(ours.embeddings(sparse)).sum() + (ours.embeddings(sparse) * factor).sum()
        ).backward()
        step = optimizer.step if attached else ours.embeddings.apply_gradients
        with pytest.raises(
            NonFiniteError,
            match=r"in 1 of 128 elements: feature 'y' of table 'u' \(1\); the first in sample 5",
        ):
            step()
        assert torch.equal(ours.rows(), before)
        assert all(torch.equal(head[name], each) for name, each in ours.head.state_dict().items())
        assert ours.embeddings.step == 0
        ours.embeddings.discard_gradients()
        optimizer.zero_grad()
        loss_of(ours, keys, label).backward()
        step()
        assert not torch.equal(ours.rows(), before)

    def test_huge_but_finite_gradients_are_none(self):
        ours = Ours()
        keys, _ = next(batches(1))
        (ours(keys) * 1e37).sum().backward()
        ours.embeddings.check_gradients()


def test_what_the_gradient_says_is_the_norm():
    ours, optimizer, twin, _ = pair()
    keys, label = next(batches(1))
    for model in (ours, twin):
        loss_of(model, keys, label).backward()
    grad = ours.embeddings.anchor.grad
    assert "norm" not in repr(grad)
    expected = torch.cat([bag.weight.grad.flatten() for bag in twin.bags]).norm()
    torch.testing.assert_close(grad.detach(), expected.reshape(1), **CLOSE)
    assert float(grad.abs().sum()) == pytest.approx(float(expected), rel=1e-5)
    optimizer.zero_grad()
    assert float(grad) == 0


class Both(nn.Module):
    """Two collections in one model."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Ours(SGD(learning_rate=RATE)), Ours(Adagrad(learning_rate=RATE))

    def forward(self, keys):
        return self.first(keys) + self.second(keys + 0)


def test_two_collections_share_an_optimizer():
    torch.manual_seed(0)
    ours = Both()
    twins = [Twin(ours.first), Twin(ours.second)]
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01)
    for each in (ours.first, ours.second):
        each.embeddings.attach(optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [8, 1, 1]
    theirs = [
        torch.optim.AdamW([*twins[0].head.parameters(), *twins[1].head.parameters()], lr=0.01),
        torch.optim.SGD(twins[0].bags.parameters(), lr=RATE),
        torch.optim.Adagrad(twins[1].bags.parameters(), lr=RATE, eps=1e-8),
    ]
    optimizer.param_groups[2]["lr"] = theirs[2].param_groups[0]["lr"] = RATE / 3
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for keys, label in batches(3):
        for each in (optimizer, *theirs):
            each.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(ours(keys), label)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scores = twins[0](keys) + twins[1](keys)
        nn.functional.binary_cross_entropy_with_logits(scores, label).backward()
        both = [parameter for twin in twins for parameter in twin.parameters()]
        norms = [nn.utils.clip_grad_norm_(each, 0.05) for each in (ours.parameters(), both)]
        torch.testing.assert_close(*norms, **CLOSE)
        scaler.step(optimizer)
        scaler.update()
        for each in theirs:
            each.step()
    for mine, twin in zip((ours.first, ours.second), twins, strict=True):
        torch.testing.assert_close(mine.rows(), twin.rows(), rtol=1e-4, atol=1e-5)


def test_one_of_two_collections_that_is_not_finite_stops_both():
    ours = Both()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
    for each in (ours.first, ours.second):
        each.embeddings.attach(optimizer)
    keys, _ = next(batches(1))
    before = [each.rows() for each in (ours.first, ours.second)]
    (ours.first(keys).sum() + ours.second(keys).mul(torch.nan).sum()).backward()
    for _ in range(2):
        with pytest.raises(NonFiniteError):
            optimizer.step()
    assert all(
        torch.equal(each.rows(), was)
        for each, was in zip((ours.first, ours.second), before, strict=True)
    )
    optimizer.zero_grad()
    assert float(ours.first.embeddings.gradient_norm()) == 0
    ours(keys).sum().backward()
    optimizer.step()
    assert not torch.equal(ours.first.rows(), before[0])
