"""The kinds of inputs of `fuzz`: each has `make(random, folder) -> content` and `check(folder, content)`.

`make` writes the input to a folder. `check` reads it by the project and by a reference. It returns None if the input is accepted,
a line if it is refused in another way than by a UserError, and raises AssertionError if the two disagree.
"""

import importlib
import random
from collections.abc import Callable

MODULES = {"image": "images", "tiff": "images", "pdf": "pages", "table": "tables", "tensors": "models", "config": "models"}
MODULES |= {"index": "indexes"}
EXTREMES = (0, 1, 2, 127, 128, 255, 256, 32_767, 65_535, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def prepare(kind: str) -> tuple[Callable, Callable]:
    """Return `make` and `check` of a kind; its libraries are imported."""
    module = importlib.import_module(f"fuzz_{MODULES[kind]}")
    return getattr(module, f"make_{kind}"), getattr(module, f"check_{kind}")


def generator(seed: int, kind: str, number: int) -> random.Random:
    """Return the random numbers of an input."""
    return random.Random(f"{seed} {kind} {number}")


def damage(random: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """Change bytes in one of several ways; `other` is another file of the kind."""
    content = bytearray(data)
    way = random.choice(("flip", "flip", "number", "number", "cut", "drop", "repeat", "noise", "splice", "append"))
    offset = min(int(random.expovariate(4) * len(content)), len(content) - 1) if content else 0  # headers are at the start
    if way == "flip" and content:
        for _ in range(random.randint(1, 8)):
            content[min(int(random.expovariate(3) * len(content)), len(content) - 1)] ^= 1 << random.randrange(8)
    elif way == "number":
        width, order = random.choice((1, 2, 4, 8)), random.choice(("big", "little"))
        content[offset : offset + width] = (random.choice(EXTREMES) % 256**width).to_bytes(width, order)
    elif way == "cut":
        del content[random.randrange(len(content) + 1) :]
    elif way == "drop":
        del content[offset : offset + random.randint(1, 64)]
    elif way == "repeat":
        content[offset:offset] = content[offset : offset + random.randint(1, 64)] * random.randint(1, 5)
    elif way == "noise":
        content[offset : offset + random.randint(1, 64)] = random.randbytes(random.randint(1, 64))
    elif way == "splice" and other:
        content[: offset + 1] = other[: random.randrange(min(len(other), 200))]
    elif way == "append":
        content += random.randbytes(random.randint(1, 64))
    return bytes(content)
