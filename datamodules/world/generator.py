"""The documents of a synthetic world, from nothing but its parameters."""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from datamodules.order import derive_key, hash_fraction
from datamodules.world.arithmetic import all_combinations, draw_problem, tell_problem
from datamodules.world.biographies import ATTRIBUTES, People, Text, draw_rendering, tell_biography
from datamodules.world.stories import draw_story, tell_story
from modules.errors import InputError

VERSION = 2  # of the texts: another number makes another world of the same parameters
_HELD_OUT = 20  # one biography rendering and one story in so many is kept from training
_MIN_PEOPLE = max(len(attribute.values) for attribute in ATTRIBUTES)


@dataclass(frozen=True)
class WorldConfig:
    """What a world is made from; equal parameters make equal worlds.

    Attributes:
        seed: another seed makes other people, problems and stories.
        num_people: people with a biography.
        num_documents: documents in each language, held-out ones included.
        biographies: share of the documents that are biographies.
        arithmetic: share that are word problems; the rest are stories.
        max_operand: largest number that is added; sums reach twice that.
        version: of the texts; set by the program.
    """

    seed: int = 0
    num_people: int = 64
    num_documents: int = 8000
    biographies: float = 0.55
    arithmetic: float = 0.35
    max_operand: int = 9
    version: int = VERSION

    def __post_init__(self) -> None:
        limits = {"num_people": (self.num_people, _MIN_PEOPLE), "max_operand": (self.max_operand, 4)}
        limits |= {"num_documents": (self.num_documents, 100), "seed": (self.seed, 0)}
        for name, (value, least) in limits.items():
            if value < least:
                raise InputError(f"synthetic world: {name}={value} is too small; it must be at least {least}")
        if min(self.biographies, self.arithmetic) < 0 or self.biographies + self.arithmetic > 1:
            raise InputError(
                f"synthetic world: biographies={self.biographies} and arithmetic={self.arithmetic} are no shares; "
                "both must be at least 0 and their sum at most 1"
            )
        if self.version != VERSION:
            raise InputError(
                f"synthetic world of version {self.version}, this program makes version {VERSION}; "
                "use the program that made it"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `WorldConfig(**values)` takes back."""
        return asdict(self)

    @property
    def people(self) -> People:
        """The people of this world."""
        return People(self.seed, self.num_people)


@dataclass(frozen=True)
class Document:
    """One document in both languages, its kind, and whether it is kept from training."""

    kind: str
    held_out: bool
    texts: Text


def generate_documents(config: WorldConfig) -> Iterator[Document]:
    """All documents of a world, in a fixed order.

    A held-out document never occurs in training, in either language: which renderings, numbers and stories are held out
    is decided by what they say, not by when they are drawn.
    """
    people = config.people
    combinations = all_combinations(config.max_operand)
    num_biographies = 0
    for number in range(config.num_documents):
        rng = random.Random(derive_key(config.seed, 5, number))
        lot = rng.random()
        if lot < config.biographies:
            person = people.person(num_biographies % config.num_people)
            num_biographies += 1
            texts = tell_biography(person, draw_rendering(rng))
            yield Document("biography", _is_held_out(config.seed, texts), texts)
        elif lot < config.biographies + config.arithmetic:
            problem = draw_problem(rng, combinations)
            yield Document("arithmetic", problem.is_held_out(config.seed), tell_problem(problem))
        else:
            texts = tell_story(draw_story(rng))
            yield Document("story", _is_held_out(config.seed, texts), texts)


def _is_held_out(seed: int, texts: Text) -> bool:
    # the texts in the two languages say the same word for word, so one of them decides for both
    return hash_fraction(f"{seed} {texts['en']}") * _HELD_OUT < 1
