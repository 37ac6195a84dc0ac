"""What torch asks of a module that has state and gradients, for one that has tables."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

from penstock.embedding.collection.anchor_gradient import AnchorGradient
from penstock.embedding.collection.attachment import Attachment, Unattached
from penstock.embedding.collection.loss_scale import scale_of_this_pass
from penstock.embedding.collection.pending import PendingGradients, describe_non_finite
from penstock.embedding.collection.table_files import load_tables, save_tables
from penstock.embedding.collection.table_state import copy_tables, pack_tables, unpack_tables
from penstock.embedding.store import PooledLookup, PoolingPlan
from penstock.errors import ConfigError, NonFiniteError

if TYPE_CHECKING:
    from penstock.embedding.collection.collection import EmbeddingCollection

# Attributes that belong to one process and one collection.
_OF_PROCESS = frozenset({"_attachment", "_stores", "pending", "unattached"})


class TableModule(nn.Module):
    """An `EmbeddingCollection`, its only subclass: state, copies, gradients, optimizer."""

    anchor: nn.Parameter
    """Stands for the tables where torch asks for parameters; its value means nothing."""
    copied_at: int | None
    """Of a copy that is not trained: the anchor's version when it was made."""
    tables_in_state: bool
    """Whether `state_dict` holds the tables. False, for tables too large for that: it holds their
    step alone, and `load_state_dict` wants `load_tables` to have been called before.
    """
    is_attached = False
    """Whether an optimizer's step is to update the tables; see `attach`."""
    pending: PendingGradients
    """The gradients that are not applied yet; attached, see `Attachment.settle`."""
    _attachment: Attachment | None
    """None also in a copy of an attached collection, which its own optimizer must be told."""
    unattached: Unattached
    """What torch sees of the gradients where there is no attachment."""

    def _open(self, state: dict[str, Any]) -> None:
        """Takes attributes from `_state_but_tables` of another module; tables are empty."""
        raise NotImplementedError

    @property
    def _collection(self) -> EmbeddingCollection:
        return cast("EmbeddingCollection", self)

    def apply_gradients(self, skip: Tensor | None = None) -> None:
        """One optimizer step on all gradients of the backward passes since the last call.

        Several backward passes add up, as in torch; a call without any changes nothing but the
        step. Of an attached collection `optimizer.step()` does it.

        Args:
          skip: [] float32 on the tables' device, alike on all ranks; where it is 1 nothing changes
            but the step, and the gradients are gone. Then they are not checked here, and no GPU is
            waited for: `pending.evidence` tells of them on the device.

        Raises:
          ConfigError: a gradient was changed in place since its backward pass, or is that of an
            output whose gradient was applied before; or the collection is attached. Nothing is
            applied; the gradients stay until `discard_gradients`.
          NonFiniteError: a gradient is NaN or infinite; as before.
          CapacityError: no memory. Nothing is applied; the gradients stay, and may be applied
            again.
          PartialUpdateError: there was none when some rows had taken the step already; the message
            says which. The gradients are gone; go on from a checkpoint.
        """
        if self.is_attached:
            raise ConfigError(
                "apply_gradients of a collection that is attached to an optimizer, whose step() "
                "updates the tables: leave it out, or call detach_optimizer()"
            )
        self._settle()
        if skip is None:
            self.refuse_non_finite()
        try:
            self.update(1.0, skip)
        finally:
            if not self.pending:
                self.unattached.hide()

    def check_gradients(self) -> None:
        """Refuses gradients that are NaN or infinite; each is looked at once.

        Raises:
          NonFiniteError: one is; names features, tables and a sample. The gradients stay until
            `discard_gradients` or `zero_grad`.
        """
        self._settle()
        self.refuse_non_finite()

    def refuse_non_finite(self) -> None:
        """As `check_gradients`, of those that are known to be there still."""
        bad = self.pending.first_non_finite()
        if bad is not None:
            collection = self._collection
            message = describe_non_finite(*bad, collection.features, collection.tables)
            if self.pending.is_of_scaled_loss:
                message += (
                    ". A GradScaler has scaled the loss, until gradients overflow: "
                    "attach(optimizer) lets it skip such steps, or call discard_gradients() "
                    "where it skips one"
                )
            raise NonFiniteError(message)

    def discard_gradients(self) -> None:
        """Forgets the gradients that are not applied yet, as `zero_grad` does when attached."""
        self.pending.clear()
        self.unattached.hide()
        if self._attachment is not None:
            self._attachment.hide()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes one `optimizer.step()` update the tables too, in place of `apply_gradients`.

        The optimizer gets a param group for the tables, with `anchor` in it and, as `lr`, the
        largest of their learning rates. Schedulers act on it as on any group: at each step all
        tables' rates, with their own schedules, are multiplied by what it is then over what it was.
        The group's other settings mean nothing to tables, which have their own.

        `zero_grad` of optimizer and modules drops the tables' gradients with the dense ones;
        GradScaler unscales them, and skips a step for them; torch's clip_grad_norm_ counts their
        norm and scales them (see `gradient_norm`). A step without a backward pass before it does
        nothing to tables.

        Raises:
          ConfigError: attached already; an optimizer that calls its closure several times a step
            (LBFGS), is wrapped, or has a scheduler already.
        """
        if self._attachment is not None and self._attachment.is_alive:
            raise ConfigError(
                "this collection is attached to an optimizer already: one optimizer updates its "
                "tables; call detach_optimizer() first"
            )
        self._attachment = Attachment(self._collection, optimizer)
        self.is_attached = True
        self.unattached.hide()
        self.anchor.grad = None
        if self.pending:
            self._attachment.show()

    def detach_optimizer(self) -> None:
        """Ends `attach`: the optimizer loses the tables' group; gradients are dropped."""
        self.pending.clear()
        if self._attachment is not None:
            self._attachment.end()
        self._attachment, self.is_attached = None, False

    def check_attached(self) -> None:
        """Refuses to train a copy of an attached collection that no optimizer knows.

        Raises:
          ConfigError: this is one.
        """
        if self.is_attached and (self._attachment is None or not self._attachment.is_alive):
            raise ConfigError(
                "this collection was attached to an optimizer, and is a copy of that one, or the "
                "optimizer is gone: attach it to its own optimizer (a copied one keeps the tables' "
                "group and its rate), or call detach_optimizer() to use apply_gradients"
            )

    def keep_gradient(
        self,
        lookups: Sequence[PooledLookup],
        plans: Sequence[PoolingPlan],
        grad: Tensor,
    ) -> None:
        """Keeps the gradient of a look-up's output, perhaps uncopied, until it is applied.

        Args:
          lookups: of the output, one a trained store.
          plans: of every store.
          grad: [B, columns of the plans].

        Raises:
          ConfigError: torch's compiled autograd runs the backward pass.
        """
        if torch.compiler.is_compiling() or compiled_autograd.in_compiled_autograd_region:
            raise ConfigError(
                "torch._dynamo's compiled autograd runs the backward pass, in which tables' "
                "gradients get lost: turn it off; torch.compile compiles a model's backward pass "
                "without it"
            )
        scale = None
        if self._attachment is None:
            self.unattached.check_applied()
            scale = scale_of_this_pass()
        else:
            self._settle()
        grad = grad.to(self._collection.device, torch.float32).contiguous()
        self.pending.add(lookups, plans, grad, scale)
        (self._attachment or self.unattached).show()

    def set_learning_rate(self, table: str, learning_rate: float) -> None:
        """Changes the learning rate of one table, from its next step on.

        As if its optimizer had been configured so: its schedule goes on, copies have it, and of an
        attached collection the group's `lr` multiplies it as before. A `state_dict` holds no rates.

        Raises:
          ConfigError: no such table, or a rate that is no number above 0.
        """
        collection = self._collection
        store, number = collection._stores.find_table(table)
        store.set_learning_rate(number, learning_rate)
        changed = store.tables[number]
        collection.tables = tuple(
            changed if each.name == table else each for each in collection.tables
        )

    def scale_gradients(self, factor: Tensor | float) -> None:
        """Multiplies the gradients that are not applied yet by one number."""
        self._settle()
        self.pending.scale(factor)

    def gradient_norm(self, norm_type: float = 2.0) -> Tensor:
        """Norm of the gradients that are not applied yet, [] float32 on the tables' device.

        The p-norm of all columns of each row's gradient, summed over the samples and features that
        read it: as of the coalesced gradients of sparse nn.EmbeddingBags. Keys that were refused a
        row count as one, their table's default row. It takes about as long as an update.

        Args:
          norm_type: p, above 0, or infinity.

        Raises:
          ConfigError: another `norm_type`; or a gradient was changed since its backward pass.
        """
        if not norm_type > 0:
            raise ConfigError(f"norm_type {norm_type}: expected a number above 0, or infinity")
        self._settle()
        collection = self._collection
        norms = [
            torch.as_tensor(norm, dtype=torch.float64, device=collection.device)
            for norm in self.pending.norms(collection.trained, norm_type)
        ]
        if not norms:
            return torch.zeros((), device=collection.device)
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        return total.to(torch.float32)

    def _settle(self) -> None:
        if self._attachment is None:
            self.unattached.settle()
        elif not self._attachment.settle():
            self.pending.clear()

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> TableModule:
        """Moves or converts parameters; what stands for gradients has no data to be converted."""
        gradient = self.anchor.grad
        if not isinstance(gradient, AnchorGradient):
            return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]
        self.anchor.grad = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        shown_by = gradient.shown_by()
        if shown_by is not None and shown_by.stands_for(gradient):
            shown_by.show_anew()
        return self

    def update(self, rate_factor: float, skip: Tensor | None = None) -> None:
        """One step of the tables, all their learning rates multiplied by `rate_factor`."""
        collection = self._collection
        try:
            self.pending.apply(collection.trained, collection.step, rate_factor, skip)
        finally:
            # Also where some rows have taken it: no number is taken twice.
            if not self.pending:
                collection.step += 1
                self.copied_at = None

    def get_extra_state(self) -> Tensor:
        """All that the tables hold, for `state_dict`: [n] uint8, a copy; see `table_state`."""
        return pack_tables(self._collection, rows=self.tables_in_state)

    def set_extra_state(self, state: Any) -> None:
        """Inverse of `get_extra_state`, for `load_state_dict`: replaces everything there was.

        Raises:
          CheckpointError: of other tables, or changed since; nothing has changed then.
        """
        unpack_tables(state, self._collection)

    def save_tables(self, path: str | os.PathLike[str]) -> None:
        """Writes the tables as a directory of files; needs little memory of its own.

        Returns once the disk has everything. A directory that it wrote before is replaced, whole.

        Raises:
          CheckpointError: the disk is full or fails, or something else is at `path`; what was
            there stays.
        """
        save_tables(path, self._collection)

    def load_tables(self, path: str | os.PathLike[str]) -> None:
        """Reads what `save_tables` wrote, or the tables of a run's checkpoint: replaces them all.

        Raises:
          CheckpointError: missing, damaged, or of other tables; nothing has changed then.
          CapacityError: no memory: rows there were and those read are there together for a while.
        """
        load_tables(path, self._collection)

    def __getstate__(self) -> dict[str, Any]:
        return {**_state_but_tables(self), "_packed": pack_tables(self._collection)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        packed = state.pop("_packed")
        self._open(state)
        unpack_tables(packed, self._collection)

    def __deepcopy__(self, memo: dict[int, Any]) -> TableModule:
        state = _state_but_tables(self)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin._open(copy.deepcopy(state, memo))
        copy_tables(self._collection, twin._collection)
        twin.copied_at = twin.anchor._version
        return twin

    def __prepare_scriptable__(self) -> TableModule:
        raise ConfigError(
            "torch.jit.script of an EmbeddingCollection, whose tables are no code of TorchScript: "
            "use torch.export.export of the eval form, torch.compile, or script the model behind "
            "its vectors"
        )

    def _replicate_for_data_parallel(self) -> TableModule:
        raise ConfigError(
            "nn.DataParallel of an EmbeddingCollection: its copies would train the same tables at "
            "once; wrap the dense part alone, or use DistributedDataParallel and "
            "EmbeddingCollection(group=...)"
        )


def _state_but_tables(module: TableModule) -> dict[str, Any]:
    """Attributes that can be copied: gradients that are not applied yet stay behind.

    Raises:
      ConfigError: its tables are spread over ranks.
    """
    if module._collection.ranks is not None:
        raise ConfigError(
            "a collection over ranks is not copied or pickled: its process group cannot be; "
            "make another one, and give it this one's state_dict"
        )
    return {name: value for name, value in vars(module).items() if name not in _OF_PROCESS}
