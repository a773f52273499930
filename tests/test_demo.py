"""`python -m fpn` from end to end: what it writes, what it prints, how it fails."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fpn
from fpn.command import options, photos
from fpn.command.main import main
from fpn.demo import draw
from fpn.demo import run as demo
from fpn.demo.photo import DEFAULT_PHOTO, Photo, read_photo, to_tensor
from roi import roi_pool

REPOSITORY = Path(__file__).parent.parent
BOXES = ("4,6,150,110", "0,0,160,120", "50.5,40,70,62.25")


def start(*arguments: object, path: Sequence[Path] = ()) -> subprocess.Popen[str]:
    """The command in a process of its own, with folders put before those that Python imports from."""
    folders = [*path, REPOSITORY, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "fpn", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, encoding="utf-8", env=environment)


def assert_one_line_error(stderr: str, *expected: str) -> None:
    assert stderr.startswith("python -m fpn: error: ")
    assert stderr.count("\n") == 1
    for words in expected:
        assert words in stderr


@pytest.fixture(scope="module")
def small_photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160×120 pixels; the model gets it at twice the size."""
    path = tmp_path_factory.mktemp("photo") / "small.png"
    with Image.open(DEFAULT_PHOTO) as image:
        image.resize((160, 120)).save(path)
    return path


@pytest.fixture(scope="module")
def finished(small_photo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of one run in a process of its own."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    process = start(
        small_photo, "--model", "FPN18", "--boxes", BOXES[0], BOXES[1], "--boxes", BOXES[2], "--out", folder
    )
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "")
    return folder, stdout


def test_files(finished: tuple[Path, str]) -> None:
    folder, stdout = finished
    assert sorted(os.listdir(folder)) == ["features.npz", "pyramid.png"]
    with Image.open(folder / "pyramid.png") as picture:
        assert f"({picture.width} × {picture.height} pixels)" in stdout
        assert min(picture.size) > 800
        assert np.asarray(picture.convert("L")).std() > 20
    umask = os.umask(0)
    os.umask(umask)
    assert (folder / "features.npz").stat().st_mode & 0o777 == 0o666 & ~umask


def test_features(finished: tuple[Path, str], small_photo: Path) -> None:
    with np.load(finished[0] / "features.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    assert set(arrays) == {"p2", "p3", "p4", "p5", "boxes", "model_boxes", "levels", "rois"}
    assert [tuple(arrays[f"p{k}"].shape) for k in range(2, 6)] == [
        (1, 256, 60, 80), (1, 256, 30, 40), (1, 256, 15, 20), (1, 256, 8, 10),
    ]  # fmt: skip
    boxes = torch.tensor([[4, 6, 150, 110], [0, 0, 160, 120], [50.5, 40, 70, 62.25]])
    torch.testing.assert_close(arrays["boxes"], boxes)
    torch.testing.assert_close(arrays["model_boxes"], 2 * boxes)
    assert arrays["levels"].tolist() == [4, 4, 2]
    assert arrays["rois"].shape == (3, 256, 7, 7)
    for box, k, pooled in zip(arrays["model_boxes"], arrays["levels"].tolist(), arrays["rois"], strict=True):
        torch.testing.assert_close(pooled, roi_pool(arrays[f"p{k}"], [box[None]], 7, 1 / 2**k)[0], rtol=0, atol=0)

    # The pyramid is that of the model of seed 0 with the photo's own batch norm statistics, as printed.
    model, _ = options.load_model("FPN18", None)
    result = demo.run_model(model, read_photo(small_photo), [(0, 0, 9, 9)], calibrate=True)
    torch.testing.assert_close(arrays["p2"], result.pyramid[0], rtol=1e-3, atol=1e-3)


def test_output(finished: tuple[Path, str]) -> None:
    stdout = finished[1]
    assert "small.png, 160 × 120 pixels, resized to 320 × 240" in stdout
    assert "FPN18 on cpu; random weights (seed 0), batch norm statistics of this photo" in stdout
    rows = {line.split("  ")[0]: line.split()[-1] for line in stdout.splitlines() if line}
    names = ["C2 to C5", "P2", "P3", "P4", "P5", "merging"]
    assert all(float(rows[name]) >= 0 for name in names)
    assert sum(float(rows[name]) for name in names) == pytest.approx(float(rows["total"]), abs=0.5)
    assert re.search(r"P3 +8 +256 × 30 × 40 +\d", stdout)
    assert re.search(r"3 +50.5,40,70,62.25 +39 × 44 +P2\n", stdout)


def test_default_photo(tmp_path: Path, run_demo: Callable[..., tuple[int, str, str]]) -> None:
    status, stdout, stderr = run_demo("--model", "FPN18", "--out", tmp_path)
    assert (status, stderr) == (0, "")
    assert "astronaut.jpg, 512 × 512 pixels, resized to 800 × 800" in stdout
    with np.load(tmp_path / "features.npz") as arrays:
        assert arrays["levels"].tolist() == [5, 4, 4, 4, 3, 2]  # every level has its box


@pytest.fixture
def run_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: arguments -> exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["folder/__main__.py", *map(str, arguments)])
        status = main()
        return status, *capsys.readouterr()

    return run


BAD_USES = {
    "missing.jpg": "missing.jpg: No such file",
    "{text}": "is not an image",
    "{truncated}": "truncated.png",
    "{photo} --boxes 1,2,3": "'1,2,3' is not a box x1,y1,x2,y2",
    "{photo} --boxes a,b,c,d": "'a,b,c,d' is not a box",
    "{photo} --boxes ''": "'' is not a box",
    "{photo} --boxes": "--boxes",
    "--boxes 1,2,3,4 {photo}": "is not a box x1,y1,x2,y2",
    "{photo} --boxes 0,0,nan,9": "'0,0,nan,9' is not a box",
    "{photo} --boxes 9,9,3,20": "x1 < x2",
    "{photo} --boxes 9,9,9,20": "x1 < x2",
    "{photo} --boxes -1,0,9,9": "box -1,0,9,9 reaches off the photo, which is 160 × 120 pixels",
    "{photo} --boxes 0,0,160.5,9": "160 × 120 pixels",
    "{photo} --boxes 0,0,9,9 0,0,9,121": "box 0,0,9,121",
    "{photo} --model FPN19": "FPN19",
    "{photo} --boxen": "--boxen",
    "{photo} --weights IMAGENET1K_V9": "IMAGENET1K_V9",
    "{photo} --weights missing.pth": "missing.pth",
    "{photo} --weights {text}": "text.jpg",
    "''": "PHOTO must be the path of an image file; it is empty",
    "{photo} --weights ''": "--weights: the path is empty",
    "{photo} --device gpu": "device 'gpu' is unknown; there are cpu, cuda, cuda:1, mps",
    "{photo} --device gpu9": "device 'gpu9' is unknown",
    "{photo} --device cuda:63": "device 'cuda:63' cannot be used",
    "{photo} --device meta": "device 'meta' cannot be used",
    "{photo} --out {text}": "cannot write to",
    "{photo} --out {text}/folder": "cannot write to",
    "{photo} --out {occupied}": "pyramid.png: it is a folder",
}


@pytest.fixture
def places(tmp_path: Path, small_photo: Path) -> dict[str, Path]:
    """The files of `BAD_USES`."""
    places = {name: tmp_path / name for name in ("text.jpg", "truncated.png", "occupied")}
    places["text.jpg"].write_bytes(b"not a photo")
    places["truncated.png"].write_bytes(small_photo.read_bytes()[:2000])
    (places["occupied"] / "pyramid.png").mkdir(parents=True)
    return {"photo": small_photo} | {name.partition(".")[0]: path for name, path in places.items()}


@pytest.mark.parametrize("use", BAD_USES)
def test_bad_use_is_a_one_line_error(
    use: str, tmp_path: Path, places: dict[str, Path], run_demo: Callable[..., tuple[int, str, str]]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    status, _, stderr = run_demo("--model", "FPN18", "--out", tmp_path / "out", *shlex.split(use.format(**places)))
    assert status == 2
    assert_one_line_error(stderr, BAD_USES[use])
    assert sorted(tmp_path.rglob("*")) == before


def test_features_writes_the_demos_arrays_and_no_picture(
    finished: tuple[Path, str], small_photo: Path, tmp_path: Path, run_demo: Callable[..., tuple[int, str, str]]
) -> None:
    status, stdout, stderr = run_demo(
        "features", small_photo, "--model", "FPN18", "--boxes", *BOXES, "--out", tmp_path / "out"
    )
    assert (status, stderr) == (0, "")
    assert os.listdir(tmp_path / "out") == ["features.npz"]
    size = (tmp_path / "out" / "features.npz").stat().st_size
    assert stdout.endswith(f"wrote {tmp_path}/out/features.npz ({size / 1e6:.0f} MB)\n")
    with np.load(tmp_path / "out" / "features.npz") as ours, np.load(finished[0] / "features.npz") as demos:
        assert set(ours.files) == set(demos.files)
        for name in ours.files:
            np.testing.assert_allclose(ours[name], demos[name], rtol=1e-3, atol=1e-3)


def test_version() -> None:
    process = start("--version")
    stdout, _ = process.communicate()
    assert (process.returncode, stdout) == (0, f"fpn-roi {fpn.__version__}\n")


def test_the_console_scripts_errors_bear_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fpn", "missing.jpg"])
    assert main() == 2
    assert capsys.readouterr().err.startswith("fpn: error: cannot read missing.jpg: ")


def test_exit_status_of_errors(tmp_path: Path, places: dict[str, Path]) -> None:
    uses = ["missing.jpg", "{photo} --boxes 9,9,3,20"]
    processes = [start("--out", tmp_path / "out", *use.format(**places).split()) for use in uses]
    for use, process in zip(uses, processes, strict=True):
        _, stderr = process.communicate()
        assert process.returncode == 2, use
        assert_one_line_error(stderr, BAD_USES[use])


def test_help_needs_no_libraries(tmp_path: Path) -> None:
    for library in ("PIL", "matplotlib"):
        (tmp_path / f"{library}.py").write_text(f"raise ModuleNotFoundError('No module named {library}')\n")
    helps = [start("--help", path=[tmp_path]), start("demo", "--help", path=[tmp_path])]
    run = start("--out", tmp_path / "out", path=[tmp_path])
    whole, demos = (help_.communicate()[0] for help_ in helps)
    assert [help_.returncode for help_ in helps] == [0, 0]
    assert "examples:\n  python -m fpn\n" in whole
    assert all(name in whole for name in ("demo", "features", "export", "--version"))
    assert all(option in demos for option in ("PHOTO", "--model", "--weights", "--boxes", "--out", "--device"))
    assert "example:\n  python -m fpn demo street.jpg" in demos
    _, stderr = run.communicate()
    assert run.returncode == 2
    assert_one_line_error(stderr, "pip install 'fpn-roi[demo]'")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="SIGINT as a terminal sends it")
def test_interrupt(tmp_path: Path) -> None:
    # A shell's background job is started with interrupts ignored, and so are the programs that it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start("--model", "FPN152", "--out", tmp_path / "out")
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("photo ")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert_one_line_error(stderr, "interrupted")
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.skipif(os.name != "posix", reason="a pipe whose reader has gone")
def test_closed_pipe(tmp_path: Path, small_photo: Path) -> None:
    process = start(small_photo, "--model", "FPN18", "--out", tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_disk_full(
    tmp_path: Path, small_photo: Path, monkeypatch: pytest.MonkeyPatch, run_demo: Callable[..., tuple[int, str, str]]
) -> None:
    for name in ("pyramid.png", "features.npz"):
        (tmp_path / name).write_text("of the run before")

    def fail(drawing: draw.Drawing, path: Path) -> NoReturn:
        path.write_bytes(b"half a picture")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(draw, "save_picture", fail)
    status, _, stderr = run_demo(small_photo, "--model", "FPN18", "--out", tmp_path)
    assert status == 2
    assert_one_line_error(stderr, str(tmp_path), os.strerror(errno.ENOSPC))
    assert sorted(os.listdir(tmp_path)) == ["features.npz", "pyramid.png"]
    assert all(path.read_text() == "of the run before" for path in tmp_path.iterdir())


def test_exif_rotated_photo_gives_the_same(tmp_path: Path) -> None:
    with Image.open(DEFAULT_PHOTO) as image:
        upright = image.resize((90, 120))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    rois = []
    for name in ("upright.png", "turned.png"):
        model, _ = options.load_model("FPN18", None)
        result = demo.run_model(model, read_photo(tmp_path / name), [(10, 20, 80, 119)], calibrate=True)
        assert result.pyramid[0].shape == (1, 256, 60, 45)
        rois.append(result.rois)
    torch.testing.assert_close(rois[0], rois[1])


@pytest.mark.parametrize(("size", "mode"), [((1, 1), "L"), ((12, 700), "RGBA")], ids=["tiny", "tall"])
def test_odd_photos(
    tmp_path: Path, size: tuple[int, int], mode: str, run_demo: Callable[..., tuple[int, str, str]]
) -> None:
    Image.new(mode, size, "white").save(tmp_path / "photo.png")
    status, _, stderr = run_demo(tmp_path / "photo.png", "--model", "FPN18", "--out", tmp_path)
    assert (status, stderr) == (0, "")
    with np.load(tmp_path / "features.npz") as arrays:
        assert all(np.isfinite(arrays[name]).all() for name in arrays.files)
        assert arrays["rois"].shape == (4, 256, 7, 7)


def levels_of(boxes: Sequence[Sequence[float]]) -> list[int]:
    """The k of the level Pk that each box is pooled from."""
    pooler = demo.make_pooler(fpn.FPN18())
    assert pooler.map_levels is not None
    return [int(pooler.featmap_names[index]) for index in pooler.map_levels([torch.tensor(boxes)])]


@pytest.mark.parametrize("size", [(800, 800), (1200, 800), (800, 1200), (1333, 750)])
def test_default_boxes_have_a_level_each(size: tuple[int, int]) -> None:
    boxes = photos.nested_boxes(size)
    photos.check_boxes(boxes, size)
    assert levels_of(boxes) == [5, 4, 3, 2]


@pytest.mark.parametrize(
    ("width", "height", "k"),
    [(224, 224, 4), (223, 224, 3), (447, 448, 4), (448, 448, 5), (112, 448, 4), (112, 112, 3), (56, 56, 2),
     (1, 1, 2), (1e-9, 1e-9, 2), (5000, 5000, 5)],
)  # fmt: skip
def test_level_of_a_box(width: float, height: float, k: int) -> None:
    assert levels_of([(10, 20, 10 + width, 20 + height)]) == [k]


def test_weights_are_named_for_what_they_are(tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = fpn.FPN18()
    trunk, whole = tmp_path / "trunk.pth", tmp_path / "whole.pth"
    torch.save(other.bottom_up.state_dict(), trunk)
    torch.save(other.state_dict(), whole)
    model, phrase = options.load_model("FPN18", str(trunk))
    assert phrase == f"weights {trunk} for the trunk; lateral and smoothing convolutions random (seed 0)"
    torch.testing.assert_close(model.bottom_up.state_dict(), other.bottom_up.state_dict())
    model, phrase = options.load_model("FPN18", str(whole))
    assert phrase == f"weights {whole}"
    torch.testing.assert_close(model.state_dict(), other.state_dict())
    assert not model.training


def test_a_checkpoint_says_what_it_is(
    tmp_path: Path, small_photo: Path, run_demo: Callable[..., tuple[int, str, str]]
) -> None:
    """A detector's checkpoint with the levels P3 to P7, whatever --model says."""
    torch.manual_seed(1)
    source = fpn.FPN18(trunk={"returned_layers": (2, 3, 4)}, extra="p6p7", upsample="nearest", smooth_top=True)
    state = fpn.export_state_dict(source, "torchvision") | {"head.weight": torch.zeros(1)}
    path = tmp_path / "retina.pth"
    torch.save(state, path)
    status, stdout, stderr = run_demo(small_photo, "--weights", path, "--out", tmp_path, "--model", "FPN101")
    assert (status, stderr) == (0, "")
    assert f"model  FPN on cpu; weights {path}\n" in stdout
    assert "from torchvision, under 'backbone.'" in stdout
    assert re.search(r"P7 +128 +256 × 2 × 3\nextra +\d", stdout)
    with np.load(tmp_path / "features.npz") as arrays:
        assert [name for name in arrays.files if name.startswith("p")] == ["p3", "p4", "p5", "p6", "p7"]
        assert set(arrays["levels"].tolist()) <= {3, 4, 5}
        images = to_tensor(read_photo(small_photo).image)
        with torch.no_grad():
            for level, expected in zip("34567", source.eval()(images), strict=True):
                torch.testing.assert_close(torch.from_numpy(arrays[f"p{level}"]), expected, rtol=1e-3, atol=1e-3)


def test_stride_in_1x1_is_the_checkpoints(tmp_path: Path, run_demo: Callable[..., tuple[int, str, str]]) -> None:
    path = tmp_path / "fpn50.pth"
    torch.save(fpn.FPN50().state_dict(), path)
    model, _ = options.load_model("FPN50", str(path), stride_in_1x1=True)
    assert model.bottom_up.layer2[0].conv1.stride == (2, 2)
    status, _, stderr = run_demo("--stride-in-1x1", "--out", tmp_path / "out")
    assert status == 2
    assert_one_line_error(stderr, "--stride-in-1x1 is for a checkpoint")


def test_timed_forward() -> None:
    model, _ = options.load_model("FPN18", None)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        pyramid, times = demo.timed_forward(model, images)
        torch.testing.assert_close(pyramid, model(images))
    assert len(times.levels) == 4
    assert min(times.bottom_up, times.merging, *times.levels) > 0
    assert times.bottom_up + sum(times.levels) + times.extra + times.merging == pytest.approx(times.total)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_slow_parts_are_timed_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = options.load_model("FPN18", None)
    forward = model.smooth[2].forward  # of P3: the modules are in top-down order

    def slow(x: torch.Tensor) -> Any:
        time.sleep(0.5)
        return forward(x)

    monkeypatch.setattr(model.smooth[2], "forward", slow)
    with torch.no_grad():
        _, times = demo.timed_forward(model, torch.randn(1, 3, 32, 32))
    assert [ms >= 500 for ms in times.levels] == [False, True, False, False]
    assert times.total >= 500 > times.merging


def test_calibrated_batch_norm_normalises() -> None:
    model, _ = options.load_model("FPN18", None)
    images = 5 + 3 * torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    outputs: list[torch.Tensor] = []
    with torch.no_grad():
        demo.calibrate_batch_norm(model, images)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda norm, inputs, output: outputs.append(output.clone()))
        model(images)
    assert len(outputs) == 20  # ResNet-18's
    for output in outputs:
        variance, mean = torch.var_mean(output, dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4)
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-2)


def test_boxes_scale_with_the_photo(small_photo: Path) -> None:
    photo = read_photo(small_photo)
    narrow = Photo(photo.name, (160, 120), photo.image.resize((400, 240)))
    model, _ = options.load_model("FPN18", None)
    result = demo.run_model(model, narrow, [(10, 20, 30, 40)], calibrate=False)
    assert result.model_boxes.tolist() == [[25, 40, 75, 80]]
