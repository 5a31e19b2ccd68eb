"""A segmenter judged on a whole set: each image at its own size, window by window, its mask against the prediction.

The ranks share the images; each counts its own pixels, and the counts are added up, so that the figures do not depend
on the number of ranks. Images are decoded by Pillow, in threads that run ahead.

Shape legend: H and W pixels, C classes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from mvp_fast.config.segment import SegmentSettings, window_stride
from mvp_fast.errors import DataError
from mvp_fast.evaluate.segment.masks import LabelledSet
from mvp_fast.evaluate.segment.network import Segmenter
from mvp_fast.evaluate.segment.plan import base_scale
from mvp_fast.evaluate.segment.scores import Confusion
from mvp_fast.evaluate.segment.slide import predict, slide_scores
from mvp_fast.loaders import encoded

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "area": Image.Resampling.BOX}


class Sample(NamedTuple):
    """An image of the set, ready for the network.

    Attributes:
        number: row of the index.
        image_HWC: uint8, as stored.
        scaled_HWC: uint8, scaled as the settings ask for.
        truth_HW: int16, of the stored image's size.
    """

    number: int
    image_HWC: npt.NDArray[np.uint8]
    scaled_HWC: npt.NDArray[np.uint8]
    truth_HW: npt.NDArray[np.int16]


@dataclass(frozen=True)
class Judge:
    """What judges segmenters on a set.

    Attributes:
        labelled: the set.
        settings: size of the windows, stride, shorter_side, filter, precision.
        device: of the segmenter.
        threads: that decode.
    """

    labelled: LabelledSet
    settings: SegmentSettings
    device: torch.device
    threads: int

    def __call__(
        self,
        model: Segmenter,
        samples: Sequence[int],
        confusion: Confusion,
        stopped: Callable[[], bool],
        seen: Callable[[Sample, Tensor], None] = lambda sample, predicted_HW: None,
    ) -> bool:
        """Judge `samples` in their order and count their pixels in `confusion`; False where it was stopped early.

        Args:
            model: put into evaluation mode for the time being.
            samples: rows of the index.
            confusion: counts are added to it.
            stopped: asked before each image.
            seen: called after each image, with its prediction, int64 (H, W).

        Raises:
            DataError: an image or a mask can't be used.
        """
        training = model.training
        model.eval()
        try:
            with ThreadPoolExecutor(self.threads, thread_name_prefix="mvp-judge") as pool:
                for sample in self._ahead(pool, samples):
                    if stopped():
                        return False
                    predicted_HW = self.predict(model, sample)
                    confusion.add(predicted_HW, torch.from_numpy(sample.truth_HW).to(self.device))
                    seen(sample, predicted_HW)
            return True
        finally:
            model.train(training)

    @torch.no_grad()
    def predict(self, model: Segmenter, sample: Sample) -> Tensor:
        """The class of each pixel: int64 (H, W), on the device."""
        autocast = self.settings.train.precision == "bf16"
        settings = self.settings
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            scores_CHW = slide_scores(
                model.scores,
                torch.from_numpy(sample.scaled_HWC).to(self.device),
                settings.data.image_size,
                window_stride(settings),
                settings.segment.window_batch,
            )
        height, width = sample.truth_HW.shape
        return predict(scores_CHW, (height, width))

    def read(self, number: int) -> Sample:
        """Decode and scale an image, and read its mask.

        Raises:
            DataError: the image or the mask can't be used.
        """
        index, settings = self.labelled.index, self.settings
        try:
            image = encoded.decode(index, number, encoded.read(index, number))
        except encoded.BadSampleError as error:
            raise DataError(
                f"An image to judge on can't be used: {error.reason}",
                where=str(index.file(number)),
                fix="Leave it out of the folder, or of the index",
            ) from error
        factor = base_scale(np.array([min(image.size)]), settings.data.image_size, settings.segment.shorter_side)[0]
        size = (max(round(image.width * factor), 1), max(round(image.height * factor), 1))
        scaled = image if size == image.size else image.resize(size, FILTERS[settings.data.interpolation])
        # Copies: what Pillow shares is read-only.
        return Sample(number, np.array(image), np.array(scaled), self.labelled.read(number))

    def _ahead(self, pool: ThreadPoolExecutor, samples: Sequence[int]) -> Iterator[Sample]:
        """The samples, a few of them read ahead."""
        waiting: deque[Future[Sample]] = deque()
        try:
            for number in samples:
                waiting.append(pool.submit(self.read, number))
                if len(waiting) > self.threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
