"""Samples are read in batches, are recognised when read again, and bad ones are refused."""

from types import SimpleNamespace

import pytest
import torch

from at_extensions.evaluation import evaluate


def test_a_dataset_is_read_in_batches(net, make_images, label, small_suite):
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


def test_a_dataset_that_changes_is_refused(net, make_images, label, small_suite):
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
