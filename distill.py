"""Stage 4: the student (Sec. 3.6), a plain network from noisy to denoised image; it is what people run.

It learns from any prediction (knowledge distillation) or, beyond the paper, from noisy images and a noise model:

    --target FILE          distance to the prediction: the paper's way with srds_out.h5
    --target recorrupted   distance to the clean image, estimated without it by recorruption (`recorruption_loss`)
    --target clean         distance to the clean image: the supervised upper bound

    In    knee.h5         volumes/<name>/noisy  (S,H,W) float32, about [0,1]
          srds_out.h5     volumes/<name>/pred   (S,H,W) float32; any prediction file made from knee.h5
    Out   student.pt      checkpoint: EMA weights, model arguments, noise model
          distill_out.h5  volumes/<name>/pred   (S,H,W) float32; std, with --std; samples (S,N,H,W), with --samples N

    python distill.py --data knee.h5 --target srds_out.h5                      # trains student.pt, then predicts
    python distill.py --data new.h5 --predict --model student.pt --out new_out.h5
    python distill.py --data knee.h5 --target recorrupted --pred bsn_out.h5    # noise measured with the help of --pred

Symbols: y is the noisy image (the paper's x'), target the SRDS mean (Eq. 4). Networks, all deterministic:

    --arch nafnet    NAFNet (Chen et al. 2022), the paper's; as for SIDD with `--preset paper`, small with `nafnet`.
                     Its attention pools over 1.5 training crops around each pixel (TLC, Chu et al. 2022)
    --arch resunet   dense 3x3 convolutions at half resolution, nothing else: what processors are best at (`fast`)
    --arch told      a ResUNet that is told the noise model: one network for all levels; weights/ has such networks
"""

# ---------------------------------------------------------------------------------------------------------------
# core: needs torch alone; paste it anywhere
# ---------------------------------------------------------------------------------------------------------------
import torch
import torch.nn as nn
import torch.nn.functional as F


def local_mean(x, window):
    """Mean of x (B,C,H,W) over window x window pixels around each pixel; (B,C,1,1) if the image is no larger."""
    kh, kw = (min(window, n) for n in x.shape[-2:])
    if (kh, kw) == x.shape[-2:]:
        return x.mean((2, 3), keepdim=True)
    sums = F.pad(x.float().cumsum(2).cumsum(3), (1, 0, 1, 0))  # integral image: the cost does not depend on the window
    mean = (sums[..., kh:, kw:] - sums[..., :-kh, kw:] - sums[..., kh:, :-kw] + sums[..., :-kh, :-kw]) / (kh * kw)
    top, left = (kh - 1) // 2, (kw - 1) // 2
    return F.pad(mean, (left, kw - 1 - left, top, kh - 1 - top), mode="replicate").to(x.dtype)


class NAFBlock(nn.Module):
    """Depthwise convolution, gate and channel attention, then gated 1x1s; no other activation. (B,C,H,W) to (B,C,H,W).

    `window` is None while training: attention pools over the whole crop.
    """

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.spatial = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.attention, self.project = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.ffn_in, self.ffn_out = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, width, 1)
        self.beta, self.gamma = nn.Parameter(torch.zeros(width, 1, 1)), nn.Parameter(torch.zeros(width, 1, 1))
        self.window = None

    def forward(self, x):
        u, v = self.spatial(self.expand(self.norm1(x.movedim(1, -1)).movedim(-1, 1))).chunk(2, dim=1)
        u = u * v
        pooled = local_mean(u, self.window) if self.window else u.mean((2, 3), keepdim=True)
        x = x + self.beta * self.project(u * self.attention(pooled))
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


def stack(block, width, count):
    """`count` blocks of that width, one after the other."""
    return nn.Sequential(*(block(width) for _ in range(count)))


class NAFNet(nn.Module):
    """U-Net of NAFBlocks with a global residual connection (Chen et al. 2022, Sec. 3).

    Args:
        channels: of the image. width: features at the first level, doubled at each next one.
        enc_blocks, middle_blocks, dec_blocks: blocks per level; each level halves the resolution.
        context: how many neighbouring slices on each side come along as channels, the slice itself in the middle.
    Maps (B,C*(2*context+1),H,W) to (B,C,H,W), any H and W >= 16. Raises ValueError if levels down and up differ.
    """

    block, patch, facts = NAFBlock, 1, 0  # patch x patch pixels become channels; facts: further channels

    def __init__(
        self, channels=1, width=32, enc_blocks=(2, 2, 4, 8), middle_blocks=12, dec_blocks=(2, 2, 2, 2), context=0
    ):
        super().__init__()
        if len(enc_blocks) != len(dec_blocks):
            raise ValueError(f"enc_blocks {enc_blocks} and dec_blocks {dec_blocks} differ in their number of levels")
        widths = [width * 2**level for level in range(len(enc_blocks) + 1)]
        self.own = slice(context * channels, (context + 1) * channels)  # the channels of the slice itself
        self.intro = nn.Conv2d(((2 * context + 1) * channels + self.facts) * self.patch**2, width, 3, padding=1)
        self.encoders = nn.ModuleList(stack(self.block, w, n) for w, n in zip(widths, enc_blocks))
        self.downs = nn.ModuleList(nn.Conv2d(w, 2 * w, 2, stride=2) for w in widths[:-1])
        self.middle = stack(self.block, widths[-1], middle_blocks)
        self.ups = nn.ModuleList(nn.Conv2d(w, 2 * w, 1, bias=False) for w in widths[:0:-1])
        self.decoders = nn.ModuleList(stack(self.block, w, n) for w, n in zip(widths[-2::-1], dec_blocks))
        self.outro = nn.Conv2d(width, channels * self.patch**2, 3, padding=1)

    def pool_locally(self, crop):
        """From now on pools over 1.5 training crops around each pixel (TLC), not over the whole image. Returns self."""
        levels = [*self.encoders, self.middle, *self.decoders]
        depth = len(self.encoders)
        for k, level in enumerate(levels):
            for block in level:
                block.window = int(1.5 * crop) // 2 ** (depth - abs(depth - k))
        return self

    def forward(self, y):
        return y[:, self.own] + self.residual(y)

    def residual(self, y):
        h, w = y.shape[-2:]
        unit = self.patch * 2 ** len(self.encoders)
        x = F.pad(y, (0, -w % unit, 0, -h % unit), mode="replicate")
        x = self.intro(F.pixel_unshuffle(x, self.patch))
        skips = []
        for encoder, down in zip(self.encoders, self.downs):
            skips.append(encoder(x))
            x = down(skips[-1])
        x = self.middle(x)
        for up, decoder in zip(self.ups, self.decoders):
            x = decoder(F.pixel_shuffle(up(x), 2) + skips.pop())
        return F.pixel_shuffle(self.outro(x), self.patch)[..., :h, :w]


class ResUNet(NAFNet):
    """The same U shape of DenseBlocks, on 2x2 pixels as channels; width: features at half resolution."""

    block, patch = DenseBlock, 2


class ToldResUNet(ResUNet):
    """A ResUNet that is told the noise: it sees images in units of the noise level, and six facts as further channels.

    The facts are the noise's deviation at each pixel, as a share of the level, by the noise level function at the
    smoothed image, and five correlations. So one network serves all levels; at level 0 images stay what they are.
    Buffer `law` (1,9), in the checkpoint: what `noise.facts` returns.
    """

    facts = 6

    def __init__(self, channels=1, **arguments):
        super().__init__(channels, **arguments)
        self.register_buffer("law", torch.tensor([[0.02**2, 0, 0, 0.02, 0, 0, 0, 0, 0]]))

    def forward(self, y, law=None, gain=1.0):
        """law: (B,9), instead of the buffer. gain: (B,1,H,W), by how much the noise is stronger than the law says."""
        law = self.law if law is None else law
        a, b, c, level = law[:, :4, None, None, None].unbind(1)
        own = y[:, self.own]
        x = own.float().flatten(0, 1)  # without a channel dimension: pooling channels-last images is 8 times slower
        x = F.avg_pool2d(F.avg_pool2d(x, 5, 1, 2, count_include_pad=False), 5, 1, 2, count_include_pad=False)
        x = x.view_as(own).clamp(min=0)
        unit = level.clamp(min=1e-5)
        deviation = (a + b * x + c * x**2).clamp(min=1e-12).sqrt() * gain / unit
        correlations = law[:, 4:, None, None].expand(y.shape[0], -1, *y.shape[-2:])
        told = torch.cat([0.1 * y / unit, deviation.clamp(1 / 8, 8.0).log(), correlations], 1)
        return own + level * self.residual(told)


def mse_loss(x, target):
    """Mean square error in tenths of the range; (B,C,H,W) to a scalar of order 1 (see bsn.blind_spot_loss)."""
    return (10 * (x - target)).square().mean()


def psnr_loss(x, target):
    """Minus the mean PSNR in dB of a batch, range 1 (Chen et al. 2022). x, target (B,C,H,W); returns a scalar."""
    return 10 * torch.log10((x - target).square().mean((1, 2, 3)) + 1e-8).mean()


def recorruption_loss(network, y, z, strength=0.3, counts=None, elsewhere=None):
    """Mean square error of network(y) against the *clean* image, in tenths of the range, up to a constant.

    Args: y (B,2k+1,H,W) noisy slices with k neighbours on each side, k = 0 for the slice alone; z: fresh noise of the
    same distribution as theirs, for the slice alone (B,1,H,W) if the noise of its neighbours is independent of its own,
    for all of them (B,2k+1,H,W) otherwise; strength a; counts: (B,1,H,W), False for pixels whose noise z is not like,
    where the network learns `elsewhere` (B,1,H,W) instead.

    Recorruption (Pang et al. 2021): the noises of y + a z and y - z / a are uncorrelated, so that a network that learns
    the second from the first learns the clean image. Here z has both signs, and constants are left out:

        mean of |f(y + az) - y|^2 and |f(y - az) - y|^2, plus z * (f(y + az) - f(y - az)) / a

    The large terms in 1/a cancel: a can be small, and f sees nearly the noise of its use; in the limit of a = 0 this is
    Stein's unbiased risk estimate (SURE). Neighbours with independent noise may stay as they are.
    """
    beside = (y.shape[1] - z.shape[1]) // 2
    added = F.pad(strength * z, (0, 0, 0, 0, beside, beside))
    plus, minus = network(torch.cat([y + added, y - added])).float().chunk(2)
    y, z = (x[:, x.shape[1] // 2, None] for x in (y, z))
    y, z = (y, z) if counts is None else (torch.where(counts, y, elsewhere), counts * z)
    correction = (z * (plus - minus)).mean() * (100 / strength)
    return (mse_loss(plus, y) + mse_loss(minus, y)) / 2 + correction


# ---------------------------------------------------------------------------------------------------------------
# train and predict
# ---------------------------------------------------------------------------------------------------------------
import numpy as np

import data
import measure
import noise
from lib import planes, runtime, training

LOSSES = {"mse": mse_loss, "psnr": psnr_loss}
NETWORKS = {"nafnet": NAFNet, "resunet": ResUNet, "told": ToldResUNet}
BYTES = {NAFNet: 50, ResUNet: 10, ToldResUNet: 10}  # per pixel and feature of `width`, float32: measured
SETTINGS = {  # what it sets, its value in fast, in nafnet (as small as fast), in paper: NAFNet's for SIDD at width 32
    "arch": ("network", "resunet", "nafnet", "nafnet"),
    "width": ("features at the first level", 32, 16, 32),
    "enc_blocks": ("blocks at each level on the way down", [2, 2], [1, 1, 2], [2, 2, 4, 8]),
    "middle_blocks": ("blocks at the lowest level", 2, 2, 12),
    "dec_blocks": ("blocks at each level on the way up, lowest first", [2, 2], [1, 1, 1], [2, 2, 2, 2]),
    "loss": ("distance to a given target", "mse", "mse", "psnr"),
    "strength": ("a of the recorruption", 0.3, 0.3, 0.3),
    "steps": ("optimizer steps", 5000, 1500, 200_000),
    "batch": ("crops per step, over all processes together", 2, 4, 32),
    "crop": ("side of the square training crops, pixels", 96, 96, 256),
    "lr": ("peak learning rate", 2e-3, 2e-3, 1e-3),
    "beta2": ("AdamW's second decay", 0.99, 0.99, 0.9),  # fast: few steps, so a short memory
    "clip": ("largest gradient norm", 0.3, 1.0, 0.01),  # fast: at 1.0 long schedules can blow up
    "ema": ("decay per step of the averaged weights", 0.995, 0.995, 0.999),
}
PRESETS = training.presets(("fast", "nafnet", "paper"), SETTINGS)
SHAPE = ("arch", "width", "enc_blocks", "middle_blocks", "dec_blocks")  # with `context`, the `model_args`


def build_network(arch="nafnet", **arguments):
    """The network that the `model_args` of a checkpoint describe."""
    return NETWORKS[arch](**arguments)


def read_training_set(args, noise_model):
    """([{name: noisy}] or [{name: noisy}, {name: target, or --pred with a noise model}], their fingerprints)."""
    noisy, inputs = data.read_volumes(args.data, "noisy", "train"), dict(data=data.fingerprints(args.data))
    path = args.pred if noise_model else args.target
    if not path:
        return [noisy], inputs
    clean = path == "clean"
    goal = data.read_volumes(args.data, path, "train") if clean else data.read_matching(path, args.data, split="train")
    inputs["pred" if noise_model else "target"] = {name: data.fingerprint(x) for name, x in goal.items()}
    return [{name: noisy[name] for name in goal}, goal], inputs


def load_noise_model(args, checkpoint):
    """The noise model of --target recorrupted (that of the checkpoint, if there is one), or None for other targets."""
    if args.target != "recorrupted":
        return None
    if checkpoint and not checkpoint["extra"].get("noise"):
        raise ValueError(f"{args.model} was not trained by recorruption: it cannot resume so")
    if not args.strength > 0:
        raise ValueError(f"--strength {args.strength:g} is not positive")
    known = checkpoint["extra"]["noise"] if checkpoint else measure.load_noise_model(args.noise, args.data, args.pred)
    runtime.print_once(f"distill: {measure.summary(known)}")
    return known


def tell(network, noise_model, noisy):
    """Tells a ToldResUNet the noise of {name: (S,H,W)}; leaves other networks alone. Raises ValueError without it."""
    if isinstance(network, ToldResUNet):
        if not noise_model:
            raise ValueError("--arch told must be told the noise: it learns by --target recorrupted")
        network.law.copy_(torch.from_numpy(noise.facts(noise_model, noisy)))


def start_network(args, checkpoint, noisy, noise_model):
    """(network, model_args): of the checkpoint, of --init, or a new one with the --context that suits the images."""
    if checkpoint:
        return build_network(**checkpoint["model_args"]), checkpoint["model_args"]
    if args.init:
        network, start = training.load_network(build_network, args.init, "distill", "cpu")
        model_args, context = start["model_args"], start["model_args"].get("context", 0)
        if args.context not in ("auto", context):
            raise ValueError(f"--context {args.context}: {args.init} was trained with {context}")
        data.choose_context(context, noisy)
    else:
        model_args = {k: getattr(args, k) for k in SHAPE}
        model_args["context"] = data.choose_context(args.context, noisy, "distill")
        network = build_network(**model_args)
    tell(network, noise_model, noisy)
    return network.train(), model_args


def train(args, checkpoint=None):
    """Trains noisy -> target on the train split; writes args.model. Raises ValueError for files that do not fit."""
    noise_model = load_noise_model(args, checkpoint)
    stacks, inputs = read_training_set(args, noise_model)
    data.check_crop(stacks[0], args.crop)
    torch.manual_seed(args.seed)
    network, model_args = start_network(args, checkpoint, stacks[0], noise_model)
    extra, context = dict(crop=args.crop, noise=noise_model), model_args.get("context", 0)
    run = training.Training("distill", args, checkpoint, network, model_args=model_args, extra=extra, inputs=inputs)
    joint = noise_model and any(noise_model.get("through", ()))  # neighbours share noise
    unchanged = lambda y: y[:, context, None]  # noqa: E731  the trivial network
    contexts = [context, context if joint else 0][: len(stacks)]
    split = run.rank, run.world, contexts, noise.symmetries(noise_model)
    for step in run.steps():
        y, *more = data.random_crops(stacks, args.batch, args.crop, run.rng(step), *split)
        if noise_model:
            rngs = [run.rng(step, 1, j) for j in range(run.rank, args.batch, run.world)]
            own, guess, rest = y[:, context, None], more[0] if more else None, (more or [y])[0][:, contexts[-1], None]
            more = [noise.sample_like(noise_model, y if joint else own, guess, rngs)]
            more += [torch.from_numpy(noise.bright(noise_model, own.numpy())), rest]
        y, target, *counts = run.to_device(y, *more)  # with a noise model the target is y itself, and this the noise z
        with run.autocast():
            if noise_model:
                loss, trivial = (recorruption_loss(f, y, target, args.strength, *counts) for f in (run.net, unchanged))
            else:
                loss, trivial = (LOSSES[args.loss](f(y).float(), target) for f in (run.net, unchanged))
        run.update(loss, trivial, mse=loss / 100 - (counts[0] * target).square().mean() if noise_model else None)


def student(path, device="auto", precision="auto", memory=2 << 30, ensemble=1, told=None, std=False):
    """The denoiser that a checkpoint holds: callable, (B,2k+1,H,W) noisy to (B,1,H,W) denoised, both on the CPU.

    ensemble: 8 for the mean over noise.symmetries. Large images go in tiles: a run takes about `memory` bytes beside
    its start. told: (noise model, {name: (S,H,W) noisy}), for a network of weights/. std: (B,2,H,W), with
    noise.deviation, nine times as slow. Attributes: context k, noise_model, once (itself without ensemble and std),
    draw (noise.posterior_samples), alone, beside, planes (planes.equip). Raises ValueError for one not told the noise.
    """
    device = runtime.pick_device(device)
    network, checkpoint = training.load_network(build_network, path, "distill", device)
    if told:
        tell(network, *told)
    elif isinstance(network, ToldResUNet) and not checkpoint["extra"].get("noise"):
        raise ValueError(f"{path} must be told the noise: --noise of distill.py, or denoise.py without --model")
    known = told[0] if told else checkpoint["extra"].get("noise")
    if std and not known:
        raise ValueError(f"{path} knows no noise model, from which its uncertainty follows: --noise of distill.py")
    arguments, crop = checkpoint["model_args"], checkpoint["extra"]["crop"]
    network.pool_locally(crop)
    side, overlap = data.tiling(BYTES[type(network)] * arguments["width"], crop, memory)

    def across(axis, precision=precision):
        """The denoiser of slices across an axis of the volume, told how the noise lies in them."""
        laws = [network.law.clone()] if isinstance(network, ToldResUNet) else []
        if laws and axis:
            laws[0][0, 4:] = torch.from_numpy(noise.facts(planes.turned(known, axis), {"": np.zeros((1, 1, 1))})[4:])

        def forward(y):
            with runtime.autocast(device, precision):
                told = (law.expand(len(y), -1) for law in laws)
                return network(y.to(device, memory_format=torch.channels_last), *told).float().cpu()

        return torch.inference_mode()(lambda y: data.tiled(forward, y, side, overlap))

    once = across(0)

    def denoise(y):
        x = data.mean_over_symmetries(once, y, noise.symmetries(known)) if ensemble == 8 else once(y)
        rngs = [runtime.step_rng(0) for _ in y]  # the same for each slice: what is written depends on y alone
        return torch.cat([x, noise.deviation(known, once, y, x, rngs)], 1) if std else x

    denoise.context = once.context = arguments.get("context", 0)
    exact = lambda y: planes.across(across(0, "float32"), y, 0, once.context)[0]  # noqa: E731  bfloat16 adds noise
    denoise.draw = lambda y, x, rng, n: noise.posterior_samples(known, exact, y, x, rng, n)
    denoise.noise_model, denoise.once = known, once
    planes.equip(denoise, across, checkpoint["extra"].get("planes", 0), memory)
    return denoise


def weigh_planes(args):
    """Finds how much the two other planes of volumes should count, and adds that to the checkpoint args.model."""
    noisy = data.read_volumes(args.data, "noisy", data.to_learn_from(args.data))
    law = (denoise := student(args.model, args.device, args.precision)).noise_model
    s2 = lambda x, y: noise.local_variance(law, x, y) * noise.bright(law, y)  # noqa: E731
    planes.add_weight(args.model, denoise, noisy, lambda *images: noise.sample(law, *images), s2)


def predict(args, noisy):
    """Writes the student's output for {name: (S,H,W)} of args.data, with the EMA weights of args.model, to args.out."""
    told = args.predict and args.noise and (measure.load_noise_model(args.noise, args.data, args.pred), noisy)
    std = bool(args.std or args.samples)
    denoise = student(args.model, args.device, args.precision, ensemble=args.ensemble, told=told, std=std)
    data.choose_context(denoise.context, noisy)
    if args.samples:
        return runtime.first_alone(write_samples, args, denoise, noisy)
    image, keys = planes.mixed(denoise, noisy), ["pred", "std"][: 1 + std]
    data.write_predictions(args, "distill", args.data, noisy, image, keys, context=denoise.context)


def write_samples(args, denoise, noisy):
    """Writes the student's output and args.samples of noise.posterior_samples of each volume to args.out."""
    law = denoise.noise_model
    with data.write_volumes(args.out, "prediction", "distill", vars(args), like=args.data, noise=law) as add:
        for k, (name, volume) in enumerate(runtime.progress(noisy.items(), "samples")):
            y = np.asarray(volume[:], np.float32)
            (x, std), rng = planes.whole(denoise, y), runtime.step_rng(args.seed or 0, k)
            drawn = denoise.draw(y, x, rng, args.samples).swapaxes(0, 1)
            for array, v in zip(add(name, volume.shape, ["pred", "std", ("samples", args.samples)]), (x, std, drawn)):
                array[:] = v
    print(f"distill: {len(noisy)} volumes, {args.samples} samples each -> {args.out}", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
def main(argv=None):
    p = training.training_parser(__doc__, tuple(PRESETS), SETTINGS, dict(arch=NETWORKS, loss=LOSSES), "student.pt")
    p.add_argument("--data", help="dataset (.h5)")
    p.add_argument("--target", help="prediction file (.h5) to learn from; `recorrupted`; or `clean`: the upper bound")
    p.add_argument("--noise", help=f"of --target recorrupted, or of what weights/ is to denoise: {measure.NOISE_HELP}")
    p.add_argument("--pred", help="with --target recorrupted: prediction file (.h5), for measuring and for intensities")
    p.add_argument("--init", help="start from the weights of this student (.pt)")
    training.context_flag(p)
    p.add_argument("--ensemble", type=int, choices=(1, 8), help="mean over 8 symmetries (default 8; 1 with --predict)")
    p.add_argument("--planes", action="store_true", help="see volumes in the other planes too; kept in --model")
    p.add_argument("--std", action="store_true", help="also write the standard deviation of what is left unknown")
    p.add_argument("--samples", type=runtime.positive, metavar="N", help="also draw N possible clean images of each")
    p.add_argument("--export", metavar="FILE", help="only write the trained --model as ONNX (.onnx)")
    training.prediction_flags(p, "distill_out.h5")
    args = p.parse_args(argv)
    if args.export:
        return training.export_student(build_network, args.model, args.export)
    if not args.data:
        raise ValueError("--data is needed, but for --export")
    training.check_outputs(args, [args.data, args.target, args.pred, args.init])
    args.ensemble = args.ensemble or (1 if args.predict else 8)
    if not (args.predict or args.target):
        raise ValueError("--target is needed for training: a prediction file, recorrupted, or clean")
    if args.predict and args.planes:
        raise ValueError("--planes is for training, which adds their weight to --model; --predict leaves that alone")
    noisy = data.read_volumes(args.data, "noisy", args.split, data.TO_PREDICT)  # or refused, before it trains
    if not args.predict:
        train(args, training.resolve_args(args, PRESETS, "distill"))
    if args.planes:
        runtime.first_alone(weigh_planes, args)
    predict(args, noisy)


if __name__ == "__main__":
    runtime.command(main)
