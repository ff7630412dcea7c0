"""Data sets, their splits, every sentence that refuses one, and batches against a naive loop."""

import csv
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import refused
from torchvision.io import write_jpeg, write_png

from densenas.data import Batches, ImageData, Split, load, prepare
from densenas.run import Run

DIGITS_DIGEST = "6c5d974529cc5e44ace4426678be6afa092d0c97ae627cd10f98f27f378c1e1c"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("densenas.run.ROOT", tmp_path_factory.mktemp("digits"))
        return Run("digits")


@pytest.fixture(scope="module")
def digits(digits_run):
    return prepare(digits_run)


def manifest(run):
    with (run.work / "manifest.csv").open() as file:
        return {row["key"]: row for row in csv.DictReader(file)}


def keys(run, split):
    return {key for key, row in manifest(run).items() if row["split"] == split}


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
        assert torch.equal(split.images, F.interpolate(split.images[..., ::4, ::4].float(), scale_factor=4).byte())
    assert max(split.images.max() for split in digits.splits.values()) == 255


def test_digits_splits_are_disjoint_and_proportional(digits, digits_run):
    images = [image for split in digits.splits.values() for image in content(split)]
    assert len(set(images)) == len(images) == 1797
    everything = torch.cat([split.labels for split in digits.splits.values()]).bincount()
    for name, share in (("train", 0.64), ("val", 0.16), ("test", 0.2)):
        assert ((digits.splits[name].labels.bincount() - share * everything).abs() <= 1).all()
        assert Counter(int(row["label"]) for row in manifest(digits_run).values() if row["split"] == name) == Counter(
            digits.splits[name].labels.tolist()
        )
    assert len(digits.train_and_val) == len(digits.train) + len(digits.val)


def test_digits_are_the_same_on_every_machine(digits):
    assert digits.digest == DIGITS_DIGEST


def test_another_seed_changes_val_and_never_test(digits, digits_run, root):
    other_run = Run("other")
    other = prepare(other_run, seed=1)
    assert same(other.test, digits.test)
    assert keys(other_run, "test") == keys(digits_run, "test")
    assert keys(other_run, "val") != keys(digits_run, "val")
    assert keys(other_run, "train") | keys(other_run, "val") == keys(digits_run, "train") | keys(digits_run, "val")
    assert other.digest != digits.digest
    again = prepare(Run("again"), seed=1)
    assert again.digest == other.digest
    assert all(same(again.splits[name], other.splits[name]) for name in again.splits)


def test_another_val_fraction_leaves_the_test_split_alone(digits, root):
    other = prepare(Run("other"), val_fraction=0.5)
    assert same(other.test, digits.test)
    assert len(other.val) == pytest.approx(len(other.train), abs=10)


def test_prepared_data_loads_back(digits, digits_run):
    loaded = load(digits_run)
    assert all(same(loaded.splits[name], digits.splits[name]) for name in digits.splits)
    for field in ("dataset", "classes", "mean", "std", "digest"):
        assert getattr(loaded, field) == getattr(digits, field)


def test_loading_before_preparing_names_the_stage(run):
    with refused(FileNotFoundError, r"run 'made-up' has no data\.pt yet: run 01-data first"):
        load(run)


@pytest.mark.parametrize(("wanted", "classes"), [(3, ["0", "1", "2"]), (["7", "1"], ["1", "7"])])
def test_fewer_classes(wanted, classes, run, digits):
    data = prepare(run, num_classes=wanted)
    assert data.classes == classes
    for name, split in data.splits.items():
        whole = digits.splits[name]
        kept = torch.isin(whole.labels, torch.tensor([int(name) for name in classes]))
        assert set(content(split)) == set(content(Split(whole.images[kept], whole.labels[kept])))
        assert split.labels.unique().tolist() == list(range(len(classes)))


def test_smaller_images(run):
    data = prepare(run, num_classes=2, image_size=8)
    assert data.image_size == 8
    assert data.train.images.max() > 200


def colour(red, green, blue, height=20, width=20):
    return torch.tensor([red, green, blue], dtype=torch.uint8)[:, None, None].expand(3, height, width).contiguous()


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
    data = prepare(run, "folder", str(tmp_path / "set"), image_size=16)
    assert data.classes == ["green", "red"]
    assert [len(split) for split in data.splits.values()] == [12, 4, 4]
    for split in data.splits.values():
        assert split.labels.bincount().tolist() == [len(split) // 2] * 2
        assert torch.equal(split.images[:, 0, 0, 0] == 255, split.labels == 1)
    assert sorted(blues(data.train) + blues(data.val) + blues(data.test)) == sorted([*range(10)] * 2)


def test_the_place_of_a_folder_does_not_change_its_splits(run, tmp_path):
    for place in ("here", "elsewhere/there"):
        fill(tmp_path / place / "red", 10, RED)
        fill(tmp_path / place / "green", 10, GREEN)
    here = prepare(run, "folder", str(tmp_path / "here"), image_size=16)
    there = prepare(run, "folder", str(tmp_path / "elsewhere/there"), image_size=16)
    assert here.digest == there.digest


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_held_out_folder_is_the_test_split(held_out, run, tmp_path):
    for name, picture in (("red", RED), ("green", GREEN)):
        fill(tmp_path / "set/train" / name, 10, picture)
        fill(tmp_path / "set" / held_out / name, 3, picture, first=100)
    data = prepare(run, "folder", str(tmp_path / "set"), image_size=16, val_fraction=0.3)
    assert [len(split) for split in data.splits.values()] == [14, 6, 6]
    assert sorted(blues(data.test)) == sorted([100, 101, 102] * 2)
    assert sorted(blues(data.train_and_val)) == sorted([*range(10)] * 2)


def test_a_train_folder_alone_gives_all_three_splits(run, tmp_path):
    fill(tmp_path / "set/train/red", 10, RED)
    fill(tmp_path / "set/train/green", 10, GREEN)
    data = prepare(run, "folder", str(tmp_path / "set"), image_size=16)
    assert [len(split) for split in data.splits.values()] == [12, 4, 4]


def test_jpeg_grey_and_oblong_images(run, tmp_path):
    for name, value in (("dark", 40), ("light", 200)):
        fill(tmp_path / "set" / name, 8, colour(value, value, 0))
        write_jpeg(colour(value, value, value, 24, 60), str(tmp_path / "set" / name / "wide.JPG"))
        write_png(colour(value, value, value, 50, 20)[:1], str(tmp_path / "set" / name / "grey.png"))
    data = prepare(run, "folder", str(tmp_path / "set"), image_size=16)
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
    data = prepare(run, "folder", str(tmp_path / "set"), image_size=16)
    images = torch.cat([split.images for split in data.splits.values()])
    assert sum(torch.equal(image, colour(0, 255, 0, 16, 16)) for image in images) == 10


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"dataset": "mnist"}, r"unknown data set 'mnist', known are digits, cifar10"),
        ({"val_fraction": 0}, r"val_fraction is 0, expected a share between 0 and 1"),
        ({"val_fraction": 1.0}, r"val_fraction is 1\.0, expected a share between 0 and 1"),
        ({"val_fraction": float("nan")}, r"val_fraction is nan, expected a share between 0 and 1"),
        ({"val_fraction": 0.001}, r"class '0' has no image left for val"),
        ({"val_fraction": 0.999}, r"class '0' has no image left for train"),
        ({"image_size": 7}, r"image_size is 7 pixels, at least 8"),
        ({"num_classes": 1}, r"num_classes is 1, .*2"),
        ({"num_classes": 11}, r"num_classes is 11, .*10"),
        ({"num_classes": ["1", "eleven"]}, r"num_classes names 'eleven', which is not a class"),
        ({"num_classes": ["1"]}, r"class '1'.*at least 2"),
        ({"num_classes": []}, r"num_classes.*at least 2|at least 2.*class"),
        ({"num_classes": ["1", "1"]}, r"at least 2|twice"),
        ({"num_classes": ["1", "1", "2"]}, r"twice"),
        ({"dataset": "folder"}, r"data set 'folder' needs source"),
    ],
)
def test_refused_settings(settings, pattern, run):
    with refused(ValueError, pattern):
        prepare(run, **settings)


def test_source_that_is_no_folder(run, tmp_path):
    with refused(FileNotFoundError, r"source '.*nowhere' is not a folder"):
        prepare(run, "folder", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("below", ["", "train", "class"])
def test_source_without_images(below, run, tmp_path):
    (tmp_path / "set" / below).mkdir(parents=True)
    (tmp_path / "set" / below / "readme.txt").write_text("no image")
    with refused(ValueError, rf"set{'/train' if below == 'train' else ''}' holds no class folders with images"):
        prepare(run, "folder", str(tmp_path / "set"))


def test_held_out_folder_without_images(run, tmp_path):
    fill(tmp_path / "set/train/red", 9, RED)
    fill(tmp_path / "set/train/green", 9, GREEN)
    (tmp_path / "set/test").mkdir()
    with refused(ValueError, r"set/test' holds no class folders with images"):
        prepare(run, "folder", str(tmp_path / "set"))


def test_a_single_class_folder(run, tmp_path):
    fill(tmp_path / "set/red", 9, RED)
    with refused(ValueError, r"class 'red'.*at least 2"):
        prepare(run, "folder", str(tmp_path / "set"))


@pytest.mark.parametrize(("place", "split"), [("train", "test"), ("test", "train")])
def test_class_that_only_one_split_has(place, split, run, tmp_path):
    for name in ("train", "test"):
        fill(tmp_path / "set" / name / "red", 9, RED)
        fill(tmp_path / "set" / name / "green", 9, GREEN)
    fill(tmp_path / "set" / place / "blue", 9, colour(0, 0, 255))
    with refused(ValueError, rf"class 'blue' has no image left for {split}"):
        prepare(run, "folder", str(tmp_path / "set"))


def test_too_few_images_of_a_class(run, tmp_path):
    fill(tmp_path / "set/red", 9, RED)
    fill(tmp_path / "set/green", 1, GREEN)
    with refused(ValueError, r"class 'green' has no image left for (test|val)"):
        prepare(run, "folder", str(tmp_path / "set"))


@pytest.mark.parametrize("damage", [b"", b"not an image", b"\x89PNG\r\n\x1a\n cut off"])
def test_damaged_image(damage, run, tmp_path):
    fill(tmp_path / "set/red", 9, RED)
    fill(tmp_path / "set/green", 9, GREEN)
    (tmp_path / "set/green/04.png").write_bytes(damage)
    with refused(ValueError, r"green/04\.png cannot be decoded as an image"):
        prepare(run, "folder", str(tmp_path / "set"))


def test_animated_gif_is_read_or_named(run, tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name in ("red", "green"):
        fill(tmp_path / "set" / name, 9, RED)
        frames = [image.new("RGB", (20, 20), shade) for shade in ("red", "blue")]
        frames[0].save(tmp_path / "set" / name / "moving.gif", save_all=True, append_images=frames[1:])
    try:
        data = prepare(run, "folder", str(tmp_path / "set"), image_size=16)
    except ValueError as error:
        assert "moving.gif" in str(error) and "\n" not in str(error)
    else:
        assert sum(len(split) for split in data.splits.values()) == 20


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
    ("dataset", "name", "fake"), [("cifar10", "CIFAR10", FakeCifar), ("fashion_mnist", "FashionMNIST", FakeFashion)]
)
def test_torchvision_sets_keep_their_own_test_split(dataset, name, fake, run, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, name, fake)
    data = prepare(run, dataset, "unused", image_size=28)
    assert data.classes == ["ant", "cat", "dog"]
    assert sorted(data.test.images[:, 0, 9, 9].tolist()) == [*range(100, 106)]
    assert sorted(data.train_and_val.images[:, 0, 9, 9].tolist()) == [*range(30)]
    assert len(data.val) == 6
    for split in data.splits.values():
        published = split.images[:, 0, 9, 9].long() % 100 % 3
        assert torch.equal(split.labels, torch.tensor([1, 0, 2])[published])


@pytest.mark.parametrize("problem", [RuntimeError("Dataset not found.\nTry again"), OSError("no network")])
def test_torchvision_set_that_cannot_be_had(problem, run, monkeypatch):
    def fail(*_, **__):
        raise problem

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    with refused(FileNotFoundError, r"cifar10 is not in 'here' and could not be downloaded \((Dataset not|no network)"):
        prepare(run, "cifar10", "here")


def made_up(count=22, size=16, dataset="digits"):
    """Random pictures, each with its own number as label."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(count))
    mean, std = [0.3, 0.4, 0.5], [0.2, 0.3, 0.4]
    return ImageData(dataset, [str(index) for index in range(count)], split, split, split, mean, std, "made up")


def pictures(data, batch):
    """Batches as uint8 again."""
    shape = (1, 3, 1, 1)
    return (255 * (batch * torch.tensor(data.std).view(shape) + torch.tensor(data.mean).view(shape))).round().byte()


def batches(data, batch_size, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return Batches(data, data.train, batch_size, CPU, generator)


@pytest.mark.parametrize("batch_size", [1, 5, 11, 22, 100])
def test_evaluation_sees_every_image_once_in_order_and_unchanged(batch_size):
    data = made_up()
    passed = [*batches(data, batch_size)]
    assert len(passed) == len(batches(data, batch_size))
    assert torch.cat([labels for _, labels in passed]).tolist() == [*range(22)]
    assert torch.equal(torch.cat([pictures(data, images) for images, _ in passed]), data.train.images)


@pytest.mark.parametrize(("batch_size", "steps"), [(5, 4), (11, 2), (22, 1), (100, 1)])
def test_training_shuffles_and_leaves_out_the_incomplete_batch(batch_size, steps):
    loader = batches(made_up(), batch_size, seed=0)
    first, second = ([labels.tolist() for _, labels in loader] for _ in range(2))
    assert len(first) == len(second) == len(loader) == steps
    for labels in (first, second):
        seen = [label for batch in labels for label in batch]
        assert len(seen) == len(set(seen)) == steps * min(batch_size, 22)
        assert seen != sorted(seen)
    assert first != second


def test_the_same_seed_gives_the_same_batches():
    data = made_up(dataset="cifar10")
    passes = [[*batches(data, 5, seed), *batches(data, 5, seed)] for seed in (1, 1, 2)]
    first, again, other = (torch.cat([images for images, _ in passed]) for passed in passes)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def shifts(image, mirror):
    """Every picture that augmentation may make of one image, by moving it pixel by pixel over black."""
    size = image.shape[-1]
    reach = size // 8
    for source, mirrored in ((image, False), *([(image.flip(-1), True)] if mirror else [])):
        for down in range(-reach, reach + 1):
            for right in range(-reach, reach + 1):
                moved = torch.zeros_like(image)
                for y in range(max(0, down), min(size, size + down)):
                    for x in range(max(0, right), min(size, size + right)):
                        moved[:, y, x] = source[:, y - down, x - right]
                yield (down, right, mirrored), moved


@pytest.mark.parametrize(("dataset", "mirror"), [("digits", False), ("fashion_mnist", False), ("folder", True)])
def test_augmentation_only_shifts_and_mirrors(dataset, mirror):
    data = made_up(dataset=dataset)
    possible = [[*shifts(image, mirror)] for image in data.train.images]
    found = Counter()
    for seed in range(4):
        for images, labels in batches(data, 11, seed):
            for picture, label in zip(pictures(data, images), labels.tolist(), strict=True):
                ways = [way for way, moved in possible[label] if torch.equal(moved, picture)]
                assert len(ways) == 1
                found.update(ways)
    assert {down for down, _, _ in found} == {right for _, right, _ in found} == {-2, -1, 0, 1, 2}
    assert {mirrored for _, _, mirrored in found} == ({False, True} if mirror else {False})


def test_training_images_are_normalised(digits):
    images = torch.cat([images for images, _ in Batches(digits, digits.train_and_val, 500, CPU)]).double()
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (images.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_images_of_one_colour_stay_finite(run, tmp_path):
    for name in ("a", "b"):
        for index in range(8):
            folder = tmp_path / "set" / name
            folder.mkdir(parents=True, exist_ok=True)
            write_png(colour(0, 0, 90), str(folder / f"{index}.png"))
    data = prepare(run, "folder", str(tmp_path / "set"), image_size=16)
    assert all(torch.equal(images, torch.zeros_like(images)) for images, _ in Batches(data, data.test, 4, CPU))
