"""Ranks that made unlike collections are told so, all of them, with what differs."""

import pytest

from penstock import SGD, Adam, ConfigError, FeatureConfig, TableConfig
from penstock.embedding.sharded.agreement import check_made_alike, described
from tests.world.ranks import World


def made(tables=None, features=None, **options):
    table = {"name": "t", "dim": 4, "optimizer": SGD(learning_rate=0.5)}
    feature = {"name": "f", "table": "t", "pooling": "sum"}
    return described(
        [TableConfig(**{**table, **each}) for each in tables or [{}]],
        [FeatureConfig(**{**feature, **each}) for each in features or [{}]],
        **{"seed": 0, "deterministic": False, **options},
    )


UNLIKE = {
    r"table 't': dim is {0:4|8}": made([{"dim": 8}]),
    r"table 't': dtype is {0:\"float32\"|\"bfloat16\"}": made([{"dtype": "bfloat16"}]),
    r"table 't': optimizer learning_rate is {0:0.5|0.25}": made([
        {"optimizer": SGD(learning_rate=0.25)}
    ]),
    r"table 't': optimizer beta1 is {0:none|0.9}": made([{"optimizer": Adam(learning_rate=0.5)}]),
    r"the order of tables is {0:\[\"t\"\]|\[\"t\", \"u\"\]}": made([{}, {"name": "u"}]),
    r"the order of features is {0:\[\"f\"\]|\[\"g\"\]}": made(features=[{"name": "g"}]),
    r"feature 'f': pooling is {0:\"sum\"|\"mean\"}": made(features=[{"pooling": "mean"}]),
    r"seed is {0:0|7}": made(seed=7),
    r"deterministic is {0:false|true}": made(deterministic=True),
}


def in_words(pattern, odd, rank, size):
    """What `rank` of `size` says where `odd` alone made another one."""
    ours, its = pattern[pattern.index("{0:") + 3 : -1].split("|")
    start = pattern[: pattern.index("{0:")]
    other = odd if rank != odd else 0 if odd else 1
    mine, theirs = (its, ours) if rank == odd else (ours, its)
    return f"rank {rank} and rank {other} of {size} .*{start}{mine} on rank {rank}, {theirs} on"


@pytest.mark.parametrize("odd", [0, 2])
@pytest.mark.parametrize("pattern", UNLIKE)
def test_what_differs_is_named_on_every_rank(pattern, odd):
    def of_rank(exchange):
        mine = UNLIKE[pattern] if exchange.rank == odd else made()
        wanted = in_words(pattern, odd, exchange.rank, exchange.size)
        with pytest.raises(ConfigError, match=wanted):
            check_made_alike(exchange, mine)

    World(3).run(of_rank)


@pytest.mark.parametrize("size", [1, 3])
def test_alike_collections_pass(size):
    def of_rank(exchange):
        check_made_alike(exchange, made([{}, {"name": "u"}]))

    World(size).run(of_rank)


def test_many_differences_are_counted():
    def of_rank(exchange):
        tables = [{"name": f"t{n}", "dim": 4 + 4 * exchange.rank} for n in range(6)]
        with pytest.raises(ConfigError, match="'t3': dim is . on rank ., . on . and 2 more"):
            check_made_alike(exchange, made(tables))

    World(2).run(of_rank)
