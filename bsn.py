"""Stage 1: the blind-spot network, a first estimate x_c of the clean image from noisy images alone (Sec. 3.4).

Each pixel is predicted from its surroundings and never from itself (J-invariance). Noise that is independent of what is
around it cannot be predicted: a network that learns the *noisy* pixel learns the clean one. The network is after PUCA
(Jang et al. 2023): masked convolution, dilated blocks, patch-unshuffle U shape.

    In    knee.h5      volumes/<name>/noisy  (S,H,W) float32, about [0,1], H and W >= 16
    Out   bsn_out.h5   volumes/<name>/pred   (S,H,W) float32, about [0,1]: the condition x_c
                       volumes/<name>/std    with --loss nll: the deviation of y from pred that the network expects
                       volumes/<name>/hidden (S,4,H,W) with --hidden: predictions for diffusion.py --condition hidden
          bsn.pt       checkpoint: EMA weights and model arguments

    python bsn.py --data knee.h5                           # trains bsn.pt, then writes bsn_out.h5
    python bsn.py --data other.h5 --predict --model bsn.pt --out other_bsn.h5

Symbols: y is the noisy image (the paper's x'), x_c the prediction. `--preset paper` is PUCA but for channel attention,
which pools each subsampled image by itself: pooling over all lets a pixel see itself. `fast` has dense 3x3 blocks and
L2. A convolution dilated by d is an ordinary one on the d*d subsampled images: the same, faster.

With --context K the network also sees K slices on each side, at the same place too, as long as the noise is independent
from slice to slice; where it is not, --hole all makes the same hole in all of them. `--arch lgbpn` is LG-BPN (Wang et
al. 2023): a branch of dilated convolutions and one of channel attention, made exactly blind in the same way.
"""

# ---------------------------------------------------------------------------------------------------------------
# core: needs torch and einops alone; paste it anywhere
# ---------------------------------------------------------------------------------------------------------------
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange


def to_subimages(x, stride):
    """(B,C,H,W) to one subsampled image for each (row, column) modulo stride: (stride^2 B,C,H/stride,W/stride)."""
    return rearrange(x, "b c (h p) (w q) -> (p q b) c h w", p=stride, q=stride)


def from_subimages(x, stride):
    """The inverse of `to_subimages`."""
    return rearrange(x, "(p q b) c h w -> b c (h p) (w q)", p=stride, q=stride)


def stack(block, width, count):
    """`count` blocks of that width, one after the other."""
    return nn.Sequential(*(block(width) for _ in range(count)))


def conv1x1(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 1)


class BlindSpotConv(nn.Conv2d):
    """Convolution that cannot see the centre: its weights within |dy| + |dx| <= radius are zero (LG-BPN's diamond).

    Args: reach: pixels from the centre to the edge of the kernel, by default max(1, radius), the smallest that sees
    past the hole. every: weights stand only at each second (third, ...) pixel.
    No padding: (B,C,H,W) to (B,width,H-2*reach,W-2*reach).
    """

    def __init__(self, channels, width, radius, reach=None, every=1):
        reach = reach or max(1, radius)
        offset = torch.arange(-reach, reach + 1, every).abs()
        super().__init__(channels, width, kernel_size=len(offset))
        self.register_buffer("mask", (offset[:, None] + offset[None] > radius).float(), persistent=False)
        self.reach, self.every = reach, every

    def forward(self, x):
        weight = self.weight * self.mask
        if self.every == 1:
            return F.conv2d(x, weight, self.bias)
        h, w = x.shape[-2:]
        x = to_subimages(F.pad(x, (0, -w % self.every, 0, -h % self.every)), self.every)
        x = from_subimages(F.conv2d(x, weight, self.bias), self.every)
        return x[..., : h - 2 * self.reach, : w - 2 * self.reach]


class DABlock(nn.Module):
    """PUCA's dilated attention block, on subsampled images instead of dilated. (B,C,H,W) to (B,C,H,W)."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.spatial = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.attention, self.project = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.ffn_in, self.ffn_out = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, width, 1)
        self.beta, self.gamma = (nn.Parameter(torch.ones(width, 1, 1)) for _ in range(2))  # ones, as in PUCA

    def forward(self, x):
        u, v = self.spatial(self.expand(self.norm1(x.movedim(1, -1)).movedim(-1, 1))).chunk(2, dim=1)
        u = u * v
        x = x + self.beta * self.project(u * self.attention(u.mean((2, 3), keepdim=True)))
        u, v = self.ffn_in(self.norm2(x.movedim(1, -1)).movedim(-1, 1)).chunk(2, dim=1)
        return x + self.gamma * self.ffn_out(u * v)


class DenseBlock(nn.Module):
    """Two dense 3x3 convolutions and a skip; begins as the identity. (B,C,H,W) to (B,C,H,W)."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x):
        return x + self.second(F.relu(self.first(x)))


def hole_radius(blind_spot, width):
    """The radius of a hole of that diameter in pixels. Raises ValueError for an odd width or another blind spot."""
    if width % 2:
        raise ValueError(f"width {width} is odd: the networks take half of it")
    if blind_spot not in (1, 5, 9):
        raise ValueError(f"blind_spot is 1, 5 or 9, not {blind_spot}")
    return (blind_spot - 1) // 2


def neighbours(channels, width, context, hole):
    """(channels of the masked convolution, the convolution of the neighbouring slices that are seen whole, or None)."""
    if hole == "all" or not context:
        return channels * (2 * context + 1), None
    return channels, nn.Conv2d(2 * context * channels, width, 3, padding=1)


def see(y, blind, beside, reach):
    """What a network sees at first of y (B,2k+1,H,W): the middle slice or all by `blind`, the others by `beside`."""
    if beside is None:
        return blind(F.pad(y, 4 * (reach,)))
    k = y.shape[1] // 2
    return blind(F.pad(y[:, k, None], 4 * (reach,))) + beside(torch.cat([y[:, :k], y[:, k + 1 :]], 1))


class PUCA(nn.Module):
    """Blind-spot U-Net: the output at a pixel does not depend on any input pixel of the blind spot around it.

    The masked convolution gives each pixel features of the pixels outside its hole. They are then split into
    stride*stride subsampled images, and everything later stays within one of them. Pixels of one subsampled image lie
    so far apart that none has seen into another's hole: the hole stays exact, borders included.

    Args:
        channels: image channels. width: features at the first level, doubled at each next one.
        blind_spot: diameter of the hole in pixels: 1 (white noise), 5 or 9 (correlated noise).
        enc_blocks, middle_blocks, dec_blocks: blocks per level; each level halves the resolution.
        dense: DenseBlocks instead of PUCA's DABlocks, and a tail that also sees the masked convolution's features.
        deviation: predict the logarithm of the deviation of y, in tenths of the range, as C more channels.
        context: neighbouring slices on each side, as further channels, the slice itself in the middle.
        hole: "own": in the slice itself alone; "all": the same hole in its neighbours.
    Maps (B,C*(2*context+1),H,W) to (B,C,H,W) or (B,2C,H,W), any H and W >= 16. Raises ValueError as `hole_radius`.
    Source: Jang et al. 2023; the paper's Sec. 3.4.
    """

    def __init__(self, channels=1, width=128, blind_spot=1, enc_blocks=(3, 4), middle_blocks=4, dec_blocks=(4, 3),
                 dense=False, deviation=False, context=0, hole="own"):  # fmt: skip
        super().__init__()
        radius, outputs = hole_radius(blind_spot, width), channels * (1 + deviation)
        self.reach, self.stride = max(1, radius), 2 * max(1, radius)
        block = DenseBlock if dense else DABlock
        widths = [width * 2**level for level in range(len(enc_blocks) + 1)]
        channels, self.beside = neighbours(channels, width, context, hole)
        if dense:
            self.blind = BlindSpotConv(channels, width, radius)
            self.tail = nn.Sequential(conv1x1(2 * width, width), nn.ReLU(), conv1x1(width, outputs))
        else:
            into, half = (conv1x1(channels, width), BlindSpotConv(width, width, radius)), width // 2
            self.blind = nn.Sequential(*into, conv1x1(width, width), conv1x1(width, width))
            wide = conv1x1(width, width), conv1x1(width, width), conv1x1(width, half)
            self.tail = nn.Sequential(*wide, conv1x1(half, half), conv1x1(half, outputs))
        self.encoders = nn.ModuleList(stack(block, w, n) for w, n in zip(widths, enc_blocks))
        self.downs = nn.ModuleList(conv1x1(w, w // 2) for w in widths[:-1])
        self.middle = stack(block, widths[-1], middle_blocks)
        self.ups = nn.ModuleList(conv1x1(w, 2 * w) for w in widths[:0:-1])
        self.decoders = nn.ModuleList(stack(block, w, n) for w, n in zip(widths[-2::-1], dec_blocks))
        self.dense = dense

    def forward(self, y):
        h, w = y.shape[-2:]
        unit, before = self.stride * 2 ** len(self.encoders), self.stride * 2
        pad = (before, unit - (w + before) % unit, before, unit - (h + before) % unit)
        # Reflection keeps a pixel's position modulo 2 (the mirror image of -k is k), not modulo 4 or 8.
        x = F.pad(y, pad, mode="reflect") if self.stride == 2 else F.pad(y, pad)
        x = seen = to_subimages(see(x, self.blind, self.beside, self.reach), self.stride)
        skips = []
        for encoder, down in zip(self.encoders, self.downs):
            skips.append(encoder(x))
            x = F.pixel_unshuffle(down(skips[-1]), 2)  # PUCA's patch-unshuffle, on images that are subsampled already
        x = self.middle(x)
        for up, decoder in zip(self.ups, self.decoders):
            x = decoder(F.pixel_shuffle(up(x), 2) + skips.pop())
        x = self.tail(torch.cat([x, seen], 1) if self.dense else x)
        return from_subimages(x, self.stride)[..., before : before + h, before : before + w]


class ChannelAttentionBlock(nn.Module):
    """Restormer's block: attention between channels, then a gated feed-forward, both with depthwise 3x3 convolutions.

    (B,C,H,W) to (B,C,H,W). Zamir et al. 2022; on subsampled images it is LG-BPN's dilated transformer block.
    """

    def __init__(self, width, heads=2):
        super().__init__()
        hidden = int(2.66 * width)
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.project = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        self.qkv_spatial = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.ffn_in, self.ffn_out = nn.Conv2d(width, 2 * hidden, 1), nn.Conv2d(hidden, width, 1)
        self.ffn_spatial = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.heads = heads

    def forward(self, x):
        h = x.shape[-2]
        qkv = self.qkv_spatial(self.qkv(self.norm1(x.movedim(1, -1)).movedim(-1, 1)))
        q, k, v = rearrange(qkv, "b (three n c) h w -> three b n c (h w)", three=3, n=self.heads)
        similar = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        mixed = (self.temperature * similar).softmax(-1) @ v
        x = x + self.project(rearrange(mixed, "b n c (h w) -> b (n c) h w", h=h))
        u, v = self.ffn_spatial(self.ffn_in(self.norm2(x.movedim(1, -1)).movedim(-1, 1))).chunk(2, dim=1)
        return x + self.ffn_out(F.gelu(u) * v)


class DilatedBlock(nn.Module):
    """LG-BPN's residual block of the local branch, on subsampled images. (B,C,H,W) to (B,C,H,W)."""

    def __init__(self, width):
        super().__init__()
        self.spatial, self.mix = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.mix(F.relu(self.spatial(x)))


class LGBPN(nn.Module):
    """Blind-spot network of a local and a global branch (Wang et al. 2023), the hole a diamond as in PUCA above.

    Local: a masked convolution of 9x9 pixels, then dilated blocks. Global: one of 21x21 pixels, each second one, then
    channel attention. As in PUCA, each branch works on subsampled images whose pixels lie too far apart to see into
    each other's hole (8 and 15 pixels, as published), and attention looks at one of them at a time: over all, as
    published, it leaks. Left out is what the published code does at test time alone, which gives up the blind spot.

    Args: channels, blind_spot, deviation, context, hole: as in PUCA. width: features. blocks: of the local and the
    global branch. Maps (B,C*(2*context+1),H,W) to (B,C,H,W) or (B,2C,H,W), any H and W >= 16.
    """

    BRANCHES = ((4, 1, 8), (10, 2, 15))  # local, global: reach of the kernel, every how many pixels, stride

    def __init__(self, channels=1, width=128, blind_spot=9, blocks=(9, 6), deviation=False, context=0, hole="own"):
        super().__init__()
        radius, outputs = hole_radius(blind_spot, width), channels * (1 + deviation)
        channels, self.beside = neighbours(channels, width, context, hole)
        if len(blocks) != 2:
            raise ValueError(f"blocks {blocks}: give two numbers, of the local and of the global branch")
        (local, wide), half, self.stride = blocks, width // 2, self.BRANCHES[0][2]
        self.head = nn.Sequential(conv1x1(channels, 24), nn.ReLU())
        self.blind = nn.ModuleList(BlindSpotConv(24, width, radius, reach, every) for reach, every, _ in self.BRANCHES)
        mixed = nn.ReLU(), conv1x1(width, width), nn.ReLU(), conv1x1(width, width), nn.ReLU()
        dilated = [DilatedBlock(width) for _ in range(local)]
        self.near = nn.Sequential(*mixed, *dilated, conv1x1(width, width), nn.ReLU())
        mixed, attention = conv1x1(width, width), [ChannelAttentionBlock(width) for _ in range(wide)]
        self.wide = nn.Sequential(nn.ReLU(), mixed, *attention, nn.Conv2d(width, width, 3, padding=1))
        narrower = conv1x1(2 * width, width), nn.ReLU(), conv1x1(width, half), nn.ReLU()
        self.tail = nn.Sequential(*narrower, conv1x1(half, half), nn.ReLU(), conv1x1(half, outputs))

    def forward(self, y):
        h, w = y.shape[-2:]
        branches = []
        for blind, body, (reach, _, stride) in zip(self.blind, (self.near, self.wide), self.BRANCHES):
            x = F.pad(y, (0, -w % stride, 0, -h % stride))  # zeros: a mirror image could show a pixel to itself
            x = see(x, lambda own, blind=blind: blind(self.head(own)), self.beside, reach)
            branches.append(from_subimages(body(to_subimages(x, stride)), stride)[..., :h, :w])
        return self.tail(torch.cat(branches, 1))


def blind_spot_loss(prediction, y, kind="l2"):
    """Distance of a blind-spot prediction from the noisy image y (B,C,H,W) itself; a scalar.

    kind: "l1" is PUCA's; "l2" has the conditional mean as its minimum; "nll", for predictions (B,2C,H,W) with a
    deviation, is the Gaussian negative log-likelihood (Laine et al. 2019). Errors count in tenths of the range, as
    squares of errors near 0.02 would have gradients as small as Adam's epsilon.
    """
    if kind == "nll":
        mean, log_deviation = prediction.chunk(2, dim=1)
        log_deviation = log_deviation.clamp(min=-5)  # black background without noise would send it to minus infinity
        return (0.5 * (10 * (mean - y)).square() * torch.exp(-2 * log_deviation) + log_deviation).mean()
    error = 10 * (prediction - y)
    return error.abs().mean() if kind == "l1" else error.square().mean()


def hide(y, stride, row, column):
    """y (B,C,H,W) with the pixels of one subsampled image, (row, column) modulo stride, replaced by their surroundings.

    A replaced pixel becomes the mean of four in its row and column, stride / 2 + 1 pixels away (1 for stride 2).
    """
    h, w = y.shape[-2:]
    away = max(1, stride // 2 + (stride > 2))
    around = F.pad(y, 4 * (away,), mode="reflect")
    inner_y, inner_x = slice(away, away + h), slice(away, away + w)
    mean = around[..., :h, inner_x] + around[..., 2 * away :, inner_x]
    mean = (mean + around[..., inner_y, :w] + around[..., inner_y, 2 * away :]) / 4
    out = y.clone()
    out[..., row::stride, column::stride] = mean[..., row::stride, column::stride]
    return out


# ---------------------------------------------------------------------------------------------------------------
# train and predict
# ---------------------------------------------------------------------------------------------------------------
import numpy as np

import data
from lib import runtime, training

NETWORKS = {"puca": PUCA, "lgbpn": LGBPN}
PRESET_NAMES = ("fast", "paper")
SETTINGS = {  # what it sets, its value in fast, in paper: as published for PUCA where nothing else is said
    "arch": ("network", "puca", "puca"),
    "blind_spot": ("diameter of the hole, pixels: 5 or 9 for noise blurred by 0.5 or 1.2 pixels", 1, 1),
    "hole": ("in which slices the hole is: all, if the noise is correlated through them", "own", "own"),
    "width": ("features at the first level", 32, 128),
    "enc_blocks": ("blocks at each level on the way down, and in reverse on the way up", [2], [3, 4]),
    "middle_blocks": ("blocks at the lowest level", 2, 4),
    "dense": ("dense blocks, not PUCA's: better after equal seconds on a CPU", True, False),
    "loss": ("distance from prediction to noisy pixel; nll also learns std", "l2", "l1"),
    "steps": ("optimizer steps", 1500, 200_000),  # paper: about as many images as PUCA saw
    "batch": ("crops per step, over all processes together", 2, 2),
    "crop": ("side of the square training crops, pixels", 96, 256),
    "lr": ("peak learning rate", 2e-3, 1e-4),  # paper: Sec. 4.2
    "beta2": ("AdamW's second decay", 0.99, 0.999),  # fast: few steps, so a short memory
    "ema": ("decay per step of the averaged weights", 0.995, 0.999),
}
LGBPN_SETTINGS = {  # the same for --arch lgbpn
    **{k: v for k, v in SETTINGS.items() if k not in ("arch", "enc_blocks", "middle_blocks", "dense")},
    "arch": ("network", "lgbpn", "lgbpn"),
    "blind_spot": (SETTINGS["blind_spot"][0], 1, 9),
    "blocks": ("lgbpn: blocks of the local and the global branch", [3, 2], [9, 6]),
    "steps": ("optimizer steps", 1000, 60_000),  # paper: 20 epochs of its patches of SIDD
    "batch": ("crops per step", 2, 8),
    "crop": ("side of the crops", 90, 120),  # multiples of both strides lose no pixels to padding
}
PRESETS, LGBPN_PRESETS = (training.presets(PRESET_NAMES, table) for table in (SETTINGS, LGBPN_SETTINGS))
SHAPE = {"puca": ("enc_blocks", "middle_blocks", "dense"), "lgbpn": ("blocks",)}  # beside width and blind_spot


def build_network(arch="puca", **arguments):
    """The network that the `model_args` of a checkpoint describe."""
    return NETWORKS[arch](**arguments)


def new_model_args(args, noisy):
    """The `model_args` of a new network for the noisy images {name: (S,H,W)}."""
    shape = {k: getattr(args, k) for k in ("arch", "width", "blind_spot", "hole", *SHAPE[args.arch])}
    shape |= dict(dec_blocks=args.enc_blocks[::-1]) if args.arch == "puca" else {}
    return shape | dict(deviation=args.loss == "nll", context=data.choose_context(args.context, noisy, "bsn"))


def train(args, checkpoint=None):
    """Trains on the noisy images of the train split; writes args.model.

    Raises ValueError for data that cannot be trained on, or a checkpoint that this run does not continue.
    """
    noisy = data.read_volumes(args.data, "noisy", "train")
    data.check_crop(noisy, args.crop)
    model_args = checkpoint["model_args"] if checkpoint else new_model_args(args, noisy)
    if (args.loss == "nll") != model_args.get("deviation", False):
        raise ValueError(f"{args.model} was trained with another --loss than {args.loss}: it cannot resume")
    torch.manual_seed(args.seed)
    network, inputs = build_network(**model_args), dict(data=data.fingerprints(args.data))
    run = training.Training("bsn", args, checkpoint, network, model_args=model_args, inputs=inputs)
    context = model_args.get("context", 0)
    for step in run.steps():
        crops = data.random_crops([noisy], args.batch, args.crop, run.rng(step), run.rank, run.world, [context])
        (y,) = run.to_device(*crops)
        with run.autocast():
            prediction, target = run.net(y).float(), y[:, context, None]
            loss = blind_spot_loss(prediction, target, args.loss)
        run.update(loss, trivial=blind_spot_loss(torch.zeros_like(prediction), target, args.loss))


HIDDEN = 4  # subsampled images hidden in turn in each slice: all of stride 2, a share of those of strides 4 and 8


def hidden_offsets(rows, stride):
    """(row, column) modulo stride of what is hidden in the slices numbered `rows`: (4, slices, 2) integers."""
    k = (np.arange(rows.start, rows.stop)[None] * HIDDEN + np.arange(HIDDEN)[:, None]) * 13 % stride**2
    return np.stack([k // stride, k % stride], -1)


def estimator(path, device="auto", precision="auto"):
    """The network of a checkpoint: callable, (B,2 context + 1,H,W) noisy to (B,1,H,W), or (B,2,H,W) with its std."""
    device = runtime.pick_device(device)
    network, checkpoint = training.load_network(build_network, path, "bsn", device)

    def forward(y):
        with runtime.autocast(device, precision):
            out = network(y.to(device, memory_format=torch.channels_last)).float().cpu()
        return torch.cat([out[:, :1], out[:, 1:].clamp(min=-5).exp() / 10], 1)

    @torch.inference_mode()
    def estimate(y, *_):
        return data.tiled(forward, y, 1024, 256)

    estimate.context, estimate.stride = checkpoint["model_args"].get("context", 0), network.stride
    estimate.keys = ["pred", "std"][: network.tail[-1].out_channels]
    return estimate


def predict(args, noisy):
    """Writes the prediction for {name: (S,H,W)} of args.data, with the EMA weights of args.model, to args.out."""
    denoise, attrs = estimator(args.model, args.device, args.precision), {}
    context, stride, keys = denoise.context, denoise.stride, denoise.keys

    def with_hidden(y, name, rows):
        outputs = [denoise(y)]
        for offsets in hidden_offsets(rows, stride):
            seen = y.clone()  # hidden in the slice itself: the noise of its neighbours is their own
            for image, offset in zip(seen, offsets):
                image[context] = hide(image[None, context, None], stride, *offset)
            outputs.append(denoise(seen)[:, :1])
        return torch.cat(outputs, 1)

    data.choose_context(context, noisy)
    if args.hidden:
        keys = [*keys, ("hidden", HIDDEN)]
        period = hidden_offsets(slice(0, stride**2 // HIDDEN), stride).transpose(1, 0, 2)  # then they repeat
        attrs = dict(hidden_stride=stride, hidden_offsets=period)
    work = with_hidden if args.hidden else denoise
    data.write_predictions(args, "bsn", args.data, noisy, work, keys, attrs, context=context)


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
def main(argv=None):
    choices = dict(arch=NETWORKS, blind_spot=(1, 5, 9), hole=("own", "all"), loss=("l1", "l2", "nll"))
    p = training.training_parser(__doc__, PRESET_NAMES, {**LGBPN_SETTINGS, **SETTINGS}, choices, "bsn.pt")
    p.add_argument("--data", required=True, help="dataset (.h5)")
    training.context_flag(p)
    p.add_argument("--hidden", action="store_true", help="also predict with pixels hidden in turn")
    training.prediction_flags(p, "bsn_out.h5")
    args = p.parse_args(argv)
    training.check_outputs(args, [args.data])
    noisy = data.read_volumes(args.data, "noisy", args.split, data.TO_PREDICT)  # or refused, before it trains
    if not args.predict:
        train(args, training.resolve_args(args, LGBPN_PRESETS if args.arch == "lgbpn" else PRESETS, "bsn"))
    predict(args, noisy)


if __name__ == "__main__":
    runtime.command(main)
