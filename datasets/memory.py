"""A data set decoded and resized once, and kept as bytes."""

import os
from math import prod

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets.files import DatasetError
from datasets.segmentation import Segmentation, resized_size

Size = tuple[int, int]


class InMemory(Dataset):
    """The items of a data set out of one array of uint8, in the memory of a device.

    Args:
        dataset: what is read, once.
        sizes: height and width of each image file, as `check_headers` returns them.
        workers: processes that decode.
        device: where the bytes are kept; a GPU that lacks the room leaves them to the CPU.

    Raises:
        DatasetError: there is too little memory, or a file cannot be read.
    """

    def __init__(
        self,
        dataset: Segmentation,
        sizes: list[Size],
        workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        shapes: list[tuple[tuple[int, ...], Size]] = []  # of each image and its label
        for size in sizes:
            resized = size if dataset.height is None else resized_size(*size, dataset.height)
            shapes.append(((3, *resized), resized if dataset.resize_labels else size))
        lengths = [prod(image) + prod(label) for image, label in shapes]
        array = _allocate(sum(lengths), torch.device(device), dataset.root)
        self.items: list[tuple[Tensor, Tensor]] = []
        for (image, label), part in zip(shapes, array.split(lengths), strict=True):
            pixels, classes = part.split([prod(image), prod(label)])
            self.items.append((pixels.view(image), classes.view(label)))

        # A generator of its own: reading must not move the random state of training.
        loader = DataLoader(
            dataset, batch_size=None, num_workers=workers, generator=torch.Generator()
        )
        title = f"reading {dataset.split}"
        reading = tqdm(loader, title, unit="img", leave=False, disable=None)
        for item, read in zip(self.items, reading, strict=True):
            for kept, values in zip(item, read, strict=True):
                kept.copy_(values)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.items[index]


def _allocate(count: int, device: torch.device, name: str) -> Tensor:
    """An array of bytes; half of the memory is left to everything else."""
    if device.type == "cuda" and count <= torch.cuda.mem_get_info(device)[0] / 2:
        return torch.empty(count, dtype=torch.uint8, device=device)
    # All of it: what the system keeps of files is not free, but can be had.
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if count > total / 2:
        raise DatasetError(
            f"{name} takes {count / 1e9:.1f} GB of memory, and the machine has "
            f"{total / 1e9:.1f}: give --cache off or a smaller --height"
        )
    return torch.empty(count, dtype=torch.uint8)
