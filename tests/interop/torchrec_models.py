"""TorchRec's own models with this project's tables in the place of theirs.

No test of the suite: TorchRec is no requirement. Make an environment beside the project's (torch
2.13, fbgemm-gpu-cpu 1.8.0; torchrec 1.8.0 with `--no-deps`; tensordict, torchmetrics 1.0.3, tqdm,
pyre-extensions), install the project there, and

    python tests/interop/torchrec_models.py --record benchmarks/results/torchrec_models_202611.jsonl

Each model is trained twice from the same weights on the same batches, once with TorchRec's
EmbeddingBagCollection and once with ours, dense parts by SGD, tables by each optimizer of
TorchRec's that both have, for twenty seeds. Recorded is, by seed, the largest difference of losses,
and of weights relative to the largest weight of their table or layer.

Losses may differ by 1e-6. Weights too, but for those that TorchRec itself does not tell to 1e-6:
Adagrad divides a gradient by the root of the sum of squares so far, so that of a first one, where
its terms cancel out, g / |g|, rounding is all there is; and a ReLU's input may be within rounding
of 0. So TorchRec trains beside itself, in the same run: with the samples of each batch in another
order, three times, and in float64. A weight of ours may differ by 1e-6 and `OWN` times the most
that this weight differs among those. The record has, of the weight that differs most, how much
TorchRec's own does, and the smallest gradient other than 0 that it has had.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchrec
from torch import Tensor, nn
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad as TheirRowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from penstock.config import SGD, Adagrad, RowWiseAdagrad, TableConfig
from penstock.embedding.interop import (
    TorchRecBags,
    TorchRecSequences,
    export_state_dict,
    import_state_dict,
)

STEPS, BATCH, DENSE, DIM, ROWS = 30, 64, 5, 8, 50
FEATURES = ["f0", "f1", "f2", "f3"]
RATE, EPS = 0.05, 1e-8
LIMIT = 1e-6
OWN = 8
ORDERS = 3
SEEDS = 20

Batch = tuple[Tensor, KeyedJaggedTensor, Tensor]


def configs(is_shared: bool = False) -> list[EmbeddingBagConfig]:
    """Three tables, one of two features; shared: a feature that two tables read."""
    read = [["f0"], ["f1", "f2"], ["f3", "f0"] if is_shared else ["f3"]]
    poolings = [PoolingType.SUM, PoolingType.MEAN, PoolingType.SUM]
    return [
        EmbeddingBagConfig(
            name=f"t{n}",
            embedding_dim=DIM,
            num_embeddings=ROWS,
            feature_names=names,
            pooling=pooling,
        )
        for n, (names, pooling) in enumerate(zip(read, poolings, strict=True))
    ]


def models(bags: Callable[[], nn.Module]) -> dict[str, Callable[[], nn.Module]]:
    """TorchRec's models over a collection."""
    return {
        "DLRM": lambda: DLRM(bags(), DENSE, [16, DIM], [16, 1]),
        "DLRM_DCN": lambda: DLRM_DCN(bags(), DENSE, [16, DIM], [16, 1], 2, 4),
        "SimpleDeepFMNN": lambda: SimpleDeepFMNN(DENSE, bags(), 16, 8),
    }


def batches(steps: int, seed: int) -> Iterator[Batch]:
    """Numbers, keys and labels; bags of none to five keys."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        lengths = torch.randint(0, 6, (len(FEATURES) * BATCH,), generator=generator)
        keys = torch.randint(0, ROWS, (int(lengths.sum()),), generator=generator)
        kjt = KeyedJaggedTensor(keys=FEATURES, values=keys, lengths=lengths)
        numbers = torch.randn(BATCH, DENSE, generator=generator)
        yield numbers, kjt, (numbers[:, 0] > 0).float()[:, None]


RULES: dict[str, tuple[Any, Callable[[Tensor], torch.optim.Optimizer]]] = {
    "sgd": (SGD(learning_rate=RATE), lambda p: torch.optim.SGD(p, lr=RATE)),
    "adagrad": (
        Adagrad(learning_rate=RATE, eps=EPS),
        lambda p: torch.optim.Adagrad(p, lr=RATE, eps=EPS),
    ),
    "row_wise_adagrad": (
        RowWiseAdagrad(learning_rate=RATE, eps=EPS),
        lambda p: TheirRowWiseAdagrad(p, lr=RATE, eps=EPS),
    ),
}


class Twins:
    """A model of TorchRec's, and the same one with our tables."""

    def __init__(self, name: str, rule: str, seed: int) -> None:
        torch.manual_seed(seed)
        ours_rule, make = RULES[rule]
        self.theirs = models(lambda: EmbeddingBagCollection(tables=configs()))[name]()
        made = models(
            lambda: TorchRecBags(
                configs(),
                make_table=lambda table, dim: TableConfig(name=table, dim=dim, optimizer=ours_rule),
            )
        )
        self.ours = made[name]()
        self.tables = next(
            part.collection for part in self.ours.modules() if isinstance(part, TorchRecBags)
        )
        first = next(batches(1, seed))
        for model in (self.theirs, self.ours):
            model.eval()
            model(*first[:2])  # some of their layers are made at the first batch
            model.train()
        dense = {
            key: value
            for key, value in self.theirs.state_dict().items()
            if "embedding_bags" not in key
        }
        self.ours.load_state_dict(dense, strict=False)
        import_state_dict(self.tables, self.theirs.state_dict())
        names = dict(self.theirs.named_parameters())
        bags = {key: value for key, value in names.items() if "embedding_bags" in key}
        self.their_tables = KeyedOptimizerWrapper(bags, make)
        self.their_dense = torch.optim.SGD(
            [value for key, value in names.items() if key not in bags], lr=RATE
        )
        self.our_dense = torch.optim.SGD(
            [value for key, value in self.ours.named_parameters() if not key.endswith(".anchor")],
            lr=RATE,
        )

    def step_theirs(self, batch: Batch) -> float:
        """One step with TorchRec's tables."""
        return step(self.theirs, [self.their_tables, self.their_dense], batch)

    def step_ours(self, batch: Batch) -> float:
        """One step with ours."""
        loss = step(self.ours, [self.our_dense], batch)
        self.tables.apply_gradients()
        return loss

    def our_weights(self) -> dict[str, Tensor]:
        """All there are, by TorchRec's names."""
        rows, _ = export_state_dict(self.tables, {table.name: ROWS for table in self.tables.tables})
        dense = self.ours.state_dict()
        return {
            name: rows["embedding_bags." + name.split("embedding_bags.")[1]]
            if "embedding_bags" in name
            else dense[name]
            for name in self.theirs.state_dict()
        }


class Beside:
    """TorchRec's model once more, that rounds otherwise: see the head of this file."""

    def __init__(self, twins: Twins, order: int | None) -> None:
        """As it is by now.

        Args:
          order: seed of the order of samples; None: as they are, in float64.
        """
        parts = twins.theirs, twins.their_tables, twins.their_dense
        self.model, self.tables, self.dense = copy.deepcopy(parts)
        self.generator = None if order is None else torch.Generator().manual_seed(order)
        self.smallest: dict[str, Tensor] = {}
        """Gradients other than 0, by parameter; in float64 alone."""
        if order is None:
            self.model.double()
            for state in self.tables._optimizer.state.values():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.numel() > 1:
                        state[name] = value.double()

    def step(self, batch: Batch) -> None:
        """One step."""
        numbers, kjt, labels = batch
        if self.generator is None:
            batch = numbers.double(), kjt, labels.double()
        else:
            order = torch.randperm(BATCH, generator=self.generator)
            bags = kjt.values().split(kjt.lengths().tolist())
            places = [f * BATCH + n for f in range(len(FEATURES)) for n in order.tolist()]
            values = torch.cat([bags[place] for place in places])
            kjt = KeyedJaggedTensor(keys=FEATURES, values=values, lengths=kjt.lengths()[places])
            batch = numbers[order], kjt, labels[order]
        step(self.model, [self.tables, self.dense], batch)
        if self.generator is None:
            for name, parameter in self.model.named_parameters():
                found = parameter.grad.abs()
                found[found == 0] = torch.inf
                self.smallest[name] = torch.minimum(self.smallest.get(name, found), found)


def step(model: nn.Module, optimizers: list[Any], batch: Batch) -> float:
    """Loss of one step; DeepFM ends in a sigmoid, whose logit is that of its output."""
    numbers, kjt, labels = batch
    out = model(numbers, kjt)
    if isinstance(model, SimpleDeepFMNN):
        out = torch.logit(out.double()).to(labels)
    loss = nn.functional.binary_cross_entropy_with_logits(out, labels)
    for each in optimizers:
        each.zero_grad()
    loss.backward()
    for each in optimizers:
        each.step()
    return loss.item()


def gap(one: Tensor, other: Tensor) -> Tensor:
    """Of each element, relative to the largest."""
    return (one.double() - other.double()).abs() / other.abs().max()


def side_by_side(twins: Twins, seed: int) -> dict[str, Any]:
    """30 steps, and what differs after them."""
    others = [Beside(twins, order) for order in range(ORDERS)] + [Beside(twins, None)]
    losses = []
    for batch in batches(STEPS, seed):
        losses.append((twins.step_theirs(batch), twins.step_ours(batch)))
        for other in others:
            other.step(batch)
    ours, theirs = twins.our_weights(), twins.theirs.state_dict()
    of_others = [other.model.state_dict() for other in others]
    worst: dict[str, float] = {"weight_difference": -1.0}
    beyond = 0.0
    for name, value in theirs.items():
        found = gap(ours[name], value)
        own = torch.stack([gap(other[name], value) for other in of_others]).amax(0)
        beyond = max(beyond, float((found / (LIMIT + OWN * own)).max()))
        if found.max() > worst["weight_difference"]:
            place = divmod(int(found.argmax()), found.shape[-1])[: found.dim()]
            worst = {
                "weight_difference": float(found[place]),
                "own_difference": float(own[place]),
                "smallest_gradient": float(others[-1].smallest[name][place]),
            }
    return {
        "steps": STEPS,
        "loss_first": losses[0][0],
        "loss_last": losses[-1][0],
        "loss_difference": max(abs(a - b) for a, b in losses),
        **worst,
        "of_what_is_allowed": beyond,
    }


def compare(name: str, rule: str, seed: int) -> dict[str, Any]:
    """30 steps side by side."""
    about = {"case": "trained side by side", "model": name, "optimizer": rule}
    return {**about, **side_by_side(Twins(name, rule, seed), seed)}


def continued(name: str, rule: str, seed: int) -> dict[str, Any]:
    """TorchRec trains alone, then ours goes on from its state_dicts beside it; and back again."""
    twins = Twins(name, rule, seed)
    for batch in batches(STEPS, seed):
        twins.step_theirs(batch)
    import_state_dict(twins.tables, twins.theirs.state_dict(), twins.their_tables.state_dict())
    dense = {k: v for k, v in twins.theirs.state_dict().items() if "embedding_bags" not in k}
    twins.ours.load_state_dict(dense, strict=False)
    found = side_by_side(twins, 100 + seed)
    _, state = export_state_dict(
        twins.tables, {table.name: ROWS for table in twins.tables.tables}, naming="torch"
    )
    back = 0.0
    for parameter, of_parameter in twins.their_tables.state_dict()["state"].items():
        mine = state["state"]["embedding_bags." + parameter.split("embedding_bags.")[-1]]
        for part in ("sum",) if "sum" in of_parameter else ():
            wanted = of_parameter[part]
            back = max(back, float(gap(mine[part].view(wanted.shape), wanted).max()))
    about = {"case": "continued from a state_dict", "model": name, "optimizer": rule}
    return {**about, **found, "state_difference": back}


def modules() -> dict[str, Any]:
    """Both modules against TorchRec's, with features that several tables read and weights."""
    torch.manual_seed(0)
    worst = 0.0
    numbers = torch.Generator().manual_seed(5)
    for is_weighted in (False, True):
        tables = configs(is_shared=True)
        if is_weighted:
            for config in tables:
                config.pooling = PoolingType.SUM  # nn.EmbeddingBag has no weighted mean
        theirs = EmbeddingBagCollection(tables=tables, is_weighted=is_weighted)
        ours = TorchRecBags(tables, is_weighted)
        import_state_dict(ours.collection, theirs.state_dict())
        assert ours.is_weighted() == theirs.is_weighted()
        assert ours.embedding_bag_configs() == theirs.embedding_bag_configs()
        for _, kjt, _ in batches(3, 1):
            weights = torch.rand(kjt.values().numel(), generator=numbers) if is_weighted else None
            given = KeyedJaggedTensor(FEATURES, kjt.values(), weights, lengths=kjt.lengths())
            for one in forms_of(given):
                mine, wanted = ours(one), theirs(one)
                assert mine.keys() == wanted.keys(), (mine.keys(), wanted.keys())
                assert mine.length_per_key() == wanted.length_per_key()
                gap = (mine.values() - wanted.values()).abs().max()
                worst = max(worst, gap.item())
        none = torch.empty(0, dtype=torch.int64)
        empty = KeyedJaggedTensor(FEATURES, none, torch.empty(0), lengths=none)
        assert ours(empty).values().shape == (0, 4 * DIM + DIM)  # TorchRec's own fails
    sequences = [
        EmbeddingConfig(name=f"t{n}", embedding_dim=DIM, num_embeddings=ROWS, feature_names=names)
        for n, names in enumerate([["f0"], ["f1", "f2"], ["f3", "f0"]])
    ]
    theirs = EmbeddingCollection(tables=sequences, need_indices=True)
    ours = TorchRecSequences(sequences, need_indices=True)
    import_state_dict(ours.collection, theirs.state_dict())
    assert ours.embedding_names_by_table() == theirs.embedding_names_by_table()
    assert ours.embedding_dim() == theirs.embedding_dim()
    for _, kjt, _ in batches(3, 1):
        mine, wanted = ours(kjt), theirs(kjt)
        assert list(mine) == list(wanted)
        for name, one in mine.items():
            assert torch.equal(one.lengths(), wanted[name].lengths())
            assert torch.equal(one.weights(), wanted[name].weights())
            assert torch.equal(one.values(), wanted[name].values())
    return {"case": "modules", "weight_difference": [worst]}


def forms_of(kjt: KeyedJaggedTensor) -> Iterator[KeyedJaggedTensor]:
    """The same batch with strides given by key, keys in another order, and repeated."""
    yield kjt
    weights, lengths = kjt.weights_or_none(), kjt.lengths()
    by_key = [[BATCH]] * len(FEATURES)
    yield KeyedJaggedTensor(
        FEATURES, kjt.values(), weights, lengths=lengths, stride_per_key_per_rank=by_key
    )
    yield kjt.permute([3, 1, 2, 0])
    yield kjt.permute([3, 1, 0, 2, 0])


def over_seeds(
    case: Callable[[str, str, int], dict[str, Any]], name: str, rule: str
) -> dict[str, Any]:
    """A case for each seed: what is alike once, what is measured as a list."""
    runs = [case(name, rule, seed) for seed in range(SEEDS)]
    alike = {key: value for key, value in runs[0].items() if not isinstance(value, float)}
    return {**alike, **{key: [run[key] for run in runs] for key in runs[0] if key not in alike}}


def is_right(case: dict[str, Any]) -> bool:
    """See the head of this file."""
    if case["case"] == "modules":
        return max(case["weight_difference"]) <= LIMIT
    differences = case["loss_difference"] + case.get("state_difference", [])
    return max(differences) <= LIMIT and max(case["of_what_is_allowed"]) <= 1


def main() -> int:
    """Prints and records each case; 1 if one is beyond the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    names = list(models(nn.Module))
    cases = [over_seeds(compare, name, rule) for name in names for rule in RULES]
    cases += [over_seeds(continued, name, "row_wise_adagrad") for name in names]
    cases += [over_seeds(continued, "DLRM", "adagrad"), modules()]
    about = {
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip(),
        "torch": torch.__version__,
        "torchrec": torchrec.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    lines = [{**case, **about} for case in cases]
    failed = [case for case in cases if not is_right(case)]
    for line in lines:
        sys.stdout.write(json.dumps(line) + "\n")
    if given.record:
        given.record.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    sys.stdout.write(f"{len(cases) - len(failed)} passed, {len(failed)} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
