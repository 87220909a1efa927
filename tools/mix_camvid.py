"""Lay out CamVid and Cityscapes as one data set in the layout and with the classes of CamVid.

    python tools/mix_camvid.py --camvid data/camvid --cityscapes data/cityscapes --output data/mixed

A network that is trained on both sees more streets than CamVid's three drives. Images are links,
those of CamVid several times, as it has fewer; val is CamVid's. Labels are written anew: a class of
Cityscapes becomes the class of CamVid that it is a part of, as truck becomes Car. docs/camvid.md
has the whole recipe.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets.camvid import CamVid
from datasets.cityscapes import Cityscapes
from datasets.class_file import read_classes
from datasets.folder import Folder
from datasets.images import IGNORE_INDEX, DatasetError, read_image
from datasets.listing import list_pictures
from datasets.segmentation import Segmentation
from utils.arguments import ArgumentParser, file_path, new_file, positive_int
from utils.files import write_errors
from utils.progress import progress_bar
from utils.script import run_script


def main() -> None:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--camvid", type=file_path, metavar="DIR", required=True, help="CamVid")
    add("--cityscapes", type=file_path, metavar="DIR", required=True,
        help="Cityscapes, of which the fine annotations of train are used")
    add("--classes", type=file_path, metavar="FILE",
        help="its file of classes, if it is a smaller copy in the layout of --dataset folder")
    add("--unlabelled", type=file_path, metavar="DIR",
        help="folder of more pictures, from which main.py learns with --soft-labels alone")
    add("--train-on", "--annotations", choices=tuple(CamVid.TRAIN_ON), default="train",
        help="splits of CamVid to train on; default: %(default)s")
    add("--repeat", type=positive_int, default=6,
        help="links to each training image of CamVid; default: %(default)s")
    add("--output", type=new_file, metavar="DIR", required=True, help="new folder")
    # fmt: on
    args = parser.parse_args()
    val, train = CamVid(args.camvid, "val"), CamVid(args.camvid, args.train_on)
    if args.classes:
        city: Segmentation = Folder(args.cityscapes, "train", read_classes(args.classes))
    else:
        city = Cityscapes(args.cityscapes, "train")
    to_camvid, others = class_table(city.classes.names)
    pictures = list_pictures(args.unlabelled) if args.unlabelled else []
    same, output = np.arange(IGNORE_INDEX + 1, dtype=np.uint8), Path(args.output)
    with write_errors(output):
        add_pairs(output, "val", "camvid", labelled(val, same))
        pairs = list(labelled(train, same))  # read once
        for number in range(args.repeat):
            add_pairs(output, "train", f"camvid{number}", pairs)
        add_pairs(output, "train", "cityscapes", labelled(city, to_camvid))
        add_pairs(output, "train", "unlabelled", map(without_label, pictures))
    if others:
        print(f"ignored, as Cityscapes has no such classes: {', '.join(others)}")
    print(
        f"{output}: {args.repeat} x {len(train)} images of CamVid, {len(city)} of Cityscapes and "
        f"{len(pictures)} without labels to train on, {len(val)} of CamVid in val"
    )


def class_table(names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return the class of CamVid for each of 256 trainIds of Cityscapes' classes; 255 = ignore.

    Args:
        names: names of the classes, in any capitals.

    Returns:
        The table, uint8, and the names that Cityscapes does not have, whose classes are ignored.

    Raises:
        DatasetError: Cityscapes has none of the names.
    """
    classes = CamVid.CLASSES
    new = {part: i for i, name in enumerate(classes.names) for part in classes.related[name]}
    table = np.full(256, IGNORE_INDEX, np.uint8)
    table[: len(names)] = [new.get(name.lower(), IGNORE_INDEX) for name in names]
    if (table == IGNORE_INDEX).all():
        raise DatasetError(f"the classes are {', '.join(names)}: give a data set with Cityscapes'")
    return table, [name for name in names if name.lower() not in new]


def labelled(data: Segmentation, table: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
    """Yield the path of each image and its label, H x W, given the new value of each trainId."""
    with progress_bar(data.root, len(data)) as bar:
        for index, (image, _) in enumerate(data.pairs):
            yield image, table[data.read_train_ids(index)]
            bar.update()


def without_label(picture: str) -> tuple[str, np.ndarray]:
    return picture, np.full(read_image(picture).size[::-1], IGNORE_INDEX, np.uint8)


def add_pairs(
    output: Path, split: str, prefix: str, pairs: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Link to images and write their labels, with numbers in front as names may repeat."""
    for index, (image, label) in enumerate(pairs):
        name = f"{prefix}_{index:05d}_{Path(image).name}"
        target = output / split / name
        path = (output / f"{split}annot" / name).with_suffix(".png")
        for folder in (target.parent, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.path.abspath(image))
        Image.fromarray(label).save(path)


if __name__ == "__main__":
    run_script(main)
