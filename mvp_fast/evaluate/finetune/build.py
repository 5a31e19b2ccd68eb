"""From a configuration to the parts of a fine-tuning run, and the whole of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mvp_fast.config.finetune import FinetuneConfig
from mvp_fast.errors import ConfigError
from mvp_fast.evaluate.backbone import Backbone, BackboneSource, load_backbone
from mvp_fast.evaluate.drop_path import PlannedDepth
from mvp_fast.evaluate.finetune.run import FinetuneRun, Origin, compiles, training_plan
from mvp_fast.evaluate.finetune.step import FinetuneStep
from mvp_fast.evaluate.labels import Labels, match_labels, stratified_rows
from mvp_fast.evaluate.network import Network, describe_folder, give_head
from mvp_fast.models.normaliser import Normaliser
from mvp_fast.samples.index import Index
from mvp_fast.train.checkpoint import read_state
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.loop import Outcome, train
from mvp_fast.train.optim import build_optimizer
from mvp_fast.train.resume import check_plan, check_settings, check_task
from mvp_fast.train.run import build_ema, check_kernels, check_micro_batches, count_steps, open_index


def finetune(config: FinetuneConfig, ranks: Ranks) -> tuple[Outcome, dict[str, Any]]:
    """Train, test, and write results.json; a run that is complete is tested where that is still to be done.

    Returns:
        What came of the training, and what results.json holds.

    Raises:
        UserError: see `train.loop.train`, `build_run` and `FinetuneRun.finish`.
    """
    built: list[FinetuneRun] = []

    def build(config: FinetuneConfig, ranks: Ranks, checkpoint: Path | None) -> FinetuneRun:
        built.append(build_run(config, ranks, checkpoint))
        return built[-1]

    outcome = train(config, ranks, build)
    return outcome, built[-1].finish()


def build_run(config: FinetuneConfig, ranks: Ranks, checkpoint: Path | None) -> FinetuneRun:
    """Build every part, at step 0 or at `checkpoint`.

    Raises:
        ConfigError: the configuration names something that does not exist or does not fit together.
        DataError: an index, its files or a checkpoint are missing or do not fit.
        EnvironmentProblem: timm's weights can't be had.
    """
    check_kernels(config, ranks.device)
    state = read_state(checkpoint) if checkpoint else None  # cheap, and may end the attempt before models are built
    if state is not None and checkpoint is not None:
        check_task(state, FinetuneRun.task, checkpoint)
    whole, test = open_index(config), Index.open(config.finetune.test)
    test.check_files()
    labels = match_labels(whole, test)
    rows = stratified_rows(labels.train_N, config.finetune.label_fraction, config.seed)
    index = whole if len(rows) == len(whole) else whole.subset(rows)
    labels = Labels(labels.classes, labels.train_N[rows], labels.test_N)

    changed: list[str] = []
    if state is not None and checkpoint is not None:
        changed = check_settings(state, config, checkpoint)
        origin = Origin(Network.from_dict(state["network"]), **state["backbone"])
        model = origin.network.build()  # its weights come from the checkpoint
    else:
        model, origin = start_model(config)
    plan = training_plan(config, index, _patch_size(model), ranks.rank, ranks.world)
    if state is not None and checkpoint is not None:
        check_plan(state, plan, checkpoint)
    check_micro_batches(config, plan)
    _check_pairs(config, plan.local_batch_size // config.train.accumulate)

    give_head(model, len(labels.classes), config.finetune.head_init_scale, config.seed)
    depth = PlannedDepth(model, config.finetune.drop_path, "finetune.drop-path")
    if config.train.recompute:
        model.set_grad_checkpointing(True)
    model.train()
    ema = build_ema(model, config)
    for each in (model,) if ema is None else (model, ema.module):
        each.to(ranks.device)
    if compiles(config, ranks.device):
        model.compile(dynamic=False)
    optimizer = build_optimizer(model, config.optim, config.finetune.layer_decay)
    network = origin.network
    step = FinetuneStep(
        model,
        ranks.wrap(model),
        optimizer,
        config,
        ranks.device,
        label_N=labels.train_N,
        classes=len(labels.classes),
        normalise=Normaliser(network.mean, network.std).to(ranks.device),
        depth=depth,
    )
    run = FinetuneRun(
        config=config,
        ranks=ranks,
        plan=plan,
        model=model,
        ema=ema,
        optimizer=optimizer,
        step=step,
        total_steps=count_steps(config, index),
        changed=changed,
        origin=origin,
        labels=labels,
        available=len(whole),
        test=test,
    )
    if checkpoint is not None and state is not None:
        run.load(checkpoint, state)
    return run


def start_model(config: FinetuneConfig) -> tuple[Any, Origin]:
    """The network that `config.model` names, without a head, for images of data.image_size.

    Raises:
        ConfigError: there is no such model, it is no plain vision transformer, or its images are of another size.
        DataError: the run has no checkpoint, or files are damaged.
        EnvironmentProblem: timm's weights can't be had.
    """
    how, size = config.model, config.data.image_size
    path = Path(how.name).expanduser()
    if how.untrained and path.is_dir():
        network = describe_folder(path, how.checkpoint).sized(size)
        backbone = Backbone(_built(network, config), f"fresh weights (seed {config.seed}) in the shape of {path}")
    else:
        fresh_size = size if how.untrained else None  # there are no position tables to interpolate
        source = BackboneSource(how.name, how.checkpoint, how.ema, how.untrained, config.seed, fresh_size)
        backbone = load_backbone(source)
        if path.is_dir():
            network = describe_folder(path, how.checkpoint).sized(size)
        else:
            network = Network(how.name, {"img_size": size}, backbone.mean, backbone.std)
        if backbone.image_size != size:
            _resize(backbone, config)
    return backbone.model, Origin(network, backbone.words, backbone.fingerprint, backbone.step)


def _built(network: Network, config: FinetuneConfig) -> Any:
    try:
        return network.build(config.seed)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"timm can't build {network.architecture} for {config.data.image_size} px images: {error}",
            where=config.model.name,
            fix="Set data.image-size to what the network was trained on",
        ) from error


def _resize(backbone: Backbone, config: FinetuneConfig) -> None:
    """Interpolate position tables for data.image_size; ConfigError where that was not asked for, or can't be."""
    size, own = config.data.image_size, backbone.image_size
    if not config.model.resize:
        raise ConfigError(
            f"{backbone.words} takes images of {own} px, but data.image-size is {size}",
            fix=f"Give --data.image-size {own}, or --model.resize True to interpolate its position tables",
        )
    if size % backbone.patch_size or not hasattr(backbone.model, "set_input_size"):
        raise ConfigError(
            f"{backbone.words} can't be brought to {size} px: its patches have {backbone.patch_size} px",
            fix=f"Give --data.image-size {own}, or a multiple of {backbone.patch_size}",
        )
    backbone.model.set_input_size(img_size=size)


def _patch_size(model: Any) -> int:
    return int(model.patch_embed.patch_size[0])


def _check_pairs(config: FinetuneConfig, size: int) -> None:
    """ConfigError where a micro-batch can't be split into pairs to be mixed."""
    how, group = config.augmentation, 2 * config.data.repeat
    if (how.mixup or how.cutmix) and size % group:
        raise ConfigError(
            f"A rank's micro-batch of {size} images can't be split into pairs to be mixed, which takes a multiple of"
            f" {group}",
            where=f"train.batch-size {config.train.batch_size}, train.accumulate {config.train.accumulate}",
            fix="Choose another train.batch-size, or set augmentation.mixup and augmentation.cutmix to 0",
        )
