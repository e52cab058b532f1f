"""Draws one labelled picture: textured ground, things of six shapes, and others that belong to no class.

The outline decides the class. Each class also has a usual colour and a usual texture, as things in the world do, but a
share of its things looks different, and clutter, which is of no class, may look like a thing of any: neither colour nor
texture is enough. Sizes, angles, proportions, contrast, light and noise vary, and things cover one another.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import cv2
import numpy as np

CLASSES = ("disc", "square", "triangle", "star", "cross", "ring")
CLUTTER = ("blob", "stick", "corner", "half disc", "arc")
TEXTURES = ("plain", "stripes", "checks", "dots", "clouds", "gradient")

USUAL_COLOUR, USUAL_TEXTURE = 0.85, 0.6  # shares of a class's things that have its colour, its texture
MIMICRY = 0.3  # share of clutter that is coloured and textured like a thing
SCALE = (0.15, 0.55)  # diameter of a thing as a fraction of the picture's side, log-uniform
THINGS = (3, 8)  # per picture; one that finds no place is left out
MIN_VISIBLE = 0.35  # at least this share of every thing stays uncovered
GATHERING = 0.4  # share of things that are put beside another one, so that they touch or overlap
MIN_CONTRAST = (12.0, 60.0)  # the least CIELAB distance of a thing from what it lies on is drawn from this range
DIFFERENCE = (0.05, 0.4)  # between the two colours of a texture, 1 being black to white
GROUND_DIFFERENCE = (0.0, 0.2)
FAINT = 0.2  # share of things that have only that least contrast
CROWD_PROBABILITY = 0.12  # of a swarm of tiny things, labelled as one crowd
SUPERSAMPLING = 4
NOBODY = -1

Outline = list[np.ndarray]  # loops of [N, 2] points (x, y), filled by the even-odd rule; about one unit in radius


@dataclass(frozen=True)
class Thing:
    """One labelled region.

    Attributes:
        category: Index into CLASSES.
        mask: [H, W], bool: its visible pixels.
        occlusion: Share of its own area that others or the picture's border hide, 0 to 1.
        crowd: Whether it is a swarm of things too small to label one by one.
    """

    category: int
    mask: np.ndarray
    occlusion: float
    crowd: bool


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        image: [H, W, 3], uint8, BGR.
        things: Everything labelled, from back to front.
    """

    image: np.ndarray
    things: list[Thing]


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """Draws a picture of `size` x `size` pixels; the generator's state alone decides what it shows."""
    canvas = _Canvas(rng, size)
    for _ in range(rng.integers(0, 3)):
        canvas.add_clutter(SCALE)
    if rng.random() < CROWD_PROBABILITY:
        canvas.add_crowd()
    for _ in range(rng.integers(THINGS[0], THINGS[1] + 1)):
        canvas.add_thing()
    for _ in range(rng.integers(0, 2)):
        canvas.add_clutter((SCALE[0], 0.25))
    return Scene(canvas.photograph(), canvas.things())


def draw_single(rng: np.random.Generator, size: int, outline: str) -> np.ndarray:
    """A picture [size, size, 3], uint8 BGR, of one of CLASSES, coloured as in scenes, or of CLUTTER near its middle."""
    canvas = _Canvas(rng, size)
    placed = _placed(rng, _outline(rng, outline), size * rng.uniform(0.4, 0.8))
    like = CLASSES.index(outline) if outline in CLASSES else None
    canvas._paint(_Patch(placed, size * rng.uniform(0.4, 0.6, 2), size), NOBODY, like)
    return canvas.photograph()


class _Canvas:
    """The picture as it grows, and which thing each pixel belongs to."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng = rng
        self.size = size
        kind = TEXTURES[rng.integers(len(TEXTURES))]
        ground = _texture(rng, kind, size, size, _ground_colour(rng), GROUND_DIFFERENCE)
        self.image = ground  # [H, W, 3], float32 BGR in 0..1
        self.owner = np.full((size, size), NOBODY)
        self.categories: list[int] = []
        self.crowds: list[bool] = []
        self.areas: list[int] = []  # of the whole thing, hidden parts included
        self.centres: list[np.ndarray] = []

    def add_thing(self) -> None:
        rng = self.rng
        category = int(rng.integers(len(CLASSES)))
        for _ in range(8):
            diameter = self.size * math.exp(rng.uniform(*np.log(SCALE)))
            outline = _placed(rng, _outline(rng, CLASSES[category]), diameter)
            patch = _Patch(outline, self._position(diameter), self.size)
            if self._leaves_others_visible(patch):
                self._paint(patch, self._register(category, patch.area, patch.centre, crowd=False), category)
                return

    def add_clutter(self, scale: tuple[float, float]) -> None:
        rng = self.rng
        for _ in range(8):
            diameter = self.size * math.exp(rng.uniform(*np.log(scale)))
            outline = _placed(rng, _outline(rng, CLUTTER[rng.integers(len(CLUTTER))]), diameter)
            patch = _Patch(outline, self._position(diameter), self.size)
            if self._leaves_others_visible(patch):
                like = int(rng.integers(len(CLASSES))) if rng.random() < MIMICRY else None
                self._paint(patch, NOBODY, like)
                return

    def add_crowd(self) -> None:
        rng = self.rng
        category = int(rng.integers(len(CLASSES)))
        middle = rng.uniform(0.15, 0.85, 2) * self.size
        identity = self._register(category, 0, middle, crowd=True)
        for _ in range(rng.integers(8, 17)):
            centre = middle + rng.normal(0, 0.08, 2) * self.size
            outline = _placed(rng, _outline(rng, CLASSES[category]), self.size * rng.uniform(0.04, 0.065))
            patch = _Patch(outline, centre, self.size)
            self._paint(patch, identity, category)
            self.areas[identity] += patch.area

    def things(self) -> list[Thing]:
        result = []
        for identity, (category, crowd, area) in enumerate(zip(self.categories, self.crowds, self.areas, strict=True)):
            mask = self.owner == identity
            if mask.any():
                occlusion = min(1.0, max(0.0, 1.0 - float(mask.sum()) / area))
                result.append(Thing(category, mask, occlusion, crowd))
        return result

    def photograph(self) -> np.ndarray:
        """Light falls off across the picture, the lens blurs a little, the sensor is noisy."""
        rng, size = self.rng, self.size
        angle = rng.uniform(0, 2 * math.pi)
        y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
        light = 1 + rng.uniform(0, 0.5) * (x * math.cos(angle) + y * math.sin(angle))
        image = self.image * light[..., None]
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.2, 0.9))
        image += rng.normal(0, rng.uniform(0.005, 0.04), image.shape).astype(np.float32)
        return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)

    def _position(self, diameter: float) -> np.ndarray:
        """Anywhere, or beside an earlier thing; what lies at the border is cut off by it."""
        low, high = 0.1 * diameter, self.size - 0.1 * diameter
        if self.centres and self.rng.random() < GATHERING:
            neighbour = self.centres[self.rng.integers(len(self.centres))]
            return np.clip(neighbour + self.rng.normal(0, 0.6 * diameter, 2), low, high)
        return self.rng.uniform(low, high, 2)

    def _register(self, category: int, area: int, centre: np.ndarray, crowd: bool) -> int:
        self.categories.append(category)
        self.areas.append(area)
        self.crowds.append(crowd)
        self.centres.append(centre)
        return len(self.categories) - 1

    def _leaves_others_visible(self, patch: _Patch) -> bool:
        if patch.solid.sum() < MIN_VISIBLE * patch.area:  # too much of it lies outside the picture
            return False
        below = self.owner[patch.rows, patch.columns]
        for identity in np.unique(below[patch.solid]):
            if identity != NOBODY:
                left = (self.owner == identity).sum() - (below[patch.solid] == identity).sum()
                if left < MIN_VISIBLE * self.areas[identity]:
                    return False
        return True

    def _paint(self, patch: _Patch, identity: int, like: int | None) -> None:
        """Draws a patch, coloured and textured like most things of a class or in any way."""
        if not patch.solid.any():
            return
        rng = self.rng
        below = self.image[patch.rows, patch.columns]
        if like is not None and rng.random() < USUAL_COLOUR:
            colour = _usual_colour(rng, like)
        else:
            colour = _colour_unlike(rng, below[patch.solid].mean(axis=0))
        if like is not None and rng.random() < USUAL_TEXTURE:
            kind = TEXTURES[like]
        else:
            kind = TEXTURES[rng.integers(len(TEXTURES))]
        height, width = patch.solid.shape
        texture = _texture(rng, kind, height, width, colour, DIFFERENCE)
        self.image[patch.rows, patch.columns] = below + patch.alpha[..., None] * (texture - below)
        self.owner[patch.rows, patch.columns][patch.solid] = identity


class _Patch:
    """An anti-aliased outline at its place: the part of it that lies in the picture.

    Attributes:
        centre: (x, y) in pixels.
        rows, columns: Slices of the picture.
        alpha: [rows, columns], float32 in 0..1: coverage.
        solid: [rows, columns], bool: the pixels that count as its own.
        area: Pixels of the whole outline, including those outside the picture.
    """

    def __init__(self, outline: Outline, centre: np.ndarray, size: int) -> None:
        self.centre = centre
        points = [loop + centre for loop in outline]
        low = np.floor(np.min([loop.min(axis=0) for loop in points], axis=0)).astype(int)
        high = np.ceil(np.max([loop.max(axis=0) for loop in points], axis=0)).astype(int)
        width, height = (high - low).tolist()
        fine = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
        # fillPoly's point (x, y) is the middle of a pixel, hence the half; the last 8 bits are a fraction.
        loops = [np.rint(((loop - low) * SUPERSAMPLING - 0.5) * 256).astype(np.int32) for loop in points]
        cv2.fillPoly(fine, loops, 255, shift=8)
        alpha = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        self.area = max(1, int((alpha >= 0.5).sum()))
        left, top = np.clip(low, 0, size)
        right, bottom = np.clip(high, 0, size)
        self.rows, self.columns = slice(top, bottom), slice(left, right)
        self.alpha = alpha[top - low[1] : bottom - low[1], left - low[0] : right - low[0]]
        self.solid = self.alpha >= 0.5


def _outline(rng: np.random.Generator, name: str) -> Outline:
    """A shape with randomly drawn proportions, before it is turned and stretched."""
    if name == "disc":
        return [_circle()]
    if name == "square":
        return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.8]
    if name == "triangle":
        return [_circle(3) * rng.uniform(0.85, 1.15, (3, 1))]
    if name == "star":
        return [_circle(10) * np.tile([1.0, rng.uniform(0.4, 0.52)], 5)[:, None]]
    if name == "cross":
        arm = rng.uniform(0.26, 0.38)
        quarter = np.array([[arm, 1], [arm, arm], [1, arm]])
        turn = np.array([[0, -1], [1, 0]])
        return [np.concatenate([quarter @ np.linalg.matrix_power(turn, n) for n in range(4)])]
    if name == "ring":
        return [_circle(), _circle() * rng.uniform(0.45, 0.65)]
    if name == "blob":
        angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        bumps = sum(rng.uniform(0.05, 0.22) * np.cos(n * angles + rng.uniform(0, 6.28)) for n in (2, 3, 5))
        return [_circle() * (0.8 + bumps)[:, None]]
    if name == "stick":
        return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [1.0, rng.uniform(0.08, 0.2)]]
    if name == "corner":
        arm = rng.uniform(-0.5, -0.2)
        return [np.array([[-0.8, -0.8], [0.8, -0.8], [0.8, arm], [arm, arm], [arm, 0.8], [-0.8, 0.8]])]
    if name == "half disc":
        return [_circle()[:25] - [0, 0.4]]
    return [np.concatenate([_circle()[:30], _circle()[:30][::-1] * rng.uniform(0.5, 0.75)])]  # arc


def _circle(points: int = 48) -> np.ndarray:
    angles = np.linspace(0, 2 * math.pi, points, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _placed(rng: np.random.Generator, outline: Outline, diameter: float) -> Outline:
    """Stretches, turns, shears a little and scales to pixels."""
    angle, tilt = rng.uniform(0, 2 * math.pi, 2)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    axis = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
    stretch = axis @ np.diag([1.0, rng.uniform(0.7, 1.0)]) @ axis.T
    return [loop @ (turn @ stretch) * (diameter / 2) for loop in outline]


def _ground_colour(rng: np.random.Generator) -> np.ndarray:
    """A muted colour; things and clutter may have any, including this one."""
    return (rng.uniform(0.2, 0.8) + rng.uniform(-0.15, 0.15, 3)).astype(np.float32)


def _usual_colour(rng: np.random.Generator, category: int) -> np.ndarray:
    """About the colour that most things of a class have: a sixth of the colour circle away from the next one's."""
    red, green, blue = colorsys.hsv_to_rgb(category / len(CLASSES), 0.7, 0.8)
    return np.clip(np.array([blue, green, red]) + rng.uniform(-0.15, 0.15, 3), 0.05, 0.95).astype(np.float32)


def _colour_unlike(rng: np.random.Generator, other: np.ndarray) -> np.ndarray:
    """A colour at some minimum distance from another, so that what is drawn can be seen, if only just."""
    least = rng.uniform(*MIN_CONTRAST)
    candidates = rng.uniform(0.05, 0.95, (64, 3)).astype(np.float32)
    distances = np.linalg.norm(lab(candidates) - lab(other[None]), axis=1)
    fits = np.flatnonzero(distances >= least)
    if len(fits) == 0:
        return candidates[np.argmax(distances)]
    return candidates[fits[np.argmin(distances[fits])] if rng.random() < FAINT else fits[0]]


def lab(colours: np.ndarray) -> np.ndarray:
    """BGR colours [N, 3], float32 in 0..1, in CIELAB, where a distance of about 2 can just be seen."""
    return cv2.cvtColor(np.ascontiguousarray(colours, np.float32)[None], cv2.COLOR_BGR2Lab)[0]


def _texture(
    rng: np.random.Generator, kind: str, height: int, width: int, colour: np.ndarray, difference: tuple[float, float]
) -> np.ndarray:
    """[height, width, 3], float32: a pattern of two colours whose mean is about `colour`."""
    pattern = _pattern(rng, kind, height, width)  # [height, width], -0.5..0.5
    other = rng.uniform(-1, 1, 3).astype(np.float32) * rng.uniform(*difference)
    return np.clip(colour + pattern[..., None].astype(np.float32) * other, 0, 1)


def _pattern(rng: np.random.Generator, kind: str, height: int, width: int) -> np.ndarray:
    if kind == "plain":
        return np.zeros((height, width))
    if kind == "clouds":
        coarse = rng.random((max(2, height // 8), max(2, width // 8))).astype(np.float32)
        return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) - 0.5
    angle, period = rng.uniform(0, math.pi), rng.uniform(4, 14)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if kind == "gradient":
        return (along - along.min()) / max(1e-3, float(np.ptp(along))) - 0.5
    # Waves with steep but not vertical sides: their edges stay anti-aliased.
    first, second = np.sin(along * (2 * math.pi / period)), np.sin(across * (2 * math.pi / period))
    wave = {"stripes": first, "checks": first * second, "dots": first + second - 0.6}[kind]
    return np.clip(wave * 1.5, -0.5, 0.5)
