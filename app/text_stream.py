"""The text of new tokens as they arrive: whole characters, as they read behind the prompt, up to a stop string."""

from collections.abc import Callable, Sequence

_NO_CHARACTER = "\ufffd"  # what decoders put for bytes that make no character, or not yet
_LONGEST = 16  # tokens that wait to spell something; a character is four bytes at most
_KEPT = 4  # of them, the first and the last so many stay

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """One prompt's continuation, token by token.

    Bytes of an unfinished character wait for the rest; bytes that belong to none, which a weak model may write, are
    left out. Text that could be the beginning of a stop string waits until that is decided. Of several stop strings
    the one that is complete first counts, and of those that end together the longest.

    Args:
        decode: token ids to text.
        prompt: the prompt's ids. Tokens may spell another text at a text's beginning than behind another token: the
            Llama 2 tokenizer's leave their space out there.
        stops: the text ends before the first of these, none of them empty.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        assert all(stops), "an empty string would stop at once"
        self._speller = _Speller(decode, prompt)
        self._stops = tuple(stops)
        self._held = ""
        self._certain = ""
        self.num_tokens = 0
        self.stopped = False

    def add(self, token: int) -> bool:
        """Take the next token; returns whether it completes a stop string, behind which nothing may follow."""
        assert not self.stopped, "the text has ended"
        self.num_tokens += 1
        text = self._held + self._speller.add(token)
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        self.stopped = bool(ends)
        certain = min(ends)[1] if ends else len(text) - self._undecided(text)
        self._certain += text[:certain]
        self._held = "" if ends else text[certain:]
        return self.stopped

    def take(self) -> str:
        """The text that has become certain since the last call."""
        text, self._certain = self._certain, ""
        return text

    def close(self) -> str:
        """No token follows: the rest of the text, with what waited to become a stop string."""
        self._certain, self._held = self._certain + self._held, ""
        return self.take()

    def _undecided(self, text: str) -> int:
        """How many characters at the end may still become a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)


class _Speller:
    """Tokens to text in whole characters, each read behind the tokens of the piece before it.

    However long the prompt, and however many tokens spell nothing, only a few tokens are decoded at a time.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self._decode = decode
        self._before = _spelling_end(decode, prompt)
        self._before_text = decode(self._before)
        self._new: list[int] = []
        self._num_spelled = 0

    def add(self, token: int) -> str:
        """The text that the token finishes."""
        self._new.append(token)
        text = self._text()
        whole = text.rstrip(_NO_CHARACTER)
        piece = whole[self._num_spelled :].replace(_NO_CHARACTER, "")
        self._num_spelled = max(self._num_spelled, len(whole))
        if piece and whole == text:  # this piece is what the next one stands behind
            self._before, self._new, self._num_spelled = self._new, [], 0
            self._before_text = self._decode(self._before)
        elif len(self._new) > _LONGEST:
            del self._new[_KEPT:-_KEPT]
            self._num_spelled = len(self._text().rstrip(_NO_CHARACTER))
        return piece

    def _text(self) -> str:
        return self._decode([*self._before, *self._new])[len(self._before_text) :]


def _spelling_end(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """A few tokens from the end of a prompt behind which new ones read as behind all of it: some of them spell text."""

    if len(prompt) <= _LONGEST:
        return list(prompt)
    nothing_else = decode(prompt).strip(_NO_CHARACTER) == ""  # stray bytes are then better than nothing

    def spells(size: int) -> bool:
        text = decode(prompt[-size:])
        return bool(text if nothing_else else text.strip(_NO_CHARACTER))

    size = _LONGEST
    while size < len(prompt) and not spells(size):
        size *= 2
    if size == _LONGEST:
        return list(prompt[-_LONGEST:])
    nothing, size = size // 2, min(size, len(prompt))
    while size - nothing > 1:
        middle = (nothing + size) // 2
        nothing, size = (nothing, middle) if spells(middle) else (middle, size)
    tail = list(prompt[-size:])
    del tail[_KEPT:-_KEPT]  # special tokens, or bytes that make no character
    return tail
