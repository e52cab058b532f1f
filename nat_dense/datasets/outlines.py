"""Binary masks as COCO writes them: polygons along pixel edges, uncompressed run lengths, boxes.

The polygons have integer corners on pixel edges, so pycocotools rasterizes them back to exactly the mask they came
from. COCO polygons can't have holes: a mask with holes is cut through each of them into pieces that have none.
"""

from __future__ import annotations

import numpy as np

STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # right, down, left, up: the next one is a right turn


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """The outlines of a mask.

    Args:
        mask: [H, W], bool.

    Returns:
        One flat list x0, y0, x1, y1, ... in pixels per piece; pieces don't overlap. Empty for an empty mask.
    """
    loops = _trace(mask)
    holes = [loop for loop in loops if _signed_area(loop) < 0]
    if not holes:
        return [[float(value) for point in loop for value in point] for loop in loops]
    columns = [x for x, _ in holes[0]]
    cut = (min(columns) + max(columns)) // 2
    left, right = mask.copy(), mask.copy()
    left[:, cut:] = False
    right[:, :cut] = False
    return mask_to_polygons(left) + mask_to_polygons(right)


def mask_to_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """A mask as COCO's uncompressed run lengths.

    Args:
        mask: [H, W], bool.

    Returns:
        `size` (H, W) and `counts`: lengths of alternating runs of 0 and 1 down the columns, zeros first.
    """
    flat = np.concatenate(([False], mask.ravel(order="F"), [False]))
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    edges = np.concatenate(([0], changes, [mask.size]))
    counts = np.diff(edges)
    if len(counts) > 1 and counts[-1] == 0:  # the mask ends with ones: no run of zeros follows
        counts = counts[:-1]
    return {"size": list(mask.shape), "counts": counts.tolist()}


def mask_to_box(mask: np.ndarray) -> list[float]:
    """The extent of a mask that is not empty: x, y, width, height in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = rows[0], columns[0]
    return [float(left), float(top), float(columns[-1] + 1 - left), float(rows[-1] + 1 - top)]


def _trace(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Closed loops of corners (x, y) with the mask on the right hand: outer ones have a positive area, holes a
    negative one. Pixels that only touch at a corner are not connected."""
    unused = _edges(mask)
    loops = []
    while unused:
        start = x, y, heading = next(iter(unused))
        loop = []
        while (x, y, heading) in unused:
            del unused[x, y, heading]
            loop.append((x, y))
            x, y = x + STEPS[heading][0], y + STEPS[heading][1]
            # Where four edges meet, the right turn stays with the pixel whose side this edge was.
            for turn in (1, 0, 3):
                following = x, y, (heading + turn) % 4
                if following in unused or following == start:
                    break
            x, y, heading = following
        loops.append(_without_straight_corners(loop))
    return loops


def _edges(mask: np.ndarray) -> dict[tuple[int, int, int], None]:
    """Directed sides (x, y, heading) of pixels that face the outside; a dict because its order is reproducible."""
    if not mask.any():
        return {}
    left, top, width, height = map(int, mask_to_box(mask))
    mask = mask[top : top + height, left : left + width]
    padded = np.pad(mask, 1)
    # A pixel's top side runs right from its top left corner, its right side down from its top right corner, and so on.
    sides = (
        (padded[:-2, 1:-1], 0, 0),
        (padded[1:-1, 2:], 1, 0),
        (padded[2:, 1:-1], 1, 1),
        (padded[1:-1, :-2], 0, 1),
    )
    edges: dict[tuple[int, int, int], None] = {}
    for heading, (neighbour, dx, dy) in enumerate(sides):
        rows, columns = np.nonzero(mask & ~neighbour)
        corners = zip((columns + left + dx).tolist(), (rows + top + dy).tolist(), strict=True)
        edges.update(((x, y, heading), None) for x, y in corners)
    return edges


def _without_straight_corners(loop: list[tuple[int, int]]) -> list[tuple[int, int]]:
    kept = []
    for index, (x, y) in enumerate(loop):
        (x0, y0), (x1, y1) = loop[index - 1], loop[(index + 1) % len(loop)]
        if (x - x0) * (y1 - y) != (y - y0) * (x1 - x):
            kept.append((x, y))
    return kept


def _signed_area(loop: list[tuple[int, int]]) -> float:
    following = loop[1:] + loop[:1]
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(loop, following, strict=True)) / 2
