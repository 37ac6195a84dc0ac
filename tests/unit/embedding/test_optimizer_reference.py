"""A thousand training steps against a float64 reference, for every optimizer, pooling and dim."""

import numpy as np
import pytest
import torch

from penstock.config import (
    FTRL,
    LAMB,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    FeatureConfig,
    MomentumSGD,
    RowWiseAdagrad,
    RowWiseAdam,
    Schedule,
    TableConfig,
    Uniform,
)
from penstock.embedding import EmbeddingCollection
from penstock.embedding.rules import optimizer
from penstock.embedding.rules.initializer import initial_values
from penstock.types import Jagged, KeyedJagged

EDGES = np.array([-(2**63), -1, 0, 2**63 - 1], dtype=np.int64)
SCHEDULE = Schedule(warmup_steps=50, decay="cosine", decay_steps=900, end_factor=0.1)
RULES = {
    "sgd": SGD(learning_rate=0.05, weight_decay=1e-3, schedule=SCHEDULE),
    "adagrad": Adagrad(learning_rate=0.05, initial_accumulator=0.1, schedule=SCHEDULE),
    "row_wise_adagrad": RowWiseAdagrad(learning_rate=0.05, eps=1e-4, schedule=SCHEDULE),
    "adam": Adam(learning_rate=1e-3, eps=1e-4, weight_decay=1e-3, schedule=SCHEDULE),
    "momentum_sgd": MomentumSGD(learning_rate=2e-3, weight_decay=1e-3, schedule=SCHEDULE),
    "row_wise_adam": RowWiseAdam(learning_rate=5e-4, eps=1e-4, clip_norm=2.0, schedule=SCHEDULE),
    "ftrl": FTRL(learning_rate=0.05, l1=0.05, weight_decay=1e-3, clip_norm=3.0),
    "adamw": AdamW(learning_rate=1e-3, eps=1e-4, weight_decay=0.1, schedule=SCHEDULE),
    "bounded": SGD(learning_rate=0.05, weight_bound=0.03),
    "lamb": LAMB(learning_rate=1e-3, eps=1e-4, weight_decay=1e-3, schedule=SCHEDULE),
}


class Reference:
    """Dense float64 tables over a known set of keys."""

    def __init__(self, table, keys, seed):
        self.rule, self.keys, self.dim = table.optimizer, keys, table.dim
        self.value = initial_values(table.initializer, seed, table.name, keys, table.dim)
        self.value = self.value.astype(np.float64)
        start = getattr(self.rule, "initial_accumulator", 0.0)
        d = table.dim
        width = {"sgd": 0, "row_wise_adagrad": 1, "adagrad": d, "momentum_sgd": d}
        width = (width | {"row_wise_adam": d + 1}).get(self.rule.kind, 2 * d)
        self.state = np.full((len(keys), width), start)

    def pool(self, rows, bags, size, is_mean):
        out = np.zeros((size, self.dim))
        np.add.at(out, bags, self.value[rows])
        return out / self.divisor(bags, size) if is_mean else out

    @staticmethod
    def divisor(bags, size):
        return np.maximum(np.bincount(bags, minlength=size), 1)[:, None]

    def update(self, grads, step):
        """`grads`: list of (rows, gradient of each occurrence)."""
        total = np.zeros_like(self.value)
        touched = np.zeros(len(self.keys), dtype=bool)
        for rows, grad in grads:
            np.add.at(total, rows, grad)
            touched[rows] = True
        w, s, rule = self.value[touched], self.state[touched], self.rule
        g = total[touched]
        if rule.clip_norm:
            g = g * np.minimum(1, rule.clip_norm / np.linalg.norm(g, axis=1, keepdims=True))
        if rule.kind not in {"ftrl", "lamb", "adamw"}:
            g = g + rule.weight_decay * w
        rate = rule.learning_rate * rule.schedule.factor(step)
        if rule.kind == "sgd":
            w -= rate * g
        elif rule.kind == "adagrad":
            s += g * g
            w -= rate * g / (np.sqrt(s) + rule.eps)
        elif rule.kind == "row_wise_adagrad":
            s += (g * g).mean(1, keepdims=True)
            w -= rate * g / (np.sqrt(s) + rule.eps)
        elif rule.kind == "momentum_sgd":
            s[:] = rule.momentum * s + g
            w -= rate * s
        elif rule.kind == "ftrl":
            z, n = s[:, : self.dim], s[:, self.dim :]
            z += g - (np.sqrt(n + g * g) - np.sqrt(n)) / rate * w
            n += g * g
            scale = (rule.beta + np.sqrt(n)) / rate + rule.weight_decay
            w[:] = np.where(np.abs(z) > rule.l1, (np.sign(z) * rule.l1 - z) / scale, 0)
        else:
            w -= self.adaptive_step(rule, w, s, g, rate, step)
        if rule.kind == "adamw":
            w -= rate * rule.weight_decay * self.value[touched]
        if rule.weight_bound:
            w = w.clip(-rule.weight_bound, rule.weight_bound)
        self.value[touched], self.state[touched] = w, s

    def adaptive_step(self, rule, w, s, g, rate, step):
        m, v = s[:, : self.dim], s[:, self.dim :]
        square = (g * g).mean(1, keepdims=True) if rule.kind == "row_wise_adam" else g * g
        m[:] = rule.beta1 * m + (1 - rule.beta1) * g
        v[:] = rule.beta2 * v + (1 - rule.beta2) * square
        bias1, bias2 = 1 - rule.beta1 ** (step + 1), 1 - rule.beta2 ** (step + 1)
        if rule.kind != "lamb":
            return rate * np.sqrt(bias2) / bias1 * m / (np.sqrt(v) + rule.eps)
        r = m / bias1 / (np.sqrt(v / bias2) + rule.eps) + rule.weight_decay * w
        norms = [np.linalg.norm(x, axis=1, keepdims=True) for x in (w, r)]
        return rate * norms[0] / norms[1] * r


def random_bags(rng, keys, size):
    lengths = rng.integers(0, 4, size)
    rows = (rng.random(lengths.sum()) ** 2 * len(keys)).astype(np.int64)
    bags = np.repeat(np.arange(size), lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return rows, bags, Jagged(torch.from_numpy(keys[rows]), torch.from_numpy(offsets))


@pytest.mark.parametrize("dim", [1, 3, 8, 16, 33, 128])
@pytest.mark.parametrize("rule", RULES)
def test_thousand_steps_equal_float64(rule, dim):
    rng = np.random.default_rng(dim)
    keys = np.unique(np.concatenate([EDGES, rng.integers(-(2**63), 2**63 - 1, 60)]))
    rng.shuffle(keys)
    table = TableConfig(
        name="t", dim=dim, optimizer=RULES[rule], initializer=Uniform(bound=1.0 / dim**0.5)
    )
    features = [
        FeatureConfig(name="s", table="t", pooling="sum"),
        FeatureConfig(name="m", table="t", pooling="mean"),
    ]
    collection = EmbeddingCollection([table], features, seed=9, num_threads=2)
    reference = Reference(table, keys, seed=9)
    size = 24
    for step in range(1000):
        rows, bags, columns = zip(*(random_bags(rng, keys, size) for _ in features), strict=True)
        out = collection(KeyedJagged.pack({"s": columns[0], "m": columns[1]}))
        expected = [reference.pool(rows[f], bags[f], size, f == 1) for f in range(2)]
        # A loss that pulls towards a target keeps values in range and gradients varied.
        target = rng.standard_normal((size, 2 * dim))
        grad = np.hstack(expected) - target
        if step % 100 == 0:
            scale = np.abs(np.hstack(expected)).max() + 1e-9
            assert np.abs(out.detach().numpy() - np.hstack(expected)).max() <= 1e-5 * scale
        # One gradient for both sides, so that errors do not feed back through the loss.
        grad = grad.astype(np.float32)
        out.backward(torch.from_numpy(grad))
        collection.apply_gradients()
        grad = grad.astype(np.float64)
        share = grad[:, dim:] / reference.divisor(bags[1], size)
        reference.update([(rows[0], grad[bags[0], :dim]), (rows[1], share[bags[1]])], step)
    collection.check_invariants()
    (exported,) = collection.export_table("t")
    order = [int(np.flatnonzero(keys == key)[0]) for key in exported.keys.tolist()]
    assert len(order) == len(keys)
    for got, want in ((exported.values, reference.value), (exported.state, reference.state)):
        if not want.size:
            continue
        error = np.abs(got.numpy() - want[order])
        # Relative to the row's largest entry, and at least to the table's root mean square: a
        # single value may pass through zero.
        scale = np.abs(want[order]).max(axis=1, keepdims=True).clip(np.sqrt((want**2).mean()))
        assert (error <= 1e-5 * scale).all(), (error / scale).max()


CHANGES = {
    "learning_rate": 0.2,
    "weight_decay": 0.1,
    "clip_norm": 0.3,
    "weight_bound": 0.03,
    "eps": 0.1,
    "initial_accumulator": 0.5,
    "beta1": 0.5,
    "beta2": 0.5,
    "momentum": 0.5,
    "beta": 3.0,
    "l1": 0.2,
}


def settings_that_change(rule):
    fields = {name: CHANGES[name] for name in set(rule.model_fields) - {"kind", "schedule"}}
    schedules = [
        {"warmup_steps": 10},
        {"decay": "linear", "decay_steps": 10},
        {"decay": "cosine", "decay_steps": 10},
        {"decay": "exponential", "decay_steps": 10},
        {"decay": "linear", "decay_steps": 10, "end_factor": 0.5},
        {"decay": "linear", "decay_steps": 20},
    ]
    yield from ({name: value} for name, value in fields.items())
    yield from ({"schedule": Schedule(**schedule)} for schedule in schedules)


@pytest.mark.parametrize("rule", dict.fromkeys(type(rule) for rule in RULES.values()))
def test_every_hyper_parameter_changes_the_result(rule):
    results = {}
    for setting in [{}, *settings_that_change(rule)]:
        table = TableConfig(name="t", dim=4, optimizer=rule(**setting))
        feature = FeatureConfig(name="f", table="t")
        collection = EmbeddingCollection([table], [feature], num_threads=1)
        batch = KeyedJagged.pack({"f": Jagged.from_dense(torch.tensor([1, 2, 1]))})
        grad = torch.linspace(-1, 1, 12).reshape(3, 4)
        for step in range(5):
            collection(batch).backward(grad * (step + 1))
            collection.apply_gradients()
        collection.eval()
        results[str(setting)] = tuple(collection(batch).flatten().tolist())
    assert len(set(results.values())) == len(results), results


@pytest.mark.parametrize(
    "config", [rule.config for rule in optimizer._ALL], ids=lambda c: c.__name__
)
def test_settings_that_are_called_constant_are(config):
    table = TableConfig(name="t", dim=4, optimizer=config())
    hypers = optimizer.Hypers([table])
    is_constant = all(np.array_equal(hypers.at(0), hypers.at(step)) for step in (1, 2, 1000, 10**9))
    assert hypers.are_constant == is_constant
