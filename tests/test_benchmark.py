"""tools/benchmark.py, on small images."""

import re

import pytest
import torch
from conftest import NEEDS_BFLOAT16

from tools import benchmark
from tools.benchmark import EAGER, REFERENCE, Case, build_runner, measure, milliseconds

CPU = torch.device("cpu")
FORMS = ("eager", "eager half", "deployed", "deployed half")
ROW = re.compile(r"(.+) \| ([\d.]+) \(([\d.]+) to ([\d.]+)\) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)")


def test_every_form_gets_a_row():
    rows = list(measure("LEDNet D = 20", Case((64, 128), 2, FORMS), CPU, seconds=0.1))
    found = [ROW.fullmatch(row).groups() for row in rows]
    assert tuple(form for form, *_ in found) == FORMS
    for _, median, p5, p95, fps, _, full in found:
        assert float(p5) <= float(median) <= float(p95)
        assert float(fps) == pytest.approx(2000 / float(median), rel=0.1) and float(full) > 0


def test_short_times_have_two_decimals():
    assert [milliseconds(s) for s in (0.00104, 0.0094, 0.0104)] == ["1.04", "9.40", "10.4"]


def test_the_reference_is_compared_with_itself():
    (row,) = measure(REFERENCE, Case((64, 128), 1, ("eager", "deployed")), CPU, seconds=0.1)
    assert ROW.fullmatch(row)[6] == ROW.fullmatch(row)[7] == "1.00"  # peers have no deployed form


def test_a_form_that_fails_is_reported(monkeypatch):
    def deploy(*args, **options):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(benchmark, "deploy", deploy)
    case = Case((64, 64), 1, ("eager", "deployed"))
    deployed, eager = measure("LEDNet D = 20", case, CPU, seconds=0.1)
    assert ROW.fullmatch(eager) and deployed.startswith("deployed | failed: RuntimeError: ")


def test_all_forms_return_the_same():
    case, images = Case((64, 96), 2, ()), torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        eager, deployed = (
            build_runner("LEDNet D = 128", form, case, CPU)(images)
            for form in ("eager", "deployed")
        )
    assert eager.dtype == deployed.dtype and eager.shape == deployed.shape
    assert (eager - deployed).abs().max() < 1e-3


def test_the_reference_needs_no_form_of_its_own():
    case = Case((64, 128), 1, ("deployed half labels",))
    (row,) = measure("LEDNet D = 20", case, CPU, seconds=0.1)
    assert ROW.fullmatch(row)[1] == "deployed half labels"


def test_sizes_and_forms_are_those_asked_for(monkeypatch, capsys):
    """And nothing else is built, which for compiled forms would take minutes."""
    monkeypatch.setattr("sys.argv", [
        "benchmark.py", "--seconds", "0.1", "--networks", "LEDNet D = 20", "--sizes", "128x64",
        "256x128", "--forms", "deployed", "deployed labels",
    ])  # fmt: skip
    built = []
    build = benchmark.build_runner
    monkeypatch.setattr(
        benchmark, "build_runner", lambda *args: [built.append(args[:2]), build(*args)][1]
    )
    benchmark.main()
    out = capsys.readouterr().out
    assert re.findall("### (.*)", out) == ["128x64, batch 1", "256x128, batch 1"]
    asked = [("LEDNet D = 20", form) for form in ("deployed", "deployed labels")]
    assert built == 2 * [(REFERENCE, "eager"), *asked]


def test_labels_come_out_of_the_network():
    case, images = Case((64, 96), 1, ()), torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        logits, labels = (
            build_runner("LEDNet D = 20", form, case, CPU)(images)
            for form in ("deployed", "deployed labels")
        )
    assert torch.equal(logits.argmax(1), labels)


@pytest.mark.slow
@pytest.mark.parametrize(
    "forms",
    [
        (*EAGER, "compiled", "onnx", "openvino", "openvino int8", "deployed"),
        pytest.param(("openvino half",), marks=NEEDS_BFLOAT16),
    ],
)
def test_the_tool_prints_tables(forms, monkeypatch, capsys):
    case = Case((64, 128), 1, forms)
    monkeypatch.setitem(benchmark.CASES, "cpu", [case])
    argv = ["benchmark.py", "--seconds", "0.1", "--networks", "LEDNet D = 20"]
    monkeypatch.setattr("sys.argv", argv)
    benchmark.main()
    out = capsys.readouterr().out
    header, _, *rows = (line.split("|") for line in out.splitlines() if line.startswith("|"))
    assert {len(row) for row in rows} == {len(header)} and "failed" not in out
    assert tuple(row[4].strip() for row in rows) == case.forms
