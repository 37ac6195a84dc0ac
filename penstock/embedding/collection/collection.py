"""`EmbeddingCollection`: tables without a vocabulary, in place of nn.EmbeddingBag.

```python
import torch
import torch.nn.functional as F
from penstock import Adagrad, EmbeddingCollection, FeatureConfig, Jagged, KeyedJagged, TableConfig

tables = [TableConfig(name="item", dim=16, optimizer=Adagrad(learning_rate=0.05))]
features = [FeatureConfig(name="clicked", table="item", pooling="mean")]
embeddings = EmbeddingCollection(tables, features)
head = torch.nn.Linear(16, 1)
optimizer = torch.optim.Adam(head.parameters())
keys = torch.randint(-(2**63), 2**63 - 1, (64, 3))  # [B, n] int64, any value
label = (keys[:, 0] > 0).float()
for _ in range(200):
    sparse = KeyedJagged.pack({"clicked": Jagged.from_dense(keys)})
    loss = F.binary_cross_entropy_with_logits(head(embeddings(sparse))[:, 0], label)
    loss.backward()
    optimizer.step(), optimizer.zero_grad()
    embeddings.apply_gradients()
torch.save({"embeddings": embeddings.state_dict(), "head": head.state_dict()}, "model.pt")
```
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from penstock.config import FeatureConfig, TableConfig
from penstock.embedding.checks import check_keys
from penstock.embedding.collection.attachment import Unattached
from penstock.embedding.collection.by_key import RowsByKey
from penstock.embedding.collection.graph_operator import (
    check_features,
    is_exported,
    look_up_in_graph,
    register,
)
from penstock.embedding.collection.pending import PendingGradients
from penstock.embedding.collection.row_clock import RowClock
from penstock.embedding.collection.table_module import TableModule
from penstock.embedding.collection.table_stores import (
    TableStats,
    TableStores,
    refuse_duplicates,
    unknown_table,
)
from penstock.embedding.collection.torch_idioms import (
    check_alone,
    check_averaged,
    check_traced,
    is_asked_for,
)
from penstock.embedding.collection.weight_gradient import ReadVectors, WeightedLookup
from penstock.embedding.retention import RetentionState
from penstock.embedding.shapes.arrangement import Arranged, Arrangement
from penstock.embedding.shapes.forms import BatchLike, Output, OutputShape, read_batch
from penstock.embedding.sharded.agreement import described
from penstock.embedding.sharded.store import AlikeRanks, Ranks
from penstock.embedding.store import (
    CURSOR_START,
    Candidates,
    PoolingPlan,
    Store,
)
from penstock.errors import ConfigError
from penstock.types import JaggedVectors, KeyedJagged


class LookUp(NamedTuple):
    """What a collection finds of a batch."""

    out: Tensor
    """[B, columns of the plans] float32 on the tables' device."""
    lookups: list[Any]
    """What the stores that are trained need to know of it, for `keep_gradient`."""
    vectors: ReadVectors | None
    """What the gradient of the weights needs, if it was asked for."""
    plans: tuple[PoolingPlan, ...]
    """Of every store: where its columns of `out` are."""


class EmbeddingCollection(RowsByKey, TableModule):
    """Pooled embeddings of every feature of a batch, and the optimizer step of their tables.

    In training mode a new key gets a row, if its table admits it. In evaluation mode, or under
    `torch.no_grad`, a missing key reads as its initial value, or the default row of a table that
    refuses keys, and no row is made; `num_missing` counts them.

    The tables are no torch parameters: torch's optimizers do not see them, and `apply_gradients`
    takes the place of `optimizer.step()`. `state_dict` holds them all the same, as torch's extra
    state; copies and pickles do, too (docs/torch.md). One parameter, `anchor`, stands for all of
    them: `requires_grad_(False)` freezes the tables, `.double()` and `.to(device)` say of which
    dtype and where outputs are, while the rows stay as and where they are.
    """

    def __init__(
        self,
        tables: Sequence[TableConfig],
        features: Sequence[FeatureConfig],
        *,
        seed: int = 0,
        num_threads: int | None = None,
        deterministic: bool = False,
        device: str | torch.device = "cpu",
        output: Output = "concatenated",
        group: distributed.ProcessGroup | Ranks | None = None,
    ) -> None:
        """Makes empty tables.

        Args:
          tables: with distinct names.
          features: with distinct names; the order is that of the output's columns.
          seed: of the initial values.
          num_threads: threads of one look-up or update; None: the cores this process may use.
          deterministic: an update has the same bits for any order of the samples, too; it takes
            longer. The number of threads never changes a bit; nor, in this mode, does the device.
          device: where the rows live: `cpu`, or a GPU, `cuda` or `cuda:1`. Batches may be given on
            the CPU all the same; the output is on this device.
          output: the shape of what `forward` returns.
          group: the ranks over which the tables are spread (docs/torch.md). Every rank makes the
            same collection, and makes the same calls in the same order. Gradients of the ranks are
            averaged, as DistributedDataParallel does; given `Ranks(group, "sum")`, added up.

        Raises:
          ConfigError: a name twice, or a feature of an unknown table; an output that the features
            cannot have; no such GPU, or no Triton; tables that cannot be spread, or that another
            rank made otherwise.
        """
        super().__init__()
        self.tables = tuple(tables)
        self.features = tuple(features)
        refuse_duplicates("table", [table.name for table in tables])
        refuse_duplicates("feature", [feature.name for feature in features])
        by_name = {table.name: table for table in tables}
        for feature in features:
            if feature.table not in by_name:
                raise ConfigError(unknown_table(feature, list(by_name)))
        self._output = OutputShape(output, features, tables)
        self.feature_shapes = self._output.shapes
        """Of each feature, in the order of the output's columns; not of pooling `none`."""
        self.width = sum(shape.width for shape in self.feature_shapes)
        """W, columns of the output."""
        self._options: dict[str, Any] = {
            "num_threads": num_threads or available_cores(),
            "deterministic": deterministic,
            "device": torch.device(device),
            "ranks": self._compared(group, seed, deterministic),
        }
        self._stores = self._make_stores(seed)
        self.device = self._stores.device
        """Where the rows live; the output too, unless the module was moved."""
        self.inputs = self.arrangement.inputs
        """Columns that a batch has, in order: the features' names, where none has an `input`."""
        self._sequences = torch.tensor(
            [f for f, feature in enumerate(features) if feature.pooling == "sequence"],
            dtype=torch.int64,
            device=self.device,
        )
        self.step = 0
        """Updates applied so far; schedules and Adam's bias correction count by it."""
        self.row_clock = RowClock()
        """The time by which rows age where the eviction of their table counts seconds; see
        `observe_times`.
        """
        self.num_missing = 0
        """Keys read without a row, in evaluation or frozen tables, since the beginning."""
        self.tables_in_state = True
        self.is_attached = False
        self.seed = seed
        """Of the initial values."""
        self.pending, self._attachment, self.unattached = PendingGradients(), None, Unattached(self)
        self.number = register(self)
        # Autograd calls backward only where an input needs a gradient; the tables are none.
        self.anchor = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=self.device))
        self.copied_at = None

    def _make_stores(self, seed: int) -> TableStores:
        return TableStores(self.tables, self.features, seed=seed, **self._options)

    def _compared(
        self, group: distributed.ProcessGroup | Ranks | None, seed: int, deterministic: bool
    ) -> Ranks | None:
        """The ranks, once all of them have said that they make this collection."""
        # Empty ones that are made of this one, perhaps by one rank alone, need not be compared.
        if group is None or isinstance(group, AlikeRanks):
            return group
        ranks = group if isinstance(group, Ranks) else Ranks(group)
        options: dict[str, object] = {"seed": seed, "deterministic": deterministic}
        options |= {"output": self._output.output, "reduction of gradients": ranks.reduction}
        ranks.check_alike(described(self.tables, self.features, **options))
        return AlikeRanks(*ranks)

    @property
    def ranks(self) -> Ranks | None:
        """Over whom the tables are spread; None: nobody else."""
        ranks: Ranks | None = self._options["ranks"]
        return None if ranks is None else Ranks(*ranks)

    @property
    def trained(self) -> list[tuple[Store, PoolingPlan]]:
        """What an update changes."""
        return self._stores.trained

    @property
    def arrangement(self) -> Arrangement:
        """How batches are laid out for the stores."""
        return self._stores.arrangement

    def forward(self, batch: BatchLike) -> Any:
        """Pools the keys of each sample.

        Args:
          batch: a KeyedJagged of this collection's inputs, in their order; or a dict with them, of
            keys [B] or [B, ...] (all of a sample's are one bag) or `Jagged` columns; or keys
            [B, F], one of each input.

        Returns:
          By the collection's `output`:

          - `concatenated`: [B, W] float32, W the sum of the features' widths: their vectors side by
            side, as `feature_shapes` says; an empty bag is zeros.
          - `by_feature`: a dict of them: pooled [B, D], sequences [B, max_keys, D], or [B, ..., D]
            where keys were given as [B, ...]; `JaggedVectors` of features of pooling `none`.
          - `stacked`: [B, F, D].

          Where the module was moved to another device or dtype, so is this.

        The batch is copied: its arrays may be used again at once. On a GPU that waits for a copy
        from pinned memory, unless `to_device` was called ahead.

        Raises:
          ConfigError: other features, or keys and offsets of a wrong type or shape; training in a
            process group of several ranks; a copy whose parameters alone were averaged.
          CapacityError: no memory for a new row, or for the look-up.
        """
        check_traced()
        sparse = read_batch(batch, self.inputs)
        ragged: dict[str, JaggedVectors] = {}
        is_traced = torch.compiler.is_compiling()
        if is_traced and self.arrangement.is_plain:
            pooled = look_up_in_graph(self, sparse)
        elif self.anchor.is_meta:
            self.check_batch(sparse)
            pooled = self.anchor.new_empty(sparse.batch_size, self.width)
        elif is_traced:
            if is_exported():
                raise ConfigError(
                    "torch.export of a collection with pooling max or none, inputs, padding or "
                    "hash stacks: what it reads depends on the keys; export the model behind its "
                    "vectors"
                )
            pooled, ragged = _look_up_apart(self, sparse)
        else:
            pooled, ragged = self._look_up_eagerly(sparse)
        return self._output.give(pooled, ragged, batch)

    def _look_up_eagerly(self, sparse: KeyedJagged) -> tuple[Tensor, dict[str, JaggedVectors]]:
        self.check_batch(sparse)
        arrangement = self.arrangement
        arranged = arrangement.arrange(sparse)
        trains = self.training and torch.is_grad_enabled() and self.anchor.requires_grad
        weights = arranged.sparse.weights
        raw: Tensor
        if weights is not None and weights.requires_grad and torch.is_grad_enabled():
            raw = WeightedLookup.apply(self.anchor, weights, self, arranged, trains)  # type: ignore[no-untyped-call]
        elif trains:
            raw = _PooledLookup.apply(self.anchor, self, arranged)  # type: ignore[no-untyped-call]
        else:
            raw = self.look_up(arranged, trains=False).out
        pooled, ragged = arrangement.finish(raw, arranged)
        if ragged:
            ragged = {
                name: JaggedVectors(each.values.to(self.anchor), each.offsets)
                for name, each in ragged.items()
            }
        return pooled.to(self.anchor), ragged

    def look_up(self, arranged: Arranged, *, trains: bool, reads_vectors: bool = False) -> LookUp:
        """The look-up of `forward`, without autograd.

        Args:
          arranged: a batch that was checked.
          trains: whether new keys get rows.
          reads_vectors: whether the gradient of the weights will be asked for.
        """
        sparse, layout = arranged.sparse, arranged.layout
        if sparse.weights is not None and sparse.weights.requires_grad:
            sparse = replace(sparse, weights=sparse.weights.detach())
        stores = self._stores
        sparse = stores.on_device(sparse, layout)
        check_averaged(self)
        if trains:
            if self.ranks is None:
                check_alone()
            self.check_attached()
            stores.advance(self.row_clock.clock(self.step))
        out, lookups = stores.pooled_lookup(
            sparse, layout, insert=trains, reads_vectors=reads_vectors
        )
        vectors = stores.read_looked_up(sparse, lookups) if reads_vectors else None
        read = [n for n, group in enumerate(stores.groups) if not (trains and group.trainable)]
        if read:
            self.num_missing += sum(lookups[n].num_missing for n in read)
            lookups = [lookup for n, lookup in enumerate(lookups) if n not in read]
        plans = (layout or stores.arrangement.layout).plans
        return LookUp(out, lookups, vectors, plans)

    def to_device(self, sparse: KeyedJagged) -> KeyedJagged:
        """The batch as the tables' device takes it, checked; on the CPU it is the batch itself.

        `forward` does it too. Called ahead, on another stream and with pinned memory, the copy
        runs beside the step before; pinned arrays must stay as they are until it has run.

        Raises:
          ConfigError: as `forward`.
        """
        self.check_batch(sparse)
        if not self.arrangement.is_plain:
            # What the stores read of it is made, and checked, when it is looked up.
            return sparse.to(self.device, non_blocking=True)
        return self._stores.on_device(sparse, non_blocking=True)

    def observe_times(self, event_time: Tensor) -> None:
        """Tells when the samples of the next batch happened, by which rows then age.

        Rows age by seconds where the eviction of their table has that unit; without this, by the
        machine's clock. See `RowClock` for what becomes of times that are far ahead.

        Args:
          event_time: [B] int64 ms since 1970 UTC, on the CPU.
        """
        self.row_clock.observe(event_time)

    def sequence_lengths(self, sparse: KeyedJagged) -> Tensor:
        """Keys of each sample's sequences: what tells vectors from padding.

        Holes that a feature keeps count as keys.

        Returns:
          [B, S] int64, S the number of features of pooling `sequence`, in their order.
        """
        size = sparse.batch_size
        if not len(self._sequences):
            return torch.zeros(size, 0, dtype=torch.int64, device=self.device)
        arrangement = self.arrangement
        if arrangement.is_plain:
            lengths = sparse.offsets.to(self.device).diff().view(len(sparse.features), size)
        else:
            lengths = arrangement.sequence_lengths(sparse).to(self.device)
        return lengths[self._sequences].t().contiguous()

    def export_candidates(self, table: str, batch_keys: int = 1 << 20) -> Iterator[Candidates]:
        """Copies the counted keys of a table, as `export_table` does its rows."""
        store, number = self._stores.find_table(table)
        cursor = CURSOR_START
        while True:
            candidates, cursor = store.export_candidates(number, cursor, batch_keys)
            if not len(candidates.keys):
                return
            yield Candidates(*(part.cpu() for part in candidates))

    def import_candidates(self, table: str, candidates: Candidates) -> None:
        """Sets the counts of keys of a table with `min_count`."""
        store, number = self._stores.find_table(table)
        store.import_candidates(number, candidates)

    def retention_state(self, table: str) -> RetentionState:
        """Default row, counters and clock of a table."""
        store, number = self._stores.find_table(table)
        return store.retention_state(number)

    def set_retention_state(self, table: str, state: RetentionState) -> None:
        """Inverse of `retention_state`; before rows are imported."""
        store, number = self._stores.find_table(table)
        store.set_retention_state(number, state)

    def like_new(self, *, seed: int) -> EmbeddingCollection:
        """Makes an empty collection of the same tables, features and settings."""
        return EmbeddingCollection(
            self.tables,
            self.features,
            seed=seed,
            output=self._output.output,
            group=self._options["ranks"],
            **{name: value for name, value in self._options.items() if name != "ranks"},
        )

    def take_over(self, other: EmbeddingCollection) -> None:
        """Takes the tables of `other`, made by `like_new`, in the place of its own.

        Gradients that are not applied yet are dropped. `other` is not to be used any more.
        """
        self._stores, self.seed, self.step = other._stores, other.seed, other.step
        self.row_clock = replace(other.row_clock, max_jump_s=self.row_clock.max_jump_s)
        self.copied_at = None
        self.discard_gradients()

    def _open(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # type: ignore[no-untyped-call]
        self.pending, self._attachment, self.unattached = PendingGradients(), None, Unattached(self)
        self.number = register(self)
        self._stores = self._make_stores(self.seed)

    def table_stats(self) -> list[TableStats]:
        """Rows and bytes of each table, in the order of `tables`."""
        return self._stores.table_stats()

    def check_invariants(self) -> None:
        """Raises AssertionError if a store is inconsistent. Reads everything: for tests."""
        self._stores.check_invariants()

    def check_batch(self, sparse: KeyedJagged) -> None:
        """Raises ConfigError if a batch has other columns than `inputs`, or not of integers."""
        check_features(sparse, self.inputs)
        check_keys(sparse, self.device)


class _PooledLookup(torch.autograd.Function):
    """The boundary to autograd: forward looks rows up, backward keeps their gradient."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, collection: EmbeddingCollection, arranged: Arranged
    ) -> Tensor:
        found = collection.look_up(arranged, trains=True)
        ctx.collection, ctx.lookups, ctx.plans = collection, found.lookups, found.plans
        return found.out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        if is_asked_for(ctx.next_functions[0][0]):
            ctx.collection.keep_gradient(ctx.lookups, ctx.plans, grads[0])
        return None, None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _look_up_apart(
    collection: EmbeddingCollection, sparse: KeyedJagged
) -> tuple[Tensor, dict[str, JaggedVectors]]:
    """Outside of the graph: what is read depends on the keys, and on how many there are."""
    return collection._look_up_eagerly(sparse)


def available_cores() -> int:
    """Cores that this process may use: its share, where LOCAL_WORLD_SIZE ranks are on a machine."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    sharing = int(ranks) if ranks.isdecimal() else 1
    return max(1, cores_of_machine() // max(1, sharing))


def cores_of_machine() -> int:
    """Cores that the system lets this process run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
