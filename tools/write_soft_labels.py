"""Write a teacher's class probabilities of each training image, for main.py --soft-labels.

    python tools/write_soft_labels.py --edgenets EdgeNets --checkpoint save/teacher/last.pth \\
        --datadir data/camvid --output soft
    python main.py --dataset camvid --datadir data/camvid --preset camvid \\
        --soft-labels soft --savedir taught

The teacher is what tools/train_teacher.py trained, or any network of main.py, such as a wider one.
It segments each image once, without augmentation, at the height that it was trained on. Its
softened probabilities are stored at a quarter of the resolution: 0.1 MB for an image of 480x360
with 11 classes, 2.5 MB for one of 2048x1024 with 19.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets.soft_labels import CLASSES, STRIDE, TEMPERATURE, soft_label_path
from utils.arguments import INFERENCE_ADVICE, ArgumentParser, file_path, new_file
from utils.errors import UserError
from utils.evaluation import memory_errors
from utils.files import write_errors
from utils.progress import progress_bar
from utils.script import pick_device, run_script, use_threads
from utils.teacher import load_teacher


def main() -> None:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--checkpoint", type=file_path, metavar="FILE", required=True, help="the teacher")
    add("--edgenets", type=file_path, metavar="DIR",
        help="clone of EdgeNets, for a teacher of tools/train_teacher.py")
    add("--datadir", type=file_path, metavar="DIR", required=True,
        help="data set, laid out as the teacher's")
    add("--train-on", "--annotations", metavar="SPLITS",
        help="splits, as main.py --train-on names them; default: the first")
    add("--output", type=new_file, metavar="DIR", required=True, help="new folder")
    # fmt: on
    parser.add_device()
    args = parser.parse_args()
    device = pick_device(args.device)
    use_threads(args.threads)
    teacher, about = load_teacher(args.checkpoint, args.edgenets)
    teacher.to(device, memory_format=torch.channels_last)
    normalize = about.normalizer(device)
    choices = about.dataset_class().TRAIN_ON
    if args.train_on and args.train_on not in choices:
        raise UserError(f"--train-on {args.train_on}: give {' or '.join(choices)}")
    parts = choices[args.train_on or next(iter(choices))]
    splits = [about.open_split(args.datadir, part) for part in parts]
    written: dict[str, Path] = {}  # by the path of the image, without links
    total = sum(map(len, splits))
    with write_errors(args.output), progress_bar("soft labels", total) as bar:
        for split in splits:
            for index, (image, _) in enumerate(split.pairs):
                path = soft_label_path(args.output, args.datadir, image)
                path.parent.mkdir(parents=True, exist_ok=True)
                known = written.setdefault(os.path.realpath(image), path)
                if known is path:
                    np.save(path, soft_label(teacher, normalize(split[index][0][None])))
                else:
                    path.symlink_to(os.path.relpath(known, path.parent))
                bar.update()
        # Last: a folder without this file is not complete.
        Path(args.output, CLASSES).write_text("\n".join(about.classes.names), encoding="utf-8")
    print(f"{args.output}: soft labels of {len(written)} images, which {total} paths lead to")


@torch.inference_mode()
def soft_label(teacher: nn.Module, image: Tensor) -> np.ndarray:
    """Return the soft labels, C x h x w, uint8, of one image, 1 x 3 x H x W.

    They are the means of the probabilities of blocks of STRIDE x STRIDE pixels.
    """
    with memory_errors(image):
        logits = teacher(image).float()
    probabilities = (logits / TEMPERATURE).softmax(1)
    size = [-(-length // STRIDE) for length in image.shape[-2:]]
    return (255 * F.adaptive_avg_pool2d(probabilities, size)[0]).round().byte().cpu().numpy()


if __name__ == "__main__":
    run_script(main, INFERENCE_ADVICE)
