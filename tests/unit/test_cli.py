"""The command line of the verbs that are functions: options and words in any order, switches, words with a dash."""

from typing import Any

import pytest

from app.cli import _add_signature, _options_first, _with_underscores
from app.parsing import OneLineParser


def verb(words: list[str], *, size: int = 3, loud: bool = False, name: str = "") -> None:
    """Do nothing.

    Args:
        words: any number.
        size: a number.
        loud: a switch.
        name: a text.
    """


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["a", "b"], {"words": ["a", "b"]}),
        (["a", "--size", "5", "b"], {"words": ["a", "b"], "size": 5}),
        (["--size=5", "a", "--name", "--loud=x", "b"], None),
        (["a", "--loud", "b"], {"words": ["a", "b"], "loud": True}),
        (["--loud", "a"], {"words": ["a"], "loud": True}),
        (["--loud", "false", "a"], {"words": ["a"], "loud": False}),
        (["a", "--name", "x y", "- a list"], {"words": ["a", "- a list"], "name": "x y"}),
        (["a", "-5 + 3", "-5"], {"words": ["a", "-5 + 3", "-5"]}),
        (["--size", "4", "--", "a", "--size"], {"words": ["a", "--size"], "size": 4}),
        (["a", ""], {"words": ["a", ""]}),
        (["a", "--name", ""], {"words": ["a"], "name": ""}),
    ],
)
def test_options_and_words_may_be_mixed(
    line: list[str], expected: dict[str, Any] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = OneLineParser(prog="verb", exit_on_error=False)
    _add_signature(parser, verb)
    if expected is None:  # an option where a value belongs
        with pytest.raises(SystemExit):
            parser.parse_args(_options_first(parser, line))
        assert "--name: expected one argument" in capsys.readouterr().err
        return
    found = vars(parser.parse_args(_options_first(parser, line)))
    assert found == {"size": 3, "loud": False, "name": "", **expected}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--data-mirror", "--data_mirror"),
        ("--data-mirror=/a/b-c", "--data_mirror=/a/b-c"),
        ("--evaluation.every-n-steps", "--evaluation.every_n_steps"),
        ("--limit", "--limit"),
        ("a--b-c", "a--b-c"),
        ("- a-list", "- a-list"),
        ("-5", "-5"),
        ("--trainer.callbacks+=a-b", "--trainer.callbacks+=a-b"),
    ],
)
def test_dashes_in_options_are_underscores(word: str, expected: str) -> None:
    assert _with_underscores(["x-y", word, "--", "--a-b"]) == ["x-y", expected, "--", "--a-b"]
