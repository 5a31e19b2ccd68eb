"""How others get from JPEG files to uint8 crops: PyTorch's DataLoader in two ways, and DALI's own random crop.

All draw their crops by themselves (scale, ratio and flip as ours), resize with the bicubic filter, antialiased, and
yield uint8 RGB; ours executes a plan and has the same filter. What differs is said where it does.

- `DataLoader, Pillow`: a worker process a core, Pillow decodes, torchvision's RandomResizedCrop works on Pillow's
  images: most public recipes.
- `DataLoader, tensors`: the same over torchvision.io.decode_jpeg and the v2 transforms on uint8 tensors, which
  torchvision's documentation recommends for speed.
- `DALI random crop`: readers.file, decoders.image_random_crop, resize, flip, as NVIDIA's ResNet examples do, which
  take the triangular filter in place of ours, and normalise in DALI where ours normalises on the way into the models.
  It decodes the box alone, as our `dali` does, but with DALI's own chroma upsampling, which costs less than libjpeg's;
  "mixed" decodes on the GPU, in hardware where there is a decoder for it.

Shape legend: B images, H and W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import InterpolationMode, v2

from mvp_fast.config.schema import DataConfig
from mvp_fast.samples.index import Index

PREFETCH_FACTOR = 2  # DataLoader's default
HINT = 512  # pixels across and down that DALI's decoder gets memory for at once; ImageNet's mean is 469 x 387


class Crops(Dataset[Tensor]):
    """The usual map-style set: read, decode, RandomResizedCrop, flip; `length` samples, over and over the files.

    Args:
        index: which files.
        length: samples.
        data: size, scale, ratio and flip of the crops.
        tensors: decode to a tensor and transform tensors; else Pillow's images.
    """

    def __init__(self, index: Index, length: int, data: DataConfig, tensors: bool = False) -> None:
        self.files, self.length, self.tensors = files_of(index), length, tensors
        crop = v2.RandomResizedCrop(
            data.image_size, data.crop_scale, data.crop_ratio, InterpolationMode.BICUBIC, antialias=True
        )
        flip = v2.RandomHorizontalFlip(data.flip)
        self.transform = v2.Compose([crop, flip] if tensors else [crop, flip, v2.PILToTensor()])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Tensor:
        file = self.files[i % len(self.files)]
        crop_CHW: Tensor
        if self.tensors:
            crop_CHW = self.transform(decode_jpeg(read_file(file), ImageReadMode.RGB))
        else:
            with Image.open(file) as image:
                crop_CHW = self.transform(image.convert("RGB"))
        return crop_CHW


class RandomCropPipeline:
    """DALI's own random crop, an endless iterator of image tensors (B, H, W, C).

    Args:
        index, batch_size, data: as for `Crops`.
        threads: DALI's worker threads.
        device: "cpu" or "mixed": where images are decoded, and where the crops are.
        seed: of DALI's random numbers.
    """

    def __init__(
        self, index: Index, batch_size: int, data: DataConfig, threads: int, device: str = "cpu", seed: int = 0
    ) -> None:
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        memory = {} if device == "cpu" else {"preallocate_width_hint": HINT, "preallocate_height_hint": HINT}

        @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None if device == "cpu" else 0, seed=seed)
        def pipeline() -> Any:
            encoded, _ = fn.readers.file(files=files_of(index), random_shuffle=True, initial_fill=1024)
            images = fn.decoders.image_random_crop(
                encoded,
                device=device,
                output_type=types.RGB,
                random_area=list(data.crop_scale),
                random_aspect_ratio=list(data.crop_ratio),
                num_attempts=100,
                **memory,
            )
            size = (data.image_size, data.image_size)
            images = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
            return fn.flip(images, horizontal=fn.random.coin_flip(probability=data.flip), vertical=0)

        self._iterator: Any = DALIGenericIterator([pipeline()], ["images"])  # without a size: endless

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield next(self._iterator)[0]["images"]

    def close(self) -> None:
        """Let DALI end its threads and drop what is in flight."""
        self._iterator = None


class Passages:
    """Passages through a DataLoader whose workers persist, each to its end: nothing stays under way between them.

    Args:
        index, data, tensors: as for `Crops`.
        batch_size: images a batch.
        batches: that one passage takes; the set is longer by what the workers hold ready when the last is taken.
        workers: processes.
        pinned: pin the batches' memory, for copies to the GPU.
    """

    def __init__(
        self,
        index: Index,
        data: DataConfig,
        *,
        tensors: bool,
        batch_size: int,
        batches: int,
        workers: int,
        pinned: bool = False,
    ) -> None:
        length = batch_size * (batches + PREFETCH_FACTOR * workers)
        self.loader: DataLoader[Tensor] = DataLoader(
            Crops(index, length, data, tensors),
            batch_size=batch_size,
            shuffle=True,
            num_workers=workers,
            prefetch_factor=PREFETCH_FACTOR,
            persistent_workers=True,
            pin_memory=pinned,
        )

    def start(self) -> Iterator[Tensor]:
        """A passage from its beginning: image tensors (B, C, H, W)."""
        return iter(self.loader)

    @staticmethod
    def end(passage: Iterator[Tensor]) -> None:
        """Drain it."""
        take(passage, None)


def files_of(index: Index) -> list[str]:
    """The paths of all samples."""
    return [str(index.file(i)) for i in range(len(index))]


def take(batches: Iterator[Any], count: int | None, use: Callable[[Any], Any] = lambda batch: None) -> None:
    """Take so many batches, or all that are left."""
    for batch in islice(batches, count):
        use(batch)
