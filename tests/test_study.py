"""The study: its commands, the processes that run them, its figures, and a whole small one."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mvp_fast.cli import export as export_verb
from mvp_fast.cli import probe as probe_verb
from mvp_fast.cli import visualize as visualize_verb
from mvp_fast.cli.main import main
from mvp_fast.cli.parse import parse
from mvp_fast.cli.study.notes import Notes
from mvp_fast.cli.study.pool import StepFailed, run_steps
from mvp_fast.config.check import check_config
from mvp_fast.config.finetune import FinetuneConfig, check_finetune
from mvp_fast.config.fit import TeacherFitConfig, check_fit
from mvp_fast.config.load import load_settings, settings_from_dict
from mvp_fast.config.schema import Config
from mvp_fast.config.segment import SegmentSettings, check_segment
from mvp_fast.config.study import AblationConfig, LabelsConfig, StudyConfig, check_study
from mvp_fast.errors import ConfigError, DataError, Preempted
from mvp_fast.evaluate.study.figures import LINEAR, MIOU, margins, summary
from mvp_fast.evaluate.study.steps import Step, build_steps, set_folder, students
from mvp_fast.evaluate.study.tables import filled
from mvp_fast.samples.index import Index
from tests.conftest import TINY, losses

CHECKS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "train": (Config, check_config),
    "finetune": (FinetuneConfig, check_finetune),
    "segment": (SegmentSettings, check_segment),
    "teacher": (TeacherFitConfig, check_fit),
}
OPTIONS: dict[str, Any] = {
    "probe": probe_verb.Options,
    "export": export_verb.Options,
    "visualize": visualize_verb.Options,
}
REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings name files of the checkout."""
    monkeypatch.chdir(REPO)


def call(*words: Any, code: int = 0) -> str:
    """What `mvp-fast study` says, once it has ended as it should."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            ended = main(["study", *map(str, words)])
        except SystemExit as end:
            ended = int(end.code or 0)
    assert ended == code, f"exit {ended}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue() + err.getvalue()


@pytest.mark.parametrize("form", ["cpu", "gpu"])
def test_every_step_comes_after_what_it_needs(form: str) -> None:
    config = load_settings(StudyConfig, f"configs/mini/study-{form}.yaml")
    check_study(config)
    steps = build_steps(config, 1)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for number, step in enumerate(steps):
        assert set(step.needs) <= set(names[:number]), step.name
    trained = {step.name.partition("/")[0] for step in steps if step.kind in ("train", "initial")}
    assert trained == {student.name for student in students(config)}
    assert len(trained) == 7 * 3 + len(config.ablations) * config.ablation_seeds


def test_no_student_learns_from_one_of_its_own_seed() -> None:
    steps = {step.name: step for step in build_steps(load_settings(StudyConfig, "configs/mini/study-cpu.yaml"), 1)}
    for seed in range(3):
        for kind in ("self", "supervised"):
            learner, teacher = steps[f"{kind}-{seed}/train"].argv, steps[f"teachers/{kind}"]
            tower = Path(learner[learner.index("--teacher.pretrained") + 1])
            assert tower.parents[1] == teacher.output
            assert teacher.argv[teacher.argv.index("--seed") + 1] != str(seed)


def test_what_begins_with_fresh_weights_learns_at_the_full_rate() -> None:
    for step in build_steps(load_settings(StudyConfig, "configs/mini/study-cpu.yaml"), 1):
        if step.argv[0] in ("finetune", "segment"):
            fresh = step.name.startswith(("scratch", "teachers"))
            assert (f"--{step.argv[0]}.layer-decay" in step.argv) == fresh, step.name


def test_no_training_command_is_given_a_test_set_to_train_on() -> None:
    config = load_settings(StudyConfig, "configs/mini/study-cpu.yaml")
    train = str(set_folder(config, "train"))
    for step in build_steps(config, 1):
        for option in ("--data.index", "--segment.train", "--train"):
            if option in step.argv:
                assert step.argv[step.argv.index(option) + 1] == train


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": ("clip", "dino")}, "targets is ['dino']"),
        ({"targets": ("clip", "clip")}, "different"),
        ({"targets": ("clip", "supervised")}, "Add scratch"),
        ({"student_options": ("--seed", "0")}, "--seed is among the student-options"),
        ({"probe_options": ("--out=elsewhere",)}, "--out=elsewhere is among the probe-options"),
        ({"ablations": (AblationConfig("hog", ()),)}, "other words than a target's"),
        ({"folder": ""}, "the name of a folder"),
        ({"supervised_epochs": 0.0}, "supervised-epochs is 0.0"),
        ({"targets": ("pixels",)}, "Add clip to targets"),
        ({"seeds": 0}, "seeds is 0"),
        ({"labels": (LabelsConfig(2.0, 1.0),)}, "labels.fraction is 2.0"),
        ({"labels": (LabelsConfig(1.0, 1.0), LabelsConfig(1.0, 2.0))}, "named, and different"),
        ({"ablations": (AblationConfig("", ()),)}, "named, and different"),
        ({"student": "configs/mini/nobody.yaml"}, "configs/mini/nobody.yaml"),
    ],
)
def test_what_can_not_be_is_said(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_study(replace(StudyConfig(labels=(LabelsConfig(1.0, 1.0),)), **change))
    assert words in caught.value.paragraph()


def test_bad_settings_end_with_2(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("seedz: 3\n")
    assert "Did you mean `seeds`?" in call("--config", path, code=2)
    path.write_text("labels: [{fraktion: 1.0}]\n")
    assert "fraktion" in call("--config", path, code=2)


def test_dry_run_prints_commands_that_a_shell_takes() -> None:
    lines = call("--config", "configs/mini/study-cpu.yaml", "--dry-run").splitlines()
    assert len(lines) == len(build_steps(load_settings(StudyConfig, "configs/mini/study-cpu.yaml"), 1))
    assert all(line.startswith("mvp-fast ") for line in lines)
    assert any("'a red square'" in line for line in lines)


@pytest.mark.parametrize("form", ["cpu", "gpu"])
def test_every_command_is_understood(form: str) -> None:
    """By the verb's own parser and checks; one of each kind, and every student."""
    seen = set()
    for step in build_steps(load_settings(StudyConfig, f"configs/mini/study-{form}.yaml"), 1):
        if step.argv[0] in ("train", "finetune", "segment", "teacher") and (
            step.kind == "train" or step.kind not in seen
        ):
            seen.add(step.kind)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert main([*step.argv, "--print-config"]) == 0, step.name
            kind, check = CHECKS[step.argv[0]]
            settings = settings_from_dict(kind, yaml.safe_load(out.getvalue()), source=step.name)
            check(settings)
            assert settings.data.image_size in (48, 96), step.name
        elif step.argv[0] in OPTIONS:
            seen.add(step.kind)
            parse(OPTIONS[step.argv[0]], list(step.argv[1:]), step.argv[0])
    assert {"train", "clip", "supervised", "segment", "finetune-1", "probe", "visualize", "export"} <= seen


# The processes.


def scenes_step(folder: Path, images: int = 20) -> Step:
    argv = ("data", "scenes", "--out", str(folder), "--images", str(images), "--profile", "plain", "--workers", "1")
    return Step("scenes", argv, folder, "scenes.json")


def index(folder: Path, name: str = "index", needs: tuple[str, ...] = ("scenes",)) -> Step:
    return Step(name, ("data", "index", str(folder)), folder / "index.parquet", "", needs)


def export(run: Path, name: str = "export", needs: tuple[str, ...] = ("train",)) -> Step:
    return Step(name, ("export", str(run)), run / "export", "timm/config.json", needs)


def pretrain(run: Path, data: Path, steps: int = 3, *more: str) -> Step:
    options = [
        f"--{name}={value}" for name, value in TINY.items() if not name.startswith(("teacher", "run", "data.threads"))
    ]
    argv = (
        "train",
        "--config",
        "configs/mini/student.yaml",
        "--data.index",
        str(data),
        "--run.dir",
        str(run),
        *options,
    )
    argv += ("--teacher.kind", "pixels", "--objective.cls", "False", "--objective.loss", "mse", "--resume", "auto")
    argv += ("--objective.target-norm", "none", "--train.steps", str(steps), "--data.threads", "1", *more)
    return Step("train", argv, run, "checkpoints")


def quiet(steps: list[Step], folder: Path, processes: int = 1) -> Notes:
    return run_steps(steps, folder, processes, 1, lambda _: None)


def test_steps_run_once_and_in_order(tmp_path: Path) -> None:
    folder, told = tmp_path / "set", []
    steps = [scenes_step(folder), index(folder)]
    notes = run_steps(steps, tmp_path, 2, 1, told.append)
    assert all(notes.is_done(step) for step in steps)
    assert len(Index.open(folder)) == 20
    assert any("2/2  index" in line for line in told)
    assert "$ mvp-fast data index" in (tmp_path / "logs" / "index.log").read_text()

    told.clear()
    before = [notes.read(step) for step in steps]
    again = run_steps(steps, tmp_path, 2, 1, told.append)
    assert [again.read(step) for step in steps] == before
    assert told == []  # nothing was to do


def test_other_threads_are_no_other_settings(tmp_path: Path, scenes: Path) -> None:
    step = pretrain(tmp_path / "run", scenes)
    notes = quiet([step], tmp_path)
    at = step.argv.index("--data.threads")
    assert quiet([replace(step, argv=(*step.argv[:at], "--data.threads", "2", *step.argv[at + 2 :]))], tmp_path).read(
        step
    ) == notes.read(step)


def test_other_settings_are_refused(tmp_path: Path, scenes: Path) -> None:
    """A run that is complete would be taken for one of the new settings."""
    run = tmp_path / "run"
    quiet([pretrain(run, scenes), export(run)], tmp_path)
    with pytest.raises(ConfigError) as caught:
        quiet([pretrain(run, scenes, 3, "--optim.lr", "0.5"), export(run)], tmp_path)
    assert "The step train was begun with other settings" in caught.value.paragraph()
    assert f"remove {run}" in caught.value.paragraph()
    shutil.rmtree(run)
    notes = quiet([pretrain(run, scenes, 3, "--optim.lr", "0.5"), export(run)], tmp_path)
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["lr"] == 0.5
    assert notes.is_done(export(run))


def test_a_settings_file_is_part_of_the_settings(tmp_path: Path, scenes: Path) -> None:
    path, step = tmp_path / "student.yaml", pretrain(tmp_path / "run", scenes)
    path.write_text(Path("configs/mini/student.yaml").read_text())
    step = replace(step, argv=tuple(str(path) if word.endswith("student.yaml") else word for word in step.argv))
    notes = quiet([step], tmp_path)
    path.write_text("# Words.\n" + path.read_text())
    assert quiet([step], tmp_path).read(step) == notes.read(step)
    path.write_text(path.read_text() + "seed: 5\n")
    with pytest.raises(ConfigError, match="begun with other settings"):
        quiet([step], tmp_path)


def test_what_was_removed_is_made_again_and_what_was_made_from_it_is_told(tmp_path: Path, scenes: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "elsewhere"
    made = [pretrain(run, scenes), export(run)]
    made[1] = replace(made[1], argv=(*made[1].argv, "--out", str(out)), output=out, proof="config.json")
    first = quiet(made, tmp_path).read(made[0])
    shutil.rmtree(run)
    with pytest.raises(ConfigError) as caught:
        quiet(made, tmp_path)
    assert "The step train is to be done anew, but export was made from the earlier one" in caught.value.paragraph()
    assert not run.exists()  # nothing was begun
    shutil.rmtree(out)
    second = quiet(made, tmp_path).read(made[0])
    assert first is not None
    assert second is not None
    assert (first.digest, first.commit) == (second.digest, second.commit)
    assert first.done != second.done
    assert (out / "config.json").is_file()


def test_a_step_that_fails_ends_the_study_with_its_code(tmp_path: Path) -> None:
    steps = [index(tmp_path / "nothing", "index", ()), scenes_step(tmp_path / "set"), index(tmp_path / "set", "after")]
    with pytest.raises(StepFailed) as caught:
        quiet(steps, tmp_path)
    assert caught.value.exit_code == 3
    paragraph = caught.value.paragraph()
    assert "The step index ended with exit code 3: mvp-fast data index: data error:" in paragraph
    assert not (tmp_path / "set").exists()  # nothing new was begun
    assert quiet(steps[1:], tmp_path).is_done(steps[2])


def test_an_error_that_nobody_foresaw_is_told(tmp_path: Path) -> None:
    step = Step("odd", ("bench", "--json", "\0"), tmp_path / "odd", "")
    with pytest.raises(StepFailed) as caught:
        quiet([step], tmp_path)
    assert caught.value.exit_code == 1
    assert "an error that nobody foresaw: ValueError: embedded null" in caught.value.paragraph()


def test_a_log_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "logs" / "scenes.log").mkdir(parents=True)
    with pytest.raises(StepFailed) as caught:
        quiet([scenes_step(tmp_path / "set")], tmp_path)
    assert "IsADirectoryError" in caught.value.paragraph()


def test_a_process_that_is_killed_is_told(tmp_path: Path) -> None:
    step = scenes_step(tmp_path / "set", 50_000)
    killed = threading.Thread(target=_kill_the_worker, daemon=True)
    killed.start()
    with pytest.raises(StepFailed) as caught:
        quiet([step], tmp_path)
    killed.join()
    assert caught.value.exit_code == 4
    assert "killed, perhaps for lack of memory" in caught.value.paragraph()
    assert not Notes(tmp_path / "steps", [step]).is_done(step)


def _kill_the_worker() -> None:
    while not (found := [each for each in multiprocessing.active_children() if each.name == "study-worker"]):
        time.sleep(0.05)
    time.sleep(1)
    found[0].kill()


def test_a_stopped_study_goes_on_where_its_steps_were(tmp_path: Path, scenes: Path) -> None:
    """SIGTERM to the study: the run in it writes a checkpoint, and the same command resumes it."""
    run, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    step = pretrain(run, scenes, 400)

    def stop() -> None:
        while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(Preempted) as caught:
        quiet([step, export(run)], tmp_path)
    thread.join()
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    (reached,) = (int(path.name.rpartition("-")[2]) for path in (run / "checkpoints").glob("step-*"))
    assert 0 < reached < 400
    notes = quiet([step, export(run)], tmp_path)
    assert notes.is_done(export(run))
    assert f"resumed   at step {reached} " in (tmp_path / "logs" / "train.log").read_text()
    assert len(losses(run)) == 400  # each step once


def test_two_studies_do_not_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = call("--config", "configs/mini/study-cpu.yaml", "--folder", folder, code=3)
    assert "another process runs a study in this folder" in said


def test_places_that_can_not_be_are_said_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = ("--config", "configs/mini/study-cpu.yaml", "--folder")
    (tmp_path / "file").write_text("")
    assert "The study's folder can't be made" in call(*cpu, tmp_path / "file", code=4)
    (tmp_path / "page.md").write_text("# Nothing\n")
    for page, words in (("page.md", "no place for the tables"), ("page", "no Markdown"), ("none.md", "can't be read")):
        assert words in call(*cpu, tmp_path / "study", "--page", tmp_path / page, code=3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "Start it without torchrun" in call(*cpu, tmp_path / "study", code=2)
    assert not (tmp_path / "study").exists()


# The figures.


def runs(kind: str, **values: list[float]) -> list[dict[str, Any]]:
    seeds = len(next(iter(values.values())))
    return [{"kind": kind, "figures": {name: found[seed] for name, found in values.items()}} for seed in range(seeds)]


def test_means_and_spreads() -> None:
    found = summary([*runs("clip", linear=[0.5, 0.7, 0.9]), *runs("hog", linear=[0.25])])
    assert found["clip"]["linear"] == {
        "mean": pytest.approx(0.7),
        "least": 0.5,
        "greatest": 0.9,
        "deviation": pytest.approx(statistics.stdev([0.5, 0.7, 0.9])),
        "seeds": 3,
    }
    assert found["hog"]["linear"]["deviation"] is None


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        ([0.4, 0.5], "ahead"),
        ([0.55, 0.65], "within"),
        ([0.1, 0.5], "within"),
        ([0.8, 0.9], "behind"),
        ([0.66, 0.74], "within"),
        ([0.2], None),
    ],
)
def test_ahead_by_more_than_the_spread(theirs: list[float], verdict: str | None) -> None:
    table = summary([*runs("clip", linear=[0.6, 0.7]), *runs("other", linear=theirs)])
    found = margins(table, ["other", "nobody"], [LINEAR, MIOU])
    assert set(found) == {LINEAR}
    each = found[LINEAR]["other"]
    assert each["margin"] == pytest.approx(0.65 - statistics.fmean(theirs))
    assert each["verdict"] == verdict


def test_a_page_keeps_what_is_not_the_tables() -> None:
    text = "before\n<!-- study: cpu -->\nold\n<!-- end -->\nbetween\n<!-- study: gpu -->\nkept\n<!-- end -->\n"
    new = filled(text, "cpu", "new\n")
    assert new == text.replace("old", "new")
    with pytest.raises(DataError, match="no place for the tables of the study tpu"):
        filled(text, "tpu", "new\n")


# The whole of it, small.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of every kind of student with one seed, its settings beside its folder."""
    folder = tmp_path_factory.mktemp("small")
    settings = {
        "folder": str(folder / "study"),
        "scenes": {"images": 200, "test": 60, "held_out": 60, "profile": "plain"},
        "clip_options": ["--train.steps", "3", "--model.layers", "1", "--model.text-layers", "1"],
        "student_options": ["--train.steps", "3", "--student.depth", "4", "--student.width", "48"],
        "finetune_options": ["--train.batch-size", "16"],
        "segment_options": ["--train.steps", "2", "--train.batch-size", "8", "--segment.predictions", "1"],
        "probe_options": ["--epochs", "2", "--lr", "0.001", "0.01"],
        "supervised_epochs": 1,
        "seeds": 1,
        "labels": [{"fraction": 0.1, "epochs": 1}, {"fraction": 1.0, "epochs": 1}],
        "ablations": [{"name": "no CLS in the loss", "options": ["--objective.cls", "False"]}],
        "texts": ["a red square"],
    }
    (folder / "study-small.yaml").write_text(yaml.safe_dump(settings))
    (folder / "page.md").write_text("# A page\n\n<!-- study: small -->\n<!-- end -->\n\nafter\n")
    with contextlib.chdir(REPO):
        call("--config", folder / "study-small.yaml", "--page", folder / "page.md")
    return folder


@pytest.fixture(scope="module")
def results(small: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((small / "study" / "results.json").read_text())
    return content


def test_every_figure_is_that_of_a_run(small: Path, results: dict[str, Any]) -> None:
    kinds = {run["kind"]: run for run in results["runs"]}
    assert set(kinds) == {*StudyConfig().targets, "no CLS in the loss"}
    for kind, run in kinds.items():
        figures = run["figures"]
        folder = (
            small
            / "study"
            / "students"
            / (f"{kind}-0" if kind in StudyConfig().targets else f"ablation-{kind.replace(' ', '-')}-0")
        )
        probe, held = (json.loads((folder / name / "results.json").read_text()) for name in ("probe", "probe-held-out"))
        assert figures["linear"] == probe["linear"]["test"]["accuracy"]
        assert figures["knn_held_out"] == held["knn"]["k"]["20"]["accuracy"]
        assert probe["data"]["train"] == held["data"]["train"]
        assert probe["data"]["test"] != held["data"]["test"]
        assert not (folder / "probe-held-out" / "features").exists()  # shared with the probe
        if run["ablation"]:
            assert set(figures) == {"linear", "linear_held_out", "knn", "knn_held_out"}
            continue
        assert (
            figures["finetune_0.1"]
            == json.loads((folder / "finetune-0.1" / "results.json").read_text())["test"]["accuracy"]
        )
        assert figures["miou"] == json.loads((folder / "segment" / "results.json").read_text())["miou"]
    assert results["teacher"]["step"] == 3


def test_kinds_are_what_they_say(small: Path) -> None:
    def config(kind: str) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((small / "study" / "students" / f"{kind}-0" / "config.yaml").read_text())
        return found

    assert config("clip")["teacher"]["pretrained"] != "random"
    assert config("random")["teacher"]["pretrained"] == "random"
    assert config("random")["teacher"]["name"] == config("clip")["teacher"]["name"]
    assert config("hog")["teacher"]["kind"] == "hog"
    assert config("self")["teacher"]["pretrained"].endswith("study/teachers/self/export/timm")
    assert config("supervised")["teacher"]["pretrained"].endswith("study/teachers/supervised/export/timm")


def test_the_student_from_scratch_has_its_first_weights(small: Path) -> None:
    """The one step of its run changed nothing."""
    from mvp_fast.models.student import Student
    from mvp_fast.train.checkpoint import load_student

    student, config, step = load_student(small / "study" / "students" / "scratch-0", "latest", False)
    fresh = Student(config.student, target_width=student.predictor.out_features, image_size=96, seed=config.seed)
    assert step == 1
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name


def test_held_out_pairs_are_in_no_training_set(small: Path) -> None:
    """Of any object, not the main one alone."""
    import pyarrow.parquet as pq

    def pairs(name: str) -> set[tuple[str, str]]:
        table = pq.read_table(small / "study" / "data" / name / "scenes.parquet").to_pylist()
        return {(thing["colour"], thing["shape"]) for row in table for thing in row["objects"]}

    assert pairs("held-out")
    assert not pairs("train") & pairs("held-out")
    assert not pairs("test") & pairs("held-out")
    textures = pq.read_table(small / "study" / "data" / "train" / "scenes.parquet").to_pylist()
    assert {thing["texture"] for row in textures for thing in row["objects"]} == {"plain"}


def test_the_page_has_tables_pictures_and_no_places(small: Path) -> None:
    text = (small / "page.md").read_text()
    assert text.startswith("# A page\n\n<!-- study: small -->\nFrom [results.json](page/small/results.json)")
    assert text.endswith("<!-- end -->\n\nafter\n")
    for words in ("normalised pixels", "mIoU", "fine-tuned, 10 % of labels", "no CLS in the loss", "one seed"):
        assert words in text
    beside = small / "page" / "small"
    found = {path.name for path in beside.iterdir()}
    assert {"results.json", "figures.png", "labels.png", "ablations.png", "text.jpg", "pca.jpg"} <= found
    published = (beside / "results.json").read_text()
    assert json.loads(published)["form"] == "small"
    assert str(small.parent) not in text + published


def test_the_same_command_computes_nothing_again(small: Path) -> None:
    newest = max(path.stat().st_mtime for path in (small / "study" / "students").rglob("*"))
    said = call("--config", small / "study-small.yaml")
    assert "to do" not in said
    assert max(path.stat().st_mtime for path in (small / "study" / "students").rglob("*")) == newest


def test_a_missing_result_is_found_again(small: Path, results: dict[str, Any]) -> None:
    """By the step that it is of, alone."""
    path = small / "study" / "students" / "hog-0" / "segment" / "results.json"
    before = json.loads(path.read_text())
    path.unlink()
    assert "1 of 57 to do" in call("--config", small / "study-small.yaml")
    assert json.loads(path.read_text())["miou"] == before["miou"]
    after = json.loads((small / "study" / "results.json").read_text())
    assert after["summary"] == results["summary"]
