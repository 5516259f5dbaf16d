"""Word problems with one sum or difference, and an answer such as `Answer: 3 + 4 = 7`."""

import random
from dataclasses import dataclass

from datamodules.order import derive_key
from datamodules.world.biographies import LANGUAGES, Text

_PEOPLE = ("farmer 农夫", "teacher 老师", "girl 女孩", "boy 男孩")
_THINGS = ("apples 苹果", "pears 梨", "balls 球", "coins 金币")
_LEAST = 2  # so that things always stand in the plural

_SUMS = (
    "What is {a} + {b}? | {a} + {b}是几？",
    "A {w} has {a} {o} and gets {b} more. How many {o} are there now? | {w}有{a}个{o}，又得到{b}个。现在有几个{o}？",
    "There are {a} {o} in one box and {b} in another. How many {o} are there in all? | "
    "一个盒子里有{a}个{o}，另一个有{b}个。一共有几个{o}？",
)
_DIFFERENCES = (
    "What is {a} - {b}? | {a} - {b}是几？",
    "A {w} has {a} {o} and gives away {b}. How many {o} are left? | {w}有{a}个{o}，送出{b}个。还有几个{o}？",
    "There are {a} {o} in a box. A {w} takes {b}. How many {o} are left? | "
    "盒子里有{a}个{o}，{w}拿走{b}个。还有几个{o}？",
)
_QUESTION = {"en": "Question: {q}\nAnswer:", "zh": "问题：{q}\n答案："}
_ANSWER = {"en": " {a} {sign} {b} = {c}", "zh": "{a} {sign} {b} = {c}"}


@dataclass(frozen=True)
class Problem:
    """One problem: its operands and sign, and which words tell it."""

    left: int
    right: int
    plus: bool
    template: int
    person: int
    thing: int

    @property
    def answer(self) -> int:
        """The right answer."""
        return self.left + self.right if self.plus else self.left - self.right

    def is_held_out(self, seed: int) -> bool:
        """Whether its numbers are kept from training in this wording, as one combination in eight is.

        The same numbers occur in training in other words: sums cannot be guessed, but they can be carried over.
        """
        return derive_key(seed, 4, self.left, self.right, self.plus, self.template) % 8 == 0


def all_combinations(max_operand: int) -> list[tuple[int, int, bool]]:
    """Operands and sign of every problem: a + b, and (a + b) - b, for a and b up to `max_operand`."""
    numbers = range(_LEAST, max_operand + 1)
    sums = [(a, b, True) for a in numbers for b in numbers]
    differences = [(a + b, b, False) for a in numbers for b in numbers]
    return sums + differences


def draw_problem(rng: random.Random, combinations: list[tuple[int, int, bool]]) -> Problem:
    """A random problem with one of the given combinations."""
    left, right, plus = rng.choice(combinations)
    template, person, thing = (rng.randrange(len(words)) for words in (_SUMS, _PEOPLE, _THINGS))
    return Problem(left, right, plus, template, person, thing)


def ask_problem(problem: Problem, language: str) -> str:
    """The question up to the answer, in the form that training documents have."""
    index = LANGUAGES.index(language)
    template = (_SUMS if problem.plus else _DIFFERENCES)[problem.template].split(" | ")[index]
    person, thing = _PEOPLE[problem.person].split()[index], _THINGS[problem.thing].split()[index]
    question = template.format(w=person, o=thing, a=problem.left, b=problem.right)
    return _QUESTION[language].format(q=question)


def tell_problem(problem: Problem) -> Text:
    """The problem with its answer, which is written out before it is named, in both languages."""
    sign = "+" if problem.plus else "-"
    numbers = {"a": problem.left, "sign": sign, "b": problem.right, "c": problem.answer}
    return {language: ask_problem(problem, language) + _ANSWER[language].format(**numbers) for language in LANGUAGES}
