"""Overlap of boxes, and the matching of answered and true boxes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment

Matrix = NDArray[np.float64]


def pairwise_iou(a_xyxy: ArrayLike, b_xyxy: ArrayLike) -> Matrix:
    """Return the IoU of every box of a with every box of b: [P, 4], [G, 4] -> [P, G]; 0 for inverted or empty boxes."""
    return _divided(*_overlap_and_union(*_pairs(a_xyxy, b_xyxy)))


def pairwise_giou(a_xyxy: ArrayLike, b_xyxy: ArrayLike) -> Matrix:
    """Return the generalized IoU, -1 to 1: [P, 4], [G, 4] -> [P, G].

    It is IoU minus the fraction of the enclosing box that neither covers; -1, the lowest value, for an inverted box.
    """
    a, b = _pairs(a_xyxy, b_xyxy)
    overlap, union = _overlap_and_union(a, b)
    enclosing = _area(np.minimum(a[..., :2], b[..., :2]), np.maximum(a[..., 2:], b[..., 2:]))
    giou = _divided(overlap, union) - _divided(enclosing - union, enclosing)
    return np.where(_inverted(a) | _inverted(b), -1.0, giou)


def pairwise_diou(a_xyxy: ArrayLike, b_xyxy: ArrayLike) -> Matrix:
    """Return IoU minus the square of (distance of the centres / diagonal of the enclosing box).

    Boxes must be in pixels, not fractions of the sides. An inverted box has -1.
    """
    a, b = _pairs(a_xyxy, b_xyxy)
    iou = _divided(*_overlap_and_union(a, b))
    apart = ((a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) ** 2).sum(axis=-1) / 4
    sides = np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])
    return np.where(_inverted(a) | _inverted(b), -1.0, iou - _divided(apart, (sides**2).sum(axis=-1)))


def pairwise_ciou(a_xyxy: ArrayLike, b_xyxy: ArrayLike) -> Matrix:
    """Return DIoU minus a penalty for another aspect ratio (angles of the diagonals). An inverted box has -1."""
    a, b = _pairs(a_xyxy, b_xyxy)
    iou = _divided(*_overlap_and_union(a, b))
    shape = (4 / np.pi**2) * (_diagonal_angle(a) - _diagonal_angle(b)) ** 2
    penalty = _divided(shape**2, 1 - iou + shape)
    return np.where(_inverted(a) | _inverted(b), -1.0, pairwise_diou(a_xyxy, b_xyxy) - penalty)


def centre_inside(a_xyxy: ArrayLike, b_xyxy: ArrayLike) -> NDArray[np.bool_]:
    """Return whether the centre of box i of a is in box j of b, edges included: [P, 4], [G, 4] -> [P, G]."""
    a, b = _pairs(a_xyxy, b_xyxy)
    centres = (a[..., :2] + a[..., 2:]) / 2
    inside = (centres >= b[..., :2]) & (centres <= b[..., 2:])
    return np.asarray(inside.all(axis=-1) & ~_inverted(a))


def enclosing_box(boxes_xyxy: ArrayLike) -> tuple[float, float, float, float]:
    """Return the smallest box around all boxes; a single one is returned as it is."""
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    x0, y0 = boxes[:, :2].min(axis=0).tolist()
    x1, y1 = boxes[:, 2:].max(axis=0).tolist()
    return x0, y0, x1, y1


def match_best(overlap: Matrix) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return rows and columns of the one-to-one matching with the largest sum."""
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    return np.asarray(rows), np.asarray(columns)


def count_matched(overlap: Matrix, threshold: float, *, strict: bool = False) -> int:
    """Return the size of the largest one-to-one matching of pairs at or above (strict: above) the threshold."""
    hit = (overlap > threshold if strict else overlap >= threshold).astype(np.float64)
    return int(hit[match_best(hit)].sum())


def count_matched_greedily(overlap: Matrix, threshold: float) -> int:
    """Count the pairs found by repeatedly taking the largest remaining overlap, down to the threshold."""
    left = overlap.copy()
    num_matched = 0
    while left.size and num_matched < min(left.shape):
        row, column = np.unravel_index(left.argmax(), left.shape)
        if left[row, column] < threshold:
            break
        left[row, :] = left[:, column] = -np.inf
        num_matched += 1
    return num_matched


def _pairs(a_xyxy: ArrayLike, b_xyxy: ArrayLike) -> tuple[Matrix, Matrix]:
    """Reshape to [P, 1, 4] and [1, G, 4]."""
    a = np.asarray(a_xyxy, dtype=np.float64).reshape(-1, 1, 4)
    return a, np.asarray(b_xyxy, dtype=np.float64).reshape(1, -1, 4)


def _overlap_and_union(a: Matrix, b: Matrix) -> tuple[Matrix, Matrix]:
    overlap = _area(np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:]))
    return overlap, _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - overlap


def _area(top_left: Matrix, bottom_right: Matrix) -> Matrix:
    sides: Matrix = np.clip(bottom_right - top_left, 0, None)
    return sides[..., 0] * sides[..., 1]


def _inverted(box: Matrix) -> NDArray[np.bool_]:
    return np.asarray((box[..., :2] > box[..., 2:]).any(axis=-1))


def _diagonal_angle(box: Matrix) -> Matrix:
    width, height = box[..., 2] - box[..., 0], box[..., 3] - box[..., 1]
    return np.arctan2(width, height)


def _divided(numerator: Matrix, denominator: Matrix) -> Matrix:
    """Divide; 0 where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator > 0)
