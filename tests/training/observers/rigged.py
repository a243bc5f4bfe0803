"""A training rigged to collapse: FGSM that goes blind after some steps, on digits, with a small network."""

import torch
from torch import nn
from torch.nn import functional as F
from torchattacks.attack import Attack

from at_extensions import processes
from at_extensions.attacks import PGD
from at_extensions.data import load_dataset, make_loader
from at_extensions.evaluation.accuracy import count_correct
from at_extensions.methods import FGSMAT
from at_extensions.training import Trainer, create_optimizer, create_scheduler

EPS = 0.2
STEPS = 18  # an epoch, of 64 images


class Counting(nn.Module):
    """A network that counts its training passes, so that the count is part of a checkpoint and is rolled back."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)
            self.net = nn.Sequential(nn.Flatten(), *layers)
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.passes += 1
        return self.net(x)


class Blinding(Attack):
    """FGSM that from some training step on steps against the gradient, so that its images are easier than clean ones.

    As in catastrophic overfitting, training then sees no adversarial example any more, and accuracy under PGD falls.
    """

    def __init__(self, model, eps, after):
        super().__init__("Blinding", model)
        self.eps, self.after, self.norm = eps, after, "Linf"
        self.supported_mode = ["default"]

    def forward(self, images, labels):
        x = images.detach().requires_grad_(True)
        gradient = torch.autograd.grad(F.cross_entropy(self.get_logits(x), labels), x)[0]
        blind = int(self.model.passes) >= self.after
        return (images + (-self.eps if blind else self.eps) * gradient.sign()).clamp(0, 1).detach()


def loaders():
    splits = load_dataset("digits", val_fraction=0.2, seed=0)
    world = processes.world_size()
    shared = {"rank": processes.rank(), "world_size": world}
    generator = torch.Generator().manual_seed(1)
    train = make_loader(splits.train, 64 // world, augment="none", generator=generator, drop_last=True, **shared)
    return train, make_loader(splits.val, 500, shuffle=False, **shared)


def a_run(guard, *, after, epochs=5, schedule_epochs=None, method=None, **options):
    """Return a trainer, and its batches, whose attack goes blind after so many steps."""
    model = Counting()
    train, val = loaders()
    assert len(train) == STEPS
    method = FGSMAT(model, attack=Blinding(model, EPS, after), seed=3) if method is None else method(model)
    optimizer = create_optimizer(model, "adamw", lr=0.01, weight_decay=0.0)
    scheduler = create_scheduler(optimizer, "cosine", epochs=schedule_epochs or epochs, steps_per_epoch=STEPS)
    options = {"val_attack": lambda m: PGD(m, EPS, EPS / 4, 10), "progress": False} | options
    observers = [] if guard is None else [guard]
    trainer = Trainer(method, optimizer, epochs=epochs, scheduler=scheduler, observers=observers, **options)
    return trainer, train, val


def robust_accuracy(model):
    """PGD-10 accuracy on the validation images."""
    _, val = loaders()
    right, images = count_correct(model, val, attack=PGD(model, EPS, EPS / 4, 10), seed=9).tolist()
    return right / images
