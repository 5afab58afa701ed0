"""Stage 2: conditional diffusion model, trained on the noisy images themselves (Secs. 3.2-3.4, Eqs. 1-2).

The model learns the distribution of the noisy image y given the condition x_c, the blind-spot network's estimate; a
strong condition leaves little to model but detail and noise, and symmetric sampling (srds.py) then cancels the noise.

    In    knee.h5       volumes/<name>/noisy  (S,H,W) float32, about [0,1]
          bsn_out.h5    volumes/<name>/pred   (S,H,W) float32, about [0,1]; any prediction file made from knee.h5
    Out   diffusion.pt  checkpoint: weights, EMA, optimizer, step, model arguments, what X means

    python diffusion.py --data knee.h5 --cond bsn_out.h5
    python diffusion.py --data knee.h5 --cond bsn_out.h5 --target image --predict eps     # the paper's form
    python bsn.py --data knee.h5 --hidden; python diffusion.py --data knee.h5 --cond bsn_out.h5 --condition hidden

Symbols: y the noisy image (the paper's x'), c the condition x_c, eps the noise, t = 0 ... T-1 the timestep,
abar[t] the *cumulative* product that Eq. 1 writes alpha_t. What is diffused is X:

    --target image      X = 2 y - 1               Sec. 3.3
    --target residual   X = (y - x_c) / std       Sec. 3.2, r = x' - x_c, scaled to unit variance (default)
    --predict v         L1 on v = sqrt(abar) eps - sqrt(1-abar) X: informative at every t (default)
    --predict eps       L1 on eps: Eq. 2
    --predict eps-direct   the same, and the network's output is eps itself, as in improved DDPM

For v and eps the network's output is v, and eps = sqrt(abar) v + sqrt(1-abar) x_t. Where abar is small, eps is all but
x_t itself and X = (x_t - sqrt(1-abar) eps) / sqrt(abar) magnifies every error; taken from v, it does not. A network
that gives eps directly must learn this by heart: after minutes of training its SRDS pair is 10 dB worse, or it has
collapsed (results/forms.md). For the same reason timesteps with sqrt(abar) below 0.02 are neither trained nor sampled.

The condition at the neighbours of a pixel has seen the noise of that pixel, and a network that looks at all of it can
learn to find the noise there (leak). Beyond the paper, two ways not to let it:

    --condition plain       x_c as it is: the paper (default)
    --condition hidden      one class of pixels at a time is hidden from the blind-spot network, and the loss is on that
                            class alone (needs bsn.py --hidden); sampling takes x_c as it is. For white noise: what
                            correlated noise of a pixel leaves in its neighbours is not hidden
    --condition augmented   Gaussian noise of about the image's own level is added to x_c, in training and in sampling,
                            where it is averaged over the pairs

Network and schedule after improved DDPM (Nichol & Dhariwal 2021). `--preset paper` has its widths, and diffuses the
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

    Keeps the first T' <= T timesteps, those with sqrt(abar) >= least; least=0 keeps all.
    """
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    abar = torch.cumprod(1 - (1 - f[1:] / f[:-1]).clamp(max=0.999), 0)
    return abar[abar.sqrt() >= least]


class ResBlock(nn.Module):
    """Two 3x3 convolutions; the timestep scales and shifts what lies between them. groups=0 leaves out GroupNorm."""

    def __init__(self, c_in, c_out, time, groups):
        super().__init__()
        norm = lambda c: nn.GroupNorm(groups, c) if groups else nn.Identity()  # noqa: E731
        self.first = nn.Sequential(norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.time = nn.Linear(time, 2 * c_out)
        self.norm = norm(c_out)
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
        self.norm = nn.GroupNorm(groups, width) if groups else nn.Identity()
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (n h d) y x -> n b h (y x) d", n=3, h=4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(mixed, "b h (y x) d -> b (h d) y x", y=x.shape[2]))


class UNet(nn.Module):
    """v (or eps, see `predicted_eps`) from (x_t, c, t); the condition is concatenated to x_t.

    Args:
        channels: of the image and of the condition. width: features at the first level.
        mult: features at each level, in widths; every level after the first halves the resolution.
        blocks: ResBlocks per level. attention: the levels (0-based) that have self-attention.
        patch: 2 works on 2x2 pixels as channels (half resolution): on a CPU, more quality per second.
        groups: of GroupNorm; 0 for none.
    Maps x_t, c (B,C,H,W) and t (B,) to (B,C,H,W), any H and W >= 16. Source: Nichol & Dhariwal 2021.
    """

    def __init__(self, channels=1, width=128, mult=(1, 1, 2, 2, 4, 4), blocks=2, attention=(4, 5), patch=1, groups=32):
        super().__init__()
        if width % 2:
            raise ValueError(f"width {width} is odd: half of it are sines of the time, half cosines")
        time = 4 * width
        self.width, self.patch, self.levels = width, patch, len(mult)
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.intro = nn.Conv2d(2 * channels * patch**2, width, 3, padding=1)
        self.encoder, self.decoder, skips, w = nn.ModuleList(), nn.ModuleList(), [width], width

        def step(c_in, c_out, level):  # a ResBlock, and attention where the level has it
            return nn.ModuleList(
                [ResBlock(c_in, c_out, time, groups)] + [Attention(c_out, groups)] * (level in attention)
            )

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
        self.outro = nn.Sequential(
            nn.GroupNorm(groups, w) if groups else nn.Identity(),
            nn.SiLU(),
            nn.Conv2d(w, channels * patch**2, 3, padding=1),
        )
        nn.init.zeros_(self.outro[-1].weight)
        nn.init.zeros_(self.outro[-1].bias)

    def forward(self, x_t, c, t):
        h, w = x_t.shape[-2:]
        unit = self.patch * 2 ** (self.levels - 1)
        x = F.pad(torch.cat([x_t, c], 1), (0, -w % unit, 0, -h % unit), mode="replicate")
        frequency = torch.exp(torch.arange(self.width // 2, device=x.device) * (-math.log(10000) / (self.width // 2)))
        angle = t.float()[:, None] * frequency
        time = self.time(torch.cat([angle.cos(), angle.sin()], 1))
        run = lambda layers, x: [x := f(x, time) if isinstance(f, ResBlock) else f(x) for f in layers][-1]  # noqa: E731
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


def predicted_eps(out, x_t, a, predict):
    """eps from the network's output: sqrt(abar) out + sqrt(1-abar) x_t, or the output itself for "eps-direct"."""
    return out if predict == "eps-direct" else a.sqrt() * out + (1 - a).sqrt() * x_t


def diffusion_loss(network, x0, c, abar, t, eps, predict="eps", mask=None):
    """Eqs. 1-2: L1 distance between what the network predicts from x_t and what it should.

    Args: x0 (B,C,H,W) the clean end of the diffusion, X; c (B,C,H,W); abar (T,); t (B,) integers; eps like x0, standard
    normal; predict: "eps" (Eq. 2), "eps-direct" or "v"; mask like x0: the pixels that count, 1, or not, 0. Returns a
    scalar.
    """
    a = abar.to(x0.device, x0.dtype)[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    out = network(x_t, c, t).float()
    error = out - velocity(x0, eps, a) if predict == "v" else predicted_eps(out, x_t, a, predict) - eps
    if mask is None:
        return error.abs().mean()
    return ((error.abs() * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)).mean()


def eps_model(network, abar, predict="eps"):
    """The callable (x_t, c, t) to eps that the samplers of srds.py take, from a network trained by `diffusion_loss`."""

    def model(x_t, c, t):
        a = abar.to(x_t.device, x_t.dtype)[t].view(-1, 1, 1, 1)
        return predicted_eps(network(x_t, c, t).float(), x_t, a, predict)

    return model


# ---------------------------------------------------------------------------------------------------------------
# train
# ---------------------------------------------------------------------------------------------------------------
import numpy as np
from torch.optim.swa_utils import AveragedModel

import data
import noise
import runtime

PRESETS = {
    "fast": dict(
        condition="plain",
        augment=1.0,
        target="residual",
        predict="v",
        width=32,
        mult=[1, 2, 4],
        blocks=1,
        attention=[],
        patch=2,
        groups=0,
        steps=1000,
        batch=8,
        crop=96,
        lr=1e-3,
        ema=0.995,
        T=1000,
        sampling_steps=2,
    ),
    # Widths, schedule, optimizer and EMA of improved DDPM at 256 pixels; the paper gives "200 epochs".
    "paper": dict(
        condition="plain",
        augment=1.0,
        target="image",
        predict="eps",
        width=128,
        mult=[1, 1, 2, 2, 4, 4],
        blocks=2,
        attention=[4, 5],
        patch=1,
        groups=32,
        steps=200_000,
        batch=32,
        crop=256,
        lr=1e-4,
        ema=0.9999,
        T=1000,
        sampling_steps=50,
    ),
}


def scaled(c):
    """A condition about [0,1] as the network sees it, about [-1,1]."""
    return 2 * c - 1


def to_x(y, c, form):
    """What is diffused, X, from noisy image y and condition c; `form` is the checkpoint's `extra`."""
    return 2 * y - 1 if form["target"] == "image" else (y - c) / form["std"]


def to_image(x, c, form):
    """The inverse of `to_x`."""
    return (x + 1) / 2 if form["target"] == "image" else c + form["std"] * x


def unit(form):
    """Image intensity of one unit of X."""
    return 0.5 if form["target"] == "image" else form["std"]


def read_hidden(path, names):
    """What bsn.py --hidden wrote: for each of its classes, ({name: prediction}, {name: 1 where hidden, else 0})."""
    hidden = data.read_volumes(path, "hidden", names=names)
    attrs = data.read_attrs(path)[1]
    masks = {}
    for name, array in hidden.items():
        slices, classes, h, w = array.shape
        masks[name] = np.zeros((slices, classes, h, w), np.uint8)
        stride, offsets = int(attrs[name]["hidden_stride"]), attrs[name]["hidden_offsets"]
        for s, k in np.ndindex(slices, classes):
            row, column = offsets[s % len(offsets), k]
            masks[name][s, k, row::stride, column::stride] = 1
    classes = min(array.shape[1] for array in hidden.values())
    return [[{name: a[:, k] for name, a in those.items()} for those in (hidden, masks)] for k in range(classes)]


def train(args, checkpoint=None):
    """Trains on the noisy images of the train split and their conditions; writes args.model."""
    where = runtime.device(args.device)
    y_all = data.read_volumes(args.data, "noisy", "train")
    c_all = data.read_matching(args.cond, args.data, split="train")
    y_all = {name: y_all[name] for name in c_all}
    data.check_crop(y_all, args.crop)
    inputs = dict(data=data.fingerprints(args.data), cond={name: data.fingerprint(c) for name, c in c_all.items()})
    if checkpoint:
        model_args, form = checkpoint["model_args"], checkpoint["extra"]
    else:
        model_args = {k: getattr(args, k) for k in ("width", "mult", "blocks", "attention", "patch", "groups")}
        form = dict(
            target=args.target,
            predict=args.predict,
            T=args.T,
            std=data.rms_difference(y_all, c_all),
            sampling_steps=args.sampling_steps,
            augment=0.0,
        )
        if form["std"] == 0:
            raise ValueError(f"{args.cond} holds the noisy images of {args.data} themselves: there is nothing to learn")
        if args.condition == "augmented":
            model_of_noise = noise.given(args.noise, args.data, args.cond)
            variances = [noise.variance(model_of_noise, c[s]).mean() for c in c_all.values() for s in range(c.shape[0])]
            form["augment"] = args.augment * float(np.mean(variances)) ** 0.5
            runtime.say(f"diffusion: noise of {form['augment']:.4f} is added to the condition")
    hidden = read_hidden(args.cond, list(c_all)) if args.condition == "hidden" else None
    torch.manual_seed(args.seed)
    model = UNet(**model_args).to(where, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0, fused=True)
    scheduler = runtime.warmup_cosine(optimizer, args.steps)
    ema = AveragedModel(model, multi_avg_fn=runtime.ema_update(args.ema))
    abar = alpha_bar(form["T"])
    run = runtime.Training("diffusion", args, checkpoint, model, optimizer, scheduler, ema, model_args, form, inputs)
    for step in run.steps():
        rng = runtime.step_rng(args.seed, step)
        stacks = [y_all, c_all, *(hidden[rng.integers(len(hidden))] if hidden else [])]
        y, c, *more = data.random_crops(stacks, args.batch, args.crop, rng, run.rank, run.world)
        t = torch.from_numpy(rng.integers(len(abar), size=args.batch)[run.rank :: run.world])
        eps = runtime.gaussian(rng, args.batch, *y.shape[1:])[run.rank :: run.world]
        c, mask = more if hidden else (c, None)
        x0 = to_x(y, c, form)
        if form.get("augment"):
            c = c + form["augment"] * runtime.gaussian(rng, args.batch, *y.shape[1:])[run.rank :: run.world]
        x0, c, t, eps, mask = (z if z is None else z.to(where) for z in (x0, c, t, eps, mask))
        optimizer.zero_grad(set_to_none=True)
        with runtime.autocast(where, args.precision):
            loss = diffusion_loss(run.net, x0, scaled(c), abar, t, eps, form["predict"], mask)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        ema.update_parameters(model)
        run.report(loss)


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
def main(argv=None):
    p = runtime.training_parser(__doc__, PRESETS, "diffusion.pt")
    p.add_argument("--data", required=True, help="dataset (.h5)")
    p.add_argument("--cond", required=True, help="prediction file (.h5) made from it: the condition x_c")
    p.add_argument("--condition", choices=("plain", "hidden", "augmented"), help="see above (default plain)")
    p.add_argument("--augment", type=float, help="added noise, in deviations of the image's own (default 1)")
    p.add_argument(
        "--noise", default="measured", help="with --condition augmented, as in posterior.py (default measured)"
    )
    p.add_argument("--target", choices=("image", "residual"), help="what is diffused: y or (y - x_c) / std")
    p.add_argument("--predict", choices=("eps", "eps-direct", "v"), help="what the loss is on; see above")
    p.add_argument("--width", type=runtime.positive, help="features at the first level")
    p.add_argument("--mult", type=runtime.positive, nargs="+", help="features at each level, in widths")
    p.add_argument("--blocks", type=runtime.positive, help="ResBlocks per level")
    p.add_argument("--attention", type=int, nargs="*", help="levels (0 is the first) with self-attention")
    p.add_argument("--patch", type=runtime.positive, help="2: work on 2x2 pixels as channels; 1: on pixels")
    p.add_argument("--groups", type=int, help="of GroupNorm; 0: no norm")
    p.add_argument("--ema", type=float, help="decay per step of the averaged weights")
    p.add_argument("--T", type=runtime.positive, help="timesteps")
    p.add_argument(
        "--sampling-steps", type=runtime.positive, help="DDIM steps that srds.py takes unless told otherwise"
    )
    args = p.parse_args(argv)
    runtime.check_outputs([args.data, args.cond], [args.model])
    checkpoint = runtime.settle(args, PRESETS, "diffusion")
    train(args, checkpoint)


if __name__ == "__main__":
    runtime.command(main)
