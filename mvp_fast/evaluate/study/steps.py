"""The study as a list of commands: what a person would type, in which order, and what each one leaves behind.

Nothing here computes: each step is one verb of `mvp-fast` with its arguments, so that any figure of the study can be
had again by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mvp_fast.config.study import AblationConfig, StudyConfig, ablation_folder

CLIP, SUPERVISED = "clip", "supervised"
SETS = {"train": ("images", "seen", 0), "test": ("test", "seen", 1), "held-out": ("held_out", "held-out", 2)}
# A patch's own values: no CLS token has any, and they are regressed, as MAE and MaskFeat do.
OWN_VALUES = ("--objective.cls", "False", "--objective.target-norm", "none", "--objective.loss", "mse")
UNTRAINED = ("--train.steps", "1", "--optim.lr", "0", "--optim.min-lr", "0")
"""One step that changes nothing: a run that holds the initial weights of its seed."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: unique.
        argv: after `mvp-fast`.
        needs: names of the steps that must be done before.
    """

    name: str
    argv: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Steps of one kind take about as long."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True)
class Student:
    """One student of the study.

    Attributes:
        name: of its run's folder.
        kind: a target's name, or an ablation's.
        seed: of everything random in it.
        ablation: whether it is one; those are probed alone.
    """

    name: str
    kind: str
    seed: int
    ablation: bool = False


def students(config: StudyConfig) -> list[Student]:
    """All of them; the kinds that need no teacher first, so that there is work beside the teacher's training."""
    early = ("scratch", "pixels", "hog")
    order = sorted(config.targets, key=lambda target: (target not in early, config.targets.index(target)))
    found = [Student(f"{target}-{seed}", target, seed) for target in order for seed in range(config.seeds)]
    return found + [
        Student(f"ablation-{ablation_folder(each)}-{seed}", each.name, seed, True)
        for each in config.ablations
        for seed in range(config.ablation_seeds)
    ]


def run_folder(config: StudyConfig, student: Student) -> Path:
    """The student's pre-training run; what it is tried on lies in the folder."""
    return Path(config.folder) / "students" / student.name


def set_folder(config: StudyConfig, name: str) -> Path:
    """One of the sets: train, test or held-out."""
    return Path(config.folder) / "data" / name


def build_steps(config: StudyConfig, threads: int) -> list[Step]:
    """Every command, each after those that it needs; a runner may take any whose needs are met, the earlier first.

    Args:
        config: checked.
        threads: for loading images, a step.
    """
    steps = _sets(config)
    everyone = students(config)
    if any(each.kind in (CLIP, "random") or each.ablation for each in everyone):
        steps.append(_clip(config, threads))
    for student in everyone:
        steps.append(_pretrain(config, student, threads))
        steps += _probes(config, student, threads)
        if not student.ablation:
            steps += _finetunes(config, student, threads)
            steps.append(_segment(config, student, threads))
        if student.kind == "pixels" and "self" in config.targets:
            steps.append(_export(run_folder(config, student), student.name, f"{student.name}/train"))
    if SUPERVISED in config.targets:
        steps += _supervised(config, threads)
    if config.texts:
        run = str(run_folder(config, Student(f"{CLIP}-0", CLIP, 0)))
        argv = ("visualize", run, "--data", str(set_folder(config, "test")), "--with-teacher", "--text", *config.texts)
        steps.append(Step(f"{CLIP}-0/visualize", argv, (f"{CLIP}-0/train",)))
    return _in_order(steps)


def _sets(config: StudyConfig) -> list[Step]:
    steps = []
    for name, (field, pairs, seed) in SETS.items():
        folder, images = str(set_folder(config, name)), str(getattr(config.scenes, field))
        profile = ("--profile", config.scenes.profile, "--pairs", pairs, "--seed", str(seed))
        steps.append(Step(f"data/{name}/scenes", ("data", "scenes", "--out", folder, "--images", images, *profile)))
        steps.append(Step(f"data/{name}/index", ("data", "index", folder), (f"data/{name}/scenes",)))
    return steps


ALL_SETS = tuple(f"data/{name}/index" for name in SETS)


def _clip(config: StudyConfig, threads: int) -> Step:
    train, test, held_out = (str(set_folder(config, name)) for name in SETS)
    sets = ("--data.index", train, "--fit.test", test, "--fit.held-out", held_out)
    run = ("--run.dir", str(Path(config.folder) / CLIP), "--resume", "auto", "--data.threads", str(threads))
    argv: tuple[str, ...] = ("teacher", "fit", "--config", config.clip, *sets, *run, *config.clip_options)
    return Step("teacher-fit", argv, ALL_SETS)


def _pretrain(config: StudyConfig, student: Student, threads: int) -> Step:
    options, needs = _target(config, student)
    argv: tuple[str, ...] = ("train", "--config", config.student, "--data.index", str(set_folder(config, "train")))
    argv += ("--run.dir", str(run_folder(config, student)), "--resume", "auto", "--seed", str(student.seed))
    argv += ("--data.threads", str(threads), *config.student_options, *options)
    return Step(f"{student.name}/train", argv, ("data/train/index", *needs))


def _target(config: StudyConfig, student: Student) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a student learns from: options of `train`, and the steps that make it."""
    clip, folder = str(Path(config.folder) / CLIP), Path(config.folder) / "students"
    if student.ablation:
        ablation = _find_ablation(config, student)
        return ("--teacher.name", clip, *ablation.options), ("teacher-fit",)
    if student.kind in ("pixels", "hog"):
        return ("--teacher.kind", student.kind, *OWN_VALUES), ()
    if student.kind == "scratch":
        return ("--teacher.kind", "pixels", *OWN_VALUES, *UNTRAINED), ()
    if student.kind == "self":  # of another seed: a student must not begin where its teacher began
        other = f"pixels-{(student.seed + 1) % config.seeds}"
        return _tower(folder / other), (f"{other}/export",)
    if student.kind == SUPERVISED:
        return _tower(Path(config.folder) / SUPERVISED), (f"{SUPERVISED}/export",)
    random = ("--teacher.pretrained", "random") if student.kind == "random" else ()
    return ("--teacher.name", clip, *random), ("teacher-fit",)


def _tower(run: Path) -> tuple[str, ...]:
    return "--teacher.kind", "timm", "--teacher.pretrained", str(run / "export" / "timm")


def _find_ablation(config: StudyConfig, student: Student) -> AblationConfig:
    return next(each for each in config.ablations if each.name == student.kind)


def _probes(config: StudyConfig, student: Student, threads: int) -> list[Step]:
    """Two: on pairs that were trained on, and on pairs that were not; the training set's features are made once."""
    run = run_folder(config, student)
    train, first = str(set_folder(config, "train")), f"{student.name}/probe"
    features = ("--features", str(run / "probe" / "features"), "--threads", str(threads))
    steps = []
    for name, test, needs in (
        ("probe", "test", (f"{student.name}/train", "data/test/index")),
        ("probe-held-out", "held-out", (first, "data/held-out/index")),
    ):
        sets = ("--train", train, "--test", str(set_folder(config, test)), "--out", str(run / name))
        argv = ("probe", str(run), *sets, *features, *config.probe_options)
        steps.append(Step(f"{student.name}/{name}", argv, needs))
    return steps


def _finetunes(config: StudyConfig, student: Student, threads: int) -> list[Step]:
    run = run_folder(config, student)
    sets = ("--data.index", str(set_folder(config, "train")), "--finetune.test", str(set_folder(config, "test")))
    steps = []
    for part in config.labels:
        name = f"finetune-{part.fraction:g}"
        argv: tuple[str, ...] = ("finetune", str(run), "--config", config.finetune, *sets, "--run.dir", str(run / name))
        argv += ("--resume", "auto", "--seed", str(student.seed), "--data.threads", str(threads))
        argv += ("--finetune.label-fraction", f"{part.fraction:g}", "--train.epochs", f"{part.epochs:g}")
        needs = (f"{student.name}/train", "data/test/index")
        steps.append(Step(f"{student.name}/{name}", (*argv, *config.finetune_options), needs))
    return steps


def _segment(config: StudyConfig, student: Student, threads: int) -> Step:
    run = run_folder(config, student)
    train, test = str(set_folder(config, "train")), str(set_folder(config, "test"))
    argv: tuple[str, ...] = (
        "segment",
        str(run),
        "--config",
        config.segment,
        "--segment.train",
        train,
        "--segment.val",
        test,
    )
    argv += ("--run.dir", str(run / "segment"), "--resume", "auto", "--seed", str(student.seed))
    argv += ("--data.threads", str(threads), *config.segment_options)
    return Step(f"{student.name}/segment", argv, (f"{student.name}/train", "data/test/index"))


def _supervised(config: StudyConfig, threads: int) -> list[Step]:
    """A network of the students' size and of a seed that none of them has, trained on all labels."""
    train, test, run = (
        str(set_folder(config, "train")),
        str(set_folder(config, "test")),
        Path(config.folder) / SUPERVISED,
    )
    start = run_folder(config, Student("scratch-0", "scratch", 0))  # for its shape
    argv: tuple[str, ...] = (
        "finetune",
        str(start),
        "--from-scratch",
        "--config",
        config.finetune,
        "--data.index",
        train,
    )
    argv += ("--finetune.test", test, "--run.dir", str(run), "--resume", "auto", "--seed", str(config.seeds))
    argv += ("--train.epochs", f"{config.supervised_epochs:g}", "--data.threads", str(threads))
    needs = ("scratch-0/train", "data/test/index")
    trained = Step(f"{SUPERVISED}/fit", (*argv, *config.finetune_options), needs)
    return [trained, _export(run, SUPERVISED, trained.name)]


def _export(run: Path, name: str, trained: str) -> Step:
    return Step(f"{name}/export", ("export", str(run), "--format", "timm"), (trained,))


def _in_order(steps: list[Step]) -> list[Step]:
    """Sets, teachers and what they need first, then students one after the other."""
    urgent = {need for step in steps if step.name.endswith("/train") for need in step.needs}
    while more := {need for step in steps if step.name in urgent for need in step.needs} - urgent:
        urgent |= more
    return sorted(steps, key=lambda step: step.name not in urgent)
