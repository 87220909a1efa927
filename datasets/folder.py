"""Your own data set, without code: a folder of images, one of labels, and a file of classes."""

import os

from datasets.images import FilePair
from datasets.listing import matched_files
from datasets.segmentation import Segmentation


class Folder(Segmentation):
    """images/<split>/<name>.png, .jpg, ... with labels/<split>/<name>.png; see `class_file` and
    `matched_files`. The split "test" may come without labels.
    """

    DEPTH = 2

    def files(self) -> list[FilePair]:
        images, labels = (
            os.path.join(self.root, kind, self.split) for kind in ("images", "labels")
        )
        unlabelled = self.split == "test" and not os.path.isdir(labels)
        return matched_files(images, None if unlabelled else labels)
