"""The probe: how well frozen features tell classes apart, by k nearest neighbours and by linear classifiers.

The order of events. Nothing of the test set decides anything: the neighbours are training samples, and layer and
learning rate are chosen on a part of the training set that is held out; the chosen head is then trained on all of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mvp_fast.errors import DataError
from mvp_fast.evaluate.backbone import Backbone
from mvp_fast.evaluate.duplicates import duplicates
from mvp_fast.evaluate.feature_cache import Features
from mvp_fast.evaluate.features import (
    find_features,
    identity,
    layer_names,
    make_features,
    own_pooling,
    poolings,
)
from mvp_fast.evaluate.knn import neighbours, vote
from mvp_fast.evaluate.labels import held_out_split, match_labels, stratified_rows
from mvp_fast.evaluate.linear import Bank, predict, score, train_heads
from mvp_fast.evaluate.probe_settings import ProbeSettings
from mvp_fast.evaluate.progress import progress
from mvp_fast.evaluate.results import read_results, write_results
from mvp_fast.evaluate.scores import scored
from mvp_fast.samples.index import Index

RESULTS = "results.json"


class Labelled(NamedTuple):
    """Features and their classes.

    Attributes:
        features: K samples.
        label_K: int64.
        undecoded: keys of the samples that are left out.
    """

    features: Features
    label_K: npt.NDArray[np.int64]
    undecoded: list[str]


def probe(
    backbone: Backbone,
    train: Index,
    test: Index,
    how: ProbeSettings,
    out: Path,
    device: torch.device,
    *,
    overwrite: bool = False,
    features: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Probe a network and write `out`/results.json; features are kept in `out`/features, or in `features`.

    Results of the same network, sets and settings that are there already are returned as they are; others make room.

    Args:
        backbone: on `device`.
        overwrite: compute anew what is there already; features are taken as they are.
        features: a folder that several probes may share.
        say: told what is being done, a line at a time.

    Returns:
        what results.json holds.

    Raises:
        ConfigError, DataError, EnvironmentProblem.
    """
    how.check()
    labels = match_labels(train, test)
    about = _about(backbone, train, test, how, device)
    earlier = _earlier(out / RESULTS)
    if earlier is not None:
        same = all(earlier.get(name) == part for name, part in about.items())
        if same and not overwrite:
            say(f"found     {out / RESULTS}, of the same network, sets and settings (--overwrite computes anew)")
            return earlier
        if not same:
            _make_room(out / RESULTS, str(earlier.get("date", "")), say)

    rows = stratified_rows(labels.train_N, how.label_fraction, how.seed)
    kept = features or out / "features"
    of_train = _labelled("training", backbone, train, rows, labels.train_N, labels.classes, how, kept, device, say)
    every = np.arange(len(test))
    of_test = _labelled("test", backbone, test, every, labels.test_N, labels.classes, how, kept, device, say)
    with progress("looking for test images in the training set", len(rows) + len(test)) as tell:
        doubles = duplicates(train.subset(rows), test, tell)

    notes = _notes(of_train, of_test, len(doubles), how)
    knn = _knn(backbone, of_train, of_test, labels.classes, how, device)
    linear = _linear(backbone, of_train, of_test, labels.classes, how, device)
    notes += _notes_of_choice(linear["chosen"], how)
    content = {
        **about,
        "indexes": {"train": str(train.path), "test": str(test.path)},
        "classes": labels.classes,
        "images": {"train": len(of_train.features), "test": len(of_test.features)},
        "undecoded": {"train": of_train.undecoded, "test": of_test.undecoded},
        "test_images_in_training_set": {"count": len(doubles), "keys": [test.key(row) for row in doubles.tolist()]},
        "knn": knn,
        "linear": linear,
        "notes": notes,
    }
    write_results(out / RESULTS, "probe", content)
    return read_results(out / RESULTS)


def _about(
    backbone: Backbone, train: Index, test: Index, how: ProbeSettings, device: torch.device
) -> dict[str, dict[str, Any]]:
    """What the results depend on, as results.json says it."""
    made = identity(backbone, train, how.extraction, device)
    made_by = ("image_size", "crop_share", "precision", "loader", "interpolation")
    heads = how.heads
    return {
        "backbone": {"words": backbone.words, "fingerprint": backbone.fingerprint, "step": backbone.step},
        "data": {
            name: {"fingerprint": index.fingerprint(), "images": len(index)}
            for name, index in (("train", train), ("test", test))
        },
        "settings": {
            **{name: made[name] for name in made_by},
            "label_fraction": how.label_fraction,
            "held_out": how.held_out,
            "seed": how.seed,
            "k": list(how.k),
            "temperature": how.temperature,
            "lrs": list(heads.lrs),
            "epochs": heads.epochs,
            "head_batch_size": heads.batch_size,
            "weight_decay": heads.weight_decay,
        },
    }


def _earlier(path: Path) -> dict[str, Any] | None:
    """Results that are there already; None where there are none that can be read."""
    with suppress(DataError):
        return read_results(path)
    return None


def _make_room(path: Path, date: str, say: Callable[[str], None]) -> None:
    """Results of something else stay, under the date they were found."""
    aside = path.with_name(f"{path.stem}-{date.partition('+')[0].replace(':', '')}{path.suffix}")
    os.replace(path, aside)
    say(f"earlier   results are now {aside.name}")


def _labelled(
    name: str,
    backbone: Backbone,
    index: Index,
    rows: npt.NDArray[np.int64],
    label_N: npt.NDArray[np.int64],
    classes: list[str],
    how: ProbeSettings,
    folder: Path,
    device: torch.device,
    say: Callable[[str], None],
) -> Labelled:
    """Features of these rows, from those of the whole set where they are there, else made of these rows alone."""
    extraction = how.extraction
    features = find_features(folder, backbone, index, extraction, device)
    if features is not None:
        if len(rows) < len(index):
            features = features.of_rows(rows)
        say(f"features  of the {name} set: found, {len(features):,} images")
        label_K, bad = label_N[features.rows_K], features.bad
    else:
        part = index if len(rows) == len(index) else index.subset(rows)
        with progress(f"features of the {name} set", len(part)) as tell:
            features = make_features(folder, backbone, part, extraction, device, tell)
        say(f"features  of the {name} set: {len(features):,} images")
        label_K, bad = label_N[rows[features.rows_K]], tuple(rows[list(features.bad)].tolist())
    lost = sorted(set(range(len(classes))) - set(label_K.tolist()))
    if lost:
        raise DataError(
            f"No image of the class {classes[lost[0]]!r} in the {name} set could be decoded",
            where=str(index.path),
            fix="Mend the images; `mvp-fast data index DIR --verify` lists the bad ones",
        )
    return Labelled(features, label_K, [index.key(row) for row in bad])


def _knn(
    backbone: Backbone,
    train: Labelled,
    test: Labelled,
    classes: list[str],
    how: ProbeSettings,
    device: torch.device,
) -> dict[str, Any]:
    """Every layer by every pooling, and more of the network's own features."""
    layers, ways, most = layer_names(backbone), poolings(backbone), max(how.k)
    own = (layers[-1], own_pooling(backbone))
    table, headline = [], {}
    bank = len(train.features)
    with progress("k nearest neighbours, rows", len(layers) * len(ways) * bank) as tell:
        for number, name in enumerate(layers):
            for way, pooling in enumerate(ways):
                done = (number * len(ways) + way) * bank
                queries, rows = (each.features.column(number, way) for each in (test, train))

                def more(rows: int, done: int = done) -> None:
                    tell(done + rows)

                found = neighbours(queries, rows, most, device=device, tell=more)
                by_k = {}
                for k in how.k:
                    result = scored(vote(found, train.label_K, len(classes), k, how.temperature), test.label_K, classes)
                    by_k[str(k)] = result["accuracy"]
                    if (name, pooling) == own:
                        headline[str(k)] = result
                table.append({"layer": name, "pooling": pooling, "accuracy": by_k})
    return {"layer": own[0], "pooling": own[1], "k": headline, "layers": table}


def _linear(
    backbone: Backbone,
    train: Labelled,
    test: Labelled,
    classes: list[str],
    how: ProbeSettings,
    device: torch.device,
) -> dict[str, Any]:
    """Choose layer and learning rate by what is held out, then train that head on all, and test it."""
    layers, heads = layer_names(backbone), replace(how.heads, seed=how.seed)
    kept, held = held_out_split(train.label_K, how.held_out, how.seed)
    every = np.arange(len(layers))
    to_train, to_choose = (Bank(train.features.at(part), every.tolist(), device) for part in (kept, held))
    with progress("linear classifiers, steps", heads.steps(len(kept))) as tell:
        trained = train_heads(to_train, train.label_K[kept], len(classes), heads, tell)
    scores = score(trained, to_choose, train.label_K[held])
    rate, layer = scores.best()
    del trained, to_train, to_choose
    alone = replace(heads, lrs=(heads.lrs[rate],))
    whole = Bank(train.features, [layer], device)
    with progress("the chosen classifier, steps", alone.steps(len(whole))) as tell:
        final = train_heads(whole, train.label_K, len(classes), alone, tell)
    ranked = predict(final, Bank(test.features, [layer], device))
    share_RL = scores.correct_RL / len(held)
    chosen = {"layer": layers[layer], "lr": heads.lrs[rate], "held_out_accuracy": float(share_RL[rate, layer])}
    return {
        "features": "+".join(poolings(backbone)),
        "layers": [
            {
                "layer": name,
                "held_out_accuracy": {f"{lr:g}": float(share_RL[r, number]) for r, lr in enumerate(heads.lrs)},
            }
            for number, name in enumerate(layers)
        ],
        "held_out_images": len(held),
        "chosen": chosen,
        "trained_on": len(whole),
        "test": scored(ranked, test.label_K, classes),
    }


def _notes(train: Labelled, test: Labelled, doubles: int, how: ProbeSettings) -> list[str]:
    """What a reader of the figures should know."""
    notes = []
    if doubles:
        some = "1 test image is" if doubles == 1 else f"{doubles:,} test images are"
        notes.append(f"{some} in the training set too, byte for byte: the figures are too good")
    notes += [
        f"not decoded and left out of the {name} set: {len(each.undecoded):,}, such as {each.undecoded[0]}"
        for name, each in (("training", train), ("test", test))
        if each.undecoded
    ]
    if max(how.k) > len(train.features):
        notes.append(f"k {max(how.k)} is more than the {len(train.features):,} training images: all of them vote")
    single = int((np.bincount(train.label_K) == 1).sum())
    if single:
        notes.append(f"classes of which no image is held out to choose by, since they have but one: {single:,}")
    return notes


def _notes_of_choice(chosen: dict[str, Any], how: ProbeSettings) -> list[str]:
    """A best learning rate at the end of those tried may not be the best there is."""
    lrs = sorted(how.heads.lrs)
    if len(lrs) > 1 and chosen["lr"] in (lrs[0], lrs[-1]):
        which = "least" if chosen["lr"] == lrs[0] else "greatest"
        return [f"the chosen learning rate, {chosen['lr']:g}, is the {which} of those tried: --lr takes others"]
    return []
