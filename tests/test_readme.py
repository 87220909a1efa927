"""README.md and the other pages: their examples run, their links and options exist, and what they
say about the modules is true."""

import ast
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from datasets import DATASETS

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "weights/README.md"]
TINY = ("--height", 64, "--crop", 64, 64, "--epochs", 1, "--batch-size", 2, "--workers", 0)


def section(title: str) -> str:
    """Return a section of the README."""
    return (ROOT / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def write_image(path: Path, size: tuple[int, int], values: list[int] | None = None) -> None:
    """Write a picture of noise, or a label map of horizontal stripes of the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    if values is None:
        pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    else:
        stripes = np.resize(np.repeat(values, -(-height // len(values))), height)
        pixels = np.repeat(stripes.astype(np.uint8)[:, None], width, axis=1)
    Image.fromarray(pixels).save(path)


# The examples run


def test_own_data_without_code(script, tmp_path):
    text = section("Your own data")
    (tmp_path / "classes.txt").write_text(code_blocks(text, "")[0])
    for split, count in (("train", 3), ("val", 2)):
        for number in range(count):
            size = (90 + 7 * number, 70 + number)
            write_image(tmp_path / f"mydata/images/{split}/{number}.png", size)
            write_image(tmp_path / f"mydata/labels/{split}/{number}.png", size, [0, 1, 2, 3, 255])
    write_image(tmp_path / "pictures/a.png", (80, 70))
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    commands, check = code_blocks(text, "sh")
    train, score, predict = commands.replace("\\\n", "").splitlines()

    result = script(*train.split()[1:], *TINY)
    assert result.status == 0 and "it knows 2 of the 3 classes" in result.out
    result = script(*score.split()[1:], "--workers", 0)
    assert result.status == 0 and "class IoU in %" in result.out
    assert re.search(r"traffic light +[\d.]+", result.out)
    assert script(*predict.split()[1:], "--workers", 0).status == 0
    labels = np.asarray(Image.open(tmp_path / "results/pictures/labels/a.png"))
    assert set(np.unique(labels)) <= {0, 1, 2}
    assert script(*check.split()[1:]).status == 0


@pytest.fixture
def rooms(tmp_path, monkeypatch) -> Path:
    """Register the README's data set as the README says, and write a few images for it."""
    (code,) = code_blocks(section("Your own data"), "python")
    assert len(code.splitlines()) <= 30
    module = types.ModuleType("rooms")
    exec(compile(code, "rooms.py", "exec"), module.__dict__)
    monkeypatch.setitem(DATASETS, "rooms", module.Rooms)
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            write_image(tmp_path / f"rooms/{split}/{number}_rgb.png", (80, 64))
            write_image(tmp_path / f"rooms/{split}/{number}_ids.png", (80, 64), [1, 2, 5, 0])
    return tmp_path / "rooms"


def test_a_data_set_in_thirty_lines(script, fails, rooms, tmp_path):
    argv = ("--dataset", "rooms", "--datadir", rooms, "--preset", "camvid", *TINY, "--D", 4)
    assert script("main.py", *argv, "--savedir", "a").status == 0
    argv = ("--checkpoint", "save/a/best.pth", "--datadir", rooms, "--workers", 0)
    result = script("eval_cityscapes_server.py", *argv, "--save-results", "out")
    assert result.status == 0 and "class IoU in %" in result.out
    labels = np.asarray(Image.open(tmp_path / "out/0_rgb.png"))
    assert labels.shape == (64, 80) and set(np.unique(labels)) <= {1, 2, 5}


def test_an_unknown_label_is_named_before_training(fails, rooms):
    write_image(rooms / "val/1_ids.png", (80, 64), [1, 4])
    argv = ("--dataset", "rooms", "--datadir", rooms, "--preset", "camvid", *TINY, "--D", 4)
    line = fails("main.py", *argv, "--savedir", "b")
    assert "val/1_ids.png holds the label id 4" in line and "0 to 2, 5" in line


def run_python(title: str, monkeypatch, tmp_path, **values: object) -> dict:
    """Run a section's Python in tmp_path, where `lednet` is the repository; return its names."""
    (code,) = code_blocks(section(title), "python")
    for on_gpu, on_cpu in ((".cuda()", ""), ('"cuda"', '"cpu"'), ("float16", "bfloat16")):
        code = code.replace(on_gpu, on_cpu)
    (tmp_path / "lednet").symlink_to(ROOT)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), values)
    return values


def test_torch_hub(monkeypatch, tmp_path):
    names = run_python("Segment your own pictures", monkeypatch, tmp_path)
    assert type(names["network"]).__name__ == "LEDNet" and names["classes"].shape == (1, 256, 512)


def test_deployment(monkeypatch, tmp_path, trained):
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)  # it takes a minute
    (tmp_path / "save").mkdir()
    (tmp_path / "save/fine").symlink_to(trained)
    images = torch.randint(256, (2, 3, 64, 128), dtype=torch.uint8)
    names = run_python("Deployment", monkeypatch, tmp_path, images=images)
    assert names["labels"].shape == (2, 64, 128) and names["labels"].dtype == torch.uint8


# Links, commands and module names exist


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    local = [link for link in links if not re.match(r"https?:", link)]
    assert [link for link in local if not (page.parent / link).exists()] == []


COMMAND = re.compile(r"(?:python|torchrun\b[^`\n]*?) ([\w/]+\.py)\b([^`\n]*)")


def commands() -> dict[str, set[str]]:
    """Return the scripts that the pages run, each with all options they give it."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        for name, argv in COMMAND.findall(page.read_text().replace("\\\n", " ")):
            found.setdefault(name, set()).update(re.findall(r"(?<!\S)--[\w-]+", argv))
    return found


@pytest.mark.parametrize("name", sorted(commands()))
def test_commands_give_options_that_exist(script, name):
    used = commands()[name]
    lines = re.findall(r"^  (?:-\w, )?(--.*)", script(name, "--help").out, re.MULTILINE)
    assert used - {option for line in lines for option in re.findall(r"--[\w-]+", line)} == set()


def modules(*folders: str) -> list[Path]:
    """Return the Python files of these folders, as paths in the repository."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]
    return [path.relative_to(ROOT) for path in paths]


PROGRAMS = sorted(path for path in modules(".", "tools") if path.stem != "hubconf")


def test_an_option_has_the_same_names_in_all_programs(script):
    """Also those of the original code."""
    groups: dict[str, set[frozenset[str]]] = {}
    # The original code had no gpu_visit.py, whose --init needs no second name.
    for path in (path for path in PROGRAMS if path.stem != "gpu_visit"):
        for text in re.findall(r"^  (--.*)", script(str(path), "--help").out, re.MULTILINE):
            names = frozenset(re.findall(r"(?:^|, )(--[\w-]+)", text))
            for name in names:
                groups.setdefault(name, set()).add(names)
    assert groups["--workers"] == {frozenset({"--workers", "--num-workers"})}
    assert {name: found for name, found in groups.items() if len(found) > 1} == {}


def test_the_tests_of_all_promises_exist():
    text = (ROOT / "docs/promises.md").read_text()
    named = set(re.findall(r"`([\w/]+\.py)::(\w+)`", text))
    assert len(named) == len(set(re.findall(r"`[^`]*::[^`]*`", text))) > 0
    found = {
        (str(path.relative_to(ROOT / "tests")), node.name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert named - found == set()


def test_the_code_map_names_every_module():
    cells = re.findall(r"`([^`]+)`", section("Reading the code"))
    named = {Path(cell).name for cell in cells}
    folders = (".", "models", "datasets", "datasets/drawn", "utils", "tools", "examples")
    found = {path.name for path in modules(*folders) if (ROOT / path).stat().st_size > 0}
    assert found - named == set()
    assert {name for name in named if name.endswith(".py")} - found == set()


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{name.name}" for name in node.names}
    return names


SCRIPTS = [path.stem for path in modules(".")]
# As docs/architecture.md says.
FORBIDDEN = {
    "models": ["datasets", "utils", "tools", *SCRIPTS],
    "datasets": ["models", r"utils(?!\.errors\b|\.files\b|\.distributed\b)", "tools", *SCRIPTS],
    "datasets/drawn": ["models", r"utils(?!\.errors\b|\.files\b)", "tools", *SCRIPTS],
    "utils": ["tools", *SCRIPTS],
    ".": ["tools", *SCRIPTS],
    "examples": ["models", "datasets", "utils", "tools", "torch", *SCRIPTS],
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_parts_import_what_they_may(folder):
    pattern = re.compile(rf"(?:{'|'.join(FORBIDDEN[folder])})(?:\.|$)")
    found = {(str(path), name) for path in modules(folder) for name in imports(path)}
    assert {(path, name) for path, name in found if pattern.match(name)} == set()
