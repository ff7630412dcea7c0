"""A pack holds every image or says which it does not: strange and broken files, kill -9, full and read-only disks."""

import os
import random
import shutil
import time
from unittest import mock

import lmdb
import numpy as np
import pytest
import torch
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from torchvision.io import decode_image, encode_jpeg, encode_png, write_jpeg, write_png

from densenas.data import prepare
from densenas.pack import Item, Packed, decode, read_manifest, verify, write_pack
from densenas.run import Run

Image = pytest.importorskip("PIL.Image")


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
    found = {"manifest": (folder / "manifest.csv").read_bytes(), "about": (folder / "about.json").read_bytes()}
    for path in sorted(folder.glob("*.lmdb")):
        with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as reader:
            found[path.name] = [*reader.cursor()]
    return found


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_every_kind_of_image_becomes_rgb(kind, mode, tmp_path):
    """As PIL shows it; JPEG and WebP lose a little."""
    ramp = np.arange(0, 250, 10, dtype=np.uint8)[None].repeat(20, axis=0)
    picture = Image.merge("RGB", [Image.fromarray(channel) for channel in (ramp, 250 - ramp, ramp // 2)]).convert(mode)
    try:
        picture.save(tmp_path / "x", kind)
    except (OSError, ValueError):
        pytest.skip(f"{kind} has no mode {mode}")
    ours, theirs = decode((tmp_path / "x").read_bytes()), Image.open(tmp_path / "x").convert("RGB")
    assert ours.dtype == torch.uint8
    far = (ours.int() - torch.from_numpy(np.array(theirs)).movedim(2, 0).int()).abs().float()
    assert far.mean() < 3 and (kind == "JPEG" or far.max() <= 16)


@given(st.integers(0, 65535))
def test_16_bits_become_8(value):
    from io import BytesIO

    file = BytesIO()
    Image.fromarray(np.full((5, 7), value, dtype=np.uint16)).save(file, "PNG")
    image = decode(file.getvalue())
    assert image.dtype == torch.uint8 and image.shape == (3, 5, 7)
    assert abs(image.unique().item() - value / 257) <= 1


def test_a_photograph_stands_upright(tmp_path):
    picture, exif = Image.new("RGB", (30, 10)), Image.Exif()
    exif[0x112] = 6
    picture.save(tmp_path / "x.jpg", exif=exif)
    assert decode((tmp_path / "x.jpg").read_bytes()).shape == (3, 30, 10)


def test_an_animation_is_its_first_picture(tmp_path):
    frames = [Image.new("RGB", (20, 20), shade) for shade in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert decode((tmp_path / "x.gif").read_bytes())[:, 0, 0].tolist() == [255, 0, 0]


@given(st.binary(max_size=60) | st.builds(lambda cut: jpeg()[:cut], st.integers(0, len(jpeg()) - 1)))
def test_what_is_no_image_is_refused_in_one_line(encoded):
    with refused(ValueError, "."):
        decode(encoded)


@pytest.mark.parametrize("pack", ["original", 32])
def test_a_pack_holds_the_bytes_or_the_resized_image(pack, run, tmp_path):
    folder = tmp_path / "set"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for index in range(5):
            write_jpeg(noise(50 + 10 * index, 80, index), f"{folder}/{name}/large{index}.JPG")
            write_png(noise(20, 30, index), f"{folder}/{name}/klein ä{index}.png")
    data = prepare(run, "folder", str(folder), image_size=16, pack=pack, quality=80)
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
                assert min(image.shape[1:]) == 32 and max(image.shape[1:]) == 32 * max(source.shape[1:]) // min(
                    source.shape[1:]
                )
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
        prepare(run, "folder", str(half_broken), image_size=16)
    for name in BROKEN | {"self.jpg": 0}:
        assert f"a/{name} (" in str(caught.value)
    assert "b/dangling.jpg (No such file or directory)" in str(caught.value)
    assert not (run.work / "data").exists() and not (run.work / "data.json").exists()


def test_broken_images_are_skipped_where_asked_and_tried_again(half_broken, run, monkeypatch):
    data = prepare(run, "folder", str(half_broken), image_size=16, skip_broken=True)
    assert sum(map(len, data.splits.values())) == len(read_manifest(run.work / "data")) == 24
    (half_broken / "a/empty.jpg").write_bytes(jpeg(seed=99))
    read = []
    encoded = Item.encoded
    monkeypatch.setattr(Item, "encoded", lambda item: read.append(item.key) or encoded(item))
    data = prepare(run, "folder", str(half_broken), image_size=16, skip_broken=True)
    assert sum(map(len, data.splits.values())) == 25
    assert len(read) == 7, "what is packed already is not read again"
    for name in ("a/self.jpg", "b/dangling.jpg", *(f"a/{name}" for name in BROKEN if name != "empty.jpg")):
        (half_broken / name).unlink()
    assert sum(map(len, prepare(run, "folder", str(half_broken), image_size=16).splits.values())) == 25


def test_a_class_that_loses_its_last_image(run, tmp_path):
    folder = fill(tmp_path / "set", 9)
    for path in (folder / "a").glob("*"):
        path.write_bytes(b"broken")
    with refused(ValueError, r"class 'a' has no image left for train"):
        prepare(run, "folder", str(folder), image_size=16, skip_broken=True)


def test_a_finished_pack_is_kept_and_another_plan_replaces_it(run, tmp_path):
    folder = fill(tmp_path / "set", 9)
    prepare(run, "folder", str(folder), image_size=16)
    before = {path: path.stat().st_ino for path in (run.work / "data").iterdir()}
    prepare(run, "folder", str(folder), image_size=16)
    assert {path: path.stat().st_ino for path in (run.work / "data").iterdir()} == before
    prepare(run, "folder", str(folder), image_size=16, seed=1)
    assert {path: path.stat().st_ino for path in (run.work / "data").iterdir()} != before
    assert not (run.work / "data.partial").exists()


def test_ten_thousand_tiny_files(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    pixel = encode_png(torch.zeros(1, 1, 1, dtype=torch.uint8)).numpy().tobytes()
    for name in range(10):
        (folder / str(name)).mkdir(parents=True)
        for index in range(1000):
            (folder / str(name) / f"{name}-{index}.png").write_bytes(pixel)
    write_pack(tmp_path / "pack", {"train": items(folder)})
    assert verify(tmp_path / "pack") == 10_000
    assert len(Packed(tmp_path / "pack", read_manifest(tmp_path / "pack"), 8)) == 10_000


def test_the_map_grows(tmp_path):
    """Past the 64 MB that it starts with."""
    generator = torch.Generator().manual_seed(0)
    arrays = torch.randint(0, 256, (70, 3, 600, 600), generator=generator, dtype=torch.uint8)
    write_pack(tmp_path / "pack", {"train": [Item(str(k), "a", None, array) for k, array in enumerate(arrays)]})
    assert (tmp_path / "pack/train.lmdb").stat().st_size > 70e6
    packed = Packed(tmp_path / "pack", read_manifest(tmp_path / "pack"), 8)
    assert all(torch.equal(packed.read(k), array) for k, array in enumerate(arrays))


def packing(folder, target, begun):
    """Packs in a process of its own."""
    found = [Item(path.name, path.parent.name, None, path) for path in sorted(folder.glob("*/*"))]
    begun.set()
    with mock.patch("densenas.pack.CHUNK", 8):
        write_pack(target, {"train": found[::2], "val": found[1::2]}, shorter=32)


def test_kill_9_at_any_moment(processes, tmp_path):
    folder = fill(tmp_path / "set", 0)
    for index in range(200):
        (folder / "ab"[index % 2] / f"{index:03d}.jpg").write_bytes(jpeg(140, 140, index))

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
    for _ in range(10):
        process = start(target)
        time.sleep(needed * moments.uniform(0, 0.4))
        killed += process.is_alive()
        process.kill()
        process.join()
        assert not target.exists() or content(target) == expected
        if moments.random() < 0.3:  # finished after this kill, or killed again where it goes on
            assert ends(start(target))
            assert content(target) == expected and verify(target) == 200
            shutil.rmtree(target)
    assert killed
    assert ends(start(target))
    assert content(target) == expected and not (tmp_path / "pack.partial").exists()


@pytest.mark.parametrize("damage", ["missing", "changed", "undecodable"])
def test_verify_names_what_is_wrong(damage, tmp_path):
    write_pack(tmp_path / "pack", {"train": items(fill(tmp_path / "set", 5, "a"))})
    with lmdb.open(str(tmp_path / "pack/train.lmdb"), subdir=False, lock=False) as env, env.begin(write=True) as writer:
        name = next(key for key, _ in writer.cursor() if not key.startswith(b"row:"))
        writer.delete(name) if damage == "missing" else writer.put(name, b"\xff\xd8" if damage[0] == "u" else jpeg())
    reason = r"is missing" if damage == "missing" else "has other bytes than were packed"
    with refused(ValueError, rf"1 of 5 images of the pack '.*' are damaged: 00\d\.jpg \({reason}\); remove the folder"):
        verify(tmp_path / "pack")


@pytest.mark.parametrize(
    "problem", [lmdb.DiskError("mdb_txn_commit: No space left on device"), OSError(28, "No space")]
)
def test_a_full_disk_leaves_nothing_behind(problem, tmp_path, monkeypatch):
    def fail(*_):
        raise problem

    monkeypatch.setattr("densenas.pack._commit", fail)
    with refused(ValueError, r"the pack '.*pack' cannot be written: No space"):
        write_pack(tmp_path / "out/pack", {"train": items(fill(tmp_path / "set", 5))})
    assert not [*(tmp_path / "out").iterdir()]


def test_a_target_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with refused(ValueError, r"the pack '.*file/pack' cannot be written: (Not a directory|File exists)"):
        write_pack(tmp_path / "file/pack", {"train": items(fill(tmp_path / "set", 5))})


def test_a_pack_on_a_read_only_medium_is_read(run, tmp_path):
    prepare(run, "folder", str(fill(tmp_path / "set", 9)), image_size=16, pack="original")
    copy = tmp_path / "copy"
    shutil.copytree(run.work / "data", copy)
    for path in (*copy.iterdir(), copy):
        path.chmod(0o500 if path == copy else 0o400)
    packed = Packed(copy, read_manifest(copy).query("split == 'val'"), 16)
    assert packed.read(0).shape == (3, 24, 24) and len(packed.images) == len(packed)
    assert not [*copy.glob("*lock*")]
    assert Run(run.name).work == run.work
