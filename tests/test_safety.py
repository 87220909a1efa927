"""Nothing runs that should not: no code that a file contains, and no server for strangers."""

import ast
import pickle
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import conftest
import pytest
import torch
from conftest import ROOT, tracked_files
from PIL import Image

from utils.checkpoint import CheckpointError, load_checkpoint

# The source

UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# These tests write pickles that contain code, and see them refused.
MAY_IMPORT = {"tests/test_checkpoint.py": {"pickle"}, "tests/test_safety.py": {"pickle"}}
UNSAFE_CALLS = {
    *("torch.jit.load", "torch.hub.load_state_dict_from_url", "pandas.read_pickle"),
    *("yaml.load", "yaml.unsafe_load", "numpy.lib.format.read_array"),
}
# Tests and tools may run text as code: they contain it themselves.
UNSAFE_OUTSIDE_TESTS = {
    *("eval", "exec", "os.system", "os.popen", "torch.hub.load", "runpy.run_path"),
    *("subprocess.getoutput", "subprocess.getstatusoutput"),
}
PIL_LIMITS = {"MAX_IMAGE_PIXELS", "LOAD_TRUNCATED_IMAGES", "MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY"}


def aliases(tree: ast.AST) -> dict[str, str]:
    """Return what each imported name of a file stands for, in full."""
    meant: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                root = name.name if name.asname else name.name.split(".")[0]
                meant[name.asname or root] = root
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                meant[name.asname or name.name] = f"{node.module}.{name.name}"
    return meant


def whole_name(node: ast.AST, meant: dict[str, str]) -> str:
    """Return the dotted name of a function that is called; "" if it has none."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([meant.get(node.id, node.id), *reversed(parts)])


def faults(code: str, file: str) -> Iterator[str]:
    """Yield what a Python file does that could run what others wrote."""
    tree = ast.parse(code)
    meant = aliases(tree)
    ours = file.startswith(("tests/", "tools/"))
    for node in ast.walk(tree):
        where = f"{file}:{getattr(node, 'lineno', 0)}"
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            root = module.split(".")[0]
            if root in UNSAFE_MODULES - MAY_IMPORT.get(file, set()):
                yield f"{where} imports {root}"
        if isinstance(node, ast.Call):
            name = whole_name(node.func, meant)
            options = {word.arg: word.value for word in node.keywords}
            values = {k: getattr(value, "value", ...) for k, value in options.items()}
            if name == "torch.load" and values.get("weights_only") is not True:
                yield f"{where} calls torch.load without weights_only=True"
            if name == "torch.load" and not options.keys().isdisjoint(("pickle_module", None)):
                yield f"{where} gives torch.load options that cannot be read here"
            if values.get("allow_pickle", False) is not False:
                yield f"{where} allows pickles"
            if values.get("shell", False) is not False:
                yield f"{where} runs a shell"
            if name in UNSAFE_CALLS | (set() if ours else UNSAFE_OUTSIDE_TESTS):
                yield f"{where} calls {name}"
        if not file.startswith("tests/"):
            stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stored and node.attr in PIL_LIMITS:
                yield f"{where} sets {node.attr}"
            if isinstance(node, ast.Constant) and node.value in PIL_LIMITS:
                yield f"{where} names {node.value}"
    if re.search(r"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD|add_safe_globals|safe_globals\(", code):
        yield f"{file} loosens weights_only"


def test_the_source_runs_no_code_from_files():
    paths = tracked_files(".py")
    assert len(paths) > 60 and ROOT / "utils/checkpoint.py" in paths
    found = [
        fault
        for path in paths
        for fault in faults(path.read_text(), path.relative_to(ROOT).as_posix())
    ]
    # This file names what is forbidden, and loads one pickle.
    assert [fault for fault in found if not fault.startswith("tests/test_safety.py")] == []


def test_an_environment_in_the_clone_is_not_checked(monkeypatch, tmp_path):
    """Installed packages may load pickles and lift limits."""
    for name in (".venv/lib/a.py", "venv/b.py", "tools/c.py", "d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(conftest, "ROOT", tmp_path)
    ours = [tmp_path / "d.py", tmp_path / "tools/c.py"]
    assert tracked_files(".py") == ours  # without git
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "tools", "d.py"], cwd=tmp_path, check=True)
    assert tracked_files(".py") == ours


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load('a')",
        "import torch as t\nt.load('a', weights_only=False)",
        "from torch import load as get\nget('a', weights_only=1 == 1)",
        "import torch\ntorch.load('a', weights_only=True, **more)",
        "import torch\ntorch.load('a', weights_only=True, pickle_module=dill)",
        "import torch\ntorch.serialization.add_safe_globals([open])",
        "import pickle",
        "from pickle import loads",
        "def f():\n    import joblib.numpy_pickle",
        "import numpy as np\nnp.load('a', allow_pickle=True)",
        "numpy.load('a', allow_pickle=flag)",
        "eval('1')",
        "exec(text)",
        "import os\nos.system('ls')",
        "from os import popen\npopen('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "from PIL import Image\nImage.MAX_IMAGE_PIXELS = None",
        "from PIL import ImageFile as f\nf.LOAD_TRUNCATED_IMAGES = True",
        "from PIL import PngImagePlugin\nPngImagePlugin.MAX_TEXT_CHUNK = 1 << 30",
        "setattr(Image, 'MAX_IMAGE_PIXELS', None)",
        "import torch\ntorch.jit.load('a')",
    ],
)
def test_forbidden_code_is_found(code):
    assert list(faults(code, "utils/new.py"))


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load('a', map_location='cpu', weights_only=True)",
        "network.eval()",
        "json.load(file)",
        "limit = Image.MAX_IMAGE_PIXELS",
        "import subprocess\nsubprocess.run(['ls'])",
    ],
)
def test_harmless_code_is_allowed(code):
    assert not list(faults(code, "utils/new.py"))


# Checkpoints


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def write_bomb(path: Path, trace: Path, form: str = "zip") -> None:
    """Write a checkpoint that contains code.

    Args:
        trace: file that the code writes.
        form: "zip" as torch writes files, "old" as it once did, or a plain "pickle".
    """
    content = {"model": {"weight": torch.zeros(1)}, "stage": 2, "epoch": 1, "best": Bomb(trace)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.fixture
def bomb(tmp_path) -> Iterator[Path]:
    """A checkpoint that contains code, which must not have run when the test ends."""
    write_bomb(tmp_path / "bomb.pth", tmp_path / "it ran")
    yield tmp_path / "bomb.pth"
    assert not (tmp_path / "it ran").exists()


def test_the_bomb_goes_off_if_it_is_unpickled(tmp_path):
    write_bomb(tmp_path / "bomb.pth", tmp_path / "it ran")
    torch.load(tmp_path / "bomb.pth", weights_only=False)
    assert (tmp_path / "it ran").exists()


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, form):
    write_bomb(tmp_path / "bomb.pth", tmp_path / "it ran", form)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_checkpoint(tmp_path / "bomb.pth")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "command",
    [
        "main.py --datadir {cityscapes} --savedir a --workers 0 --decoder --init {bomb}",
        "main.py --datadir {cityscapes} --savedir a --workers 0 --pretrained-encoder {bomb}",
        "lednet_imagenet.py --datadir {shapes} --workers 0 --evaluate {bomb}",
        "eval_cityscapes_server.py --datadir {cityscapes} --checkpoint {bomb}",
        "eval_cityscapes_server.py --checkpoint {bomb}",
        "predict.py --input a.png --checkpoint {bomb}",
        "export.py --output a.onnx --checkpoint {bomb}",
        "tools/ship_weights.py --output b.pth --checkpoint {bomb}",
        "tools/quantize.py --datadir {cityscapes} --output b.onnx --checkpoint {bomb}",
    ],
)
def test_every_script_refuses_code_in_a_checkpoint(
    fails, bomb, cityscapes, shapes, tmp_path, command
):
    Image.new("RGB", (80, 64)).save(tmp_path / "a.png")
    places = {"bomb": bomb, "cityscapes": cityscapes, "shapes": shapes}
    line = fails(*(word.format(**places) for word in command.split()))
    assert str(bomb) in line and "is not a checkpoint" in line


@pytest.mark.parametrize("program", ["main.py", "lednet_imagenet.py"])
def test_code_in_the_checkpoint_of_a_run_is_refused(request, fails, bomb, tmp_path, program):
    run = request.getfixturevalue("trained" if program == "main.py" else "pretrained")
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    for path in folder.glob("*.pth"):
        shutil.copy(bomb, path)
    assert "is not a checkpoint" in fails(program, "--savedir", folder, "--resume")


def test_code_in_the_weights_of_torch_hub_is_refused(bomb, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "models", repository / "models")
    (repository / "weights").mkdir()
    shutil.copy(ROOT / "hubconf.py", repository)
    shutil.copy(bomb, repository / "weights/lednet_d20_cityscapes.pth")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.hub.load(str(repository), "lednet", source="local", pretrained=True)


# TensorBoard

COMMAND = re.compile(r"(?<![\w.])(?:%|python3? -m )?tensorboard(?:\.main)?\s+(-[^`\n]*)")


def commands(text: str) -> list[str]:
    """Return the options in all command lines that start tensorboard."""
    return COMMAND.findall(text.replace("\\\n", " "))


def test_tensorboard_listens_to_this_machine_only():
    """Its port would show a run to everyone in the network."""
    found = {
        path.relative_to(ROOT).as_posix(): options
        for path in tracked_files(".py", ".md", ".sh", ".toml", ".yml", ".yaml", ".txt")
        for options in commands(path.read_text())
        if path.name != "test_safety.py"
    }
    assert {"README.md", "main.py", "lednet_imagenet.py"} <= found.keys()
    assert {file for file, options in found.items() if not local(options)} == set()


def local(options: str) -> bool:
    return "--host localhost" in options and "bind_all" not in options


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("`tensorboard --logdir save/fine --host localhost`", True),
        ("run `tensorboard --logdir save/fine`", False),
        ("  tensorboard \\\n      --logdir save --bind_all", False),
        ("python -m tensorboard.main --logdir save --host 0.0.0.0", False),
        ("print(f'tensorboard --logdir {folder}')", False),
    ],
)
def test_commands_that_start_tensorboard_are_found(text, good):
    (options,) = commands(text)
    assert local(options) == good
