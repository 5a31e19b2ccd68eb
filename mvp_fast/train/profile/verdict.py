"""What limits a run, how far it is from that limit, and which setting to change to what, with the gain to expect.

Pure functions of a profile's numbers. A gain is a prediction from what was measured, by the model that its reason
names; `at most` where it is a bound. Advice that changes what is trained says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mvp_fast.train.profile.numbers import Numbers, figure
from mvp_fast.train.profile.operations import products

Limit = Literal["data", "cores", "ranks", "host", "compute"]

# Below these, a difference is not worth a word: shares of the step, and times as fast.
WAITS, HEADROOM, HOST, STRAGGLES, UPDATE, GAIN = 0.05, 1.05, 0.10, 1.05, 0.15, 1.01
# Share of what resident batches gain that the loader's work must make up before it is blamed.
EXPLAINED = 0.5
# A product's rate in one precision must be this many times the other's before one is told to change.
PRECISION = 1.2
# Of the GPU's memory, as much may be used before a larger batch is not proposed.
MEMORY = 0.45


@dataclass(frozen=True)
class Advice:
    """One setting to change.

    Attributes:
        setting: the field's name, as the command line has it.
        now, to: its value, and the one to try.
        gain: images/s over those of now; None where nothing measured tells.
        at_most: the gain is a bound, not an estimate.
        reason: a sentence.
    """

    setting: str
    now: str
    to: str
    gain: float | None
    at_most: bool
    reason: str

    def words(self) -> str:
        """As a sentence, or two."""
        if self.gain is None:
            gain = "by how much, this profile can't tell"
        else:
            gain = f"{'at most ' if self.at_most else 'predicted '}+{100 * (self.gain - 1):.0f} % images/s"
        return f"--{self.setting} {self.to} in place of {self.now}: {gain}. {self.reason}"


@dataclass(frozen=True)
class Verdict:
    """What the numbers say.

    Attributes:
        limit: data (the step waits for batches), cores (it does not wait, but loading takes what it needs), ranks (one
            holds up the others), host (the GPU waits for launches), compute (the device works all the time).
        headline: a few words.
        sentences: what limits, and how far the run is from it.
        advice: by predicted gain, greatest first.
    """

    limit: Limit
    headline: str
    sentences: list[str]
    advice: list[Advice] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it."""
        first = f"{self.headline}. " + " ".join(self.sentences)
        if not self.advice:
            return f"{first}\nNo setting that this profile knows of would make it faster by 1 % or more."
        return "\n".join([first, *(f"Try {each.words()}" for each in self.advice)])


def judge(numbers: Numbers) -> Verdict:
    """The verdict on a profile."""
    limit = _limit(numbers)
    headline, sentences = _told(limit, numbers)
    advice = _on_data(limit, numbers) if limit in ("data", "cores") else []
    advice += _on_precision(numbers) + _on_kernels(numbers) + _on_steps(limit, numbers)
    worth = [each for each in advice if each.gain is None or each.gain >= GAIN]
    worth.sort(key=lambda each: each.gain or 0.0, reverse=True)
    return Verdict(limit, headline, sentences, worth)


def _limit(numbers: Numbers) -> Limit:
    real = numbers.real
    if real.share("data wait", "copy") >= WAITS:
        return "data"
    if numbers.headroom >= HEADROOM and _loading_explains(numbers):
        return "cores"
    if numbers.straggling >= STRAGGLES and _held_up(numbers) >= WAITS:
        return "ranks"
    if _host_share(numbers) >= HOST:
        return "host"
    return "compute"


def _loading_explains(numbers: Numbers) -> bool:
    """Whether the loader's work is enough to slow the step as much as it is; on a GPU, where it is not known, yes.

    The two stretches are measured one after the other: another process may have come or gone in between.
    """
    if numbers.settings.device != "cpu" or numbers.synthetic is None:
        return True
    lost = numbers.real.step - numbers.synthetic.step
    return _core_seconds(numbers) / numbers.settings.cores >= EXPLAINED * lost


def _core_seconds(numbers: Numbers, *stages: str) -> float:
    """Seconds of a core that the loader takes for a step's batch, in these of its stages or in all."""
    wanted = stages or ("decode", "transform")
    return sum(numbers.real.loader.get(stage, {}).get("seconds", 0.0) for stage in wanted)


def _held_up(numbers: Numbers) -> float:
    """Share of the step that the median rank waits for the slowest."""
    straggler = numbers.straggler.alone
    return (straggler - straggler / numbers.straggling) / numbers.real.step


def _host_share(numbers: Numbers) -> float:
    return numbers.real.share("host") + numbers.real.host_bound / numbers.real.step


def _told(limit: Limit, numbers: Numbers) -> tuple[str, list[str]]:
    settings, real = numbers.settings, numbers.real
    rate = f"{figure(numbers.images_per_second)} images/s"
    waits = 100 * real.share("data wait", "copy")
    ceiling = "" if numbers.ceiling is None else f"{figure(numbers.ceiling)} images/s with resident batches"
    reached = f"{100 / numbers.headroom:.0f} % of the {ceiling}"
    product = (
        f"The products of the models run at {100 * numbers.matmul_share:.0f} % of the"
        f" {figure(numbers.rates.matmul[settings.precision] / 1e12)} TFLOP/s that this device reaches in"
        f" {settings.precision}."
    )
    if limit == "data":
        far = [f"It reaches {reached}."] if ceiling else []
        return "Data limits", [f"The step waits for batches {waits:.0f} % of its time, at {rate}.", *far, product]
    if limit == "cores":
        what = "the cores" if settings.device == "cpu" else "the GPU or the cores"
        return f"Loading takes {what} from the step", [
            f"The step hardly waits for batches ({waits:.0f} % of its time), but reaches {reached}, at {rate}.",
            product,
        ]
    if limit == "ranks":
        slow = numbers.straggler
        return f"Rank {slow.rank} holds up the others", [
            f"It takes {figure(1e3 * slow.alone)} ms a step before the ranks meet, {numbers.straggling:.2f} times the"
            f" median rank's; it waits for data {figure(1e3 * slow.data_wait)} ms of it. All ranks: {rate}.",
            product,
        ]
    if limit == "host":
        if settings.device == "cpu":
            why = f"{100 * real.share('host'):.0f} % of the step lie between its stages: Python, logging, other ranks."
        else:
            why = f"The GPU waits for the host's launches {100 * _host_share(numbers):.0f} % of the step."
        return "The host limits", [f"{why} {rate}.", product]
    largest = max((s for s in real.critical if s != "host"), key=lambda stage: real.critical[stage])
    share = f"it reaches {reached}" if numbers.headroom >= 1 else "resident batches are no faster"
    data = f" Loading is not in the way: {share}." if ceiling else ""
    if numbers.headroom >= HEADROOM:
        work = figure(1e3 * _core_seconds(numbers))
        data = (
            f" It reaches {reached}, which loading does not explain: it takes {work} ms of a core a step."
            " Other programs ran meanwhile, it seems: measure again when the machine is left alone."
        )
    return "The device's arithmetic limits", [
        f"{rate}; the step waits for data {waits:.0f} % of its time.{data}",
        f"{product} The largest stage is {largest}, {100 * real.share(largest):.0f} % of the step.",
    ]


def _on_data(limit: Limit, numbers: Numbers) -> list[Advice]:
    """No more can be gained than resident batches show. Where the run's loader is resident, nothing is known."""
    settings, real = numbers.settings, numbers.real
    if numbers.synthetic is None:
        return []
    found, most = [], numbers.headroom
    resident, load = numbers.synthetic.step, real.busy.get("load", 0.0)
    gpu = settings.device == "cuda"
    if gpu and not settings.decodes_on_gpu and settings.loader in ("dali", "cpu", "torchvision"):
        reason = "DALI then decodes and resizes on the GPU, which this bounds from above."
        setting = (
            ("data.loader", settings.loader, "dali") if settings.loader != "dali" else ("data.decode", "cpu", "gpu")
        )
        found.append(Advice(*setting, most, True, reason))
    if settings.loader == "torchvision" and not gpu:
        reason = "It decodes the crop's region alone and keeps to the same pixels within 1 of 255."
        found.append(Advice("data.loader", "torchvision", "cpu", most, True, reason))
    if limit == "data" and 0 < settings.threads < settings.cores and load > 0:
        faster = load * settings.threads / settings.cores
        found.append(
            Advice(
                "data.threads",
                str(settings.threads),
                str(settings.cores),
                _sped(real.step, max(resident, faster)),
                False,
                f"A batch takes {figure(1e3 * load)} ms to make; {settings.cores} threads should make it in"
                f" {figure(1e3 * faster)} ms, while a step takes {figure(1e3 * resident)} ms.",
            )
        )
    if 0 < load < 0.9 * resident and real.share("data wait") >= WAITS:
        reason = "Batches are made faster than they are used on average, but not evenly: a longer queue evens them out."
        prefetch = settings.prefetch
        found.append(Advice("data.prefetch", str(prefetch), str(2 * prefetch), most, True, reason))
    if settings.loader in ("torchvision", "cpu", "dali") and not (gpu and settings.decodes_on_gpu):
        reason = (
            "It needs a copy of the data set that `mvp-fast data convert --to beton` writes, and data.interpolation"
        )
        found.append(Advice("data.loader", settings.loader, "ffcv", most, True, f"{reason} area: other pixels."))
    decode = _core_seconds(numbers, "decode")
    every = _core_seconds(numbers)
    if every > 0 and load > 0 and settings.loader in ("torchvision", "cpu", "dali"):
        share, repeat = decode / every, settings.repeat
        # Waiting for it, a batch is there sooner; otherwise the step gets back what the cores no longer decode.
        after = load * (1 - share / 2) if limit == "data" else real.step - decode / 2 / settings.cores
        found.append(
            Advice(
                "data.repeat",
                str(repeat),
                str(2 * repeat),
                _sped(real.step, max(resident, after)),
                False,
                f"Two crops from each decoded image: decoding is {100 * share:.0f} % of the loader's work."
                " It changes the training: batches hold fewer different images.",
            )
        )
    return found


def _on_precision(numbers: Numbers) -> list[Advice]:
    """If the products, and they alone, ran at the other precision's rate of those that were measured."""
    now = numbers.settings.precision
    other = "bf16" if now == "fp32" else "fp32"
    ratio = numbers.rates.matmul[other] / numbers.rates.matmul[now]
    if ratio < PRECISION:
        return []
    inside = sum(numbers.real.critical.get(stage, 0.0) for stage in ("teacher", "student forward", "backward"))
    spent = min(products(numbers.work) / numbers.rates.matmul[now], inside)
    gain = _sped(numbers.real.step, numbers.real.step - spent * (1 - 1 / ratio))
    reason = f"Products alone run {ratio:.3g} times as fast in {other} on this device; nothing else is counted."
    return [Advice("train.precision", now, other, gain, False, reason)]


def _on_kernels(numbers: Numbers) -> list[Advice]:
    if numbers.settings.device == "cuda" and numbers.settings.kernels == "reference":
        reason = "The reference kernels are there to be compared with, not to be fast."
        return [Advice("kernels.impl", "reference", "auto", None, False, reason)]
    return []


def _on_steps(limit: Limit, numbers: Numbers) -> list[Advice]:
    """What is spent once a step, or once a micro-batch, over more images."""
    settings, real = numbers.settings, numbers.real
    if settings.peak_memory is not None and settings.peak_memory > MEMORY:
        return []
    found = []
    idle = real.critical.get("host", 0.0) + real.host_bound
    if limit == "host" and settings.device == "cuda":
        # Launches are as many for twice the images; the device's work is not less.
        if settings.accumulate % 2 == 0:
            found.append(
                Advice(
                    "train.accumulate",
                    str(settings.accumulate),
                    str(settings.accumulate // 2),
                    _sped(real.step, real.step - idle / 2),
                    True,
                    "Half the launches for the same images and the same result.",
                )
            )
        else:
            reason = "Half the launches an image. It changes the training: the learning rate is scaled with the batch."
            twice = str(2 * settings.batch_size)
            gain = _sped(real.step, real.step - idle / 2)
            found.append(Advice("train.batch-size", str(settings.batch_size), twice, gain, True, reason))
    update = real.critical.get("optimizer", 0.0) + real.critical.get("clip", 0.0)
    if limit == "compute" and update / real.step >= UPDATE:
        reason = (
            f"Clipping and update are {100 * update / real.step:.0f} % of the step, whatever its size: half an image."
            " It changes the training: the learning rate is scaled with the batch."
        )
        size = settings.batch_size
        gain = _sped(real.step, real.step - update / 2)
        found.append(Advice("train.batch-size", str(size), str(2 * size), gain, False, reason))
    return found


def _sped(before: float, after: float) -> float:
    return before / max(after, 1e-12)
