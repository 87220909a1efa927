"""CamVid: street scenes from a driving car, 11 classes, as the authors of SegNet published them.

Brostow et al., "Segmentation and Recognition Using Structure from Motion Point Clouds", ECCV 2008;
the split into 367, 101 and 233 images of 480x360 is that of Badrinarayanan et al., "SegNet", TPAMI
2017.
"""

import os
from typing import ClassVar

from datasets.images import FilePair
from datasets.listing import matched_files
from datasets.segmentation import Classes, Segmentation


class CamVid(Segmentation):
    """CamVid as <split>/<name>.png (or .jpg, ...) and <split>annot/<name>.png; 11 = unlabelled."""

    CLASSES = Classes(
        names=[
            *("Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence"),
            *("Car", "Pedestrian", "Bicyclist"),
        ],
        colors=[
            *((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222)),
            *((128, 128, 0), (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0)),
            (0, 128, 192),
        ],
        label_ids=range(11),
        ignored_ids=[11],
        related={  # in Cityscapes
            "Sky": ["sky"],
            "Building": ["building", "wall"],
            "Pole": ["pole"],
            "Road": ["road"],
            "Pavement": ["sidewalk"],
            "Tree": ["vegetation", "terrain"],
            "SignSymbol": ["traffic sign", "traffic light"],
            "Fence": ["fence"],
            "Car": ["car", "truck", "bus", "train"],
            "Pedestrian": ["person"],
            "Bicyclist": ["bicycle", "rider", "motorcycle"],
        },
    )
    DEPTH = 1
    SPLITS = ("train", "val", "trainval", "test")
    TRAIN_ON: ClassVar = {"train": ["train"], "trainval": ["trainval"]}

    def files(self) -> list[FilePair]:
        parts = ("train", "val") if self.split == "trainval" else (self.split,)
        paths = [os.path.join(self.root, part) for part in parts]
        return [pair for path in paths for pair in matched_files(path, f"{path}annot")]
