"""FuxiCTR's models, trained by its own trainer, with EmbeddingCollection in place of nn.Embedding.

    python benchmarks/zoo_fuxictr.py CHECKOUT [--models NAME ...] [--check]

CHECKOUT is a working copy of github.com/reczoo/FuxiCTR; what it needs beside torch is its own
requirements.txt. Each model of its zoo that has a test configuration runs twice from the same
weights on that configuration's own small data: with its embeddings, and with each nn.Embedding
replaced by a collection of one table, whose rows are keyed by number and which is attached to
the trainer's optimizer. The trainer (`fit`) clips, evaluates, lowers the rate, saves its best epoch
and loads it again; then both predict the test data, and so does a model made anew from the
file that the trainer saved.

What differs from the configuration: the optimizer is Adagrad (Penstock's Adam updates the rows that
a batch touches, torch's all of them), there are several epochs of small batches, the best epoch is
the one of the lowest score (so that it is not the last), and no regularizer reads embeddings.

`equal`: no loss and no prediction differs by more than MOST_DIFFERENT. Some models make rounding
large within a few steps (the first step of Adagrad has the size of the rate however small the
gradient is): `equal to rounding` if a run of the zoo's own embeddings, begun one rounding
of float32 away, differs from the other one as much.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from circumstances import commit, end_check, hardware
from torch import Tensor, nn

from penstock import Adagrad, EmbeddingCollection, FeatureConfig, Jagged, KeyedJagged, TableConfig
from penstock.embedding.interop import import_weights

LEARNING_RATE = 0.005
MOST_DIFFERENT = 1e-4
"""Of two probabilities: float32 rounding, carried through all steps."""
MOST_OVER_ROUNDING = 5
CHANGED = {
    "optimizer": "Adagrad",
    "learning_rate": LEARNING_RATE,
    "batch_size": 16,
    "epochs": 3,
    "early_stop_patience": 9,
    "monitor": "AUC",
    "monitor_mode": "min",
    "embedding_regularizer": None,
    "net_regularizer": None,
    "num_workers": 0,
    "verbose": 0,
    "gpu": -1,
    "shuffle": False,
}


class Rows(nn.Module):
    """What stands where an nn.Embedding was: ids of any shape -> their vectors."""

    def __init__(self, replaced: nn.Embedding) -> None:
        super().__init__()
        self.padding_idx = replaced.padding_idx
        table = TableConfig(
            name="rows",
            dim=replaced.embedding_dim,
            optimizer=Adagrad(learning_rate=LEARNING_RATE, eps=1e-10),
            trainable=replaced.weight.requires_grad,
        )
        self.collection = EmbeddingCollection([table], [FeatureConfig(name="id", table="rows")])
        import_weights(self.collection, "rows", replaced.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] int64 -> [..., D]."""
        sparse = KeyedJagged.pack({"id": Jagged.from_dense(ids.reshape(-1, 1))})
        vectors: Tensor = self.collection(sparse).view(*ids.shape, -1)
        if self.padding_idx is None:
            return vectors
        # As nn.Embedding: the row of the padding learns nothing.
        return torch.where((ids == self.padding_idx).unsqueeze(-1), vectors.detach(), vectors)


def replace_embeddings(model: nn.Module) -> list[Rows]:
    """Puts `Rows` in the place of every nn.Embedding; those that are one stay one."""
    made: dict[nn.Embedding, Rows] = {}
    places = [
        (module, name, child)
        for module in list(model.modules())
        for name, child in list(module.named_children())
        if isinstance(child, nn.Embedding)
    ]
    # named_children leaves out the second name of one child.
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, nn.Embedding) and (module, name, child) not in places:
                places.append((module, name, child))
    for module, name, child in places:
        if child not in made:
            made[child] = Rows(child)
        setattr(module, name, made[child])
    return list(made.values())


class Experiment:
    """A test configuration of the zoo, and what is needed to run it."""

    def __init__(self, name: str, params: dict[str, Any]) -> None:
        from fuxictr.features import FeatureMap
        from fuxictr.preprocess import FeatureProcessor, build_dataset

        self.params = params | CHANGED | {"model_id": name}
        # Models of one kind of parameters call theirs so, and take no other.
        if "regularizer" in params:
            del self.params["embedding_regularizer"], self.params["net_regularizer"]
            self.params["regularizer"] = None
        if isinstance(self.params.get("metrics"), list):
            self.params["metrics"] = ["AUC", "logloss"]
        folder = Path(params["data_root"]) / params["dataset_id"]
        if params["data_format"] == "csv":
            parts = build_dataset(FeatureProcessor(**self.params), **self.params)
            for part, path in zip(("train_data", "valid_data", "test_data"), parts, strict=True):
                self.params[part] = path
        self.features = FeatureMap(params["dataset_id"], str(folder))
        self.features.load(str(folder / "feature_map.json"), self.params)
        for name in [key for key in sys.modules if key == "src" or key.startswith("src.")]:
            del sys.modules[name]
        self.model_class = getattr(importlib.import_module("src"), params["model"])

    def model(self, *, ours: bool) -> tuple[nn.Module, list[Rows]]:
        """Makes the model from the seed; with collections in place of its embeddings if `ours`."""
        from fuxictr.pytorch.torch_utils import seed_everything

        seed_everything(seed=self.params.get("seed", 2019))
        model = self.model_class(self.features, **self.params)
        Path(model.model_dir).mkdir(parents=True, exist_ok=True)
        if not ours:
            return model, []
        collections = replace_embeddings(model)
        model.compile(self.params["optimizer"], self.params["loss"], LEARNING_RATE)
        for rows in collections:
            rows.collection.attach(model.optimizer)
        return model, collections

    def loader(self, stage: str) -> Any:
        """Batches of a part of the data."""
        from fuxictr.pytorch.dataloaders import RankDataLoader

        return RankDataLoader(self.features, stage=stage, **self.params).make_iterator()

    def fit(self, model: nn.Module) -> dict[str, Any]:
        """Trains as the zoo does: losses of all steps, predictions before and after the load."""
        from fuxictr.pytorch.torch_utils import seed_everything

        losses: list[float] = []
        before: list[Any] = []
        train_step, load_weights = model.train_step, model.load_weights

        def counted(batch: Any) -> Tensor:
            loss = train_step(batch)
            losses.append(loss.item())
            return loss

        def loaded(path: str) -> None:
            before.append(self.predict(model))
            load_weights(path)

        model.train_step, model.load_weights = counted, loaded
        train, valid = self.loader("train")
        seed_everything(seed=1)
        model.fit(train, validation_data=valid, **self.params)
        model.train_step, model.load_weights = train_step, load_weights
        return {"losses": np.array(losses), "last": before[0], "best": self.predict(model)}

    def predict(self, model: nn.Module) -> Any:
        """Probabilities of the test data, or of the validation data where there is none; [n]."""
        batches = self.loader("test") or self.loader("train")[1]
        found = model.predict(batches)
        if isinstance(found, dict):
            return np.concatenate([found[name] for name in sorted(found)])
        return found


def compare(name: str, params: dict[str, Any]) -> dict[str, Any]:
    """Trains both, and says how far they are apart."""
    try:
        experiment = Experiment(name, params)
        theirs = experiment.fit(experiment.model(ours=False)[0])
    except Exception as error:  # the zoo's own code, with its own embeddings: anything
        return {"outcome": "does not run with its own embeddings", "error": describe(error)}
    model, collections = experiment.model(ours=True)
    ours = experiment.fit(model)
    anew, _ = experiment.model(ours=True)
    anew.load_weights(model.checkpoint)
    result = {
        "embeddings": len(collections),
        "steps": len(ours["losses"]),
        "loss_fell_by": float(ours["losses"][0] - ours["losses"][-1]),
        "difference": apart(ours, theirs),
        "reload_changed_by": float(np.abs(ours["best"] - ours["last"]).max()),
        "reload_of_its_own_changed_by": float(np.abs(theirs["best"] - theirs["last"]).max()),
        "made_anew_is_equal": bool(np.array_equal(experiment.predict(anew), ours["best"])),
    }
    outcome = "equal" if result["difference"] <= MOST_DIFFERENT else "DIFFERS"
    if outcome == "DIFFERS":
        nudged, _ = experiment.model(ours=False)
        nudge(nudged)
        result["own_difference_by_rounding"] = apart(experiment.fit(nudged), theirs)
        if result["difference"] <= MOST_OVER_ROUNDING * result["own_difference_by_rounding"]:
            outcome = "equal to rounding"
    return {"outcome": outcome if result["made_anew_is_equal"] else "DIFFERS", **result}


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Most that a loss or a prediction differs by."""
    return float(max(np.abs(one[name] - other[name]).max() for name in ("losses", "best")))


def nudge(model: nn.Module) -> None:
    """Moves every weight of every embedding by one rounding."""
    for child in model.modules():
        if isinstance(child, nn.Embedding):
            with torch.no_grad():
                child.weight.copy_(torch.nextafter(child.weight, torch.tensor(torch.inf)))


def describe(error: BaseException) -> str:
    """Type and text on one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]


def configurations(zoo: Path) -> Iterator[tuple[Path, str]]:
    """Folders of models that have a test configuration, and its name."""
    import yaml

    for config in sorted(zoo.rglob("model_config.yaml")):
        folder = config.parent.parent
        if not (folder / "src" / "__init__.py").exists():
            continue
        names = yaml.safe_load(config.read_text(encoding="utf-8"))
        for name in names:
            if "_test" in name and not folder.name.endswith("_tf"):  # those are TensorFlow's
                yield folder, name


def data_of(dataset: str, checkout: Path) -> dict[str, Any]:
    """What the zoo says of a data set; not all of its models say so of theirs."""
    import yaml

    for path in sorted((checkout / "model_zoo").rglob("dataset_config.yaml")):
        known = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if dataset in known:
            folder = f"{checkout / 'data'}/"
            return {
                key: re.sub(r"^(\.\./)+data/", folder, value) if isinstance(value, str) else value
                for key, value in known[dataset].items()
            }
    raise FileNotFoundError(f"the checkout has no data set {dataset}")


def run(folder: Path, name: str, checkout: Path) -> dict[str, Any]:
    """Result of one configuration, run in its model's folder as the zoo does."""
    from fuxictr.utils import load_model_config

    before = Path.cwd()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            params = load_model_config("./config/", name)
            params |= data_of(params["dataset_id"], checkout)
            with tempfile.TemporaryDirectory() as saved:
                return compare(name, params | {"model_root": saved})
    except FileNotFoundError as error:
        return {"outcome": "does not run with its own embeddings", "error": describe(error)}
    except Exception as error:  # recorded, and no other configuration has to suffer
        traceback.print_exc()
        return {"outcome": "FAILS", "error": describe(error)}
    finally:
        sys.path.remove(str(folder))
        os.chdir(before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="of github.com/reczoo/FuxiCTR")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these configurations")
    parser.add_argument("--check", action="store_true", help="exit 1 unless all are equal")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    sys.path.insert(0, str(checkout))
    logging.disable(logging.INFO)
    from fuxictr.version import __version__

    facts = {
        "commit": commit(),
        "zoo": f"FuxiCTR {__version__}",
        "hardware": hardware(f"torch {torch.__version__}"),
    }
    missed = []
    there = list(configurations(checkout / "model_zoo"))
    unknown = set(arguments.models or ()) - {name for _, name in there}
    if unknown:
        parser.error(f"no configuration {', '.join(sorted(unknown))}; see the record for names")
    for folder, name in there:
        if arguments.models and name not in arguments.models:
            continue
        result = {"configuration": name, **run(folder, name, checkout), **facts}
        print(json.dumps(result), flush=True)
        if result["outcome"] in ("DIFFERS", "FAILS"):
            missed.append(f"{name}: {result['outcome']} {result.get('error', '')}")
    if arguments.check:
        end_check(missed)


if __name__ == "__main__":
    main()
