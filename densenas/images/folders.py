"""Class folders: which images they hold, of which class and split, and where that is unclear."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from densenas.images.items import Item, Source

ENDINGS = (*IMG_EXTENSIONS, ".gif")
# A folder so called, in any case of letters, is a split.
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_NAMES |= {"val": "val", "valid": "val", "validation": "val", "dev": "val"}
# Words that make a name look like a split, beside or after which the fillers say nothing.
SPLIT_WORDS = SPLIT_NAMES | {"eval": "test", "evaluation": "test", "holdout": "test"}
FILLERS = {"set", "data", "dataset", "split", "folder", "images", "imgs"}
# What network storage and systems put beside images: thumbnails, bins, extras of archives.
SERVICE = {"@eadir", "@__thumb", "@recently-snapshot", "@sharebin", "@tmp", "@recycle", "#recycle"}
SERVICE |= {"#snapshot", "$recycle.bin", "__macosx", "__pycache__", "lost+found"}
SERVICE |= {"system volume information"}
# Control characters, ends of lines, and the stand-ins for bytes that are no UTF-8.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Folder(NamedTuple):
    """A folder as it was reached, and where it really is."""

    path: str
    real: str

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


def read_folder(root: Path) -> Source:
    """Class folders, flat or below splits, as items sorted by key; and notes on the reading.

    A val split without a test split is ImageNet's, to be tested on. No image is opened. Raises
    ValueError or FileNotFoundError with one sentence where splits, classes or names are unclear,
    or a folder cannot be read.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"source {str(root)!r} is not a folder")
    walk = Walk(root)
    top = Folder(str(root), os.path.realpath(root))
    walk.enter(top)
    folders = walk.below(top)
    splits = _find_splits(top, folders)
    if not splits:
        _read_classes(walk, top, folders, None)
    else:
        beside = [folder for folder in folders if folder not in splits.values()]
        walk.left_out.update(f"{folder.name}/" for folder in beside)
    for meaning, folder in splits.items():
        if not walk.enter(folder):
            raise ValueError(f"the split '{folder.path}' is a link to a folder above it")
        _read_classes(walk, folder, walk.below(folder), _part(meaning, splits))
    items = sorted(walk.items, key=lambda item: item.key)
    _refuse_twins(items)
    notes = []
    if "val" in splits and "test" not in splits:
        notes.append(f"'{splits['val'].name}' is the test split, there is no other")
    look_alikes = _look_alikes({item.label for item in items})
    if look_alikes:
        notes.append(f"classes apart only by case or spaces: {quoted(look_alikes)}")
    if walk.left_out:
        notes.append(f"left out, as no images in a class folder: {_counted(walk.left_out)}")
    return Source(items, notes)


class Walk:
    """Reads the images below class folders; keeps them as items, and counts what it leaves out."""

    def __init__(self, root: Path) -> None:
        self.start = len(os.path.join(root, ""))
        self.items: list[Item] = []
        self.left_out: Counter[str] = Counter()
        # Where each folder was reached. A link to one above the source would lead back into it.
        self.entered = {str(parent): "" for parent in Path(os.path.realpath(root)).parents}

    def enter(self, folder: Folder) -> bool:
        """False for a link that leads back up; ValueError where a folder is reached in two ways."""
        if folder.real not in self.entered:
            self.entered[folder.real] = folder.path
            return True
        before = self.entered[folder.real]
        if folder.path.startswith(os.path.join(before, "")):
            self.left_out[f"{folder.name}/ (a link back)"] += 1
            return False
        raise ValueError(
            f"{before!r} and {folder.path!r} are one and the same folder:"
            f" its images would count twice, remove one of the two"
        )

    def entries(self, folder: Folder) -> tuple[list[Folder], list[os.DirEntry]]:
        """Folders and files in a folder, sorted by name, without hidden ones and a service's."""
        try:
            with os.scandir(folder.path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"folder {folder.path!r} cannot be read: {error.strerror}") from None
        folders, files = [], []
        for entry in entries:
            link = entry.is_symlink()
            if entry.is_dir(follow_symlinks=False) or (link and os.path.isdir(entry.path)):
                if entry.name[0] == "." or entry.name.casefold() in SERVICE:
                    self.left_out[f"{entry.name}/"] += 1
                    continue
                real = os.path.join(folder.real, entry.name)
                folders.append(Folder(entry.path, os.path.realpath(real) if link else real))
            elif entry.name[0] == ".":
                self.left_out["hidden file"] += 1
            elif link and not os.path.exists(entry.path) and _ending(entry) not in ENDINGS:
                raise ValueError(f"the link {entry.path!r} leads nowhere: mend or remove it")
            else:
                files.append(entry)
        return folders, files

    def below(self, folder: Folder) -> list[Folder]:
        """The folders in a folder, of which the files are left out."""
        folders, files = self.entries(folder)
        for file in files:
            self.left_out[_ending(file) or file.name] += 1
        return folders

    def read_class(self, folder: Folder, label: str, part: str | None) -> int:
        """Keeps all images below a class folder; returns their number."""
        before = len(self.items)
        waiting = [folder]
        while waiting:
            folder = waiting.pop()
            folders, files = self.entries(folder)
            for inner in folders:
                if inner.name.casefold() in SPLIT_NAMES:
                    above = os.path.dirname(inner.path)
                    raise ValueError(
                        f"{inner.path!r} looks like a split, but lies in class '{label}':"
                        f" did you mean source: {above}? A class of that name needs another"
                    )
                if self.enter(inner):
                    waiting.append(inner)
            for file in files:
                self._read_file(file, folder.real, label, part)
        return len(self.items) - before

    def _read_file(self, file: os.DirEntry, real: str, label: str, part: str | None) -> None:
        ending = _ending(file)
        if ending not in ENDINGS:
            self.left_out[ending or file.name] += 1
        elif file.is_file(follow_symlinks=False) or _is_image_link(file):
            # Composed, or one name would have another hash on a file system that decomposes it.
            key = unicodedata.normalize("NFC", file.path[self.start :])
            # Where it really is, or a link set to another folder could pass for the same source.
            self.items.append(Item(key, label, part, Path(real, file.name)))
        else:
            self.left_out[f"{ending} that is no regular file"] += 1


def _ending(entry: os.DirEntry) -> str:
    return os.path.splitext(entry.name)[1].lower()


def _is_image_link(file: os.DirEntry) -> bool:
    """A link to a regular file, or to nowhere: that is a broken image, which packing names."""
    return os.path.isfile(file.path) or not os.path.exists(file.path)


def _find_splits(top: Folder, folders: list[Folder]) -> dict[str, Folder]:
    """The folders that are splits by their meaning, train first; none where there is no train."""
    splits: dict[str, Folder] = {}
    for folder in folders:
        meaning = SPLIT_NAMES.get(folder.name.strip().casefold())
        if meaning in splits:
            raise ValueError(
                f"'{splits[meaning].name}' and '{folder.name}' in '{top.path}' both mean {meaning}:"
                f" which one is it? Move the other away"
            )
        if meaning:
            splits[meaning] = folder
    if "train" not in splits:
        return {}
    for folder in folders:
        meaning = _split_like(folder.name)
        if meaning and meaning not in splits:
            raise ValueError(
                f"'{folder.name}' in '{top.path}' looks like a {meaning} split:"
                f" call it {meaning} or move it away"
            )
    return {meaning: splits[meaning] for meaning in ("train", "val", "test") if meaning in splits}


def _part(meaning: str, splits: dict[str, Folder]) -> str | None:
    """The part that a split's images have; None where all of them are still to be split."""
    if len(splits) == 1:
        return None
    if meaning == "val" and "test" not in splits:
        return "test"
    return meaning


def _split_words(name: str) -> list[str]:
    """The words of a name without fillers: train of Train_set2, trainset or train-data."""
    words = []
    for word in re.findall(r"[^\W\d_]+", name.casefold()):
        bare = re.sub("(set|data|images)$", "", word)
        word = bare if bare in SPLIT_WORDS else word
        if word not in FILLERS:
            words.append(word)
    return words


def _split_like(name: str) -> str | None:
    """What split a name means that says nothing else."""
    words = _split_words(name)
    return SPLIT_WORDS.get(words[0]) if len(words) == 1 else None


def _refuse_split_names(above: Folder, folders: list[Folder]) -> None:
    """No class may be called like a split: seg_train beside seg_test is none, bullet_train is."""
    names = [folder.name for folder in folders if _split_like(folder.name)]
    meanings = {}  # of the names that have such a word among others
    for folder in folders:
        for word in _split_words(folder.name):
            if word in SPLIT_WORDS:
                meanings[folder.name] = SPLIT_WORDS[word]
    if len(set(meanings.values())) > 1 and 2 * len(meanings) > len(folders):
        names = [*meanings]
    if names:
        raise ValueError(
            f"{quoted(names)} in {above.path!r} would be a class, but looks like a split:"
            f" splits are train, val and test, side by side in source; rename a class of that name"
        )


def _read_classes(walk: Walk, above: Folder, folders: list[Folder], part: str | None) -> None:
    """Every folder is a class and must have an image."""
    _refuse_split_names(above, folders)
    names: dict[str, str] = {}
    empty = []
    for folder in folders:
        if UNPRINTABLE.search(folder.name):
            raise ValueError(f"the class folder {folder.path!r} has no printable name: rename it")
        label = unicodedata.normalize("NFC", folder.name)
        if label in names:
            raise ValueError(
                f"the class folders {names[label]!a} and {folder.name!a} in '{above.path}' are"
                f" one name in two Unicode spellings: merge them"
            )
        if not walk.enter(folder):
            continue
        names[label] = folder.name
        if not walk.read_class(folder, label, part):
            empty.append(label)
    endings = ", ".join(sorted(ENDINGS))
    if len(empty) == len(names):
        raise ValueError(f"{above.path!r} holds no class folders with images ({endings})")
    if empty:
        raise ValueError(
            f"no image in the class folder {quoted(empty)} of {above.path!r} ({endings}):"
            f" a class without images cannot be learned, remove its folder or fill it"
        )


def _refuse_twins(items: list[Item]) -> None:
    """Sorted items with one name in two spellings would be one image in the pack."""
    for k in range(1, len(items)):
        if items[k].key == items[k - 1].key:
            twins = str(items[k - 1].content), str(items[k].content)
            raise ValueError(
                f"the files {twins[0]!a} and {twins[1]!a} are one name in two Unicode spellings:"
                f" rename or remove one"
            )


def _look_alikes(classes: set[str]) -> list[str]:
    """Classes that other file systems would not tell apart."""
    spellings = defaultdict(list)
    for name in sorted(classes):
        spellings[name.strip().casefold()].append(name)
    return [name for alike in spellings.values() if len(alike) > 1 for name in alike]


def _counted(left_out: Counter[str]) -> str:
    kinds = [f"{count} × {repr(what)[1:-1]}" for what, count in sorted(left_out.items())]
    more = f" and {len(kinds) - 20} other kinds" if len(kinds) > 20 else ""
    return ", ".join(kinds[:20]) + more


def quoted(names: Iterable[str]) -> str:
    """Names in quotes and on one line whatever is in them, of many only the first ten."""
    quoted = [repr(name) for name in names]
    more = f" and {len(quoted) - 10} more" if len(quoted) > 10 else ""
    return ", ".join(quoted[:10]) + more
