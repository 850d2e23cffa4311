"""The five kinds of noise of the BLT paper (arXiv 2412.09871, section 6.1), each a function of a text and a seed."""

import random
from collections.abc import Callable


def drop(text: str, seed: int = 0) -> str:
    """Leaves out a tenth of the characters."""
    chance = random.Random(seed)
    return "".join(char for char in text if chance.random() >= 0.1)


def repeat(text: str, seed: int = 0) -> str:
    """Writes a fifth of the characters two to four times."""
    chance = random.Random(seed)
    return "".join(char * (chance.randint(2, 4) if chance.random() < 0.2 else 1) for char in text)


def upper(text: str, seed: int = 0) -> str:
    """Writes capitals."""
    return text.upper()


def random_case(text: str, seed: int = 0) -> str:
    """Writes each letter as a capital or not, by chance."""
    chance = random.Random(seed)
    return "".join(char.upper() if chance.random() < 0.5 else char.lower() for char in text)


def antspeak(text: str, seed: int = 0) -> str:
    """Writes capitals with a space after each character."""
    return "".join(f"{char} " for char in text.upper())


NOISE: dict[str, Callable[[str, int], str]] = {
    "drop": drop,
    "repeat": repeat,
    "upper": upper,
    "random case": random_case,
    "antspeak": antspeak,
}
