"""GradScaler and a collection that is not attached: rows move as without one, in any loop."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from penstock import (
    SGD,
    ConfigError,
    EmbeddingCollection,
    FeatureConfig,
    NonFiniteError,
    TableConfig,
)
from penstock.embedding.collection import loss_scale

KEYS = torch.arange(6).view(3, 2)
SCALE = 2.0**14


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        tables = [TableConfig(name="t", dim=4, optimizer=SGD(learning_rate=0.5))]
        self.embeddings = EmbeddingCollection(tables, [FeatureConfig(name="x", table="t")])
        self.head = nn.Linear(4, 1)

    def forward(self, keys):
        return self.head(self.embeddings({"x": keys}))[:, 0]

    def rows(self):
        return self.embeddings.find("t", KEYS.flatten()).values


def loss_of(model):
    return model(KEYS).square().sum()


def scaler(growth_interval=1, **options):
    # A scale that grows at each step: none may be taken for another's.
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=growth_interval, **options)


def assert_same(model, twin):
    # Scales are powers of 2, and change no bit.
    assert torch.equal(model.rows(), twin.rows())
    assert torch.equal(model.head.weight, twin.head.weight)


HOLDS = pytest.mark.parametrize("holds_anchor", [False, True])


def pair(holds_anchor=False, **options):
    """A model, a twin without scaler, and an optimizer of each."""
    model, twin = Model(), Model()
    held = model if holds_anchor else model.head
    return (
        (model, torch.optim.SGD(held.parameters(), lr=0.1, **options)),
        (twin, torch.optim.SGD(twin.head.parameters(), lr=0.1)),
    )


def step_plainly(model, optimizer, max_norm=None, passes=1, kept=0):
    optimizer.zero_grad()
    for _ in range(passes):
        loss = loss_of(model)
        loss.backward(retain_graph=True)
    for _ in range(kept):
        loss.backward(retain_graph=True)
    if max_norm:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    model.embeddings.apply_gradients()


@HOLDS
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}])
@pytest.mark.parametrize("order", ["SUA", "SAU", "ASU"])
def test_rows_move_as_without(order, options, holds_anchor):
    """The scaler's step and update, and apply_gradients, in any order."""
    (model, optimizer), twin = pair(holds_anchor, **options)
    scales = scaler()
    act = {
        "S": lambda: scales.step(optimizer),
        "U": scales.update,
        "A": model.embeddings.apply_gradients,
    }
    for _ in range(3):
        optimizer.zero_grad()
        scales.scale(loss_of(model)).backward()
        for each in order:
            act[each]()
        step_plainly(*twin)
        assert_same(model, twin[0])
    assert scales.get_scale() == SCALE * 8


@HOLDS
def test_clipping_after_unscaling_counts_the_tables(holds_anchor):
    (model, optimizer), twin = pair(holds_anchor)
    scales = scaler()
    for _ in range(2):
        optimizer.zero_grad()
        scales.scale(loss_of(model)).backward()
        scales.unscale_(optimizer)
        assert float(nn.utils.clip_grad_norm_(model.parameters(), 0.01)) < 100
        scales.step(optimizer)
        scales.update()
        model.embeddings.apply_gradients()
        step_plainly(*twin, max_norm=0.01)
        assert_same(model, twin[0])


@HOLDS
def test_gradients_accumulate(holds_anchor):
    (model, optimizer), twin = pair(holds_anchor)
    scales = scaler()
    optimizer.zero_grad()
    for _ in range(3):
        scales.scale(loss_of(model)).backward()
    loss = loss_of(model)  # of one graph, kept
    scales.scale(loss).backward(retain_graph=True)
    scales.scale(loss).backward()
    scales.step(optimizer)
    model.embeddings.apply_gradients()
    step_plainly(*twin, passes=4, kept=1)
    assert_same(model, twin[0])


def test_losses_of_one_pass():
    (model, optimizer), twin = pair()
    scales = scaler()
    first, second = scales.scale([loss_of(model), loss_of(model)])
    (first + second + scales.scale(loss_of(model))).backward()
    scales.step(optimizer)
    model.embeddings.apply_gradients()
    step_plainly(*twin, passes=3)
    assert_same(model, twin[0])
    (one,) = scales.scale(each for each in [loss_of(model)])
    one.backward()
    loss_of(twin[0]).backward()
    assert float(model.embeddings.gradient_norm()) == float(twin[0].embeddings.gradient_norm())


def test_a_loss_that_was_not_scaled_beside_one_that_was_is_refused():
    model, scales = Model(), scaler()
    scaled = scales.scale(loss_of(model))
    with pytest.raises(ConfigError, match="scale the sum of the losses"):
        (scaled + loss_of(model)).backward()


def test_two_scales_of_one_pass_are_refused():
    model, scales = Model(), scaler()
    other = torch.amp.GradScaler("cpu", init_scale=8.0)
    with pytest.raises(ConfigError, match=r"scaled by .*8\.0"):
        (scales.scale(loss_of(model)) + other.scale(loss_of(model))).backward()
    model.embeddings.discard_gradients()
    loss_of(model).backward()
    assert float(model.embeddings.gradient_norm()) < 100


def test_only_passes_of_scaled_losses_are_unscaled():
    """Nor by a scaler that is not enabled; and none by a pass that raised."""
    model, twin, scales = Model(), Model(), scaler()

    def fail(_):
        raise RuntimeError("broken")

    out = model.embeddings({"x": KEYS})
    out.register_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        scales.scale(out.sum()).backward()
    assert not loss_scale._PASSES
    for each in (loss_of(model), scaler(enabled=False).scale(loss_of(model))):
        each.backward()
        loss_of(twin).backward()
    with torch.no_grad():
        scales.scale(loss_of(model))
    assert float(model.embeddings.gradient_norm()) == float(twin.embeddings.gradient_norm())


def test_who_attaches_after_the_pass_is_unscaled_once():
    (model, optimizer), twin = pair()
    scales = scaler()
    scales.scale(loss_of(model)).backward()
    model.embeddings.attach(optimizer)
    scales.scale(loss_of(model)).backward()
    scales.step(optimizer)
    step_plainly(*twin, passes=2)
    assert_same(model, twin[0])


@HOLDS
def test_an_overflow_is_refused_and_attach_named(holds_anchor):
    (model, optimizer), _ = pair(holds_anchor)
    scales = scaler()
    before = model.rows()
    scales.scale(model(KEYS).mul(3e38).sum()).backward()
    scales.step(optimizer)
    scales.update()
    # A scaler that sees the tables' gradients lowers its scale for them.
    assert scales.get_scale() == SCALE / 2
    with pytest.raises(NonFiniteError, match=r"has scaled the loss.*attach\(optimizer\)"):
        model.embeddings.apply_gradients()
    assert torch.equal(model.rows(), before)
    model.embeddings.discard_gradients()
    model(KEYS).mul(torch.inf).sum().backward()
    with pytest.raises(NonFiniteError, match=r"extreme inputs$"):
        model.embeddings.apply_gradients()


def test_derived_scalers_with_a_scale_of_their_own():
    class Own(torch.amp.GradScaler):
        def scale(self, outputs):
            if self._scale is None:
                self._lazy_init_scale_growth_tracker(outputs.device)
            return outputs * self._scale

    (model, optimizer), twin = pair()
    scales = Own("cpu", init_scale=SCALE)
    scales.scale(loss_of(model)).backward()
    scales.step(optimizer)
    model.embeddings.apply_gradients()
    step_plainly(*twin)
    assert_same(model, twin[0])


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_loops(whole):
    torch._dynamo.reset()
    (model, optimizer), twin = pair()
    scales = scaler()
    called = model if whole else torch.compile(model, backend="aot_eager", fullgraph=True)

    def run():
        loss = called(KEYS).square().sum()
        scales.scale(loss).backward()

    if whole:
        run = torch.compile(run, backend="aot_eager")
    for _ in range(2):
        optimizer.zero_grad()
        run()
        scales.step(optimizer)
        scales.update()
        model.embeddings.apply_gradients()
        step_plainly(*twin)
        torch.testing.assert_close(model.rows(), twin[0].rows(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_checkpointing(use_reentrant):
    (model, optimizer), twin = pair()
    scales = scaler()
    keys = torch.ones(3, 1, requires_grad=True)  # reentrant wants an input that needs a gradient
    out = checkpoint(lambda ones: model(KEYS) * ones[:, 0], keys, use_reentrant=use_reentrant)
    loss = scales.scale(out.square().sum())
    if use_reentrant:
        with pytest.raises(ConfigError, match="use_reentrant=False, or attach"):
            loss.backward()
        return
    loss.backward()
    scales.step(optimizer)
    model.embeddings.apply_gradients()
    step_plainly(*twin)
    assert_same(model, twin[0])


def test_a_pass_of_another_thread():
    model, twin, scales = Model(), Model(), scaler()
    loss = scales.scale(loss_of(model))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    loss_of(twin).backward()
    assert float(model.embeddings.gradient_norm()) == float(twin.embeddings.gradient_norm())
