"""A pack holds every image of its source or says which it does not: broken and changing files, kill -9, damage, full
and read-only disks."""

import os
import random
import shutil
import time
from types import SimpleNamespace

import lmdb
import pytest
import torch
from helpers import class_folders, full_disk, refused
from torchvision.io import decode_image, encode_jpeg, encode_png, write_jpeg, write_png

from densenas.images.data import load
from densenas.images.items import Item, fingerprint
from densenas.images.pack import Packed, read_manifest, verify
from densenas.images.packing import write_pack
from densenas.images.prepare import prepare


def noise(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def jpeg(height=24, width=24, seed=0):
    return encode_jpeg(noise(height, width, seed)).numpy().tobytes()


def fill(folder, count, names=("a", "b")):
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            (folder / name / f"{index:03d}.jpg").write_bytes(jpeg(seed=index))
    return folder


def items(folder):
    return [Item(path.name, path.parent.name, None, path) for path in sorted(folder.glob("*/*"))]


def content(folder):
    """Every key and value of every LMDB, in order, and the manifest."""
    found = {
        "manifest": (folder / "manifest.csv").read_bytes(),
        "about": (folder / "about.json").read_bytes(),
    }
    for path in sorted(folder.glob("*.lmdb")):
        with (
            lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env,
            env.begin() as reader,
        ):
            found[path.name] = [*reader.cursor()]
    return found


@pytest.mark.parametrize("pack", ["original", 32])
def test_a_pack_holds_the_bytes_or_the_resized_image(pack, run, tmp_path):
    folder = tmp_path / "set"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for index in range(5):
            write_jpeg(noise(50 + 10 * index, 80, index), f"{folder}/{name}/large{index}.JPG")
            write_png(noise(20, 30, index), f"{folder}/{name}/klein ä{index}.png")
    data = prepare(run, class_folders(folder, pack=pack, quality=80))
    rows = read_manifest(run.work / "data")
    assert set(rows["key"]) == {path.relative_to(folder).as_posix() for path in folder.glob("*/*")}
    shrunk = 0
    for name, split in data.splits.items():
        for index, row in enumerate(rows[rows["split"] == name].itertuples()):
            source = decode_image(str(folder / row.key))
            assert row.bytes == (folder / row.key).stat().st_size
            image = split.read(index)
            if pack == "original" or "klein" in row.key:
                assert torch.equal(image, source)
            else:
                shrunk += 1
                assert min(image.shape[1:]) == 32 and max(image.shape[1:]) == 32 * max(
                    source.shape[1:]
                ) // min(source.shape[1:])
    assert shrunk == (0 if pack == "original" else 10)


BROKEN = {
    "empty.jpg": b"",
    "text.jpg": b"This is not a picture, although it is called one.",
    "truncated.jpg": jpeg()[:-20],
    "half.png": encode_png(noise(30, 30)).numpy().tobytes()[:800],
    "bitmap.jpeg": b"BM" + bytes(100),
}


@pytest.fixture
def half_broken(tmp_path):
    folder = fill(tmp_path / "set", 12)
    for name, encoded in BROKEN.items():
        (folder / "a" / name).write_bytes(encoded)
    os.symlink("self.jpg", folder / "a/self.jpg")
    os.symlink("nowhere.jpg", folder / "b/dangling.jpg")
    return folder


def test_all_broken_images_are_named_at_the_end(half_broken, run):
    said = r"^7 of 31 images cannot be read: .*; mend or remove them, or set skip_broken$"
    with pytest.raises(ValueError, match=said) as caught:
        prepare(run, class_folders(half_broken))
    for name in BROKEN | {"self.jpg": 0}:
        assert f"a/{name} (" in str(caught.value)
    assert "b/dangling.jpg (No such file or directory)" in str(caught.value)
    assert not (run.work / "data").exists() and not (run.work / "data.json").exists()


def test_broken_images_are_skipped_where_asked_and_tried_again(half_broken, run, read):
    data = prepare(run, class_folders(half_broken, skip_broken=True))
    assert sum(map(len, data.splits.values())) == len(read_manifest(run.work / "data")) == 24
    (half_broken / "a/empty.jpg").write_bytes(jpeg(seed=99))
    read.clear()
    data = prepare(run, class_folders(half_broken, skip_broken=True))
    assert sum(map(len, data.splits.values())) == 25
    assert len(read) == 7, "what is packed already is not read again"
    for name in (
        "a/self.jpg",
        "b/dangling.jpg",
        *(f"a/{name}" for name in BROKEN if name != "empty.jpg"),
    ):
        (half_broken / name).unlink()
    data = prepare(run, class_folders(half_broken))
    assert sum(map(len, data.splits.values())) == 25


def test_a_class_that_loses_its_last_image(run, tmp_path):
    folder = fill(tmp_path / "set", 9)
    for path in (folder / "a").glob("*"):
        path.write_bytes(b"broken")
    with refused(ValueError, r"class 'a' has no image left for train"):
        prepare(run, class_folders(folder, skip_broken=True))


def test_a_finished_pack_is_kept_and_another_plan_replaces_it(run, tmp_path):
    folder = fill(tmp_path / "set", 9)
    prepare(run, class_folders(folder))
    before = {path: path.stat().st_ino for path in (run.work / "data").iterdir()}
    prepare(run, class_folders(folder))
    assert {path: path.stat().st_ino for path in (run.work / "data").iterdir()} == before
    prepare(run, class_folders(folder, seed=1))
    assert {path: path.stat().st_ino for path in (run.work / "data").iterdir()} != before
    assert not (run.work / "data.partial").exists()


def test_many_tiny_files(tmp_path):
    folder = tmp_path / "set"
    pixel = encode_png(torch.zeros(1, 1, 1, dtype=torch.uint8)).numpy().tobytes()
    for name in range(10):
        (folder / str(name)).mkdir(parents=True)
        for index in range(200):
            (folder / str(name) / f"{name}-{index}.png").write_bytes(pixel)
    write_pack(tmp_path / "pack", {"train": items(folder)})
    assert len(verify(tmp_path / "pack")) == 2000
    assert len(Packed(tmp_path / "pack", read_manifest(tmp_path / "pack"), 8)) == 2000


def test_the_map_grows(tmp_path):
    """Past the 64 MB that it starts with."""
    images = [noise(1600, 1700, seed) for seed in range(9)]
    for index, image in enumerate(images):
        pixels = image.permute(1, 2, 0).contiguous().numpy().tobytes()
        (tmp_path / f"{index}.ppm").write_bytes(b"P6 1700 1600 255\n" + pixels)
    found = [Item(str(k), "a", None, tmp_path / f"{k}.ppm") for k in range(9)]
    write_pack(tmp_path / "pack", {"train": found})
    assert (tmp_path / "pack/train.lmdb").stat().st_size > 70e6
    packed = Packed(tmp_path / "pack", read_manifest(tmp_path / "pack"), 8)
    assert all(torch.equal(packed.read(k), image) for k, image in enumerate(images))


def packing(folder, target, begun):
    """Packs in a process of its own."""
    found = [Item(path.name, path.parent.name, None, path) for path in sorted(folder.glob("*/*"))]
    begun.set()
    write_pack(target, {"train": found[::2], "val": found[1::2]}, shorter=32)


def test_kill_9_at_any_moment(processes, tmp_path):
    folder = fill(tmp_path / "set", 0)
    for index in range(300):
        (folder / "ab"[index % 2] / f"{index:03d}.jpg").write_bytes(jpeg(100, 100, index))

    def start(target):
        begun = processes.Event()
        process = processes.Process(target=packing, args=(folder, target, begun))
        process.start()
        assert begun.wait(60)
        return process

    def ends(process):
        process.join()
        return process.exitcode == 0

    process, begin = start(tmp_path / "undisturbed"), time.monotonic()
    assert ends(process)
    needed = time.monotonic() - begin
    expected = content(tmp_path / "undisturbed")
    moments = random.Random(0)
    target, killed = tmp_path / "pack", 0
    for _ in range(7):
        process = start(target)
        time.sleep(needed * moments.uniform(0, 0.4))
        killed += process.is_alive()
        process.kill()
        process.join()
        assert not target.exists() or content(target) == expected
        if moments.random() < 0.3:  # finished after this kill, or killed again where it goes on
            assert ends(start(target))
            assert content(target) == expected and len(verify(target)) == 300
            shutil.rmtree(target)
    assert killed
    assert ends(start(target))
    assert content(target) == expected and not (tmp_path / "pack.partial").exists()


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_verify_names_what_is_wrong(damage, tmp_path):
    write_pack(tmp_path / "pack", {"train": items(fill(tmp_path / "set", 5, "a"))})
    with (
        lmdb.open(str(tmp_path / "pack/train.lmdb"), subdir=False, lock=False) as env,
        env.begin(write=True) as writer,
    ):
        name = next(key for key, _ in writer.cursor() if not key.startswith(b"row:"))
        writer.delete(name) if damage == "missing" else writer.put(name, jpeg())
    reason = r"is missing" if damage == "missing" else "has other bytes than were packed"
    with refused(
        ValueError,
        rf"1 of 5 images of the pack '.*' are damaged: 00\d\.jpg \({reason}\); remove the folder",
    ):
        verify(tmp_path / "pack")


@pytest.fixture
def read(monkeypatch):
    """The keys of the images that are read from their source."""
    keys, original = [], Item.read
    monkeypatch.setattr(Item, "read", lambda item: keys.append(item.key) or original(item))
    return keys


FULL = 200_000  # bytes of a file, up to which the disk takes it: some of 300 images


def test_a_full_disk_keeps_what_is_packed(tmp_path, monkeypatch, read):
    found = items(fill(tmp_path / "set", 300, "a"))
    sentence = r"the pack '.*pack' cannot be written: No space left.*; what is packed stays in "
    with monkeypatch.context() as patch, full_disk(FULL):
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        with refused(ValueError, sentence + r"'.*pack\.partial', the same call goes on from there"):
            write_pack(tmp_path / "pack", {"train": found})
    read.clear()
    write_pack(tmp_path / "pack", {"train": found})
    assert 0 < len(read) < 300 and len(verify(tmp_path / "pack")) == 300


def test_a_finished_pack_outlives_a_full_disk(tmp_path):
    folder = fill(tmp_path / "set", 10, "a")
    (folder / "a/000.jpg").write_bytes(b"broken")
    write_pack(tmp_path / "pack", {"train": items(folder)}, skip_broken=True)
    (folder / "a/000.jpg").write_bytes(jpeg(seed=9))
    with full_disk(8192), refused(ValueError, r"cannot be written: "):
        write_pack(tmp_path / "pack", {"train": items(folder)}, skip_broken=True)
    assert len(verify(tmp_path / "pack")) == 9
    (folder / "a/001.jpg").write_bytes(b"broken")
    with refused(ValueError, r"1 of 10 images cannot be read: 001\.jpg"):
        write_pack(tmp_path / "pack", {"train": items(folder)})
    assert len(verify(tmp_path / "pack")) == 9


def test_a_kill_while_a_new_pack_takes_the_place_of_the_old_loses_nothing(
    tmp_path, read, monkeypatch
):
    """While the old one is removed, or just after."""
    found = items(fill(tmp_path / "set", 5, "a"))
    remove = shutil.rmtree

    def killed(folder):
        if keep:
            (folder / "train.lmdb").unlink()
        else:
            remove(folder)
        raise KeyboardInterrupt

    for keep in (True, False):  # noqa: B007 (`killed` reads it)
        write_pack(tmp_path / "pack", {"train": found[:4]})
        monkeypatch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            write_pack(tmp_path / "pack", {"train": found})
        monkeypatch.setattr(shutil, "rmtree", remove)
        read.clear()
        write_pack(tmp_path / "pack", {"train": found})
        assert not read and len(verify(tmp_path / "pack")) == 5
        assert not (tmp_path / "pack.partial").exists()


def test_a_target_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with refused(
        ValueError, r"the pack '.*file/pack' cannot be written: (Not a directory|File exists)"
    ):
        write_pack(tmp_path / "file/pack", {"train": items(fill(tmp_path / "set", 5, "a"))})


def test_what_stands_in_the_way_is_named(tmp_path):
    (tmp_path / "pack.partial/train.lmdb/in the way").mkdir(parents=True)
    with refused(
        ValueError,
        r"cannot be written: Is a directory \('.*pack\.partial/train\.lmdb'\); what is packed",
    ):
        write_pack(tmp_path / "pack", {"train": items(fill(tmp_path / "set", 2, "a"))})


def test_a_pack_on_a_read_only_medium_is_read(run, tmp_path):
    prepare(run, class_folders(fill(tmp_path / "set", 9), pack="original"))
    copy = tmp_path / "copy"
    shutil.copytree(run.work / "data", copy)
    for path in (*copy.iterdir(), copy):
        path.chmod(0o500 if path == copy else 0o400)
    packed = Packed(copy, read_manifest(copy).query("split == 'val'"), 16)
    assert packed.read(0).shape == (3, 24, 24) and len(packed.images) == len(packed)
    assert {path.name for path in copy.iterdir()} == {
        path.name for path in (run.work / "data").iterdir()
    }


def first_pixels(folder):
    """By key, of every image in the pack."""
    manifest = read_manifest(folder)
    packed = Packed(folder, manifest, 8)
    return {key: packed.read(index)[:, 0, 0].tolist() for index, key in enumerate(manifest["key"])}


def colour(folder, shade, count=12):
    """Files that differ in nothing but their path and pixels, also as `cp -p` and `tar` leave them."""
    folder.mkdir(exist_ok=True)
    for index in range(count):
        path = folder / f"{index:02d}.png"
        write_png(torch.full((3, 8, 8), shade, dtype=torch.uint8), str(path))
        os.utime(path, ns=(10**18, 10**18))
    return [Item(path.name, "a", None, path) for path in sorted(folder.iterdir())]


def test_another_source_with_the_same_names_is_another_pack(tmp_path, read):
    first, second = colour(tmp_path / "A", 10), colour(tmp_path / "B", 20)
    assert first[0].content.stat().st_size == second[0].content.stat().st_size
    for source, shade in ((first, 10), (second, 20)):
        write_pack(tmp_path / "pack", {"train": source})
        assert {*map(tuple, first_pixels(tmp_path / "pack").values())} == {(shade,) * 3}
    colour(tmp_path / "B", 30, count=3)
    read.clear()
    write_pack(tmp_path / "pack", {"train": second})
    assert read == ["00.png", "01.png", "02.png"], "the others are as they were"
    pixels = first_pixels(tmp_path / "pack")
    assert [pixels[item.key][0] for item in second] == [30] * 3 + [20] * 9
    os.rename(tmp_path / "A", tmp_path / "C")
    os.rename(tmp_path / "B", tmp_path / "A")
    write_pack(tmp_path / "pack", {"train": first})
    assert first_pixels(tmp_path / "pack")["05.png"] == [20] * 3


def test_arrays_with_the_same_keys_are_told_apart(tmp_path):
    for shade in (10, 20):
        array = torch.full((3, 8, 8), shade, dtype=torch.uint8)
        write_pack(tmp_path / "pack", {"train": [Item("0", "a", None, array)]})
        assert first_pixels(tmp_path / "pack") == {"0": [shade] * 3}


def test_files_replaced_while_the_pack_was_half_made(tmp_path, read):
    source = colour(tmp_path / "A", 10, count=500)
    with full_disk(FULL), refused(ValueError, "cannot be written"):
        write_pack(tmp_path / "pack", {"train": source})
    colour(tmp_path / "A", 20, count=4)
    read.clear()
    write_pack(tmp_path / "pack", {"train": source})
    assert read[:4] == [item.key for item in source[:4]]
    assert len(read) < 500, "the others that were packed are still the same"
    pixels = first_pixels(tmp_path / "pack")
    assert [pixels[item.key][0] for item in source] == [20] * 4 + [10] * 496


def test_who_reads_a_pack_gets_no_image_of_the_next_one(tmp_path):
    pack = tmp_path / "pack"
    write_pack(pack, {"train": colour(tmp_path / "A", 10)})
    before = Packed(pack, read_manifest(pack), 8)
    assert int(before.read(0)[0, 0, 0]) == 10
    write_pack(pack, {"train": colour(tmp_path / "A", 20)})
    with refused(
        ValueError, r"train\.lmdb' was packed anew while it was read: load the data again"
    ):
        before.read(1)


def test_a_source_that_changes_while_it_is_packed_is_refused(tmp_path, monkeypatch):
    source, read = colour(tmp_path / "A", 10), Item.read

    def switch(item):
        if item.key == "05.png":
            colour(tmp_path / "A", 20)
        return read(item)

    monkeypatch.setattr(Item, "read", switch)
    with refused(ValueError, r"\d+ of 12 images changed while they were packed: .*05\.png .*anew"):
        write_pack(tmp_path / "pack", {"train": source}, skip_broken=True)
    assert not (tmp_path / "pack").exists()
    monkeypatch.setattr(Item, "read", read)
    write_pack(tmp_path / "pack", {"train": source})
    assert {*map(tuple, first_pixels(tmp_path / "pack").values())} == {(20,) * 3}


def test_the_fingerprint_is_another_where_the_pack_would_be(tmp_path):
    source = colour(tmp_path / "A", 10, count=3)
    before = fingerprint(source)
    assert before == fingerprint(source[::-1])
    array = torch.zeros(1, 4, 4, dtype=torch.uint8)
    changed = [source[:2], [*source[:2], Item("02.png", "b", None, source[2].content)]]
    changed += [
        [Item("x", "a", part, shape)] for part in (None, "val") for shape in (array, 1 + array)
    ]
    changed.append(colour(tmp_path / "B", 10, count=3))
    found = [before, *map(fingerprint, changed)]
    colour(tmp_path / "A", 20, count=1)
    found.append(fingerprint(source))
    (tmp_path / "A/01.png").unlink()
    found.append(fingerprint(source))
    assert len({*found}) == len(found)


def overwrite(path, start, content):
    with path.open("r+b") as file:
        file.seek(start)
        file.write(content)


DAMAGE = {
    "cut": lambda pack: os.truncate(pack / "train.lmdb", (pack / "train.lmdb").stat().st_size // 2),
    "empty": lambda pack: os.truncate(pack / "train.lmdb", 0),
    "garbage": lambda pack: overwrite(pack / "train.lmdb", 0, bytes(range(256)) * 40),
    "lost": lambda pack: (pack / "train.lmdb").unlink(),
    "manifest cut": lambda pack: os.truncate(pack / "manifest.csv", 200),
    "manifest lost": lambda pack: (pack / "manifest.csv").unlink(),
    "page": lambda pack: overwrite(pack / "train.lmdb", 4 * 4096, bytes([255]) * 4096),
    "about": lambda pack: (pack / "about.json").write_text("{"),
    "sums": lambda pack: (pack / "SHA256SUMS").write_bytes(b"\xff\x00\nx"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_pack_is_named_and_heals(damage, run, tmp_path):
    """In the process that has read it before, where its files are in memory already."""
    folder = fill(tmp_path / "set", 20)
    before = prepare(run, class_folders(folder))
    assert before.train.images.shape[0] == len(before.train)
    DAMAGE[damage](run.work / "data")
    if damage not in ("page", "about", "sums"):  # those are found where the pack is made
        kind, said = (
            ValueError,
            r"'.*/data.*' .*: run 01-data (again, it packs anew|of run 'made-up' again)",
        )
        if damage == "manifest lost":
            kind, said = (
                FileNotFoundError,
                r"run 'made-up' has no manifest\.csv yet: run 01-data first",
            )
        with refused(kind, said):
            load(run)
    after = prepare(run, class_folders(folder))
    assert after.digest == before.digest and len(verify(run.work / "data")) == 40


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_half_written_pack_heals(damage, tmp_path):
    found = items(fill(tmp_path / "set", 300, "a"))
    with full_disk(FULL), refused(ValueError, "cannot be written"):
        write_pack(tmp_path / "pack", {"train": found})
    DAMAGE[damage](tmp_path / "pack.partial")
    write_pack(tmp_path / "pack", {"train": found})
    assert len(verify(tmp_path / "pack")) == 300


def test_a_pack_of_an_earlier_version_is_read(tmp_path):
    found = items(fill(tmp_path / "set", 5, "a"))
    write_pack(tmp_path / "pack", {"train": found})
    (tmp_path / "pack/SHA256SUMS").unlink()
    assert len(verify(tmp_path / "pack")) == 5


def test_what_is_no_file_with_an_image_is_named(tmp_path):
    folder = fill(tmp_path / "set", 2, "a")
    os.mkfifo(folder / "a/pipe.png")
    (folder / "a/sparse.png").touch()
    os.truncate(folder / "a/sparse.png", 5 << 30)
    (folder / "a/folder.png").mkdir()
    (folder / "a/two\nlines.png").write_bytes(b"text")
    os.symlink("/dev/zero", folder / "a/zero.png")
    found = [*items(folder), Item("gone.png", "a", None, folder / "a/gone.png")]
    reasons = (
        r"folder\.png \(Is a directory\); gone\.png \(No such file or directory\); "
        r"pipe\.png \(is no regular file\); sparse\.png \(has 5\.4 GB, more than 0\.5 GB\); "
        r"two\\nlines\.png \(is no JPEG.*\); zero\.png \(is no regular file\); mend"
    )
    with refused(ValueError, f"6 of 8 images cannot be read: {reasons}"):
        write_pack(tmp_path / "pack", {"train": found})


def test_of_many_broken_images_the_first_are_named_and_all_are_listed(tmp_path, capsys):
    folder = fill(tmp_path / "set", 1, "a")
    for index in range(300):
        (folder / f"a/broken{index:03d}.jpg").touch()
    named = r"300 of 301 images cannot be read: broken000\.jpg \(is empty\); .*broken009.*; and 290 more"
    with refused(ValueError, named + r", all listed in '.*partial/about\.json'; mend"):
        write_pack(tmp_path / "pack", {"train": items(folder)})
    write_pack(tmp_path / "pack", {"train": items(folder)}, skip_broken=True)
    assert "300 of 301 images cannot be read: " in capsys.readouterr().out
    assert "broken299.jpg" in (tmp_path / "pack/about.json").read_text()


def test_a_line_of_pixels_is_cropped_before_it_is_resized(tmp_path):
    """As a whole it would take 5 GB and be longer than a JPEG can be."""
    write_png(noise(20, 30_000), str(tmp_path / "line.png"))
    found = [Item("line.png", "a", None, tmp_path / "line.png")]
    write_pack(tmp_path / "pack", {"train": found}, shorter=16)
    packed = Packed(tmp_path / "pack", read_manifest(tmp_path / "pack"), 4093)
    assert packed.read(0).shape == (3, 16, 256)
    write_png(noise(2, 60_000), str(tmp_path / "line.png"))
    write_pack(tmp_path / "pack", {"train": found})
    packed = Packed(tmp_path / "pack", read_manifest(tmp_path / "pack"), 224)
    assert packed.images.shape == (1, 3, 224, 224)


def test_two_images_of_one_name(tmp_path):
    array = torch.zeros(3, 4, 4, dtype=torch.uint8)
    with refused(ValueError, r"two images have the same name 'x'"):
        write_pack(tmp_path / "pack", {"train": [Item("x", name, None, array) for name in "ab"]})
