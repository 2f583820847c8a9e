"""The two worlds of the generated set: their surfaces, colours and sun."""

from __future__ import annotations

from dataclasses import dataclass

# how rough each surface is: large-scale and pixel-scale strength, sixteenths
ROUGH = {
    "grass": (26, 14),
    "meadow": (22, 10),
    "dry": (26, 14),
    "soil": (30, 14),
    "sand": (14, 8),
    "water": (8, 4),
    "deep": (12, 4),
    "shallow": (10, 4),
    "asphalt": (10, 6),
    "concrete": (10, 6),
    "paving": (10, 8),
    "tree": (30, 26),
    "crop": (12, 12),
    "gravel": (16, 16),
    "pool": (6, 5),
}


@dataclass(frozen=True)
class World:
    """A palette and a sun; `light` lists directions of shadows, in sixteenths of the height."""

    light: tuple
    surfaces: dict
    colours: dict


WORLDS = {
    "a": World(
        ((12, 8), (10, 10), (8, 12)),
        {
            "grass": (108, 130, 76),
            "meadow": (132, 154, 88),
            "dry": (158, 150, 104),
            "soil": (166, 134, 100),
            "sand": (226, 206, 164),
            "water": (58, 92, 104),
            "deep": (26, 74, 112),
            "shallow": (108, 178, 178),
            "asphalt": (116, 116, 118),
            "concrete": (186, 182, 172),
            "paving": (204, 194, 176),
            "tree": (58, 88, 48),
            "gravel": (150, 138, 124),
            "pool": (88, 190, 214),
        },
        {
            "white": (226, 226, 220),
            "grey": (150, 152, 156),
            "red": (180, 60, 48),
            "orange": (218, 136, 66),
            "yellow": (230, 200, 84),
            "brown": (122, 86, 62),
            "green": (76, 124, 72),
            "blue": (58, 106, 182),
            "black": (44, 46, 50),
        },
    ),
    "b": World(
        ((-12, 8), (-10, 10), (-8, 12)),
        {
            "grass": (124, 130, 68),
            "meadow": (150, 156, 84),
            "dry": (180, 158, 106),
            "soil": (150, 106, 76),
            "sand": (236, 222, 192),
            "water": (70, 84, 92),
            "deep": (40, 82, 92),
            "shallow": (136, 184, 160),
            "asphalt": (98, 96, 102),
            "concrete": (170, 168, 170),
            "paving": (188, 172, 158),
            "tree": (84, 90, 40),
            "gravel": (136, 122, 108),
            "pool": (112, 204, 206),
        },
        {
            "white": (246, 242, 234),
            "grey": (138, 138, 146),
            "red": (196, 74, 64),
            "orange": (226, 150, 86),
            "yellow": (238, 212, 110),
            "brown": (106, 76, 60),
            "green": (94, 130, 64),
            "blue": (76, 120, 170),
            "black": (36, 36, 44),
        },
    ),
}
