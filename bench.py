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
dilation, one Python call per crop in a DataLoader; for the U-Net and the student of `fast` also full resolution, and
the U-Net's GroupNorm; for sampling a loop over the DDIM scheduler of `diffusers`, with a pass for each of the pair.
"the same network" is ours in the plain form, nothing left out. All forms of a line run in turn, in this process; times
are medians.

Operations are counted by torch.utils.flop_counter, a multiplication and an addition as two. Their share is of what a
2048x2048 matrix product reaches here, in the precision that the form uses; convolutions can pass it. Memory is what a
process of its own needs above its start (Linux; on CUDA, what torch has allocated).
"""

import itertools
import json
import multiprocessing
import platform
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

import baselines
import bsn
import data
import diffusion
import distill
import evaluate
import formats
import noise
import plain
import runtime
import srds

LEVEL = 6 / 255
OURS, SAME, PLAIN = "ours", "the same network, plain", "plain"
UNET = "diffusion U-Net"


# ---------------------------------------------------------------------------------------------------------------
# what is measured
# ---------------------------------------------------------------------------------------------------------------
def blind_loss(network, y, x):
    return bsn.blind_spot_loss(network(y).float(), y)


def noise_loss(network, y, x, abar=diffusion.alpha_bar()):  # noqa: B008
    t = torch.randint(len(abar), (len(y),), device=y.device)
    x0, c = diffusion.scaled(y), diffusion.scaled(x)
    return diffusion.diffusion_loss(network, x0, c, abar, t, torch.randn_like(y), "v")


def student_loss(network, y, x):
    return distill.mse_loss(network(y).float(), x)


class Case(NamedTuple):
    """ours: makes the network. theirs: makes that of the plain form, if it is another. preset: of its script."""

    ours: Callable
    theirs: Callable | None
    loss: Callable
    preset: dict

    @property
    def forms(self):
        return [OURS, SAME, PLAIN] if self.theirs else [OURS, PLAIN]


def networks(size):
    """{name: Case} at the size fast or paper."""
    b, u, s = bsn.PRESETS[size], diffusion.PRESETS[size], distill.PRESETS[size]
    n = distill.PRESETS["nafnet" if size == "fast" else size]
    puca = {name: b[name] for name in ("width", "enc_blocks", "middle_blocks")}
    puca = partial(bsn.PUCA, **puca, dec_blocks=b["enc_blocks"][::-1])
    unet = {name: u[name] for name in ("width", "mult", "blocks", "attention", "patch", "groups")}
    naf, res = ({name: p[name] for name in ("width", "enc_blocks", "middle_blocks", "dec_blocks")} for p in (n, s))
    published = partial(diffusion.UNet, **{**unet, "patch": 1, "groups": 32}) if size == "fast" else None
    found = {
        "PUCA": Case(puca, None, blind_loss, b),
        UNET: Case(partial(diffusion.UNet, **unet), published, noise_loss, u),
        "NAFNet": Case(partial(distill.NAFNet, **naf), None, student_loss, n),
    }
    if size == "fast":
        full = partial(plain.FullResUNet, **res)
        found["blind-spot network of `fast`"] = Case(partial(puca, dense=True), None, blind_loss, b)
        found["student of `fast`"] = Case(partial(distill.ResUNet, **res), full, student_loss, s)
    return found


def network_of(size, name, form, where, seed=0):
    """A network in one of its forms, on its device."""
    case = networks(size)[name]
    torch.manual_seed(seed)
    network = (form == PLAIN and case.theirs or case.ours)()
    return network.to(where, memory_format=torch.channels_last) if form == OURS else plain.plain(network).to(where)


def layout(form):
    return torch.channels_last if form == OURS else torch.contiguous_format


def precision(form, where):
    return runtime.autocast(where, "auto" if form == OURS else "float32")


def brain():
    """[{name: noisy}, {name: clean}]: the built-in brain with Gaussian noise of 6/255."""
    x, rng = formats.brain().slices.astype(np.float32) / 255, np.random.default_rng(0)
    return [{"brain": np.stack([noise.add(s, "gaussian", LEVEL, 0, rng) for s in x])}, {"brain": x}]


def crops_of(stacks, batch, size, form, seed=0):
    """Training crops without end, in the way of the form: [y, x], each (batch,1,size,size)."""
    if form == OURS:
        return (data.random_crops(stacks, batch, size, runtime.step_rng(seed, k)) for k in itertools.count())
    random.seed(seed)
    return iter(torch.utils.data.DataLoader(plain.CropDataset(stacks, size, 10**9), batch))


def trainer(size, name, form, stacks, batch, crop, where, seed=0, steps=10**9):
    """(network, one of `steps` training steps as the scripts take it: a callable that returns the loss)."""
    *_, loss, preset = networks(size)[name]
    network, crops = network_of(size, name, form, where, seed), crops_of(stacks, batch, crop, form, seed)
    betas, fused = (0.9, preset.get("beta2", 0.999)), form == OURS
    optimizer = torch.optim.AdamW(network.parameters(), lr=preset["lr"], betas=betas, fused=fused)
    scheduler = runtime.warmup_cosine(optimizer, steps)
    ema = AveragedModel(network, multi_avg_fn=runtime.ema_update(preset["ema"]))

    def step():
        y, x = (z.to(where, memory_format=layout(form)) for z in next(crops))
        optimizer.zero_grad(set_to_none=True)
        with precision(form, where):
            value = loss(network, y, x)
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), preset.get("clip", 1.0))
        optimizer.step()
        scheduler.step()
        ema.update_parameters(network)
        return value.detach()

    return network, step


def inference(size, name, form, side, where):
    """The network on a slice of side x side pixels: a callable without arguments."""
    network = network_of(size, name, form, where).eval()
    y = torch.rand(1, 1, side, side, device=where).to(memory_format=layout(form))
    arguments = (y, y, torch.zeros(1, device=where)) if name == UNET else (y,)

    @torch.inference_mode()
    def run():
        with precision(form, where):
            return network(*arguments)

    return run


def sampler(size, form, steps, where, side=256):
    """SRDS of one slice: a callable without arguments. The plain form takes a pass for each of the pair."""
    network = network_of(size, UNET, form, where).eval()
    c, eps = torch.rand(1, 1, side, side, device=where), torch.randn(1, 1, side, side, device=where)
    abar = diffusion.alpha_bar()
    model = diffusion.eps_model(network, abar, "v")

    @torch.inference_mode()
    def ours():
        with precision(form, where):
            return srds.srds(model, c, eps, abar, steps)[0]

    @torch.inference_mode()
    def theirs():
        from diffusers import DDIMScheduler

        betas = (1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])).numpy()
        scheduler = DDIMScheduler(len(abar), trained_betas=betas, clip_sample=False, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        samples = []
        for x in (eps, -eps):
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, c, t.expand(1).to(where)), t, x).prev_sample
            samples.append(x)
        return (samples[0] + samples[1]) / 2

    return ours if form == OURS else theirs


# ---------------------------------------------------------------------------------------------------------------
# how it is measured
# ---------------------------------------------------------------------------------------------------------------
def seconds_of(action, where, times=1):
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    started = time.perf_counter()
    for _ in range(times):
        action()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return (time.perf_counter() - started) / times


def alternate(actions, repeats, where, least=0.2):
    """{form: median seconds} of callables that run in turn, `repeats` turns of at least `least` seconds each."""
    turns = {}
    for form, action in actions.items():
        seconds_of(action, where, 2)  # caches and memory
        turns[form] = max(1, round(least / seconds_of(action, where)))
    rounds = [{form: seconds_of(a, where, turns[form]) for form, a in actions.items()} for _ in range(repeats)]
    return {form: statistics.median(r[form] for r in rounds) for form in actions}


def operations(action):
    """Floating-point operations of a callable, in 10^9."""
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops() / 1e9


def resident(where):
    """Megabytes that this process has had in memory at most; None where the system does not say."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where) / 1e6
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1e3 if status.exists() else None


def memory(where, what, *arguments):
    """Megabytes that what(*arguments, where) needs above the start, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(need, (str(where), what, *arguments))


def need(where, what, *arguments):
    where = runtime.device(where)
    torch.rand(64, 64, device=where) @ torch.rand(64, 64, device=where)
    before = resident(where)
    what(*arguments, where)
    return before and round(resident(where) - before)


def train_steps(size, name, form, batch, crop, where):
    _, step = trainer(size, name, form, brain(), batch, crop, where)
    for _ in range(3):
        step()


def infer_once(size, name, form, side, where):
    inference(size, name, form, side, where)()


# ---------------------------------------------------------------------------------------------------------------
# sections: each yields the rows of its table
# ---------------------------------------------------------------------------------------------------------------
def compared(actions, rates, args, where, **row):
    """Rows of forms that run in turn: time, against ours, operations, share of the matrix product's rate."""
    times = alternate(actions, args.repeats, where)
    for form, action in actions.items():
        done, ms = operations(action), 1000 * times[form]
        rate = rates["bfloat16" if form == OURS and runtime.autocast(where)._enabled else "float32"]
        yield dict(
            **row,
            form=form,
            ms=round(ms, 2),
            ratio=round(times[form] / times[OURS], 2),
            gflop=round(done, 2),
            share=round(done / times[form] / rate, 2),
        )


def section_train(args, rates, where):
    for size in args.presets:
        stacks = brain()
        for name, case in networks(size).items():
            batch, crop = (case.preset["batch"], case.preset["crop"]) if size == "fast" else (1, 64)
            actions = {form: trainer(size, name, form, stacks, batch, crop, where)[1] for form in case.forms}
            for row in compared(actions, rates, args, where, size=size, network=name, crops=f"{batch}x{crop}x{crop}"):
                row["images_per_s"] = round(1000 * batch / row["ms"], 1)
                yield dict(row, memory_mb=memory(where, train_steps, size, name, row["form"], batch, crop))


def section_losses(args, rates, where):
    """Ours and plain after equal steps: the mean loss on 64 other crops."""
    stacks = brain()
    for name, case in networks("fast").items():
        preset = case.preset
        for form in case.forms:
            found = []
            for seed in (0, 1):
                network, step = trainer(
                    "fast", name, form, stacks, preset["batch"], preset["crop"], where, seed, args.steps
                )
                for _ in range(args.steps):
                    step()
                torch.manual_seed(0)
                with torch.inference_mode(), precision(form, where):
                    crops = crops_of(stacks, 16, preset["crop"], OURS, 1000)
                    found.append(
                        statistics.mean(
                            case.loss(network, *(z.to(where) for z in next(crops))).item() for _ in range(4)
                        )
                    )
            yield dict(network=name, form=form, steps=args.steps, seed_0=round(found[0], 4), seed_1=round(found[1], 4))


def section_infer(args, rates, where):
    for size in args.presets:
        for (name, case), side in itertools.product(networks(size).items(), (256, 512)):
            actions = {form: inference(size, name, form, side, where) for form in case.forms}
            for row in compared(actions, rates, args, where, size=size, network=name, slice=f"{side}x{side}"):
                yield dict(row, memory_mb=memory(where, infer_once, size, name, row["form"], side))


def section_sample(args, rates, where):
    for size in args.presets:
        steps = diffusion.PRESETS[size]["sampling_steps"] if size == "fast" else 1
        actions = {form: sampler(size, form, steps, where) for form in networks(size)[UNET].forms}
        for row in compared(actions, rates, args, where, size=size, evaluations=2 * steps):
            yield dict(row, ms_per_evaluation=round(row["ms"] / 2 / steps, 2))


def section_crops(args, rates, where):
    stacks, batch, size = brain()[:1], 8, 96
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "brain.h5"
        with data.write_volumes(path, "dataset", "bench") as add:
            for name, volume in stacks[0].items():
                add(name, volume.shape, ["noisy"], split="train")[0][:] = volume
        streamed = [data.read_volumes(path, memory=0)]
        ways = {"in memory": (stacks, OURS), "streamed from HDF5": (streamed, OURS), "DataLoader": (stacks, PLAIN)}
        crops = {way: crops_of(s, batch, size, form) for way, (s, form) in ways.items()}
        times = alternate({way: lambda c=c: next(c) for way, c in crops.items()}, args.repeats, where)
    for way, seconds in times.items():
        yield dict(
            way=way, crops=f"{batch}x{size}x{size}", ms=round(1000 * seconds, 2), crops_per_s=round(batch / seconds)
        )


def section_student(args, rates, where):
    from skimage.restoration import denoise_tv_chambolle, denoise_wavelet

    if not (args.data and args.student):
        print("bench: the section student needs --data and --student", flush=True)
        return
    noisy, clean = (data.read_volumes(args.data, key, "test") for key in ("noisy", "clean"))
    first, denoise = next(iter(noisy.values()))[0], distill.student(args.student, str(where))
    sigma = data.rms_difference(noisy, clean)
    ways = {
        "student": lambda y: denoise(torch.from_numpy(y)[None, None])[0, 0].numpy(),
        "non-local means, fast": lambda y: baselines.non_local_means(y, sigma),
        "total variation": lambda y: denoise_tv_chambolle(y, weight=sigma),
        "wavelet": lambda y: denoise_wavelet(y, sigma=sigma, method="BayesShrink", mode="soft", rescale_sigma=True),
    }
    large = np.pad(first, [(0, max(0, 512 - n)) for n in first.shape], mode="wrap")[:512, :512]
    large = np.ascontiguousarray(large, np.float32)
    times = alternate({way: lambda f=f: f(large) for way, f in ways.items()}, args.repeats, where)
    for way, f in ways.items():
        slices = [(name, s) for name, volume in noisy.items() for s in range(volume.shape[0])]
        scores = [evaluate.psnr_ssim(f(np.asarray(noisy[name][s])), clean[name][s]) for name, s in slices]
        psnr, ssim = np.mean(scores, 0)
        mb = memory(where, denoise_once, args.student, large) if way == "student" else None
        row = dict(method=way, ms_512=round(1000 * times[way], 1), memory_mb=mb)
        yield dict(row, psnr=round(float(psnr), 2), ssim=round(float(ssim), 4), slices=len(slices))


def denoise_once(path, y, where):
    distill.student(path, str(where))(torch.from_numpy(y)[None, None])


def section_scaling(args, rates, where):
    """The student on more slices, and on larger ones: seconds and memory of a process of its own."""
    for slices, side in ((10, 256), (100, 256), (1000, 256), (10, 128), (10, 512), (10, 1024), (10, 2048)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, mb = pool.apply(predict_many, (slices, side, str(where)))
        per_pixel = round(1e9 * seconds / slices / side**2, 1)
        yield dict(
            slices=slices,
            side=side,
            ms_per_slice=round(1000 * seconds / slices, 1),
            ns_per_pixel=per_pixel,
            memory_mb=mb,
        )


def predict_many(slices, side, where):
    """(seconds, megabytes above the start) of `distill.py --predict` on a dataset of that size, from file to file."""
    where, rng = runtime.device(where), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path, model = (str(Path(folder) / name) for name in ("noisy.h5", "student.pt"))
        with data.write_volumes(path, "dataset", "bench") as add:
            (array,) = add("v", (slices, side, side), ["noisy"], fingerprint="of the bench")
            for s in range(slices):
                array[s] = rng.random((side, side), dtype=np.float32)
        preset = distill.PRESETS["fast"]
        arguments = {name: preset[name] for name in ("arch", "width", "enc_blocks", "middle_blocks", "dec_blocks")}
        weights = distill.network(**arguments).state_dict()
        torch.save(dict(stage="distill", model_args=arguments, ema=weights, extra=dict(crop=preset["crop"])), model)
        distill.student(model, str(where))(torch.rand(1, 1, 64, 64))
        before = resident(where)
        flags = ["--data", path, "--predict", "--model", model, "--out", str(Path(folder) / "out.h5")]
        flags += ["--device", str(where)]
        seconds = seconds_of(lambda: distill.main(flags), where)
        return seconds, before and round(resident(where) - before)


def rates_of(where):
    """{precision: operations per 10^-9 s} of a 2048x2048 matrix product."""
    found = {}
    for kind in (torch.float32, torch.bfloat16):
        a = torch.rand(2048, 2048, device=where, dtype=kind)
        product = alternate({"": lambda a=a: a @ a}, 5, where)[""]
        found[str(kind).removeprefix("torch.")] = round(2 * 2048**3 / product / 1e9, 1)
    return found


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
def table(rows):
    """A Markdown table of dicts with the same keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([("" if v is None else v) for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main(argv=None):
    sections = {name.removeprefix("section_"): f for name, f in globals().items() if name.startswith("section_")}
    p = runtime.parser(__doc__)
    p.add_argument("--preset", choices=("fast", "paper", "both"), default="both", help="default both")
    p.add_argument("--sections", nargs="+", choices=sections, help="default: all but losses")
    p.add_argument("--repeats", type=runtime.positive, default=5, help="turns of which the median is taken (default 5)")
    p.add_argument("--steps", type=runtime.positive, default=300, help="of the section losses (default 300)")
    p.add_argument("--data", help="dataset (.h5) with clean images, for the section student")
    p.add_argument("--student", help="student (.pt) trained on it")
    p.add_argument("--device", default="auto", help="as of the training scripts (default auto)")
    p.add_argument(
        "--out",
        default="bench.json",
        help="the rows as JSON; other sections that it holds are kept (default bench.json)",
    )
    args = p.parse_args(argv)
    runtime.check_outputs([args.data, args.student], [args.out])
    args.presets = ("fast", "paper") if args.preset == "both" else (args.preset,)
    where = runtime.device(args.device)
    rates = rates_of(where)
    machine = dict(
        device=str(where),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        machine=platform.machine(),
        matrix_product_gflop_per_s=rates,
    )
    print(json.dumps(machine), flush=True)
    results = json.loads(Path(args.out).read_text()) if Path(args.out).exists() else {}
    results["machine"] = machine
    for name in args.sections or [name for name in sections if name != "losses"]:
        rows = list(sections[name](args, rates, where))
        if rows:
            results[name] = rows
            print(f"\n{name}\n\n{table(rows)}", flush=True)
            with runtime.whole(args.out) as temporary:
                temporary.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    runtime.command(main)
