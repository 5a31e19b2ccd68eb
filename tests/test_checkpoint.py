"""Checkpoints: copied at once, written in the background, whole or not there, read without unpickling."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mvp_fast.config.load import config_to_dict
from mvp_fast.config.schema import Config, DataConfig, StudentConfig
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.models.student import Student
from mvp_fast.train import checkpoint as module
from mvp_fast.train.checkpoint import (
    PRETRAIN_KEYS,
    STATE_KEYS,
    Checkpointer,
    checkpoint_name,
    find_checkpoint,
    list_checkpoints,
    load_student,
    load_weights,
    read_state,
)
from mvp_fast.train.parts import Parts, read_part

STATE: dict[str, Any] = {
    "config": config_to_dict(
        Config(data=DataConfig(image_size=32), student=StudentConfig(width=32, depth=1, heads=2), seed=4)
    ),
    "plan": {"seed": 4},
    "teacher": "abc",
    "target_width": 24,
    "total_steps": 9,
    "skipped": 0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """RUN/checkpoints."""
    return tmp_path / "run" / "checkpoints"


def some_parts(seed: int) -> Parts:
    generator = torch.Generator().manual_seed(seed)
    return {
        "student": {"weight": torch.randn(64, 48, generator=generator), "bias": torch.randn(5, generator=generator)},
        "optimizer": {"step.weight": torch.tensor(float(seed))},
    }


def write(folder: Path, *steps: int, keep: int = 0, **options: Any) -> None:
    checkpointer = Checkpointer(folder, keep, **options)
    for step in steps:
        checkpointer.save(step, some_parts(step), STATE)
    checkpointer.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def test_what_is_saved_is_read(folder: Path) -> None:
    """Every type, shape and layout that a part may hold, and a part that holds nothing."""
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    part = {
        "blocks.0.weight": base.t(),
        "view": base[1:5:2],
        "half": base.bfloat16(),
        "double": base.double(),
        "count": torch.tensor(2**40),
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0),
        "flags": torch.tensor([True, False]),
        "not_finite": torch.tensor([torch.inf, -torch.inf]),
        "gradient": torch.ones(3, requires_grad=True),
    }
    checkpointer = Checkpointer(folder, 0)
    checkpointer.save(7, {"student": part, "optimizer": {}}, STATE)
    checkpointer.close()
    path = folder / "step-00000007"
    assert same(read_part(path, "student"), {name: tensor.detach() for name, tensor in part.items()})
    assert read_part(path, "optimizer") == {}
    assert read_state(path) == {**STATE, "version": 1, "step": 7}
    assert set(STATE) | {"step"} == STATE_KEYS | PRETRAIN_KEYS
    with pytest.raises(DataError, match="has no part `ema`"):
        read_part(path, "ema")


def test_later_updates_do_not_reach_a_staged_copy(folder: Path) -> None:
    checkpointer, gate, reached = Checkpointer(folder, 0), threading.Event(), threading.Event()
    checkpointer._thread.submit(lambda: (reached.set(), gate.wait(60)))  # the writer is busy while weights change
    assert reached.wait(60)
    parts = some_parts(1)
    checkpointer.save(1, parts, STATE)
    assert list_checkpoints(folder) == []
    for tensors in parts.values():
        for tensor in tensors.values():
            tensor.mul_(0).sub_(1)
    gate.set()
    checkpointer.wait()
    assert all(same(read_part(folder / checkpoint_name(1), part), some_parts(1)[part]) for part in parts)
    checkpointer.close()


def test_a_reader_never_sees_half_a_checkpoint(folder: Path) -> None:
    """Reads what is listed, over and over, while checkpoints are written; each is whole from its first sight."""
    big = {f"weight{i}": torch.randn(512, 256) for i in range(8)}
    checkpointer = Checkpointer(folder, 0)
    checkpointer.save(1, {"student": big}, STATE)
    seen: dict[str, int] = {}
    for step in range(2, 8):
        pending = checkpointer._pending
        assert pending is not None
        written = False
        while not written:
            written = pending.done()  # asked first: what is listed after the end is looked at, too
            for path in folder.glob("step-*"):
                assert read_state(path)["step"] == int(path.name[5:])
                assert read_part(path, "student").keys() == big.keys()
                seen[path.name] = seen.get(path.name, 0) + 1
        checkpointer.save(step, {"student": big}, STATE)
    checkpointer.close()
    assert names(folder) == [checkpoint_name(step) for step in range(1, 8)]
    assert seen.keys() >= {checkpoint_name(step) for step in range(1, 7)}


def test_leftovers_of_a_crash_are_no_checkpoints_and_go(folder: Path) -> None:
    write(folder, 1)
    for name in (".step-00000002.partial", ".step-00000000.trash"):
        shutil.copytree(folder / checkpoint_name(1), folder / name)
    assert list_checkpoints(folder) == [folder / checkpoint_name(1)]
    assert find_checkpoint(folder.parent).name == checkpoint_name(1)
    Checkpointer(folder, 0, active=False).close()  # another rank leaves them: the main one may be writing
    assert len(names(folder)) == 3
    write(folder)
    assert names(folder) == [checkpoint_name(1)]


def test_the_newest_are_kept_and_nothing_else_is_touched(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "step-00000000").write_text("a file of that name")
    write(folder, 1)
    for mine in ("step-00000001-best", "step-best", "best", "superseded-step-00000001"):
        shutil.copytree(folder / checkpoint_name(1), folder / mine)
    (folder / "step-00000002").mkdir()  # of a crash in an older version: without state.json it is no checkpoint
    others = [*set(names(folder)) - {"step-00000001"}]
    write(folder, 3, 5, 10, 100, keep=2)
    assert names(folder) == sorted([*others, "step-00000010", "step-00000100"])
    assert list_checkpoints(folder) == [folder / "step-00000010", folder / "step-00000100"]
    assert find_checkpoint(folder.parent).name == "step-00000100"


def test_order_is_by_number(folder: Path) -> None:
    write(folder, 99_999_999, 100_000_001, 100_000_000, keep=2)
    assert [path.name for path in list_checkpoints(folder)] == ["step-100000000", "step-100000001"]


def test_keep_zero_keeps_all(folder: Path) -> None:
    write(folder, *range(1, 6), keep=0)
    assert len(list_checkpoints(folder)) == 5


def test_a_step_that_is_there_is_not_written_again(folder: Path) -> None:
    write(folder, 2)
    before = (folder / checkpoint_name(2) / "state.json").stat()
    write(folder, 2, start_step=2)
    assert (folder / checkpoint_name(2) / "state.json").stat() == before


def test_later_checkpoints_are_set_aside(folder: Path) -> None:
    write(folder, 1, 2, 3)
    (folder / "step-00000003" / "state.json").unlink()
    checkpointer = Checkpointer(folder, 0, start_step=1)
    assert [path.name for path in checkpointer.superseded] == ["superseded-step-00000002", "superseded-step-00000003"]
    assert find_checkpoint(folder.parent).name == "step-00000001"
    parts = some_parts(77)
    checkpointer.save(2, parts, STATE)
    checkpointer.close()
    assert same(read_part(folder / "step-00000002", "student"), parts["student"])
    assert same(read_part(folder / "superseded-step-00000002", "student"), some_parts(2)["student"])
    write(folder, start_step=1)  # once more: the name is taken, and the newer one gets it
    assert same(read_part(folder / "superseded-step-00000002", "student"), parts["student"])
    assert names(folder) == ["step-00000001", "superseded-step-00000002", "superseded-step-00000003"]


@pytest.mark.parametrize("noticed", ["save", "wait", "close"])
def test_a_failed_write_surfaces_at_the_next_call(folder: Path, noticed: str) -> None:
    write(folder, 1)
    checkpointer = Checkpointer(folder, 0)
    moved = folder.rename(folder.with_name("moved"))
    folder.write_text("in the way")
    checkpointer.save(2, some_parts(2), STATE)  # returns at once: nothing is known yet
    with pytest.raises(EnvironmentProblem) as caught:
        {"save": lambda: checkpointer.save(3, some_parts(3), STATE)}.get(noticed, getattr(checkpointer, noticed))()
    assert "The checkpoint could not be written: Not a directory" in str(caught.value)
    assert str(folder / checkpoint_name(2)) in str(caught.value)
    assert names(moved) == [checkpoint_name(1)]
    folder.unlink()
    moved.rename(folder)
    if noticed != "close":  # told once; the writer is as good as new
        checkpointer.save(4, some_parts(4), STATE)
        checkpointer.close()
        assert names(folder) == [checkpoint_name(1), checkpoint_name(4)]
    assert [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")] == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="Not a directory"):
        Checkpointer(tmp_path / "file" / "checkpoints", 0)


def test_an_inactive_one_writes_nothing(folder: Path) -> None:
    write(folder, 1, 2, active=False)
    assert not folder.exists()


def test_find(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder.parent
    for missing in (run, run / "nowhere"):
        with pytest.raises(DataError, match="has no checkpoint"):
            find_checkpoint(missing)
    write(folder, 2, 30)
    assert find_checkpoint(run) == find_checkpoint(run, "latest") == folder / "step-00000030"
    assert find_checkpoint(run, "2") == find_checkpoint(run, "00000002") == folder / "step-00000002"
    assert find_checkpoint(run / "other", str(folder / "step-00000002")) == folder / "step-00000002"
    monkeypatch.chdir(folder)
    assert find_checkpoint(run, "step-00000002") == Path("step-00000002")
    for wrong in ("3", "newest", str(folder)):
        with pytest.raises(DataError, match=f"There is no checkpoint {wrong} .*Steps with one in {run}: 2, 30"):
            find_checkpoint(run, wrong)


def tiny_student(seed: int) -> Student:
    return Student(StudentConfig(width=32, depth=1, heads=2), target_width=24, image_size=32, seed=seed)


def test_load_student_and_its_averaged_weights(folder: Path) -> None:
    now, averaged = tiny_student(1).state_dict(), tiny_student(2).state_dict()
    checkpointer = Checkpointer(folder, 0)
    checkpointer.save(3, {"student": averaged}, STATE)
    checkpointer.save(5, {"student": now, "ema": averaged}, STATE)
    checkpointer.close()
    student, config, step = load_student(folder.parent)
    assert step == 5
    assert config.seed == 4
    assert (config.student.width, config.data.image_size) == (32, 32)
    assert same(student.state_dict(), now)
    assert not same(now, averaged)
    assert same(load_student(folder.parent, ema=True)[0].state_dict(), averaged)
    student, _, step = load_student(folder.parent, "3")
    assert step == 3
    assert same(student.state_dict(), averaged)
    with pytest.raises(ConfigError, match="kept no averaged weights"):
        load_student(folder.parent, "3", ema=True)


def test_weights_of_another_model_are_told_and_change_nothing(folder: Path) -> None:
    state = tiny_student(1).state_dict()
    state["cls_token"] = state["cls_token"][..., :-1]
    state["extra"] = state.pop("norm.bias")
    checkpointer = Checkpointer(folder, 0)
    checkpointer.save(1, {"student": state}, STATE)
    checkpointer.close()
    student = tiny_student(2)
    with pytest.raises(DataError) as caught:
        load_weights(student, folder / checkpoint_name(1), "student")
    for part in (
        "3 weights differ",
        "cls_token (1, 1, 31) (model: (1, 1, 32))",
        "extra (32,) (model: none)",
        "norm.bias missing (model: (32,))",
    ):
        assert part in str(caught.value)
    assert same(student.state_dict(), tiny_student(2).state_dict())


def test_nothing_is_ever_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(folder, 0)
    weights = tiny_student(1).state_dict()
    checkpointer.save(1, {"student": weights, "ema": weights, **{"optimizer": {}}}, STATE)
    checkpointer.close()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something was unpickled")

    for holder, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(holder, name, refuse)
    assert same(load_student(folder.parent, ema=True)[0].state_dict(), weights)
    read_part(folder / checkpoint_name(1), "optimizer")
    # A pickle that takes a part's place is refused as damaged, whatever it is called.
    (file,) = (folder / checkpoint_name(1) / "student").glob("*.safetensors")
    file.write_bytes(pickle.dumps({"weight": [1.0]}))
    with pytest.raises(DataError, match="damaged"):
        load_student(folder.parent)


def test_no_source_of_the_trainer_reads_pickles() -> None:
    sources = list(Path(module.__file__).parent.glob("*.py"))
    assert len(sources) > 5
    for source in sources:
        text = source.read_text()
        assert "torch.load(" not in text
        assert "import pickle" not in text
