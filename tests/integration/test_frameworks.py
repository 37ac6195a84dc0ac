"""accelerate and Lightning, the real ones: a model with tables trains, is saved, goes on."""

import pytest
import torch

from penstock import Adagrad, EmbeddingCollection, FeatureConfig, Jagged, KeyedJagged, TableConfig

KEYS = torch.arange(24).view(8, 3) * 10**15


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        table = TableConfig(name="item", dim=4, optimizer=Adagrad(learning_rate=0.1))
        self.embeddings = EmbeddingCollection([table], [FeatureConfig(name="x", table="item")])
        self.head = torch.nn.Linear(4, 1)

    def forward(self, keys):
        sparse = KeyedJagged.pack({"x": Jagged.from_dense(keys)})
        return self.head(self.embeddings(sparse))[:, 0]


@torch.no_grad()
def scores(model):
    return model.eval()(KEYS)


def test_accelerate_saves_and_loads_the_tables(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model = Model()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    model.embeddings.attach(optimizer)
    prepared, optimizer = accelerator.prepare(model, optimizer)

    def train(steps):
        model.train()
        for _ in range(steps):
            accelerator.backward(prepared(KEYS).square().sum())
            optimizer.step(), optimizer.zero_grad()

    train(3)
    accelerator.save_state(str(tmp_path / "state"))
    before = scores(model)
    train(3)
    after = scores(model)
    assert not torch.equal(after, before)
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(scores(model), before)
    train(3)
    assert torch.equal(scores(model), after)


def test_lightning_saves_and_loads_the_tables(tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model()

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.model.embeddings.detach_optimizer()  # of a fit before
            self.model.embeddings.attach(optimizer)
            return optimizer

        def training_step(self, batch, _):
            return self.model(batch[0]).square().sum()

    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(KEYS), batch_size=4)

    def fit(module, epochs, **options):
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, batches, **options)
        return trainer

    module = Module()
    fit(module, 2).save_checkpoint(tmp_path / "two.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "two.ckpt")
    assert torch.equal(scores(loaded.model), scores(module.model))
    resumed, whole = Module(), Module()
    whole.load_state_dict(module.state_dict())
    fit(resumed, 3, ckpt_path=tmp_path / "two.ckpt")
    fit(whole.train(), 1)
    assert torch.equal(scores(resumed.model), scores(whole.model))
