"""Line drawings of 37 categories, as code. The miniature benchmark is made from them.

Each category is a function of a NumPy Generator. It returns the parts of the drawing, from back to front. A part is
(points (n, 2), whether it is closed), with coordinates from -1 to 1 and y pointing down.
"""

import math

import numpy as np


def line(*points):
    """An open chain of strokes."""
    return np.array(points, dtype=float), False


def shape(*points):
    """A closed polygon."""
    return np.array(points, dtype=float), True


def box(x, y, half_width, half_height, top=1.0):
    """An upright box; `top` is the width of its upper side as a share of the lower one."""
    narrow = half_width * top
    return shape(
        (x - narrow, y - half_height),
        (x + narrow, y - half_height),
        (x + half_width, y + half_height),
        (x - half_width, y + half_height),
    )


def oval(x, y, rx, ry, start=0.0, end=360.0):
    """An ellipse, or the arc of one from angle `start` to `end` in degrees, clockwise from the right."""
    whole = end - start >= 360
    angles = np.radians(np.linspace(start, end, 25, endpoint=not whole))
    return np.column_stack([x + rx * np.cos(angles), y + ry * np.sin(angles)]), whole


def segment(x, y, rx, ry, start, end):
    """The arc of an ellipse, closed by its chord."""
    return oval(x, y, rx, ry, start, end)[0], True


def burst(x, y, outer, inner, spikes):
    """A star."""
    angles = np.pi * np.arange(2 * spikes) / spikes - np.pi / 2
    radius = np.where(np.arange(2 * spikes) % 2, inner, outer)
    return np.column_stack([x + radius * np.cos(angles), y + radius * np.sin(angles)]), True


def petals(x, y, distance, size, count):
    """Circles around a point."""
    angles = 2 * np.pi * np.arange(count) / count
    return [oval(x + distance * math.cos(a), y + distance * math.sin(a), size, size) for a in angles]


def airplane(r):
    w = r.uniform(0.55, 0.75)
    return [
        shape((-0.1, -0.1), (0.25, -0.1), (-0.15, -w)),
        oval(0, 0, 0.9, r.uniform(0.15, 0.22)),
        shape((-0.75, -0.1), (-0.55, -0.1), (-0.85, -0.5)),
        shape((-0.15, 0.05), (0.25, 0.05), (-0.3, w)),
    ]


def apple(r):
    return [
        oval(-0.2, 0.1, 0.5, r.uniform(0.55, 0.7)),
        oval(0.2, 0.1, 0.5, r.uniform(0.55, 0.7)),
        line((0, -0.45), (0.08, -0.85)),
        oval(0.3, -0.7, 0.22, 0.1),
    ]


def axe(r):
    h = r.uniform(0.3, 0.45)
    return [
        box(-0.1, 0.05, 0.08, 0.9),
        shape((-0.2, -0.8), (0.3, -0.6 - h / 2), (0.7, -0.6), (0.7, -0.1), (0.3, -0.5 + h / 2), (-0.2, -0.4)),
    ]


def bell(r):
    w = r.uniform(0.55, 0.75)
    return [
        oval(0, 0.68, 0.15, 0.16),
        oval(0, -0.75, 0.13, 0.13),
        shape(
            (-0.15, -0.65), (0.15, -0.65), (0.38, -0.4), (0.42, 0.2), (w, 0.6), (-w, 0.6), (-0.42, 0.2), (-0.38, -0.4)
        ),
        line((-0.45, 0.35), (0.45, 0.35)),
    ]


def bicycle(r):
    s = r.uniform(0.33, 0.42)
    return [
        oval(-0.5, 0.35, s, s),
        oval(0.5, 0.35, s, s),
        line((-0.5, 0.35), (-0.2, -0.2), (0.35, -0.2), (0, 0.35), (-0.5, 0.35)),
        line((0, 0.35), (-0.25, -0.4)),
        line((-0.4, -0.4), (-0.1, -0.4)),
        line((0.5, 0.35), (0.3, -0.5), (0.55, -0.55)),
    ]


def bottle(r):
    n = r.uniform(0.12, 0.2)
    return [
        shape((-n, -0.9), (n, -0.9), (n, -0.4), (0.38, -0.1), (0.38, 0.9), (-0.38, 0.9), (-0.38, -0.1), (-n, -0.4)),
        box(0, 0.35, 0.38, r.uniform(0.18, 0.3)),
    ]


def butterfly(r):
    w = r.uniform(0.35, 0.48)
    return [
        oval(-0.45, -0.35, w, 0.42),
        oval(0.45, -0.35, w, 0.42),
        oval(-0.38, 0.4, 0.33, 0.36),
        oval(0.38, 0.4, 0.33, 0.36),
        oval(0, 0, 0.09, 0.65),
        line((0, -0.6), (-0.25, -0.95)),
        line((0, -0.6), (0.25, -0.95)),
    ]


def candle(r):
    w = r.uniform(0.16, 0.28)
    return [
        box(0, 0.2, w, 0.6),
        line((0, -0.4), (0, -0.55)),
        shape((0, -0.95), (0.14, -0.6), (0, -0.45), (-0.14, -0.6)),
        oval(0, 0.82, r.uniform(0.45, 0.65), 0.14),
    ]


def car(r):
    t = r.uniform(-0.6, -0.4)
    return [
        shape((-0.9, 0), (-0.5, -0.05), (-0.3, t), (0.35, t), (0.6, -0.05), (0.92, 0.05), (0.92, 0.4), (-0.9, 0.4)),
        shape((-0.35, -0.08), (-0.22, t + 0.1), (0, t + 0.1), (0, -0.08)),
        oval(-0.5, 0.42, 0.22, 0.22),
        oval(0.5, 0.42, 0.22, 0.22),
    ]


def castle(r):
    h = r.uniform(-0.5, -0.2)
    tower = [box(x, 0.1, 0.22, 0.75) for x in (-0.65, 0.65)]
    return [
        box(0, 0.4, 0.5, 0.45),
        *tower,
        *[box(x + d, -0.75, 0.06, 0.1) for x in (-0.65, 0.65) for d in (-0.16, 0, 0.16)],
        *[box(x, h + 0.1, 0.07, 0.1) for x in (-0.3, 0, 0.3)],
        segment(0, 0.85, 0.2, 0.5, 180, 360),
    ]


def chair(r):
    b = r.uniform(-0.95, -0.75)
    return [
        line((-0.45, b), (-0.45, 0.9)),
        line((0.45, 0.15), (0.5, 0.9)),
        line((-0.2, 0.2), (-0.2, 0.7)),
        line((0.2, 0.2), (0.2, 0.7)),
        shape((-0.45, 0.05), (0.3, 0.05), (0.55, 0.2), (-0.4, 0.22)),
        shape((-0.45, b), (-0.3, b), (-0.3, 0.05), (-0.45, 0.05)),
    ]


def clock(r):
    a = r.uniform(0, 2 * math.pi)
    return [
        oval(0, 0, 0.8, 0.8),
        oval(0, 0, 0.65, 0.65),
        line((0, 0), (0.5 * math.cos(a), 0.5 * math.sin(a))),
        line((0, 0), (0, -0.3)),
        *petals(0, 0, 0.55, 0.03, 4),
    ]


def crab(r):
    legs = [line((s * 0.4, y), (s * 0.75, y - 0.05), (s * 0.9, y + 0.25)) for s in (-1, 1) for y in (0.2, 0.35)]
    claws = [
        part
        for s in (-1, 1)
        for part in (
            line((s * 0.4, 0), (s * 0.7, -0.3)),
            segment(s * 0.7, -0.5, 0.2, 0.25, 300 if s > 0 else 290, 600 if s > 0 else 590),
        )
    ]
    return [
        *legs,
        *claws,
        oval(0, 0.2, r.uniform(0.48, 0.6), 0.36),
        oval(-0.15, -0.2, 0.08, 0.1),
        oval(0.15, -0.2, 0.08, 0.1),
    ]


def cup(r):
    t = r.uniform(0.62, 0.7)
    return [
        oval(0.6, 0.05, 0.28, 0.3),
        oval(0.6, 0.05, 0.16, 0.18),
        shape((-t, -0.5), (t, -0.5), (0.42, 0.65), (-0.42, 0.65)),
        oval(0, -0.5, t, r.uniform(0.1, 0.16)),
    ]


def envelope(r):
    h = r.uniform(0.45, 0.6)
    return [box(0, 0, 0.85, h), line((-0.85, -h), (0, r.uniform(0, 0.15)), (0.85, -h))]


def eyeglasses(r):
    s = r.uniform(0.28, 0.36)
    return [
        oval(-0.45, 0, s, s),
        oval(0.45, 0, s, s),
        line((-0.45 + s, 0), (-0.05, -0.1), (0.45 - s, 0)),
        line((-0.45 - s, 0), (-0.95, -0.3)),
        line((0.45 + s, 0), (0.95, -0.3)),
    ]


def fish(r):
    h = r.uniform(0.3, 0.45)
    return [
        shape((0.4, 0), (0.9, -0.4), (0.8, 0), (0.9, 0.4)),
        shape((-0.1, -h + 0.05), (0.2, -h - 0.2), (0.3, -h + 0.15)),
        oval(-0.15, 0, 0.65, h),
        oval(-0.55, -0.1, 0.06, 0.06),
        oval(-0.5, 0, 0.2, 0.28, -60, 60),
    ]


def flower(r):
    n = int(r.integers(5, 9))
    return [
        line((0, 0), (0.05, 0.95)),
        oval(0.28, 0.6, 0.22, 0.1),
        *petals(0, -0.3, 0.36, 0.6 / n**0.6, n),
        oval(0, -0.3, 0.2, 0.2),
    ]


def guitar(r):
    n = r.uniform(0.06, 0.1)
    return [
        box(0, -0.45, n, 0.5),
        box(0, -0.9, n + 0.06, 0.1),
        oval(0, 0.15, 0.33, 0.28),
        oval(0, 0.58, 0.45, 0.36),
        oval(0, 0.3, 0.13, 0.13),
        box(0, 0.68, 0.2, 0.04),
    ]


def hammer(r):
    w = r.uniform(0.4, 0.6)
    return [box(0, 0.2, 0.09, 0.75), shape((-w, -0.8), (0.3, -0.8), (0.7, -0.55), (0.3, -0.5), (-w, -0.45))]


def hourglass(r):
    w = r.uniform(0.4, 0.55)
    return [
        shape((-w, -0.75), (w, -0.75), (0.06, 0), (w, 0.75), (-w, 0.75), (-0.06, 0)),
        box(0, -0.82, w + 0.1, 0.08),
        box(0, 0.82, w + 0.1, 0.08),
        segment(0, 0.75, w * 0.8, 0.4, 180, 360),
    ]


def house(r):
    p = r.uniform(-0.95, -0.75)
    return [
        box(0.4, -0.6, 0.1, 0.25),
        box(0, 0.35, 0.65, 0.5),
        shape((-0.8, -0.15), (0, p), (0.8, -0.15)),
        box(-0.25, 0.55, 0.15, 0.3),
        box(0.3, 0.3, 0.17, 0.15),
    ]


def ice_cream(r):
    w = r.uniform(0.35, 0.45)
    scoops = (
        [oval(0, -0.3, w, 0.35)]
        if r.random() < 0.5
        else [oval(-0.2, -0.25, 0.3, 0.3), oval(0.2, -0.25, 0.3, 0.3), oval(0, -0.6, 0.3, 0.3)]
    )
    return [
        *scoops,
        shape((-w - 0.05, -0.1), (w + 0.05, -0.1), (0, 0.95)),
        line((-0.2, -0.1), (0.12, 0.5)),
        line((0.2, -0.1), (-0.12, 0.5)),
    ]


def key(r):
    s = r.uniform(0.26, 0.36)
    return [
        box(0.25, 0, 0.65, 0.07),
        oval(-0.5, 0, s, s),
        oval(-0.55, 0, s / 2, s / 2),
        box(0.8, 0.18, 0.06, 0.14),
        box(0.55, 0.16, 0.06, 0.12),
    ]


def ladder(r):
    w, n = r.uniform(0.22, 0.35), int(r.integers(4, 7))
    return [
        line((-w, -0.95), (-w - 0.1, 0.95)),
        line((w, -0.95), (w + 0.1, 0.95)),
        *[line((-w - 0.05, y), (w + 0.05, y)) for y in np.linspace(-0.75, 0.75, n)],
    ]


def lamp(r):
    w = r.uniform(0.5, 0.7)
    return [box(0, 0.3, 0.06, 0.5), box(0, -0.5, w, 0.38, r.uniform(0.4, 0.7)), segment(0, 0.9, 0.42, 0.2, 180, 360)]


def mushroom(r):
    w = r.uniform(0.65, 0.85)
    return [
        box(0, 0.4, 0.28, 0.5, 0.75),
        segment(0, 0, w, 0.75, 180, 360),
        oval(-0.3, -0.3, 0.12, 0.1),
        oval(0.25, -0.4, 0.13, 0.1),
    ]


def pear(r):
    return [
        shape(
            *[
                (x * r.uniform(0.95, 1.05), y)
                for x, y in (
                    (0, -0.7),
                    (0.2, -0.55),
                    (0.28, -0.15),
                    (0.55, 0.3),
                    (0.4, 0.75),
                    (0, 0.88),
                    (-0.4, 0.75),
                    (-0.55, 0.3),
                    (-0.28, -0.15),
                    (-0.2, -0.55),
                )
            ]
        ),
        line((0, -0.65), (0.1, -0.95)),
        oval(0.28, -0.78, 0.18, 0.08),
    ]


def rabbit(r):
    h = r.uniform(0.35, 0.48)
    return [
        oval(-0.25, -0.55, 0.13, h),
        oval(0.25, -0.55, 0.13, h),
        oval(0, 0.25, 0.55, 0.5),
        oval(-0.2, 0.15, 0.07, 0.09),
        oval(0.2, 0.15, 0.07, 0.09),
        oval(0, 0.35, 0.09, 0.06),
        line((-0.15, 0.4), (-0.7, 0.35)),
        line((0.15, 0.4), (0.7, 0.35)),
    ]


def rocket(r):
    w = r.uniform(0.25, 0.35)
    return [
        shape((-w, 0.3), (-0.65, 0.8), (-w, 0.65)),
        shape((w, 0.3), (0.65, 0.8), (w, 0.65)),
        shape((-0.15, 0.65), (0, 0.98), (0.15, 0.65)),
        shape((0, -0.95), (w, -0.45), (w, 0.65), (-w, 0.65), (-w, -0.45)),
        oval(0, -0.2, 0.15, 0.15),
    ]


def sailboat(r):
    m = r.uniform(-0.95, -0.8)
    return [
        line((0, 0.4), (0, m)),
        shape((0.08, m + 0.05), (0.75, 0.3), (0.08, 0.3)),
        shape((-0.08, m + 0.2), (-0.6, 0.3), (-0.08, 0.3)),
        shape((-0.85, 0.42), (0.85, 0.42), (0.55, 0.8), (-0.6, 0.8)),
    ]


def snail(r):
    s = r.uniform(0.42, 0.52)
    return [
        shape((-0.9, 0.7), (-0.85, 0.1), (-0.65, 0.1), (-0.55, 0.5), (0.8, 0.5), (0.95, 0.7)),
        oval(0.15, 0.1, s, s),
        oval(0.15, 0.1, s * 0.62, s * 0.62),
        oval(0.15, 0.1, s * 0.28, s * 0.28),
        line((-0.8, 0.1), (-0.95, -0.3)),
        line((-0.7, 0.1), (-0.65, -0.3)),
    ]


def spider(r):
    legs = [
        line((0, y), (s * 0.55, y - 0.35), (s * 0.9, y + d))
        for s in (-1, 1)
        for y, d in ((-0.2, -0.3), (-0.05, 0.0), (0.1, 0.3), (0.25, 0.6))
    ]
    return [*legs, oval(0, 0.25, r.uniform(0.26, 0.36), 0.38), oval(0, -0.25, 0.2, 0.2)]


def star(r):
    return [burst(0, 0, 0.95, r.uniform(0.32, 0.5), 5)]


def table(r):
    h = r.uniform(-0.35, -0.1)
    return [
        line((-0.65, h), (-0.7, 0.75)),
        line((0.65, h), (0.7, 0.75)),
        line((-0.4, h), (-0.4, 0.5)),
        line((0.4, h), (0.4, 0.5)),
        shape((-0.65, h - 0.25), (0.65, h - 0.25), (0.92, h), (-0.92, h)),
    ]


def umbrella(r):
    w = r.uniform(0.75, 0.92)
    return [
        line((0, -0.1), (0, 0.7), (0.12, 0.85), (0.28, 0.75), (0.28, 0.62)),
        line((0, -0.8), (0, -0.95)),
        segment(0, -0.05, w, 0.75, 180, 360),
        line((0, -0.8), (-0.3, -0.05)),
        line((0, -0.8), (0.3, -0.05)),
    ]


def windmill(r):
    a = r.uniform(0, 90)
    blades = [
        (_turn(shape((0, -0.05), (0.75, -0.13), (0.75, 0.13), (0, 0.05)), a + q, (0, -0.3))) for q in (0, 90, 180, 270)
    ]
    return [
        box(0, 0.3, 0.42, 0.65, 0.5),
        box(0, 0.75, 0.12, 0.2),
        shape((-0.25, -0.35), (0, -0.62), (0.25, -0.35)),
        *blades,
        oval(0, -0.3, 0.07, 0.07),
    ]


def _turn(part, degrees, about):
    angle = math.radians(degrees)
    matrix = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return part[0] @ matrix + about, part[1]


_DRAWN = (
    airplane,
    apple,
    axe,
    bell,
    bicycle,
    bottle,
    butterfly,
    candle,
    car,
    castle,
    chair,
    clock,
    crab,
    cup,
    envelope,
    eyeglasses,
    fish,
    flower,
    guitar,
    hammer,
    hourglass,
    house,
    ice_cream,
    key,
    ladder,
    lamp,
    mushroom,
    pear,
    rabbit,
    rocket,
    sailboat,
    snail,
    spider,
    star,
    table,
    umbrella,
    windmill,
)

CATEGORIES = {function.__name__.replace("_", " "): function for function in _DRAWN}
