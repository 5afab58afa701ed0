"""Stages run one after the other, each with its output in one folder: what was done is not done again."""

import json
import shlex
import time

import h5py

from lib import runtime, training


class Stages:
    """Runs stages one after the other on one dataset, each with its output in `folder`; prints their commands.

    A stage is skipped if its output stands, made with the same arguments from the same data, and none of the files of
    the folder that it reads has been made anew since. An interrupted training is resumed. The record of what was done
    is folder/stages.json.

    Args: folder: Path, made if it is not there. dataset: path of the noisy images. args: seed, device, precision,
    effort. digest: says which data it is, anything that JSON can hold.
    """

    sampling = ()  # flags for srds.py
    judged = "denoised.h5"  # the prediction of self.data that `report` is about

    def __init__(self, folder, dataset, args, digest=None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.data, self.args = folder, ["--data", str(dataset)], args
        self.record = folder / "stages.json"
        self.done = json.loads(self.record.read_text()) if self.record.exists() else {}
        if self.done.get("data") != digest or not all("run" in done for _, done in self.outputs()):
            self.done = {"data": digest}
        self.common = ["--seed", args.seed, "--device", args.device, "--precision", args.precision]

    def path(self, name):
        return str(self.folder / name)

    def run(self, module, *flags, out=None, model=None):
        """module.main with these flags and --out or --model (names in the folder). Returns the name of the output."""
        argv = list(map(str, flags))
        argv += ["--model", self.path(model)] if model else []
        argv += ["--out", self.path(out)] if out else []
        script = f"-m {module.__name__}" if "." in module.__name__ else f"{module.__name__}.py"
        return self.once(module.main, argv, out or model, f"python {script} {shlex.join(argv)}", model)

    def train(self, module, *flags, out=None, model):
        """`run` of a training stage on the dataset, with as many steps as --effort asks for."""
        return self.run(module, *self.data, *flags, *self.training_flags(module), out=out, model=model)

    def once(self, action, argv, out, command, model=None):
        """Calls action(argv) unless that was done before; `model` is a checkpoint whose training can be resumed."""
        began, processor = time.monotonic(), time.process_time()
        known, read = self.done.get(out, {}), self.read_by(argv, out)
        same = known.get("argv") == argv and known.get("read") == read
        if same and known["seconds"] is not None and all((self.folder / name).exists() for name in (out, model or out)):
            return out
        if model and not same:  # a model of other flags or inputs must not be resumed
            for path in (self.folder / model, training.partial_path(self.folder / model)):
                path.unlink(missing_ok=True)
        print(f"\n$ {command}", flush=True)
        begun = dict(argv=argv, model=model, read=read, run=1 + max((d["run"] for _, d in self.outputs()), default=0))
        self.note(out, begun | dict(seconds=None))  # with these flags, of these files: only then may it be resumed
        action([*argv, "--resume"] if model and same else argv)
        spent = dict(seconds=time.monotonic() - began, processor_seconds=time.process_time() - processor)
        self.note(out, begun | {k: round(v, 1) for k, v in spent.items()})
        return out

    def outputs(self):
        """[(name, what is noted of it)] of all outputs of the folder."""
        return [(name, done) for name, done in self.done.items() if name != "data"]

    def read_by(self, argv, out):
        """{name: number of the run that made it}: outputs of other stages that the arguments of stage `out` name."""
        named = {str(flag) for flag in argv}
        found = {n: d["run"] for n, d in self.outputs() if {self.path(n), self.path(d["model"] or n)} & named}
        return {name: run for name, run in found.items() if name != out}

    def note(self, out, done):
        self.done[out] = done
        with runtime.atomic_write(self.record) as temporary:
            temporary.write_text(json.dumps(self.done, indent=1) + "\n")

    def training_flags(self, module):
        steps = max(1, round(self.args.effort * module.PRESETS["fast"]["steps"]))
        flags = ["--steps", steps, "--crop", self.crop(module), *self.common]
        context = getattr(self.args, "context", "auto")
        return flags if context == "auto" else [*flags, "--context", context]

    def crop(self, module):
        """The side of the crops that a stage trains on, pixels."""
        return min(module.PRESETS["fast"]["crop"], self.smallest_side())

    def smallest_side(self):
        """The shortest side of an image, pixels: no crop can be larger."""
        with h5py.File(self.data[1]) as file:
            return min(min(group["noisy"].shape[1:]) for group in file["volumes"].values())
