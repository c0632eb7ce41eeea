# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Multi-step arithmetic word problems with worked solutions: an endless, seeded data set that needs no download.

    Ann has 7 pens. Ann buys 3 packs with 5 pens in each pack. How many pens does Ann have now?
    The packs hold 3 * 5 = 15 pens.
    Ann now has 7 + 15 = 22 pens.
    #### 22

The answer has one line per step and ends like GSM8K's. There are three splits:

- `train`: the training templates, without the numbers that are held out;
- `numbers`: the training templates with held-out numbers, which a template never has in training;
- `templates`: templates that never occur in training, with any numbers. Their words do.
"""

import operator
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count


SPLITS = ("train", "numbers", "templates")

PEOPLE = ("Ann", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ivy", "Jack", "Kate", "Leo")
THINGS = ("apples", "books", "cards", "coins", "marbles", "pencils", "pens", "shells", "stamps", "stickers", "toys")

NUMBERS = (2, 9)  # inclusive range of a number for which the template names none
RESULTS = range(2, 100)  # of every step: positive, and plural so that the sentences stay English
HELD_OUT_SHARE = 10  # one number tuple in this many is held out

_STEP = re.compile(r"(\S+) ([-+*/]) (\S+) = \{(\w+)\}")
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@dataclass(frozen=True)
class Template:
    """A kind of problem.

    Args:
        name (`str`): Identifies the template; part of what decides which numbers are held out.
        question (`str`): Text with `{name}`, `{friend}` and `{thing}` for words and `{a}`, `{b}`, ... for numbers.
        steps (`tuple[str, ...]`): Sentences of the solution, each with one `left operation right = {result}`; later
            steps may use earlier results. The last result is the answer.
        ranges (`dict[str, tuple[int, int]]`): Inclusive ranges of the numbers that do not lie in `NUMBERS`.
    """

    name: str
    question: str
    steps: tuple[str, ...]
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def number_names(self) -> list[str]:
        """Names of the numbers that the question gives."""
        return sorted(set(re.findall(r"\{(\w)\}", self.question)))

    def solve(self, numbers: dict[str, int]) -> dict[str, int] | None:
        """The numbers and the result of every step, or `None` where a result is not an integer in `RESULTS`."""
        values = dict(numbers)
        for step in self.steps:
            left, operation, right, result = _STEP.search(step).groups()
            value = _OPERATIONS[operation](int(left.format(**values)), int(right.format(**values)))
            if value not in RESULTS:
                return None
            values[result] = int(value)
        return values


TRAINING_TEMPLATES = (
    Template(
        "packs",
        "{name} has {a} {thing}. {name} buys {b} packs with {c} {thing} in each pack. "
        "How many {thing} does {name} have now?",
        ("The packs hold {b} * {c} = {x} {thing}.", "{name} now has {a} + {x} = {y} {thing}."),
    ),
    Template(
        "gift",
        "{name} has {a} {thing}. {friend} gives {name} {b} more. Then {name} loses {c} of them. "
        "How many {thing} are left?",
        ("With the gift {name} has {a} + {b} = {x} {thing}.", "After the loss {x} - {c} = {y} {thing} are left."),
        {"a": (5, 20)},
    ),
    Template(
        "sharing",
        "{name} has {a} bags with {b} {thing} in each bag. {name} shares them equally among {c} friends. "
        "How many {thing} does each friend get?",
        ("The bags hold {a} * {b} = {x} {thing}.", "Each friend gets {x} / {c} = {y} {thing}."),
    ),
    Template(
        "times as many",
        "{name} has {a} {thing}. {friend} has {b} times as many. {friend} finds {c} more. "
        "How many {thing} do they have together?",
        (
            "{friend} has {a} * {b} = {x} {thing}.",
            "Then {friend} has {x} + {c} = {y} {thing}.",
            "Together they have {a} + {y} = {z} {thing}.",
        ),
    ),
    Template(
        "change",
        "A pen costs {a} dollars and a book costs {b} dollars. {name} buys one pen and one book. "
        "{name} pays with {c} dollars. How many dollars does {name} get back?",
        ("The pen and the book cost {a} + {b} = {x} dollars.", "{name} gets back {c} - {x} = {y} dollars."),
        {"c": (20, 30)},
    ),
    Template(
        "garden",
        "A garden has {a} rows of {b} trees. The gardener cuts down {c} trees. Then the gardener plants {d} new "
        "trees. How many trees are in the garden now?",
        (
            "At first there are {a} * {b} = {x} trees.",
            "After the cutting there are {x} - {c} = {y} trees.",
            "Now there are {y} + {d} = {z} trees.",
        ),
    ),
    Template(
        "reading",
        "{name} reads {a} pages a day for {b} days. The book has {c} pages. How many pages are left to read?",
        ("{name} reads {a} * {b} = {x} pages.", "There are {c} - {x} = {y} pages left."),
        {"c": (30, 90)},
    ),
    Template(
        "wages",
        "{name} earns {a} dollars an hour. {name} works {b} hours on Saturday and {c} hours on Sunday. "
        "How many dollars does {name} earn?",
        ("{name} works {b} + {c} = {x} hours.", "{name} earns {x} * {a} = {y} dollars."),
    ),
    Template(
        "more than",
        "{name} has {a} {thing}. {friend} has {b} more {thing} than {name}. How many {thing} do they have together?",
        ("{friend} has {a} + {b} = {x} {thing}.", "Together they have {a} + {x} = {y} {thing}."),
        {"a": (5, 30)},
    ),
    Template(
        "fewer than",
        "{name} collects {a} {thing} in the morning and {b} in the afternoon. {friend} collects {c} fewer than "
        "{name}. How many {thing} do they collect together?",
        (
            "{name} collects {a} + {b} = {x} {thing}.",
            "{friend} collects {x} - {c} = {y} {thing}.",
            "Together they collect {x} + {y} = {z} {thing}.",
        ),
    ),
    Template(
        "shop",
        "A shop gets {a} boxes with {b} {thing} in each box. It sells {c} {thing} on Monday and {d} on Tuesday. "
        "How many {thing} are left?",
        (
            "The boxes hold {a} * {b} = {x} {thing}.",
            "After Monday {x} - {c} = {y} {thing} are left.",
            "After Tuesday {y} - {d} = {z} {thing} are left.",
        ),
    ),
    Template(
        "bus",
        "There are {a} people on a bus. At the first stop {b} people get off and {c} people get on. "
        "At the second stop {d} people get on. How many people are on the bus now?",
        (
            "After {b} people get off there are {a} - {b} = {x} people.",
            "After the first stop there are {x} + {c} = {y} people.",
            "After the second stop there are {y} + {d} = {z} people.",
        ),
        {"a": (10, 30)},
    ),
    Template(
        "cookies",
        "{name} bakes {a} trays with {b} cookies on each tray. The children eat {c} cookies. "
        "{name} puts the rest into bags of {d}. How many bags does {name} fill?",
        (
            "The trays hold {a} * {b} = {x} cookies.",
            "After the meal {x} - {c} = {y} cookies are left.",
            "{name} fills {y} / {d} = {z} bags.",
        ),
    ),
    Template(
        "savings",
        "{name} saves {a} dollars a week for {b} weeks. Then {name} buys a game for {c} dollars and a book for {d} "
        "dollars. How many dollars does {name} have left?",
        (
            "{name} saves {a} * {b} = {x} dollars.",
            "The game and the book cost {c} + {d} = {y} dollars.",
            "{name} has {x} - {y} = {z} dollars left.",
        ),
    ),
    Template(
        "points",
        "{name} scores {a} points in each of {b} games. {friend} scores {c} points in each of {d} games. "
        "How many more points does {name} score than {friend}?",
        (
            "{name} scores {a} * {b} = {x} points.",
            "{friend} scores {c} * {d} = {y} points.",
            "{name} scores {x} - {y} = {z} more points.",
        ),
    ),
    Template(
        "milk",
        "A farmer has {a} cows and {b} goats. Each cow gives {c} litres of milk and each goat gives {d} litres. "
        "The farmer drinks {e} litres and sells the rest. How many litres does the farmer sell?",
        (
            "The cows give {a} * {c} = {x} litres.",
            "The goats give {b} * {d} = {y} litres.",
            "Together they give {x} + {y} = {z} litres.",
            "The farmer sells {z} - {e} = {w} litres.",
        ),
    ),
    Template(
        "party",
        "{name} invites {a} friends and {b} cousins to a party. Then {c} of them cannot come. "
        "Each guest gets {d} balloons. {name} has {e} balloons left over. How many balloons did {name} buy?",
        (
            "{name} invites {a} + {b} = {x} guests.",
            "Only {x} - {c} = {y} guests come.",
            "The guests get {y} * {d} = {z} balloons.",
            "{name} bought {z} + {e} = {w} balloons.",
        ),
        {"d": (2, 5)},
    ),
)

# Known words and kinds of sentences, combined as they never are in training.
HELD_OUT_TEMPLATES = (
    Template(
        "bags",
        "{name} has {a} bags with {b} {thing} in each bag. Then {name} loses {c} of them. How many {thing} are left?",
        ("The bags hold {a} * {b} = {x} {thing}.", "After the loss {x} - {c} = {y} {thing} are left."),
    ),
    Template(
        "collection",
        "{name} collects {a} {thing} in the morning and {b} in the afternoon. {friend} has {c} times as many. "
        "How many {thing} do they have together?",
        (
            "{name} collects {a} + {b} = {x} {thing}.",
            "{friend} has {x} * {c} = {y} {thing}.",
            "Together they have {x} + {y} = {z} {thing}.",
        ),
        {"c": (2, 4)},
    ),
    Template(
        "spending",
        "{name} earns {a} dollars an hour. {name} works {b} hours on Saturday. Then {name} buys a game for {c} "
        "dollars and a book for {d} dollars. How many dollars does {name} have left?",
        (
            "{name} earns {a} * {b} = {x} dollars.",
            "The game and the book cost {c} + {d} = {y} dollars.",
            "{name} has {x} - {y} = {z} dollars left.",
        ),
    ),
    Template(
        "trays",
        "{name} bakes {a} trays with {b} cookies on each tray. {name} shares them equally among {c} friends. "
        "How many cookies does each friend get?",
        ("The trays hold {a} * {b} = {x} cookies.", "Each friend gets {x} / {c} = {y} cookies."),
    ),
    Template(
        "delivery",
        "A shop gets {a} boxes with {b} {thing} in each box. {name} buys {c} {thing} and {friend} buys {d} more "
        "{thing} than {name}. How many {thing} are left?",
        (
            "The boxes hold {a} * {b} = {x} {thing}.",
            "{friend} buys {c} + {d} = {y} {thing}.",
            "Together they buy {c} + {y} = {z} {thing}.",
            "Now {x} - {z} = {w} {thing} are left.",
        ),
        {"d": (2, 5)},
    ),
)


@dataclass(frozen=True)
class Problem:
    """One problem: its text, and the template and numbers that tell whether it was held out."""

    template: Template
    numbers: dict[str, int]
    question: str
    answer: str


def is_held_out(template: Template, numbers: dict[str, int]) -> bool:
    """Whether a training template never has these numbers in training. The same on every machine and in every run."""
    key = f"{template.name}:{sorted(numbers.items())}"
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Problems:
    """The endless sequence of the problems of one split; each is a pure function of `seed`, `split` and its index."""

    seed: int
    split: str

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f"`split` is {self.split!r}; choose one of {SPLITS}.")

    def __getitem__(self, index: int) -> Problem:
        rng = random.Random(f"{self.seed} {self.split} {index}")
        template = rng.choice(HELD_OUT_TEMPLATES if self.split == "templates" else TRAINING_TEMPLATES)
        name, friend = rng.sample(PEOPLE, 2)
        words = {"name": name, "friend": friend, "thing": rng.choice(THINGS)}
        while True:
            numbers = {key: rng.randint(*template.ranges.get(key, NUMBERS)) for key in template.number_names}
            in_split = self.split == "templates" or is_held_out(template, numbers) == (self.split == "numbers")
            if in_split and (values := template.solve(numbers)) is not None:
                break
        lines = [step.format(**words, **values) for step in template.steps]
        result = _STEP.search(template.steps[-1])[4]
        answer = "\n".join([*lines, f"#### {values[result]}"])
        return Problem(template, numbers, template.question.format(**words, **values), answer)

    def __iter__(self) -> Iterator[Problem]:
        return map(self.__getitem__, count())
