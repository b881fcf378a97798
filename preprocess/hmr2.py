"""HMR 2.0: a vision transformer, and a transformer decoder that asks it for SMPL's parameters."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .body import NUM_BETAS, NUM_JOINTS, Body, rotation_6d_to_matrix
from .hmr import POSE, Regressed
from .spin import RegressorFitter, load_net


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """What queries (B,N,C) gather from values (B,M,C) by keys (B,M,C), in each of the heads that the channels hold."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Self-attention and two layers, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, 2)
        x = x + self.attn["proj"](attend(q, k, v, self.heads))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Backbone(nn.Module):
    """ViTPose's: images (B,3,H,W) to tokens (B,P,width), one for each patch of 16x16 pixels, row by row."""

    PATCH = 16

    def __init__(self, size: tuple[int, int], width: int, depth: int, heads: int) -> None:
        super().__init__()
        patches = size[0] // self.PATCH * (size[1] // self.PATCH)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, self.PATCH, self.PATCH, padding=2)})
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.last_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x).flatten(2).mT
        # The class token is gone, but its position is still part of every other's.
        return self.last_norm(self.blocks(x + self.pos_embed[:, 1:] + self.pos_embed[:, :1]))


class Attention(nn.Module):
    """Of tokens to themselves, or to a context of `context` channels."""

    def __init__(self, width: int, heads: int, head_width: int, context: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_width
        if context is None:
            self.to_qkv = nn.Linear(width, 3 * inner, bias=False)
        else:
            self.to_q = nn.Linear(width, inner, bias=False)
            self.to_kv = nn.Linear(context, 2 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            q, k, v = self.to_qkv(x).chunk(3, 2)
        else:
            q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, 2)
        return self.to_out(attend(q, k, v, self.heads))


class FeedForward(nn.Module):
    """Two layers; the second is number 3 in the published keys."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Residual(nn.Module):
    """x + fn(norm(x))."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return x + self.fn(self.norm(x), *context)


class Decoder(nn.Module):
    """One token that attends to itself, to a context (B,M,C), and passes two layers, `depth` times over."""

    def __init__(self, context: int, width: int, depth: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.to_token_embedding = nn.Linear(1, width)
        self.pos_embedding = nn.Parameter(torch.zeros(1, 1, width))
        attention = partial(Attention, width, heads, head_width)
        layers = [
            nn.ModuleList(Residual(width, fn) for fn in (attention(), attention(context), FeedForward(width, hidden)))
            for _ in range(depth)
        ]
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def forward(self, context: Tensor) -> Tensor:
        """The token (B,width) after the last layer."""
        x = self.to_token_embedding(context.new_zeros(len(context), 1, 1)) + self.pos_embedding
        for to_itself, to_context, feed_forward in self.transformer["layers"]:  # type: ignore[attr-defined]
            x = feed_forward(to_context(to_itself(x), context))
        return x[:, 0]


class Head(nn.Module):
    """Tokens (B,M,context) to SMPL's parameters: one correction of the mean."""

    init_body_pose: Tensor
    init_betas: Tensor
    init_cam: Tensor

    def __init__(self, context: int, width: int, depth: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.transformer = Decoder(context, width, depth, heads, head_width, hidden)
        self.decpose = nn.Linear(width, POSE)
        self.decshape = nn.Linear(width, NUM_BETAS)
        self.deccam = nn.Linear(width, 3)
        self.register_buffer("init_body_pose", torch.zeros(1, POSE))
        self.register_buffer("init_betas", torch.zeros(1, NUM_BETAS))
        self.register_buffer("init_cam", torch.zeros(1, 3))

    def forward(self, context: Tensor) -> Regressed:
        x = self.transformer(context)
        pose = self.init_body_pose + self.decpose(x)
        # (24,2,3): one column after the other, unlike SPIN's.
        rotmats = rotation_6d_to_matrix(pose.view(-1, NUM_JOINTS, 2, 3).mT)
        return Regressed(rotmats, self.init_betas + self.decshape(x), self.init_cam + self.deccam(x))


class Hmr2Net(nn.Module):
    """Images (B,3,*size), ImageNet-normalised, to SMPL's parameters: HMR 2.0's network under its key names.

    The defaults are the published sizes: ViT-H/16 at 256x192 and six decoder layers, 0.67 billion parameters.

    Source: Goel et al., "Humans in 4D: Reconstructing and Tracking Humans with Transformers", 2023, section 3, and the
    code published with it (shubham-goel/4D-Humans). Written from the published layout; not yet run on the published
    checkpoint, which cannot be redistributed.
    """

    def __init__(
        self,
        size: tuple[int, int] = (256, 192),
        width: int = 1280,
        depth: int = 32,
        heads: int = 16,
        decoder_width: int = 1024,
        decoder_depth: int = 6,
        decoder_heads: int = 8,
        head_width: int = 64,
        hidden: int = 1024,
    ) -> None:
        super().__init__()
        self.backbone = Backbone(size, width, depth, heads)
        self.smpl_head = Head(width, decoder_width, decoder_depth, decoder_heads, head_width, hidden)

    def forward(self, x: Tensor) -> Regressed:
        return self.smpl_head(self.backbone(x))


class Hmr2Fitter(RegressorFitter):
    """Bodies by HMR 2.0, which wants a GPU.

    The window is the least of 4:3 that holds the crop, black beyond it.

    Args:
        file: the published epoch=35-step=1000000.ckpt, or any checkpoint with its keys `backbone.*` and `smpl_head.*`,
            alone or under "state_dict", as .safetensors too. The discriminator and the SMPL body in it are left out.
        body: a licensed SMPL body; None for the embedded one, whose betas stay 0.

    Raises:
        ValueError: the file is none, or lacks keys, or has others. FileNotFoundError: there is none.
    """

    size = (256, 192)

    def __init__(self, file: str | Path, body: Body | None = None) -> None:
        super().__init__(load_net(Hmr2Net, file, "state_dict", ("smpl.", "discriminator.", "initialized")), body)

    def tall(self, height: int, width: int) -> float:
        return max(1.0, self.size[0] / self.size[1] * width / height)
