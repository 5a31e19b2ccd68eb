"""A batch on its way to DALI: groups of rows, each of one encoded image that is read, or given up.

A group is plan.repeat rows of one sample.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass

from PIL import Image

from mvp_fast.loaders.encoded import Encoded
from mvp_fast.loaders.failures import Settled
from mvp_fast.loaders.torchvision import Crop
from mvp_fast.samples.plan import PlanRows

BLANK_SIDE = 8


@dataclass(frozen=True)
class Prepared:
    """One group, ready for DALI, or ready altogether.

    Attributes:
        data: the encoded image.
        read: seconds it took to read, wall time.
        crop: the finished crops of a sample that DALI does not decode.
    """

    data: Encoded
    read: float
    crop: Crop | None = None


@dataclass
class PreparedBatch:
    """A batch that is read, or given up.

    Attributes:
        groups: how many groups the rows are.
        settled: one entry a group; fewer where the last one found no stand-in (its value is None).
        error: what went wrong in the reading threads beyond bad samples.
    """

    step: int
    rows: PlanRows
    groups: int
    settled: list[Settled[Prepared]]
    error: BaseException | None = None

    def prepared(self, group: int) -> Prepared | None:
        """None where the group found no stand-in or was not reached."""
        return self.settled[group].value if group < len(self.settled) else None

    def rows_of(self, group: int) -> PlanRows:
        """The group's rows."""
        size = len(self.rows) // self.groups
        return self.rows.slice(group * size, (group + 1) * size)

    def replace(self, group: int, settled: Settled[Prepared]) -> None:
        """Put stand-ins in place of the group's rows."""
        self.rows = self.rows.replace_rows(group * (len(self.rows) // self.groups), settled.rows)

    def for_dali(self) -> dict[int, Encoded]:
        """The groups that are DALI's to decode."""
        groups = ((i, settled.value) for i, settled in enumerate(self.settled))
        return {i: value.data for i, value in groups if value is not None and value.crop is None}

    def given_up(self) -> bool:
        """It will never be whole; the reason is raised when it is this batch's turn."""
        return self.error is not None or any(self.prepared(i) is None for i in range(self.groups))


@functools.cache
def blank() -> bytes:
    """A small grey JPEG, which stands where DALI has nothing to decode."""
    stream = io.BytesIO()
    Image.new("RGB", (BLANK_SIDE, BLANK_SIDE), (128, 128, 128)).save(stream, "JPEG")
    return stream.getvalue()
