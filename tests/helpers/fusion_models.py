"""Models whose activations may or may not be fused."""

import torch
from torch import nn

from forwardpass.proofs.walker import linear_like

WIDTH = 64


class Mlp(nn.Module):
    def __init__(self, activation=None):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 128), activation or nn.GELU(), nn.Linear(128, WIDTH)
        self.skip = nn.Linear(WIDTH, 128)

    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        return self.fc2(x)


class AlsoUsed(Mlp):
    def forward(self, x):
        y = self.fc1(x)
        x = self.act(y)
        return self.fc2(x + y)


def behind(model):
    return {x.fqn: x.activation.formula for x in linear_like(model) if x.activation}
