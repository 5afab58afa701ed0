"""Speed and memory of every stage, beside the plain form that people would otherwise use; one table, and JSON.

    python bench.py                                                         # fast and paper widths, all sections
    python bench.py --preset fast --sections train infer --repeats 9
    python bench.py --sections student --data demo/brain.h5 --student demo/student.pt      # and the classical denoisers

Sections:

    train     a training step as the scripts take it, crops included, and the memory of one
    losses    the mean loss on 64 other crops after --steps training steps, two seeds (not run unless named)
    infer     a slice of 256x256 and of 512x512 pixels
    sample    SRDS of a slice of 256x256, for each network evaluation and as a whole
    crops     random crops per second: in memory, streamed from HDF5, and from a DataLoader
    student   the student of --student and scikit-image's denoisers on a 512x512 slice, and their PSNR on --data
    scaling   time per slice for 10, 100, 1000 slices, and per pixel for sides of 128 to 2048

The plain form (plain.py) is that of the reference implementations: (B,C,H,W) memory, float32, their norm, attention and
dilation, one Python call per crop in a DataLoader; for the U-Net of `fast` also its GroupNorm and full resolution; for
sampling a loop over the DDIM scheduler of `diffusers`, 25 steps, the two of a pair in two passes. "the same network"
is ours in the plain form, nothing left out. All forms of a line run in turn, in this process; times are medians.

Operations are counted by torch.utils.flop_counter, a multiplication and an addition as two. Their share is of what a
2048x2048 matrix product reaches here, in the precision that the form uses; convolutions can pass it. Memory is what a
process of its own needs above its start (Linux; on CUDA, what torch has allocated).
"""

import itertools
import json
import multiprocessing
import platform
import re
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

import bsn
import data
import diffusion
import distill
import formats
import noise
import plain
import runtime
import srds

LEVEL = 6 / 255
OURS, SAME, PLAIN = "ours", "the same network, plain", "plain"


# ---------------------------------------------------------------------------------------------------------------
# what is measured
# ---------------------------------------------------------------------------------------------------------------
def denoising_loss(network, y, x):
    return distill.mse_loss(network(y).float(), x)


def blind_loss(network, y, x):
    return bsn.blind_spot_loss(network(y).float(), y)


def noise_loss(network, y, x, abar=diffusion.alpha_bar()):  # noqa: B008
    t = torch.randint(len(abar), (len(y),))
    return diffusion.diffusion_loss(network, (y - x) / LEVEL, diffusion.scaled(x), abar, t, torch.randn_like(y), "v")


def kept(preset, *names, **others):
    return {**{name: preset[name] for name in names}, **others}


def networks(size):
    """{name: (class, arguments, arguments of the plain form, loss, preset)} at `size`, fast or paper."""
    b, u, s = bsn.PRESETS[size], diffusion.PRESETS[size], distill.PRESETS[size]
    puca = kept(b, "width", "enc_blocks", "middle_blocks", dec_blocks=b["enc_blocks"][::-1])
    unet = kept(u, "width", "mult", "blocks", "attention", "patch", "groups")
    naf = kept(s if size == "paper" else distill.NAFNET, "width", "enc_blocks", "middle_blocks", "dec_blocks")
    found = {
        "blind-spot network": (bsn.PUCA, {**puca, "dense": b["dense"]}, {}, blind_loss, b),
        "blind-spot network, PUCA's blocks": (bsn.PUCA, puca, {}, blind_loss, b),
        "diffusion U-Net": (diffusion.UNet, unet, dict(patch=1, groups=32), noise_loss, u),
        "NAFNet": (distill.NAFNet, naf, {}, denoising_loss, s),
    }
    if size == "paper":
        del found["blind-spot network"]  # PUCA's blocks are the paper's
    else:
        dense = kept(s, "width", "enc_blocks", "middle_blocks", "dec_blocks")
        found["student"] = (distill.DenseUNet, dense, {}, denoising_loss, s)
    return found


def network_of(size, name, form, where):
    """A network in one of its forms, on its device."""
    kind, arguments, others, *_ = networks(size)[name]
    torch.manual_seed(0)
    if form == PLAIN and others:
        arguments = {**arguments, **others}
    network = kind(**arguments)
    return plain.plain(network).to(where) if form != OURS else network.to(where, memory_format=torch.channels_last)


def forms_of(size, name):
    """Ours, the same network in the plain form, and the plain form if it is another network."""
    kind, arguments, others, *_ = networks(size)[name]
    return [OURS, SAME, PLAIN] if {**arguments, **others} != arguments else [OURS, PLAIN]


def brain():
    """({name: noisy}, {name: clean}): the built-in brain with Gaussian noise of 6/255."""
    x = formats.brain().slices.astype(np.float32) / 255
    rng = np.random.default_rng(0)
    return {"brain": np.stack([noise.add(s, "gaussian", LEVEL, 0, rng) for s in x])}, {"brain": x}


def trainer(network, loss, preset, stacks, batch, crop, where, form, seed=0):
    """One training step as the scripts take it: a callable without arguments, which returns the loss."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=preset["lr"], betas=(0.9, preset.get("beta2", 0.999)))
    ema = AveragedModel(network, multi_avg_fn=runtime.ema_update(preset["ema"]))
    layout = torch.channels_last if form == OURS else torch.contiguous_format
    precision = "auto" if form == OURS else "float32"
    if form == OURS:
        crops = (data.random_crops(stacks, batch, crop, runtime.step_rng(seed, k)) for k in itertools.count())
    else:
        np.random.seed(seed)  # noqa: NPY002  the way of such datasets
        crops = iter(torch.utils.data.DataLoader(plain.CropDataset(stacks, crop, 10**9), batch))

    def step():
        y, x = (z.to(where, memory_format=layout) for z in next(crops))
        optimizer.zero_grad(set_to_none=True)
        with runtime.autocast(where, precision):
            value = loss(network, y, x)
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), preset.get("clip", 1.0))
        optimizer.step()
        ema.update_parameters(network)
        return value.detach()

    return step


# ---------------------------------------------------------------------------------------------------------------
# how it is measured
# ---------------------------------------------------------------------------------------------------------------
def wait(where):
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def alternate(actions, repeats, where, least=0.2):
    """{form: median seconds} of callables that run in turn, each turn for at least `least` seconds."""
    turns = {}
    for form, action in actions.items():
        for _ in range(2):  # caches, and memory
            action()
        wait(where)
        started = time.perf_counter()
        action()
        wait(where)
        turns[form] = max(1, int(least / (time.perf_counter() - started)))
    seconds = {form: [] for form in actions}
    for _ in range(repeats):
        for form, action in actions.items():
            started = time.perf_counter()
            for _ in range(turns[form]):
                action()
            wait(where)
            seconds[form].append((time.perf_counter() - started) / turns[form])
    return {form: statistics.median(s) for form, s in seconds.items()}


def operations(action):
    """Floating-point operations of a callable, in 10^9."""
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops() / 1e9


def resident(where):
    """Bytes that this process has had in memory at most."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    status = Path("/proc/self/status")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) if status.exists() else None


def memory(what, *args):
    """Megabytes that what(*args) needs above the start, in a process of its own; None where it cannot be told."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(need, (what, *args))


def need(what, *args):
    where = runtime.device(args[-1])
    torch.ones(1, 1, 32, 32, device=where).to(torch.bfloat16).conv2d(torch.ones(1, 1, 3, 3, device=where).bfloat16()) if 0 else None
    before = resident(where)
    what(*args)
    after = resident(where)
    return None if after is None else (after - before) / 1e6
