"""Which files of a folder are pictures, and which label belongs to each image."""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from itertools import takewhile

from datasets.images import DatasetError, FilePair

# All kinds that Pillow reads by itself. JPEG blurs the ids of a label map.
JPEG_SUFFIXES = {".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"}
PICTURES = JPEG_SUFFIXES | {
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jp2", ".pbm", ".pgm", ".png", ".pnm"),
    *(".ppm", ".tga", ".tif", ".tiff", ".webp"),
}
# Suffixes passed over in silence; other unread kinds are reported.
UNREPORTED = {
    *("", ".bak", ".cache", ".csv", ".db", ".doc", ".docx", ".htm", ".html", ".ini", ".json"),
    *(".lnk", ".log", ".lst", ".md", ".md5", ".pdf", ".py", ".rst", ".rtf", ".sh", ".sha256"),
    *(".tmp", ".tsv", ".txt", ".url", ".xls", ".xlsx", ".xml", ".yaml", ".yml", ".zip"),
}
# What file servers, macOS, Windows and Linux put into folders; hidden names begin with a dot.
STRAYS = {
    *("@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx"),
    *("$recycle.bin", "system volume information", "lost+found", "__pycache__"),
}
# What may surround an image's name in its label's, before and behind it.
BEFORE, BEHIND = r"(|.*[-_. (/\\]|.*[^\W\d_](?=\d))", r"([-_. )/\\].*|)"


def is_stray(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or was left there by another program."""
    if name.startswith(".") or name.endswith(("~", ":Zone.Identifier")):
        return True
    return name.lower() in STRAYS


def suffix_of(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def is_picture(name: str, kinds: Collection[str] = PICTURES) -> bool:
    return suffix_of(name) in kinds and not is_stray(name)


def is_loop(folder: str, name: str) -> bool:
    """Whether a folder in another is a link to what holds it."""
    here, target = (os.path.realpath(path) for path in (folder, os.path.join(folder, name)))
    return os.path.commonpath([here, target]) == target


def list_pictures(
    root: str | os.PathLike,
    kinds: Collection[str] = PICTURES,
    skip_folder: Callable[[str], bool] = lambda folder: False,
) -> list[str]:
    """Return the pictures of a folder at any depth, sorted by folder and name, without strays and
    without the folders in it for which `skip_folder` is true."""

    def fail(error: OSError) -> None:
        raise DatasetError(f"{error.filename} cannot be listed ({error.strerror})") from error

    listed: list[tuple[str, list[str]]] = []
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not is_stray(name) and not is_loop(folder, name)]
        folders[:] = [name for name in folders if not skip_folder(os.path.join(folder, name))]
        listed.append((folder, names))
    found: list[str] = []
    left_out: Counter[str] = Counter()  # by suffix
    for folder, names in sorted(listed):
        for name in sorted(names):
            if is_picture(name, kinds):
                found.append(os.path.join(folder, name))
            elif not is_stray(name) and (suffix := suffix_of(name)) not in UNREPORTED:
                left_out[suffix] += 1
    suffixes = ", ".join(suffix for suffix, _ in left_out.most_common(5))
    report_left_out(len(found) + left_out.total(), found, root, f"{suffixes} is not read")
    return found


def report_left_out(total: int, found: Sized, root: str | os.PathLike, reason: str) -> None:
    """Report how many files of a folder are left out, if any are."""
    if count := total - len(found):
        print(f"note: {count} of {total} files of {root} are left out: {reason}", file=sys.stderr)


def matched_files(images: str | os.PathLike, labels: str | os.PathLike | None) -> list[FilePair]:
    """Pair the pictures of a folder with the label maps of another by their paths without suffix,
    sorted; None stands for labels that do not exist.

    Where no image has a label of its own name, all labels may share a prefix or suffix, as
    x_mask.png or masks/x.png for x.jpg, or something else, as x_mask.png for x_rgb.jpg.
    """
    for folder in (images, labels):
        if folder is not None and not os.path.isdir(folder):
            raise DatasetError(f"{folder} does not exist: it must hold the files of this split")
    found = _by_name(images)
    if not found:
        raise DatasetError(f"{images} holds no images: unpack the data set there")
    for name, paths in found.items():
        if len(paths) > 1:
            kinds = " and ".join(os.path.splitext(path)[1] for path in paths)
            raise DatasetError(f"{images} holds {name} twice, as {kinds}: remove one of them")
    if labels is None:
        return [(path, None) for (path,) in found.values()]
    known = _by_name(labels)
    return [
        (found[name][0], _pick_label(os.path.join(labels, label), known.get(label, ())))
        for name, label in _label_names(list(found), known, labels).items()
    ]


def _by_name(root: str | os.PathLike) -> dict[str, list[str]]:
    """Return the pictures of a folder by their path in it without suffix."""
    root, found = os.fspath(root), {}
    for path in list_pictures(root):
        name = os.path.splitext(path)[0][len(root) :].lstrip(os.sep)
        found.setdefault(name, []).append(path)
    return found


def _label_names(
    names: list[str], known: Mapping[str, list[str]], labels: str | os.PathLike
) -> dict[str, str]:
    """Return what the label of each image is called, of the files `known` in the folder `labels`.

    Where labels have no names of images in theirs, what all images have in common is left out.
    """
    # Beside the labels may be pictures of them.
    candidates = {name for name, paths in known.items() if not all(map(_is_jpeg, paths))}
    candidates = candidates or set(known)
    same = {name: name for name in names}
    if not candidates.isdisjoint(names):
        return same
    whole = {name: os.path.split(name) for name in names}
    if found := _find_way(whole, candidates, labels):
        return found
    cores = _without_common_parts(names)
    core_of = {name: ("", core) for name, core in zip(names, cores, strict=True)}
    if found := _find_way(core_of, candidates, labels, least=len(names)):
        example = f"{found[names[0]]} for {names[0]}"
        print(f"note: the labels in {labels} are called {example}, and so on", file=sys.stderr)
    return found or same


def _find_way(
    parts: Mapping[str, tuple[str, str]],
    candidates: set[str],
    labels: str | os.PathLike,
    least: int = 1,
) -> dict[str, str]:
    """Return the names of the labels, if they have the same before and behind a part of the names
    of their images.

    Args:
        parts: folder and part of the name of each image.
        candidates: names of labels.
        least: number of images, of the first 20, that must have such a label.
    """
    ways: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for name, (folder, part) in list(parts.items())[:20]:
        start = os.path.join(folder, "")
        way = re.compile(BEFORE + re.escape(part) + BEHIND)
        for label in sorted(candidates):
            if label.startswith(start) and (match := way.fullmatch(label, len(start))):
                ways[match.groups()] += 1
                examples.setdefault(match.groups(), f"{label} for {name}")
    most = max([min(least, 20), *ways.values()])
    best = [way for way, count in ways.items() if count == most]
    if len(best) > 1:
        several = " or ".join(examples[way] for way in best[:3])
        raise DatasetError(
            f"{labels} holds {several}: name each label as its image, or remove the other"
        )
    return {
        name: os.path.join(folder, before + part + behind)
        for name, (folder, part) in parts.items()
        for before, behind in best
    }


def _without_common_parts(names: Sequence[str]) -> list[str]:
    """Return names without the words, numbers and signs that all begin and end with."""
    words = [re.findall(r"[^\W\d_]+|\d+|[\W_]", name) for name in names]
    for _ in range(2):  # from the beginning, then from the end
        alike = takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
        common = len(list(alike))
        words = [name[common:][::-1] for name in words]
    return ["".join(name) for name in words]


def _pick_label(expected: str, paths: Sequence[str]) -> str:
    """Return which of the pictures of one name is the label, or its expected path if none is."""
    plain = f"{expected}.png"
    lossless = [path for path in paths if not _is_jpeg(path)]
    if plain in paths or not paths:
        return plain
    if not lossless:
        raise DatasetError(
            f"{paths[0]} is a JPEG, which blurs class ids: save the labels as PNG from their source"
        )
    if len(lossless) > 1:
        raise DatasetError(f"{lossless[0]} and {lossless[1]} are labels of one image: remove one")
    return lossless[0]


def _is_jpeg(path: str) -> bool:
    return suffix_of(path) in JPEG_SUFFIXES
