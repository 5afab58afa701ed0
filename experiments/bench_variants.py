"""The networks that bench.py measures, each in two or three variants: built, trained a step, run, sampled.

    ours                      as the stages have it
    the same network, plain   computed as the reference implementations do (plain.py): memory in the order (B,C,H,W),
                              float32, their norm, attention and dilation, one Python call per crop in a DataLoader
    plain                     the same, and where the network of `fast` is made for a CPU, the usual one instead: the
                              U-Net and the student at full resolution, the U-Net with GroupNorm

Plain sampling is a loop over the DDIM scheduler of `diffusers`, with one pass for each of the pair.
"""

import copy
import itertools
import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

import bsn
import data
import diffusion
import distill
import noise
import srds
from experiments import plain
from lib import formats, runtime, training

OURS, SAME, PLAIN = "ours", "the same network, plain", "plain"
UNET, STUDENT = "diffusion U-Net", "student of `fast`"
ABAR = diffusion.alpha_bar()


def bsn_loss(network, y, x):
    return bsn.blind_spot_loss(network(y).float(), y)


def diffusion_loss(network, y, x):
    t = torch.randint(len(ABAR), (len(y),), device=y.device)
    x0, c = diffusion.to_x(y, x, "image", None), diffusion.scaled(x)
    return diffusion.diffusion_loss(network, x0, c, ABAR, t, torch.randn_like(y), "v")


def student_loss(network, y, x):
    return distill.mse_loss(network(y).float(), x)


class Case(NamedTuple):
    """ours: makes the network. usual: makes the one that people use instead, or None. loss: (network, y, x) to it."""

    ours: Callable
    usual: Callable | None
    loss: Callable
    preset: dict

    @property
    def variants(self):
        return [OURS, SAME, PLAIN] if self.usual else [OURS, PLAIN]


def cases(size):
    """{name: Case} of the preset fast or paper."""
    b, u, s = bsn.PRESETS[size], diffusion.PRESETS[size], distill.PRESETS[size]
    n = distill.PRESETS["nafnet" if size == "fast" else size]
    depths = ("width", "enc_blocks", "middle_blocks")
    puca = partial(bsn.PUCA, **{k: b[k] for k in depths}, dec_blocks=b["enc_blocks"][::-1])
    unet = {k: u[k] for k in ("width", "mult", "blocks", "attention", "patch", "groups")}
    nafnet, resunet = ({k: preset[k] for k in (*depths, "dec_blocks")} for preset in (n, s))
    usual_unet = partial(diffusion.UNet, **{**unet, "patch": 1, "groups": 32}) if size == "fast" else None
    found = {
        "PUCA": Case(puca, None, bsn_loss, b),
        UNET: Case(partial(diffusion.UNet, **unet), usual_unet, diffusion_loss, u),
        "NAFNet": Case(partial(distill.NAFNet, **nafnet), None, student_loss, n),
    }
    if size == "fast":
        usual = partial(plain.FullResUNet, **resunet)
        found["blind-spot network of `fast`"] = Case(partial(puca, dense=True), None, bsn_loss, b)
        found[STUDENT] = Case(partial(distill.ResUNet, **resunet), usual, student_loss, s)
    return found


def build(size, name, variant, device, seed=0):
    """A network in one of its variants, on its device."""
    case = cases(size)[name]
    torch.manual_seed(seed)
    network = (case.usual if variant == PLAIN and case.usual else case.ours)()
    return (network if variant == OURS else plain.plain(network)).to(device, memory_format=memory_format(variant))


def memory_format(variant):
    return torch.channels_last if variant == OURS else torch.contiguous_format


def autocast(variant, device):
    return runtime.autocast(device, "auto" if variant == OURS else "float32")


def brain():
    """[{name: noisy}, {name: clean}]: the built-in brain with Gaussian noise of 6/255."""
    x, rng = formats.brain().slices.astype(np.float32) / 255, np.random.default_rng(0)
    return [{"brain": np.stack([noise.add(s, "gaussian", 6 / 255, 0, rng) for s in x])}, {"brain": x}]


def crops_of(stacks, batch, size, variant, seed=0):
    """Training crops without end, made as the variant makes them: [y, x], each (batch,1,size,size)."""
    if variant == OURS:
        return (data.random_crops(stacks, batch, size, runtime.step_rng(seed, k)) for k in itertools.count())
    random.seed(seed)
    return iter(torch.utils.data.DataLoader(plain.CropDataset(stacks, size, 10**9), batch))


def trainer(size, name, variant, stacks, batch, crop, device, seed=0, steps=10**9):
    """(network, callable that makes one of `steps` training steps as training.Training does, and returns the loss)."""
    case, network = cases(size)[name], build(size, name, variant, device, seed)
    preset, crops = case.preset, crops_of(stacks, batch, crop, variant, seed)
    betas = (0.9, preset.get("beta2", 0.999))
    optimizer = torch.optim.AdamW(network.parameters(), lr=preset["lr"], betas=betas, fused=variant == OURS)
    schedule = partial(training.warmup_cosine, steps=steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    ema, count = copy.deepcopy(network), itertools.count()

    def step():
        y, x = (z.to(device, memory_format=memory_format(variant)) for z in next(crops))
        optimizer.zero_grad(set_to_none=True)
        with autocast(variant, device):
            loss = case.loss(network, y, x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), preset.get("clip", 1.0))
        optimizer.step()
        scheduler.step()
        training.ema_update(ema, network, next(count), preset["ema"])
        return loss.detach()

    return network, step


def inference(size, name, variant, side, device):
    """The network on a slice of side x side pixels: a callable without arguments."""
    network = build(size, name, variant, device).eval()
    y = torch.rand(1, 1, side, side, device=device).to(memory_format=memory_format(variant))
    arguments = (y, y, torch.zeros(1, device=device)) if name == UNET else (y,)

    @torch.inference_mode()
    def run():
        with autocast(variant, device):
            return network(*arguments)

    return run


def sampler(size, variant, steps, device, side=256):
    """SRDS of one slice: a callable without arguments. The plain one makes a pass for each of the pair."""
    network = build(size, UNET, variant, device).eval()
    c, eps = torch.rand(1, 1, side, side, device=device), torch.randn(1, 1, side, side, device=device)
    eps_model = diffusion.eps_model(network, ABAR)

    @torch.inference_mode()
    def ours():
        with autocast(variant, device):
            return srds.srds(eps_model, c, eps, ABAR, steps)[0]

    @torch.inference_mode()
    def with_diffusers():
        from diffusers import DDIMScheduler

        betas = (1 - ABAR / torch.cat([torch.ones(1, dtype=ABAR.dtype), ABAR[:-1]])).numpy()
        scheduler = DDIMScheduler(len(ABAR), trained_betas=betas, clip_sample=False, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        samples = []
        for x in (eps, -eps):
            for t in scheduler.timesteps:
                x = scheduler.step(eps_model(x, c, t.expand(1).to(device)), t, x).prev_sample
            samples.append(x)
        return (samples[0] + samples[1]) / 2

    return ours if variant == OURS else with_diffusers
