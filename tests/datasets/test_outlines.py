"""Masks written as polygons, run lengths and boxes come back from pycocotools as the same masks."""

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from nat_dense.datasets.outlines import mask_to_box, mask_to_polygons, mask_to_rle


def decoded(segmentation, shape):
    """What pycocotools makes of polygons or run lengths."""
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, *shape))).astype(bool)


def random_masks():
    rng = np.random.default_rng(0)
    for index in range(120):
        height, width = rng.integers(1, 40, 2).tolist()
        if index % 2:
            mask = rng.random((height, width)) < rng.random()  # single pixels, diagonal contacts, holes in holes
        else:
            mask = cv2.resize(rng.random((6, 6)), (width, height)) > rng.random()
        if mask.any():
            yield mask


def test_random_masks_come_back_exactly():
    count = 0
    for mask in random_masks():
        polygons = mask_to_polygons(mask)
        np.testing.assert_array_equal(decoded(polygons, mask.shape), mask)
        pieces = sum(decoded([polygon], mask.shape).astype(int) for polygon in polygons)
        assert pieces.max() == 1, "pieces overlap"
        rle = coco_mask.frPyObjects(mask_to_rle(mask), *mask.shape)
        np.testing.assert_array_equal(coco_mask.decode(rle).astype(bool), mask)
        assert mask_to_box(mask) == coco_mask.toBbox(rle).tolist()
        count += 1
    assert count > 100


def test_a_rectangle_has_four_corners_on_pixel_edges():
    mask = np.zeros((5, 7), bool)
    mask[1:4, 2:6] = True
    (polygon,) = mask_to_polygons(mask)
    assert {tuple(point) for point in np.reshape(polygon, (-1, 2)).tolist()} == {(2, 1), (6, 1), (6, 4), (2, 4)}
    assert mask_to_box(mask) == [2.0, 1.0, 4.0, 3.0]
    assert mask_to_rle(mask) == {"size": [5, 7], "counts": [11, 3, 2, 3, 2, 3, 2, 3, 6]}


def test_a_ring_is_cut_into_pieces_without_a_hole():
    mask = np.zeros((9, 9), bool)
    mask[1:8, 1:8] = True
    mask[4, 4] = False  # one pixel
    polygons = mask_to_polygons(mask)
    assert len(polygons) == 2
    np.testing.assert_array_equal(decoded(polygons, mask.shape), mask)


@pytest.mark.parametrize(("value", "counts"), [(False, [12]), (True, [0, 12])])
def test_run_lengths_of_empty_and_full(value, counts):
    assert mask_to_rle(np.full((3, 4), value))["counts"] == counts


def test_an_empty_mask_has_no_polygon():
    assert mask_to_polygons(np.zeros((4, 4), bool)) == []
