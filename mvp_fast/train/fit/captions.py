"""The captions of a data set: read once, matched with the index by key, and kept as tokens.

Shape legend: B images, K captions, L tokens of a text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from mvp_fast.errors import ConfigError, DataError
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import PlanRows
from mvp_fast.samples.random import Stream, draws
from mvp_fast.samples.scenes.caption import phrase
from mvp_fast.samples.scenes.folder import TABLE
from mvp_fast.samples.scenes.records import OBJECT_FIELDS

SUFFIXES = (".parquet", ".tsv", ".jsonl")
_COLUMNS = "two columns of text, key and caption"


@dataclass(frozen=True)
class Captions:
    """The captions of an index's samples.

    Attributes:
        texts: K captions, those of a sample in a row, in the index's order.
        tokens_KL: int32, each caption between the marks of its start and its end, then zeros.
        start: int64 (n + 1): sample i has the captions start[i] to start[i + 1] - 1, at least one.
    """

    texts: list[str]
    tokens_KL: npt.NDArray[np.int32]
    start: npt.NDArray[np.int64]

    def pick(self, rows: PlanRows, seed: int) -> npt.NDArray[np.int32]:
        """A caption for each row, int32 (B, L); of several, one that the plan's random numbers choose each time."""
        first_B, count_B = self.start[rows.sample_B], np.diff(self.start)[rows.sample_B]
        if len(self.texts) > len(self.start) - 1:
            words_B4 = draws(seed, Stream.CAPTION, rows.epoch_B, rows.position_B, 0)
            first_B = first_B + (words_B4[:, 0] * 2.0**-32 * count_B).astype(np.int64)
        return self.tokens_KL[first_B]

    def fingerprint(self) -> str:
        """SHA-256 over the tokens and whose they are."""
        digest = hashlib.sha256(str(self.tokens_KL.shape).encode())
        digest.update(np.ascontiguousarray(self.tokens_KL.astype("<i4")).data)
        digest.update(np.ascontiguousarray(self.start.astype("<i8")).data)
        return digest.hexdigest()


def captions_file(index: Index, given: str, setting: str) -> Path:
    """The table of captions: the one that was given, else a set of scenes' own, beside the index or its images.

    Raises:
        DataError: there is none.
    """
    if given:
        if not Path(given).is_file():
            raise DataError("There is no such table of captions", where=f"{setting} {given}")
        return Path(given)
    for folder in (index.path.parent, index.root):
        if (folder / TABLE).is_file():
            return folder / TABLE
    raise DataError(
        f"There are no captions: no {TABLE} beside the index or its images",
        where=str(index.path),
        fix=f"Give a table with --{setting} FILE ({', '.join(SUFFIXES)}; {_COLUMNS}), or draw a set with `mvp-fast data"
        " scenes`, which has captions",
    )


def read_captions(index: Index, path: Path, context_length: int, brief: bool = False) -> Captions:
    """Read a table and take each sample's captions from it, as tokens of CLIP's own tokenizer.

    Args:
        path: .parquet, .tsv or .jsonl with the columns key and caption; rows of other images are passed over.
        context_length: tokens of a text.
        brief: after each caption come two short ones, of the main object alone; the table must be of scenes.

    Raises:
        DataError: the table can't be read, or has no caption for a sample, or an empty one.
        ConfigError: a caption has more tokens than `context_length`.
    """
    table = _with_brief(path) if brief else _read(path)
    rows_of: dict[str, list[int]] = {}
    for row, named in enumerate(table.column("key").to_pylist()):
        rows_of.setdefault(str(named), []).append(row)
    texts_in_table = [text or "" for text in table.column("caption").to_pylist()]
    texts: list[str] = []
    start = [0]
    for i in range(len(index)):
        key = index.key(i)
        found = rows_of.get(key) or rows_of.get(str(PurePosixPath(key).with_suffix("")), [])
        texts += [texts_in_table[row] for row in found]
        start.append(len(texts))
        if not found or not all(text.strip() for text in texts[start[-2] :]):
            raise DataError(
                f"The image {key} has {'an empty caption' if found else 'no caption'}",
                where=str(path),
                fix="Add it under the image's key, or index a folder without the image",
            )
    return Captions(texts, tokenize(texts, context_length, str(path)), np.asarray(start, dtype=np.int64))


def tokenize(texts: list[str], context_length: int, where: str) -> npt.NDArray[np.int32]:
    """Tokens of CLIP's own tokenizer, int32 (K, L); nothing is cut off.

    Raises:
        ConfigError: a text has more than `context_length` tokens.
    """
    import open_clip

    tokenizer = open_clip.SimpleTokenizer()
    tokens_KL = np.zeros((len(texts), context_length), dtype=np.int32)
    longest, text_of_it = 0, ""
    for row, text in enumerate(texts):
        tokens = [tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id]
        if len(tokens) > longest:
            longest, text_of_it = len(tokens), text
        if len(tokens) <= context_length:
            tokens_KL[row, : len(tokens)] = tokens
    if longest > context_length:
        raise ConfigError(
            f"A caption has {longest} tokens, the text tower takes {context_length}: {text_of_it[:120]!r}",
            where=where,
            fix=f"Set model.context-length to {longest} or more",
        )
    return tokens_KL


def _with_brief(path: Path) -> pa.Table:
    """A table of scenes with three rows an image: its caption, and its main object in few words and in more."""
    table = _read(path)
    try:
        scenes = pq.read_table(path, columns=["objects", "main"])
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            "Short captions are of scenes, and this table is of none: it has no columns objects and main",
            where=f"fit.brief, and {path}",
            fix="Set fit.brief to False, or put short captions into the table yourself",
        ) from error
    keys, captions = [], []
    for row, scene in zip(table.to_pylist(), scenes.to_pylist(), strict=True):
        main = scene["objects"][scene["main"]]
        full = phrase(*(main[name] for name in OBJECT_FIELDS))
        keys += [row["key"]] * 3
        captions += [row["caption"], f"a {main['colour']} {main['shape']}", full]
    return pa.table({"key": keys, "caption": captions})


def _read(path: Path) -> pa.Table:
    """The columns key and caption."""
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path, columns=["key", "caption"])
        elif path.suffix == ".tsv":
            options: dict[str, Any] = {"delimiter": "\t", "quote_char": False}
            text = pa.csv.ConvertOptions(column_types={"key": pa.string(), "caption": pa.string()})
            table = pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(**options), convert_options=text)
        elif path.suffix == ".jsonl":
            table = pa.json.read_json(path)
        else:
            raise DataError(
                f"A table of captions is one of {', '.join(SUFFIXES)}", where=str(path), fix="Rename or convert it"
            )
        table = table.select(["key", "caption"])
    except (pa.ArrowException, KeyError, OSError) as error:
        raise DataError(
            f"The captions can't be read: {' '.join(str(error).split())[:200]}",
            where=str(path),
            fix=f"The table needs {_COLUMNS}",
        ) from error
    for name in ("key", "caption"):
        kind = table.schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"The column {name} holds {kind}, not text", where=str(path))
    return table
