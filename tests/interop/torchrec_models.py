"""TorchRec's own models with this project's tables in the place of theirs.

No test of the suite: TorchRec is no requirement. Make an environment beside the project's (torch
2.13, fbgemm-gpu-cpu 1.8.0; torchrec 1.8.0 with `--no-deps`; tensordict, torchmetrics 1.0.3, tqdm,
pyre-extensions), install the project there, and

    python tests/interop/torchrec_models.py --record benchmarks/results/torchrec_models_202611.jsonl

Each model is trained twice from the same weights on the same batches, once with TorchRec's
EmbeddingBagCollection and once with ours, dense parts by SGD, tables by each optimizer of
TorchRec's that both have, for three seeds. Recorded is, by seed, the largest difference of losses,
and of weights relative to the largest weight. A loss that differs by more than 1e-6 is a failure,
and so are weights if those of two seeds do: where a ReLU's input, or a gradient under Adagrad's
root, is within rounding of 0, two right programs may part ways in a weight.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
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
SEEDS = 3


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


def batches(steps: int, seed: int) -> Iterator[tuple[Tensor, KeyedJaggedTensor, Tensor]]:
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

    def step_theirs(self, batch: tuple[Tensor, KeyedJaggedTensor, Tensor]) -> float:
        """One step with TorchRec's tables."""
        numbers, kjt, labels = batch
        loss = nn.functional.binary_cross_entropy_with_logits(
            self.logits(self.theirs, numbers, kjt), labels
        )
        self.their_tables.zero_grad()
        self.their_dense.zero_grad()
        loss.backward()
        self.their_tables.step()
        self.their_dense.step()
        return loss.item()

    def step_ours(self, batch: tuple[Tensor, KeyedJaggedTensor, Tensor]) -> float:
        """One step with ours."""
        numbers, kjt, labels = batch
        loss = nn.functional.binary_cross_entropy_with_logits(
            self.logits(self.ours, numbers, kjt), labels
        )
        self.our_dense.zero_grad()
        loss.backward()
        self.our_dense.step()
        self.tables.apply_gradients()
        return loss.item()

    @staticmethod
    def logits(model: nn.Module, numbers: Tensor, kjt: KeyedJaggedTensor) -> Tensor:
        """DeepFM ends in a sigmoid; its logit is that of its output."""
        out = model(numbers, kjt)
        return torch.logit(out.double()).float() if isinstance(model, SimpleDeepFMNN) else out

    def difference(self) -> float:
        """Of all weights, relative to the largest."""
        ours, _ = export_state_dict(self.tables, {table.name: ROWS for table in self.tables.tables})
        theirs = self.theirs.state_dict()
        dense = self.ours.state_dict()
        worst = 0.0
        for name, value in theirs.items():
            table = name.split("embedding_bags.")[-1]
            mine = ours[f"embedding_bags.{table}"] if "embedding_bags" in name else dense[name]
            worst = max(worst, float((mine - value).abs().max() / value.abs().max()))
        return worst


def compare(name: str, rule: str, seed: int) -> dict[str, Any]:
    """30 steps side by side."""
    twins = Twins(name, rule, seed)
    losses = [(twins.step_theirs(batch), twins.step_ours(batch)) for batch in batches(STEPS, seed)]
    return {
        "case": "trained side by side",
        "model": name,
        "optimizer": rule,
        "steps": STEPS,
        "loss_first": losses[0][0],
        "loss_last": losses[-1][0],
        "loss_difference": max(abs(a - b) for a, b in losses),
        "weight_difference": twins.difference(),
    }


def continued(name: str, rule: str, seed: int) -> dict[str, Any]:
    """TorchRec trains alone, then ours goes on from its state_dicts beside it; and back again."""
    twins = Twins(name, rule, seed)
    for batch in batches(STEPS, seed):
        twins.step_theirs(batch)
    import_state_dict(twins.tables, twins.theirs.state_dict(), twins.their_tables.state_dict())
    dense = {k: v for k, v in twins.theirs.state_dict().items() if "embedding_bags" not in k}
    twins.ours.load_state_dict(dense, strict=False)
    losses = [(twins.step_theirs(b), twins.step_ours(b)) for b in batches(STEPS, 100 + seed)]
    there = twins.difference()
    _, state = export_state_dict(
        twins.tables, {table.name: ROWS for table in twins.tables.tables}, naming="torch"
    )
    theirs = copy.deepcopy(twins.their_tables.state_dict())
    back = 0.0
    for parameter, of_parameter in theirs["state"].items():
        mine = state["state"]["embedding_bags." + parameter.split("embedding_bags.")[-1]]
        for part in ("sum",) if "sum" in of_parameter else ():
            wanted = of_parameter[part]
            gap = (mine[part].view(wanted.shape) - wanted).abs().max() / wanted.abs().max()
            back = max(back, float(gap))
    return {
        "case": "continued from a state_dict",
        "model": name,
        "optimizer": rule,
        "steps": STEPS,
        "loss_difference": max(abs(a - b) for a, b in losses),
        "weight_difference": there,
        "state_difference": back,
    }


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
    losses = case.get("loss_difference", [0.0])
    medians = [
        statistics.median(case[key])
        for key in ("weight_difference", "state_difference")
        if key in case
    ]
    return max(losses) <= LIMIT and max(medians) <= LIMIT


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
