"""Scenes in words: an English sentence that names every object, where it lies, and the ground."""

from __future__ import annotations

from mvp_fast.samples.scenes.spec import ObjectSpec, SceneSpec, coarse_grid, covers
from mvp_fast.samples.scenes.vocabulary import GROUNDS, SIZES


def name(thing: ObjectSpec) -> str:
    """The object in words: "a large striped red square"."""
    return phrase(thing.shape, thing.colour, thing.texture, thing.size)


def phrase(shape: str, colour: str, texture: str, size: str) -> str:
    """An object of these words of the vocabulary, as captions name it."""
    return f"a {SIZES[size].phrase} {texture} {colour} {shape}"


def caption(scene: SceneSpec) -> str:
    """The scene as an English sentence: the main object, where it lies to the others, and the ground."""
    main = scene.objects[scene.main]
    others = [number for number in range(len(scene.objects)) if number != scene.main]
    text = name(main)
    if others:
        text += f" {_MAIN_TO_OTHER[relation(scene, others[0])]} {name(scene.objects[others[0]])}"
    rest = [f"{name(scene.objects[k])} {_OTHER_TO_MAIN[relation(scene, k)]}" for k in others[1:]]
    if rest:
        text += f", with {' and '.join(rest)},"
    return f"{text} {GROUNDS[scene.ground].phrase}"


_MAIN_TO_OTHER = {
    "in front": "behind",
    "behind": "in front of",
    "left": "to the right of",
    "right": "to the left of",
    "above": "below",
    "below": "above",
}
_OTHER_TO_MAIN = {
    "in front": "in front of it",
    "behind": "behind it",
    "left": "to its left",
    "right": "to its right",
    "above": "above it",
    "below": "below it",
}


def relation(scene: SceneSpec, other: int) -> str:
    """Where object `other` lies to the main one: in front, behind, left, right, above or below.

    In front and behind are said of objects that overlap; the others by the direction between their centres.
    """
    main, thing = scene.objects[scene.main], scene.objects[other]
    x, y = coarse_grid(scene.width, scene.height)
    if (covers(main, x, y) & covers(thing, x, y)).any():
        return "in front" if other > scene.main else "behind"
    right, down = thing.x - main.x, thing.y - main.y
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "below" if down > 0 else "above"
