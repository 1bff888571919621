"""Direct labels for points: short, and placed where they cover neither points nor one another."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes

Point = tuple[float, float] | np.ndarray
Box = tuple[float, float, float, float]  # x0, y0, x1, y1
ANGLES = np.arange(0, 360, 22.5)
RADII = (11, 16, 24, 34, 46, 60, 78, 100)


def shorten(text: str, most: int = 30) -> str:
  """At most `most` characters; a longer name keeps its head and its tail, where variants differ."""
  if len(text) <= most:
    return text
  head = (most - 1) * 2 // 3
  return f"{text[:head].rstrip()}…{text[head + 1 - most :].lstrip()}"


def place(ax: Axes, points: list[tuple[str, float, float]], avoid: list[Box], ink: str, muted: str) -> None:
  """Write each (text, x, y) beside its point. `avoid`: boxes in data units. The limits of `ax` are final."""
  renderer = ax.figure.canvas.get_renderer()
  solid = [tuple(text.get_window_extent(renderer).extents) for text in ax.texts]
  texts = [ax.annotate(text, (x, y), (0, 0), textcoords="offset points", color=ink, zorder=6) for text, x, y in points]
  sizes = [(box.width, box.height) for box in (text.get_window_extent(renderer) for text in texts)]
  anchors = [ax.transData.transform(point[1:]) for point in points]
  solid += [(x - 7, y - 7, x + 7, y + 7) for x, y in anchors]
  for x0, y0, x1, y1 in avoid:
    (left, low), (right, high) = ax.transData.transform([(x0, y0), (x1, y1)])
    solid.append((left - 3, low - 3, right + 3, high + 3))
  frame = ax.get_window_extent(renderer)
  chosen: dict[int, Box] = {}
  for _ in range(3):  # the first labels are placed again once they know where the later ones went
    for i, (anchor, size) in enumerate(zip(anchors, sizes, strict=True)):
      taken = {tuple(anchors[j]): box for j, box in chosen.items() if j != i}
      chosen[i] = min(_candidates(anchor, size), key=lambda box: _cost(box, anchor, solid, taken, frame.extents))
  for i, text in enumerate(texts):
    _put(ax, text, anchors[i], chosen[i], muted)


def _candidates(anchor: np.ndarray, size: tuple[float, float]) -> list[Box]:
  """Boxes around the anchor: at each angle and radius the one whose nearest corner (or middle) is at that spot."""
  found, (width, height) = [], size
  for radius in RADII:
    for angle in np.radians(ANGLES):
      dx, dy = math.cos(angle), math.sin(angle)
      x = anchor[0] + radius * dx - width * _share(dx)
      y = anchor[1] + radius * dy - height * _share(dy)
      found.append((x, y, x + width, y + height))
  return found


def _share(direction: float) -> float:
  """How much of the box lies before the spot: none when going right or up, all when going left or down."""
  return 0.5 if abs(direction) < 0.1 else 0.0 if direction > 0 else 1.0


def _cost(box: Box, anchor: np.ndarray, solid: list[Box], taken: dict, frame: np.ndarray) -> float:
  if box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]:
    return math.inf
  covered = sum(_overlap(box, other) for other in solid) + 3 * sum(_overlap(box, other, 2) for other in taken.values())
  touch = _touch(box, anchor)
  crossed = sum(_cross(anchor, touch, other, _touch(taken[other], other)) for other in taken)
  return 10 * covered + 40 * crossed + math.dist(touch, anchor)


def _cross(a: Point, b: Point, c: Point, d: Point) -> bool:
  """Whether the segments ab and cd cross."""

  def left(p: Point, q: Point, r: Point) -> bool:
    return (q[0] - p[0]) * (r[1] - p[1]) > (q[1] - p[1]) * (r[0] - p[0])

  return left(a, b, c) != left(a, b, d) and left(c, d, a) != left(c, d, b)


def _overlap(a: Box, b: Box, gap: float = 0) -> float:
  width = min(a[2], b[2]) - max(a[0], b[0]) + gap
  height = min(a[3], b[3]) - max(a[1], b[1]) + gap
  return max(width, 0) * max(height, 0)


def _touch(box: Box, anchor: np.ndarray) -> tuple[float, float]:
  """The point of the box nearest to the anchor."""
  return min(max(anchor[0], box[0]), box[2]), min(max(anchor[1], box[1]), box[3])


def _put(ax: Axes, text, anchor: np.ndarray, box: Box, muted: str) -> None:
  text.set_position((box[0] - anchor[0], box[1] - anchor[1]))
  touch = _touch(box, anchor)
  if math.dist(touch, anchor) > 20:
    line = ax.transData.inverted().transform([anchor, touch])
    ax.plot(*line.T, color=muted, lw=0.6, zorder=2, scalex=False, scaley=False)
