"""An interrupted evaluation resumes with the same verdicts; a foreign state is refused."""

import json

import pytest
import torch
from torch import nn

from at_extensions.evaluation import evaluate
from at_extensions.evaluation.state import Batch, Store, weights_digest


class Interrupted(Exception):
    """Any interruption of a run."""


def stop_after(monkeypatch, batches):
    """Stop a run when so many batches have been finished."""
    save, done = Store.save, []

    def saving(self, attack, batch):
        save(self, attack, batch)
        done.append(batch)
        if len(done) == batches:
            raise Interrupted

    monkeypatch.setattr(Store, "save", saving)
    return done


@pytest.mark.parametrize("batches", [1, 3, 5, 8])
def test_an_interrupted_run_resumes(net, make_images, label, small_suite, monkeypatch, tmp_path, batches):
    model, x = net(), make_images(40)
    y = label(model, x, wrong=2)
    whole = evaluate(model, x, y, eps=0.02, batch_size=8)
    with monkeypatch.context() as patch:
        stop_after(patch, batches)
        with pytest.raises(Interrupted):
            evaluate(model, x, y, eps=0.02, batch_size=8, state_dir=tmp_path)
    with monkeypatch.context() as patch:
        again = stop_after(patch, 10**9)
        resumed = evaluate(model, x, y, eps=0.02, batch_size=8, state_dir=tmp_path)
    assert torch.equal(resumed.robust, whole.robust)
    assert resumed.after_attack == whole.after_attack
    assert torch.equal(resumed.examples.adversarial, whole.examples.adversarial)
    total = len(list(tmp_path.glob("*/*.safetensors")))
    assert len(again) == total - batches  # nothing was done twice
    with monkeypatch.context() as patch:
        once_more = stop_after(patch, 10**9)
        finished = evaluate(model, x, y, eps=0.02, batch_size=8, state_dir=tmp_path)
    assert once_more == []
    assert torch.equal(finished.robust, whole.robust)
    assert finished.attack_seconds == resumed.attack_seconds


def test_a_damaged_batch_is_attacked_again(net, make_images, label, small_suite, tmp_path):
    model, x = net(), make_images(24)
    y = label(model, x)
    whole = evaluate(model, x, y, eps=0.02, batch_size=8, state_dir=tmp_path)
    records = sorted(tmp_path.glob("*/*.safetensors"))
    records[1].write_bytes(records[1].read_bytes()[:100])
    (records[0].parent / f".{records[0].name}.xyz").write_bytes(b"left by a kill")
    assert torch.equal(evaluate(model, x, y, eps=0.02, batch_size=8, state_dir=tmp_path).robust, whole.robust)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"eps": 0.021}, "eps"),
        ({"seed": 1}, "seed"),
        ({"batch_size": 9}, "batch_size"),
        ({"precision": "bf16"}, "precision"),
        ({"norm": "L2"}, "norm"),
        ({"version": "plus"}, "attacks"),
        ({"version": "custom", "attacks": ["apgd-t", "apgd-ce", "fab-t", "square"]}, "suite"),
        ({"data": 1}, "data"),
        ({"labels": 1}, "data"),
        ({"model": 1}, "weights"),
    ],
)
def test_the_state_of_another_evaluation_is_refused(net, make_images, label, small_suite, tmp_path, change, what):
    model, x = net(), make_images(6)
    y = label(model, x)
    arguments = {"eps": 0.02, "batch_size": 8}
    evaluate(model, x, y, **arguments, state_dir=tmp_path)
    if what == "weights":
        with torch.no_grad():
            model.head.bias[0] += 1e-6
    elif "data" in change:
        x = x.clone()
        x[3, 0, 2, 2] += 1 / 255
    elif "labels" in change:
        y = (y + 1) % 4
    else:
        arguments |= change
    with pytest.raises(ValueError, match=rf"differs in .*{what}"):
        evaluate(model, x, y, **arguments, state_dir=tmp_path)


def test_a_file_that_is_no_state_is_refused(net, make_images, label, small_suite, tmp_path):
    model, x = net(), make_images(6)
    y = label(model, x)
    (tmp_path / "evaluation_state.json").write_text("{")
    with pytest.raises(ValueError, match="not the state of an evaluation"):
        evaluate(model, x, y, eps=0.02, state_dir=tmp_path)
    (tmp_path / "evaluation_state.json").unlink()
    Store(tmp_path).save("fab-t", Batch(0, torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1), 0.0))
    with pytest.raises(ValueError, match="holds batches but no"):
        evaluate(model, x, y, eps=0.02, state_dir=tmp_path)


def test_a_batch_of_other_samples_is_refused(tmp_path):
    rows = torch.arange(3)
    store = Store(tmp_path)
    store.save("square", Batch(2, rows, rows > 1, rows, torch.zeros(1, 3, 2, 2), 0.5, 4, 5))
    batch = store.load("square", 2, rows)
    assert (batch.number, batch.seconds, batch.zero_gradients, batch.contradicted) == (2, 0.5, 4, 5)
    assert torch.equal(batch.broken, rows > 1)
    assert store.load("square", 3, rows) is None
    with pytest.raises(ValueError, match="about other samples"):
        store.load("square", 2, rows + 1)


def test_the_weights_digest_depends_on_weights_and_architecture_alone(net):
    model = net()
    digest = weights_digest(model)
    assert digest == weights_digest(net())
    assert digest != weights_digest(net(seed=1))
    model.body[2] = nn.Tanh()
    assert weights_digest(model) != digest  # no weight differs
    first, second = nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU())
    for module, here in ((first, object()), (second, object())):
        module.extra_repr = lambda here=here: f"activation={here}"  # an address, another in each process
    assert weights_digest(first) == weights_digest(second)
    half = nn.Linear(2, 2).bfloat16()
    assert len(weights_digest(half)) == 64


def test_the_state_is_readable(net, make_images, label, small_suite, tmp_path):
    model, x = net(), make_images(6)
    evaluate(model, x, label(model, x), eps=0.02, state_dir=tmp_path / "new" / "folder")
    state = json.loads((tmp_path / "new" / "folder" / "evaluation_state.json").read_text())
    assert state["eps"] == 0.02
    assert state["attacks"]["square"]["n_queries"] == 100
