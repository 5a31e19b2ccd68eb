"""The study as a list of commands: what a person would type, in which order, and what each one leaves behind.

Nothing here computes: each step is one verb of `mvp-fast` with its arguments, so that any figure of the study can be
had again by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mvp_fast.config.study import StudyConfig, ablation_folder

CLIP, SUPERVISED, SELF, SCRATCH = "clip", "supervised", "self", "scratch"
SETS = {"train": ("images", "seen", 0), "test": ("test", "seen", 1), "held-out": ("held_out", "held-out", 2)}
INDEXED = {name: f"data/{name}/index" for name in SETS}
# A patch's own values: no CLS token has any, and they are regressed, as MAE and MaskFeat do.
OWN_VALUES = ("--objective.cls", "False", "--objective.target-norm", "none", "--objective.loss", "mse")
UNTRAINED = ("--train.steps", "1", "--optim.lr", "0", "--optim.min-lr", "0")
"""One step that changes nothing: a run that holds the initial weights of its seed."""
WHOLE_RATE = ("--finetune.layer-decay", "1")
"""What begins with fresh weights learns at the full rate in all blocks."""
TEACHER_SEED = 1000
"""Of the teachers that have a student's shape; no student has it, so that none begins where its teacher began."""
RESULTS = "results.json"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: unique.
        argv: after `mvp-fast`.
        output: what it makes; where that is removed, the step is to be done again.
        proof: what is in `output` when the step is done.
        needs: names of the steps that must be done before.
    """

    name: str
    argv: tuple[str, ...]
    output: Path
    proof: str
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
    early = (SCRATCH, "pixels", "hog")
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


def teacher_folder(config: StudyConfig, name: str) -> Path:
    """The run of a teacher that is fitted here: clip, supervised or self."""
    return Path(config.folder) / "teachers" / name


def build_steps(config: StudyConfig, threads: int) -> list[Step]:
    """Every command, each after those that it needs; a runner may take any whose needs are met, the earlier first.

    Args:
        config: checked.
        threads: for loading images, a step.
    """
    made, steps, everyone = _Commands(config, threads), [], students(config)
    for name in SETS:
        steps += made.scenes(name)
    if any(each.kind in (CLIP, "random") or each.ablation for each in everyone):
        steps.append(made.clip())
    for student in everyone:
        steps.append(made.pretrain(student))
        steps += made.probes(student)
        if not student.ablation:
            steps += [made.finetune(student, part.fraction, part.epochs) for part in config.labels]
            steps.append(made.segment(student))
    if SUPERVISED in config.targets:
        steps += made.supervised()
    if SELF in config.targets:
        steps += made.self_supervised()
    if config.texts:
        steps.append(made.pictures(Student(f"{CLIP}-0", CLIP, 0)))
    return _in_order(steps)


class _Commands:
    """Makes the steps of one study."""

    def __init__(self, config: StudyConfig, threads: int) -> None:
        self.config, self.threads = config, str(threads)
        self.train, self.test, self.held_out = (str(set_folder(config, name)) for name in SETS)

    def scenes(self, name: str) -> list[Step]:
        """Draw a set, and index it."""
        field, pairs, seed = SETS[name]
        folder, images = set_folder(self.config, name), str(getattr(self.config.scenes, field))
        how = ("--profile", self.config.scenes.profile, "--pairs", pairs, "--seed", str(seed))
        argv = ("data", "scenes", "--out", str(folder), "--images", images, *how)
        drawn = Step(f"data/{name}/scenes", argv, folder, "scenes.json")
        return [drawn, Step(INDEXED[name], ("data", "index", str(folder)), folder, "index.parquet", (drawn.name,))]

    def clip(self) -> Step:
        """The CLIP that is the teacher."""
        run = teacher_folder(self.config, CLIP)
        sets = ("--data.index", self.train, "--fit.test", self.test, "--fit.held-out", self.held_out)
        argv = ("teacher", "fit", "--config", self.config.clip, *sets, *self._run(run), *self.config.clip_options)
        return Step("teachers/clip", argv, run, RESULTS, tuple(INDEXED.values()))

    def supervised(self) -> list[Step]:
        """A network of the students' size, trained on all labels."""
        shape = Student(f"{SCRATCH}-0", SCRATCH, 0)
        run, start = teacher_folder(self.config, SUPERVISED), str(run_folder(self.config, shape))
        argv = (
            "finetune",
            start,
            "--from-scratch",
            *self._classes(run, TEACHER_SEED, 1, self.config.supervised_epochs),
        )
        needs = (_trained(shape), INDEXED["test"])
        fitted = Step("teachers/supervised", (*argv, *WHOLE_RATE), run, RESULTS, needs)
        return [fitted, self._export(fitted)]

    def self_supervised(self) -> list[Step]:
        """A student that is pre-trained on pixels, to be a teacher."""
        run = teacher_folder(self.config, SELF)
        argv = (*self._pretrain(run, TEACHER_SEED), "--teacher.kind", "pixels", *OWN_VALUES)
        fitted = Step("teachers/self", argv, run, "checkpoints", (INDEXED["train"],))
        return [fitted, self._export(fitted)]

    def pretrain(self, student: Student) -> Step:
        """A student, on what it is to predict."""
        options, needs = self._target(student)
        run = run_folder(self.config, student)
        argv = (*self._pretrain(run, student.seed), *options)
        kind = "initial" if student.kind == SCRATCH else "train"  # one step, and no measure of the others' time
        return Step(f"{student.name}/{kind}", argv, run, "checkpoints", (INDEXED["train"], *needs))

    def probes(self, student: Student) -> list[Step]:
        """Two: on pairs that were trained on, and on others; the training set's features are made once."""
        run, steps = run_folder(self.config, student), []
        features = ("--features", str(run / "probe" / "features"), "--threads", self.threads)
        for name, test, needs in (
            ("probe", self.test, (_trained(student), INDEXED["test"])),
            ("probe-held-out", self.held_out, (f"{student.name}/probe", INDEXED["held-out"])),
        ):
            sets = ("--train", self.train, "--test", test, "--out", str(run / name))
            argv = ("probe", str(run), *sets, *features, *self.config.probe_options)
            steps.append(Step(f"{student.name}/{name}", argv, run / name, RESULTS, needs))
        return steps

    def finetune(self, student: Student, fraction: float, epochs: float) -> Step:
        """A classifier from a student, on a part of the labels."""
        run, name = run_folder(self.config, student), f"finetune-{fraction:g}"
        argv = ("finetune", str(run), *self._classes(run / name, student.seed, fraction, epochs))
        argv += WHOLE_RATE if student.kind == SCRATCH else ()
        return Step(f"{student.name}/{name}", argv, run / name, RESULTS, (_trained(student), INDEXED["test"]))

    def segment(self, student: Student) -> Step:
        """UPerNet on a student."""
        run = run_folder(self.config, student)
        sets = ("--segment.train", self.train, "--segment.val", self.test)
        argv = ("segment", str(run), "--config", self.config.segment, *sets, *self._run(run / "segment", student.seed))
        needs = (_trained(student), INDEXED["test"])
        argv += ("--segment.layer-decay", "1") if student.kind == SCRATCH else ()
        return Step(f"{student.name}/segment", (*argv, *self.config.segment_options), run / "segment", RESULTS, needs)

    def pictures(self, student: Student) -> Step:
        """What a student sees, and where it finds texts."""
        run = run_folder(self.config, student)
        argv = ("visualize", str(run), "--data", self.test, "--with-teacher", "--text", *self.config.texts)
        needs = (_trained(student), INDEXED["test"])
        return Step(f"{student.name}/visualize", argv, run / "visualize", RESULTS, needs)

    def _target(self, student: Student) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What a student learns from: options of `train`, and the steps that make it."""
        clip = ("--teacher.name", str(teacher_folder(self.config, CLIP)))
        if student.ablation:
            ablation = next(each for each in self.config.ablations if each.name == student.kind)
            return (*clip, *ablation.options), ("teachers/clip",)
        if student.kind in ("pixels", "hog"):
            return ("--teacher.kind", student.kind, *OWN_VALUES), ()
        if student.kind == SCRATCH:
            return ("--teacher.kind", "pixels", *OWN_VALUES, *UNTRAINED), ()
        if student.kind in (SELF, SUPERVISED):
            tower = teacher_folder(self.config, student.kind) / "export" / "timm"
            return ("--teacher.kind", "timm", "--teacher.pretrained", str(tower)), (f"teachers/{student.kind}/export",)
        return (*clip, *(("--teacher.pretrained", "random") if student.kind == "random" else ())), ("teachers/clip",)

    def _pretrain(self, run: Path, seed: int) -> tuple[str, ...]:
        words = ("train", "--config", self.config.student, "--data.index", self.train)
        return *words, *self._run(run, seed), *self.config.student_options

    def _classes(self, run: Path, seed: int, fraction: float, epochs: float) -> tuple[str, ...]:
        words = ("--config", self.config.finetune, "--data.index", self.train, "--finetune.test", self.test)
        part = ("--finetune.label-fraction", f"{fraction:g}", "--train.epochs", f"{epochs:g}")
        return *words, *self._run(run, seed), *part, *self.config.finetune_options

    def _run(self, run: Path, seed: int = 0) -> tuple[str, ...]:
        return "--run.dir", str(run), "--resume", "auto", "--seed", str(seed), "--data.threads", self.threads

    @staticmethod
    def _export(fitted: Step) -> Step:
        argv = ("export", str(fitted.output), "--format", "timm")
        return Step(f"{fitted.name}/export", argv, fitted.output / "export", "timm/config.json", (fitted.name,))


def _trained(student: Student) -> str:
    """The name of the step that makes a student."""
    return f"{student.name}/{'initial' if student.kind == SCRATCH else 'train'}"


def _in_order(steps: list[Step]) -> list[Step]:
    """Sets, teachers and what they need first, then students one after the other."""
    urgent = {need for step in steps if step.kind == "train" for need in step.needs}
    while more := {need for step in steps if step.name in urgent for need in step.needs} - urgent:
        urgent |= more
    return sorted(steps, key=lambda step: step.name not in urgent)
