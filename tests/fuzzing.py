"""Random damage to image and label files."""

import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

LABEL_IDS = (*range(34), 255)  # those of Cityscapes
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_MODES = {"RGB": 2, "L": 0, "RGBA": 6, "LA": 4, "I;16": 0}  # and the number PNG gives them
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)]
ADAM7 += [(0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]

Chunks = list[tuple[bytes, bytes]]


@dataclass
class Fuzzed:
    """A damaged file."""

    path: Path
    how: str  # it was made and damaged
    size: tuple[int, int]  # width and height that it declares
    pixels: np.ndarray | None  # before the damage; None if the damage gives it valid other ones


def fuzzed_file(random: Random, folder: Path, kind: str) -> Fuzzed:
    """Write a small image, "png", "jpeg" or "label", a PNG of label ids, and damage it."""
    size = random.randint(1, 80), random.randint(1, 80)
    if kind == "jpeg":
        data, how = jpeg_file(random, size)
        damages = [flip, cut, zero_tail, end_early_jpeg, resize_jpeg, nothing]
    else:
        data, how = png_file(random, size, kind == "label")
        damages = [flip, cut, zero_tail, nothing]
        damages += [drop, double, swap, resize_png, end_early_png, change_mode, add_text]
        damages += [change_ids] * (kind == "label")
    pixels = decoded(data, kind)
    damage = random.choice([*damages, random_bytes, empty, text])
    data = damage(random, data)
    if damage in (resize_png, resize_jpeg, change_mode, change_ids):
        pixels = None
    if damage in (resize_png, resize_jpeg):
        size = declared_size(data)
    suffix = random.choice([".png", ".jpg"]) if random.random() < 0.2 else f".{kind[:3]}"
    path = folder / f"fuzzed{'.png' if kind == 'label' else suffix}"
    path.write_bytes(data)
    return Fuzzed(path, f"{how}, {damage.__name__}", size, pixels)


def decoded(data: bytes, kind: str) -> np.ndarray:
    """Return the pixels of a sound file, as they should be read."""
    with Image.open(BytesIO(data)) as image:
        if kind == "label":
            return np.array(image)
        if image.mode == "I;16":
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.stack([grey] * 3, -1)
        return np.array(image.convert("RGB"))


# Sound files


def png_file(random: Random, size: tuple[int, int], label: bool) -> tuple[bytes, str]:
    """Make a PNG of random pixels, in several chunks among others; some are interlaced."""
    mode = "L" if label else random.choice([*PNG_MODES])
    width, height = size
    channels = {"RGB": 3, "RGBA": 4, "LA": 2}.get(mode, 1)
    noise = np.random.default_rng(random.getrandbits(32))
    if label:
        pixels = noise.choice(LABEL_IDS, (height, width)).astype(np.uint8)
        if random.random() < 0.5:
            pixels[height // 2 :] = 0  # as in real labels, where the floor is 0
    else:
        pixels = noise.integers(0, 256, (height, width, channels)).astype(np.uint8)
    if mode == "I;16":
        pixels = np.repeat(pixels, 2, axis=2)
    interlaced = random.random() < 0.2
    rows = b""
    for left, top, across, down in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        part = pixels[top::down, left::across]
        if part.size:
            rows += b"".join(b"\0" + row.tobytes() for row in part)
    bits = 16 if mode == "I;16" else 8
    head = struct.pack(">II5B", *size, bits, PNG_MODES[mode], 0, 0, interlaced)
    stream = zlib.compress(rows, random.choice([0, 1, 9]))
    step = max(1, len(stream) // random.randint(1, 4))
    parts = [stream[start : start + step] for start in range(0, len(stream), step)]
    chunks = [(b"IHDR", head), (b"tEXt", b"Title\0a picture"), *((b"IDAT", p) for p in parts)]
    chunks += [(b"tIME", bytes([7, 232, 1, 1, 0, 0, 0])), (b"IEND", b"")]
    return joined(chunks), f"{mode} png{', interlaced' * interlaced}"


def jpeg_file(random: Random, size: tuple[int, int]) -> tuple[bytes, str]:
    """Make a JPEG of random pixels, of any mode and coding."""
    noise = np.random.default_rng(random.getrandbits(32))
    mode = random.choice(["RGB", "RGB", "L", "CMYK"])
    shape = (size[1], size[0], {"RGB": 3, "L": 1, "CMYK": 4}[mode])
    pixels = noise.integers(0, 256, shape).astype(np.uint8).squeeze(2 if mode == "L" else ())
    ways = {
        "quality": random.choice([50, 75, 95]),
        "progressive": random.random() < 0.3,
        "optimize": random.random() < 0.3,
        "subsampling": random.choice([0, 1, 2]),
    }
    file = BytesIO()
    Image.fromarray(pixels, mode if mode == "CMYK" else None).save(file, "JPEG", **ways)
    return file.getvalue(), f"{mode} jpeg{', progressive' * ways['progressive']}"


# Damage to any file


def nothing(random: Random, data: bytes) -> bytes:
    return data


def flip(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(random: Random, data: bytes) -> bytes:
    return data[: random.randrange(len(data))]


def zero_tail(random: Random, data: bytes) -> bytes:
    start = random.randrange(len(data))
    return data[:start] + bytes(len(data) - start)


def random_bytes(random: Random, data: bytes) -> bytes:
    """Random bytes after a valid start, or not."""
    return data[: random.choice([0, 8, 33, 100])] + random.randbytes(random.randint(1, 300))


def empty(random: Random, data: bytes) -> bytes:
    return b""


def text(random: Random, data: bytes) -> bytes:
    return b"<html>404 Not Found</html>"


# Damage to a PNG, with valid checksums


def chunks_of(data: bytes) -> Chunks:
    chunks, start = [], 8
    while start < len(data):
        length = int.from_bytes(data[start : start + 4], "big")
        chunks.append((data[start + 4 : start + 8], data[start + 8 : start + 8 + length]))
        start += 12 + length
    return chunks


def joined(chunks: Chunks) -> bytes:
    return PNG_START + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def drop(random: Random, data: bytes) -> bytes:
    chunks = chunks_of(data)
    del chunks[random.randrange(len(chunks))]
    return joined(chunks)


def double(random: Random, data: bytes) -> bytes:
    chunks = chunks_of(data)
    place = random.randrange(len(chunks))
    return joined([*chunks[:place], chunks[place], *chunks[place:]])


def swap(random: Random, data: bytes) -> bytes:
    chunks = chunks_of(data)
    a, b = random.randrange(len(chunks)), random.randrange(len(chunks))
    chunks[a], chunks[b] = chunks[b], chunks[a]
    return joined(chunks)


def resize_png(random: Random, data: bytes) -> bytes:
    chunks = chunks_of(data)
    sides = [random.choice([side, 0, 1, side - 1, side + 1, 2 * side, 9_500, 2**31 - 1])
             for side in struct.unpack(">II", chunks[0][1][:8])]  # fmt: skip
    chunks[0] = (b"IHDR", struct.pack(">II", *sides) + chunks[0][1][8:])
    return joined(chunks)


def change_mode(random: Random, data: bytes) -> bytes:
    chunks = chunks_of(data)
    bits, color = random.choice([1, 2, 4, 8, 16, 3]), random.choice([0, 2, 3, 4, 6, 1])
    chunks[0] = (b"IHDR", chunks[0][1][:8] + bytes([bits, color]) + chunks[0][1][10:])
    return joined(chunks)


def end_early_png(random: Random, data: bytes) -> bytes:
    """The compressed pixels end properly after some rows, or anywhere."""
    chunks = chunks_of(data)
    width, height, bits, color = struct.unpack(">IIBB", chunks[0][1][:10])
    row = 1 + width * bits // 8 * {0: 1, 2: 3, 4: 2, 6: 4}[color]
    raw = zlib.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT"))
    end = row * random.randrange(height) if random.random() < 0.7 else random.randrange(len(raw))
    kept = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
    return joined([*kept[:2], (b"IDAT", zlib.compress(raw[:end])), *kept[2:]])


def add_text(random: Random, data: bytes) -> bytes:
    """Texts and profiles that are much larger than their file."""
    chunks, large = chunks_of(data), zlib.compress(bytes(3_000_000))
    bomb = random.choice(
        [
            (b"zTXt", b"a\0\0" + large),
            (b"iTXt", b"a\0\1\0\0\0" + large),
            (b"iCCP", b"a\0\0" + large),
            (b"zTXt", b"a\0\0broken"),
            (b"eXIf", random.randbytes(50)),
        ]
    )
    place = random.choice([1, len(chunks) - 1])
    return joined([*chunks[:place], bomb, *chunks[place:]])


def change_ids(random: Random, data: bytes) -> bytes:
    """Unknown label ids."""
    with Image.open(BytesIO(data)) as label:
        ids = np.array(label)
    ids[random.randrange(len(ids))] = random.randrange(256)
    file = BytesIO()
    Image.fromarray(ids).save(file, "PNG")
    return file.getvalue()


# Damage to a JPEG


def end_early_jpeg(random: Random, data: bytes) -> bytes:
    """The data end anywhere after the header, and an end marker follows."""
    start = data.index(b"\xff\xda") + 10
    return data[: random.randint(start, max(start, len(data) - 3))] + b"\xff\xd9"


def resize_jpeg(random: Random, data: bytes) -> bytes:
    place = frame_of(data)
    sides = [random.choice([side, 0, 1, side - 1, side + 1, 2 * side, 9_500, 65_500])
             for side in struct.unpack(">HH", data[place : place + 4])]  # fmt: skip
    return data[:place] + struct.pack(">HH", *sides) + data[place + 4 :]


def frame_of(data: bytes) -> int:
    """Return the position of a JPEG's height and width."""
    return max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5


def declared_size(data: bytes) -> tuple[int, int]:
    if data.startswith(PNG_START):
        return struct.unpack(">II", data[16:24])
    height, width = struct.unpack(">HH", data[frame_of(data) : frame_of(data) + 4])
    return width, height
