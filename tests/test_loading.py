"""Batches against a naive loop, from memory and from a pack: the same for any start, workers and processes."""

import dataclasses
import os
import signal
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import class_folders, refused
from torch.utils.data import DataLoader
from torchvision.io import write_png
from torchvision.transforms import v2

from densenas.images import loading
from densenas.images.data import ImageData, Split, load
from densenas.images.loading import Batches, Decoder, fit_workers, free_shared_memory
from densenas.images.prepare import prepare
from densenas.images.transforms import RandomResizedCrop, transform
from densenas.runs.run import Run
from densenas.settings import DataSettings

CPU = torch.device("cpu")


def made_up(count=22, size=16, dataset="digits"):
    """Random pictures, each with its own number as label."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(count))
    mean, std = [0.3, 0.4, 0.5], [0.2, 0.3, 0.4]
    return ImageData(
        dataset, [str(index) for index in range(count)], split, split, split, mean, std, "made up"
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Noise of many sizes in a pack that is read anew in every epoch."""
    root = tmp_path_factory.mktemp("packed")
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b", "c"):
        (root / "set" / name).mkdir(parents=True)
        for index in range(20):
            height, width = torch.randint(20, 60, (2,), generator=generator).tolist()
            image = torch.randint(
                0, 256, (3, height, width), generator=generator, dtype=torch.uint8
            )
            write_png(image, str(root / "set" / name / f"{index}.png"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSENAS_ROOT", str(root))
        return prepare(Run("made-up"), class_folders(root / "set", pack="original"))


def source(kind, request):
    return request.getfixturevalue("packed") if kind == "pack" else made_up(60, dataset="folder")


def pictures(data, batch):
    """Batches as uint8 again."""
    shape = (1, 3, 1, 1)
    return (
        (255 * (batch * torch.tensor(data.std).view(shape) + torch.tensor(data.mean).view(shape)))
        .round()
        .byte()
    )


def passed(data, batch_size, seed=None, epoch=0, start=0, splits="train", **settings):
    return [*Batches(data, splits, batch_size, CPU, seed, **settings).epoch(epoch, start)]


def equal(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def labelled(data, batches):
    """Every image of some batches beside its label, in an order that does not depend on theirs."""
    pairs = [
        pair
        for images, labels in batches
        for pair in zip(images.split(1), labels.tolist(), strict=True)
    ]
    return sorted((pictures(data, image)[0].tolist(), label) for image, label in pairs)


@pytest.mark.parametrize("batch_size", [1, 5, 11, 22, 100])
def test_evaluation_sees_every_image_once_and_unchanged(batch_size):
    data = made_up()
    batches = passed(data, batch_size)
    assert len(batches) == len(Batches(data, "train", batch_size, CPU))
    seen = torch.cat([labels for _, labels in batches])
    assert sorted(seen.tolist()) == [*range(22)]
    assert torch.equal(
        torch.cat([pictures(data, images) for images, _ in batches]), data.train.images[seen]
    )
    assert torch.equal(seen, torch.cat([labels for _, labels in passed(data, 7, epoch=3)])), (
        "always in the same order"
    )


def test_a_set_sorted_by_class_is_evaluated_in_mixed_batches():
    """A supernet's batch norm takes away what the images of a batch share: of one class, it would be the class."""
    data = made_up(60)
    by_class = Split(data.val.images, torch.arange(len(data.val)) * 2 // len(data.val))
    batches = passed(dataclasses.replace(data, val=by_class), len(by_class) // 2, splits="val")
    assert all(set(labels.tolist()) == {0, 1} for _, labels in batches)


def test_a_pack_is_evaluated_by_the_published_transform(packed):
    steps = v2.Compose([v2.Resize(18, antialias=True), v2.CenterCrop(16)])
    expected = [
        (steps(packed.val.read(k)).tolist(), int(packed.val.labels[k]))
        for k in range(len(packed.val))
    ]
    assert labelled(packed, passed(packed, 7, splits="val")) == sorted(expected)


@pytest.mark.parametrize(("batch_size", "steps"), [(5, 4), (11, 2), (22, 1), (100, 1)])
def test_training_shuffles_and_leaves_out_the_incomplete_batch(batch_size, steps):
    loader = Batches(made_up(), "train", batch_size, CPU, seed=0)
    first, second = ([labels.tolist() for _, labels in loader.epoch(epoch)] for epoch in (0, 1))
    assert len(first) == len(second) == len(loader) == steps
    for labels in (first, second):
        seen = [label for batch in labels for label in batch]
        assert len(seen) == len(set(seen)) == steps * min(batch_size, 22)
        assert seen != sorted(seen)
    assert first != second


@pytest.mark.parametrize("kind", ["memory", "pack"])
def test_seed_epoch_and_step_are_the_whole_position(kind, request):
    data = source(kind, request)
    whole = passed(data, 8, seed=1, epoch=2, workers=0)
    assert len(whole) >= 4
    assert equal(whole, passed(data, 8, seed=1, epoch=2, workers=0))
    for start in range(len(whole) + 1):
        assert equal(whole[start:], passed(data, 8, seed=1, epoch=2, start=start, workers=0))
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not equal(whole, passed(data, 8, **other, workers=0))


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(workers, packed):
    state = torch.get_rng_state()
    whole = passed(packed, 8, seed=1, workers=0)
    assert equal(whole, passed(packed, 8, seed=1, workers=workers))
    assert equal(whole[2:], passed(packed, 8, seed=1, start=2, workers=workers))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is somebody else's"


@pytest.mark.parametrize("kind", ["memory", "pack"])
@pytest.mark.parametrize("world", [2, 4])
def test_processes_together_see_what_one_sees(world, kind, request):
    data = source(kind, request)
    one = passed(data, 8, seed=1, workers=0)
    ranks = [passed(data, 8, seed=1, workers=0, rank=rank, world=world) for rank in range(world)]
    assert all(len(labels) == 8 // world for rank in ranks for _, labels in rank)
    assert equal(
        one, [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*ranks, strict=True)]
    )
    with refused(ValueError, r"batch_size 9 cannot be shared equally by 2 processes"):
        Batches(data, "train", 9, CPU, 1, rank=0, world=2)


def test_two_splits_are_read_as_one(packed):
    batches = passed(packed, 9, splits=("train", "val"), workers=0)
    apart = [
        labelled(packed, passed(packed, 9, splits=split, workers=0)) for split in ("train", "val")
    ]
    assert labelled(packed, batches) == sorted(apart[0] + apart[1])


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_open_the_pack_themselves(method, packed, processes):
    """Forked off a process that has opened it, or with nothing but what is sent to them."""
    context = processes if method == "forkserver" else method
    decoder = Decoder([packed.train], transform("random_sized", 16), mirror=True)
    requests = [[(0, 7), (3, 8)], [(5, 9)]]
    expected = [decoder[request] for request in requests]  # opens the pack in this process
    loader = DataLoader(
        decoder, batch_size=None, sampler=requests, num_workers=1, multiprocessing_context=context
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(expected, loader, strict=True))


@pytest.mark.parametrize(
    ("free", "workers", "piece"), [(4 * 8, 2, 1), (4 * 13, 2, 2), (4 * 5, 1, 1), (0, 0, 8)]
)
def test_a_small_shared_memory(free, workers, piece):
    """As a Docker container's 64 MB are for real batches: each worker has room for three pieces in a quarter of it."""
    assert fit_workers(2, batch_size=8, image_bytes=768, free=768 * free) == (workers, piece)


@pytest.mark.parametrize("images", [20, 32, 10**6])
def test_a_small_shared_memory_gives_the_same_batches(images, packed, monkeypatch, capsys):
    space = SimpleNamespace(free=images * 3 * 16**2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: space)
    loader = Batches(packed, "train", 8, CPU, seed=1, workers=2)
    assert ("1 instead of 2 workers decode" in capsys.readouterr().out) == (images == 20)
    assert equal(loader.epoch(0), passed(packed, 8, seed=1, workers=0))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_damaged_since_is_named_in_one_line(workers, packed, monkeypatch):
    def damaged(encoded):
        raise ValueError("is empty")

    monkeypatch.setattr("densenas.images.pack.decode", damaged)
    with refused(
        ValueError, r"image \d+ of '.*train\.lmdb' cannot be read \(is empty\): run 01-data again"
    ):
        passed(packed, 8, seed=1, workers=workers)


def test_no_shared_memory_that_can_be_written_is_none(monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert free_shared_memory() == 0


def test_a_killed_worker_is_one_sentence(packed, monkeypatch):
    monkeypatch.setattr(
        "densenas.images.pack.decode", lambda encoded: os.kill(os.getpid(), signal.SIGKILL)
    )
    with refused(
        RuntimeError,
        r"a process that decodes images was killed, as where memory .*: the same call goes on",
    ):
        passed(packed, 8, seed=1, workers=1)


def test_another_error_of_a_loader_is_not_taken_for_a_killed_process():
    def pieces():
        yield torch.empty(0)
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")

    received = pieces()
    next(received)
    with refused(RuntimeError, r"^Caught RuntimeError in DataLoader worker process 0\.$"):
        loading._received(received)


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


@pytest.mark.parametrize(
    ("dataset", "asked", "mirror"),
    [
        ("digits", None, False),
        ("folder", None, True),
        ("digits", True, True),
        ("folder", False, False),
    ],
)
def test_augmentation_in_memory_only_shifts_and_mirrors(dataset, asked, mirror):
    data = dataclasses.replace(made_up(dataset=dataset), mirror=asked)
    possible = [[*shifts(image, mirror)] for image in data.train.images]
    found = Counter()
    for seed in range(8):
        for images, labels in passed(data, 11, seed):
            for picture, label in zip(pictures(data, images), labels.tolist(), strict=True):
                ways = [way for way, moved in possible[label] if torch.equal(moved, picture)]
                assert len(ways) == 1
                found.update(ways)
    assert {down for down, _, _ in found} == {right for _, right, _ in found} == {-2, -1, 0, 1, 2}
    assert {mirrored for _, _, mirrored in found} == ({False, True} if mirror else {False})


@pytest.mark.parametrize("mirror", [True, False])
def test_images_that_are_decoded_anew_are_mirrored_where_that_is_asked_for(packed, mirror):
    """A ramp from left to right stays one, or becomes one from right to left in every other image."""
    data = dataclasses.replace(packed, augment="weak", mirror=mirror)
    batches = Batches(data, "train", 2, torch.device("cpu"), 0, workers=0)
    assert batches.loader.decoder.mirror is mirror


def test_whether_images_are_mirrored_is_kept_and_tells_data_apart(run):
    usual = prepare(run, DataSettings(num_classes=2))
    assert usual.mirror is None and "mirror" not in run.work.joinpath("data.json").read_text()
    asked = prepare(run, DataSettings(num_classes=2, mirror=True))
    assert asked.mirror is load(run).mirror is True and asked.digest != usual.digest


def test_random_sized_is_torchvisions_own(packed):
    """Number by number, for every layout in memory."""
    ours, theirs = (
        RandomResizedCrop(16, scale=(0.08, 1.0)),
        v2.RandomResizedCrop(16, scale=(0.08, 1.0)),
    )
    for index in range(len(packed.train)):
        image = packed.train.read(index)
        for layout in (image, image.contiguous()):
            made = []
            for steps in (ours, theirs):
                torch.manual_seed(index)
                made.append(steps(layout))
            assert torch.equal(*made)


@pytest.mark.parametrize("augment", ["weak", "random_sized", "rand_scale"])
def test_published_transforms_keep_what_they_promise(augment):
    """On a ramp from left to right, the value of a pixel tells where it came from."""
    ramp = torch.linspace(0, 255, 512).round().byte().expand(3, 512, 512)
    seen = []
    for seed in range(60):
        torch.manual_seed(seed)
        row = transform(augment, 224)(ramp)[0, 100].float()
        assert row.shape == (224,) and (row.diff() >= -1).all()
        seen.append(
            (row[-1] - row[0]).item() / 255 * 512
        )  # width of the crop, in pixels of the source
    low, high = {
        "weak": (448, 448),
        "rand_scale": (224 / 480 * 512, 448),
        "random_sized": (100, 512),
    }[augment]
    assert low - 8 <= min(seen) and max(seen) <= high + 8
    assert max(seen) - min(seen) > 0.6 * (high - low) or augment == "weak"
    if augment == "rand_scale":  # all shorter sides from 256 to 480 occur
        assert min(seen) < low + 0.1 * (high - low) and max(seen) > high - 0.1 * (high - low)


def test_what_stays_in_memory(run, tmp_path):
    inside = prepare(run, DataSettings(num_classes=2))
    assert (inside.resident, inside.augment) == (True, "weak")
    assert not prepare(run, DataSettings(num_classes=2, augment="rand_scale")).resident
    for name in ("n00000001", "n00000002"):  # as ImageNet's, whose mean is known
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(3):
            write_png(torch.zeros(3, 9, 9, dtype=torch.uint8), f"{tmp_path}/set/{name}/{index}.png")
    for size, resident, augment in ((7000, True, "weak"), (8000, False, "random_sized")):
        settings = DataSettings(dataset="folder", source=f"{tmp_path}/set", image_size=size)
        data = prepare(run, settings)  # a gigabyte where decoded is the limit
        assert (data.resident, data.augment) == (resident, augment)


def test_training_images_are_normalised(root):
    digits = prepare(Run("digits"), DataSettings())
    images = torch.cat(
        [images for images, _ in passed(digits, 500, splits=("train", "val"))]
    ).double()
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (images.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_images_of_one_colour_stay_finite(run, tmp_path):
    blue = torch.tensor([0, 0, 90]).byte()[:, None, None].expand(3, 20, 20).contiguous()
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(8):
            write_png(blue, f"{tmp_path}/set/{name}/{index}.png")
    data = prepare(run, class_folders(tmp_path / "set"))
    assert all(
        torch.equal(images, torch.zeros_like(images))
        for images, _ in passed(data, 4, splits="test")
    )
