"""The shipped students, weights/*.pt: trained on synthetic volumes (dead_leaves.py) with noise of every kind.

No patient, no clean medical image. The network is told the noise (distill.ToldResUNet), so that one serves all levels.

    Out   weights/volumes.pt   --context 2; weights/images.pt   --context 0; checkpoints of distill.py

    python -m experiments.pretrain --model volumes.pt                          # hours on two cores; --resume goes on
    python -m experiments.pretrain --model images.pt --context 0 --init volumes.pt
    python -m experiments.pretrain --model volumes.pt --resume --steps 200000  # longer

Each step takes crops of a window of the last volumes, which a process beside the training makes; the volumes, crops and
noise of a step depend on the seed and its number alone. The loss is the logarithm of the mean square error as a share
of the noise's variance, so that all levels count alike.
"""

from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

import distill
import noise
from experiments.dead_leaves import dead_leaves, smooth_field
from lib import crops, runtime, training

SETTINGS = {
    "width": ("features at the first level", 32),
    "steps": ("optimizer steps", 40_000),
    "batch": ("crops per step", 8),
    "crop": ("side of the square training crops, pixels", 96),
    "lr": ("peak learning rate", 2e-3),
    "beta2": ("AdamW's second decay", 0.99),
    "clip": ("largest gradient norm", 1.0),
    "ema": ("decay per step of the averaged weights", 0.999),
}
PRESETS = training.presets(("fast",), SETTINGS)
LAYERED = 0.4  # share of the single images that are X-rays
WINDOW, EVERY = 24, 64  # volumes to draw crops from, crops after which one of them is replaced


def random_law(rng):
    """A noise model for images in [0,1]: of random kind, level (1.5 to 40 of 255), and correlation."""
    power = (1.5 * (40 / 1.5) ** rng.random() / 255) ** 2
    kind, floor = rng.choice(3, p=(0.6, 0.2, 0.2)), rng.choice([0, rng.random()])
    variance = power * ((1 - floor) * np.diag([1, 3, 6])[kind] + floor * np.array([1, 0, 0]))
    return noise.make_noise_model(variance, random_correlation(rng), through=random_through(rng))


def random_correlation(rng):
    """(13,13) table: white, blurred, blurred and white together, or of a spectrum that was cut off."""
    table = np.zeros((8 * noise.REACH + 1,) * 2)
    table[4 * noise.REACH, 4 * noise.REACH] = 1
    kind = rng.random()
    if 0.45 < kind < 0.9:
        sigma = rng.uniform(0.3, 1.4) * (np.ones(2) if rng.random() < 0.7 else rng.uniform(0.5, 1, 2))
        blurred = gaussian_filter(table, 2**0.5 * sigma)
        share = rng.choice([0.5, 1, rng.random()])
        table = share * blurred / blurred.max() + (1 - share) * table
    elif kind >= 0.9:
        lag = np.arange(-4 * noise.REACH, 4 * noise.REACH + 1)
        table = np.outer(*(np.sinc(share * lag) for share in rng.uniform(0.6, 1, 2)))
    return table[3 * noise.REACH : -3 * noise.REACH, 3 * noise.REACH : -3 * noise.REACH]


def random_through(rng):
    """Correlation one and two slices away: mostly none, else that of a Gaussian blur."""
    r = rng.choice([0, rng.uniform(0.1, 0.8)], p=(0.85, 0.15))
    return r, r**4


def slab(volumes, context, size, rng):
    """A crop (2 context + 1,h,w) of one of the volumes, and that volume."""
    volume = volumes[rng.integers(len(volumes))]
    return crops.random_crops([{"": volume}], 1, size, rng, contexts=[context])[0][0].numpy(), volume


def layered(volumes, size, rng):
    """Crops of 2 to 6 volumes added up, (1,h,w) from 0 to at most 1, as an X-ray adds what it goes through."""
    x = sum(share * slab(volumes, 0, size, rng)[0] for share in rng.dirichlet(np.ones(rng.integers(2, 7))))
    return ((x - x.min()) / max(np.ptp(x), 0.1)).astype(np.float32)


def random_crop(volumes, context, size, rng):
    """(noisy (2 context + 1,h,w), clean (1,h,w), law (9,), gain (1,h,w)) from one of the volumes."""
    if context == 0 and rng.random() < LAYERED:
        x = volume = layered(volumes, size, rng)
    else:
        x, volume = slab(volumes, context, size, rng)
    law, gain = random_law(rng), np.ones((1, size, size), np.float32)
    if rng.random() < 0.2:
        gain = np.exp(smooth_field(rng, (2, size, size), rng.uniform(0.1, 0.4))[:1])
    n = noise.sample(law, x, rng) * gain
    told = noise.facts(law, {"": volume})
    error = np.exp(rng.normal(0, 0.04))  # the level is never known exactly
    told[:4] *= np.array([error**2] * 3 + [error])
    return x + n, x[context, None], told, gain


class Volumes:
    """Synthetic volumes by number, made by a process beside this one a few numbers ahead of their use."""

    def __init__(self, seed, make=dead_leaves):
        self.seed, self.make, self.ready = seed, make, OrderedDict()
        self.pool = ProcessPoolExecutor(1, get_context("spawn"))

    def window(self, first, count):
        """Volumes number first to first + count - 1."""
        for k in range(first, first + count + 6):
            if k not in self.ready:
                self.ready[k] = self.pool.submit(self.make, runtime.step_rng(self.seed, 1, k))
        while next(iter(self.ready)) < first:
            self.ready.popitem(last=False)
        return [self.ready[k].result() for k in range(first, first + count)]


def loss_of(out, x, level):
    """Logarithm of the mean square error of out against x (B,1,H,W), as a share of the noise's variance; a scalar."""
    return torch.log((out - x).square().mean((1, 2, 3)) / level**2 + 0.01).mean()


def train(args, checkpoint=None):
    torch.manual_seed(args.seed)
    model_args = dict(arch="told", width=args.width, enc_blocks=[2, 2], middle_blocks=2, dec_blocks=[2, 2])
    model_args["context"] = args.context
    network = distill.build_network(**model_args)
    if args.init and not checkpoint:
        start, _ = training.load_network(distill.build_network, args.init, "distill", "cpu")
        take_over(network, start)
    run = training.Training("distill", args, checkpoint, network, model_args=model_args, extra=dict(crop=args.crop))
    volumes = Volumes(args.seed)
    for step in run.steps():
        window = volumes.window(step * args.batch // EVERY, WINDOW)
        made = [random_crop(window, args.context, args.crop, run.rng(step, j)) for j in range(args.batch)]
        y, x, law, gain = (torch.from_numpy(np.stack(v).astype(np.float32)) for v in zip(*made))
        y, x, gain = run.to_device(y, x, gain)
        law = law.to(run.device)
        with run.autocast():
            out = run.net(y, law, gain).float()
        loss, trivial = (loss_of(v, x, law[:, 3]) for v in (out, y[:, y.shape[1] // 2, None]))
        run.update(loss, trivial)


def take_over(network, start):
    """Gives a network the weights of one with another context: of the slices, those that both see."""
    state, channels = start.state_dict(), 4  # of a slice: 2x2 pixels
    weight, own = state["intro.weight"], network.state_dict()["intro.weight"]
    count, facts = (own.shape[1] // channels, 6)
    seen = weight.shape[1] // channels - facts
    skip = (seen - (count - facts)) // 2
    kept = [*range(skip, skip + count - facts), *range(seen, seen + facts)]
    state["intro.weight"] = weight.unflatten(1, (-1, channels))[:, kept].flatten(1, 2)
    network.load_state_dict(state)


def main(argv=None):
    p = training.training_parser(__doc__, ("fast",), SETTINGS, model="volumes.pt")
    p.add_argument("--context", type=runtime.whole, default=2, help="neighbouring slices on each side (default 2)")
    p.add_argument("--init", help="start from these weights (.pt), of any context")
    args = p.parse_args(argv)
    runtime.check_outputs([args.init], [args.model])
    train(args, training.resolve_args(args, PRESETS, "distill"))


if __name__ == "__main__":
    runtime.command(main)
