"""examples/digits.py: its scenes, its two detectors, and that a training that was killed ends as one that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import import_problem

NEEDED = ("torchvision", "sklearn", "torchmetrics", "pycocotools", "matplotlib", "tqdm")
problems = [problem for problem in map(import_problem, NEEDED) if problem]
if problems:
    pytest.skip("; ".join(problems), allow_module_level=True)

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))  # where a script finds its neighbours

import detectors  # noqa: E402
import digits  # noqa: E402
import picture  # noqa: E402
import scenes  # noqa: E402
import training  # noqa: E402

TINY = ["--steps=6", "--batch=2", "--test-scenes=4", "--size=64", "--checkpoint-every=2", "--device=cpu"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the processes that the tests start: the order of sums is that of the threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_checkpoints_left(tmp_path: Path) -> Iterator[None]:
    """They have some hundred megabytes each, and pytest keeps its folders."""
    yield
    for path in tmp_path.rglob("checkpoint.pt*"):
        path.unlink()


def started(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def trained(folder: Path) -> dict[str, Any]:
    """The checkpoint there, without the seconds, which no two runs share."""
    checkpoint: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    for state in checkpoint["trainees"].values():
        del state["seconds"]
    return checkpoint


def assert_equal(actual: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name in expected:
            assert_equal(actual[name], expected[name])
    else:
        assert torch.equal(actual, expected) if isinstance(expected, Tensor) else actual == expected


# --- scenes


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [40, 128, 160])
def test_boxes_are_where_the_digits_are(split: scenes.Split, size: int) -> None:
    made = scenes.Scenes(split, size, seed=3)
    for index in range(20):
        image, target = made[index]
        boxes, labels = target["boxes"], target["labels"]
        assert image.shape == (3, size, size)
        assert 0 <= image.min() <= image.max() <= 1
        assert len(boxes) == len(labels) >= 1
        assert boxes.min() >= 0 <= boxes.max() <= size
        assert all(1 <= label <= 10 for label in labels)
        rng = scenes.np.random.default_rng((3, split == "test", index))
        written = (image != made.background(rng)).any(0)
        for x1, y1, x2, y2 in boxes.int().tolist():
            inside = written[y1:y2, x1:x2].clone()
            assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            written[y1:y2, x1:x2] = False
            wide = written[max(0, y1 - scenes.MARGIN) : y2 + scenes.MARGIN, max(0, x1 - scenes.MARGIN) : x2]
            assert not wide.any()
        assert not written.any()


def test_labels_are_the_digits() -> None:
    images, numbers = scenes.handwriting("test")
    made = scenes.Scenes("test")
    for index in range(5):
        drawn, target = made[index]
        rng = scenes.np.random.default_rng((0, True, index))
        paper = made.background(rng)
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            x1, y1, x2, y2 = box.int().tolist()
            ink = (drawn - paper)[:, y1:y2, x1:x2].abs().mean(0)
            # The digit whose shape is most like what was written: one of that label.
            shapes = [scenes.enlarged(image, 32)[None, None] for image in images]
            resized = torch.cat([nn.functional.interpolate(shape, ink.shape) for shape in shapes]).flatten(1)
            likeness = nn.functional.cosine_similarity(resized, ink.flatten()[None])
            assert numbers[likeness.argmax()] == label - 1


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    image, target = scenes.Scenes("train", seed=1)[7]
    again, same = scenes.Scenes("train", seed=1)[7]
    assert torch.equal(image, again)
    assert_equal(target, same)
    for other in (
        scenes.Scenes("train", seed=2)[7],
        scenes.Scenes("train", seed=1)[8],
        scenes.Scenes("test", seed=1)[7],
    ):
        assert not torch.equal(image, other[0])


def test_no_digit_and_no_part_of_a_photo_is_in_both_splits() -> None:
    from sklearn.datasets import load_digits, load_sample_images

    parts = [scenes.handwriting(split)[0] for split in ("train", "test")]
    assert torch.equal(torch.cat(parts) * 16, torch.from_numpy(load_digits().images).float())
    seen, tested = ({digit.numpy().tobytes() for digit in part} for part in parts)
    assert not seen & tested
    for photo, left, right in zip(
        load_sample_images().images, scenes.backgrounds("train"), scenes.backgrounds("test"), strict=True
    ):
        assert (scenes.np.concatenate([left, right], axis=1) == photo).all()


@pytest.mark.parametrize(
    ("split", "size", "named"), [("val", 128, "split"), ("train", 39, "size"), ("test", 161, "size")]
)
def test_bad_scenes_are_refused(split: Any, size: int, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} must be"):
        scenes.Scenes(split, size)


# --- detectors


def test_both_detectors_start_from_the_same_weights() -> None:
    ours, theirs = (build(seed=5, size=64).state_dict() for build in detectors.BUILDERS.values())
    rest = {name: value for name, value in ours.items() if not name.startswith("backbone.")}
    assert_equal(rest, {name: value for name, value in theirs.items() if not name.startswith("backbone.")})
    own = [value for name, value in ours.items() if name.startswith("backbone.")]
    others = {(value.dtype, value.shape, value.double().sum().item()) for value in theirs.values()}
    assert all((value.dtype, value.shape, value.double().sum().item()) in others for value in own)
    # torchvision smooths its top level too, by one convolution and its bias.
    assert len(theirs) - len(ours) == 2


# --- training


def test_a_killed_training_continues_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [str(ROOT / "examples" / "digits.py"), *TINY, f"--output={killed}"]
    process = started(*command)
    while not (killed / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert torch.load(killed / "checkpoint.pt", weights_only=True)["step"] < 6

    digits.main([*TINY, f"--output={killed}"])
    digits.main([*TINY, f"--output={whole}"])
    assert_equal(trained(killed), trained(whole))
    assert json.loads((killed / "report.json").read_text())["rows"][0]["detector"] == "fpn-roi"
    assert (killed / "fpn-roi-detections.png").stat().st_size > 1000


def test_the_peer_is_trained_beside_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits.main([*TINY, "--steps=2", "--peer=torchvision", f"--output={tmp_path}"])
    assert (tmp_path / "torchvision-detections.png").exists()
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["detector"] for row in report["rows"]] == ["fpn-roi", "torchvision"]
    assert all(0 <= row["mAP"] <= row["mAP@0.5"] <= 1 and row["seconds per step"] > 0 for row in report["rows"])
    assert report["ratio"] > 0
    assert "mAP@0.5" in capsys.readouterr().out
    losses = [state["losses"][0] for state in trained(tmp_path)["trainees"].values()]
    # The same weights and the same scenes; the pyramids upsample differently.
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("break_at", [0, 1000])
def test_a_checkpoint_that_breaks_off_leaves_the_last_one(
    break_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    training.save({"options": {}, "step": 1}, path)

    def break_off(checkpoint: dict[str, Any], file: Path) -> None:
        file.write_bytes(b"x" * break_at)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(KeyboardInterrupt):
        training.save({"options": {}, "step": 2}, path)
    monkeypatch.undo()
    assert training.load(path, {}) == {"options": {}, "step": 1}
    training.save({"options": {}, "step": 2}, path)
    assert training.load(path, {}) == {"options": {}, "step": 2}


def test_another_trainings_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    assert training.load(path, {"seed": 1}) is None
    training.save({"options": {"seed": 0, "batch": 8}, "step": 1}, path)
    with pytest.raises(ValueError, match=r"of a training with \{'seed': 0\}"):
        training.load(path, {"seed": 1, "batch": 8})


@pytest.mark.parametrize("steps", [1, 2, 10, 500])
def test_the_learning_rate_rises_and_falls(steps: int) -> None:
    rates = [training.warm_up_and_cosine(step, steps) for step in range(steps + 1)]
    top = rates.index(max(rates))
    assert rates[top] == 1
    assert rates[0] > 0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(0 if steps > 1 else 1)


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images: Any, targets: Any) -> dict[str, Tensor]:
            return {"loss": self.weight.sum() / 0}

    trainee = training.Trainee(Broken(), steps=10, learning_rate=1e-3, device=torch.device("cpu"))
    with pytest.raises(FloatingPointError, match="the loss is inf at step 0"):
        trainee.step([], [], seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "--steps must be at least 1; got 0"),
        (["--batch=8", "--test-scenes=20"], "--test-scenes must be a multiple of --batch, 8; got 20"),
        (["--sync-batchnorm", "--device=cpu"], "--sync-batchnorm needs GPUs"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        digits.parsed(arguments)
    assert message in capsys.readouterr().err


# --- evaluation, and several processes


class Oracle(nn.Module):
    """Detects the test scenes' own boxes in order; with a shift, half of them are off."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift, self.next = shift, 0

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        made = scenes.Scenes("test", 64)
        targets = [made[index][1] for index in range(self.next, self.next + len(images))]
        self.next += len(images)
        return [
            target | {"boxes": target["boxes"] + self.shift, "scores": torch.ones(len(target["labels"]))}
            for target in targets
        ]


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 1.0), (64.0, 0.0)])
def test_map_of_detections_that_are_known(shift: float, expected: float) -> None:
    options = digits.parsed([*TINY, "--test-scenes=20"])
    process = digits.Process(0, 1, torch.device("cpu"))
    results = digits.evaluate(Oracle(shift), options, process)
    assert results == {"mAP": pytest.approx(expected), "mAP@0.5": pytest.approx(expected)}


def test_torchrun_trains_and_evaluates_in_two_processes(tmp_path: Path) -> None:
    options = [*TINY, "--steps=2", f"--output={tmp_path}"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "examples/digits.py", *options]
    process = started(*command)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    together = json.loads((tmp_path / "report.json").read_text())
    assert together["processes"] == 2
    digits.main(options)  # nothing is left to train: one process evaluates the same weights
    alone = json.loads((tmp_path / "report.json").read_text())
    assert alone["processes"] == 1
    for name in ("mAP", "mAP@0.5"):
        assert together["rows"][0][name] == pytest.approx(alone["rows"][0][name], abs=1e-6)


def test_the_picture_shows_the_scenes(tmp_path: Path) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    made = scenes.Scenes("test")
    image, target = made[0]
    nothing = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64), "scores": torch.empty(0)}
    found = target | {"scores": torch.ones(len(target["labels"]))}
    wrong = found | {"labels": target["labels"] % 10 + 1}
    pictures = []
    for name, detection in (("found", found), ("missed", nothing), ("wrong", wrong)):
        picture.draw([image], [target], [detection], tmp_path / f"{name}.png")
        pictures.append(imread(tmp_path / f"{name}.png")[..., :3])
    colours = [to_rgb(colour) for colour in (picture.RIGHT, picture.MISSED, picture.WRONG)]
    shown = [[int((abs(drawn - colour) < 0.01).all(-1).sum()) > 50 for colour in colours] for drawn in pictures]
    assert shown == [[True, False, False], [False, True, False], [False, True, True]]
    assert all((drawn < 0.9).any(-1).mean() > 0.15 for drawn in pictures)  # one of the four places has a photo in it
