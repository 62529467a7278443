"""Paints an example picture: the drawing that ships beside the model, or a held-out digit."""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import digits
from scenes import draw_scene, paint

EXAMPLE = "example 8"  # seed of the picture that ships beside the model


def main() -> None:
    """Parse the few flags, and paint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="file to write")
    parser.add_argument("--digit", action="store_true", help="the first handwritten digit that was held out")
    args = parser.parse_args()
    if args.digit:
        picture = digits.clean(digits.handwriting(held_out=True)[0][0])
    else:
        picture = paint(draw_scene(Random(EXAMPLE), count=4))
    picture.save(args.path)


if __name__ == "__main__":
    main()
