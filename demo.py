"""The synthetic shop behind `--data demo`: small, ready in seconds, with a structure to find.

Users and items have hidden tastes. Who buys what depends only on the tastes of both and on how
popular the item is. A taste makes some colours, shapes, nouns and styles likelier, and pictures,
descriptions and reviews are made from these. So an item's contents say something about who will
buy it, but no picture and no sentence names a taste, a user or a popularity.
"""
import math

import numpy as np
from PIL import Image, ImageDraw

from disk import write_csv

DEMO_VERSION = 1  # raise it when the shop changes, so that it is made anew

COLOURS = {
    "red": (200, 50, 45), "orange": (230, 140, 40), "yellow": (225, 210, 70),
    "green": (70, 160, 70), "teal": (50, 160, 165), "blue": (55, 85, 190),
    "purple": (130, 65, 165), "pink": (230, 130, 175),
}
COLOUR_NAMES = tuple(COLOURS)
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "stripe", "hexagon")
N_CORNERS = {"triangle": 3, "diamond": 4, "hexagon": 6}
NOUNS = (
    "lamp", "kettle", "puzzle", "guitar", "backpack", "teapot", "clock", "blanket",
    "racket", "camera", "notebook", "vase", "tent", "speaker", "scarf", "drone",
    "easel", "skillet", "telescope", "hammock", "flute", "globe", "basket", "mirror",
    "kite", "candle", "journal", "wagon", "helmet", "terrarium", "typewriter", "compass",
)
STYLES = (
    "rustic", "modern", "vintage", "minimal", "playful", "elegant", "rugged", "cosy",
    "sleek", "quirky", "classic", "bold", "delicate", "sturdy", "whimsical", "sober",
    "airy", "festive", "compact", "lavish", "plain", "ornate", "soft", "bright",
    "quiet", "portable", "sporty", "scholarly", "coastal", "alpine", "urban", "floral",
)
FILLER = (
    "nice", "shipping was quick", "a gift for my sister", "works as described",
    "bought it on sale", "good value", "not what I expected at first",
    "the box was dented", "would buy again", "my second one",
)


def write_demo(folder, n_users=2000, n_items=1000, n_tastes=16):
    """Writes interactions.csv, items.csv and images/ into an empty folder, the same each time."""
    rng = np.random.default_rng(20220627)
    # An item has a main taste and a touch of a second.
    main, second = rng.integers(n_tastes, size=(2, n_items))
    item_taste = 0.75 * np.eye(n_tastes)[main] + 0.25 * np.eye(n_tastes)[second]
    bought = draw_purchases(rng, item_taste, n_users)
    favourites = draw_favourites(rng, n_tastes)

    (folder / "images").mkdir()
    catalogue, words = [], []
    for i in range(n_items):
        colour, shape, noun, style = draw_attributes(rng, favourites, main[i])
        ground = COLOUR_NAMES[rng.integers(len(COLOURS))]
        text = describe(rng, colour, shape, noun, style, ground)
        picture = draw(rng, COLOURS[colour], shape, COLOURS[ground])
        # As in most shops, some items lack a text or a picture.
        has_text, has_image = rng.random(2) >= (0.08, 0.12)
        name = f"images/i{i}.png"
        if has_image:
            picture.save(folder / name)
        catalogue.append((f"i{i}", text if has_text else "", name if has_image else ""))
        words.append((colour, shape, noun, style))
    write_csv(folder / "items.csv", ("item", "text", "image"), catalogue)

    interactions = []
    for u in range(n_users):
        for i in bought[u]:
            interactions.append((f"u{u}", f"i{i}", write_review(rng, words[i])))
    order = rng.permutation(len(interactions))
    rows = [interactions[n] for n in order]
    write_csv(folder / "interactions.csv", ("user", "item", "review"), rows)


def draw_purchases(rng, item_taste, n_users):
    """The items of each user, a list of n_users arrays. item_taste: [n_items, n_tastes]."""
    n_items, n_tastes = item_taste.shape
    # Popularity falls like Zipf's law and does not depend on taste.
    popularity = (30.0 + rng.permutation(n_items)) ** -0.8
    user_taste = rng.dirichlet(np.full(n_tastes, 0.12), n_users)    # two or three tastes each
    utility = np.log(popularity) + 8.0 * user_taste @ item_taste.T  # [n_users, n_items]
    # The k items with the largest utility plus Gumbel noise are k draws without replacement,
    # with probabilities in proportion to exp(utility).
    utility += rng.gumbel(size=(n_users, n_items))
    ranking = np.argsort(-utility, axis=1)
    # Each user has at least five interactions, eleven on average.
    amount = 5 + np.minimum(rng.poisson(rng.gamma(2.0, 3.0, n_users)), n_items // 4)
    return [ranking[u, :amount[u]] for u in range(n_users)]


def draw_favourites(rng, n_tastes):
    """{attribute: [n_tastes, n]}: one colour and shape for each taste, a few nouns and styles."""
    return {
        "colour": rng.integers(len(COLOURS), size=(n_tastes, 1)),
        "shape": rng.integers(len(SHAPES), size=(n_tastes, 1)),
        "noun": rng.permutation(len(NOUNS)).reshape(n_tastes, -1),
        "style": rng.permutation(len(STYLES)).reshape(n_tastes, -1),
    }


def draw_attributes(rng, favourites, taste):
    """(colour, shape, noun, style) of an item: each follows its main taste or is random."""
    return (
        pick(rng, COLOUR_NAMES, favourites["colour"][taste], 0.6),
        pick(rng, SHAPES, favourites["shape"][taste], 0.6),
        pick(rng, NOUNS, favourites["noun"][taste], 0.7),
        pick(rng, STYLES, favourites["style"][taste], 0.5),
    )


def pick(rng, choices, favourites, probability):
    """One of the favourites (numbers) with this probability, otherwise any of the choices."""
    if rng.random() < probability:
        return choices[rng.choice(favourites)]
    return choices[rng.integers(len(choices))]


def describe(rng, colour, shape, noun, style, ground):
    """A description in one of three forms; sometimes it names a random colour instead."""
    if rng.random() >= 0.85:
        colour = COLOUR_NAMES[rng.integers(len(COLOURS))]
    text = rng.choice([
        f"A {style} {noun} with a {colour} {shape} on a {ground} ground.",
        f"{colour} {shape} {noun}, {style} look, {ground} background.",
        f"This {noun} comes in {ground} with {colour} {shape} decoration. {style}!",
    ])
    if rng.random() < 0.3:
        return f"{text} {rng.choice(FILLER)}."
    return str(text)


def write_review(rng, attributes):
    """Some of the item's attributes, often with a filler phrase; a fifth are left empty."""
    words = [word for word in attributes if rng.random() < 0.4]
    if rng.random() < 0.7:
        words.append(rng.choice(FILLER))
    if rng.random() < 0.2:
        return ""
    order = rng.permutation(len(words))
    return ", ".join(words[n] for n in order)


def draw(rng, colour, shape, ground, size=48):
    """A picture of two to four jittered shapes on a ground, with noise in every pixel."""
    picture = Image.new("RGB", (size, size), jitter(rng, ground))
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(2, 5)):
        r = int(rng.integers(6, 12))
        x, y = rng.integers(r, size - r, 2).tolist()
        draw_shape(pen, shape, x, y, r, jitter(rng, colour), size)
    pixels = np.asarray(picture) + rng.normal(0, 12, (size, size, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jitter(rng, colour):
    """A colour near this one."""
    near = np.clip(np.add(colour, rng.normal(0, 18, 3)), 0, 255)
    return tuple(near.astype(int).tolist())


def draw_shape(pen, shape, x, y, r, ink, size):
    """A shape of radius r about (x, y), in a picture of width `size`."""
    square = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(square, fill=ink)
    elif shape == "ring":
        pen.ellipse(square, outline=ink, width=3)
    elif shape == "square":
        pen.rectangle(square, fill=ink)
    elif shape == "stripe":
        pen.rectangle((0, y - r // 3, size, y + r // 3), fill=ink)
    elif shape == "cross":
        pen.rectangle((x - r, y - r // 4, x + r, y + r // 4), fill=ink)
        pen.rectangle((x - r // 4, y - r, x + r // 4, y + r), fill=ink)
    else:
        corners = []
        for corner in range(N_CORNERS[shape]):
            angle = 2 * math.pi * corner / N_CORNERS[shape] - math.pi / 2
            corners.append((x + r * math.cos(angle), y + r * math.sin(angle)))
        pen.polygon(corners, fill=ink)
