"""What the labels of a data set hold as a whole, and what is wrong with that."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from datasets.images import IGNORE_INDEX
from datasets.labels import Color
from datasets.loading import call_in_workers
from datasets.segmentation import Classes, Segmentation

# The share of pixels of 255 above which masks may be of 0 and 255.
MANY = 0.01
# Labels that went through JPEG: at least this share of the pixels at borders is alone with its
# value, and so many times more of the blocks beside JPEG's grid than on it have several values.
# Measured on CamVid and Cityscapes: at most 0.017 and 1.02, as JPEGs of qualities 30 to 98 at least
# 0.042 and 1.34.
ALONE, OFF_GRID = 0.03, 1.2


@dataclass
class LabelCounts:
    """What some label maps hold."""

    pixels: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.int64))  # by id
    # Label ids with a colour that they have in a palette, and the first file of each such pair.
    colors: dict[tuple[int, Color], str] = field(default_factory=dict)
    traces: Tensor = field(default_factory=lambda: torch.zeros(6, dtype=torch.int64))  # of JPEG

    def add(self, other: "LabelCounts") -> None:
        """Add what other label maps hold."""
        self.pixels += other.pixels
        self.colors |= {pair: p for pair, p in other.colors.items() if pair not in self.colors}
        self.traces += other.traces

    def by_class(self, classes: Classes) -> Tensor:
        """Return the pixels of each class, the ignored ones last."""
        trained = self.pixels[list(classes.label_ids)]
        return torch.cat([trained, (self.pixels.sum() - trained.sum())[None]])


def total(counts: Iterable[LabelCounts]) -> LabelCounts:
    """Return what all of some label maps hold."""
    together = LabelCounts()
    for found in counts:
        together.add(found)
    return together


def count_labels(parts: Sequence[Segmentation], workers: int = 0) -> LabelCounts:
    """Count the pixels of each label id in all labels at full size."""
    title = "counting label pixels"
    return total(
        found
        for part in parts
        for found in call_in_workers(partial(count_label, part), len(part), workers, title)
    )


def count_label(dataset: Segmentation, index: int) -> LabelCounts:
    """Count the pixels of each label id in one label map; see `Segmentation.read_ids`."""
    label, _ = dataset.read_ids(index)
    path = dataset.pairs[index][1]
    return LabelCounts(
        torch.from_numpy(np.bincount(label.ids.ravel(), minlength=256)),
        dict.fromkeys(sorted(label.colors), path),
        torch.tensor(jpeg_traces(label.ids)),
    )


def jpeg_traces(ids: np.ndarray) -> list[int]:
    """Count what JPEG leaves in label ids, H x W: it blurs 8x8 blocks, but not across their grid.

    Returns:
        Pixels without a neighbour of their value; pixels with a neighbour of another; blocks on the
        grid with several values; blocks on the grid; the two numbers of blocks beside the grid.
    """
    down, side = ids[1:] != ids[:-1], ids[:, 1:] != ids[:, :-1]
    above, below, left, right = down[:-1, 1:-1], down[1:, 1:-1], side[1:-1, :-1], side[1:-1, 1:]
    alone, border = above & below & left & right, above | below | left | right
    counts = [np.count_nonzero(alone), np.count_nonzero(border)]
    for part in (ids, ids[4:-4, 4:-4]):
        rows, columns = part.shape[0] // 8, part.shape[1] // 8
        # Each row of a block as one number: the comparison is 20 times as fast.
        blocks = np.ascontiguousarray(part[: rows * 8, : columns * 8]).view(np.uint64)
        blocks = blocks.reshape(rows, 8, columns)
        one_value = (blocks[:, :1] & 255) * np.uint64(0x0101010101010101)
        counts += [np.count_nonzero((blocks != one_value).any(1)), rows * columns]
    return counts


def went_through_jpeg(traces: Tensor) -> bool:
    """Whether the sums of `jpeg_traces` are those of labels that JPEG changed."""
    alone, border, mixed, on_grid, mixed_beside, beside = traces.tolist()
    if mixed < 40 or alone < ALONE * border:
        return False
    # The fewer blocks there are, the more the numbers differ by chance.
    return mixed_beside * on_grid > (OFF_GRID + 2 / mixed**0.5) * mixed * beside


def absent_classes(counts: LabelCounts, classes: Classes) -> list[str]:
    """Return the names of the classes that have no pixel."""
    pixels = counts.by_class(classes).tolist()[:-1]
    return [name for name, count in zip(classes.names, pixels, strict=True) if not count]


def label_problems(
    counts: Mapping[str, LabelCounts], classes: Classes, file: str | None
) -> list[str]:
    """Return what makes the labels of a split unusable or misleading, one sentence each.

    Args:
        counts: what the labels hold by the name of their split; "val" may lack classes.
        file: file of the classes, if there is one.
    """
    problems = []
    for split, found in counts.items():
        absent = absent_classes(found, classes)
        present = [name for name in classes.names if name not in absent]
        share = found.pixels[IGNORE_INDEX].item() / max(1, found.pixels.sum().item())
        many = share > (MANY if len(present) > 1 else 0)
        masks = file and many and IGNORE_INDEX not in classes.known_ids()
        if not present:
            problems.append(f"all labels of {split} are ignored: no pixel is of a class")
        elif masks and absent and (split != "val" or len(present) == 1):
            white, ids = classes.ids_by_color().get((255, 255, 255)), list(classes.label_ids)
            name = classes.names[ids.index(white)] if white in ids else absent[0]
            problems.append(
                f"no pixel of {split} is {absent[0]}, and {share:.1%} are 255, which is ignored: "
                f"are these masks of 0 and 255? In {file}, `255 {name}` in place of `{name}` makes "
                "255 that class, and a line `255 void` says that 255 is ignored"
            )
        elif split != "val" and len(present) == 1:
            problems.append(f"only {present[0]} has pixels in {split}: two classes are needed")
        if went_through_jpeg(found.traces):
            problems.append(
                f"the labels of {split} went through JPEG, which blurs the ids at borders: export "
                "them again from their source, as PNG"
            )
    if differ := _differing_palettes(counts):
        way_out = f", or state the colour of each class in {file}, of ignored ones as well"
        problems.append(f"{differ}: give all labels one palette{way_out if file else ''}")
    return problems


def _differing_palettes(counts: Mapping[str, LabelCounts]) -> str | None:
    first: dict[int, tuple[Color, str]] = {}
    for (label_id, color), path in total(counts.values()).colors.items():
        other, place = first.setdefault(label_id, (color, path))
        if color != other:
            return f"{label_id} is {other} in the palette of {place} and {color} in that of {path}"
    return None


def palette_note(counts: Mapping[str, LabelCounts], classes: Classes) -> str | None:
    """Return a sentence if palettes do not have the colours of the classes, so that their indices
    are the label ids."""
    stated = classes.stated_colors()
    for label_id, color in sorted(total(counts.values()).colors):
        if stated.get(label_id, color) != color != (label_id,) * 3:
            return (
                f"{color} is the colour of {label_id} in a palette, not {stated[label_id]}: the "
                "indices of palettes are taken as the label ids"
            )
    return None
