"""Data sets by name: to add one, write its module and its line here."""

from datasets.camvid import CamVid
from datasets.cityscapes import Cityscapes
from datasets.folder import Folder

DATASETS = {
    "cityscapes": Cityscapes,
    "synthetic": Cityscapes,  # the drawn scenes, in the same layout
    "camvid": CamVid,
    "folder": Folder,
}
