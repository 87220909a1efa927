"""Draw one street scene, with its labels, from a random generator.

The scene is a simple world in metres: a camera above a straight street looks along it, X to
the right, Y up, Z ahead. Surfaces and objects are drawn from far to near, so that they hide
one another as in a photograph. Colours overlap between the classes on purpose, light, haze
and noise vary, so that a network has to learn shape, texture and place.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from torchvision.datasets import Cityscapes

CLASSES = {c.name: c for c in Cityscapes.classes}
LABEL_ID = {name: c.id for name, c in CLASSES.items()}

Color = tuple[int, int, int]
Point = tuple[float, float]

# Amplitude of the (fine, coarse) noise that gives each class its texture, in grey levels.
TEXTURE = {
    "vegetation": (22, 26),
    "terrain": (18, 8),
    "road": (7, 5),
    "sidewalk": (5, 7),
    "building": (4, 8),
    "wall": (12, 5),
    "sky": (0, 0),
}
PLAIN_TEXTURE = (3, 3)

CIRCLE = [(np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * np.pi, 16, endpoint=False)]


@dataclass(frozen=True)
class Scene:
    """One drawn image with its ground truth, as Cityscapes stores them."""

    image: np.ndarray  # H x W x 3, uint8, RGB
    label_ids: np.ndarray  # H x W, uint8, ids of Cityscapes' label table
    # H x W, uint16: the label id, or label id * 1000 + n for instance n of a class that has some.
    instance_ids: np.ndarray


def draw_scene(rng: np.random.Generator, height: int) -> Scene:
    """Draw a scene of `height` x 2 `height` pixels; the same generator state draws the same."""
    street = Street(rng, height)
    street.draw_backdrop()
    street.draw_ground()
    for side in (-1, 1):
        street.draw_frontage(side)
    street.draw_objects()
    street.draw_bonnet()
    return street.develop()


class Street:
    """The camera, the layout of one street, and the canvas that it is drawn on."""

    def __init__(self, rng: np.random.Generator, height: int) -> None:
        self.rng = rng
        self.height, self.width = height, 2 * height
        self.focal = height * rng.uniform(1.0, 1.25)
        self.camera_height = rng.uniform(1.3, 2.0)
        self.horizon = height * rng.uniform(0.38, 0.5)
        self.vanishing_x = self.width * rng.uniform(0.38, 0.62)

        offset = rng.uniform(-1.5, 1.5)  # of the camera from the middle of the road
        half = rng.uniform(4.0, 6.0)
        self.road = (-half - offset, half - offset)
        self.sidewalk_width = {side: rng.uniform(2.0, 4.0) for side in (-1, 1)}
        self.terrain_width = {
            side: rng.uniform(3, 7) if rng.random() < 0.7 else 0 for side in (-1, 1)
        }

        self.haze: Color = self.jitter((196, 204, 214), 25)
        self.haze_distance = rng.uniform(50, 160)
        self.rgb = Image.new("RGB", (self.width, height), self.haze)
        self.instances = Image.new("I", self.rgb.size, LABEL_ID["sky"])
        self.instance_numbers = defaultdict(count)

    # Colours and shapes

    def jitter(self, color: Sequence[float], amount: float) -> Color:
        """Move each channel of a colour at random by up to `amount` grey levels."""
        moved = np.asarray(color) + self.rng.uniform(-amount, amount, 3)
        return tuple(int(v) for v in np.clip(moved, 0, 255))

    def pick(self, amount: float, *colors: Color) -> Color:
        """Pick one of some colours, and jitter it."""
        return self.jitter(colors[self.rng.integers(len(colors))], amount)

    def paint_color(self) -> Color:
        """Pick the colour of a car, a jacket or a sign: anything, greys more often."""
        if self.rng.random() < 0.4:
            return self.jitter([self.rng.uniform(25, 235)] * 3, 10)
        return tuple(int(v) for v in self.rng.integers(20, 235, 3))

    def project(self, x: float, y: float, z: float) -> Point:
        """Project a point of the world, in metres, to pixel coordinates."""
        scale = self.focal / z
        return self.vanishing_x + x * scale, self.horizon + (self.camera_height - y) * scale

    def new_instance(self, name: str) -> int:
        """Return the instance id of the next object of a class."""
        return LABEL_ID[name] * 1000 + next(self.instance_numbers[name])

    def fill(self, points: Sequence[Point], color: Color, z: float, instance: int) -> None:
        """Fill a polygon at distance z, in the picture and in the ground truth."""
        ImageDraw.Draw(self.instances).polygon(points, fill=instance)
        self.tint(points, color, z)

    def tint(self, points: Sequence[Point], color: Color, z: float) -> None:
        """Fill a polygon in the picture only, as a detail of the object below."""
        clear = np.exp(-z / self.haze_distance)
        mixed = (int(clear * c + (1 - clear) * h) for c, h in zip(color, self.haze, strict=True))
        ImageDraw.Draw(self.rgb).polygon(points, fill=tuple(mixed))

    def rectangle(self, x0: float, x1: float, y0: float, y1: float, z: float) -> list[Point]:
        """Return a rectangle that faces the camera, in pixel coordinates."""
        return self.outline([(x0, y1), (x1, y1), (x1, y0), (x0, y0)], 0, z)

    def panel(self, x: float, z0: float, z1: float, y0: float, y1: float) -> list[Point]:
        """Return an upright rectangle along the street, in pixel coordinates."""
        return [self.project(x, y, z) for y, z in ((y1, z0), (y1, z1), (y0, z1), (y0, z0))]

    def slab(self, x0: float, x1: float, y: float, z0: float, z1: float) -> list[Point]:
        """Return a level rectangle, in pixel coordinates."""
        return [self.project(x, y, z) for x, z in ((x0, z0), (x0, z1), (x1, z1), (x1, z0))]

    def disc(self, x: float, y: float, radius: float, z: float, stretch: float = 1) -> list[Point]:
        """Return a disc that faces the camera, `stretch` times as high as wide."""
        rim = [(radius * cos, y + radius * stretch * sin) for cos, sin in CIRCLE]
        return self.outline(rim, x, z)

    def outline(self, points: Sequence[Point], x: float, z: float) -> list[Point]:
        """Return a shape that faces the camera, in pixel coordinates; `points` start from x."""
        return [self.project(x + px, py, z) for px, py in points]

    # The surroundings

    def draw_backdrop(self) -> None:
        """Draw the sky with clouds, and a skyline on the horizon."""
        rng = self.rng
        top = np.asarray(self.pick(25, (90, 140, 205), (150, 155, 165), (205, 170, 140)))
        rows = np.clip(np.arange(self.height) / self.horizon, 0, 1)[:, None, None]
        sky = top * (1 - rows) + np.asarray(self.haze) * rows
        clouds = np.clip(smooth_noise(rng, self.height, self.width, 10), 0, None)
        sky = sky + clouds[..., None] * rng.uniform(5, 35)
        self.rgb.paste(Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8)))

        x = -60.0
        while x < 60:
            width = rng.uniform(8, 20)
            if rng.random() < 0.5:
                color = self.jitter((125, 118, 112), 30)
                shape = self.rectangle(x, x + width, 0, rng.uniform(6, 16), 75)
                self.fill(shape, color, 75, LABEL_ID["building"])
            else:
                color = self.jitter((62, 88, 48), 20)
                shape = self.disc(x + width / 2, 2, width / 2, 75, stretch=0.8)
                self.fill(shape, color, 75, LABEL_ID["vegetation"])
            x += width * 0.8

    def draw_ground(self) -> None:
        """Draw the road with markings, sidewalks with paving, and terrain, pixel by pixel."""
        rng = self.rng
        first = int(self.horizon) + 1
        rows, columns = np.mgrid[first : self.height, 0 : self.width].astype(np.float32)
        z = self.focal * self.camera_height / (rows + 0.5 - self.horizon)
        x = (columns + 0.5 - self.vanishing_x) * z / self.focal
        left, right = self.road
        on_road = (x > left) & (x < right)
        sidewalk = (x > left - self.sidewalk_width[-1]) & (x < right + self.sidewalk_width[1])
        sidewalk &= ~on_road

        grey = rng.uniform(70, 130)
        asphalt = self.jitter([grey] * 3, 8)
        paving = self.jitter([grey + rng.uniform(-15, 45)] * 3, 14)
        grass = self.pick(18, (84, 108, 52), (128, 112, 72))
        color = np.full((*x.shape, 3), grass, np.float32)
        color[sidewalk] = paving
        color[on_road] = asphalt

        slab = rng.uniform(0.5, 0.9)
        joints = sidewalk & (((x % slab) < 0.07) | ((z % slab) < 0.1)) & (z < 25)
        color[joints] *= 0.7
        curb = sidewalk & ((x > left - 0.22) & (x < right + 0.22))
        color[curb] = np.minimum(color[curb] + 35, 255)

        middle = (left + right) / 2
        marking = on_road & (np.abs(x - middle) < 0.09) & ((z + rng.uniform(0, 6)) % 6 < 3)
        marking |= on_road & ((np.abs(x - left - 0.35) < 0.07) | (np.abs(x - right + 0.35) < 0.07))
        if rng.random() < 0.4:  # a crossing
            start = rng.uniform(7, 16)
            marking |= on_road & (z > start) & (z < start + 3) & (x % 1.0 < 0.5)
        color[marking] = self.jitter((215, 212, 205), 15)

        for _ in range(rng.integers(0, 4)):  # shadows across the street
            start, length = rng.uniform(4, 30), rng.uniform(1, 6)
            color[((z + 0.4 * x) > start) & ((z + 0.4 * x) < start + length)] *= 0.62

        clear = np.exp(-z / self.haze_distance)[..., None]
        color = clear * color + (1 - clear) * np.asarray(self.haze)
        label_ids = np.full(x.shape, LABEL_ID["terrain"], np.int32)
        label_ids[sidewalk] = LABEL_ID["sidewalk"]
        label_ids[on_road] = LABEL_ID["road"]
        self.rgb.paste(Image.fromarray(np.clip(color, 0, 255).astype(np.uint8)), (0, first))
        self.instances.paste(Image.fromarray(label_ids), (0, first))

    def edge(self, side: int) -> float:
        """Return x where the frontage of a side begins."""
        curb = self.road[0] if side < 0 else self.road[1]
        return curb + side * (self.sidewalk_width[side] + self.terrain_width[side])

    def draw_frontage(self, side: int) -> None:
        """Draw buildings, walls, fences, hedges and trees along one side of the street."""
        rng = self.rng
        segments = []
        z = rng.uniform(2.0, 4.0)
        while z < 70:
            length = rng.uniform(7, 16)
            kind = rng.choice(["building", "wall", "fence", "vegetation"], p=[0.45, 0.2, 0.2, 0.15])
            segments.append((z, z + length, kind))
            z += length
        x = self.edge(side)
        for z0, z1, kind in reversed(segments):
            if kind == "building":
                self.draw_building(x, side, z0, z1)
                continue
            for tree_z in np.sort(rng.uniform(z0, z1, rng.integers(0, 3)))[::-1]:
                self.draw_tree(x + side * rng.uniform(1, 4), tree_z + 0.5)
            if kind == "vegetation":
                for bush_z in np.arange(z1, z0, -1.2):
                    self.draw_foliage(x + side * 0.8, rng.uniform(0.4, 0.9), 1.1, bush_z)
            elif kind == "wall":
                self.draw_wall(x, z0, z1)
            else:
                self.draw_fence(x, z0, z1)

    def draw_building(self, x: float, side: int, z0: float, z1: float) -> None:
        rng = self.rng
        color = self.pick(28, (150, 130, 112), (122, 92, 80), (176, 172, 164), (110, 112, 118))
        instance = LABEL_ID["building"]
        storeys = rng.integers(2, 6)
        top = storeys * 3.2 + 0.8
        gable = self.rectangle(*sorted((x, x + side * 12)), 0, top, z0)
        self.fill(gable, shade(color, 0.8), z0, instance)
        self.fill(self.panel(x, z0, z1, 0, top), color, (z0 + z1) / 2, instance)
        glass = self.jitter((58, 66, 78), 30)
        step = rng.uniform(2.0, 3.0)
        sills = [storey * 3.2 + 1.0 for storey in range(storeys)]
        for z in np.arange(z0 + 0.7, z1 - 1.3, step):
            for y in sills:
                self.tint(self.panel(x, z, z + step * 0.5, y, y + 1.6), glass, z)
        for wx in np.arange(1, 11, 2.6) if z0 < 60 else ():
            window = sorted((x + side * wx, x + side * (wx + 1.2)))
            for y in sills:
                self.tint(self.rectangle(*window, y, y + 1.6, z0), glass, z0)

    def draw_wall(self, x: float, z0: float, z1: float) -> None:
        height = self.rng.uniform(1.8, 2.8)
        color = self.pick(18, (138, 96, 78), (132, 130, 126))
        mortar = shade(color, 0.72)
        self.fill(self.panel(x, z0, z1, 0, height), color, (z0 + z1) / 2, LABEL_ID["wall"])
        for y in np.arange(0.25, height, 0.4):
            self.tint(self.panel(x, z0, z1, y, y + 0.08), mortar, z0)
        for z in np.arange(z0, z1, 1.0):
            self.tint(self.panel(x, z, z + 0.1, 0, height), mortar, z)

    def draw_fence(self, x: float, z0: float, z1: float) -> None:
        """Draw bars; the gaps between them are labelled fence too, as annotators do."""
        height = self.rng.uniform(1.5, 2.2)
        color = self.pick(20, (70, 72, 74), (168, 160, 150), (96, 76, 58))
        outline = self.panel(x, z0, z1, 0, height)
        ImageDraw.Draw(self.instances).polygon(outline, fill=LABEL_ID["fence"])
        self.tint(self.panel(x, z0, z1, 0, 0.4), self.jitter((120, 118, 112), 15), z0)  # its base
        for y in (height * 0.55, height - 0.15):
            self.tint(self.panel(x, z0, z1, y, y + 0.15), color, z0)
        for z in np.arange(z0, z1, 0.55):
            self.tint(self.panel(x, z, z + 0.3, 0, height), color, z)

    def draw_tree(self, x: float, z: float) -> None:
        trunk = self.jitter((82, 66, 52), 15)
        self.fill(self.rectangle(x - 0.18, x + 0.18, 0, 3, z), trunk, z, LABEL_ID["vegetation"])
        self.draw_foliage(x, self.rng.uniform(3.6, 4.8), self.rng.uniform(1.4, 2.2), z)

    def draw_foliage(self, x: float, y: float, radius: float, z: float) -> None:
        rng = self.rng
        base = ((58, 92, 44), (92, 104, 48), (112, 84, 46))[rng.integers(3)]
        for _ in range(6):
            bx, by = x + rng.uniform(-0.6, 0.6) * radius, y + rng.uniform(-0.4, 0.6) * radius
            blob = self.disc(bx, by, radius * rng.uniform(0.4, 0.75), z)
            self.fill(blob, self.jitter(base, 16), z, LABEL_ID["vegetation"])

    # The objects

    def draw_objects(self) -> None:
        """Place vehicles, people and street furniture at random, then draw them far to near."""
        rng = self.rng
        left, right = self.road
        placed: list[tuple[float, str, float]] = []

        def place(name: str, chance: float, xs: tuple[float, float], zs: tuple[float, float]):
            if rng.random() < chance:
                placed.append((rng.uniform(*zs), name, rng.uniform(*xs)))

        # Vehicles keep to four lanes, so that few hide each other completely.
        vehicles, chances = ["car", "truck", "bus", "train", "none"], [0.34, 0.13, 0.13, 0.1, 0.3]
        for lane in np.linspace(left + 1.3, right - 1.3, 4):
            z = rng.uniform(6, 14)
            for _ in range(2):
                name = rng.choice(vehicles, p=chances)
                if name != "none":
                    placed.append((z, str(name), lane + rng.uniform(-0.3, 0.3)))
                z += rng.uniform(10, 18)
        for _ in range(2):
            place("bicycle", 0.35, (left + 0.8, right - 0.8), (4, 9))
            place("motorcycle", 0.35, (left + 0.8, right - 0.8), (4, 9))
        for side, curb in ((-1, left), (1, right)):
            far = curb + side * self.sidewalk_width[side]
            sidewalk = tuple(sorted((curb + side * 0.4, far)))
            for _ in range(3):
                place("person", 0.6, sidewalk, (4, 10))
            place("bicycle", 0.25, sidewalk, (4, 9))
            place("motorcycle", 0.25, sidewalk, (4, 9))
            for _ in range(2):
                place("pole", 0.45, sidewalk, (4, 12))
                place("traffic sign", 0.45, sidewalk, (4, 11))
                place("traffic light", 0.4, sidewalk, (4, 11))
            place("tree", 0.3, sidewalk, (9, 25))
            if self.terrain_width[side]:
                place("tree", 0.5, tuple(sorted((far, self.edge(side)))), (8, 25))
        for _ in range(2):
            place("person", 0.5, (left, right), (4, 10))

        for z, name, x in sorted(placed, reverse=True):
            getattr(self, f"draw_{name.replace(' ', '_')}")(x, z)

    def draw_box(self, instance: int, spans: Sequence[float], color: Color) -> None:
        """Draw the front, visible side and top of a block; spans are x0, x1, y0, y1, z0, z1."""
        x0, x1, y0, y1, z0, z1 = spans
        if x0 > 0 or x1 < 0:
            visible = self.panel(x0 if x0 > 0 else x1, z0, z1, y0, y1)
            self.fill(visible, shade(color, 0.7), z0, instance)
        if y1 < self.camera_height:
            self.fill(self.slab(x0, x1, y1, z0, z1), shade(color, 1.15), z0, instance)
        self.fill(self.rectangle(x0, x1, y0, y1, z0), color, z0, instance)

    def draw_wheels(self, instance: int, x: float, half: float, z: float) -> None:
        black = self.jitter((28, 28, 30), 8)
        for wx in (x - half, x + half - 0.3):
            self.fill(self.rectangle(wx, wx + 0.3, 0, 0.45, z), black, z, instance)

    def draw_lamps(self, x: float, half: float, y: float, z: float) -> None:
        """Draw two lamps: red from behind, white from the front."""
        color = ((190, 30, 30), (250, 245, 220))[self.rng.integers(2)]
        for wx in (x - half + 0.05, x + half - 0.35):
            self.tint(self.rectangle(wx, wx + 0.3, y, y + 0.2, z), color, z)

    def begin_vehicle(
        self, name: str, x: float, z: float, lengths: Sequence[float], heights: Sequence[float]
    ) -> tuple[int, float, float]:
        """Draw the shadow of a vehicle, and return its instance id, length and height."""
        length, height = self.rng.uniform(*lengths), self.rng.uniform(*heights)
        half = 1.0 if name == "car" else 1.3
        shadow = self.slab(x - half, x + half, 0, z - 0.2, z + length)
        self.tint(shadow, self.jitter((38, 38, 40), 6), z - 0.2)
        return self.new_instance(name), length, height

    def draw_car(self, x: float, z: float) -> None:
        color, glass = self.paint_color(), self.jitter((45, 52, 62), 15)
        instance, length, height = self.begin_vehicle("car", x, z, (3.6, 4.6), (1.4, 1.7))
        self.draw_wheels(instance, x, 0.9, z + length - 0.5)
        self.draw_box(instance, (x - 0.9, x + 0.9, 0.25, 0.9, z, z + length), color)
        cabin = (x - 0.72, x + 0.72, 0.85, height, z + 0.5, z + length - 0.8)
        self.draw_box(instance, cabin, color)
        self.tint(self.rectangle(x - 0.62, x + 0.62, 0.95, height - 0.1, z + 0.5), glass, z)
        if abs(x) > 0.72:
            side = x - 0.72 if x > 0 else x + 0.72
            self.tint(self.panel(side, z + 0.8, z + length - 1, 0.95, height - 0.1), glass, z)
        self.draw_wheels(instance, x, 0.9, z)
        self.draw_lamps(x, 0.9, 0.6, z)
        self.tint(self.rectangle(x - 0.26, x + 0.26, 0.4, 0.52, z), (225, 225, 215), z)

    def draw_truck(self, x: float, z: float) -> None:
        """Draw a plain cargo box without windows, on a dark chassis."""
        color, dark = self.paint_color(), self.jitter((48, 46, 46), 12)
        instance, length, height = self.begin_vehicle("truck", x, z, (6, 9), (3.0, 3.6))
        self.draw_box(instance, (x - 1.1, x + 1.1, 0.4, 1.0, z, z + length), dark)
        self.draw_box(instance, (x - 1.25, x + 1.25, 1.0, height, z, z + length), color)
        seam = shade(color, 0.6)
        self.tint(self.rectangle(x - 0.04, x + 0.04, 1.0, height, z), seam, z)
        for y in (1.1, height - 0.15):
            self.tint(self.rectangle(x - 1.2, x + 1.2, y, y + 0.08, z), seam, z)
        self.draw_wheels(instance, x, 1.15, z)
        self.draw_lamps(x, 1.1, 0.7, z)

    def draw_bus(self, x: float, z: float) -> None:
        """Draw a box with windows all round, and a bright line number above them."""
        color, glass = self.paint_color(), self.jitter((52, 62, 74), 15)
        instance, length, height = self.begin_vehicle("bus", x, z, (9, 12), (2.9, 3.2))
        self.draw_box(instance, (x - 1.25, x + 1.25, 0.3, height, z, z + length), color)
        self.tint(self.rectangle(x - 1.15, x + 1.15, 1.2, height - 0.55, z), glass, z)
        number = self.rectangle(x - 0.8, x + 0.8, height - 0.45, height - 0.1, z)
        self.tint(number, (245, 190, 60), z)
        if abs(x) > 1.25:
            side = x - 1.25 if x > 0 else x + 1.25
            for wz in np.arange(z + 0.4, z + length - 1, 1.5):
                self.tint(self.panel(side, wz, wz + 1.2, 1.3, height - 0.5), glass, z)
        self.draw_wheels(instance, x, 1.15, z)
        self.draw_lamps(x, 1.2, 0.6, z)

    def draw_train(self, x: float, z: float) -> None:
        """Draw a tram: a rounded front in two colours, one lamp in the middle, a long side."""
        lower, upper = self.paint_color(), self.jitter((222, 218, 205), 18)
        glass = self.jitter((40, 48, 58), 10)
        instance, length, height = self.begin_vehicle("train", x, z, (14, 22), (3.3, 3.7))
        self.draw_box(instance, (x - 1.2, x + 1.2, 1.4, height, z, z + length), upper)
        self.draw_box(instance, (x - 1.2, x + 1.2, 0.15, 1.4, z, z + length), lower)
        self.fill(self.disc(x, height, 1.2, z, stretch=0.35), upper, z, instance)
        self.tint(self.disc(x, 2.3, 0.95, z, stretch=0.7), glass, z)
        self.tint(self.disc(x, 1.0, 0.25, z), (255, 250, 225), z)
        if abs(x) > 1.2:
            side = x - 1.2 if x > 0 else x + 1.2
            self.tint(self.panel(side, z + 1, z + length, 1.7, height - 0.5), glass, z)

    def draw_bicycle(self, x: float, z: float) -> None:
        """Draw a bicycle from the side, often with its rider."""
        frame, tyre = self.paint_color(), self.jitter((34, 34, 36), 10)
        instance = self.new_instance("bicycle")
        if self.rng.random() < 0.75:
            self.draw_rider(x, z, seat=0.95)
        for wx in (x - 0.55, x + 0.55):
            self.fill(self.disc(wx, 0.36, 0.36, z), tyre, z, instance)
            self.tint(self.disc(wx, 0.36, 0.27, z), (150, 150, 150), z)
            self.tint(self.rectangle(wx - 0.27, wx + 0.27, 0.34, 0.38, z), tyre, z)
            self.tint(self.rectangle(wx - 0.02, wx + 0.02, 0.1, 0.62, z), tyre, z)
        triangle = [(-0.55, 0.36), (-0.2, 0.95), (0.45, 0.95), (0, 0.3)]
        fork = [(0.4, 1.1), (0.5, 1.1), (0.62, 0.36), (0.5, 0.36)]
        for points in (triangle, fork):
            self.fill(self.outline(points, x, z), frame, z, instance)

    def draw_motorcycle(self, x: float, z: float) -> None:
        """Draw fat black wheels, a body and a lamp, often with its rider."""
        body, tyre = self.paint_color(), self.jitter((22, 22, 24), 6)
        instance = self.new_instance("motorcycle")
        if self.rng.random() < 0.75:
            self.draw_rider(x - 0.1, z, seat=0.9)
        for wx in (x - 0.65, x + 0.65):
            self.fill(self.disc(wx, 0.36, 0.38, z), tyre, z, instance)
            self.tint(self.disc(wx, 0.36, 0.14, z), (130, 130, 130), z)
        tank = [(-0.85, 0.6), (-0.7, 0.95), (0.1, 0.95), (0.4, 1.2), (0.7, 1.1)]
        self.fill(self.outline([*tank, (0.55, 0.4), (-0.4, 0.25)], x, z), body, z, instance)
        self.tint(self.rectangle(x - 0.3, x + 0.3, 0.25, 0.55, z), (95, 95, 98), z)  # the engine
        self.tint(self.disc(x + 0.68, 0.98, 0.12, z), (250, 245, 215), z)

    def draw_rider(self, x: float, z: float, seat: float) -> None:
        """Draw someone with a helmet who bends forward over a seat."""
        instance = self.new_instance("rider")
        shirt, trousers, helmet = self.paint_color(), self.paint_color(), self.paint_color()
        torso = [(-0.4, seat), (-0.05, seat), (0.4, seat + 0.65), (0.05, seat + 0.8)]
        leg = [(-0.4, seat), (0, seat), (0.25, 0.45), (0.1, 0.2), (-0.05, 0.3)]
        arm = [(0.2, seat + 0.6), (0.35, seat + 0.6), (0.6, seat + 0.15)]
        for points, color in ((leg, trousers), (torso, shirt), (arm, shirt)):
            self.fill(self.outline(points, x, z), color, z, instance)
        self.fill(self.disc(x + 0.3, seat + 0.95, 0.2, z, 1.1), helmet, z, instance)

    def draw_person(self, x: float, z: float) -> None:
        """Draw someone upright: legs, coat, head with hair."""
        instance = self.new_instance("person")
        height = self.rng.uniform(1.55, 1.95)
        coat, trousers = self.paint_color(), self.paint_color()
        skin = ((226, 186, 160), (176, 130, 98), (110, 78, 58))[self.rng.integers(3)]
        hip, shoulder, stride = height * 0.48, height * 0.83, self.rng.uniform(0.05, 0.3)
        for direction in (-1, 1):
            foot = x + direction * stride
            leg = [(x - 0.13, hip), (x + 0.13, hip), (foot + 0.11, 0), (foot - 0.11, 0)]
            self.fill(self.outline(leg, 0, z), trousers, z, instance)
        hem = hip * 0.95
        torso = [(-0.27, shoulder), (0.27, shoulder), (0.32, hem), (-0.32, hem)]
        self.fill(self.outline(torso, x, z), coat, z, instance)
        self.fill(self.disc(x, height - 0.15, 0.15, z, 1.2), skin, z, instance)
        hair = self.jitter((60, 45, 35), 30)
        self.tint(self.rectangle(x - 0.13, x + 0.13, height - 0.1, height, z), hair, z)

    def draw_pole(self, x: float, z: float, top: float | None = None) -> None:
        top = self.rng.uniform(4, 7) if top is None else top
        color = self.pick(18, (118, 118, 116), (82, 84, 80))
        self.fill(self.rectangle(x - 0.17, x + 0.17, 0, top, z), color, z, LABEL_ID["pole"])
        self.tint(self.rectangle(x - 0.1, x, 0, top, z), shade(color, 1.25), z)

    def draw_traffic_sign(self, x: float, z: float) -> None:
        """Draw a sign of one colour with a white middle."""
        top, radius = self.rng.uniform(2.3, 3.2), self.rng.uniform(0.42, 0.6)
        self.draw_pole(x, z, top)
        red, blue = self.jitter((190, 30, 38), 20), self.jitter((30, 70, 160), 20)
        kind = self.rng.integers(3)
        if kind == 0:  # a prohibition
            outer, inner = (self.disc(x, top, radius * size, z) for size in (1, 0.65))
        elif kind == 1:  # a warning
            corners = ((0, 1), (0.9, -0.6), (-0.9, -0.6))
            outer, inner = (
                self.outline([(size * dx, top + size * dy) for dx, dy in corners], x, z)
                for size in (1.2 * radius, 0.65 * radius)
            )
        else:  # parking, a direction
            outer = self.rectangle(x - radius, x + radius, top - radius, top + radius, z)
            width, height = radius * 0.3, radius * 0.6
            inner = self.rectangle(x - width, x + width, top - height, top + height, z)
        self.fill(outer, blue if kind == 2 else red, z, LABEL_ID["traffic sign"])
        self.tint(inner, (235, 235, 230), z)

    def draw_traffic_light(self, x: float, z: float) -> None:
        top = self.rng.uniform(2.6, 3.6)
        self.draw_pole(x, z, top)
        instance = LABEL_ID["traffic light"]
        case = self.jitter((40, 42, 40), 14)
        self.fill(self.rectangle(x - 0.34, x + 0.34, top, top + 1.5, z), case, z, instance)
        lit = self.rng.integers(3)
        for n, color in enumerate(((60, 225, 120), (250, 190, 50), (245, 50, 40))):
            seen = shade(color, 1 if n == lit else 0.25)
            self.tint(self.disc(x, top + 0.28 + 0.47 * n, 0.2, z), seen, z)

    def draw_bonnet(self) -> None:
        """Draw the car that carries the camera, at the bottom of most pictures; not scored."""
        rng = self.rng
        if rng.random() < 0.3:
            return
        top = self.height * rng.uniform(0.92, 0.97)
        middle, half = self.width * rng.uniform(0.45, 0.55), self.width * rng.uniform(0.35, 0.5)
        rim = ((-1, self.height), (-0.7, top + 3), (0, top), (0.7, top + 3), (1, self.height))
        points = [(middle + half * dx, y) for dx, y in rim]
        self.fill(points, self.jitter((70, 72, 78), 25), 1, LABEL_ID["ego vehicle"])

    # The picture

    def develop(self) -> Scene:
        """Add texture, then the effects of light, lens and sensor."""
        rng = self.rng
        instances = np.asarray(self.instances)
        label_ids = np.where(instances >= 1000, instances // 1000, instances).astype(np.uint8)
        amplitude = np.full((256, 2), PLAIN_TEXTURE, np.float32)
        for name, levels in TEXTURE.items():
            amplitude[LABEL_ID[name]] = levels
        shape = self.height, self.width
        fine = rng.standard_normal(shape, np.float32)
        coarse = smooth_noise(rng, *shape, 48)
        image = np.asarray(self.rgb, np.float32)
        image += (fine * amplitude[label_ids, 0] + coarse * amplitude[label_ids, 1])[..., None]

        gain = rng.uniform(0.55, 1.25) * rng.uniform(0.88, 1.12, 3)
        slope = rng.uniform(-0.25, 0.25) * np.linspace(-1, 1, self.width)[:, None]
        image *= (gain * (1 + slope)).astype(np.float32)
        blurred = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).filter(
            ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8) * self.height / 256)
        )
        noise = rng.standard_normal((*shape, 3), np.float32) * rng.uniform(2, 7)
        image = np.clip(np.asarray(blurred) + noise, 0, 255).astype(np.uint8)
        return Scene(image, label_ids, instances.astype(np.uint16))


def shade(color: Color, factor: float) -> Color:
    """Make a colour darker or lighter."""
    return tuple(min(255, int(c * factor)) for c in color)


def smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Return noise of standard deviation near 1, with `cells` patches across the width."""
    grid = rng.standard_normal((max(2, cells * height // width), cells), np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
