"""Batches: from a split to normalised images on the device, as a pure function of seed, epoch and position."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from densenas.images.data import ImageData, Split
from densenas.images.pack import CORES, Packed
from densenas.images.transforms import transform
from densenas.ranks import rank_and_world

MIRRORED = ("cifar10", "imagenette", "folder")  # sets whose images are mirrored if nobody objects
Request = tuple[int, int]  # an image's index, and the seed of its augmentation


def seed_of(*position: object) -> int:
    """A seed of 63 bits for a place in a run, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(position).encode()).digest()[:8]) >> 1


def generator_of(*position: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*position))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, where that is a GPU without waiting for what it still has to do."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class Share:
    """What one of several processes that train together gets of each batch: a slice."""

    rank: int
    world: int

    def of(self, batch: Tensor) -> Tensor:
        """Along the last dimension; of an incomplete batch perhaps an empty one."""
        return batch.tensor_split(self.world, dim=-1)[self.rank]


class Batches:
    """Normalised batches (b, 3, S, S) with labels (b,), on the device.

    With a seed these are training batches: shuffled, augmented as `data.augment` says, the last incomplete one left
    out. Without one the splits are read whole and unchanged, always in the same mixed order: a supernet normalises by
    the batch, and a set that is sorted by class would give it batches of one class. `batch_size` is that of all `world`
    processes together (None: of those that train with this one); process `rank` gets its slice of each batch, of an
    incomplete one perhaps an empty one. `workers` are processes that decode, as many as this one has cores where None;
    resident images need none.
    """

    def __init__(
        self,
        data: ImageData,
        splits: str | Sequence[str],
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
        *,
        workers: int | None = None,
        rank: int = 0,
        world: int | None = None,
    ) -> None:
        names = [splits] if isinstance(splits, str) else splits
        parts = [data.splits[name] for name in names]
        if world is None:
            rank, world = rank_and_world()
        if not 0 <= rank < world or batch_size < 1 or batch_size % world > 0:
            shared = f"shared equally by {world} processes (this is {rank})"
            raise ValueError(f"batch_size {batch_size} cannot be {shared}")
        self.count = sum(len(part) for part in parts)
        self.batch_size = min(batch_size, self.count) // world * world
        if self.batch_size == 0:
            raise ValueError(f"{self.count} images are too few for {world} processes")
        self.seed = seed
        self.share = Share(rank, world)
        self.mean = _for_every_pixel(data.mean, data.image_size, device)
        self.std = _for_every_pixel(data.std, data.image_size, device)
        mirror = data.dataset in MIRRORED if data.mirror is None else data.mirror
        self.loader: Resident | Decoded
        if data.resident:
            shifts = None if seed is None else Shifts(seed, mirror, self.batch_size, self.share)
            self.loader = Resident(parts, device, shifts)
        else:
            augment = None if seed is None else data.augment
            steps = transform(augment, data.image_size)
            decoder = Decoder(parts, steps, mirror and seed is not None)
            self.loader = Decoded(decoder, device, seed, self.batch_size // world, workers)

    def __len__(self) -> int:
        """Steps of one pass."""
        if self.seed is None:
            return math.ceil(self.count / self.batch_size)
        return self.count // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one pass from step `start` on: what an undisturbed pass yields from there."""
        position = () if self.seed is None else (self.seed, epoch)
        order = torch.randperm(self.count, generator=generator_of(*position))
        batches = order.split(self.batch_size)
        steps = {step: self.share.of(batches[step]) for step in range(start, len(self))}
        for images, labels in self.loader.load(epoch, steps):
            yield images.float().div_(255).sub_(self.mean).div_(self.std), labels


def _for_every_pixel(values: list[float], size: int, device: torch.device) -> Tensor:
    """Written out: broadcasting along the innermost dimension is four times as slow on a CPU."""
    written = _empty(1, size, torch.float32, device)
    return written.copy_(torch.tensor(values)[:, None, None])


def _empty(count: int, size: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    shape = (count, 3, size, size)
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


class Resident:
    """Loads images that are held in memory on the device, where they are augmented, too."""

    def __init__(
        self, parts: Sequence[Split | Packed], device: torch.device, shifts: Shifts | None
    ) -> None:
        self.images = torch.cat([part.images for part in parts]).to(device)
        self.labels = torch.cat([part.labels for part in parts]).to(device)
        self.device = device
        self.shifts = shifts

    def load(self, epoch: int, steps: Mapping[int, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 (b, 3, S, S) and labels (b,) for the indices (b,) of each step."""
        for step, indices in steps.items():
            chosen = send(indices, self.device)
            images = self.images[chosen]
            if self.shifts:
                images = self.shifts.apply(images, epoch, step)
            yield images, self.labels[chosen]


@dataclass(frozen=True)
class Shifts:
    """Shifts each image by up to an eighth of its side and, where that is asked for, mirrors every other one."""

    seed: int
    mirror: bool
    batch_size: int
    share: Share

    def apply(self, images: Tensor, epoch: int, step: int) -> Tensor:
        """Drawn for the batch of all processes, on the CPU: all devices and numbers of processes see the same."""
        size = images.shape[-1]
        reach = size // 8
        generator = generator_of(self.seed, epoch, step)
        offset = torch.randint(0, 2 * reach + 1, (2, self.batch_size), generator=generator)
        mirror = torch.rand(self.batch_size, generator=generator) < (0.5 if self.mirror else 0)
        down, right = self.share.of(offset)[:, :, None]
        rows = down + torch.arange(size)
        columns = right + torch.arange(size)
        columns = torch.where(self.share.of(mirror)[:, None], columns.flip(1), columns)
        rows = send(rows, images.device)
        columns = send(columns, images.device)
        padded = F.pad(images, (reach, reach, reach, reach)).movedim(1, 3)
        picture = torch.arange(len(images), device=images.device)[:, None, None]
        return padded[picture, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


class Decoder(Dataset[Tensor]):
    """Pieces of batches as DataLoader's workers make them: from requests to uint8 (b, 3, S, S)."""

    def __init__(self, parts: Sequence[Split | Packed], steps: v2.Transform, mirror: bool) -> None:
        self.parts = parts
        self.size = parts[0].image_size
        self.steps = steps
        self.mirror = mirror

    def __getitem__(self, piece: list[Request]) -> Tensor:
        images = _empty(len(piece), self.size, torch.uint8)
        with torch.random.fork_rng(devices=[]):
            for position, (index, seed) in enumerate(piece):
                # Transforms draw from the global generator; a seed for each image makes workers interchangeable.
                torch.default_generator.manual_seed(seed)
                image = self.steps(self._read(index))
                if self.mirror and torch.rand(()) < 0.5:
                    image = image.flip(-1)
                images[position] = image
        return images

    def _read(self, index: int) -> Tensor:
        for part in self.parts:
            if index < len(part):
                return part.read(index)
            index -= len(part)
        raise IndexError(index)


class Decoded:
    """Loads images that are read, decoded and augmented anew in every epoch, by worker processes."""

    def __init__(
        self,
        decoder: Decoder,
        device: torch.device,
        seed: int | None,
        batch_size: int,
        workers: int | None,
    ) -> None:
        """`batch_size` is the largest that this process gets; None workers are one a core."""
        self.decoder = decoder
        self.device = device
        self.seed = seed
        self.labels = torch.cat([part.labels for part in decoder.parts])
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine, says torchrun
        if workers is None:
            workers = max(1, CORES // processes)
        free = free_shared_memory()
        image_bytes = 3 * decoder.size**2
        self.workers, self.piece = fit_workers(workers, batch_size, image_bytes, free // processes)
        if self.workers < workers:
            print(
                f"/dev/shm has {free / 1e6:.1f} MB left: {self.workers} instead of {workers} workers"
                " decode, in a container more with --shm-size=8g"
            )

    def load(self, epoch: int, steps: Mapping[int, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 (b, 3, S, S) and labels (b,) for the indices (b,) of each step."""
        loader = DataLoader(
            self.decoder,
            batch_size=None,
            sampler=self._pieces(epoch, steps),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            # Its draw for the workers must not come from the global one.
            generator=torch.Generator().manual_seed(0),
        )
        pieces = iter(loader)
        for indices in steps.values():
            images = _empty(len(indices), self.decoder.size, torch.uint8, self.device)
            for at in range(0, len(indices), self.piece):
                images[at : at + self.piece].copy_(_received(pieces), non_blocking=True)
            yield images, send(self.labels[indices], self.device)

    def _pieces(self, epoch: int, steps: Mapping[int, Tensor]) -> Iterator[list[Request]]:
        for indices in steps.values():
            requests = []
            for index in indices.tolist():
                seed = 0 if self.seed is None else seed_of(self.seed, epoch, index)
                requests.append((index, seed))
            for at in range(0, len(requests), self.piece):
                yield requests[at : at + self.piece]


def _received(pieces: Iterator[Tensor]) -> Tensor:
    """The next piece; ValueError or RuntimeError in one line where there is none."""
    try:
        return next(pieces)
    except ValueError as error:  # from a worker with its whole traceback
        reason = str(error).splitlines()[-1].removeprefix("ValueError: ")
        raise ValueError(reason) from None
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # or else it was killed
            raise
        raise RuntimeError(
            "a process that decodes images was killed, as where memory or /dev/shm is"
            f" full: the same call goes on ({str(error).splitlines()[0]})"
        ) from None


def free_shared_memory() -> int:
    """Bytes that are left of what workers send their images through: 64 MB in a Docker container."""
    return shutil.disk_usage("/dev/shm").free if os.access("/dev/shm", os.W_OK) else 0


def fit_workers(wanted: int, batch_size: int, image_bytes: int, free: int) -> tuple[int, int]:
    """How many workers decode, and how many images each sends at once.

    Each may have three pieces in shared memory: two made ahead, one that is being copied. All
    together take at most a quarter of what is free: other splits and processes need some too.
    """
    room = free // 4 // image_bytes  # images
    workers = min(wanted, room // 3)
    piece = min(batch_size, room // (3 * workers)) if workers else batch_size
    return workers, piece
