"""How many floating-point operations a step's stages take, and how many bytes they move: from the models' sizes.

Operations are those of the matrix products of the plain models, two a multiply-add, every token in every layer: what
this project leaves out counts in its favour, and shares of the limit can be held against other projects' (model FLOP/s
utilisation; PaLM, arXiv 2204.02311, appendix B). A test holds them to what torch's own counter finds in the plain step.

Bytes are an estimate: each layer reads its input and its weights and writes its output once, in the type that it
computes in, and nothing is fused. Stages without matrix products are counted by element where that is exact.

Legend: T tokens with CLS, N patches, D width, F hidden width of the MLP, P pixel values a patch, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mvp_fast.models.student import Student
from mvp_fast.models.teachers.base import Teacher
from mvp_fast.models.teachers.clip import ClipTeacher
from mvp_fast.models.teachers.timm_tower import TimmTeacher
from mvp_fast.train.build import PretrainRun
from mvp_fast.train.sharding import local_part

# Of Adam (arXiv 1412.6980) with decoupled decay, a weight: 3 for each average, one square, root, shift, two
# corrections, quotient, step, decay.
ADAM_OPERATIONS = 14
ADAM = ("adam", "adamw", "nadam", "nadamw")


@dataclass(frozen=True)
class Work:
    """Operations and bytes."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Tower:
    """The sizes of a plain ViT.

    Attributes:
        depth: blocks.
        hidden: F; of a gated MLP, that of a plain one with as many weights.
        head: O, of a linear layer on all tokens at the end; 0 for none.
        prefix: tokens before the patches.
    """

    patches: int
    patch_values: int
    width: int
    hidden: int
    depth: int
    head: int
    prefix: int = 1

    @property
    def tokens(self) -> int:
        """T."""
        return self.patches + self.prefix

    def embedding(self, images: int, size: int) -> Work:
        """The patch embedding; `size` bytes a value."""
        return _linear(images * self.patches, self.patch_values, self.width, size)

    def forward(self, images: int, size: int) -> Work:
        """The whole tower; `size` bytes a value."""
        rows, width, hidden = images * self.tokens, self.width, self.hidden
        products = _linear(rows, width, 3 * width, size) + _linear(rows, width, width, size)
        products += _linear(rows, width, hidden, size) + _linear(rows, hidden, width, size)
        attention = Work(4 * rows * self.tokens * width, size * 4 * rows * width)
        # Two norms and two residual sums of the width (5 values read and written each pair), and the activation.
        elements = Work(0, size * rows * (2 * 5 * width + 2 * hidden))
        block = products + attention + elements
        return self.embedding(images, size) + block * self.depth + _linear(rows, width, self.head, size)


def _linear(rows: int, inputs: int, outputs: int, size: int) -> Work:
    return Work(2 * rows * inputs * outputs, size * (rows * (inputs + outputs) + inputs * outputs))


def student_tower(student: Student) -> Tower:
    """The student's sizes."""
    block: Any = student.blocks[0]
    hidden = block.mlp.fc1.out_features
    proj = student.patch_embed.proj
    return Tower(
        student.grid[0] * student.grid[1],
        proj.weight[0].numel(),
        student.width,
        hidden,
        len(student.blocks),
        student.predictor.out_features,
    )


def teacher_tower(teacher: Teacher) -> Tower | None:
    """The teacher's sizes as open_clip or timm builds it; None where it is no tower."""
    if isinstance(teacher, TimmTeacher):
        mlp: Any = teacher.blocks[0].mlp
        weights = sum(layer.weight.numel() for layer in mlp.modules() if isinstance(layer, nn.Linear))
        return Tower(
            teacher.grid[0] * teacher.grid[1],
            teacher.embedding.weight[0].numel(),
            teacher.width,
            weights // (2 * teacher.width),
            len(teacher.blocks),
            0,
            teacher.prefix,
        )
    if not isinstance(teacher, ClipTeacher):
        return None
    visual = teacher.visual
    blocks = visual.transformer.resblocks
    return Tower(
        teacher.grid[0] * teacher.grid[1],
        visual.conv1.weight[0].numel(),
        visual.conv1.weight.shape[0],
        blocks[0].mlp.c_fc.out_features,
        len(blocks),
        teacher.width,
    )


def operations(run: PretrainRun) -> dict[str, Work]:
    """Work of this rank a step, by stage; stages of which nothing exact can be said are left out."""
    config, images = run.config, run.plan.local_batch_size
    size = 2 if config.train.precision == "bf16" else 4
    student, teacher = student_tower(run.student), teacher_tower(run.teacher)
    forward = student.forward(images, size)
    # Each product twice, for the gradients of input and weight; the images need none.
    backward = forward * 2 + Work(-student.embedding(images, size).flops, 0)
    seen = run.teacher.input_size[0] * run.teacher.input_size[1]
    values = images * (student.patches * student.patch_values + 3 * seen)
    pixels = 3 * images * config.data.image_size**2
    weights = [parameter for parameter in run.student.parameters() if parameter.requires_grad]
    count = sum(local_part(weight).numel() for weight in weights)
    found = {
        "patchify": Work(2 * values, pixels + size * values),
        "student forward": forward,
        "backward": backward,
    }
    if teacher is not None:  # pixels and HOG are elementwise: no matrix product, and little else
        found["teacher"] = teacher.forward(images, size)
    if config.optim.name.lower() in ADAM:
        # Weight and two averages are read and written, the gradient is read; float32.
        found["optimizer"] = Work(ADAM_OPERATIONS * count, 4 * 7 * count)
    if config.optim.clip_grad > 0:
        # Read for the norm, then read and written.
        found["clip"] = Work(3 * count, 4 * 3 * count)
    return found


def products(work: dict[str, Work]) -> float:
    """Operations of the matrix products alone, a step."""
    return sum(work[stage].flops for stage in ("teacher", "student forward", "backward") if stage in work)
