"""A small run of the trainer: 48 images of three classes, a small CNN, PGD-2."""

import torch

from at_extensions import create_model
from at_extensions.data import ImageSplit, make_loader
from at_extensions.methods import PGDAT, Standard
from at_extensions.training import Trainer, create_optimizer, create_scheduler


def a_split(n=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 120, (n, 1, 8, 8), generator=generator)
    images[torch.arange(n), 0, labels * 2] += 130  # a bright row tells the class
    return ImageSplit(images.to(torch.uint8), labels, 3)


def a_model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model("small_cnn", 3, in_chans=1, width=4)


def a_trainer(epochs, *, model=None, method=PGDAT, lr=0.1, schedule_epochs=None, optimizer="sgd", **options):
    model = a_model() if model is None else model
    attack = {} if method is Standard else {"eps": 0.1, "alpha": 0.05, "steps": 2, "seed": 5}
    train = make_loader(a_split(), 16, augment="crop", generator=torch.Generator().manual_seed(1))
    val = make_loader(a_split(24, seed=9), 24, shuffle=False)
    opt = create_optimizer(model, optimizer, lr=lr)
    scheduler = create_scheduler(opt, "onecycle", epochs=schedule_epochs or epochs, steps_per_epoch=len(train))
    trainer = Trainer(method(model, **attack), opt, epochs=epochs, scheduler=scheduler, **options)
    return trainer, train, val


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def timeless(rows):
    """Return rows of metrics without durations and events."""
    return [{k: v for k, v in row.items() if "seconds" not in k and k != "events"} for row in rows]
