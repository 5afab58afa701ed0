"""Speed and memory of every stage, beside the plain form that people would otherwise use; one table, and JSON.

    python -m experiments.bench                                           # fast and paper widths, all sections
    python -m experiments.bench --preset fast --sections train infer --repeats 9
    python -m experiments.bench --sections student --data demo/brain.h5 --student demo/recorrupted.pt

Sections:

    train     a training step as the stages take it, crops included, and the memory of one
    losses    the mean loss on 64 other crops after --steps training steps, two seeds (runs only if named)
    infer     a slice of 256x256 and of 512x512 pixels
    sample    SRDS of a slice of 256x256, for each network evaluation and as a whole
    crops     random crops per second: in memory, streamed from HDF5, and from a DataLoader
    student   the student of --student and scikit-image's denoisers on a 512x512 slice, and their PSNR on --data
    scaling   time per slice for 10, 100, 1000 slices, and per pixel for sides of 128 to 2048

Each network is measured in two or three variants: ours, the same network computed as the reference implementations do,
and the network that is usually taken for the task (bench_variants.py). The variants of a line run in turn, in this
process; times are medians.

Operations are counted by torch.utils.flop_counter, a multiplication and an addition as two. `share` is their rate as a
share of that of a 2048x2048 matrix product here, in the precision that the variant uses; convolutions can be faster.
Memory is what a process of its own needs above its start (Linux; on CUDA, what torch has allocated).
"""

import itertools
import json
import platform
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from skimage.restoration import denoise_tv_chambolle, denoise_wavelet
from torch.utils.flop_counter import FlopCounterMode

import data
import diffusion
import distill
import evaluate
from experiments import baselines
from experiments.bench_variants import OURS, PLAIN, UNET, autocast, brain, cases, crops_of, inference, sampler, trainer
from experiments.resources import in_own_process, median_seconds, peak_memory, seconds_of
from lib import runtime


# ---------------------------------------------------------------------------------------------------------------
# operations and memory
# ---------------------------------------------------------------------------------------------------------------
def operations(action):
    """Floating-point operations of a callable, in 10^9."""
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops() / 1e9


def uses_bfloat16(variant, device):
    with autocast(variant, device):
        return torch.is_autocast_enabled(device.type)


def operation_rates(device):
    """{precision: 10^9 operations per second} of a 2048x2048 matrix product, in each precision that a variant uses."""
    found = {}
    for dtype in (torch.float32, *([torch.bfloat16] if uses_bfloat16(OURS, device) else [])):
        a = torch.rand(2048, 2048, device=device, dtype=dtype)
        (seconds,) = median_seconds({"": partial(torch.matmul, a, a)}, 5, device).values()
        found[str(dtype).removeprefix("torch.")] = round(2 * 2048**3 / seconds / 1e9, 1)
    return found


def memory(device, function, *arguments):
    """Megabytes that function(*arguments, device) needs above the start, in a process of its own."""
    return in_own_process(memory_here, str(device), function, *arguments)


def memory_here(device, function, *arguments):
    device = runtime.pick_device(device)
    torch.rand(64, 64, device=device) @ torch.rand(64, 64, device=device)
    before = peak_memory(device)
    function(*arguments, device)
    return before and round(peak_memory(device) - before)


def train_three_steps(size, name, variant, batch, crop, device):
    _, step = trainer(size, name, variant, brain(), batch, crop, device)
    for _ in range(3):
        step()


def infer_once(size, name, variant, side, device):
    inference(size, name, variant, side, device)()


def denoise_once(path, y, device):
    distill.student(path, str(device))(torch.from_numpy(y)[None])


# ---------------------------------------------------------------------------------------------------------------
# sections: each yields the rows of its table
# ---------------------------------------------------------------------------------------------------------------
def compared(actions, args, **row):
    """Rows of {variant: action}: time, its ratio to ours, operations, share of the matrix product's rate."""
    seconds = median_seconds(actions, args.repeats, args.device)
    for variant, action in actions.items():
        count = operations(action)
        rate = args.rates["bfloat16" if uses_bfloat16(variant, args.device) else "float32"]
        ms, ratio = round(1000 * seconds[variant], 2), round(seconds[variant] / seconds[OURS], 2)
        share = round(count / seconds[variant] / rate, 2)
        yield dict(**row, variant=variant, ms=ms, ratio=ratio, gflop=round(count, 2), share=share)


def section_train(args):
    stacks, device = brain(), args.device
    for size in args.presets:
        for name, case in cases(size).items():
            batch, crop = (case.preset["batch"], case.preset["crop"]) if size == "fast" else (1, 64)
            actions = {v: trainer(size, name, v, stacks, batch, crop, device)[1] for v in case.variants}
            for row in compared(actions, args, size=size, network=name, crops=f"{batch}x{crop}x{crop}"):
                needed = memory(device, train_three_steps, size, name, row["variant"], batch, crop)
                yield dict(row, images_per_s=round(1000 * batch / row["ms"], 1), memory_mb=needed)


def section_losses(args):
    stacks = brain()
    for name, case in cases("fast").items():
        for variant in case.variants:
            losses = [round(loss_after(args, name, variant, stacks, seed), 4) for seed in (0, 1)]
            yield dict(network=name, variant=variant, steps=args.steps, seed_0=losses[0], seed_1=losses[1])


def loss_after(args, name, variant, stacks, seed):
    """The mean loss on 64 other crops, after args.steps training steps."""
    case, device = cases("fast")[name], args.device
    batch, crop = case.preset["batch"], case.preset["crop"]
    network, step = trainer("fast", name, variant, stacks, batch, crop, device, seed, args.steps)
    for _ in range(args.steps):
        step()
    torch.manual_seed(0)
    others = itertools.islice(crops_of(stacks, 16, crop, OURS, 1000), 4)
    with torch.inference_mode(), autocast(variant, device):
        return statistics.mean(case.loss(network, y.to(device), x.to(device)).item() for y, x in others)


def section_infer(args):
    for size in args.presets:
        for (name, case), side in itertools.product(cases(size).items(), (256, 512)):
            actions = {v: inference(size, name, v, side, args.device) for v in case.variants}
            for row in compared(actions, args, size=size, network=name, slice=f"{side}x{side}"):
                yield dict(row, memory_mb=memory(args.device, infer_once, size, name, row["variant"], side))


def section_sample(args):
    for size in args.presets:
        steps = diffusion.PRESETS[size]["sampling_steps"] if size == "fast" else 1
        actions = {v: sampler(size, v, steps, args.device) for v in cases(size)[UNET].variants}
        for row in compared(actions, args, size=size, evaluations=2 * steps):
            yield dict(row, ms_per_evaluation=round(row["ms"] / 2 / steps, 2))


def section_crops(args):
    stacks, batch, size = brain()[:1], 8, 96
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "brain.h5"
        with data.write_volumes(path, "dataset", "bench") as add:
            for name, volume in stacks[0].items():
                add(name, volume.shape, ["noisy"], split="train")[0][:] = volume
        streamed = [data.read_volumes(path, memory=0)]
        ways = {"in memory": (stacks, OURS), "streamed from HDF5": (streamed, OURS), "DataLoader": (stacks, PLAIN)}
        crops = {way: crops_of(volumes, batch, size, variant) for way, (volumes, variant) in ways.items()}
        seconds = median_seconds({way: partial(next, c) for way, c in crops.items()}, args.repeats, args.device)
    for way, s in seconds.items():
        yield dict(way=way, crops=f"{batch}x{size}x{size}", ms=round(1000 * s, 2), crops_per_s=round(batch / s))


def section_student(args):
    if not (args.data and args.student):
        print("bench: the section student needs --data and --student", flush=True)
        return
    noisy, clean = (data.read_volumes(args.data, key, "test") for key in ("noisy", "clean"))
    student, sigma = distill.student(args.student, str(args.device)), data.rms_difference(noisy, clean)
    bayes = dict(sigma=sigma, method="BayesShrink", mode="soft", rescale_sigma=True)
    ways = {  # of a slice with its neighbours (2k+1,H,W), the classical ones take the slice
        "student": lambda y: student(torch.from_numpy(y)[None])[0, 0].numpy(),
        "non-local means, fast": lambda y: baselines.non_local_means(y[student.context], sigma),
        "total variation": lambda y: denoise_tv_chambolle(y[student.context], weight=sigma),
        "wavelet": lambda y: denoise_wavelet(y[student.context], **bayes),
    }
    slices = [
        (np.asarray(data.read_around(volume, s, student.context)), clean[name][s])
        for name, volume in noisy.items()
        for s in range(volume.shape[0])
    ]
    first = slices[0][0]
    large = np.pad(first, [(0, 0), *((0, max(0, 512 - n)) for n in first.shape[1:])], mode="wrap")[:, :512, :512]
    large = np.ascontiguousarray(large, np.float32)
    seconds = median_seconds({way: partial(f, large) for way, f in ways.items()}, args.repeats, args.device)
    for way, denoise in ways.items():
        psnr, ssim = np.mean([evaluate.psnr_ssim(denoise(y), x) for y, x in slices], 0)
        needed = memory(args.device, denoise_once, args.student, large) if way == "student" else None
        row = dict(method=way, ms_512=round(1000 * seconds[way], 1), memory_mb=needed)
        yield dict(row, psnr=round(float(psnr), 2), ssim=round(float(ssim), 4), slices=len(slices))


def section_scaling(args):
    """The student on more slices, and on larger ones: seconds and memory of a process of its own."""
    for count, side in ((10, 256), (100, 256), (1000, 256), (10, 128), (10, 512), (10, 1024), (10, 2048)):
        seconds, needed = in_own_process(predict_many, count, side, str(args.device))
        each, pixel = round(1000 * seconds / count, 1), round(1e9 * seconds / count / side**2, 1)
        yield dict(slices=count, side=side, ms_per_slice=each, ns_per_pixel=pixel, memory_mb=needed)


def predict_many(count, side, device_name):
    """(seconds, megabytes above the start) of `distill.py --predict` on `count` slices, from file to file."""
    device, preset = runtime.pick_device(device_name), distill.PRESETS["fast"]
    model_args = {k: preset[k] for k in distill.SHAPE}
    weights = distill.build_network(**model_args).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path, student = (str(Path(folder) / name) for name in ("noisy.h5", "student.pt"))
        with data.write_volumes(path, "dataset", "bench") as add:
            (noisy,) = add("v", (count, side, side), ["noisy"], fingerprint="of the bench")
            for s in range(count):
                noisy[s] = runtime.step_rng(0, s).random((side, side), dtype=np.float32)
        torch.save(dict(stage="distill", model_args=model_args, ema=weights, extra=dict(crop=preset["crop"])), student)
        distill.student(student, device_name)(torch.rand(1, 1, 64, 64))
        before = peak_memory(device)
        flags = ["--predict", "--data", path, "--model", student, "--out", str(Path(folder) / "out.h5")]
        seconds = seconds_of(partial(distill.main, [*flags, "--device", device_name]), device)
        return seconds, before and round(peak_memory(device) - before)


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
SECTIONS = {name.removeprefix("section_"): f for name, f in globals().items() if name.startswith("section_")}


def table(rows):
    """A Markdown table of dicts with the same keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([("" if v is None else v) for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main(argv=None):
    p = runtime.parser(__doc__)
    p.add_argument("--preset", choices=("fast", "paper", "both"), default="both", help="default both")
    p.add_argument("--sections", nargs="+", choices=SECTIONS, help="default: all but losses")
    p.add_argument("--repeats", type=runtime.positive, default=5, help="turns whose median is taken (default 5)")
    p.add_argument("--steps", type=runtime.positive, default=300, help="for the section losses (default 300)")
    p.add_argument("--data", help="dataset (.h5) with clean images, for the section student")
    p.add_argument("--student", help="student (.pt) trained on it")
    p.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu), or a torch device (default auto)")
    kept = "the rows as JSON; sections that are not run again stay in it (default bench.json)"
    p.add_argument("--out", default="bench.json", help=kept)
    args = p.parse_args(argv)
    runtime.check_outputs([args.data, args.student], [args.out])
    args.presets = ("fast", "paper") if args.preset == "both" else (args.preset,)
    args.device = runtime.pick_device(args.device)
    args.rates = operation_rates(args.device)
    machine = dict(device=str(args.device), threads=torch.get_num_threads(), torch=torch.__version__)
    machine |= dict(machine=platform.machine(), matrix_product_gflop_per_s=args.rates)
    print(json.dumps(machine), flush=True)
    results = json.loads(Path(args.out).read_text()) if Path(args.out).exists() else {}
    results["machine"] = machine
    for name in args.sections or [name for name in SECTIONS if name != "losses"]:
        rows = list(SECTIONS[name](args))
        if rows:
            results[name] = rows
            print(f"\n{name}\n\n{table(rows)}", flush=True)
            evaluate.write_json(results, args.out)


if __name__ == "__main__":
    runtime.command(main)
