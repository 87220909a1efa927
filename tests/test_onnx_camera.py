import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import onnx
import openvino
import pytest
import torch
from conftest import CAMVID_WEIGHTS, NEEDS_BFLOAT16, ROOT
from PIL import Image
from test_images import png_of_16_bits
from test_listing import put_strays

from datasets.cityscapes import Cityscapes
from datasets.images import read_image
from datasets.transforms import normalizer
from utils.checkpoint import load_network
from utils.onnx import OnnxNetwork
from utils.visualize import write_video

CAMERA = "examples/onnx_camera.py"
URLS = ("rtsp://10.0.0.8:554/a", "https://example.org/live.m3u8", "http://10.0.0.8/shot.jpg")


@pytest.fixture
def camera(script):
    """Run the example in this process, but without torch."""

    def run(*argv):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "torch", None)
            return script(CAMERA, *argv, "--threads", 1)

    return run


@pytest.fixture
def refused(fails):
    """Run the example with something that ends it in one line; return the line."""
    return lambda *argv: fails(CAMERA, *argv)


@pytest.fixture
def scene(cityscapes) -> Image.Image:
    image = Image.open(Cityscapes(cityscapes, "val").pairs[0][0])
    return image.convert("RGB").resize((480, 360))


def labels_in(folder) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)) for path in (folder / "labels").iterdir()}


def test_it_runs_alone_without_torch(exported, scene, tmp_path):
    shutil.copy(ROOT / CAMERA, tmp_path)
    (tmp_path / "blocked").mkdir()
    for name in ("torch", "torchvision"):
        (tmp_path / f"blocked/{name}.py").write_text(f"raise ImportError('no {name} here')")
    scene.save(tmp_path / "a.png")
    result = subprocess.run(
        [sys.executable, "onnx_camera.py", "--model", exported / "labels.onnx", "--input", "a.png"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "blocked")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert labels_in(tmp_path / "results/a")["a"].shape == (360, 480)


def test_labels_are_those_of_predict(exported, camera, script, scene, tmp_path):
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    scene.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "in/turned.png", exif=exif)
    scene.resize((960, 720)).save(tmp_path / "in/large.png")
    scene.convert("CMYK").save(tmp_path / "in/cmyk.jpg")
    twelve = np.asarray(scene.convert("L")).astype(np.uint16) << 4
    Image.fromarray(twelve).save(tmp_path / "in/twelve.png")
    Image.fromarray((twelve / 4095).astype(np.float32)).save(tmp_path / "in/float.tif")
    put_strays(tmp_path / "in")
    argv = ("--checkpoint", CAMVID_WEIGHTS, "--input", "in", "--workers", 0, "--output", "torch")
    assert script("predict.py", *argv).status == 0
    expected = labels_in(tmp_path / "torch")
    for output in ("logits", "labels"):
        result = camera("--model", exported / f"{output}.onnx", "--input", "in", "--output", output)
        assert result.status == 0 and not result.err, result.err
        pattern = r"5 pictures by CPUExecutionProvider, [\d.]+ FPS with reading and writing\n"
        assert re.fullmatch(pattern, result.out)
        labels = labels_in(tmp_path / output)
        assert labels.keys() == expected.keys() == {"turned", "large", "cmyk", "twelve", "float"}
        for name, mine in labels.items():
            assert mine.shape == expected[name].shape
            # predict.py enlarges logits, which moves edges by a pixel.
            share = 0.97 if name == "large" else 0.999
            assert (mine == expected[name]).mean() >= share, name
        assert len(np.unique(labels["turned"])) > 2
        with Image.open(tmp_path / output / "overlays/turned.jpg") as overlay:
            assert overlay.size == (480, 360)


def test_pictures_are_read_as_predict_reads_them(tmp_path):
    """Of any depth; the example repeats the rule of `to_8_bits`."""
    read = runpy.run_path(str(ROOT / CAMERA))["upright_rgb"]
    noise = np.random.default_rng(0)
    for number, most in enumerate((255, 1000, 4095, 65_535, 1.0, 200.0, -3.0)):
        values = noise.random((6, 8)) * most
        Image.fromarray(values.astype(np.float32 if type(most) is float else np.uint16)).save(
            tmp_path / f"{number}.tif"
        )
    (tmp_path / "colour.png").write_bytes(png_of_16_bits(noise.integers(4096, size=(6, 8, 3))))
    for path in tmp_path.iterdir():
        expected = np.asarray(read_image(str(path)))
        assert expected.max() > 180 and (np.asarray(read(Image.open(path))) == expected).all()


@pytest.mark.parametrize(
    ("model", "runtime", "agreement"),
    [
        ("labels", "openvino", 0.999),
        ("logits", "openvino", 0.999),
        ("sized", "openvino", 0.999),
        pytest.param("labels", "openvino-bfloat16", 0.985, marks=NEEDS_BFLOAT16),
    ],
)
def test_openvino_gives_the_same_labels(
    exported, camera, scene, tmp_path, model, runtime, agreement
):
    scene.save(tmp_path / "a.png")
    argv = ("--model", exported / f"{model}.onnx", "--input", "a.png", "--output")
    assert camera(*argv, "onnx").status == 0
    result = camera(*argv, "openvino", "--runtime", runtime)
    assert result.status == 0 and not result.err, result.err
    assert result.out.startswith("1 pictures by OpenVINO in ")
    labels, expected = (labels_in(tmp_path / name)["a"] for name in ("openvino", "onnx"))
    assert (labels == expected).mean() >= agreement and len(np.unique(labels)) > 2


def test_a_runtime_that_is_missing_is_named(exported, refused, scene, monkeypatch, tmp_path):
    scene.save(tmp_path / "a.png")
    argv = ("--model", exported / "labels.onnx", "--input", "a.png", "--runtime")
    with monkeypatch.context() as patch:
        patch.setattr(openvino.Core, "get_property", lambda *_: ["FP32"])
        line = refused(*argv, "openvino-bfloat16")
        assert "this CPU has no bfloat16: give --runtime openvino" in line
    for package, runtime in (("openvino", "openvino-bfloat16"), ("onnxruntime", "onnxruntime")):
        monkeypatch.setitem(sys.modules, package, None)
        assert refused(*argv, runtime).endswith(f": pip install {package}")


def test_a_broken_picture_does_not_end_the_run(exported, camera, refused, scene, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_text("hello")
    argv = ("--model", exported / "labels.onnx", "--input", "in", "--output")
    assert "a.png cannot be read as a picture" in refused(*argv, "none")
    scene.save(tmp_path / "in/b.png")
    result = camera(*argv, "out")
    assert result.status == 1 and result.out.startswith("1 pictures")
    assert result.err.startswith("onnx_camera.py: error: --input in/a.png cannot be read")
    assert labels_in(tmp_path / "out").keys() == {"b"}


def test_the_model_states_all_that_is_needed(exported, camera, scene, tmp_path):
    """Label ids, colours and working height of another network."""
    model = onnx.load(exported / "labels.onnx")
    about = {entry.key: entry for entry in model.metadata_props}
    about["label_ids"].value = str([10 + number for number in range(11)])
    about["colors"].value = str([[0, 0, 0]] * 11)
    about["height"].value = "180"
    onnx.save(model, tmp_path / "other.onnx")
    scene.save(tmp_path / "a.png")
    assert camera("--model", "other.onnx", "--input", "a.png").status == 0
    labels = labels_in(tmp_path / "results/a")["a"]
    assert labels.shape == (360, 480) and 10 <= labels.min() and labels.max() <= 20
    assert (labels[::2, ::2] == labels[1::2, 1::2]).all()
    overlay = np.asarray(Image.open(tmp_path / "results/a/overlays/a.jpg")).astype(float)
    assert abs(overlay - np.asarray(scene) / 2)[:, 240:].mean() < 6  # names are on the left


def test_names_are_drawn_in_letters_that_the_font_has():
    plain = runpy.run_path(str(ROOT / CAMERA))["plain"]
    names = ["traffic light", "Straße", "Bäume", "señal", "дорога", "道路"]
    shown = ["traffic light", "Strasse", "Baume", "senal", "class 4", "class 5"]
    assert [plain(name, number) for number, name in enumerate(names)] == shown


def test_pictures_are_normalised_as_in_training(scene):
    stated = SimpleNamespace(
        height=360, mean=[0.5, 0.4, 0.3], std=[0.25, 0.2, 0.3], fixed=["height", "width"]
    )
    normalize = normalizer(stated.mean, stated.std, torch.device("cpu"))
    expected = normalize(torch.from_numpy(np.array(scene)).permute(2, 0, 1)[None]).numpy()
    prepare = partial(runpy.run_path(str(ROOT / CAMERA))["Network"].prepare, stated)
    assert np.allclose(prepare(scene), expected, atol=1e-5)
    assert prepare(scene.resize((4, 100))).shape == (1, 3, 360, 64)
    assert prepare(scene.resize((990, 2))).shape == (1, 3, 360, 8 * 360)


def test_a_video_becomes_a_video(exported, camera, refused, scene, tmp_path):
    pytest.importorskip("cv2")
    av = pytest.importorskip("av")
    pictures = (scene.resize((240, 180)).rotate(angle) for angle in range(4))
    write_video(tmp_path / "drive.mp4", 5, pictures)
    result = camera("--model", exported / "labels.onnx", "--input", "drive.mp4")
    assert result.status == 0 and not result.err, result.err
    assert result.out.startswith("4 pictures")
    with av.open(tmp_path / "results/drive/overlays.mp4") as container:
        assert container.streams.video[0].average_rate == 5
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 4 and frames[0].shape == (180, 240, 3)
    (tmp_path / "broken.mp4").write_text("no video")
    argv = ("--model", exported / "labels.onnx", "--output", "out")
    assert "broken.mp4 cannot be opened as a video" in refused(*argv, "--input", "broken.mp4")
    assert "camera:99 cannot be opened as a camera" in refused(*argv, "--input", "camera:99")
    assert not (tmp_path / "out").exists()


class Camera:
    """A camera of OpenCV that delivers a second of frames, 10 a second, then Ctrl-C."""

    def __init__(self, number):
        assert number == 0
        self.frames = 0

    def isOpened(self):
        return True

    def get(self, _property):
        return 10

    def read(self):
        self.frames += 1
        if self.frames == 6:
            raise KeyboardInterrupt
        time.sleep(0.2)
        return True, np.full((64, 96, 3), 90, np.uint8)


def test_a_camera_is_filmed_in_real_time_until_ctrl_c(exported, camera, monkeypatch, tmp_path):
    cv2, av = pytest.importorskip("cv2"), pytest.importorskip("av")
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    argv = ("--model", exported / "labels.onnx", "--input", "camera:0", "--output", "out")
    started = time.monotonic()
    result = camera(*argv)
    seconds = time.monotonic() - started
    assert result.status == 0 and result.out.startswith("5 pictures"), result
    with av.open(tmp_path / "out/overlays.mp4") as container:
        frames = sum(1 for _ in container.decode(video=0))
    assert 10 <= frames <= 10 * seconds + 1


def test_a_camera_needs_a_screen(exported, refused, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    line = refused("--model", exported / "labels.onnx", "--input", "camera:0")
    assert "no screen to show a camera on: give --output DIR" in line


@pytest.mark.parametrize(
    ("given", "source"),
    [("0", 0), ("camera:1", 1), ("/dev/video7", "/dev/video7"), *[(url, url) for url in URLS]],
)
def test_cameras_and_streams_go_to_opencv(exported, refused, monkeypatch, given, source):
    cv2 = pytest.importorskip("cv2")
    opened = []

    class Closed:
        def __init__(self, name):
            opened.append(name)

        def isOpened(self):
            return False

    monkeypatch.setattr(cv2, "VideoCapture", Closed)
    line = refused("--model", exported / "labels.onnx", "--input", given)
    assert f"{given} cannot be opened as a camera or stream" in line and opened == [source]


def test_a_model_of_one_size_gets_pictures_of_that_size(exported, camera, scene, tmp_path):
    (tmp_path / "in").mkdir()
    small = scene.resize((192, 96))
    small.save(tmp_path / "in/b.png")
    scene.resize((320, 240)).save(tmp_path / "in/a.png")
    model = exported / "sized.onnx"
    assert camera("--model", model, "--input", "in", "--output", "out").status == 0
    labels = labels_in(tmp_path / "out")
    normalize = load_network(CAMVID_WEIGHTS)[1].normalizer(torch.device("cpu"))
    images = normalize(torch.from_numpy(np.array(small)).permute(2, 0, 1)[None])
    assert (labels["b"] == OnnxNetwork(model)(images)[0].numpy()).mean() > 0.999
    assert labels["a"].shape == (240, 320)


def test_the_same_command_twice_writes_beside(exported, camera, scene, tmp_path):
    scene.save(tmp_path / "a.png")
    for _ in range(3):
        assert camera("--model", exported / "labels.onnx", "--input", "a.png").status == 0
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["a", "a-2", "a-3"]


def test_impossible_requests_are_refused(exported, refused, scene, monkeypatch, tmp_path):
    scene.save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "drive.mp4").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    silent = onnx.load(exported / "labels.onnx")
    del silent.metadata_props[:]
    onnx.save(silent, tmp_path / "silent.onnx")
    good = ("--model", exported / "labels.onnx", "--output", "out")
    assert "argument --threads" in refused(*good, "--input", "a.png", "--threads", "two")
    assert "none.onnx does not exist" in refused("--model", "none.onnx", "--input", "a.png")
    assert "text.png cannot be loaded" in refused("--model", "text.png", "--input", "a.png")
    line = refused("--model", "silent.onnx", "--input", "a.png")
    assert "silent.onnx does not state its class_names, colors" in line
    assert "nowhere.jpg does not exist" in refused(*good, "--input", "nowhere.jpg")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cv2", None)
        line = refused(*good, "--input", "drive.mp4")
    assert "drive.mp4 is read with OpenCV: pip install opencv-python" in line
    assert not (tmp_path / "out").exists()
    assert "text.png cannot be read as a picture" in refused(*good, "--input", "text.png")
    assert "out cannot be made (File exists)" in refused(*good, "--input", "a.png")
    argv = ("--model", exported / "labels.onnx", "--input", "empty", "--output", "other")
    assert "empty gave no picture" in refused(*argv)


def test_pictures_of_one_name_are_refused(exported, refused, scene, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a.jpg"):
        scene.save(tmp_path / "in" / name)
    line = refused("--model", exported / "labels.onnx", "--input", "in")
    assert "two pictures named a" in line
