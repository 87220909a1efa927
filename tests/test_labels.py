"""Label maps of every kind of file: the ids that are meant, or one line that says what is wrong."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from fuzzing import joined
from PIL import Image

from datasets.check import check_file
from datasets.images import FileError
from datasets.labels import read_label

IDS = np.array([[0, 1, 2], [2, 2, 0]], np.uint8)
COLORS = {(0, 0, 0): 0, (128, 64, 128): 1, (70, 130, 180): 2}
PALETTE = [list(color) for color in COLORS]
OTHER = [[9, 9, 8], [7, 1, 1], [3, 2, 2]]  # colours of no class
GREY = [[value] * 3 for value in range(256)]


@pytest.fixture
def saved(tmp_path):
    """A function that saves an image, and returns its path after the quick check."""

    def save(image: Image.Image, name: str = "label.png", **options) -> str:
        path = str(tmp_path / name)
        image.save(path, **options)
        check_file(path, label=True)
        return path

    return save


def indexed(palette: list[list[int]], indices: np.ndarray = IDS) -> Image.Image:
    image = Image.fromarray(indices)
    image.putpalette(np.array(palette, np.uint8).tobytes())
    assert image.mode == "P"
    return image


def reordered(order: list[int], palette: list[list[int]]) -> Image.Image:
    """An image of IDS whose palette has another order."""
    return indexed([palette[i] for i in order], np.argsort(order).astype(np.uint8)[IDS])


def refusal(path: str, *args) -> FileError:
    with pytest.raises(FileError, match=path) as error:
        read_label(path, *args)
    assert "\n" not in str(error.value)
    return error.value


# Grey


@pytest.mark.parametrize("name", ["label.png", "label.tif", "label.bmp"])
def test_grey_pixels_are_ids(saved, name):
    label = read_label(saved(Image.fromarray(IDS), name))
    assert (label.ids == IDS).all() and label.ids.dtype == np.uint8 and not label.colors


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_ids_of_few_bits_are_read_as_they_are_stored(tmp_path, bits):
    """PIL scales them to 0 to 255."""
    path, ids = tmp_path / "label.png", np.arange(8, dtype=np.uint8).reshape(2, 4) % 2**bits
    packed = [int("".join(f"{value:0{bits}b}" for value in row).ljust(16, "0"), 2) for row in ids]
    rows = b"".join(b"\0" + struct.pack(">H", row)[: -(-4 * bits // 8)] for row in packed)
    head = struct.pack(">II5B", 4, 2, bits, 0, 0, 0, 0)
    path.write_bytes(joined([(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]))
    check_file(str(path), label=True)
    assert (read_label(str(path), range(2**bits)).ids == ids).all()
    # Where only the scaled values are ids, a program has shrunk the file.
    scale = 255 // (2**bits - 1)
    known = range(0, 256, scale)
    assert (read_label(str(path), known).ids == ids * scale).all()


def test_wide_pixels_may_hold_small_ids(saved):
    for mode, name in (("I;16", "16.png"), ("I;16", "16.tif"), ("I", "32.tif")):
        path = saved(Image.fromarray(IDS.astype(np.int32)).convert(mode), name)
        label = read_label(path)
        assert (label.ids == IDS).all() and label.ids.dtype == np.uint8
    path = saved(Image.fromarray(IDS.astype(np.uint16) * 500))
    error = refusal(path)
    assert "holds the label id 1000: ids are 0 to 255" in str(error)
    assert error.problem == "unknown label"


def write_tiff(path: Path, ids: np.ndarray, bits: int, photometric: int) -> None:
    """Write grey pixels of 1 to 8 bits; a photometric interpretation of 0: white is 0."""
    height, width = ids.shape
    binary = ("".join(f"{value:0{bits}b}" for value in row).ljust(16 * bits, "0") for row in ids)
    pixels = b"".join(
        int(row, 2).to_bytes(2 * bits, "big")[: -(-width * bits // 8)] for row in binary
    )
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1}
    tags |= {278: height, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + directory)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("photometric", [0, 1])
def test_ids_are_read_as_they_are_stored_where_white_is_0(tmp_path, bits, photometric):
    """PIL turns their values around; so do some programs as they write them."""
    path = tmp_path / "label.tif"
    write_tiff(path, IDS, bits, photometric)
    check_file(str(path), label=True)
    assert (read_label(str(path), range(3)).ids == IDS).all()
    shown = np.array(Image.open(path))
    assert (shown == IDS).all() == (bits == 8 and photometric == 1)
    assert (read_label(str(path), np.unique(shown).tolist()).ids == shown).all()


@pytest.mark.parametrize("name", ["mask.pbm", "mask.tif"])
def test_masks_whose_white_is_stored_as_0_need_colours(tmp_path, name):
    mask = IDS == 1
    path = str(tmp_path / name)
    if name == "mask.tif":
        write_tiff(Path(path), 1 - mask, 1, 0)
    else:
        Image.fromarray(mask).save(path)
    error = refusal(path, range(2))
    assert "stores white as 0 and black as 1: give the classes their colours" in str(error)
    colors = {(255, 255, 255): 1, (0, 0, 0): 0}
    assert (read_label(path, range(2), colors).ids == mask).all()
    assert (read_label(path, [0, 255]).ids == mask * 255).all()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("white", [1, 2, 7, 19, 254, 255, 300, 65535])
def test_a_pgm_holds_ids_whatever_it_calls_white(tmp_path, plain, white):
    """PIL scales them to 0 to 255, or 65535."""
    path, ids = tmp_path / "label.pgm", np.linspace(0, min(white, 255), 6).astype(int).reshape(2, 3)
    kind = ">u2" if white > 255 else "u1"
    pixels = " ".join(map(str, ids.ravel())).encode() if plain else ids.astype(kind).tobytes()
    path.write_bytes(f"P{2 if plain else 5} 3 2 {white}\n".encode() + pixels)
    check_file(str(path), label=True)
    assert (read_label(str(path)).ids == ids).all()
    path.write_bytes(b"P2 1 1 1000\n300")
    assert "holds the label id 300" in str(refusal(str(path)))


def test_transparency_is_dropped(saved):
    grey = Image.fromarray(IDS)
    grey.putalpha(7)
    assert grey.mode == "LA" and (read_label(saved(grey)).ids == IDS).all()


# Colours


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("name", ["label.png", "label.tif"])
def test_colours_are_those_of_the_classes(saved, mode, name):
    image = Image.fromarray(np.array(PALETTE, np.uint8)[IDS]).convert(mode)
    label = read_label(saved(image, name), range(3), COLORS)
    assert (label.ids == IDS).all() and label.ids.dtype == np.uint8


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("colors", [{}, COLORS])
def test_three_equal_channels_are_ids(saved, mode, colors):
    path = saved(Image.fromarray(IDS).convert(mode))
    assert (read_label(path, range(3), colors).ids == IDS).all()


def test_grey_colours_of_classes_are_colours(saved):
    path = saved(Image.fromarray(IDS * 127).convert("RGB"))
    assert (read_label(path, range(3), {(v * 127,) * 3: v for v in range(3)}).ids == IDS).all()


def test_unknown_colours_are_named(saved):
    pixels = np.array(PALETTE, np.uint8)[IDS]
    error = refusal(saved(Image.fromarray(pixels)), range(3), {})
    assert "holds the colour (0, 0, 0) and 2 others, which are of no class" in str(error)
    pixels[0, 0] = 1, 2, 3
    error = refusal(saved(Image.fromarray(pixels)), range(3), COLORS)
    assert "holds the colour (1, 2, 3), which is of no class" in str(error)
    assert "`void 1 2 3`" in str(error) and error.problem == "unknown colour"


# Palettes


@pytest.mark.parametrize("palette", [PALETTE, OTHER, GREY, GREY[:3]])
@pytest.mark.parametrize("colors", [{}, COLORS])
def test_indices_of_a_palette_are_ids(saved, palette, colors):
    assert (read_label(saved(indexed(palette)), range(3), colors).ids == IDS).all()


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2], [0, 2, 1]])
@pytest.mark.parametrize("name", ["label.png", "label.gif", "label.tif"])
def test_colours_of_a_palette_decide(saved, order, name):
    """Drawing programs, and those that shrink PNGs, write them in any order."""
    path = saved(reordered(order, PALETTE), name)
    assert (read_label(path, range(3), COLORS).ids == IDS).all()
    if name != "label.gif":
        assert (read_label(path, range(3)).ids == np.argsort(order)[IDS]).all()


def test_only_colours_that_are_used_count(saved):
    palette = [PALETTE[2], [250, 0, 0], PALETTE[0], PALETTE[1]]
    path = saved(indexed(palette, np.array([2, 3, 0], np.uint8)[IDS]))
    assert (read_label(path, range(3), COLORS).ids == IDS).all()


def test_a_palette_that_mixes_colours_of_classes_with_others_is_refused(saved):
    error = refusal(saved(indexed([PALETTE[1], [250, 0, 0], PALETTE[0]])), range(3), COLORS)
    assert "a palette in another order than the classes, and (250, 0, 0)" in str(error)


def test_greys_of_a_palette_in_another_order_are_ids(saved):
    greys = [[255] * 3, [2] * 3, [0] * 3, [1] * 3]
    path = saved(indexed(greys, np.array([2, 3, 0], np.uint8)[IDS]))
    assert (read_label(path, range(3)).ids == [[0, 1, 255], [255, 255, 0]]).all()
    path = saved(reordered([2, 0, 1], [[0] * 3, [60] * 3, [120] * 3]))
    assert (read_label(path, [0, 60, 120]).ids == IDS * 60).all()


def test_greys_that_only_show_the_classes_are_not_ids(saved):
    path = saved(indexed([[0] * 3, [85] * 3, [170] * 3, [255] * 3], IDS // 2 * 3))
    assert (read_label(path, range(4)).ids == IDS // 2 * 3).all()


@pytest.mark.parametrize("as_palette", [True, False])
def test_black_and_white_are_0_and_1_or_0_and_255(saved, as_palette):
    mask = IDS == 1
    image = Image.fromarray(mask)
    if as_palette:
        image = indexed([[0] * 3, [255] * 3], mask.astype(np.uint8))
    path = saved(image)
    assert (read_label(path, [0, 1]).ids == mask).all()
    assert (read_label(path, [0, 255]).ids == mask * 255).all()
    colors = {(255, 255, 255): 0, (0, 0, 0): 1}
    assert (read_label(path, [0, 1], colors).ids == ~mask).all()


def test_white_before_black_is_refused_unless_it_is_known(saved):
    path = saved(indexed([[255] * 3, [0] * 3], (IDS == 1).astype(np.uint8)))
    assert "a palette that begins with white" in str(refusal(path, [0, 1]))
    colors = {(255, 255, 255): 0, (0, 0, 0): 1}
    assert (read_label(path, [0, 1], colors).ids == (IDS == 1)).all()
    assert (read_label(path, [0, 255]).ids == (IDS != 1) * 255).all()


def test_palettes_are_told_where_their_indices_are_ids(saved):
    def colors_of(palette, *args) -> set:
        label = read_label(saved(indexed(palette)), range(3), *args)
        assert (label.ids == IDS).all()
        return set(label.colors)

    used = set(enumerate(map(tuple, OTHER)))
    assert colors_of(OTHER) == colors_of([*OTHER, [7, 7, 9]]) == used
    assert colors_of(PALETTE, COLORS) == {(value, color) for color, value in COLORS.items()}
    # Greys that are the ids say nothing of a palette, nor does an index beyond its colours.
    assert colors_of(GREY) == colors_of(GREY[:3]) == set()
    assert not read_label(saved(reordered([2, 0, 1], GREY[:3])), range(3)).colors
    path = saved(indexed(OTHER * 6, np.array([0, 1, 255], np.uint8)[IDS]))
    assert set(read_label(path).colors) == {(0, (9, 9, 8)), (1, (7, 1, 1))}


# Files that cannot hold ids


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "JPEG2000", "TIFF"])
def test_lossy_files_are_refused_whatever_their_name(tmp_path, kind):
    path = str(tmp_path / "label.png")
    options = {"compression": "jpeg"} if kind == "TIFF" else {}
    Image.fromarray(np.kron(IDS, np.ones((16, 16), np.uint8))).save(path, kind, **options)
    error = refusal(path)
    assert f"is a {kind} file, whose compression changes label ids" in str(error)
    assert error.problem == "lossy label"
    with pytest.raises(FileError, match="whose compression changes"):
        check_file(path, label=True)


@pytest.mark.parametrize("options", [{}, {"icc_profile": b"odd"}, {"alpha": True}])
def test_lossless_webp_is_read(saved, options):
    image = Image.fromarray(np.array(PALETTE, np.uint8)[IDS])
    if options.pop("alpha", False):
        image.putalpha(Image.fromarray(IDS + 1))
    path = saved(image, "label.webp", lossless=True, **options)
    assert (read_label(path, range(3), COLORS).ids == IDS).all()
    image.save(path, **options)
    assert "is a WEBP file, whose compression changes" in str(refusal(path, range(3), COLORS))


def test_other_pixels_are_refused(tmp_path):
    for mode, name in (("F", "f.tif"), ("CMYK", "cmyk.tif")):
        path = str(tmp_path / name)
        Image.new(mode, (8, 6)).save(path)
        error = refusal(path)
        assert f"pixels of mode {mode}" in str(error) and error.problem == "wrong mode"
        with pytest.raises(FileError, match="pixels of mode"):
            check_file(path, label=True)


def test_colours_of_16_bits_are_refused(tmp_path):
    """PIL keeps their high bytes, in which small ids are 0."""
    path, row = Path(tmp_path / "label.png"), b"\0" + struct.pack(">3H", 1, 1, 1)
    head = struct.pack(">II5B", 1, 1, 16, 2, 0, 0, 0)
    path.write_bytes(joined([(b"IHDR", head), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]))
    assert "pixels of mode RGB;16B" in str(refusal(str(path)))
