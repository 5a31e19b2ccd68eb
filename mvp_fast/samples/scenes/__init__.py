"""A synthetic data set: compositional scenes with natural noise, each with a class, a caption and a mask.

A scene is objects (shape x colour x texture x size) on a textured ground, with occlusion, soft light and noise. It is
sampled as plain data first (`layout` gives a `SceneSpec`), then put into words (`caption`) and drawn (`draw`). A set
is a folder:

    DIR/<class>/<number>.jpg         the images; the class is the shape of the main object, which is the largest
    DIR/masks/<class>/<number>.png   palette PNG: 0 the ground, else the shape that shows (mask_legend in scenes.json)
    DIR/scenes.parquet               one row an image, see `records.schema`
    DIR/scenes.json                  what the set is: profile, seed, images, version, classes, mask_legend, ...

Image i depends on (seed, profile, pairs, i) alone. On one machine the files are the same byte for byte whenever and by
however many workers they are drawn; another version of numpy or libjpeg may round differently.

To hold combinations out, draw one set with `pairs=all_pairs() - held_out` and another with `pairs=held_out`;
`held_out_pairs` chooses some evenly.
"""

from mvp_fast.samples.scenes.caption import caption
from mvp_fast.samples.scenes.compositions import chosen_pairs, held_out_pairs
from mvp_fast.samples.scenes.draw import Drawing, draw
from mvp_fast.samples.scenes.folder import SceneSet, SetReport
from mvp_fast.samples.scenes.layout import layout
from mvp_fast.samples.scenes.spec import PROFILES, ObjectSpec, Profile, SceneSpec
from mvp_fast.samples.scenes.vocabulary import all_pairs
from mvp_fast.samples.scenes.write import write_set

__all__ = [
    "PROFILES",
    "Drawing",
    "ObjectSpec",
    "Profile",
    "SceneSet",
    "SceneSpec",
    "SetReport",
    "all_pairs",
    "caption",
    "chosen_pairs",
    "draw",
    "held_out_pairs",
    "layout",
    "write_set",
]
