import torch
import torch.nn as nn


class Model(nn.Module):
    """A convolution in groups, whose result is scaled per channel and clamped."""

    def __init__(self, in_channels, out_channels, kernel_size, groups, scale_shape):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, groups=groups)
        self.scale = nn.Parameter(torch.randn(scale_shape))

    def forward(self, x):
        return torch.clamp(self.conv(x) * self.scale, min=-1.0, max=1.0)


batch_size = 128
in_channels = 64
out_channels = 128
height, width = 128, 128
kernel_size = 3
groups = 8
scale_shape = (out_channels, 1, 1)


def get_inputs():
    return [torch.rand(batch_size, in_channels, height, width)]


def get_init_inputs():
    return [in_channels, out_channels, kernel_size, groups, scale_shape]
