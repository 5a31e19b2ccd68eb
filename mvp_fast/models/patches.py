"""From crops to what the two models take: patches, each normalised as its model wants them, in one read where possible.

Shape legend: B images, H and W pixels, C colours, N patches, P pixel values a patch (C * patch * patch, ordered colour,
row, column).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mvp_kernels import dispatch

if TYPE_CHECKING:
    from mvp_fast.models.student import Student
    from mvp_fast.models.teachers.base import Teacher


def patches_of_both(images_BHWC: Tensor, student: Student, teacher: Teacher) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's patches of the same pixels.

    One read of the crops gives both where the models cut them alike; else each cuts for itself.

    Args:
        images_BHWC: uint8 crops.

    Returns:
        student_BNP, teacher_BNP, each in the type that its model computes in (see `input_dtype`).
    """
    alike = (teacher.patch_size, teacher.input_size) == (student.patch_size, tuple(images_BHWC.shape[1:3]))
    if not alike:
        return student.patches(images_BHWC), teacher.patches(images_BHWC)
    student_BNP, teacher_BNP = dispatch.patchify(
        images_BHWC, student.patch_size, [student.normalization(), teacher.normalization()], impl=student.impl
    )
    return student_BNP, teacher_BNP


def input_dtype(weight: Tensor) -> torch.dtype:
    """The type in which a layer of this weight computes: patches that have it need no cast."""
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
