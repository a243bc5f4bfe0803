"""Three small wrappings that need each hook of the contract, for tests in one process and in several."""

import torch
from torch import nn
from torch.nn.utils import stateless

from at_extensions.methods import Wrapping
from at_extensions.processes import add_over_ranks
from at_extensions.untouched import RandomStream


class Penalised(Wrapping):
    """A penalty toward the clean predictions in the attack and in the loss, as temporal ensembling has one."""

    def __init__(self, inner, weight=2.0):
        super().__init__(inner)
        self.weight = weight

    def penalty(self, x, logits):
        return self.weight * (logits.softmax(1) - self.clean_logits(x).softmax(1)).square().mean()

    def attack_loss(self, x, y, index=None):
        inner = self.inner_attack_loss(x, y, index)
        return lambda logits: inner(logits) + self.penalty(x, logits)

    def loss(self, x, x_adv, y, index=None):
        step = self.inner.loss(x, x_adv, y, index)
        return step.plus("penalty", self.penalty(x, step.logits))


class Shaken(Wrapping):
    """The inner loss at weights moved at random, as adversarial weight perturbation moves them; its own stream."""

    def __init__(self, inner, size=0.05, seed=7):
        super().__init__(inner)
        self.size, self.noise = size, RandomStream(seed)

    def loss(self, x, x_adv, y, index=None):
        moved = {}
        with self.noise.on(x.device):
            for name, p in self.model.named_parameters():
                moved[name] = p + self.size * torch.randn_like(p)
        with stateless._reparametrize_module(self.model, moved):
            return self.inner.loss(x, x_adv, y, index)


class Visits(Wrapping):
    """Counts how often each training sample was seen, in a buffer that each process fills by itself."""

    needs_index = True

    def __init__(self, inner, num_samples):
        super().__init__(inner)
        self.register_local_buffer("visits", torch.zeros(num_samples, dtype=torch.long))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.long))

    def loss(self, x, x_adv, y, index=None):
        self.visits.index_add_(0, index, torch.ones_like(index))
        return self.inner.loss(x, x_adv, y, index)

    def epoch_end(self):
        super().epoch_end()
        add_over_ranks(self.visits)
        self.epochs += 1


def a_net(seed=0, num_classes=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes)
        ).double()
