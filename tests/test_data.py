"""Data sets, their splits, every sentence that refuses one, and batches against a naive loop."""

import hashlib
import http.client
import shutil
import unicodedata
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import class_folders, refused
from hypothesis import assume, given
from hypothesis import strategies as st
from torchvision.io import write_jpeg, write_png

from densenas.images.data import Split, load
from densenas.images.items import Item
from densenas.images.pack import read_manifest
from densenas.images.prepare import listing, prepare
from densenas.images.sources import CLASSES, IMAGENETTE
from densenas.images.splits import assign
from densenas.runs.run import Run
from densenas.settings import DataSettings

FIELDS = ("images", "labels")
DIGITS_DIGEST = "4fb44bfb3fb135f8dd1abb10044b772f39e6366126ad33c1e67696d725825d1f"


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSENAS_ROOT", str(tmp_path_factory.mktemp("digits")))
        return Run("digits")


@pytest.fixture(scope="module")
def digits(digits_run):
    return prepare(digits_run, DataSettings())


def manifest(run):
    return {row["key"]: row for row in read_manifest(run.work / "data").to_dict("records")}


def keys(run, split):
    return {key for key, row in manifest(run).items() if row["split"] == split}


def whole(data):
    return Split(
        *(
            torch.cat([getattr(data.splits[name], part) for name in ("train", "val")])
            for part in FIELDS
        )
    )


def content(split):
    return [image.numpy().tobytes() for image in split.images]


def same(ours, theirs):
    return torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)


def test_digits_are_complete(digits, digits_run):
    assert digits.classes == [str(digit) for digit in range(10)]
    assert digits.image_size == 32
    assert sum(len(split) for split in digits.splits.values()) == len(manifest(digits_run)) == 1797
    for split in digits.splits.values():
        assert (split.images.dtype, split.images.shape[1:]) == (torch.uint8, (3, 32, 32))
        assert torch.equal(split.images[:, 0], split.images[:, 2])
        assert torch.equal(
            split.images, F.interpolate(split.images[..., ::4, ::4].float(), scale_factor=4).byte()
        )
    assert max(split.images.max() for split in digits.splits.values()) == 255


def test_digits_splits_are_disjoint_and_proportional(digits, digits_run):
    images = [image for split in digits.splits.values() for image in content(split)]
    assert len(set(images)) == len(images) == 1797
    everything = torch.cat([split.labels for split in digits.splits.values()]).bincount()
    for name, share in (("train", 0.64), ("val", 0.16), ("test", 0.2)):
        assert ((digits.splits[name].labels.bincount() - share * everything).abs() <= 1).all()
        assert Counter(
            int(row["label"]) for row in manifest(digits_run).values() if row["split"] == name
        ) == Counter(digits.splits[name].labels.tolist())


def test_digits_are_the_same_on_every_machine(digits):
    assert digits.digest == DIGITS_DIGEST


def test_another_seed_changes_val_and_never_test(digits, digits_run, root):
    other_run = Run("other")
    other = prepare(other_run, DataSettings(seed=1))
    assert same(other.test, digits.test)
    assert keys(other_run, "test") == keys(digits_run, "test")
    assert keys(other_run, "val") != keys(digits_run, "val")
    assert keys(other_run, "train") | keys(other_run, "val") == keys(digits_run, "train") | keys(
        digits_run, "val"
    )
    assert other.digest != digits.digest


def test_a_larger_val_fraction_only_adds_to_val(digits, digits_run, root):
    other = prepare(Run("other"), DataSettings(val_fraction=0.5))
    assert same(other.test, digits.test)
    assert len(other.val) == pytest.approx(len(other.train), abs=80)
    assert keys(Run("other"), "val") > keys(digits_run, "val")


def test_prepared_data_loads_back(digits, digits_run):
    loaded = load(digits_run)
    assert all(same(loaded.splits[name], digits.splits[name]) for name in digits.splits)
    for field in ("dataset", "classes", "mean", "std", "digest"):
        assert getattr(loaded, field) == getattr(digits, field)


def test_loading_before_preparing_names_the_stage(run):
    with refused(FileNotFoundError, r"run 'made-up' has no data\.json yet: run 01-data first"):
        load(run)


DAMAGE = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no object": lambda text: "[1]",
    "a field less": lambda text: text.replace('"digest"', '"manifest"'),
    "a field more": lambda text: text.replace("{", '{"more": 1,', 1),
    "a field of another kind": lambda text: text.replace('"digits"', "7"),
}


def test_damaged_data_json_is_one_sentence_and_heals(run):
    settings = DataSettings(num_classes=2, image_size=8)
    digest = prepare(run, settings).digest
    path = run.work / "data.json"
    whole = path.read_text()
    for damage in DAMAGE.values():
        path.write_text(damage(whole))
        with refused(ValueError, r"data\.json is damaged.*: run 01-data of run 'made-up' again"):
            load(run)
    prepare(run, settings)
    assert load(run).digest == digest


def test_what_was_prepared_is_on_record(run):
    settings = DataSettings(num_classes=["3", "1"], image_size=8, val_fraction=0.4)
    data = prepare(run, settings)
    metrics = run.read_json("metrics.json")["data"]
    assert metrics.pop("digest") == data.digest and len(metrics.pop("test_digest")) == 64
    counts = {name: len(split) for name, split in data.splits.items()}
    assert metrics == {"dataset": "digits", "classes": 2, "image_size": 8, **counts}
    parameters = run.read_json("provenance.json")["01-data"]["parameters"]
    assert DataSettings.of(parameters) == settings and parameters.keys() == {
        *DataSettings.model_fields
    }


def test_a_pack_that_is_not_the_one_described(run):
    prepare(run, DataSettings(num_classes=2, image_size=8))
    before = (run.work / "data.json").read_text()
    prepare(run, DataSettings(num_classes=2, image_size=8, seed=1))
    (run.work / "data.json").write_text(before)  # as if killed between pack and data.json
    with refused(
        ValueError, r"the pack '.*data' is not the one that .*data\.json describes: run 01-data"
    ):
        load(run)
    (run.work / "data/manifest.csv").unlink()
    with refused(FileNotFoundError, r"run 'made-up' has no manifest\.csv yet: run 01-data first"):
        load(run)


def prepared_elsewhere(root, results):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSENAS_ROOT", str(root))
        results.put(prepare(Run("made-up"), DataSettings(num_classes=2, image_size=8)).digest)


def test_two_preparations_at_once(root, processes):
    results = processes.Queue()
    both = [processes.Process(target=prepared_elsewhere, args=(root, results)) for _ in range(2)]
    for process in both:
        process.start()
    digests = {results.get(timeout=120) for _ in both}
    for process in both:
        process.join()
    assert digests == {load(Run("made-up")).digest}


@pytest.mark.parametrize(("wanted", "classes"), [(3, ["0", "1", "2"]), (["7", "1"], ["1", "7"])])
def test_fewer_classes(wanted, classes, run, digits):
    data = prepare(run, DataSettings(num_classes=wanted))
    assert data.classes == classes
    for name, split in data.splits.items():
        whole = digits.splits[name]
        kept = torch.isin(whole.labels, torch.tensor([int(name) for name in classes]))
        assert set(content(split)) == set(content(Split(whole.images[kept], whole.labels[kept])))
        assert split.labels.unique().tolist() == list(range(len(classes)))


def test_smaller_images(run):
    data = prepare(run, DataSettings(num_classes=2, image_size=8))
    assert data.image_size == 8
    assert data.train.images.max() > 200


def colour(red, green, blue, height=20, width=20):
    return (
        torch.tensor([red, green, blue], dtype=torch.uint8)[:, None, None]
        .expand(3, height, width)
        .contiguous()
    )


def fill(folder, count, picture, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(first, first + count):
        image = picture.clone()
        image[2] = index
        write_png(image, str(folder / f"{index:02d}.png"))


def blues(split):
    """The number that `fill` wrote into each picture."""
    return split.images[:, 2, 8, 8].tolist()


RED, GREEN = colour(255, 0, 0), colour(0, 255, 0)


def test_flat_class_folders_are_split(run, tmp_path):
    fill(tmp_path / "set/red", 10, RED)
    fill(tmp_path / "set/green/deep/below", 10, GREEN)
    data = prepare(run, class_folders(tmp_path / "set"))
    assert data.classes == ["green", "red"]
    for split in data.splits.values():
        assert split.labels.bincount().min() > 0
        assert torch.equal(split.images[:, 0, 0, 0] == 255, split.labels == 1)
    assert sorted(blues(data.train) + blues(data.val) + blues(data.test)) == sorted(
        [*range(10)] * 2
    )


def test_the_place_of_a_folder_does_not_change_its_splits(run, tmp_path):
    for place in ("here", "elsewhere/there"):
        fill(tmp_path / place / "red", 10, RED)
        fill(tmp_path / place / "green", 10, GREEN)
    here = prepare(run, class_folders(tmp_path / "here"))
    there = prepare(run, class_folders(tmp_path / "elsewhere/there"))
    assert here.digest == there.digest


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_held_out_folder_is_the_test_split(held_out, run, tmp_path):
    for name, picture in (("red", RED), ("green", GREEN)):
        fill(tmp_path / "set/train" / name, 10, picture)
        fill(tmp_path / "set" / held_out / name, 3, picture, first=100)
    data = prepare(run, class_folders(tmp_path / "set", val_fraction=0.3))
    assert sorted(blues(data.test)) == sorted([100, 101, 102] * 2)
    assert sorted(blues(whole(data))) == sorted([*range(10)] * 2)


def test_train_val_and_test_folders_are_taken_as_they_are(run, tmp_path):
    for first, part in ((0, "train"), (100, "val"), (200, "test")):
        for name, picture in (("red", RED), ("green", GREEN)):
            fill(tmp_path / "set" / part / name, 5, picture, first)
    data = prepare(run, class_folders(tmp_path / "set"))
    for first, part in ((0, "train"), (100, "val"), (200, "test")):
        assert sorted(blues(data.splits[part])) == sorted([*range(first, first + 5)] * 2)


def share(salt, key):
    """What decides, written down once more: the first 64 bits of SHA-256 as a number from 0 to 1."""
    return int(hashlib.sha256(f"{salt}:{key}".encode()).hexdigest()[:16], 16) / 16**16


def items(names, label="a", part=None):
    return [Item(name, label, part, torch.zeros(1, 8, 8, dtype=torch.uint8)) for name in names]


names = st.lists(st.text(min_size=1, max_size=12), min_size=12, max_size=60, unique=True)


@given(names, st.floats(0.05, 0.6), st.integers(0, 9))
def test_a_hash_of_name_and_seed_decides(found, fraction, seed):
    split = assign(items(found), fraction, seed, grows=True)
    test = {name for name in found if share("test", name) < 0.2}
    val = {name for name in found if name not in test and share(f"val {seed}", name) < fraction}
    for part, expected in (("test", test), ("val", val)):
        if 0 < len(expected) < len(found) - len(test):
            assert {name for name in found if split[name] == part} == expected


@given(names, st.data())
def test_adding_images_moves_none_of_the_others(found, draw):
    """For any class that fills all three splits by itself."""
    part = draw.draw(st.sampled_from([None, "train"]))
    some = found[: draw.draw(st.integers(6, len(found)))]
    before, after = (
        assign(items(chosen, part=part), 0.3, 0, grows=True) for chosen in (some, found)
    )
    drawn = sum(share("test", name) < 0.2 for name in some) if part is None else 1
    kept = [name for name in some if part or share("test", name) >= 0.2]
    assume(drawn and 0 < sum(share("val 0", name) < 0.3 for name in kept) < len(kept))
    assert {name: after[name] for name in some} == before


@given(
    st.lists(st.text(min_size=1, max_size=12), min_size=3, max_size=8, unique=True),
    st.floats(0.01, 0.99),
)
def test_a_small_class_keeps_an_image_in_every_split(found, fraction):
    assert set(assign(items(found), fraction, 0, grows=True).values()) == {"train", "val", "test"}


def test_one_name_has_one_place_however_the_file_system_spells_it(root, tmp_path):
    prepared = []
    for form in ("NFC", "NFD"):
        for name in ("dänisch", "português", "ελληνικά"):
            fill(tmp_path / form / unicodedata.normalize(form, name), 12, RED)
        prepared.append(prepare(Run(form), class_folders(tmp_path / form)))
    assert prepared[0].digest == prepared[1].digest
    assert prepared[0].classes == sorted(
        unicodedata.normalize("NFC", name) for name in prepared[0].classes
    )


def test_what_is_passed_over_is_said(run, tmp_path, capsys):
    fill(tmp_path / "set/red", 9, RED)
    fill(tmp_path / "set/green", 9, GREEN)
    fill(tmp_path / "set/.hidden", 9, GREEN)
    for place in ("list.txt", "stray.png", "red/scan.pdf", "red/Thumbs.db", "red/._00.png"):
        (tmp_path / "set" / place).write_bytes(b"")
    data = prepare(run, class_folders(tmp_path / "set"))
    assert data.classes == ["green", "red"] and sum(map(len, data.splits.values())) == 18
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(
        f"source '{tmp_path / 'set'}': left out, as no images in a class folder: 1 × .db, "
    )
    for part in ("1 × .hidden/", "1 × .pdf", "1 × .png", "1 × .txt", "1 × hidden file"):
        assert part in said


def test_jpeg_grey_and_oblong_images(run, tmp_path):
    for name, value in (("dark", 40), ("light", 200)):
        fill(tmp_path / "set" / name, 8, colour(value, value, 0))
        write_jpeg(colour(value, value, value, 24, 60), str(tmp_path / "set" / name / "wide.JPG"))
        write_png(
            colour(value, value, value, 50, 20)[:1], str(tmp_path / "set" / name / "grey.png")
        )
    data = prepare(run, class_folders(tmp_path / "set"))
    images = torch.cat([split.images for split in data.splits.values()])
    labels = torch.cat([split.labels for split in data.splits.values()])
    assert len(images) == 20
    expected = torch.tensor([40, 200])[labels][:, None, None, None]
    assert ((images[:, :2].int() - expected).abs() <= 4).all()


def test_oblong_images_are_cropped_around_the_centre(run, tmp_path):
    stripes = torch.zeros(3, 16, 48, dtype=torch.uint8)
    stripes[0, :, :16], stripes[1, :, 16:32], stripes[2, :, 32:] = 255, 255, 255
    for name in ("a", "b"):
        fill(tmp_path / "set" / name, 5, RED)
        for index in range(5):
            write_png(stripes, str(tmp_path / "set" / name / f"stripes{index}.png"))
    data = prepare(run, class_folders(tmp_path / "set"))
    images = torch.cat([split.images for split in data.splits.values()])
    assert sum(torch.equal(image, colour(0, 255, 0, 16, 16)) for image in images) == 10


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset", "mnist"),
        ("source", 7),
        ("num_classes", True),
        ("num_classes", "3"),
        ("num_classes", [1, 7]),
        ("val_fraction", 0),
        ("val_fraction", 1.0),
        ("val_fraction", float("nan")),
        ("val_fraction", "0.2"),
        ("image_size", 7),
        ("image_size", "32"),
        ("pack", "copies"),
        ("pack", True),
        ("pack", 24),
        ("pack", 4094),
        ("quality", 0),
        ("quality", 101),
        ("augment", "mixup"),
        ("skip_broken", "false"),
        ("skip_broken", 0),
        ("seed", 1e2),
        ("seed", -1),
        ("seed", True),
    ],
)
def test_settings_that_no_data_set_can_have(name, value):
    with refused(ValueError, rf"^parameters: .*{name}"):
        DataSettings.of({name: value})


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"num_classes": 1}, r"num_classes is 1, .*2"),
        ({"num_classes": 11}, r"num_classes is 11, .*10"),
        ({"num_classes": ["1", "eleven"]}, r"num_classes names 'eleven', which is not a class"),
        ({"num_classes": ["1"]}, r"class '1'.*at least 2"),
        ({"num_classes": []}, r"num_classes names no class, at least 2"),
        ({"num_classes": ["1", "1", "2"]}, r"twice"),
        (
            {"source": "my-images"},
            r"data set 'digits' has no source: leave it out or set dataset: folder",
        ),
        ({"dataset": "folder"}, r"data set 'folder' needs source"),
        ({"dataset": "folder", "source": ""}, r"data set 'folder' needs source"),
    ],
)
def test_settings_that_this_data_set_cannot_have(settings, pattern, run):
    with refused(ValueError, pattern):
        prepare(run, DataSettings(**settings))


@pytest.mark.parametrize("name", ["nowhere", "a file", "loop", "nul\0", "n" * 300, "two\nlines"])
def test_source_that_is_no_folder(name, run, tmp_path):
    (tmp_path / "a file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with refused(
        FileNotFoundError, r"source '.*/(nowhere|a file|loop|nul|n{300}|two).*' is not a folder"
    ):
        prepare(run, class_folders(tmp_path / name))
    if name in ("a file", "loop"):  # or else there may be a download to it
        with refused(FileNotFoundError, r"source '.*/(a file|loop)' is not a folder"):
            listing(DataSettings(dataset="cifar10", source=str(tmp_path / name)), download=False)


@pytest.mark.parametrize("dataset", CLASSES)
@pytest.mark.parametrize("wanted", [1, 11, ["cat"], ["unicorn", "dragon"]])
def test_classes_of_a_set_that_is_not_downloaded_yet(dataset, wanted, root):
    known = sorted(CLASSES[dataset])
    assert (
        listing(DataSettings(dataset=dataset, source=None, num_classes=known[:2]), download=False)
        is None
    )
    with refused(
        ValueError,
        r"num_classes is 1?1, expected 2 to 10|num_classes names '.*', which is not a class|least 2",
    ):
        listing(DataSettings(dataset=dataset, source=None, num_classes=wanted), download=False)


@pytest.mark.parametrize("below", ["", "train", "class"])
def test_source_without_images(below, run, tmp_path):
    (tmp_path / "set" / below).mkdir(parents=True)
    (tmp_path / "set" / below / "readme.txt").write_text("no image")
    with refused(
        ValueError,
        rf"set{'/train' if below == 'train' else ''}' holds no class folders with images",
    ):
        prepare(run, class_folders(tmp_path / "set"))


def test_a_single_class_folder(run, tmp_path):
    fill(tmp_path / "set/red", 9, RED)
    with refused(ValueError, r"class 'red'.*at least 2"):
        prepare(run, class_folders(tmp_path / "set"))


@pytest.mark.parametrize(("place", "split"), [("train", "test"), ("test", "train")])
def test_class_that_only_one_split_has(place, split, run, tmp_path):
    for name in ("train", "test"):
        fill(tmp_path / "set" / name / "red", 9, RED)
        fill(tmp_path / "set" / name / "green", 9, GREEN)
    fill(tmp_path / "set" / place / "blue", 9, colour(0, 0, 255))
    with refused(
        ValueError,
        rf"class 'blue' has no image left for {split}: every class needs images in each split",
    ):
        prepare(run, class_folders(tmp_path / "set"))


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_of_a_class(count, run, tmp_path):
    fill(tmp_path / "set/red", 9, RED)
    fill(tmp_path / "set/green", count, GREEN)
    with refused(ValueError, r"class 'green' has no image left for (test|val)"):
        prepare(run, class_folders(tmp_path / "set"))


def test_what_would_be_packed_is_known_beforehand(run, tmp_path):
    fill(tmp_path / "set/red", 9, RED)
    fill(tmp_path / "set/green", 9, GREEN)
    source = str(tmp_path / "set")
    parts = listing(DataSettings(dataset="folder", source=source, val_fraction=0.3, seed=5))
    prepare(
        run, DataSettings(dataset="folder", source=source, val_fraction=0.3, image_size=16, seed=5)
    )
    for split, part in parts.items():
        assert {item.key for item in part} == keys(run, split)
    for path in (tmp_path / "set").glob("*/*.png"):
        path.write_bytes(b"")
    assert listing(DataSettings(dataset="folder", source=source, val_fraction=0.3, seed=5)) == parts
    with refused(ValueError, r"num_classes names 'blue'"):
        listing(
            DataSettings(
                dataset="folder",
                source=source,
                num_classes=["blue", "red"],
                val_fraction=0.3,
                seed=5,
            )
        )


class FakeCifar:
    classes = ("cat", "ant", "dog")

    def __init__(self, root, train, download):
        count = 30 if train else 6
        self.targets = [index % 3 for index in range(count)]
        shade = torch.arange(count) + (0 if train else 100)
        self.data = torch.stack([shade, torch.tensor(self.targets), 0 * shade], dim=1).byte()
        self.data = self.data[:, None, None].expand(count, 32, 32, 3).numpy()


class FakeFashion(FakeCifar):
    def __init__(self, root, train, download):
        super().__init__(root, train, download)
        self.targets = torch.tensor(self.targets)
        self.data = torch.from_numpy(self.data)[:, :28, :28, 0]


@pytest.mark.parametrize(
    ("dataset", "name", "fake"),
    [("cifar10", "CIFAR10", FakeCifar), ("fashion_mnist", "FashionMNIST", FakeFashion)],
)
def test_torchvision_sets_keep_their_own_test_split(dataset, name, fake, run, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, name, fake)
    data = prepare(run, DataSettings(dataset=dataset, source="unused", image_size=28))
    assert data.classes == ["ant", "cat", "dog"]
    assert (
        sum(
            map(
                len,
                listing(DataSettings(dataset=dataset, source="unused"), download=False).values(),
            )
        )
        == 36
    )
    assert sorted(data.test.images[:, 0, 9, 9].tolist()) == [*range(100, 106)]
    assert sorted(whole(data).images[:, 0, 9, 9].tolist()) == [*range(30)]
    for split in data.splits.values():
        published = split.images[:, 0, 9, 9].long() % 100 % 3
        assert torch.equal(split.labels, torch.tensor([1, 0, 2])[published])


PROBLEMS = [
    RuntimeError("Dataset not found.\nTry again"),
    OSError("no network"),
    PermissionError(13, "Permission denied"),
    EOFError(),
    http.client.IncompleteRead(b"half"),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: type(problem).__name__)
@pytest.mark.parametrize(
    ("dataset", "name"),
    [("cifar10", "CIFAR10"), ("fashion_mnist", "FashionMNIST"), ("imagenette", "Imagenette")],
)
def test_torchvision_set_that_cannot_be_had(dataset, name, problem, run, monkeypatch):
    def fail(*_, **__):
        raise problem

    monkeypatch.setattr(torchvision.datasets, name, fail)
    reason = r"\((Dataset not|no network|.*Permission denied|EOFError|IncompleteRead)"
    with refused(
        FileNotFoundError, rf"{dataset} is not in 'here' and could not be downloaded {reason}"
    ):
        prepare(run, DataSettings(dataset=dataset, source="here"))
    assert listing(DataSettings(dataset=dataset, source="here"), download=False) is None


def test_a_damaged_fashion_mnist(run, tmp_path):
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{part}-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    with refused(FileNotFoundError, r"fashion_mnist is not in .* delete what is only half there"):
        prepare(run, DataSettings(dataset="fashion_mnist", source=str(tmp_path)))


def test_downloads_go_to_the_root_of_all_runs(run, root, monkeypatch):
    places = set()

    def watched(place, train, download):
        places.add(place)
        return FakeCifar(place, train, download)

    (root / "notebooks").mkdir()
    monkeypatch.chdir(root / "notebooks")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", watched)
    prepare(run, DataSettings(dataset="cifar10", image_size=8))
    assert places == {root / "runs/downloads/cifar10"}
    assert not list((root / "notebooks").iterdir())


@pytest.mark.parametrize("place", ["made-up/runs/made-up/data/set", "."])
def test_source_and_target_in_one_another(place, root, monkeypatch):
    monkeypatch.setenv("DENSENAS_ROOT", str(root / "made-up"))
    fill(root / place / "red", 9, RED)
    with refused(
        ValueError,
        r"source '.*' and the pack '.*runs/made-up/data' lie in one another, move one of them",
    ):
        prepare(Run("made-up"), class_folders(root / place))
    assert not list(root.glob("**/*.lmdb"))


def imagenette(folder, classes):
    for name in classes:
        fill(folder / "train" / name, 10, RED)
        fill(folder / "val" / name, 4, GREEN, first=100)


def test_imagenet_is_known_by_its_folders(run, tmp_path):
    imagenette(tmp_path / "imagenette2-320", IMAGENETTE)
    data = prepare(
        run, DataSettings(dataset="imagenette", source=str(tmp_path), num_classes=2, image_size=16)
    )
    assert data.mean == [0.485, 0.456, 0.406] and data.std == [0.229, 0.224, 0.225]
    assert sorted(blues(data.test)) == sorted([*range(100, 104)] * 2)


def test_half_an_imagenette(run, tmp_path):
    names = sorted(IMAGENETTE)
    imagenette(tmp_path / "imagenette2-320", names[:4])
    with refused(
        ValueError,
        rf"imagenette in '.*' is incomplete, train lacks '{names[4]}', .*'{names[9]}': delete",
    ):
        prepare(run, DataSettings(dataset="imagenette", source=str(tmp_path)))
    imagenette(tmp_path / "imagenette2-320", names)
    shutil.rmtree(tmp_path / "imagenette2-320/val")
    with refused(ValueError, rf"imagenette in '.*' is incomplete, val lacks '{names[0]}', "):
        prepare(run, DataSettings(dataset="imagenette", source=str(tmp_path)))
    shutil.rmtree(tmp_path / "imagenette2-320/train")
    with refused(
        ValueError,
        r"imagenette in '.*' is incomplete, .*holds no class folders.*; delete the folder",
    ):
        prepare(run, DataSettings(dataset="imagenette", source=str(tmp_path)))


def test_another_imagenette(run, tmp_path, capsys):
    imagenette(tmp_path / "imagenette2-320", IMAGENETTE)
    listing(DataSettings(dataset="imagenette", source=str(tmp_path)))
    prepare(
        run, DataSettings(dataset="imagenette", source=str(tmp_path), num_classes=2, image_size=16)
    )
    said = "imagenette has 9,469 images in train, here are 100; imagenette has 3,925 images in val, here are 40"
    assert said in capsys.readouterr().out
    imagenette(tmp_path / "imagenette2-320", ["n99999999"])
    with refused(ValueError, r"'n99999999' in '.*' is no class of imagenette: delete the folder"):
        prepare(run, DataSettings(dataset="imagenette", source=str(tmp_path)))


def test_a_download_that_broke_off_while_unpacking_begins_anew(run, tmp_path, monkeypatch):
    names = sorted(IMAGENETTE)

    def half(place, **_):
        imagenette(place / "imagenette2-320", names[:4])
        raise OSError("No space left on device")

    def whole(place, **_):
        imagenette(place / "imagenette2-320", names[5:])
        imagenette(place / "imagenette2-320", names[:5])

    monkeypatch.setattr(torchvision.datasets, "Imagenette", half)
    with refused(FileNotFoundError, r"imagenette is not in .* \(No space left on device\)"):
        prepare(run, DataSettings(dataset="imagenette", source=str(tmp_path)))
    monkeypatch.setattr(torchvision.datasets, "Imagenette", whole)
    assert (
        len(
            prepare(
                run, DataSettings(dataset="imagenette", source=str(tmp_path), image_size=16)
            ).classes
        )
        == 10
    )
    assert [path.name for path in tmp_path.glob("*2-320")] == ["imagenette2-320"]
    assert not (tmp_path / "unpacking").exists()
