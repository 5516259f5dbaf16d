"""Short stories from a grammar: two animals meet somewhere and become friends."""

import random

from datamodules.world.biographies import LANGUAGES, Text

# English words begin with consonants, so that "a" always fits.
_KINDS = ("small 小", "big 大", "red 红", "white 白")
_ANIMALS = ("cat 猫", "dog 狗", "bird 鸟", "bear 熊", "fox 狐", "duck 鸭")
_WORDS = {
    "time": ("One morning 一天早上", "One day 有一天", "Last year 去年"),
    "first_kind": _KINDS,
    "first": _ANIMALS,
    "place": ("river 河边", "hill 山上", "city 城里", "sea 海边"),
    "second_kind": _KINDS,
    "second": _ANIMALS,
    "thing": ("coin 一个金币", "ball 一个球", "box 一个盒子", "pear 一个梨"),
    "deed": ("sang a song 唱歌", "ate some fish 吃鱼", "told a story 讲故事"),
}
_BEGIN = (
    "{time}, a {first_kind} {first} went to the {place}. | {time}，{first_kind}{first}去了{place}。",
    "{time}, there was a {first_kind} {first} at the {place}. | {time}，{place}有一只{first_kind}{first}。",
)
_MEET = (
    "The {first} met a {second_kind} {second} with a {thing}. | {first}遇见了一只拿着{thing}的{second_kind}{second}。",
    "A {second_kind} {second} gave the {first} a {thing}. | 一只{second_kind}{second}送给{first}{thing}。",
)
_END = (
    "They {deed} and were happy. | 它们{deed}，很快乐。",
    "Then the {first} and the {second} {deed}. | 然后{first}和{second}一起{deed}。",
)


def draw_story(rng: random.Random) -> tuple[str, ...]:
    """The choices that make a story: a word pair for each slot, then a sentence pair for each part."""
    words = {slot: rng.choice(choices) for slot, choices in _WORDS.items()}
    while words["second"] == words["first"]:
        words["second"] = rng.choice(_WORDS["second"])
    return (*words.values(), *(rng.choice(part) for part in (_BEGIN, _MEET, _END)))


def tell_story(choices: tuple[str, ...]) -> Text:
    """The story in both languages."""
    num_words = len(_WORDS)
    texts = {}
    for index, language in enumerate(LANGUAGES):
        words = {slot: choice.rsplit(" ", 1)[index] for slot, choice in zip(_WORDS, choices[:num_words], strict=True)}
        sentences = [part.split(" | ")[index].format(**words) for part in choices[num_words:]]
        texts[language] = (" " if language == "en" else "").join(sentences)
    return texts
