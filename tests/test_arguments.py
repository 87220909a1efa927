import argparse

import pytest

from utils.arguments import (
    ArgumentParser,
    finite_float,
    natural_float,
    natural_int,
    new_file,
    positive_float,
    positive_int,
    probability,
    seed_int,
)
from utils.errors import UserError


@pytest.mark.parametrize(
    ("convert", "good", "bad"),
    [
        (positive_int, {"3": 3}, ("0", "-4", "1.5", "many", "")),
        (natural_int, {"0": 0, "3": 3}, ("-1", "1.5")),
        (seed_int, {"0": 0, str(2**63 - 1): 2**63 - 1}, ("-1", str(2**63))),
        (positive_float, {"1e-3": 1e-3}, ("0", "-1", "nan", "inf", "fast")),
        (natural_float, {"0": 0, "0.5": 0.5}, ("-1", "nan", "inf")),
        (probability, {"0": 0, "1": 1}, ("-0.1", "1.1", "nan")),
        (finite_float, {"-2.5": -2.5}, ("nan", "-inf", "x")),
    ],
)
def test_numbers(convert, good, bad):
    assert {text: convert(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not a"):
            convert(text)


def test_a_mistake_is_one_line(capsys):
    parser = ArgumentParser("description")
    parser.add_argument("--height", type=positive_int)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--height", "-5"])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--height: -5 is not a positive whole number" in err


@pytest.mark.parametrize("option", ["--local-rank=0", "--local_rank=1", "--local_rank"])
def test_the_option_of_the_old_launcher_names_torchrun(capsys, option):
    with pytest.raises(SystemExit):
        ArgumentParser().parse_args([option])
    assert "start with torchrun --nproc-per-node" in capsys.readouterr().err


def test_options_are_not_abbreviated():
    parser = ArgumentParser()
    parser.add_argument("--height")
    with pytest.raises(SystemExit):
        parser.parse_args(["--hei", "5"])


def test_a_file_is_checked_long_before_it_is_written(tmp_path):
    assert new_file(str(tmp_path / "a.onnx")) == str(tmp_path / "a.onnx")
    (tmp_path / "a.onnx").write_text("")
    for path, message in (
        (tmp_path / "a.onnx", "exists: name a new file"),
        (tmp_path / "no/a.onnx", "is not a folder that can be written to"),
    ):
        with pytest.raises(UserError, match=message):
            new_file(str(path))
    with pytest.raises(argparse.ArgumentTypeError, match="the path is empty"):
        new_file("")
