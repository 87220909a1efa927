"""Lay out CamVid and Cityscapes as one data set with the classes of CamVid.

    python tools/mix_camvid.py --camvid data/camvid --cityscapes data/cityscapes --output data/mixed
    python main.py --dataset folder --classes data/mixed/classes.txt --datadir data/mixed \\
        --preset camvid --init weights/lednet_d20_cityscapes.pth --savedir mixed
    python main.py --dataset camvid --datadir data/camvid --preset camvid \\
        --init save/mixed/last.pth --savedir camvid

A network that is trained on both sees more streets than CamVid's three drives. Images are links,
those of CamVid several times, as it has fewer; val is CamVid's. Labels are written anew: a class of
Cityscapes becomes the one of CamVid that it is a part of, as truck becomes Car.
"""

import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets.camvid import CamVid
from datasets.cityscapes import Cityscapes
from datasets.class_file import read_classes
from datasets.folder import Folder
from datasets.images import IGNORE_INDEX, DatasetError
from datasets.segmentation import Segmentation
from utils.arguments import ArgumentParser, file_path, new_file, positive_int
from utils.files import write_errors
from utils.script import run_script


def main() -> None:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--camvid", type=file_path, metavar="DIR", required=True, help="CamVid")
    add("--cityscapes", type=file_path, metavar="DIR", required=True, help="Cityscapes, fine train")
    add("--classes", type=file_path, metavar="FILE", help="for a smaller copy of Cityscapes in the "
        "layout of --dataset folder: its file of classes")  # fmt: skip
    add(
        "--train-on",
        "--annotations",
        choices=tuple(CamVid.TRAIN_ON),
        default="train",
        help="splits of CamVid",
    )
    add("--repeat", type=positive_int, default=6, help="links to each training image of CamVid")
    add("--output", type=new_file, metavar="DIR", required=True, help="new folder")
    args = parser.parse_args()
    if args.classes:
        city: Segmentation = Folder(args.cityscapes, "train", read_classes(args.classes))
    else:
        city = Cityscapes(args.cityscapes, "train")
    to_camvid = class_table(city.classes.names)
    same = np.arange(IGNORE_INDEX + 1, dtype=np.uint8)
    output = Path(args.output)
    with write_errors(output):
        lay_out(CamVid(args.camvid, "val"), same, output, "val")
        lay_out(CamVid(args.camvid, args.train_on), same, output, "train", args.repeat)
        lay_out(city, to_camvid, output, "train")
        classes = zip(CamVid.CLASSES.names, CamVid.CLASSES.colors, strict=True)
        lines = (f"{name} {' '.join(map(str, color))}\n" for name, color in classes)
        (output / "classes.txt").write_text("".join(lines))


def class_table(names: list[str]) -> np.ndarray:
    """Return the class of CamVid for each of 256 trainIds of Cityscapes' classes; 255 = ignore.

    Raises:
        DatasetError: none of the names is one of Cityscapes'.
    """
    classes = CamVid.CLASSES
    new = {part: i for i, name in enumerate(classes.names) for part in classes.related[name]}
    table = np.full(256, IGNORE_INDEX, np.uint8)
    table[: len(names)] = [new.get(name, IGNORE_INDEX) for name in names]
    if (table == IGNORE_INDEX).all():
        raise DatasetError(f"the classes are {', '.join(names)}: give a data set with Cityscapes'")
    return table


def lay_out(
    data: Segmentation, table: np.ndarray, output: Path, split: str, repeat: int = 1
) -> None:
    """Link to the images of a data set, and write their labels, given the new value of each."""
    kind = type(data).__name__.lower()
    for index, (image, _) in enumerate(tqdm(data.pairs, desc=f"{kind} for {split}")):
        label = Image.fromarray(table[data.read_train_ids(index)])
        for number in range(repeat):
            name = f"{kind}{number}_{Path(image).name}"
            target = output / "images" / split / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.path.abspath(image))
            path = (output / "labels" / split / name).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            label.save(path)


if __name__ == "__main__":
    run_script(main)
