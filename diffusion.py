"""Stage 2: conditional diffusion model, trained on the noisy images themselves (Secs. 3.2-3.4, Eqs. 1-2).

The model learns the distribution of the noisy image y given the condition x_c, the blind-spot network's estimate. A
strong condition leaves little to model but detail and noise, and symmetric sampling (srds.py) then cancels the noise.

    In    knee.h5       volumes/<name>/noisy  (S,H,W) float32, about [0,1]
          bsn_out.h5    volumes/<name>/pred   (S,H,W) float32, about [0,1]; any prediction file made from knee.h5
    Out   diffusion.pt  checkpoint: EMA weights, model arguments, what X means

    python diffusion.py --data knee.h5 --cond bsn_out.h5
    python diffusion.py --data knee.h5 --cond bsn_out.h5 --target image --predict eps     # the paper's form
    python bsn.py --data knee.h5 --hidden; python diffusion.py --data knee.h5 --cond bsn_out.h5 --condition hidden

Symbols: y is the noisy image (the paper's x'), c the condition x_c, eps the noise, t = 0 ... T-1 the timestep, and
abar[t] the *cumulative* product that Eq. 1 writes alpha_t. X is what is diffused:

    --target image      X = 2 y - 1               Sec. 3.3
    --target residual   X = (y - x_c) / std       Sec. 3.2, r = x' - x_c, scaled to unit variance (default)
    --predict v         L1 on v = sqrt(abar) eps - sqrt(1-abar) X, informative at every t (default)
    --predict eps       L1 on eps: Eq. 2

The network's output is v in both cases, and eps = sqrt(abar) v + sqrt(1-abar) x_t. Where abar is small, eps is nearly
x_t itself, and X = (x_t - sqrt(1-abar) eps) / sqrt(abar) magnifies every error of an eps that the network gives
directly: after minutes of training the SRDS pair was then 10 dB worse. For the same reason timesteps with sqrt(abar)
below 0.02 are neither trained nor sampled.

With --context K the network sees the conditions of K slices on each side too, as further channels.

The condition at the neighbours of a pixel has seen the noise of that pixel, so that a network that looks at all of it
can learn to find the noise there (leak):

    --condition plain       x_c as it is: the paper (default)
    --condition hidden      one subsampled image of pixels at a time is hidden from the blind-spot network, and the loss
                            counts those pixels alone (needs bsn.py --hidden); sampling takes x_c as it is. For white
                            noise: what the neighbours of a pixel tell of its correlated noise is not hidden

Network and schedule follow improved DDPM (Nichol & Dhariwal 2021). `--preset paper` has its widths, and diffuses the
image with the loss of Eq. 2.
"""

# ---------------------------------------------------------------------------------------------------------------
# core: needs torch and einops alone; paste it anywhere
# ---------------------------------------------------------------------------------------------------------------
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange


def alpha_bar(T=1000, least=0.02):
    """Cosine schedule (Nichol & Dhariwal 2021): abar (T',) float64, cumulative; Eq. 1 calls it alpha_t.

    Of the T timesteps it keeps the first T', those with sqrt(abar) >= least; least=0 keeps all.
    """
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    abar = torch.cumprod(1 - (1 - f[1:] / f[:-1]).clamp(max=0.999), 0)
    return abar[abar.sqrt() >= least]


def scaled(c):
    """A condition about [0,1] as the network sees it: about [-1,1]."""
    return 2 * c - 1


def to_x(y, c, target, std):
    """X, what is diffused, from the noisy image y and the condition c, all (B,C,H,W); target: "image" or "residual".

    std: root mean square of y - c over the training set, for "residual".
    """
    return 2 * y - 1 if target == "image" else (y - c) / std


def to_image(x, c, target, std):
    """The inverse of `to_x`: the image, about [0,1]."""
    return (x + 1) / 2 if target == "image" else c + std * x


def unit(target, std):
    """Image intensity of one unit of X."""
    return 0.5 if target == "image" else std


def group_norm(groups, width):
    return nn.GroupNorm(groups, width) if groups else nn.Identity()


class ResBlock(nn.Module):
    """Two 3x3 convolutions; the timestep scales and shifts the features between them. (B,C,H,W) to (B,c_out,H,W).

    time: length of the timestep's embedding, (B,time). groups: of GroupNorm, 0 for none.
    """

    def __init__(self, c_in, c_out, time, groups):
        super().__init__()
        self.first = nn.Sequential(group_norm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.time = nn.Linear(time, 2 * c_out)
        self.norm = group_norm(groups, c_out)
        self.second = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x, time):
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        return self.skip(x) + self.second(F.silu(self.norm(self.first(x)) * (1 + scale) + shift))


class Attention(nn.Module):
    """Self-attention over all pixels, 4 heads; (B,C,H,W) to (B,C,H,W)."""

    def __init__(self, width, groups):
        super().__init__()
        self.norm = group_norm(groups, width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (n h d) y x -> n b h (y x) d", n=3, h=4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(mixed, "b h (y x) d -> b (h d) y x", y=x.shape[2]))


class UNet(nn.Module):
    """v from (x_t, c, t); the condition is concatenated to x_t.

    Args:
        channels: of the image and of the condition. width: features at the first level.
        mult: features at each level, in widths; every level after the first halves the resolution.
        blocks: ResBlocks per level. attention: the levels (0-based) that have self-attention.
        patch: 2 works on 2x2 pixels as channels (half resolution): on a CPU, more quality per second.
        groups: of GroupNorm; 0 for none. context: slices on each side of which the condition is seen too.
    Maps x_t (B,C,H,W), c (B,C*(2*context+1),H,W) and t (B,) to (B,C,H,W), any H and W >= 16. Raises ValueError for a
    width that is odd or no multiple of groups. Source: Nichol & Dhariwal 2021.
    """

    def __init__(self, channels=1, width=128, mult=(1, 1, 2, 2, 4, 4), blocks=2, attention=(4, 5), patch=1, groups=32,
                 context=0):  # fmt: skip
        super().__init__()
        if width % 2:
            raise ValueError(f"width {width} is odd: half of it are sines of the time, half cosines")
        if groups and width % groups:
            raise ValueError(f"width {width} is not a multiple of the {groups} groups")
        time = 4 * width
        self.width, self.patch, self.levels = width, patch, len(mult)
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.intro = nn.Conv2d((2 * context + 2) * channels * patch**2, width, 3, padding=1)
        self.encoder, self.decoder, skips, w = nn.ModuleList(), nn.ModuleList(), [width], width

        def step(c_in, c_out, level):  # a ResBlock, and attention where the level has it
            layers = nn.ModuleList([ResBlock(c_in, c_out, time, groups)])
            return layers.append(Attention(c_out, groups)) if level in attention else layers

        for level, m in enumerate(mult):
            if level:
                self.encoder.append(nn.ModuleList([nn.Conv2d(w, w, 3, stride=2, padding=1)]))
                skips.append(w)
            for _ in range(blocks):
                self.encoder.append(step(w, m * width, level))
                w = m * width
                skips.append(w)
        self.middle = nn.ModuleList([ResBlock(w, w, time, groups), Attention(w, groups), ResBlock(w, w, time, groups)])
        if not attention:
            del self.middle[1]
        for level, m in reversed(list(enumerate(mult))):
            for n in range(blocks + 1):
                layers = step(w + skips.pop(), m * width, level)
                w = m * width
                if level and n == blocks:
                    layers.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(w, w, 3, padding=1)))
                self.decoder.append(layers)
        self.outro = nn.Sequential(group_norm(groups, w), nn.SiLU(), nn.Conv2d(w, channels * patch**2, 3, padding=1))
        nn.init.zeros_(self.outro[-1].weight)
        nn.init.zeros_(self.outro[-1].bias)

    def forward(self, x_t, c, t):
        h, w = x_t.shape[-2:]
        unit = self.patch * 2 ** (self.levels - 1)
        x = F.pad(torch.cat([x_t, c], 1), (0, -w % unit, 0, -h % unit), mode="replicate")
        frequency = torch.exp(torch.arange(self.width // 2, device=x.device) * (-math.log(10000) / (self.width // 2)))
        angle = t.float()[:, None] * frequency
        time = self.time(torch.cat([angle.cos(), angle.sin()], 1))

        def run(layers, x):
            for layer in layers:
                x = layer(x, time) if isinstance(layer, ResBlock) else layer(x)
            return x

        x = self.intro(F.pixel_unshuffle(x, self.patch))
        skips = [x]
        for layers in self.encoder:
            x = run(layers, x)
            skips.append(x)
        x = run(self.middle, x)
        for layers in self.decoder:
            x = run(layers, torch.cat([x, skips.pop()], 1))
        return F.pixel_shuffle(self.outro(x), self.patch)[..., :h, :w]


def velocity(x0, eps, a):
    """v = sqrt(abar) eps - sqrt(1-abar) X (Salimans & Ho 2022)."""
    return a.sqrt() * eps - (1 - a).sqrt() * x0


def predicted_eps(v, x_t, a):
    """eps from the network's output: sqrt(abar) v + sqrt(1-abar) x_t."""
    return a.sqrt() * v + (1 - a).sqrt() * x_t


def diffusion_loss(network, x0, c, abar, t, eps, predict="eps", mask=None):
    """Eqs. 1-2: L1 distance between what the network predicts from x_t and what it should; a scalar.

    Args: x0 (B,C,H,W) the clean end of the diffusion, X; c the condition, (B,C,H,W) or with its neighbouring slices as
    further channels; abar (T,); t (B,) integers; eps like x0, standard normal; predict: "eps" (Eq. 2) or "v"; mask like
    x0: 1 for the pixels that count, else 0.
    """
    a = abar.to(x0.device, x0.dtype)[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    v = network(x_t, c, t).float()
    error = v - velocity(x0, eps, a) if predict == "v" else predicted_eps(v, x_t, a) - eps
    if mask is None:
        return error.abs().mean()
    return ((error.abs() * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)).mean()


def zero(x_t, c, t):
    """The trivial network."""
    return torch.zeros_like(x_t)


def eps_model(network, abar):
    """The callable (x_t, c, t) to eps that the samplers of srds.py take, from a network trained by `diffusion_loss`."""

    def model(x_t, c, t):
        a = abar.to(x_t.device, x_t.dtype)[t].view(-1, 1, 1, 1)
        return predicted_eps(network(x_t, c, t).float(), x_t, a)

    return model


# ---------------------------------------------------------------------------------------------------------------
# train
# ---------------------------------------------------------------------------------------------------------------
import numpy as np

import data
from lib import runtime, training

CHOICES = dict(condition=("plain", "hidden"), target=("image", "residual"), predict=("eps", "v"))
PRESET_NAMES = ("fast", "paper")
SETTINGS = {  # what it sets, its value in fast, in paper: improved DDPM's at 256 pixels where nothing else is said
    "condition": ("what the network sees of x_c", "plain", "plain"),
    "target": ("what is diffused: y, or (y - x_c) / std", "residual", "image"),
    "predict": ("what the loss is on", "v", "eps"),
    "width": ("features at the first level", 32, 128),
    "mult": ("features at each level, in widths", [1, 2, 4], [1, 1, 2, 2, 4, 4]),
    "blocks": ("ResBlocks per level", 1, 2),
    "attention": ("levels (0 is the first) with self-attention", [], [4, 5]),
    "patch": ("2: work on 2x2 pixels as channels, the faster way on a CPU; 1: on pixels", 2, 1),
    "groups": ("groups of GroupNorm, 0 for no norm: it then dies sooner or later", 8, 32),
    "steps": ("optimizer steps", 1000, 200_000),  # paper: "200 epochs"
    "batch": ("crops per step, over all processes together", 4, 32),
    "crop": ("side of the square training crops, pixels", 96, 256),
    "lr": ("peak learning rate", 5e-4, 1e-4),
    "ema": ("decay per step of the averaged weights", 0.995, 0.9999),
    "T": ("timesteps", 1000, 1000),
    "sampling_steps": ("DDIM steps that srds.py takes unless told otherwise", 2, 50),
}
PRESETS = training.presets(PRESET_NAMES, SETTINGS)
SHAPE = ("width", "mult", "blocks", "attention", "patch", "groups")  # with `context`, the `model_args`


def read_hidden(path, names):
    """What bsn.py --hidden wrote, a list of [{name: prediction}, {name: 1 for the pixels hidden from it, else 0}]."""
    hidden = data.read_volumes(path, "hidden", names=names)
    attrs = data.read_attrs(path)[1]
    masks = {}
    for name, array in hidden.items():
        slices, count, h, w = array.shape
        masks[name] = np.zeros((slices, count, h, w), np.uint8)
        stride, offsets = int(attrs[name]["hidden_stride"]), attrs[name]["hidden_offsets"]
        for s, k in np.ndindex(slices, count):
            row, column = offsets[s % len(offsets), k]
            masks[name][s, k, row::stride, column::stride] = 1
    count = min(array.shape[1] for array in hidden.values())
    return [[{name: a[:, k] for name, a in those.items()} for those in (hidden, masks)] for k in range(count)]


def read_training_set(args):
    """({name: noisy}, {name: condition}) of the train split, each (S,H,W), and their fingerprints."""
    conditions = data.read_matching(args.cond, args.data, split="train")
    noisy = {name: y for name, y in data.read_volumes(args.data, "noisy", "train").items() if name in conditions}
    data.check_crop(noisy, args.crop)
    marks = {name: data.fingerprint(c) for name, c in conditions.items()}
    return noisy, conditions, dict(data=data.fingerprints(args.data), cond=marks)


def train(args, checkpoint=None):
    """Trains on the noisy images of the train split and their conditions; writes args.model.

    Raises ValueError for files that do not belong together, or a checkpoint that this run does not continue.
    """
    noisy, conditions, inputs = read_training_set(args)
    if checkpoint:
        model_args, extra = checkpoint["model_args"], checkpoint["extra"]
    else:
        context = data.choose_context(args.context, noisy, "diffusion")
        model_args = {k: getattr(args, k) for k in SHAPE} | dict(context=context)
        extra = {k: getattr(args, k) for k in ("target", "predict", "T", "sampling_steps")}
        extra["std"] = data.rms_difference(noisy, conditions)
        if extra["std"] == 0:
            raise ValueError(f"{args.cond} holds the noisy images of {args.data} themselves: there is nothing to learn")
    hidden = read_hidden(args.cond, list(conditions)) if args.condition == "hidden" else None
    torch.manual_seed(args.seed)
    network = UNet(**model_args)
    run = training.Training("diffusion", args, checkpoint, network, model_args=model_args, extra=extra, inputs=inputs)
    context, abar = model_args.get("context", 0), alpha_bar(extra["T"]).float().to(run.device)
    contexts = [0, context, *([context, 0] if hidden else [])]
    for step in run.steps():
        rng = run.rng(step)
        stacks = [noisy, conditions, *(hidden[rng.integers(len(hidden))] if hidden else [])]
        y, c, *more = data.random_crops(stacks, args.batch, args.crop, rng, run.rank, run.world, contexts)
        t = torch.from_numpy(rng.integers(len(abar), size=args.batch)[run.rank :: run.world]).to(run.device)
        eps = runtime.gaussian(rng, args.batch, *y.shape[1:])[run.rank :: run.world]
        c, *mask = more if hidden else [c]
        x0 = to_x(y, c[:, context, None], extra["target"], extra["std"])
        x0, c, eps, *mask = run.to_device(x0, c, eps, *mask)
        batch = x0, scaled(c), abar, t, eps, extra["predict"], *mask
        with run.autocast():
            loss = diffusion_loss(run.net, *batch)
        run.update(loss, trivial=diffusion_loss(zero, *batch))


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
def main(argv=None):
    p = training.training_parser(__doc__, PRESET_NAMES, SETTINGS, CHOICES, "diffusion.pt")
    p.add_argument("--data", required=True, help="dataset (.h5)")
    training.context_flag(p)
    p.add_argument("--cond", required=True, help="prediction file (.h5) made from it: the condition x_c")
    kept = "also keep so many checkpoints on the way, MODEL_1_of_N.pt ...: more steps are not always better"
    p.add_argument("--snapshots", type=runtime.whole, default=0, metavar="N", help=f"{kept} (default 0)")
    args = p.parse_args(argv)
    runtime.check_outputs([args.data, args.cond], [args.model])
    train(args, training.resolve_args(args, PRESETS, "diffusion"))


if __name__ == "__main__":
    runtime.command(main)
