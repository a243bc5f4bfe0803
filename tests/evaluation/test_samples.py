"""Samples: read in batches from tensors, arrays and datasets; changed and bad ones are refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from at_extensions.evaluation import accuracy, evaluate
from at_extensions.evaluation.samples import Samples


def test_memory_does_not_grow_with_a_dataset(net, make_images, label, small_suite):
    model, x = net(), make_images(40)
    y = label(model, x, wrong=4)

    class Counted(torch.utils.data.Dataset):
        """Counts the images that it handed out and that are still alive."""

        alive = peak = 0

        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            import weakref

            image = x[i].clone()
            Counted.alive += 1
            Counted.peak = max(Counted.peak, Counted.alive)
            weakref.finalize(image, self.died)
            return image, int(y[i]), i

        @staticmethod
        def died():
            Counted.alive -= 1

    by_dataset = evaluate(model, Counted(), eps=0.02, batch_size=8, keep_examples=3)
    by_tensor = evaluate(model, x, y, eps=0.02, batch_size=8, keep_examples=3)
    assert torch.equal(by_dataset.robust, by_tensor.robust)
    assert torch.equal(by_dataset.examples.adversarial, by_tensor.examples.adversarial)
    assert Counted.peak <= 8


def test_an_augmented_dataset_is_refused(net, make_images, label, small_suite):
    x = make_images(10)
    y = label(net(), x)

    class Augmented(torch.utils.data.TensorDataset):
        def __getitem__(self, i):
            return x[i] + 0.1 * torch.rand(1), y[i]

    with pytest.raises(ValueError, match="changed between two reads"):
        evaluate(net(), Augmented(x, y), eps=0.02)


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([(SimpleNamespace(), 1)], TypeError, "ToTensor"),
        ([torch.rand(3, 6, 6)], TypeError, r"must be \(image, label\)"),
        ([(torch.rand(3, 6, 6), 0), (torch.rand(3, 5, 6), 0)], ValueError, "resize"),
        ([(torch.rand(3, 6, 6) + 1, 0)], ValueError, "normalisation"),
        ([(torch.rand(3, 6, 6), -1)], ValueError, "labels"),
        ([], ValueError, "empty"),
    ],
)
def test_bad_datasets(linear, items, error, message):
    with pytest.raises(error, match=message):
        evaluate(linear(4), items, eps=0.1)


def strided(x):
    """A view of every other column, whose pixels are not neighbours in memory."""
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3])
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": strided,
    "double": torch.Tensor.double,
    "requires_grad": lambda x: x.clone().requires_grad_(),
    "numpy": torch.Tensor.numpy,
    "numpy float64": lambda x: x.double().numpy(),
    "numpy (N, H, W, C) transposed": lambda x: np.ascontiguousarray(x.permute(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "numpy mirrored": lambda x: np.ascontiguousarray(x.numpy()[..., ::-1])[..., ::-1],
    "numpy big endian": lambda x: x.numpy().astype(">f4"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_and_type_of_images_change_nothing(net, make_images, label, small_suite, layout):
    model, x = net(), make_images(12)
    y = label(model, x, wrong=2)
    plain = evaluate(model, x, y, eps=0.02, batch_size=5, version="custom", attacks=["apgd-ce"])
    other = LAYOUTS[layout](x)
    report = evaluate(model, other, y.numpy(), eps=0.02, batch_size=5, version="custom", attacks=["apgd-ce"])
    assert report.data == plain.data
    assert torch.equal(report.robust, plain.robust)
    assert accuracy(model, other, y.numpy().astype(np.uint8), batch_size=5) == 10 / 12
    assert accuracy(model, [(other[:7], y[:7]), (other[7:], y[7:].numpy())]) == 10 / 12


def test_half_precision_images_are_evaluated_in_float32(net, make_images, label, small_suite):
    model, x = net(), make_images(8).half()
    y = label(model, x.float(), wrong=1)
    attack = {"eps": 0.02, "version": "custom", "attacks": ["apgd-ce"]}
    for images in (x, x.numpy(), torch.utils.data.TensorDataset(x, y)):
        labels = y if not hasattr(images, "tensors") else None
        assert torch.equal(
            evaluate(model, images, labels, **attack).robust, evaluate(model, x.float(), y, **attack).robust
        )
        assert accuracy(model, images, labels) == 7 / 8
    assert accuracy(model, [(x, y)]) == 7 / 8


def test_read_only_memory_is_read_without_a_warning(make_images, recwarn):
    images, labels = make_images(4).numpy(), np.arange(4)
    images.flags.writeable = labels.flags.writeable = False
    x, y = Samples(images, labels).read(torch.tensor([2]))
    assert torch.equal(x[0], torch.tensor(np.array(images[2])))
    assert y.tolist() == [2]
    assert not recwarn.list


def test_classes_without_samples_are_reported_as_such(linear, make_images, small_suite):
    model, x = linear(5), make_images(40)
    labels = model(x).argmax(1)
    chosen = (labels == labels.unique()[0]) | (labels == labels.unique()[-1])
    report = evaluate(
        model, x[chosen].numpy(), labels[chosen].tolist(), eps=0.001, version="custom", attacks=["apgd-ce"]
    )
    assert report.num_classes == 5
    assert report.clean_accuracy == 1
    assert sum(row["clean"] is None for row in report.per_class) == 3


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (
            np.zeros((4, 6, 6, 3), np.uint8),
            np.zeros(4, int),
            TypeError,
            r"astype\('float32'\) / 255.*transpose\(0, 3, 1, 2\)",
        ),
        (np.zeros((4, 3, 6, 6), int), np.zeros(4, int), TypeError, "got int64"),
        (np.full((4, 3, 6, 6), 2.0), np.zeros(4, int), ValueError, r"\[0, 1\].*normalisation"),
        (np.full((4, 3, 6, 6), np.nan), np.zeros(4, int), ValueError, "not finite"),
        (np.zeros((4, 3, 6, 6)), np.zeros(4), TypeError, "integer dtype"),
        (np.zeros((4, 3, 6, 6)), np.zeros(3, int), ValueError, "3 labels for 4 images"),
        (np.zeros((4, 3, 6, 6)), np.full(4, 4), ValueError, "from 0 to 3"),
        (np.zeros((4, 3, 6, 6)), np.full(4, -100), ValueError, "got -100"),
        (np.zeros((4, 3, 6, 6)), None, TypeError, "labels"),
    ],
)
def test_bad_arrays(linear, images, labels, error, message):
    with pytest.raises(error, match=message):
        evaluate(linear(4), images, labels, eps=0.1)


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (torch.zeros(4, 3, 6, 6, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), TypeError, "float"),
        (np.zeros((4, 3, 6, 6), np.uint8), np.zeros(4, int), TypeError, "255"),
        (torch.full((4, 3, 6, 6), 1.5), torch.zeros(4, dtype=torch.long), ValueError, "4 images hold values outside"),
        (torch.full((4, 3, 6, 6), torch.nan), torch.zeros(4, dtype=torch.long), ValueError, "outside"),
        (torch.zeros(4, 3, 6, 6), torch.zeros(4), TypeError, "integer dtype"),
        (torch.zeros(4, 3, 6, 6), torch.full((4,), 4), ValueError, "4 labels are not class numbers"),
    ],
)
def test_bad_batches_have_no_accuracy(linear, images, labels, error, message):
    with pytest.raises(error, match=message):
        accuracy(linear(4), [(images, labels)])
