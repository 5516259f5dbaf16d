"""Biographies of invented people, after bioS (Allen-Zhu and Li, arXiv 2309.14316, 2404.05405).

A person has one value for each attribute. A biography states all of them, in an order and in words of its own, so that
the same facts are met in many renderings and a model has to learn the facts. People and values are spread evenly: who
knows only how often a value occurs guesses no better than chance.
"""

import random
from dataclasses import dataclass
from functools import cached_property

from datamodules.order import derive_key, permute

LANGUAGES = ("en", "zh")
Text = dict[str, str]

Pairs = tuple[tuple[str, str], ...]


def _pairs(text: str) -> Pairs:
    """Words of the form "english chinese", separated by commas."""
    first_and_second = (pair.strip().split() for pair in text.split(","))
    return tuple((english, chinese) for english, chinese in first_and_second)


# Names are syllables with one Chinese character each.
_SYLLABLES = _pairs(
    "ba 巴, de 德, fi 菲, ga 加, ka 卡, la 拉, li 莉, lo 洛, ma 玛, mi 米, "
    "na 娜, ni 尼, pe 佩, ra 娅, ro 罗, sa 莎, se 塞, te 特, to 托, ve 维"
)
_STEMS = _pairs("Bel 贝, Dor 多, Fen 芬, Har 哈, Kes 克, Nor 诺, Sil 西, Wil 威")
_PLACES = _pairs("port 港, hill 山")
_TREES = _pairs("Oak 橡树, Pine 松树, Rose 玫瑰, Lily 百合, Gold 金, Silver 银, Iron 铁, Stone 石")
_SCHOOLS = _pairs("College 学院, University 大学")
_SIGNS = _pairs("Star 星, Moon 月, Sun 太阳, Cloud 云")
_TRADES = _pairs("Bank 银行, Motors 汽车, Press 出版社, Foods 食品")
_FIELDS = _pairs(
    "physics 物理, biology 生物, history 历史, law 法律, music 音乐, medicine 医药, math 数学, art 艺术, "
    "sport 体育, drama 戏剧, finance 金融, logic 逻辑, dance 舞蹈, film 电影, ethics 伦理, poetry 诗歌"
)


def _combine(firsts: Pairs, seconds: Pairs, gap: str) -> tuple[Text, ...]:
    return tuple(
        {"en": f"{first[0]}{gap}{second[0]}", "zh": f"{first[1]}{second[1]}"} for first in firsts for second in seconds
    )


@dataclass(frozen=True)
class Attribute:
    """One thing that is known of everybody.

    Attributes:
        name: names it in task items.
        values: what it can be, in both languages.
        templates: sentences with {s} for the subject, {p} for its possessive form, {v} for the value; the last one
            has the form "label: value", which the evaluation asks in.
    """

    name: str
    values: tuple[Text, ...]
    templates: tuple[Text, ...]


def _templates(*lines: str) -> tuple[Text, ...]:
    return tuple(dict(zip(LANGUAGES, line.split(" | "), strict=True)) for line in lines)


ATTRIBUTES = (
    Attribute(
        "birth_year",
        tuple({"en": str(year), "zh": str(year)} for year in range(1960, 1992)),
        _templates(
            "{s} was born in the year {v}. | {s}生于{v}年。",
            "{p} life began in {v}. | {p}人生始于{v}年。",
            "{p} birth year: {v}. | {p}出生年份：{v}。",
        ),
    ),
    Attribute(
        "birth_city",
        _combine(_STEMS, _PLACES, ""),
        _templates(
            "{s} was born in the city of {v}. | {s}出生在{v}。",
            "{s} comes from {v}. | {s}来自{v}。",
            "{p} home city: {v}. | {p}家乡：{v}。",
        ),
    ),
    Attribute(
        "university",
        _combine(_TREES, _SCHOOLS, " "),
        _templates(
            "{s} went to {v}. | {s}就读于{v}。",
            "{s} has a degree from {v}. | {s}毕业于{v}。",
            "{p} school: {v}. | {p}学校：{v}。",
        ),
    ),
    Attribute(
        "field",
        tuple(dict(zip(LANGUAGES, pair, strict=True)) for pair in _FIELDS),
        _templates(
            "{s} is an expert in {v}. | {s}是{v}专家。",
            "{s} studied {v}. | {s}学的是{v}。",
            "{p} field: {v}. | {p}专业：{v}。",
        ),
    ),
    Attribute(
        "employer",
        _combine(_SIGNS, _TRADES, " "),
        _templates(
            "{s} works for {v}. | {s}任职于{v}。",
            "{s} has a job at {v}. | {s}在{v}工作。",
            "{p} employer: {v}. | {p}公司：{v}。",
        ),
    ),
)

_PRONOUNS = (
    {"en": ("She", "Her"), "zh": ("她", "她的")},
    {"en": ("He", "His"), "zh": ("他", "他的")},
)


@dataclass(frozen=True)
class Person:
    """An invented person: a name in both languages, pronouns, and a value index for each attribute."""

    name: Text
    pronouns: dict[str, tuple[str, str]]
    values: tuple[int, ...]

    def subject(self, language: str, *, by_name: bool) -> tuple[str, str]:
        """The person as a subject and in the possessive form."""
        if not by_name:
            return self.pronouns[language]
        name = self.name[language]
        return name, f"{name}'s" if language == "en" else f"{name}的"


class People:
    """The people of one world; any of them can be computed alone.

    Args:
        seed: of the world.
        num_people: how many there are.
    """

    def __init__(self, seed: int, num_people: int) -> None:
        self.seed, self.num_people = seed, num_people

    @cached_property
    def _num_families(self) -> int:
        # two syllables, or as many more as it takes to give everybody a name
        size = len(_SYLLABLES) ** 2
        while size * len(_SYLLABLES) ** 2 < self.num_people:
            size *= len(_SYLLABLES)
        return size

    def person(self, number: int) -> Person:
        """The person with a number below `num_people`."""
        num_given = len(_SYLLABLES) ** 2
        given = permute(number % num_given, num_given, derive_key(self.seed, 1))
        place = (number % num_given + number // num_given) % self._num_families  # of equal given names no two agree
        family = permute(place, self._num_families, derive_key(self.seed, 2))
        values = []
        for index, attribute in enumerate(ATTRIBUTES):
            place = permute(number, self.num_people, derive_key(self.seed, 3, index))
            values.append(place % len(attribute.values))
        name = {
            "en": f"{_spell(given, num_given, 0).title()} {_spell(family, self._num_families, 0).title()}",
            "zh": f"{_spell(given, num_given, 1)}·{_spell(family, self._num_families, 1)}",
        }
        return Person(name, _PRONOUNS[number % len(_PRONOUNS)], tuple(values))


def _spell(number: int, size: int, language: int) -> str:
    """A number below `size` written in syllables."""
    syllables = []
    while size > 1:
        number, digit = divmod(number, len(_SYLLABLES))
        syllables.append(_SYLLABLES[digit][language])
        size //= len(_SYLLABLES)
    return "".join(syllables)


@dataclass(frozen=True)
class Rendering:
    """How one biography is told: the order of the attributes, a template for each, and where the name is repeated."""

    order: tuple[int, ...]
    templates: tuple[int, ...]
    by_name: tuple[bool, ...]


def draw_rendering(rng: random.Random) -> Rendering:
    """A random rendering; the first sentence always has the name."""
    order = list(range(len(ATTRIBUTES)))
    rng.shuffle(order)
    templates = tuple(rng.randrange(len(ATTRIBUTES[index].templates)) for index in order)
    by_name = (True, *(rng.random() < 0.5 for _ in order[1:]))
    return Rendering(tuple(order), templates, by_name)


def tell_biography(person: Person, rendering: Rendering) -> Text:
    """One biography in both languages, with the same rendering."""
    texts = {}
    for language in LANGUAGES:
        sentences = []
        for index, template, by_name in zip(rendering.order, rendering.templates, rendering.by_name, strict=True):
            subject, possessive = person.subject(language, by_name=by_name)
            attribute = ATTRIBUTES[index]
            value = attribute.values[person.values[index]][language]
            sentences.append(attribute.templates[template][language].format(s=subject, p=possessive, v=value))
        texts[language] = (" " if language == "en" else "").join(sentences)
    return texts


def ask_fact(person: Person, attribute: Attribute, language: str) -> str:
    """The beginning of the "label: value" sentence, up to where the value begins (in English: up to its space)."""
    subject, possessive = person.subject(language, by_name=True)
    sentence = attribute.templates[-1][language].format(s=subject, p=possessive, v="\0")
    return sentence.split("\0")[0].rstrip(" ")
