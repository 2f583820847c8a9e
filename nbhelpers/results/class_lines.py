"""What knowing the scene class alone reaches on published test splits.

Records made before they had the field `class_only` take it from here. The numbers are those of
`audit.class_only`; images whose file names give no class count as one class. Of Sydney-Captions no
class is known.
"""

from __future__ import annotations

CLASS_ONLY: dict[str, dict[str, float]] = {  # fingerprint of the split -> recalls in percent
    # rsicd, 1093 images
    "3f79e865d8eaaeba60bbe659416ac8bb1d5ace27d546db6242a0aa8ee817cfcb": {
        "i2t_R@1": 2.8362,
        "i2t_R@5": 13.5158,
        "i2t_R@10": 25.4606,
        "t2i_R@1": 2.8362,
        "t2i_R@5": 14.1812,
        "t2i_R@10": 28.3623,
        "mR": 14.5320,
    },
    # ucm, 210 images
    "c0196431ac2a0c315aab827e649121334b1223c5b8a67cbe439b34ff7831cb89": {
        "i2t_R@1": 10.0000,
        "i2t_R@5": 42.3361,
        "i2t_R@10": 68.9437,
        "t2i_R@1": 10.0000,
        "t2i_R@5": 50.0000,
        "t2i_R@10": 100.0000,
        "mR": 46.8800,
    },
    # rsitmd, 452 images
    "4c15e5a438927b3b650696148b2cae540b5946301b628c45c0a47a4d8d96b497": {
        "i2t_R@1": 7.0796,
        "i2t_R@5": 29.8861,
        "i2t_R@10": 51.3680,
        "t2i_R@1": 7.0796,
        "t2i_R@5": 33.6283,
        "t2i_R@10": 65.4867,
        "mR": 32.4214,
    },
}
