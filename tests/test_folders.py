"""Class folders: which splits and classes are read, what is left out and said, what is refused by name."""

import os
import unicodedata
from collections import Counter

import pytest
from helpers import refused

from densenas.images.folders import read_folder

SERVICES = ("@eaDir", "__MACOSX", ".thumbnails", "$RECYCLE.BIN", "lost+found", "@Recently-Snapshot")


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


def touch(folder, *names):
    """Images a and b of each class, which nobody opens, or other files."""
    for name in names:
        path = folder / name
        if path.suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        else:
            touch(folder, f"{name}/a.png", f"{name}/b.png")


def splits(*names):
    return [f"{name}/{label}" for name in names for label in ("cat", "dog")]


def read(source):
    """How many images each class has in each split, and the notes."""
    images = read_folder(source)
    keys = [item.key for item in images.items]
    assert keys == sorted(keys)
    counts = Counter((item.part, item.label) for item in images.items)
    return counts, "; ".join(images.notes)


def in_each(*parts):
    return Counter({(part, label): 2 for part in parts for label in ("cat", "dog")})


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("train", "valid", "test"), ("train", "val", "test")),
        (("Train", "Validation", "TESTING"), ("train", "val", "test")),
        (("training", "dev", "Test"), ("train", "val", "test")),
        (("Train", "Test"), ("train", "test")),
        (("training", "validation"), ("train", "test")),  # as ImageNet's val, the only one held out
        (("TRAIN",), (None,)),
        (("train ", "test"), ("train", "test")),
    ],
)
def test_splits_by_their_usual_names(names, parts, source):
    touch(source, *splits(*names))
    found, notes = read(source)
    assert found == in_each(*parts)
    assert ("'validation' is the test split" in notes) == ("validation" in names)


@pytest.mark.parametrize(
    "twins", [("Train", "train"), ("train", "training"), ("val", "valid"), ("test", "Test")]
)
def test_two_folders_that_mean_one_split(twins, source):
    touch(source, *splits("train", *twins))
    with refused(
        ValueError,
        rf"'{min(twins)}' and '{max(twins)}' in '.*set' both mean (train|val|test): which one",
    ):
        read_folder(source)


@pytest.mark.parametrize(
    "folders",
    [
        splits("test"),
        ["test", "cat", "dog"],
        ["valid", "invalid"],
        splits("train_set", "test_set"),
        splits("train2017", "val2017"),
        ["seg_train/cat", "seg_test/cat", "seg_pred/cat"],
        ["train/train", "train/cat"],
        ["train/cat", "train/dog", "test/Val"],
    ],
)
def test_classes_that_are_called_like_splits(folders, source):
    touch(source, *folders)
    with refused(
        ValueError,
        r"'(test|train|val|Val|seg_).*' in '.*' would be a class, but looks like a split",
    ):
        read_folder(source)


def test_a_class_may_have_such_a_word_in_its_name(source):
    touch(source, "bullet_train", "test tube", "training shoe", "cat", "dog", "ant")
    assert len(read(source)[0]) == 6


@pytest.mark.parametrize("wrapper", ["images", "archive/images"])
def test_a_wrapper_above_the_splits(wrapper, source):
    touch(source, *splits(f"{wrapper}/Train"))
    with refused(
        ValueError, rf"'.*Train' looks like a split, .* did you mean source: \S*set/{wrapper}\?"
    ):
        read_folder(source)


def test_a_split_under_a_name_that_is_not_taken(source):
    touch(source, *splits("train", "test_images"))
    with refused(
        ValueError,
        r"'test_images' in '.*set' looks like a test split: call it test or move it away",
    ):
        read_folder(source)


def test_every_folder_beside_the_splits_is_named(source):
    touch(source, *splits("train", "test", "extra", "test2", ".old"), "read me.txt")
    found, notes = read(source)
    assert found == in_each("train", "test")
    assert (
        notes
        == "left out, as no images in a class folder: 1 × .old/, 1 × .txt, 1 × extra/, 1 × test2/"
    )


def test_what_is_read_and_what_is_left_out(source):
    endings = ("jpg", "JPEG", "png", "ppm", "BMP", "pgm", "tif", "TIFF", "webp", "gif")
    touch(source, "cat", *(f"dog/deep/{number}.{ending}" for number, ending in enumerate(endings)))
    touch(source, "stray.png", "cat/note.PDF", "cat/Thumbs.db", "cat/._a.png")
    touch(
        source, *(f"{place}{service}/cat/a.png" for service in SERVICES for place in ("", "cat/"))
    )
    os.mkfifo(source / "cat/pipe.png")
    found, notes = read(source)
    assert found == {(None, "cat"): 2, (None, "dog"): 10}
    files = [
        "1 × .db",
        "1 × .pdf",
        "1 × .png",
        "1 × .png that is no regular file",
        "1 × hidden file",
    ]
    left_out = sorted(
        [*files, *(f"2 × {service}/" for service in SERVICES)], key=lambda entry: entry[4:]
    )
    assert notes == f"left out, as no images in a class folder: {', '.join(left_out)}"


def test_class_folders_without_an_image(source):
    touch(source, "cat", "dog/list.txt", "ant/.hidden.png")
    with refused(
        ValueError, r"no image in the class folder 'ant', 'dog' of '.*set' \(\.bmp, \.gif"
    ):
        read_folder(source)


def test_links_between_the_folders_of_a_source(source):
    touch(source, *splits("train"))
    (source / "test").symlink_to("train")
    with refused(
        ValueError,
        r"'.*set/train' and '.*set/test' are one and the same folder: its images would count",
    ):
        read_folder(source)
    (source / "test").unlink()
    (source / "train/kitty").symlink_to("cat")
    with refused(ValueError, r"'.*train/cat' and '.*train/kitty' are one and the same folder"):
        read_folder(source)


def test_links_to_elsewhere_and_back(source, tmp_path):
    touch(tmp_path, *splits("elsewhere"))
    (source / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/ant").symlink_to(tmp_path / "other")
    touch(tmp_path, "other")
    (tmp_path / "other/back").symlink_to(source)
    (tmp_path / "other/up").symlink_to("/")
    (tmp_path / "other/c.png").symlink_to("a.png")
    (tmp_path / "other/gone.png").symlink_to("nowhere.png")  # a broken image, which packing names
    found, notes = read(source)
    assert found == in_each(None) + Counter({(None, "ant"): 4})
    assert notes.endswith("1 × back/ (a link back), 1 × up/ (a link back)")


@pytest.mark.parametrize(
    ("link", "target"), [("ant", "/nowhere"), ("ant", "ant"), ("cat/more", "nowhere")]
)
def test_a_link_that_leads_nowhere(link, target, source):
    touch(source, "cat", "dog")
    (source / link).symlink_to(target)
    with refused(ValueError, rf"the link '.*{link}' leads nowhere: mend or remove it"):
        read_folder(source)


def test_images_are_where_the_links_lead(source, tmp_path):
    """A link that is set to another folder is another source, although every name stays the same."""
    touch(tmp_path / "A", "cat", "dog")
    (source / "now").symlink_to(tmp_path / "A")
    assert {item.content.parent.parent for item in read_folder(source / "now").items} == {
        tmp_path / "A"
    }


def test_a_split_that_links_to_its_source(source):
    touch(source, *splits("test"))
    (source / "train").symlink_to(".")
    with refused(ValueError, r"the split '.*train' is a link to a folder above it"):
        read_folder(source)


@pytest.mark.parametrize("place", ["set", "set/cat", "set/cat/deep"])
def test_a_folder_that_may_not_be_read(place, source, monkeypatch):
    touch(source, "cat/deep", "dog")
    scan = os.scandir

    def refusing(path):
        if str(path).endswith(place):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(
        "os.scandir", refusing
    )  # root, who runs tests in containers, may read everything
    with refused(ValueError, rf"folder '.*{place}' cannot be read: Permission denied"):
        read_folder(source)


def spelled(name):
    return [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]


def test_one_name_in_two_spellings(source):
    touch(source, "dog", *(f"cat/{name}.png" for name in spelled("bébé")))
    said = r"the files '.*cat/be\\u0301be\\u0301.png' and '.*cat/b\\xe9b\\xe9.png' are one name in two Unicode"
    with refused(ValueError, said):
        read_folder(source)


def test_one_folder_in_two_spellings(source):
    touch(source, "dog", *(f"cat/{name}/a.png" for name in spelled("é")))
    with refused(
        ValueError, r"'.*cat/\S+/a.png' and '.*cat/\S+/a.png' are one name in two Unicode spellings"
    ):
        read_folder(source)


def test_one_class_in_two_spellings(source):
    touch(source, "dog", *spelled("bébé"))
    with refused(
        ValueError,
        r"class folders 'be\\u0301be\\u0301' and 'b\\xe9b\\xe9' .* are one name in two Unicode",
    ):
        read_folder(source)


def test_classes_apart_by_case_are_two_and_said(source):
    touch(source, "Cat", "cat", "cat ", "dog")
    found, notes = read(source)
    assert len(found) == 4 and notes == "classes apart only by case or spaces: 'Cat', 'cat', 'cat '"


def test_names_that_are_no_text(source):
    touch(source, "cat", "dog", os.fsdecode(b"cat/\xff.png"), os.fsdecode(b"cat/x.\xfe"))
    found, notes = read(source)
    assert found[None, "cat"] == 3 and notes.endswith(r"1 × .\udcfe")
    touch(source, os.fsdecode(b"d\xff"))
    with refused(ValueError, r"the class folder '.*d\\udcff' has no printable name: rename it"):
        read_folder(source)
