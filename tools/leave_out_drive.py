"""Lay out CamVid without one of its drives, to score a network on streets that it has never seen.

    python tools/leave_out_drive.py --datadir data/camvid --drive 0001TP --output data/no-0001TP
    python main.py --dataset camvid --datadir data/no-0001TP --preset camvid

The new folder links to the training images: those of the drive are its val, all others its train.
CamVid's val comes from a drive of train, most of its test from none: a score on a drive that was
left out says what to expect there. 0001TP is the one at dusk.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets.camvid import CamVid
from utils.arguments import ArgumentParser, file_path, new_file
from utils.errors import UserError
from utils.files import write_errors
from utils.script import run_script


def main() -> None:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--datadir", type=file_path, metavar="DIR", required=True, help="CamVid")
    add("--drive", required=True, help="drive to leave out, as file names begin: 0001TP")
    add("--output", type=new_file, metavar="DIR", required=True, help="new folder")
    args = parser.parse_args()
    pairs = CamVid(args.datadir, "train").pairs
    drives = sorted({drive_of(image) for image, _ in pairs})
    if args.drive not in drives or len(drives) < 2:
        raise UserError(f"{args.drive} is not one of several drives: {', '.join(drives)}")
    with write_errors(args.output):
        for image, label in pairs:
            split = "val" if drive_of(image) == args.drive else "train"
            for path, folder in ((image, split), (label, f"{split}annot")):
                target = Path(args.output, folder, Path(path).name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(os.path.abspath(path))
    count = sum(drive_of(image) == args.drive for image, _ in pairs)
    print(f"{args.output}: {len(pairs) - count} pairs in train, {count} of {args.drive} in val")


def drive_of(image: str) -> str:
    """Return the drive of 0001TP_006690.png."""
    return Path(image).name.partition("_")[0]


if __name__ == "__main__":
    run_script(main)
