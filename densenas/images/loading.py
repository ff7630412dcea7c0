"""Batches: from a split to normalised images on the device, as a pure function of seed, epoch and position."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision.transforms import v2

from densenas.files import refuse
from densenas.images.decoding import middle
from densenas.images.pack import CORES, Packed

if TYPE_CHECKING:
    from densenas.images.data import ImageData

MIRRORED = ("cifar10", "imagenette", "folder")  # sets in which a mirror image keeps its class


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's own for one uint8 (3, H, W): the same crop, resized 1.5 times as fast for being channels_last."""

    def forward(self, image: Tensor) -> Tensor:
        top, left, height, width = self.make_params([image]).values()
        crop = image[None, :, top : top + height, left : left + width].contiguous(
            memory_format=torch.channels_last
        )
        return F.interpolate(crop, self.size, mode="bilinear", antialias=True)[0]


def transform(augment: str | None, size: int) -> v2.Transform:
    """The published transforms from uint8 (3, H, W) to (3, size, size), without the mirror; None is for validation.

    Their numbers are for 224 pixels and scale with `size`: 256 and 480 are 8/7 and 15/7 of it.
    """
    shorter = size * 8 // 7
    resize = v2.Resize(shorter, antialias=True)
    resize_at_random = v2.RandomShortestSize(range(shorter, size * 15 // 7 + 1))
    return {
        None: v2.Compose([middle, resize, v2.CenterCrop(size)]),
        "weak": v2.Compose([middle, resize, v2.RandomCrop(size)]),
        "random_sized": RandomResizedCrop(size, scale=(0.08, 1.0)),
        "rand_scale": v2.Compose([middle, resize_at_random, v2.RandomCrop(size)]),
    }[augment]


def free_shared_memory() -> int:
    """Bytes that are left of what workers send their images through: 64 MB in a Docker container."""
    return shutil.disk_usage("/dev/shm").free if os.access("/dev/shm", os.W_OK) else 0


def seed_of(*position: object) -> int:
    """A seed of 63 bits for a place in a run, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(position).encode()).digest()[:8]) >> 1


class Decoded(Dataset):
    """Batches as DataLoader's workers make them: from indices with their seeds to uint8 (b, 3, S, S)."""

    def __init__(self, parts: Sequence[Packed], steps: v2.Transform, mirror: bool) -> None:
        self.source, self.size = ConcatDataset(parts), parts[0].image_size
        self.steps, self.mirror = steps, mirror

    def __getitem__(self, request: list[tuple[int, int]]) -> Tensor:
        images = torch.empty(
            len(request),
            3,
            self.size,
            self.size,
            dtype=torch.uint8,
            memory_format=torch.channels_last,
        )
        with torch.random.fork_rng(devices=[]):
            for image, (index, seed) in zip(images, request, strict=True):
                # Transforms draw from the global generator; a seed for each image makes workers interchangeable.
                torch.default_generator.manual_seed(seed)
                made = self.steps(self.source[index])
                image.copy_(made.flip(-1) if self.mirror and torch.rand(()) < 0.5 else made)
        return images


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, where that is a GPU without waiting for what it still has to do."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


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
        parts = [data.splits[name] for name in ([splits] if isinstance(splits, str) else splits)]
        rank, world = rank_and_world() if world is None else (rank, world)
        unequal = not 0 <= rank < world or batch_size < 1 or batch_size % world > 0
        refuse(
            unequal,
            f"batch_size {batch_size} cannot be shared equally by {world} processes (this is {rank})",
        )
        self.count = sum(map(len, parts))
        self.batch_size = min(batch_size, self.count) // world * world
        refuse(self.batch_size == 0, f"{self.count} images are too few for {world} processes")
        self.device, self.seed, self.rank, self.world = device, seed, rank, world
        self.mirror = data.dataset in MIRRORED
        # Written out for every pixel: broadcasting along the innermost dimension is four times as slow on a CPU.
        blank = torch.empty(
            1, 3, data.image_size, data.image_size, device=device, memory_format=torch.channels_last
        )
        moments = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
        self.mean, self.std = (blank.clone().copy_(moment) for moment in moments)
        labels = torch.cat([part.labels for part in parts])
        self.images = self.decoder = None
        if data.resident:
            self.images, labels = (
                torch.cat([part.images for part in parts]).to(device),
                labels.to(device),
            )
        else:
            augment = None if seed is None else data.augment
            self.decoder = Decoded(
                parts, transform(augment, data.image_size), self.mirror and seed is not None
            )
            # processes on this machine, as torchrun says it
            here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            workers = max(1, CORES // here) if workers is None else workers
            self.workers, self.piece = self._shares(workers, here)
        self.labels = labels

    def __len__(self) -> int:
        """Steps of one pass."""
        return (
            math.ceil(self.count / self.batch_size)
            if self.seed is None
            else self.count // self.batch_size
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one pass from step `start` on: what an undisturbed pass yields from there."""
        position = (self.seed, epoch) if self.seed is not None else ()
        order = torch.randperm(
            self.count, generator=torch.Generator().manual_seed(seed_of(*position))
        )
        mine = [batch.tensor_split(self.world)[self.rank] for batch in order.split(self.batch_size)]
        steps = range(start, len(self))
        batches = (
            self._resident(epoch, mine, steps)
            if self.decoder is None
            else self._decoded(epoch, mine, steps)
        )
        for images, labels in batches:
            yield images.float().div_(255).sub_(self.mean).div_(self.std), labels

    def _resident(
        self, epoch: int, mine: list[Tensor], steps: range
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for step in steps:
            chosen = send(mine[step], self.device)
            images = self.images[chosen]
            if self.seed is not None:
                images = self._augment(
                    images, torch.Generator().manual_seed(seed_of(self.seed, epoch, step))
                )
            yield images, self.labels[chosen]

    def _decoded(
        self, epoch: int, mine: list[Tensor], steps: range
    ) -> Iterator[tuple[Tensor, Tensor]]:
        requests = (
            [
                (index, 0 if self.seed is None else seed_of(self.seed, epoch, index))
                for index in mine[step].tolist()
            ]
            for step in steps
        )
        size = self.piece
        pieces = (
            request[at : at + size] for request in requests for at in range(0, len(request), size)
        )
        loader = DataLoader(
            self.decoder,
            batch_size=None,
            sampler=pieces,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(
                0
            ),  # its draw for the workers must not come from the global one
        )
        sent = iter(loader)
        for step in steps:
            count, side = len(mine[step]), self.decoder.size
            images = torch.empty(
                count,
                3,
                side,
                side,
                dtype=torch.uint8,
                device=self.device,
                memory_format=torch.channels_last,
            )
            for at in range(0, count, size):
                try:
                    images[at : at + size].copy_(next(sent), non_blocking=True)
                except ValueError as error:  # from a worker with its whole traceback
                    reason = str(error).splitlines()[-1].removeprefix("ValueError: ")
                    raise ValueError(reason) from None
                except RuntimeError as error:  # of PyTorch, where a worker is gone
                    raise RuntimeError(
                        "a process that decodes images was killed, as where memory or /dev/shm is"
                        f" full: the same call goes on ({str(error).splitlines()[0]})"
                    ) from None
            yield images, send(self.labels[mine[step]], self.device)

    def _shares(self, wanted: int, here: int) -> tuple[int, int]:
        """How many workers decode, and how many images each sends at once.

        Each may have three pieces in shared memory: two made ahead, one that is being copied. All
        together take at most a quarter of what is free: other splits and processes need some too.
        """
        free = free_shared_memory()
        room = free // 4 // here // (3 * self.decoder.size**2)  # images
        workers = min(wanted, room // 3)
        if workers < wanted:
            print(
                f"/dev/shm has {free / 1e6:.1f} MB left: {workers} instead of {wanted} workers"
                " decode, in a container more with --shm-size=8g"
            )
        share = self.batch_size // self.world
        return workers, min(share, room // (3 * workers)) if workers else share

    def _augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Shifts each image by up to an eighth of its side and, where classes allow, mirrors every other one.

        Drawn for the batch of all processes, on the CPU: every device and every number of processes sees the same.
        """
        size, reach = images.shape[-1], images.shape[-1] // 8
        offset = torch.randint(0, 2 * reach + 1, (2, self.batch_size), generator=generator)
        mirror = torch.rand(self.batch_size, generator=generator) < (0.5 if self.mirror else 0)
        offset, mirror = (
            draw.tensor_split(self.world, dim=-1)[self.rank] for draw in (offset, mirror)
        )
        rows = offset[0][:, None] + torch.arange(size)
        columns = offset[1][:, None] + torch.arange(size)
        columns = torch.where(mirror[:, None], columns.flip(1), columns)
        rows, columns = send(rows, images.device), send(columns, images.device)
        padded = F.pad(images, (reach,) * 4)
        picture = torch.arange(len(images), device=images.device)[:, None, None]
        return padded.movedim(1, 3)[picture, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
