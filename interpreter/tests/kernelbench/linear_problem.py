import torch
import torch.nn as nn


class Model(nn.Module):
    """A linear layer, and a leaky ReLU."""

    def __init__(self, in_features, out_features, negative_slope):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.activation = nn.LeakyReLU(negative_slope)

    def forward(self, x):
        return self.activation(self.linear(x))


batch_size = 1024
in_features = 8192
out_features = 8192
negative_slope = 0.1


def get_inputs():
    return [torch.rand(batch_size, in_features)]


def get_init_inputs():
    return [in_features, out_features, negative_slope]
