"""Samples what a scene holds before a pixel is drawn.

A scene depends on (seed, profile, pairs, image number) alone: neither on the number of images nor on who draws them.
"""

from __future__ import annotations

import math

import numpy as np

from mvp_fast.samples.random import Stream, draws
from mvp_fast.samples.scenes.spec import Mask, ObjectSpec, Profile, SceneSpec, coarse_grid, covers
from mvp_fast.samples.scenes.vocabulary import GROUNDS, SIZES, TILTS, Pair, all_pairs

# What a key is for: the order of the classes in a block of images, an image's layout, its noise.
LABELS, LAYOUT, NOISE = range(3)
# Shares of an object's area: the most that may be hidden, and the least that counts as lying in front of another.
MAIN_HIDDEN, OTHER_HIDDEN, CLEAR_OVERLAP = 0.3, 0.5, 0.12
ATTEMPTS = 40
"""Places tried for an object before the scene does without it."""


def layout(seed: int, profile: Profile, image: int, pairs: frozenset[Pair] | None = None) -> SceneSpec:
    """Sample scene number `image`.

    Args:
        seed: of the set, in [0, 2**64).
        profile: sizes, noise and encoding.
        image: number of the image, from 0.
        pairs: the (colour, shape) that objects may have; None for all. Every block of as many images as there are
            shapes in it has each shape as its class once, in random order.
    """
    pairs = all_pairs() if pairs is None else pairs
    shapes = sorted({shape for _, shape in pairs})
    block, place = divmod(image, len(shapes))
    order = np.random.Generator(np.random.Philox(key=scene_key(seed, profile, block, LABELS))).permutation(len(shapes))
    label = shapes[int(order[place])]

    rng = np.random.Generator(np.random.Philox(key=scene_key(seed, profile, image, LAYOUT)))
    width, height, _ = profile.sizes[rng.choice(len(profile.sizes), p=[weight for *_, weight in profile.sizes])]
    objects, main = _place_objects(rng, width, height, profile, label, sorted(pairs))
    used = {thing.colour for thing in objects}
    grounds = [name for name in profile.grounds if not used & set(GROUNDS[name].clash)]
    low, high = profile.grain
    return SceneSpec(
        width=width,
        height=height,
        objects=objects,
        main=main,
        ground=_pick(rng, grounds),
        light=rng.uniform(-math.pi, 0.0),  # from above, as everywhere outdoors
        grain=low * (high / low) ** rng.random(),
        relief=profile.relief,
        quality=int(rng.integers(profile.quality[0], profile.quality[1] + 1)),
        full_chroma=bool(rng.random() < profile.full_chroma),
        progressive=bool(rng.random() < profile.progressive),
        noise_key=scene_key(seed, profile, image, NOISE),
    )


def scene_key(seed: int, profile: Profile, position: int, purpose: int) -> int:
    """A 128-bit key for numpy's Philox: one draw of the project's own generator."""
    words = draws(seed, Stream.SCENES, profile.number, position, purpose)[0]
    return sum(int(word) << 32 * place for place, word in enumerate(words))


def _pick(rng: np.random.Generator, words: list[str] | tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _count(rng: np.random.Generator, profile: Profile) -> int:
    return 1 + int(rng.choice(len(profile.objects), p=profile.objects))


def _place_objects(
    rng: np.random.Generator, width: int, height: int, profile: Profile, label: str, pairs: list[Pair]
) -> tuple[tuple[ObjectSpec, ...], int]:
    """The objects from back to front (one that finds no place is left out), and the main one's number."""
    count = _count(rng, profile)
    colours = [colour for colour, shape in pairs if shape == label]
    words = list(SIZES)
    main_size = words[int(rng.choice(3, p=profile.alone if count == 1 else profile.leading))]
    main = _sample_object(rng, width, height, profile, label, _pick(rng, colours), main_size)
    x, y = coarse_grid(width, height)
    placed, masks, main_at = [main], [covers(main, x, y)], 0
    for _ in range(count - 1):
        free = [pair for pair in pairs if pair not in {(thing.colour, thing.shape) for thing in placed}]
        if not free:
            break
        colour, shape = free[int(rng.integers(len(free)))]
        size = _pick(rng, words[: words.index(main_size)])
        overlap = bool(rng.random() < 0.5)  # half of the objects hide something or are hidden, where that can be had
        at = int(rng.integers(len(placed) + 1))  # its place from back to front
        for _ in range(ATTEMPTS):
            thing = _sample_object(rng, width, height, profile, shape, colour, size)
            mask = covers(thing, x, y)
            touched = [other for other, area in zip(placed, masks, strict=True) if (mask & area).any()]
            if bool(touched) != overlap or colour in {other.colour for other in touched}:
                continue
            trial = [*masks[:at], mask, *masks[at:]]
            trial_main = main_at + (at <= main_at)
            if _is_clear(trial, trial_main) and not _surrounded(thing, mask, main, masks[main_at]):
                placed, masks, main_at = [*placed[:at], thing, *placed[at:]], trial, trial_main
                break
    return tuple(placed), main_at


def _surrounded(thing: ObjectSpec, mask: Mask, main: ObjectSpec, main_mask: Mask) -> bool:
    """Whether the object lies in the main one's hollow, where neither "behind" nor "left of" says so."""
    return not (mask & main_mask).any() and math.hypot(thing.x - main.x, thing.y - main.y) < main.radius


def _is_clear(masks: list[Mask], main: int) -> bool:
    """Whether enough of every object shows, and every overlap is either none or clear to see."""
    front = np.zeros_like(masks[0])
    for number in reversed(range(len(masks))):
        mask = masks[number]
        area = mask.sum()
        if (mask & front).sum() > (MAIN_HIDDEN if number == main else OTHER_HIDDEN) * area:
            return False
        front |= mask
    areas = [mask.sum() for mask in masks]
    for back in range(len(masks)):
        for fore in range(back + 1, len(masks)):
            shared = (masks[back] & masks[fore]).sum()
            if 0 < shared < CLEAR_OVERLAP * min(areas[back], areas[fore]):
                return False
    return True


def _sample_object(
    rng: np.random.Generator, width: int, height: int, profile: Profile, shape: str, colour: str, size: str
) -> ObjectSpec:
    """An object somewhere within the image, with everything that its words leave open."""
    radius = min(width, height) * rng.uniform(SIZES[size].low, SIZES[size].high)
    margin = radius * 1.03 + 2
    tilt = math.radians(TILTS[shape] * profile.tilt)
    return ObjectSpec(
        shape=shape,
        colour=colour,
        texture=_pick(rng, profile.textures),
        size=size,
        x=rng.uniform(margin, width - margin),
        y=rng.uniform(margin, height - margin),
        radius=radius,
        angle=rng.uniform(-tilt, tilt),
        shade=rng.uniform(0.9, 1.1),
        gloss=rng.random(),
    )
