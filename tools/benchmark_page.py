"""docs/benchmarks.md and its plot, out of what tools/benchmark.py measured."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOT = RESULTS / "speed_accuracy.png"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}

# Class mIoU on Cityscapes test in %, from the papers, after training on fine annotations; LEDNet's
# letter has coarse ones as well.
PUBLISHED = {
    "LEDNet D = 20": 70.6,
    "LEDNet D = 128": 72.2,  # "1.6 more"
    "ERFNet": 68.0,
    "ENet": 58.3,
    "ESNet": 70.7,
    "EDANet": 67.3,
    "DABNet": 70.1,
    "CGNet": 64.8,
    "Fast-SCNN": 68.0,
}
INTRODUCTION = """# Benchmarks

How fast LEDNet runs beside its peers, on one machine, in one run, with the same output on both
sides of every ratio. This page is written by `tools/benchmark.py` from
[what it measured](benchmarks/); nothing in it was typed.

- **eager**: as the code stands, by plain PyTorch. **compiled**: by `torch.compile`, with frozen
  weights on a CPU, in CUDA graphs on a GPU. **onnx**: exported, by ONNX Runtime. **deployed**: by
  `utils/speed.py: deploy`, batch norms folded and the channels never split; "onnx" of ours is that
  form as well, since `export.py` exports it. **half**: computing in half precision.
- **x**: how many times faster than the reference, pytorchcv's LEDNet in eager PyTorch, in the same
  precision and in the same rounds. **x float32**: than the reference in float32. The time is the
  median, and in brackets the 5th and 95th percentile, of few rounds the extremes.
- Peers are those of the package pytorchcv, untrained. Multiply-adds are those of the convolutions.

![FPS measured against mIoU published](benchmarks/speed_accuracy.png)

*Accuracy as each paper states it, at the size of image that it used (Fast-SCNN 2048x1024); speed at
1024x512 for all.*
"""


def write_page() -> None:
    """Write the page and its plot anew."""
    PAGE.write_text(page())
    draw_plot()


def page() -> str:
    """The page, with a part for each device."""
    parts = [INTRODUCTION]
    for kind, title in DEVICES.items():
        path = RESULTS / f"{kind}.json"
        if path.exists():
            parts.append(device_part(title, json.loads(path.read_text())))
        else:
            parts.append(
                f"## {title}\n\nNot measured yet. `python tools/benchmark.py --device {kind}` on a "
                "machine that has one fills this in.\n"
            )
    return "\n".join(parts)


def device_part(title: str, figures: dict[str, Any]) -> str:
    lines = [
        f"## {title}\n",
        f"{figures['device']}; torch {figures['torch']}; {figures['date']}; "
        f"`{'`, then `'.join(figures['commands'])}`; half precision is {figures['half']}.\n",
    ]
    # Runs that go on later append their rows: the order is that of the networks and of the sizes.
    names = list(PUBLISHED)
    figures["speed"].sort(
        key=lambda row: (
            row["size"],
            row["batch"],
            row["labels"],
            names.index(row["network"]) if row["network"] in names else 2,
        )
    )
    for size, batch, labels in dict.fromkeys(
        (tuple(row["size"]), row["batch"], row["labels"]) for row in figures["speed"]
    ):
        lines.append(speed_table(figures, list(size), batch, labels))
    lines.append(floor_part(figures))
    if "training" in figures:
        lines += [training_part(figures["training"]), evaluation_part(figures["evaluation"])]
    return "\n".join(lines)


def speed_table(figures: dict[str, Any], size: list[int], batch: int, labels: bool) -> str:
    rows = [
        row
        for row in figures["speed"]
        if (row["size"], row["batch"], row["labels"]) == (size, batch, labels)
    ]
    lines = [
        f"### {size[1]}x{size[0]}, batch {batch}, {'label maps' if labels else 'logits'} out\n",
        "| network | parameters | multiply-adds | form | ms | FPS | x | x float32 | memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes = []
    for row in rows:
        whole = figures["networks"][row["network"]]
        scale = size[0] * size[1] / (512 * 1024)
        first = (
            f"{row['network']} | {whole['parameters'] / 1e6:.2f} M | "
            f"{scale * whole['multiply_adds'] / 1e9:.1f} G"
        )
        for form, found in row["forms"].items():
            if "failed" in found:
                notes.append(f"{row['network']}, {form}: {found['failed']}")
                continue
            lines.append(
                f"| {first} | {form} | {found['median_ms']:.1f} ({found['p5_ms']:.1f} to "
                f"{found['p95_ms']:.1f}) | {1e3 * row['batch'] / found['median_ms']:.1f} | "
                f"{found.get('ratio_half', found['ratio']):.2f} | {found['ratio']:.2f} | "
                f"{found['memory'] / 1e6:.0f} MB |"
            )
            first = " | | "
    rounds = [row["rounds"] for row in rows]
    references = [f"{min(row[key] for row in rows):.1f} to {max(row[key] for row in rows):.1f} ms"
                  for key in ("reference_ms", "reference_half_ms") if key in rows[0]]  # fmt: skip
    count = f"{min(rounds)}" if len(set(rounds)) == 1 else f"{min(rounds)} to {max(rounds)}"
    lines.append(
        f"\n{count} rounds for each network; the reference took "
        f"{', in half precision '.join(references)}."
    )
    if notes:
        lines.append("No figure: " + "; ".join(notes) + ".")
    return "\n".join(lines) + "\n"


def floor_part(figures: dict[str, Any]) -> str:
    """How far the fastest form of each network is above what its operations take."""
    rates = figures["rates"]
    shown = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s in {name.replace('_', ' by ')}"
        for name, rate in rates.items()
        if name != "bytes"
    )
    lines = [
        "### The floor\n",
        f"Matrices of 2048x2048 are multiplied at {shown}; the fastest of a precision counts. "
        f"Memory is copied at {rates['bytes'] / 1e9:.1f} GB/s, read and written. At 1024x512, "
        "batch 1, logits out; bytes are those that convolutions read and write, each once:\n",
        "| network | precision | operations take | bytes take | fastest form | ms | times the "
        "floor of operations |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in figures["speed"]:
        if row["size"] != [512, 1024] or row["batch"] != 1 or row["labels"]:
            continue
        size = figures["networks"][row["network"]]
        for precision, width in (("float32", 4), ("half", 2)):
            forms = {
                form: found["median_ms"]
                for form, found in row["forms"].items()
                if "median_ms" in found and ("half" in form) == (precision == "half")
            }
            if not forms:
                continue
            best = max(rate for name, rate in rates.items() if name.startswith(precision))
            form = min(forms, key=forms.get)
            floor = 1e3 * 2 * size["multiply_adds"] / best
            moved = 1e3 * size["bytes"] * width / 4 / rates["bytes"]
            lines.append(
                f"| {row['network']} | {precision} | {floor:.1f} ms | {moved:.1f} ms | {form} | "
                f"{forms[form]:.1f} | {forms[form] / floor:.2f} |"
            )
    return "\n".join(lines) + "\n"


def training_part(figures: dict[str, Any]) -> str:
    """Images per second of the loader alone, and of whole training steps."""
    height, width = figures["size"]
    lines = [
        "### Training\n",
        f"Drawn scenes of 2048x1024, resized to {width}x{height}, published augmentation, batches "
        f"of {figures['batch_size']}; the loader alone on one core of the CPU, steps with "
        f"{figures['workers']} workers and amp {figures['amp']}. Plain steps are float32, "
        "contiguous, without a fused optimizer. `tools/training_speed.py` measures this alone.\n",
        "| what | images/s | x |",
        "| --- | --- | --- |",
    ]
    for kind, title in (("loader", "loader"), ("training", "training step")):
        first = next(iter(figures[kind].values()))
        for way, rate in figures[kind].items():
            lines.append(f"| {title}, {way} | {rate:.2f} | {rate / first:.2f} |")
    return "\n".join(lines) + "\n"


def evaluation_part(figures: dict[str, Any]) -> str:
    return (
        "### Evaluation\n\n"
        "Scenes of 2048x1024 scored and their label PNGs written: "
        f"{figures['plain']:.2f} images/s by a plain loop, one after the other, "
        f"{figures['ours']:.2f} by `{figures['command']}`, {figures['ratio']:.2f} times as many.\n"
    )


def draw_plot() -> None:
    """Speed of the fastest form against the published accuracy, a panel for each device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = {kind: RESULTS / f"{kind}.json" for kind in DEVICES}
    found = {kind: json.loads(path.read_text()) for kind, path in found.items() if path.exists()}
    figure, panels = plt.subplots(1, len(found), figsize=(7 * len(found), 4.5), squeeze=False)
    for axes, (kind, figures) in zip(panels[0], found.items(), strict=True):
        for row in figures["speed"]:
            if row["size"] != [512, 1024] or row["batch"] != 1 or row["labels"]:
                continue
            if row["network"] not in PUBLISHED:
                continue
            times = [
                form["median_ms"]
                for name, form in row["forms"].items()
                if "median_ms" in form and "half" not in name
            ]
            if not times:
                continue
            ours = row["network"].startswith("LEDNet")
            point = 1e3 / min(times), PUBLISHED[row["network"]]
            axes.scatter(*point, color="tab:red" if ours else "tab:blue")
            axes.annotate(row["network"], point, xytext=(5, 4), textcoords="offset points")
        axes.set_xlabel(f"FPS at 1024x512, measured: {DEVICES[kind]}, float32, fastest form")
        axes.set_ylabel("class mIoU on Cityscapes test in %, published")
        axes.set_xscale("log")
        axes.margins(0.3, 0.15)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)
    plt.close(figure)
