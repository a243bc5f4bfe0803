"""The trainer leaves its arguments as they are, goes on where it was, and refuses runs that cannot be right."""

import warnings

import pytest
import torch
import torchattacks
from tiny import a_model, a_split, a_trainer, same, weights
from torch import nn

from at_extensions.attacks import PGD
from at_extensions.data import FloatSplit, make_loader
from at_extensions.methods import PGDAT, Standard, Wrapping
from at_extensions.models import load_model
from at_extensions.runs import RunDirectory, load_tensors
from at_extensions.training import Trainer, create_optimizer


def test_constructing_trainers_changes_neither_model_nor_method(untouched, monkeypatch):
    monkeypatch.setattr("at_extensions.processes.rank", lambda: 3)
    model = a_model()
    method = PGDAT(model, eps=0.1, seed=11)
    optimizer = create_optimizer(model, "sgd", lr=0.1)
    with untouched(model):
        for _ in range(3):
            Trainer(method, optimizer, epochs=1, ema=0.9, compile=True)
    assert method.stream.seed == 11
    assert model._compiled_call_impl is None
    assert all(p.is_contiguous() for p in model.parameters())


def test_each_process_draws_other_starts_from_the_seed_as_given(monkeypatch):
    drawn = []
    for rank in (0, 1, 1):
        monkeypatch.setattr("at_extensions.processes.rank", lambda rank=rank: rank)
        monkeypatch.setattr("at_extensions.processes.is_main", lambda: True)
        trainer, train, _ = a_trainer(1)
        trainer.fit(train)
        assert trainer.method.stream.seed == 5
        drawn.append(trainer.method.stream.state_dict()["states"]["cpu"])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1], drawn[2])


def test_a_stream_that_has_been_drawn_from_is_spread_too():
    from at_extensions.untouched import RandomStream

    def draw(stream):
        with stream.on(torch.device("cpu")):
            return torch.rand(3)

    streams = [RandomStream(4) for _ in range(3)]
    for rank, stream in enumerate(streams):
        draw(stream)
        stream.spread(rank)
        stream.spread(rank)
    first, second, third = (draw(stream) for stream in streams)
    assert len({tuple(v.tolist()) for v in (first, second, third)}) == 3
    undisturbed = RandomStream(4)
    draw(undisturbed)
    assert torch.equal(draw(undisturbed), first)
    again = RandomStream(0)
    again.load_state_dict(streams[2].state_dict())
    again.spread(2)
    assert torch.equal(draw(again), draw(streams[2]))


def test_a_second_fit_goes_on_and_repeats_nothing():
    once, train, val = a_trainer(4)
    once.fit(train, val)
    twice, train, val = a_trainer(2, schedule_epochs=4)
    twice.fit(train, val)
    assert len(twice.fit(train, val).rows) == 2  # they are done
    twice.epochs = 4
    assert [row["epoch"] for row in twice.fit(train, val).rows] == [1, 2, 3, 4]
    assert same(weights(once.model), weights(twice.model))


def test_loaders_of_images_and_labels_train():
    trainer, train, val = a_trainer(1)
    pairs, _, _ = a_trainer(1)
    batches = list(train)
    trainer.fit(batches, val)
    pairs.fit([(x, y) for x, y, _ in batches], [(x, y) for x, y, _ in val])
    assert same(weights(trainer.model), weights(pairs.model))


def test_labels_in_int32_train_and_are_counted():
    trainer, train, val = a_trainer(1)
    plain, _, _ = a_trainer(1)
    batches = list(train)
    plain.fit(batches, val)
    trainer.fit([(x, y.int()) for x, y, _ in batches], [(x, y.int()) for x, y, _ in val])
    keys = ("train_accuracy", "val_clean_accuracy", "val_robust_accuracy")
    assert [trainer.history.rows[0][k] for k in keys] == [plain.history.rows[0][k] for k in keys]


@pytest.mark.parametrize("empty", [[], iter(())])
def test_a_loader_without_batches_is_an_error(empty):
    trainer, _, val = a_trainer(1)
    with pytest.raises(ValueError, match="training loader yields no batches"):
        trainer.fit(empty, val)
    assert trainer.history.rows == []


def test_an_iterator_trains_one_epoch_and_says_so_in_the_second():
    trainer, train, _ = a_trainer(2)
    with pytest.raises(ValueError, match="can be used only once"):
        trainer.fit(iter(list(train)))


def spoil_images(x, y):
    return x * 2 - 1, y


def spoil_labels(x, y):
    return x, torch.full_like(y, 3)


def put_nan(x, y):
    return x.index_fill(0, torch.tensor([0]), float("nan")), y


@pytest.mark.parametrize("spoil", [spoil_images, spoil_labels, put_nan])
def test_a_later_bad_batch_stops_the_run_before_its_epoch_is_saved(tmp_path, spoil):
    trainer, train, val = a_trainer(3, run_dir=tmp_path)
    trainer.epochs = 1
    trainer.fit(train, val)
    good = load_tensors(RunDirectory(tmp_path).weights("last"))[0]
    batches = [batch[:2] for batch in make_loader(a_split(), 16)]
    batches[1] = spoil(*batches[1])
    trainer.epochs = 3
    with pytest.raises(ValueError, match=r"training met (images outside|labels that)"):
        trainer.fit(batches, val)
    assert len(RunDirectory(tmp_path).metrics()) == 1
    assert same(load_tensors(RunDirectory(tmp_path).weights("last"))[0], good)
    assert all(torch.isfinite(v).all() for v in trainer.model.state_dict().values())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(spoil_images, "validation images must be finite and lie in"), (put_nan, "validation images"),
     (spoil_labels, "validation labels must be class numbers from 0 to 2")],
)  # fmt: skip
@pytest.mark.parametrize("class_counts", [None, [16, 16, 16]])
def test_bad_validation_batches_are_refused(spoil, says, class_counts):
    trainer, train, val = a_trainer(1, class_counts=class_counts)
    batches = [batch[:2] for batch in val]
    with pytest.raises(ValueError, match=says):
        trainer.fit(train, [*batches, spoil(*batches[0])])


def test_batchnorm_that_was_frozen_stays_frozen():
    model = a_model()
    norm = model.network.features[1]
    norm.eval()
    norm.weight.requires_grad_(False)
    before = weights(norm)
    trainer, train, val = a_trainer(2, model=model)
    trainer.fit(train, val)
    assert same(weights(norm), before | {"bias": norm.bias.detach()})
    assert not norm.training
    assert all(m.training for m in model.modules() if m is not norm)
    norm.train()  # before another fit the user changes it
    trainer.epochs = 3
    trainer.fit(train, val)
    assert norm.training
    assert norm.num_batches_tracked > before["num_batches_tracked"]


def test_a_model_that_came_in_eval_mode_is_trained_as_a_whole():
    model = a_model().eval()
    trainer, train, val = a_trainer(1, model=model)
    trainer.fit(train, val)
    assert all(m.training for m in model.modules())
    assert model.network.features[1].num_batches_tracked == 3


@pytest.mark.parametrize(
    "wrap", [lambda net: torch.compile(net, backend="eager"), nn.DataParallel,
             lambda net: nn.DataParallel(torch.compile(net, backend="eager"))],
)  # fmt: skip
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_wrapped_model_is_saved_as_the_model_itself(tmp_path, wrap, ema):
    torch.compiler.reset()
    model = a_model()
    trainer, train, val = a_trainer(1, model=wrap(model), run_dir=tmp_path, ema=ema)
    trainer.fit(train, val)
    loaded = load_model(RunDirectory(tmp_path).weights("best"))
    expected = weights(model) if ema is None else load_tensors(RunDirectory(tmp_path).weights("best"))[0]
    assert same(weights(loaded), expected)
    plain, train, val = a_trainer(2, run_dir=tmp_path, ema=ema)  # not wrapped, it goes on with the same run
    plain.fit(train, val)
    assert len(plain.history.rows) == 2


@pytest.mark.parametrize("kind", ["last", "best"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_damaged_weights_of_a_finished_run_are_written_anew(tmp_path, kind, damage, ema):
    trainer, train, val = a_trainer(5, run_dir=tmp_path, ema=ema, lr=0.01)
    trainer.fit(train, val)
    path = RunDirectory(tmp_path).weights(kind)
    content, expected = path.read_bytes(), load_tensors(path)[0]
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-40] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    again, train, val = a_trainer(5, run_dir=tmp_path, ema=ema, lr=0.01)
    with pytest.warns(UserWarning, match=f"{kind}.safetensors was damaged"):
        again.fit(train, val)
    assert same(load_tensors(path)[0], expected)
    quiet, train, val = a_trainer(5, run_dir=tmp_path, ema=ema, lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet.fit(train, val)


ATTACKS = {
    "L2": (lambda net: torchattacks.PGDL2(net, 0.5, 0.2, 2), torchattacks.PGDL2, 0.5),
    "APGD L2": (lambda net: torchattacks.APGD(net, norm="L2", eps=0.4, steps=2), torchattacks.PGDL2, 0.4),
    "Linf": (lambda net: torchattacks.FFGSM(net, 0.1, 0.12), PGD, 0.1),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_validation_keeps_the_norm_and_radius_of_training(name):
    make, kind, eps = ATTACKS[name]
    model = a_model()
    trainer, train, val = a_trainer(1, model=model, method=lambda m, **_: Wrapping(PGDAT(m, attack=make(m))))
    row = trainer.fit(train, val).rows[0]
    assert type(trainer._val_attack) is kind
    assert trainer._val_attack.eps == eps
    assert "val_robust_accuracy" in row


def test_an_attack_of_unknown_norm_needs_a_validation_attack():
    def method(model, **_):
        return PGDAT(model, attack=torchattacks.DeepFool(model, steps=1))

    trainer, train, val = a_trainer(1, method=method)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=r"radius of the training attack DeepFool is unknown.*val_attack="):
        trainer.fit(train, val)
    assert same(before, weights(trainer.model))
    clean, train, val = a_trainer(1, method=method, val_attack=False)
    assert "val_robust_accuracy" not in clean.fit(train, val).rows[0]
    given, train, val = a_trainer(1, method=method, val_attack=lambda m: torchattacks.PGDL2(m, 0.3, 0.1, 1))
    assert "val_robust_accuracy" in given.fit(train, val).rows[0]


class Named(Standard):
    """Names a part of its loss in every step, and another one in every second step."""

    def __init__(self, model, **_):
        super().__init__(model)
        self.steps, self.seen = 0, []

    def loss(self, x, x_adv, y, index=None):
        step = super().loss(x, x_adv, y, index).plus("weight", self.model.network.classifier.weight.square().mean())
        self.steps += 1
        self.seen.append((step.terms["weight"].item(), len(x)))
        return step.plus("even", torch.tensor(float(self.steps))) if self.steps % 2 == 0 else step


def test_named_parts_of_a_loss_are_averaged_over_images():
    model = a_model()
    method = Named(model)
    trainer = Trainer(method, torch.optim.SGD(model.parameters(), lr=0.1), epochs=1)
    row = trainer.fit(make_loader(a_split(40), 16)).rows[0]  # 16, 16 and 8 images
    expected = sum(value * n for value, n in method.seen) / sum(n for _, n in method.seen)
    assert row["train_weight"] == pytest.approx(expected)
    assert row["train_even"] == 2.0


def test_a_part_of_a_loss_that_is_not_finite_is_an_error():
    class Broken(Standard):
        def loss(self, x, x_adv, y, index=None):
            step = super().loss(x, x_adv, y, index)
            return step._replace(terms={"part": torch.tensor(float("inf"))})

    model = a_model()
    trainer = Trainer(Broken(model), torch.optim.SGD(model.parameters(), lr=0.1), epochs=1)
    with pytest.raises(FloatingPointError):
        trainer.fit(make_loader(a_split(), 16))


@pytest.mark.parametrize(
    ("supported", "precision", "warned"), [(False, "bf16", 1), (True, "bf16", 0), (False, "fp32", 0)]
)
def test_emulated_bfloat16_is_warned_of(monkeypatch, supported, precision, warned):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        a_trainer(1, precision=precision)
    assert len([w for w in caught if "no bfloat16 instructions" in str(w.message)]) == warned


def test_a_model_that_a_cpu_cannot_train_in_channels_last_keeps_its_layout():
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.short, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 1, stride=2), nn.Linear(72, 3)

        def forward(self, x):
            assert x.is_contiguous()
            return self.head(self.short(self.stem(x)).flatten(1))

    model = Strided()
    trainer, train, val = a_trainer(1, model=model)
    trainer.fit(train, val)
    assert not trainer.channels_last
    assert model.stem.weight.is_contiguous()


def test_validation_attacks_in_the_range_of_the_images():
    trainer, _, _ = a_trainer(1)
    x = 1.2 * torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.1
    split = FloatSplit(x, torch.arange(30) % 3, 3, image_range=(-0.1, 1.1))
    trainer.method.image_range = split.image_range
    trainer.fit(make_loader(split, 10), make_loader(split, 10, shuffle=False))
    assert trainer._val_attack.image_range == (-0.1, 1.1)
    theirs, _, _ = a_trainer(1, val_attack=lambda m: torchattacks.PGD(m, steps=1))
    theirs.method.image_range = split.image_range
    before = weights(theirs.method.model)
    with pytest.raises(ValueError, match=r"clips images to \[0, 1\]"):
        theirs.fit(make_loader(split, 10), make_loader(split, 10, shuffle=False))
    assert same(before, weights(theirs.method.model))
