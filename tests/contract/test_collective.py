"""`Collective`, over torch.distributed's calls made of threads: as strict as Gloo about sizes."""

from types import SimpleNamespace

import pytest
import torch

from penstock.embedding.sharded import exchange
from penstock.embedding.sharded.exchange import Collective
from penstock.errors import GroupError
from tests.world.ranks import Rank, World


@pytest.fixture
def rank_of(monkeypatch):
    """Makes a `Collective` of a rank of a World, and counts its messages."""

    def all_to_all_single(out, rows, group):
        group.messages += 1
        # Gloo ends with an error of its own where sizes differ.
        came = group.ranks._all("rows", rows.clone())
        if any(each.shape != rows.shape for each in came):
            raise RuntimeError("gloo: sizes differ")
        out.copy_(torch.stack([each[group.ranks.rank] for each in came]))

    fake = SimpleNamespace(all_to_all_single=all_to_all_single, get_backend=lambda _: "gloo")
    monkeypatch.setattr(exchange, "distributed", fake)

    def made(ranks: Rank):
        group = SimpleNamespace(
            rank=lambda: ranks.rank, size=lambda: ranks.size, ranks=ranks, messages=0
        )
        return Collective(group, torch.device("cpu"))

    return made


@pytest.mark.parametrize(("num_tables", "messages"), [(1, 1), (64, 1), (65, 2), (300, 2)])
def test_headers_reach_each_rank_in_few_messages(rank_of, num_tables, messages):
    def of_rank(ranks):
        mine = rank_of(ranks)
        to_each = 1000 * ranks.rank + torch.arange(3)[:, None] * 500 + torch.arange(num_tables)
        return mine.headers("look-up", 1, to_each), mine.group.messages

    for rank, (came, number) in enumerate(World(3).run(of_rank)):
        wanted = 1000 * torch.arange(3)[:, None] + rank * 500 + torch.arange(num_tables)
        assert torch.equal(came, wanted)
        assert number == messages


@pytest.mark.parametrize("unlike", [(2, 3), (64, 65), (70, 300)])
def test_stores_of_unlike_numbers_of_tables_are_named(rank_of, unlike):
    def of_rank(ranks):
        with pytest.raises(GroupError) as caught:
            rank_of(ranks).headers(
                "update", 0, torch.zeros(2, unlike[ranks.rank], dtype=torch.int64)
            )
        return str(caught.value)

    for rank, said in enumerate(World(2).run(of_rank)):
        assert f"rank {rank} at call 1 of its {unlike[rank]} tables (update, 0)" in said
        assert f"rank {1 - rank} at call 1 of its {unlike[1 - rank]} tables" in said
