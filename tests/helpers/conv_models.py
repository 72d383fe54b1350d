"""Small models of convolutions, in the forms that libraries write them."""

import torch
import torch.nn.functional as F
from torch import nn


def randomised(model: nn.Module) -> nn.Module:
    """In eval mode, with norms that do something."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2)
            with torch.no_grad():
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0, 0.2)
    return model.eval()


class Block(nn.Module):
    """A ResNet's: its ReLU is called twice."""

    def __init__(self, c: int, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        if self.downsample is not None:
            x = self.downsample(x)
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU6())
        downsample = nn.Sequential(nn.Conv2d(32, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
        self.blocks, self.fc = nn.Sequential(Block(32), Block(32, downsample)), nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Conv(nn.Module):
    """YOLO's: another forward for when its norm is gone."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(c1, c2, k, s, k // 2, bias=False), nn.BatchNorm2d(c2)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


class C2f(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c, c), Conv(3 * c // 2, c)
        self.m = nn.ModuleList([nn.Sequential(Conv(c // 2, c // 2, 3), Conv(c // 2, c // 2, 3))])

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class YOLO(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.c2f = Conv(3, 16, 3, 2), Conv(16, 32, 3, 2), C2f(32)
        self.detect = nn.Conv2d(32, 20, 1)

    def forward(self, x):
        return self.detect(self.c2f(self.down(self.stem(x))))


class Inverted(nn.Module):
    """A MobileNet's, of Sequentials: expands, depthwise, projects."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(c, 2 * c, 1, bias=False), nn.BatchNorm2d(2 * c), nn.Hardswish()),
            nn.Sequential(nn.Conv2d(2 * c, 2 * c, 3, 1, 1, groups=2 * c), nn.BatchNorm2d(2 * c), nn.ReLU6()),
            nn.Conv2d(2 * c, c, 1, bias=False),
            nn.BatchNorm2d(c),
        )

    def forward(self, x):
        return x + self.conv(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 16, 3, 2, 1), Inverted(16)

    def forward(self, x):
        return self.block(self.stem(x))


class Plain(nn.Module):
    """No norm: a decoder's, with an upsampling, and a GELU that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = (
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, (1, 3), padding=(0, 1)),
        )
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x):
        x = self.act(self.first(x))
        return F.gelu(self.second(self.up(x)))


MODELS = {"resnet": ResNet, "yolo": YOLO, "mobilenet": MobileNet, "plain": Plain}
#: Convolutions of each that are wide enough.
WIDE = {
    "resnet": ["blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "blocks.1.downsample.0"],
    "yolo": ["down.conv", "c2f.cv1.conv", "c2f.cv2.conv", "c2f.m.0.0.conv", "c2f.m.0.1.conv", "detect"],
    "mobilenet": ["block.conv.0.0", "block.conv.2"],
    "plain": ["second"],
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomised(MODELS[name]())


def picture(n: int = 2, size: int = 24) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))
