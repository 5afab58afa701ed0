"""lib/stages.py: what was done is not done again, and what stands on something that was made anew is."""

import argparse

import pytest

from lib.stages import Stages

ARGS = argparse.Namespace(seed=0, device="cpu", precision="float32", effort=1.0)


class Kitchen:
    """Stages in a folder; each appends its name to `ran` and writes its output."""

    def __init__(self, folder, digest=0):
        self.stages, self.ran = Stages(folder, folder / "noisy.h5", ARGS, digest), []

    def make(self, out, *flags, model=None, fail=False):
        def action(argv):
            self.ran.append((out, "--resume" in argv))
            if fail:
                raise RuntimeError("killed")
            for name in (out, model or out):
                (self.stages.folder / name).write_text("done")

        self.stages.once(action, list(flags), out, out, model)


def recipe(kitchen, level, student=True):
    """measure -> noise.json -> train -> student.pt -> apply; and a figure that stands on nothing."""
    path = kitchen.stages.path
    kitchen.make("noise.json", "--level", level)
    if student:
        kitchen.make("student.h5", "--noise", path("noise.json"), model="student.pt")
        kitchen.make("applied.h5", "--model", path("student.pt"))
        kitchen.make("figure.png")


def test_only_what_is_not_done_is_done(tmp_path):
    everything = ["noise.json", "student.h5", "applied.h5", "figure.png"]
    for expected in (everything, []):
        kitchen = Kitchen(tmp_path)
        recipe(kitchen, "1")
        assert [name for name, _ in kitchen.ran] == expected
    (tmp_path / "student.pt").unlink()
    kitchen = Kitchen(tmp_path)
    recipe(kitchen, "1")
    assert [name for name, _ in kitchen.ran] == ["student.h5", "applied.h5"]
    kitchen = Kitchen(tmp_path, digest="other data")
    recipe(kitchen, "1")
    assert [name for name, _ in kitchen.ran] == everything


@pytest.mark.parametrize("restart", [True, False])
def test_what_stands_on_something_new_is_made_anew(tmp_path, restart):
    """Also if another run, in between, has changed what it stands on, with the same names: the flags are the same."""
    kitchen = Kitchen(tmp_path)
    recipe(kitchen, "1")
    recipe(kitchen, "2", student=False)
    kitchen = Kitchen(tmp_path) if restart else kitchen
    kitchen.ran.clear()
    recipe(kitchen, "2")
    assert kitchen.ran == [("student.h5", False), ("applied.h5", False)]


def test_interrupted_training_is_resumed_unless_its_input_has_changed(tmp_path):
    kitchen = Kitchen(tmp_path)
    with pytest.raises(RuntimeError):
        kitchen.make("student.h5", model="student.pt", fail=True)
    kitchen = Kitchen(tmp_path)
    kitchen.make("student.h5", model="student.pt")
    assert kitchen.ran == [("student.h5", True)]
    kitchen = Kitchen(tmp_path)
    kitchen.make("noise.json", "--level", "1")
    flags = ["--noise", kitchen.stages.path("noise.json")]
    with pytest.raises(RuntimeError):
        kitchen.make("other.h5", *flags, model="other.pt", fail=True)
    kitchen.make("noise.json", "--level", "2")
    kitchen.make("other.h5", *flags, model="other.pt")
    assert kitchen.ran[-1] == ("other.h5", False)
