"""A plain loop, accelerate and Lightning, the real ones: as torch trains its own embeddings.

Each clips, accumulates two batches a step, follows a schedule, and is saved and loaded on its way.
"""

import copy
import io

import pytest
import torch
from torch import nn

from penstock import (
    SGD,
    Adagrad,
    Adam,
    EmbeddingCollection,
    FeatureConfig,
    Jagged,
    KeyedJagged,
    TableConfig,
)

NUM_KEYS, DIM, RATE = 50, 4, 0.2
RULES = {
    "sgd": (SGD(learning_rate=RATE), torch.optim.SGD, {}),
    "adagrad": (Adagrad(learning_rate=RATE), torch.optim.Adagrad, {"eps": 1e-8}),
    "sparse_adam": (Adam(learning_rate=RATE), torch.optim.SparseAdam, {}),
}
BATCHES, EPOCHS, BEFORE_SAVING = 8, 3, 2
ACCUMULATED, MOST_NORM, DECAY = 2, 0.05, 0.9
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 over 12 steps, divided by small norms
KEYS = torch.randint(0, NUM_KEYS, (BATCHES * 4, 3), generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        table = TableConfig(name="item", dim=DIM, optimizer=RULES[kind][0])
        features = [FeatureConfig(name="x", table="item", pooling="mean")]
        self.embeddings = EmbeddingCollection([table], features)
        self.head = nn.Linear(DIM, 1)

    def forward(self, keys):
        sparse = KeyedJagged.pack({"x": Jagged.from_dense(keys)})
        return self.head(self.embeddings(sparse))[:, 0]

    def rows(self):
        return self.embeddings.find("item", torch.arange(NUM_KEYS)).values


def loss_of(scores):
    return (scores - 1).square().sum()


def optimizer_of(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.embeddings.detach_optimizer()
    model.embeddings.attach(optimizer)
    return optimizer


def schedule_of(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)


def batches():
    return KEYS.split(4)


@pytest.fixture(params=RULES)
def kind(request):
    return request.param


@pytest.fixture
def expected(kind):
    """Rows and head, trained by torch alone."""
    model = Model(kind)
    bag = nn.EmbeddingBag(NUM_KEYS, DIM, mode="mean", _weight=model.rows())
    head = copy.deepcopy(model.head)
    _, make, options = RULES[kind]
    optimizers = [
        torch.optim.AdamW(head.parameters(), lr=0.01),
        make(bag.parameters(), lr=RATE, **options),
    ]
    schedules = [schedule_of(each) for each in optimizers]
    for n, keys in enumerate(batches() * EPOCHS, 1):
        (loss_of(head(bag(keys))[:, 0]) / ACCUMULATED).backward()
        if n % ACCUMULATED:
            continue
        nn.utils.clip_grad_norm_([*bag.parameters(), *head.parameters()], MOST_NORM)
        if kind == "sparse_adam":
            bag.weight.grad = bag.weight.grad.to_sparse(1)
        for each in (*optimizers, *schedules):
            each.step()
        for each in optimizers:
            each.zero_grad()
    return bag.weight.detach(), head


def assert_trained(model, expected):
    rows, head = expected
    torch.testing.assert_close(model.rows(), rows, **CLOSE)
    for mine, theirs in zip(model.head.parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_a_plain_loop(kind, expected):
    def made():
        model = Model(kind)
        optimizer = optimizer_of(model)
        return model, optimizer, schedule_of(optimizer)

    model, optimizer, schedule = made()
    for epoch in range(EPOCHS):
        if epoch == BEFORE_SAVING:
            file = io.BytesIO()
            states = [each.state_dict() for each in (model, optimizer, schedule)]
            torch.save(states, file)
            file.seek(0)
            model, optimizer, schedule = made()
            states = torch.load(file, weights_only=True)
            for each, state in zip((model, optimizer, schedule), states, strict=True):
                each.load_state_dict(state)
        for n, keys in enumerate(batches(), 1):
            (loss_of(model(keys)) / ACCUMULATED).backward()
            if n % ACCUMULATED == 0:
                nn.utils.clip_grad_norm_(model.parameters(), MOST_NORM)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    assert_trained(model, expected)


def test_accelerate(kind, expected, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)

    def made():
        model = Model(kind)
        optimizer = optimizer_of(model)
        return model, *accelerator.prepare(model, optimizer, schedule_of(optimizer))

    def train(prepared, optimizer, schedule, epochs):
        for keys in batches() * epochs:
            with accelerator.accumulate(prepared):
                accelerator.backward(loss_of(prepared(keys)))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), MOST_NORM)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    _, *prepared = made()
    train(*prepared, BEFORE_SAVING)
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.free_memory()
    model, *prepared = made()
    accelerator.load_state(str(tmp_path / "state"))
    train(*prepared, EPOCHS - BEFORE_SAVING)
    assert_trained(model, expected)


def test_lightning(kind, expected, tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model(kind)

        def configure_optimizers(self):
            optimizer = optimizer_of(self.model)
            schedule = {"scheduler": schedule_of(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

        def training_step(self, batch, _):
            return loss_of(self.model(batch[0]))

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(KEYS), batch_size=4)

    def fit(module, epochs, **options):
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            accumulate_grad_batches=ACCUMULATED,
            gradient_clip_val=MOST_NORM,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, loader, **options)
        return trainer

    fit(Module(), BEFORE_SAVING).save_checkpoint(tmp_path / "saved.ckpt")
    module = Module()
    fit(module, EPOCHS, ckpt_path=tmp_path / "saved.ckpt")
    assert_trained(module.model, expected)
    loaded = Module.load_from_checkpoint(tmp_path / "saved.ckpt")
    fit(loaded, 1)  # a second fit attaches another optimizer
    fit(loaded, 1)
