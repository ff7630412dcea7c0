"""Train, val and test: which images of the wanted classes go where, the same on every machine."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import defaultdict

from densenas.images.folders import quoted
from densenas.images.items import Item

SPLITS = ("train", "val", "test")
TEST_FRACTION = 0.2  # where a data set brings no test split of its own


def split_items(
    items: list[Item],
    num_classes: int | list[str] | None,
    val_fraction: float,
    seed: int,
    grows: bool,
) -> dict[str, list[Item]]:
    """The items of the wanted classes by split; ValueError where a class has none in one of them.

    `grows` is a set that may get more images later: these then move none of the others.
    """
    classes = choose_classes({item.label for item in items}, num_classes)
    wanted = set(classes)
    items = [item for item in items if item.label in wanted]
    split_of = assign(items, val_fraction, seed, grows)
    parts: dict[str, list[Item]] = {name: [] for name in SPLITS}
    for item in items:
        parts[split_of[item.key]].append(item)
    for name, part in parts.items():
        refuse_missing(name, classes, {item.label for item in part})
    return parts


def choose_classes(present: set[str], wanted: int | list[str] | None) -> list[str]:
    """The classes to keep, in sorted order: the first `wanted`, those that it names, or all."""
    if isinstance(wanted, int):
        if not 2 <= wanted <= len(present):
            expected = f"expected 2 to {len(present)}, the classes of the data set"
            raise ValueError(f"num_classes is {wanted}, {expected}")
        return sorted(present)[:wanted]
    classes = sorted(present)
    if wanted is not None:
        classes = sorted(unicodedata.normalize("NFC", name) for name in wanted)
    if len(set(classes)) < len(classes):
        raise ValueError("num_classes names a class twice")
    foreign = [name for name in classes if name not in present]
    if foreign:
        foreigner = "which is not a class of the data set"
        raise ValueError(f"num_classes names {quoted(foreign)}, {foreigner}")
    if not classes:
        raise ValueError("num_classes names no class, at least 2 are needed")
    if len(classes) == 1:
        raise ValueError(f"only the class '{classes[0]}' is there, at least 2 are needed")
    return classes


def assign(items: list[Item], val_fraction: float, seed: int, grows: bool) -> dict[str, str]:
    """train, val or test for every key: what the source says, and what it leaves open by a hash of the key.

    A test split drawn here has no seed in its hash: another seed must not leak test images into training.
    """
    split_of = {item.key: item.part or "train" for item in items}
    own = {item.part for item in items}
    keys_of = defaultdict(list)
    for item in items:
        keys_of[item.label].append(item.key)
    for keys in keys_of.values():
        if None in own:
            for key in _draw(keys, TEST_FRACTION, "test", grows, left=1 if "val" in own else 2):
                split_of[key] = "test"
        if "val" not in own:
            train = [key for key in keys if split_of[key] == "train"]
            for key in _draw(train, val_fraction, f"val {seed}", grows):
                split_of[key] = "val"
    return split_of


def _draw(keys: list[str], fraction: float, salt: str, grows: bool, left: int = 1) -> list[str]:
    """The keys whose hash is below `fraction`; of a set that never grows exactly that share.

    In a folder each key stands for itself, so that images added later move no other; of n images f·n ± 2·√(f·(1 - f)·n)
    are drawn in 19 of 20 classes. Only a class that would get none, or keep fewer than are to be `left`, sends or keeps
    the images nearest to the threshold: the alternative would be to refuse small classes.
    """
    if len(keys) < 2:
        return []
    hash_of = {key: _hash(f"{salt}:{key}") for key in keys}
    below = sum(number < fraction for number in hash_of.values())
    count = below if grows else round(fraction * len(keys))
    count = max(1, min(count, len(keys) - left))
    return sorted(keys, key=hash_of.__getitem__)[:count]


def _hash(text: str) -> float:
    """A number in [0, 1)."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8]) / 2**64


def refuse_missing(split: str, classes: list[str], present: set[str]) -> None:
    """ValueError where a split has no image of one of the classes."""
    missing = [name for name in classes if name not in present]
    if missing:
        which = "class" if len(missing) == 1 else f"{len(missing)} classes:"
        verb = "has" if len(missing) == 1 else "have"
        raise ValueError(
            f"{which} {quoted(missing)} {verb} no image left for {split}:"
            f" every class needs images in each split"
        )
