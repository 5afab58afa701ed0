"""Our networks as their reference implementations write them: bench.py measures how much faster ours are.

`plain` takes a network of bsn.py, diffusion.py or distill.py and returns one with the same weights and the same output
that computes it as the published code does (PUCA, improved DDPM, NAFNet): the memory in the order (B,C,H,W), float32,
the channel norm as a function of its own, attention as the softmax of a product, dilation as dilated convolution.
`CropDataset` makes training crops in the usual way: one Python call for each, collated by a DataLoader.
"""

import copy
import random

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import bsn
import diffusion
import distill


class NormFunction(torch.autograd.Function):
    """Norm over the channels of (B,C,H,W), forward and backward by hand, as NAFNet and PUCA have it."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean = x.mean(1, keepdim=True)
        scale = 1 / ((x - mean).pow(2).mean(1, keepdim=True) + eps).sqrt()
        y = (x - mean) * scale
        ctx.save_for_backward(y, scale, weight)
        return weight.view(1, -1, 1, 1) * y + bias.view(1, -1, 1, 1)

    @staticmethod
    def backward(ctx, gradient):
        y, scale, weight = ctx.saved_tensors
        g = gradient * weight.view(1, -1, 1, 1)
        inner = g - g.mean(1, keepdim=True) - y * (g * y).mean(1, keepdim=True)
        return scale * inner, (gradient * y).sum((0, 2, 3)), gradient.sum((0, 2, 3)), None


class ChannelNorm(nn.Module):
    """Takes the place of a LayerNorm; as that one, it is given a channels-last view, (B,H,W,C)."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x):
        return NormFunction.apply(x.movedim(-1, 1), self.weight, self.bias, self.eps).movedim(1, -1)


class Attention(nn.Module):
    """Takes the place of diffusion.Attention: computes the whole matrix of weights, and its softmax in float32."""

    def __init__(self, ours):
        super().__init__()
        self.norm, self.qkv, self.out = ours.norm, ours.qkv, ours.out

    def forward(self, x):
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (n h d) y x -> n (b h) d (y x)", n=3, h=4)
        scale = q.shape[1] ** -0.25
        weight = torch.softmax(torch.einsum("bdi,bdj->bij", q * scale, k * scale).float(), -1).type(q.dtype)
        mixed = torch.einsum("bij,bdj->bdi", weight, v)
        return x + self.out(rearrange(mixed, "(b h) d (y x) -> b (h d) y x", h=4, y=x.shape[2]))


class DilatedPUCA(nn.Module):
    """bsn.PUCA on whole images: every 3x3 convolution after the masked one is dilated by the stride.

    As published, the attention of a DABlock pools over the whole image; only in this the output differs from ours.
    """

    def __init__(self, ours):
        super().__init__()
        self.ours, self.stride = ours, ours.stride
        for block in ours.modules():
            if isinstance(block, bsn.DABlock | bsn.DenseBlock):
                for conv in block.children():
                    if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                        conv.dilation = conv.padding = (self.stride, self.stride)

    def forward(self, y):
        ours, (h, w), s = self.ours, y.shape[-2:], self.stride
        unit, before = s * 2 ** len(ours.encoders), 2 * s
        pad = (before, unit - (w + before) % unit, before, unit - (h + before) % unit)
        x = F.pad(y, pad, mode="reflect") if s == 2 else F.pad(y, pad)
        x = seen = ours.blind(F.pad(x, 4 * (ours.reach,)))
        skips = []
        for encoder, down in zip(ours.encoders, ours.downs):
            skips.append(encoder(x))
            x = rearrange(down(skips[-1]), "b c (h i p) (w j q) -> b (c i j) (h p) (w q)", i=2, j=2, p=s, q=s)
        x = ours.middle(x)
        for up, decoder in zip(ours.ups, ours.decoders):
            x = rearrange(up(x), "b (c i j) (h p) (w q) -> b c (h i p) (w j q)", i=2, j=2, p=s, q=s)
            x = decoder(x + skips.pop())
        x = ours.tail(torch.cat([x, seen], 1) if ours.dense else x)
        return x[..., before : before + h, before : before + w]


class FullResUNet(distill.ResUNet):
    """The student of preset `fast`, as a U-Net is usually written: at full resolution."""

    patch = 1


def plain(network):
    """A copy of one of our networks, written as the reference implementations are; the same weights and output."""
    network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, ChannelNorm(child))
            elif isinstance(child, diffusion.Attention):
                setattr(module, name, Attention(child))
    return DilatedPUCA(network) if isinstance(network, bsn.PUCA) else network


class CropDataset(torch.utils.data.Dataset):
    """Random crops, flipped and turned, of the slices of several equal sets of volumes {name: (S,H,W)}."""

    def __init__(self, stacks, size, length):
        self.stacks, self.size, self.length = stacks, size, length
        self.slices = [(name, s) for name, volume in stacks[0].items() for s in range(len(volume))]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        name, s = self.slices[random.randrange(len(self.slices))]
        h, w = self.stacks[0][name].shape[1:]
        y, x = random.randrange(h - self.size + 1), random.randrange(w - self.size + 1)
        turns, flip = random.randrange(4), random.randrange(2)
        out = []
        for stack in self.stacks:
            crop = np.rot90(stack[name][s, y : y + self.size, x : x + self.size], turns)
            out.append(torch.from_numpy(np.ascontiguousarray(crop[:, ::-1] if flip else crop))[None])
        return out
