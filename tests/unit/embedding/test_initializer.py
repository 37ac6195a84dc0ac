import numpy as np
import pytest
import torch

from penstock.config import SGD, Constant, Normal, TableConfig, Uniform
from penstock.embedding.host_store import HostStore
from penstock.embedding.rules.initializer import initial_values, table_seed

KEYS = np.concatenate([np.array([-(2**63), -1, 0, 1, 2**63 - 1]), np.arange(5000) * 7919]).astype(
    np.int64
)


@pytest.mark.parametrize("initializer", [Uniform(bound=0.3), Normal(std=0.7), Constant(value=-2.5)])
@pytest.mark.parametrize("dim", [1, 8, 33])
def test_core_and_numpy_agree_to_the_bit(initializer, dim):
    table = TableConfig(name="t", dim=dim, optimizer=SGD(), initializer=initializer)
    store = HostStore([table], seed=-5)
    expected = initial_values(initializer, -5, "t", KEYS, dim)
    assert np.array_equal(store.find(0, torch.from_numpy(KEYS)).values.numpy(), expected)
    assert np.array_equal(store.find_or_insert(0, torch.from_numpy(KEYS)).values.numpy(), expected)


def test_values_depend_on_seed_table_key_and_column():
    draw = lambda seed, table: initial_values(Uniform(), seed, table, KEYS[:100], 8)  # noqa: E731
    base = draw(0, "a")
    assert len(np.unique(base)) > 790
    assert (draw(1, "a") == base).mean() < 0.01
    assert (draw(0, "b") == base).mean() < 0.01
    assert np.array_equal(draw(0, "a"), base)


def test_moments_within_three_sigma():
    keys = np.arange(200_000, dtype=np.int64) * 3 - 300_000
    n = keys.size * 4
    uniform = initial_values(Uniform(bound=1.0), 1, "t", keys, 4).astype(np.float64)
    normal = initial_values(Normal(std=1.0), 1, "t", keys, 4).astype(np.float64)
    for values, variance, fourth in ((uniform, 1 / 3, 1 / 5), (normal, 1.0, 2.9)):
        assert abs(values.mean()) < 3 * np.sqrt(variance / n)
        assert abs(values.var() - variance) < 3 * np.sqrt((fourth - variance**2) / n)
    assert uniform.min() >= -1.0
    assert uniform.max() < 1.0
    assert np.abs(normal).max() <= 6.0
    columns = np.corrcoef(normal.T) - np.eye(4)
    assert np.abs(columns).max() < 4 / np.sqrt(keys.size)


def test_format_constants_never_change():
    # FORMAT: rows that no checkpoint holds are this function.
    assert table_seed(0, "user") == 0x475342D1E3E0DC4B
    keys = np.array([1, -1])
    assert initial_values(Uniform(), 0, "user", keys, 2).tolist() == [
        [-0.046586114913225174, -0.022721780464053154],
        [0.023096561431884766, -0.03817583993077278],
    ]
    assert initial_values(Normal(), 0, "user", keys, 2).tolist() == [
        [-0.019787443801760674, 0.013252105563879013],
        [-0.01729782111942768, -0.0005241393810138106],
    ]
