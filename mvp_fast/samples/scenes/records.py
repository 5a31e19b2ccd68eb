"""What is kept of each scene beside its files: one row, as JSON while a set is drawn and as Parquet in the end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvp_fast.samples.scenes.caption import caption
from mvp_fast.samples.scenes.draw import Drawing
from mvp_fast.samples.scenes.spec import SceneSpec

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]

OBJECT_FIELDS = ("shape", "colour", "texture", "size")
ROWS_A_GROUP = 4096


def schema() -> pa.Schema:
    """The columns of scenes.parquet.

    key: the image's path without its suffix, `<class>/<number>`. label: the class's place in scenes.json's `classes`.
    objects: from back to front; box is what shows of the object, pixels, (left, top, right, bottom), the last two
    exclusive. main: the main object's place in `objects`. bytes: length of the JPEG file.
    """
    import pyarrow as pa

    words: list[pa.Field] = [pa.field(name, pa.string()) for name in OBJECT_FIELDS]
    box: pa.Field = pa.field("box", pa.list_(pa.int32(), 4))
    columns: list[pa.Field] = [
        pa.field("key", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("label", pa.int32()),
        pa.field("class", pa.string()),
        pa.field("ground", pa.string()),
        pa.field("objects", pa.list_(pa.struct([*words, box]))),
        pa.field("main", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("bytes", pa.int64()),
    ]
    return pa.schema(columns)


def make_row(key: str, scene: SceneSpec, drawing: Drawing, classes: list[str], length: int) -> Row:
    """The row of one scene whose JPEG file is `length` bytes long."""
    objects = [
        {**{name: getattr(thing, name) for name in OBJECT_FIELDS}, "box": list(box)}
        for thing, box in zip(scene.objects, drawing.boxes(), strict=True)
    ]
    return {
        "key": key,
        "caption": caption(scene),
        "label": classes.index(scene.label),
        "class": scene.label,
        "ground": scene.ground,
        "objects": objects,
        "main": scene.main,
        "width": scene.width,
        "height": scene.height,
        "bytes": length,
    }


def write_table(path: Path, rows: Iterable[Row]) -> int:
    """Write rows, in their order, as a Parquet file, a row group at a time; returns the sum of their `bytes`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns, total = schema(), 0
    with pq.ParquetWriter(path, columns) as writer:
        for group in _groups(rows):
            writer.write_table(pa.Table.from_pylist(group, schema=columns))
            total += sum(row["bytes"] for row in group)
    return total


def read_rows(path: Path) -> list[Row]:
    """The rows that were kept as JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_as_text(rows: list[Row]) -> bytes:
    """Rows as JSON lines."""
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == ROWS_A_GROUP:
            yield group
            group = []
    yield group
