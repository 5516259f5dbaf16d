"""Text as tokens arrive: whole characters, spaces as they are behind the prompt, and stop strings."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.text_stream import TextStream
from datamodules.tokenizer import Tokenizer, train_tokenizer
from tests.reference.sentence_pieces import SENTENCE_PIECE_LIKE, sentence_piece_like

TEXTS = [
    "the quick brown fox jumps",
    " over  the lazy dog.\n\n",
    "你好，the fox 世界🌏。",
    "naïve\n",
    "",
    " ",
    "  x",
    "🙂",
]


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """Knows English words only, so that every Chinese character is three tokens."""
    return train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 3, 280)


def stream(
    tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), stops: Sequence[str] = ()
) -> list[str]:
    """The piece that each token gives, and what the end gives."""
    made = TextStream(tokenizer.decode, prompt, stops)
    pieces = []
    for token in ids:
        stopped = made.add(token)
        pieces.append(made.take())
        if stopped:
            break
    assert made.num_tokens == len(pieces)
    return [*pieces, made.close()]


def spell(letters: str, stops: Sequence[str]) -> list[str]:
    """The pieces of a text of which every character is a token."""
    made = TextStream(lambda ids: "".join(map(chr, ids)), [], stops)
    pieces = []
    for letter in letters:
        made.add(ord(letter))
        pieces.append(made.take())
        if made.stopped:
            break
    return [*pieces, made.close()]


# -- characters --------------------------------------------------------------------------------------------------------


def test_chinese_comes_in_whole_characters(byte_tokenizer: Tokenizer) -> None:
    text = "你好，the fox 世界🌏。"
    ids = byte_tokenizer.encode(text)
    assert len(ids) > len(text)
    assert "\ufffd" in byte_tokenizer.decode(ids[:1])
    pieces = stream(byte_tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[:6] == ["", "", "你", "", "", "好"]
    for end in range(len(ids)):
        shown = "".join(stream(byte_tokenizer, ids[:end]))
        assert text.startswith(shown) and "\ufffd" not in shown


def test_stray_bytes_are_left_out_and_hold_nothing_up(byte_tokenizer: Tokenizer) -> None:
    stray = byte_tokenizer.encode("你")[1]
    fox = byte_tokenizer.encode(" fox")
    assert "".join(stream(byte_tokenizer, [*fox, stray, *fox, stray])) == " fox fox"
    assert "".join(stream(byte_tokenizer, [stray, stray, *byte_tokenizer.encode("你"), stray])) == "你"


def test_a_character_before_an_unfinished_one_does_not_wait() -> None:
    """Tokens that hold the end of one character and the beginning of the next."""
    parts = ["世".encode()[:2], "世".encode()[2:] + "界".encode()[:1], "界".encode()[1:] + b"!"]
    made = TextStream(lambda ids: b"".join(parts[i] for i in ids).decode(errors="replace"))
    pieces = []
    for token in range(3):
        made.add(token)
        pieces.append(made.take())
    assert pieces == ["", "世", "界!"] and made.close() == ""


@pytest.mark.parametrize("kind", SENTENCE_PIECE_LIKE)
def test_spaces_are_as_they_read_behind_the_prompt(kind: str) -> None:
    tokenizer = sentence_piece_like(kind)
    ids = tokenizer.encode("fox")  # ▁fox
    assert tokenizer.decode(ids) == "fox"
    assert "".join(stream(tokenizer, ids, tokenizer.encode("the"))) == " fox"
    assert "".join(stream(tokenizer, ids, [1])) == "fox"  # behind the begin token alone
    assert "".join(stream(tokenizer, [*ids, 2, *ids], [1])) == "fox fox"  # a special token says nothing in between


@pytest.mark.parametrize("kind", SENTENCE_PIECE_LIKE)
def test_any_split_of_a_text_reads_as_the_whole_behind_the_part(kind: str) -> None:
    tokenizer = sentence_piece_like(kind)
    for seed in range(60):
        text = "".join(random.Random(seed).choices(TEXTS, k=5))
        ids = [1, *tokenizer.encode(text)]
        whole = tokenizer.decode(ids)
        for cut in range(1, len(ids) + 1):
            before = tokenizer.decode(ids[:cut])
            if "\ufffd" not in before:  # a prompt does not end inside a character
                assert "".join(stream(tokenizer, ids[cut:], ids[:cut])) == whole[len(before) :]


def test_stray_bytes_do_not_take_their_neighbours_with_them() -> None:
    """A decoder with byte fallback gives up a whole run of bytes when one of them is wrong."""
    tokenizer = sentence_piece_like("byte fallback")
    character, fox = tokenizer.encode("🌏")[1:], tokenizer.encode("fox")
    assert len(character) == 4 and "🌏" not in tokenizer.decode([*character, character[1]])
    assert "".join(stream(tokenizer, [*character, character[1], *fox], tokenizer.encode("the"))) == "🌏 fox"


@pytest.mark.parametrize("kind", SENTENCE_PIECE_LIKE)
def test_what_spells_nothing_changes_nothing_around_it(kind: str) -> None:
    """Many special tokens in the prompt's end, in front of the first word, and between words."""
    tokenizer = sentence_piece_like(kind)
    fox, world = tokenizer.encode("fox"), tokenizer.encode("世🌏界")
    for count in (1, 7, 15, 16, 17, 40, 1000):
        silence = [2] * count
        assert "".join(stream(tokenizer, fox, [1, *world, *silence])) == " fox"
        assert "".join(stream(tokenizer, fox, silence)) == "fox"
        assert "".join(stream(tokenizer, fox, [*silence, 3 + 0x80, *silence])) == " fox"  # behind a stray byte
        assert "".join(stream(tokenizer, [*silence, *fox, *silence, *world, *silence, *fox], fox)) == " fox 世🌏界 fox"


def test_characters_are_whole_behind_many_stray_bytes(byte_tokenizer: Tokenizer) -> None:
    character, fox = byte_tokenizer.encode("🌏"), byte_tokenizer.encode(" fox")
    assert len(character) == 4
    for count in range(12, 30):
        stray = [character[1]] * count
        assert "".join(stream(byte_tokenizer, [*fox, *stray, *character, *stray, *fox], fox)) == " fox🌏 fox"
    parts = [b"\xb8\x96\xe4", b"x"]  # never whole: the end of one character, and the beginning of the next
    made = TextStream(lambda ids: b"".join(parts[i] for i in ids).decode(errors="replace"))
    for token in [0] * 50 + [1]:
        made.add(token)
    assert made.close() == b"\xe4\xb8\x96".decode() * 49 + "x"


@pytest.mark.parametrize("spelled", ["", "\ufffd"])
def test_only_a_few_tokens_are_decoded_at_a_time(spelled: str) -> None:
    """For special tokens as for bytes that make no character, behind a long prompt and a prompt of such tokens."""
    words, sizes = ["the ", spelled], list[int]()

    def decode(ids: Sequence[int]) -> str:
        sizes.append(len(ids))
        return "".join(words[i] for i in ids)

    for prompt in ([0] * 20_000, [0, *[1] * 20_000], [1] * 20_000):
        sizes.clear()
        made = TextStream(decode, prompt)
        assert sum(sizes) < 20 * len(prompt)
        sizes.clear()
        for _ in range(20_000):
            made.add(1)
        made.add(0)
        assert max(sizes) <= 40 and len(sizes) <= 2.1 * 20_000
        assert made.close() == "the "


# -- stop strings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stops", "pieces"),
    [
        ("xaby", ["ab"], ["x", "", "", ""]),
        ("xacab", ["ab"], ["x", "", "ac", "", "", ""]),  # "a" could have been the beginning
        ("xaaab", ["aab"], ["x", "", "", "a", "", ""]),
        ("xababc", ["abc"], ["x", "", "", "ab", "", "", ""]),
        ("xab", ["abc"], ["x", "", "", "ab"]),  # the end decides
        ("xabc", ["ab", "abc"], ["x", "", "", ""]),  # what is complete first counts
        ("xabc", ["bc", "abc"], ["x", "", "", "", ""]),  # and the longest of those that end together
        ("xabd", ["abc", "bd"], ["x", "", "", "a", ""]),
        ("你好。世界", ["。世"], ["你", "好", "", "", ""]),
        ("ab", ["b"], ["a", "", ""]),  # at the very end
        ("b", ["b"], ["", ""]),  # at the very beginning
        ("abc", [], ["a", "b", "c", ""]),
    ],
)
def test_what_could_become_a_stop_string_waits(text: str, stops: list[str], pieces: list[str]) -> None:
    assert spell(text, stops) == pieces


@given(text=st.text("ab你", max_size=12), stops=st.lists(st.text("ab你", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_a_plain_search_cuts(text: str, stops: list[str]) -> None:
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    matched = [stop for stop in stops if ends and text[: ends[0]].endswith(stop)]
    expected = text[: ends[0] - max(map(len, matched))] if ends else text
    assert "".join(spell(text, stops)) == expected


@given(text=st.text("ab你 \n", max_size=12), stops=st.lists(st.text("ab你 \n", min_size=1, max_size=4), max_size=3))
def test_tokens_do_not_matter_to_stop_strings(byte_tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    """Tokens of several characters, and characters of several tokens."""
    expected = "".join(spell(text, stops))
    assert "".join(stream(byte_tokenizer, byte_tokenizer.encode(text), (), stops)) == expected


def test_a_stop_string_may_end_inside_a_token() -> None:
    words = ["the fox", "\n\nQuestion", ": who", " never reached"]
    made = TextStream(lambda ids: "".join(words[i] for i in ids), [], ["\n\nQ", "? "])
    assert [made.add(token) for token in (0, 1)] == [False, True]
    assert made.stopped and made.num_tokens == 2 and made.close() == "the fox"
    made = TextStream(lambda ids: "abcd" * len(ids), [], ["abcd", "bc"])  # complete first, though both are in one token
    assert made.add(0) and made.close() == "a"


def test_only_what_is_undecided_waits(byte_tokenizer: Tokenizer) -> None:
    """Every piece but the undecided tail is shown at once."""
    text = "the fox jumps over the lazy dog over the fox"
    ids = byte_tokenizer.encode(text)
    free, held = stream(byte_tokenizer, ids), stream(byte_tokenizer, ids, (), ["over the cat"])
    shown = [("".join(free[: i + 1]), "".join(held[: i + 1])) for i in range(len(ids))]
    assert any(a != b for a, b in shown) and "".join(free) == "".join(held) == text
    for all_of_it, certain in shown:
        assert all_of_it.startswith(certain) and "over the cat".startswith(all_of_it[len(certain) :])
    assert all(len(a) <= len(b) for (_, a), (_, b) in pairwise(shown))
