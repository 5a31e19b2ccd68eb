"""The teacher that a configuration asks for."""

from __future__ import annotations

from mvp_fast.config.schema import TeacherConfig
from mvp_fast.errors import ConfigError
from mvp_fast.models.teachers.base import Teacher


def build_teacher(
    config: TeacherConfig,
    *,
    grid: tuple[int, int] = (14, 14),
    image_size: int = 224,
    cls: bool = False,
    impl: str = "auto",
) -> Teacher:
    """Build it, on the CPU in float32.

    Args:
        config: kind, name, where the weights come from, seed of random ones.
        grid: the student's patches down and across, which will be the teacher's.
        image_size: side of the crops, pixels.
        cls: whether the CLS token's feature is wanted.
        impl: implementation of mvp_kernels: auto, triton or reference.

    Raises:
        ConfigError: there is no such model, tag or weights, it is of the wrong kind, its grid can't be the student's,
            or it has no CLS token and that was wanted.
        DataError: the weights are missing, damaged, or of another model.
        EnvironmentProblem: the weights have to be downloaded, and can't be.
    """
    # Only what is asked for is imported: open_clip and its towers take a second.
    if config.kind == "clip":
        from mvp_fast.models.teachers.clip import build_clip

        return build_clip(config, grid=grid, image_size=image_size, impl=impl)
    if config.kind == "timm":
        from mvp_fast.models.teachers.timm_tower import build_timm

        return build_timm(config, grid=grid, image_size=image_size, cls=cls, impl=impl)
    if cls:
        raise ConfigError(
            f"The teacher `{config.kind}` has a target for each patch and none for the CLS token, which objective.cls"
            " asks for",
            where=f"teacher.kind is {config.kind}",
            fix="Set objective.cls to False",
        )
    patch = image_size // grid[0]
    if (grid[0] * patch, grid[1] * patch) != (image_size, image_size):
        raise ConfigError(
            f"Images of {image_size} px can't be cut into {grid[0]}x{grid[1]} square patches",
            where="data.image_size",
            fix="Take a multiple of the student's patch size",
        )
    if config.kind == "pixels":
        from mvp_fast.models.teachers.pixels import PixelTeacher

        return PixelTeacher(grid=grid, patch_size=patch, impl=impl)
    from mvp_fast.models.teachers.hog import HogTeacher

    return HogTeacher(grid=grid, patch_size=patch, impl=impl)
