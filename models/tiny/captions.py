"""Random scenes and the captions that describe them.

A scene is a background and up to four pictures from ``nouns.json``, each with a centre, a size and an angle.
Coordinates are fractions of the canvas: x grows to the right, y grows downwards.  The caption is composed together
with the scene from many phrasings, so that what is said and what is drawn agree; whatever a caption leaves open
(the background colour, say) varies only a little, which keeps sampling in few steps sharp.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

MAX_OBJECTS = 4
PLAIN, VERTICAL, DIAGONAL, HORIZON = range(4)  # how a background goes from its first colour to its second

COLORS = {
    "red": (225, 60, 55), "orange": (250, 145, 50), "yellow": (252, 215, 65), "green": (85, 180, 85),
    "blue": (65, 125, 225), "purple": (140, 85, 200), "pink": (250, 160, 195), "brown": (140, 95, 65),
    "black": (25, 25, 28), "white": (252, 252, 252), "gray": (150, 150, 155), "turquoise": (70, 200, 195),
    "beige": (240, 225, 195), "navy": (30, 40, 95), "lime": (170, 225, 70), "magenta": (215, 60, 160),
    "light blue": (170, 210, 248), "light green": (185, 230, 180), "dark green": (30, 90, 50),
    "dark blue": (30, 50, 130), "lavender": (210, 195, 245), "mint": (190, 240, 220),
}
SAME_COLOR = {"gray": ("grey",), "light blue": ("sky blue", "pale blue"), "purple": ("violet",), "turquoise": ("teal", "cyan")}

# Places are backgrounds too: (phrases, first colour, second colour, shape).
PLACES = [
    (("on the beach", "at the beach", "on the sand"), (150, 210, 250), (240, 215, 160), HORIZON),
    (("on the grass", "in a meadow", "in the park", "in a field", "in the garden"), (165, 215, 250), (110, 190, 90), HORIZON),
    (("in the snow", "in winter"), (175, 210, 240), (248, 250, 253), HORIZON),
    (("in the desert",), (250, 205, 150), (225, 175, 105), HORIZON),
    (("on a table", "on a wooden table", "on a desk"), (245, 235, 220), (165, 115, 75), HORIZON),
    (("on the moon",), (20, 20, 30), (150, 150, 155), HORIZON),
    (("on the floor", "in a room"), (235, 225, 210), (190, 160, 130), HORIZON),
    (("on the road", "on the street", "in the city"), (190, 215, 240), (120, 120, 125), HORIZON),
    (("in space", "in outer space"), (12, 12, 32), (40, 25, 75), VERTICAL),
    (("at night", "in the dark"), (18, 22, 55), (40, 50, 100), VERTICAL),
    (("at sunset", "at dawn"), (245, 130, 80), (120, 70, 150), VERTICAL),
    (("in the sky", "in the clouds"), (110, 180, 245), (215, 235, 252), VERTICAL),
    (("in the sea", "under water", "in the ocean", "underwater"), (70, 165, 225), (20, 60, 140), VERTICAL),
    (("in the forest", "in the woods", "in the jungle"), (60, 130, 75), (25, 70, 45), VERTICAL),
]

SIZES = {"tiny": 0.45, "small": 0.66, "": 1.0, "big": 1.25, "giant": 1.45}  # relative to a layout's usual size
SIZE_WORDS = {
    "tiny": ("tiny", "very small", "miniature", "teeny"), "small": ("small", "little"),
    "big": ("big", "large"), "giant": ("giant", "huge", "gigantic", "enormous", "very big"),
}
FILLERS = ("cute", "nice", "lovely", "beautiful", "shiny", "cool", "funny", "pretty", "colorful", "adorable", "simple",
           "happy", "friendly", "sweet", "fancy", "new", "old", "single", "perfect", "cheerful", "charming", "bright")
PREFIXES = ("a photo of", "a picture of", "an image of", "an emoji of", "a drawing of", "an illustration of",
            "a 3d render of", "a picture showing", "an icon of", "a cartoon of", "a painting of", "a close-up of",
            "a rendering of", "a sticker of", "a cute picture of", "a photograph of", "here is", "show me", "draw",
            "a portrait of", "a high quality photo of", "this is", "i want", "please draw")
SUFFIXES = (", 3d render", ", emoji style", ", high quality", ", digital art", ", highly detailed", ", cartoon style",
            ", cute", ", 4k", ", clean and simple", ", studio lighting", ", beautiful", ", glossy")
POSES = ("sitting", "standing", "smiling", "walking", "waiting", "running", "jumping", "dancing", "sleeping", "posing")
POSITIONS = {  # phrases for (x, y), each in {0, 1, 2}
    (0, 0): ("in the top left corner", "at the top left", "in the upper left"),
    (2, 0): ("in the top right corner", "at the top right", "in the upper right"),
    (0, 2): ("in the bottom left corner", "at the bottom left", "in the lower left"),
    (2, 2): ("in the bottom right corner", "at the bottom right", "in the lower right"),
    (1, 0): ("at the top", "in the upper half"), (1, 2): ("at the bottom", "in the lower half"),
    (0, 1): ("on the left", "on the left side"), (2, 1): ("on the right", "on the right side"),
    (1, 1): ("in the center", "in the middle", "in the centre"),
}
NUMBERS = {2: ("two", "2", "a pair of", "a couple of"), 3: ("three", "3"), 4: ("four", "4")}
HATS = ("crown", "top hat", "hat", "helmet", "baseball cap", "cap", "graduation cap")
RIDES = ("horse", "bicycle", "bike", "motorcycle", "skateboard", "elephant", "unicorn", "dragon", "car", "camel",
         "tractor", "boat", "rocket", "turtle", "zebra", "dolphin", "train")


@dataclass
class Noun:
    """One picture: its index, kind, names as (singular, plural, bare) and its extent (width, height), the longer 1."""

    index: int
    code: str
    kind: str
    names: list
    box: tuple


@dataclass
class Scene:
    """What is drawn, and the sentence that says so."""

    caption: str = ""
    objects: list = field(default_factory=list)  # (picture, x, y, size, angle in degrees), back to front
    background: tuple = ((255, 255, 255), (255, 255, 255), PLAIN)


def load_nouns(path=Path(__file__).with_name("nouns.json")):
    """The list of :class:`Noun` in ``nouns.json``, in file order."""
    rows = json.loads(Path(path).read_text())
    return [
        Noun(i, r["code"], r["kind"], [(n["one"], n["many"], n.get("bare", False)) for n in r["names"]], tuple(r["box"]))
        for i, r in enumerate(rows)
    ]


def with_article(phrase):
    """"an apple", "a unicorn"."""
    vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "ufo", "one"))
    return ("an " if vowel else "a ") + phrase


class Composer:
    """Draws random scenes; equal seeds give equal scenes."""

    def __init__(self, nouns, seed):
        self.nouns = nouns
        self.rng = random.Random(seed)
        self.alive = [n for n in nouns if n.kind in ("animal", "person")]
        by_name = {name[0]: n for n in nouns for name in n.names}
        self.hats = [(by_name[h], h) for h in HATS if h in by_name]
        self.rides = [(by_name[r], r) for r in RIDES if r in by_name]

    # -- words ---------------------------------------------------------------------------------------------------

    def name(self, noun):
        """One of the noun's names, the first more often."""
        return noun.names[0] if self.rng.random() < 0.55 else self.rng.choice(noun.names)

    def phrase(self, noun, size="", article=None):
        """A noun phrase such as "a small cute cat"; ``article`` forces one ("the") or none ("")."""
        one, _, bare = self.name(noun)
        words = [self.rng.choice(SIZE_WORDS[size])] if size else []
        if self.rng.random() < 0.12:
            words.append(self.rng.choice(FILLERS))
        text = " ".join(words + [one])
        if article == "" or (article is None and (bare or self.rng.random() < 0.12)):
            return text
        if article is None and self.rng.random() < 0.06:
            return ("one " if self.rng.random() < 0.5 else "the ") + text
        return f"{article} {text}" if article else with_article(text)

    def size(self, chance):
        """A size name; "" means that none is said."""
        return self.rng.choice(("tiny", "small", "big", "giant")) if self.rng.random() < chance else ""

    def finish(self, text, said_background):
        """Adds a prefix, the background, a suffix; chooses capitals and the full stop."""
        r = self.rng
        if r.random() < 0.30:
            text = f"{r.choice(PREFIXES)} {text}"
        elif r.random() < 0.05:
            text = f"there is {text}"
        if said_background:
            text = f"{said_background.capitalize()}, {text}" if r.random() < 0.04 else text + said_background_joint(r, said_background)
        if r.random() < 0.12:
            text += r.choice(SUFFIXES)
        style = r.random()
        if style < 0.45:
            text = text[0].upper() + text[1:]
        elif style < 0.49:
            text = text.title()
        elif style < 0.51:
            text = text.upper()
        if r.random() < 0.2:
            text += "."
        return text

    # -- backgrounds -----------------------------------------------------------------------------------------------

    def shade(self, color, spread=7):
        """The colour, changed a little."""
        return tuple(min(255, max(0, c + self.rng.randint(-spread, spread))) for c in color)

    def background(self):
        """A background as (colour, colour, shape), and the phrase that says it ("" for the soft default)."""
        r = self.rng
        kind = r.random()
        if kind < 0.45:
            base = r.choice((236, 242, 248))
            color = tuple(base + r.randint(-9, 7) for _ in range(3))
            return (color, color, PLAIN), ""
        if kind < 0.76:
            name, color = r.choice(list(COLORS.items()))
            color = self.shade(color)
            name = r.choice((name,) + SAME_COLOR.get(name, ()))
            pattern = r.choice(("on a {} background", "on a {} background", "with a {} background", "against a {} background",
                                "in front of a {} wall", "with a {} backdrop", "on a plain {} background", "on {}",
                                "over a {} background", "{} background", "on a solid {} background"))
            return (color, color, PLAIN), pattern.format(name).replace("a orange", "an orange")
        if kind < 0.89:
            (one, first), (two, second) = r.sample(list(COLORS.items()), 2)
            shape = VERTICAL if r.random() < 0.75 else DIAGONAL
            word = "diagonal gradient" if shape == DIAGONAL else "gradient"
            pattern = r.choice(("on a {} background from {} to {}", "on a {} from {} to {}", "with a {} backdrop from {} to {}",
                                "with a {} background going from {} to {}"))
            return (self.shade(first), self.shade(second), shape), pattern.format(word, one, two)
        phrases, first, second, shape = r.choice(PLACES)
        return (self.shade(first, 5), self.shade(second, 5), shape), r.choice(phrases)

    # -- scenes ------------------------------------------------------------------------------------------------------

    def placed(self, noun, x, y, size):
        """One object for :attr:`Scene.objects`, with a little jitter."""
        r = self.rng
        return (noun.index, x + r.uniform(-0.012, 0.012), y + r.uniform(-0.012, 0.012), size * r.uniform(0.97, 1.03), r.uniform(-3, 3))

    def single(self):
        """One object, perhaps with a size or a position."""
        r = self.rng
        noun = r.choice(self.nouns)
        size = self.size(0.28)
        text = self.phrase(noun, size)
        extent = min(0.68 * SIZES[size], 0.95)
        x = y = 0.5
        if r.random() < 0.2:
            column, row = r.choice(list(POSITIONS))
            text += " " + r.choice(POSITIONS[column, row])
            if (column, row) != (1, 1):
                extent = 0.44 * SIZES[size] if size in ("", "tiny", "small") else 0.54
                margin = 0.04 + extent / 2
                x, y = (margin, 0.5, 1 - margin)[column], (margin, 0.5, 1 - margin)[row]
        elif noun.kind in ("animal", "person") and r.random() < 0.15:
            text += r.choice((" ", " ", " is ")) + r.choice(POSES)
        return text, [self.placed(noun, x, y, extent)]

    def two(self):
        """Two objects and how they stand to each other."""
        r = self.rng
        kind = r.random()
        if kind < 0.42:
            return self.side_by_side()
        if kind < 0.60:
            return self.stacked()
        if kind < 0.70:
            return self.in_front()
        return self.acting()

    def pair_sizes(self, one, two, said_one, said_two, along, room=0.93, usual=0.46):
        """Sizes of two objects so that their extents along an axis (0: x, 1: y) fit beside each other."""
        a, b = usual * SIZES[said_one], usual * SIZES[said_two]
        if said_one in ("big", "giant") and not said_two:
            b *= 0.85
        if said_two in ("big", "giant") and not said_one:
            a *= 0.85
        total = a * one.box[along] + b * two.box[along]
        shrink = min(1.0, room / total, 0.95 / max(a, b))
        return a * shrink, b * shrink

    def side_by_side(self):
        r = self.rng
        one, two = r.sample(self.nouns, 2)
        said_one, said_two = self.size(0.22), self.size(0.22)
        first, second = self.phrase(one, said_one), self.phrase(two, said_two)
        a, b = self.pair_sizes(one, two, said_one, said_two, 0)
        gap = (1 - a * one.box[0] - b * two.box[0]) / 3
        x_left, x_right = gap + a * one.box[0] / 2, 1 - gap - b * two.box[0] / 2
        objects = [self.placed(one, x_left, 0.5, a), self.placed(two, x_right, 0.5, b)]
        join = r.choice(("and", "and", "and", "next to", "beside", "to the left of", "left of", "standing next to", "with",
                         "near", "and", "alongside", "looking at", "is next to", "right of", "to the right of",
                         "sitting next to", "facing", "side by side with", "by"))
        if "right of" in join:
            return f"{second} {join} {first}", objects
        if join == "and" and r.random() < 0.15:
            return f"{first} and {second} " + r.choice(("side by side", "next to each other", "together")), objects
        if join == "and" and r.random() < 0.1:
            return f"{first} on the left and {second} on the right", objects
        return f"{first} {join} {second}", objects

    def stacked(self):
        r = self.rng
        upper, lower = r.sample(self.nouns, 2)
        said_upper, said_lower = self.size(0.18), self.size(0.18)
        first, second = self.phrase(upper, said_upper), self.phrase(lower, said_lower)
        a, b = self.pair_sizes(upper, lower, said_upper, said_lower, 1)
        touching = r.random() < 0.4
        if touching:
            height = a * upper.box[1] + b * lower.box[1] * 0.94
            top = (1 - height) / 2
            y_upper, y_lower = top + a * upper.box[1] / 2, top + height - b * lower.box[1] / 2
            join = r.choice(("on top of", "sitting on", "standing on", "on", "is on top of"))
        else:
            gap = (1 - a * upper.box[1] - b * lower.box[1]) / 3
            y_upper, y_lower = gap + a * upper.box[1] / 2, 1 - gap - b * lower.box[1] / 2
            join = r.choice(("above", "over", "flying over", "is above", "below", "under", "beneath"))
        objects = [self.placed(lower, 0.5, y_lower, b), self.placed(upper, 0.5, y_upper, a)]
        if join in ("below", "under", "beneath"):
            return f"{second} {join} {first}", objects
        return f"{first} {join} {second}", objects

    def in_front(self):
        r = self.rng
        near, far = r.sample(self.nouns, 2)
        said_near, said_far = self.size(0.1), self.size(0.1)
        first, second = self.phrase(near, said_near), self.phrase(far, said_far)
        a, b = 0.42 * SIZES[said_near], min(0.66 * SIZES[said_far], 0.85)
        objects = [self.placed(far, 0.58, 0.42, b), self.placed(near, 0.03 + max(0.27, a / 2), 0.97 - a * near.box[1] / 2, a)]
        if r.random() < 0.3:
            return f"{second} behind {first}", objects
        return f"{first} in front of {second}", objects

    def acting(self):
        """An animal or a person that does something with a thing."""
        r = self.rng
        actor = r.choice(self.alive)
        kind = r.random()
        if kind < 0.10:
            hat, name = r.choice(self.hats)
            size = 0.62
            top = 0.58 - size * actor.box[1] / 2
            objects = [self.placed(actor, 0.5, 0.58, size), self.placed(hat, 0.5, top, 0.30)]
            return f"{self.phrase(actor)} {r.choice(('wearing', 'with', 'that wears'))} {with_article(name)}", objects
        if kind < 0.22:
            ride, name = r.choice(self.rides)
            size = 0.60
            top = 0.66 - size * ride.box[1] / 2
            objects = [self.placed(ride, 0.5, 0.66, size), self.placed(actor, 0.5, top - 0.10, 0.40)]
            return f"{self.phrase(actor)} {r.choice(('riding', 'driving', 'on', 'riding on'))} {with_article(name)}", objects
        thing = r.choice([n for n in (r.choice(self.nouns), r.choice(self.nouns)) if n is not actor] or self.nouns)
        said_actor, said_thing = self.size(0.08), self.size(0.12)
        first, second = self.phrase(actor, said_actor), self.phrase(thing, said_thing)
        a, b = self.pair_sizes(actor, thing, said_actor, said_thing, 0, room=1.0, usual=0.54)
        b *= 0.74
        if kind < 0.50:
            verb = r.choice(("holding", "carrying", "eating", "that holds", "is holding", "giving away", "with", "showing"))
            x_actor = 0.06 + a * actor.box[0] / 2
            x_thing = min(x_actor + a * actor.box[0] * 0.36 + b * thing.box[0] / 2, 0.98 - b * thing.box[0] / 2)
            objects = [self.placed(actor, x_actor, 0.48, a), self.placed(thing, x_thing, 0.62, b)]
        else:
            verb = r.choice(("playing with", "playing with", "is playing with", "chasing", "looking at", "running after", "watching",
                             "kicking", "dancing with", "talking to", "dreaming of", "reaching for", "playing", "that plays with"))
            gap = (1 - a * actor.box[0] - b * thing.box[0]) / 3
            floor = 0.5 + a * actor.box[1] / 2
            objects = [self.placed(actor, gap + a * actor.box[0] / 2, 0.5, a),
                       self.placed(thing, 1 - gap - b * thing.box[0] / 2, max(floor - b * thing.box[1] / 2, 0.5), b)]
        return f"{first} {verb} {second}", objects

    def several(self):
        """Two to four of a kind, three different ones, or two of a kind and another."""
        r = self.rng
        kind = r.random()
        if kind < 0.62:
            count = r.choice((2, 2, 3, 3, 4))
            noun = r.choice(self.nouns)
            filler = r.choice(FILLERS) + " " if r.random() < 0.08 else ""
            said = r.choice(("small", "big")) if r.random() < 0.08 else ""
            size_word = r.choice(SIZE_WORDS[said]) + " " if said else ""
            text = f"{r.choice(NUMBERS[count])} {size_word}{filler}{self.name(noun)[1]}"
            if count < 4 and r.random() < 0.15:
                text += r.choice((" in a row", " side by side", " next to each other"))
            scale = {"": 1.0, "small": 0.75, "big": 1.06}[said]
            return text, self.row([noun] * count, scale) if count < 4 else self.square([noun] * 4, scale)
        one, two, three = r.sample(self.nouns, 3)
        if kind < 0.88:
            text = r.choice(("{}, {} and {}", "{}, {}, and {}", "{} and {} and {}", "{}, {}, {}", "{} between {} and {}"))
            words = [self.phrase(n) for n in (one, two, three)]
            if "between" in text:
                words[0], words[1] = words[1], words[0]
            return text.format(*words), self.row([one, two, three])
        text = f"{r.choice(NUMBERS[2])} {self.name(one)[1]} {r.choice(('and', 'with', 'next to', 'and'))} {self.phrase(two)}"
        return text, self.row([one, one, two])

    def row(self, nouns, scale=1.0):
        """Objects from left to right."""
        usual = (0.46 if len(nouns) == 2 else 0.36) * scale
        total = sum(usual * n.box[0] for n in nouns)
        usual *= min(1.0, 0.93 / total)
        gap = (1 - sum(usual * n.box[0] for n in nouns)) / (len(nouns) + 1)
        x, objects = gap, []
        for noun in nouns:
            width = usual * noun.box[0]
            objects.append(self.placed(noun, x + width / 2, 0.5, usual))
            x += width + gap
        return objects

    def square(self, nouns, scale=1.0):
        """Four objects, two above two."""
        return [self.placed(n, 0.27 + 0.46 * (i % 2), 0.27 + 0.46 * (i // 2), 0.40 * scale) for i, n in enumerate(nouns)]

    def scene(self):
        """A random :class:`Scene`."""
        kind = self.rng.random()
        text, objects = self.single() if kind < 0.45 else self.two() if kind < 0.80 else self.several()
        background, said = self.background()
        return Scene(self.finish(text, said), objects, background)


def said_background_joint(rng, phrase):
    """The background phrase with what joins it to the sentence."""
    return (", " if phrase.endswith("background") and not phrase.startswith(("on", "with", "against", "over")) else rng.choice((" ", " ", ", "))) + phrase
