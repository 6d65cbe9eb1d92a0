"""Small image classifiers with random weights: a vision transformer, one with a distillation token, a ConvNeXt."""

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE, CLASSES = 32, 10


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Encoder(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches and a class token; with `distilled` a second token with a head of its own, as DeiT has it."""

    def __init__(self, width: int = 48, depth: int = 3, distilled: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 8, 8)
        self.tokens = nn.Parameter(torch.randn(1, 1 + distilled, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, (SIZE // 8) ** 2 + 1 + distilled, width))
        self.blocks = nn.Sequential(*(Encoder(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.head_dist = nn.Linear(width, CLASSES) if distilled else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x], 1) + self.positions
        x = self.norm(self.blocks(x))
        return self.head(x[:, 0]) if self.head_dist is None else (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2


class ConvBlock(nn.Module):
    def __init__(self, width: int, pointwise: bool) -> None:
        super().__init__()
        self.conv_dw, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        make = (lambda n, k: nn.Conv2d(n, k, 1)) if pointwise else nn.Linear
        self.pointwise, self.fc1, self.fc2 = pointwise, make(width, 4 * width), make(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))  # [batch, height, width, channels]
        if self.pointwise:
            return x + self.fc2(functional.gelu(self.fc1(y.permute(0, 3, 1, 2))))
        return x + self.fc2(functional.gelu(self.fc1(y))).permute(0, 3, 1, 2)


class Stage(nn.Module):
    def __init__(self, before: int, width: int, pointwise: bool) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(before, width, 2, 2) if before != width else nn.Identity()
        self.blocks = nn.Sequential(*(ConvBlock(width, pointwise) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class ConvNeXt(nn.Module):
    def __init__(self, pointwise: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 4, 4))
        self.stages = nn.Sequential(Stage(24, 24, pointwise), Stage(24, 40, pointwise))
        self.norm, self.head = nn.LayerNorm(40), nn.Linear(40, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(self.stem(x)).mean((2, 3))))


KINDS = {
    "vit": (ViT, {}, "blocks"),
    "deit": (ViT, {"distilled": True}, "blocks"),
    "convnext": (ConvNeXt, {}, "stages.*.blocks"),
    "convnext 1×1": (ConvNeXt, {"pointwise": True}, "stages.*.blocks"),
}


def made(kind: str, seed: int = 0) -> nn.Module:
    model, settings, _ = KINDS[kind]
    torch.manual_seed(seed)
    return model(**settings).eval()


def images(count: int = 6, seed: int = 1) -> Tensor:
    """[count, 3, 32, 32] with some structure: smooth, and channels of different size."""
    noise = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return functional.avg_pool2d(noise, 5, 1, 2) * torch.tensor([0.3, 1.0, 3.0])[:, None, None]
