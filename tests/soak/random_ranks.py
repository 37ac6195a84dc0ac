"""Random schedules of ranks against one store that sees every rank's samples, bit by bit.

    python tests/soak/random_ranks.py --schedules 10000 --seed 1

A schedule is some steps on 1 to 4 ranks of a faulty world (tests/world): samples dealt at random,
ranks without any, one or two look-ups an update, evaluation and erasing in between, rows that
expire, keys that are refused by count or by draw, any optimizer. The oracle is a store in one
process, in deterministic mode.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from penstock.config import (
    FTRL,
    LAMB,
    SGD,
    Adagrad,
    Adam,
    AdmitAtRandom,
    AdmitFrequent,
    Eviction,
    MomentumSGD,
    RowWiseAdagrad,
)
from penstock.embedding.host_store import HostStore
from penstock.embedding.retention import Clock
from penstock.embedding.store import PooledGradient
from tests.contract.test_sharded_retention import check_alike
from tests.contract.test_sharded_store import PLAN, packed, samples, sharded, tables
from tests.world.ranks import World

RULES = (SGD, Adagrad, RowWiseAdagrad, Adam, MomentumSGD, FTRL, LAMB)


def step(store, parts, number, *, evaluates, erased):
    """One update of all of `parts`, each a look-up; what was read."""
    store.advance(Clock(number, 0))
    gradients, outs = [], []
    for bags, weights, grad in parts:
        batch = packed(bags, weights)
        out = torch.full((len(bags), PLAN.stride), 7.0)
        if evaluates:
            store.pooled_lookup(PLAN, batch, insert=False, out=out)
            outs.append(out.clone())
        lookup = store.pooled_lookup(PLAN, batch, insert=True, out=out)
        gradients.append(PooledGradient(lookup, batch, grad.contiguous()))
        outs.append(out)
    store.apply_gradients(PLAN, gradients, number)
    if erased is not None:
        store.erase(0, erased)
    return outs


def take(part, chosen):
    """Some samples of a part."""
    bags, weights, grad = part
    some = None if weights is None else [weights[i] for i in chosen]
    return [bags[i] for i in chosen], some, grad[chosen]


def admission_of(rng):
    """None, by count or by draw; most keys of a schedule come a few times."""
    kind = rng.integers(4)
    if kind == 1:
        return AdmitAtRandom(probability=float(rng.uniform(0.05, 0.95)))
    half_life = int(rng.integers(1, 4)) if kind == 2 else None
    return AdmitFrequent(min_count=int(rng.integers(2, 7)), half_life_steps=half_life)


def run(seed: int) -> int:
    """One schedule; returns the rows at its end. AssertionError: ranks differ from the oracle."""
    rng = np.random.default_rng(seed)
    ranks = int(rng.integers(1, 5))
    rule = RULES[rng.integers(len(RULES))]
    fields: dict[str, object] = {}
    if rng.random() < 0.3:
        fields["eviction"] = Eviction(ttl=int(rng.integers(1, 4)))
    if rng.random() < 0.6:
        fields["admission"] = admission_of(rng)
    if rng.random() < 0.1:
        # Room for all of them: refuses keys by its rules, but never does.
        fields["max_bytes"] = 1 << 20
    dtype = "bfloat16" if rng.random() < 0.3 else "float32"
    configs = tables(rule(), dtype=dtype, **fields)
    alone = HostStore(configs, seed=seed, deterministic=True)
    plan = []
    for number in range(int(rng.integers(1, 6))):
        weighted = bool(rng.random() < 0.5)
        sizes = rng.integers(0, 12, int(rng.integers(1, 3)))
        parts = [samples(int(n), int(rng.integers(1 << 30)), weighted=weighted) for n in sizes]
        owners = [rng.integers(0, ranks, int(n)) for n in sizes]
        kinds = {
            "evaluates": bool(rng.random() < 0.3),
            "erased": torch.from_numpy(rng.integers(-9, 9, 3)) if rng.random() < 0.3 else None,
        }
        outs = step(alone, parts, number, **kinds)
        plan.append((number, parts, owners, kinds, outs))

    def of_rank(exchange):
        store = sharded(exchange, configs, seed=seed)
        for number, parts, owners, kinds, outs in plan:
            chosen = [np.flatnonzero(of_part == exchange.rank) for of_part in owners]
            mine = [take(part, which) for part, which in zip(parts, chosen, strict=True)]
            each = 1 + kinds["evaluates"]
            for n, out in enumerate(step(store, mine, number, **kinds)):
                assert torch.equal(out, outs[n][chosen[n // each]]), f"seed {seed}, step {number}"
        store.check_invariants()
        return store

    made = World(ranks, seed=seed).run(of_rank)
    try:
        check_alike(made, alone, configs)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    return sum(alone.num_rows(table) for table in range(len(configs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin, rows, told = time.perf_counter(), 0, 0
    for number in range(options.schedules):
        rows += run(options.seed * 10_000_000 + number)
        if time.perf_counter() - begin > 10 * (told + 1):
            told += 1
            print(f"{number + 1} of {options.schedules} schedules agree", flush=True)
    print(f"{options.schedules} schedules agree, {rows} rows at their ends")


if __name__ == "__main__":
    main()
