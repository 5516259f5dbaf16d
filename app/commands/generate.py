"""`growmoe generate CHECKPOINT PROMPT`: continue a text, shown as it is written."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app.device import choose_device

if TYPE_CHECKING:
    pass

DEFAULT_NEW_TOKENS = 256


def generate(
    checkpoint: Path,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Continue a prompt with a checkpoint's model; the continuation goes to standard output as it is written.

    Args:
        checkpoint: the directory of a checkpoint, such as RUN/checkpoints/step-00000300.
        prompt: the text to continue, in any language; it may be empty.
        max_new_tokens: tokens at most; when left out, 256 or what the model's window leaves.
        temperature: how much chance decides; 0 always takes the likeliest token.
        top_k: draw among so many of the likeliest tokens only.
        top_p: draw among the likeliest tokens that together reach this probability only.
        seed: the same seed gives the same text.
        device: where the model runs, such as cpu or cuda; auto takes a GPU if there is one.
    """
    import torch

    from app.checkpoint import load_model
    from modules.generation import generate as decode

    target = choose_device(device)
    model = load_model(checkpoint)
    ids = model.tokenizer.encode(prompt)
    if max_new_tokens is None:
        room = model.network.config.max_seq_len - len(ids) - 1
        max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room))
    steps = decode(
        model.network.to(target),
        [ids],
        max_new_tokens=max_new_tokens,
        eos_id=model.tokenizer.eos_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(target).manual_seed(seed),
    )
    for text in stream_text((token for (token,) in steps if token is not None), model.tokenizer.decode):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def stream_text(tokens: Iterable[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """The text of tokens as they arrive, in whole characters: bytes of an unfinished character wait for the rest.

    The pieces add up to the text of all tokens. Bytes that belong to no character, which a weak model may write, are
    left out, as is a character that is still unfinished at the end.
    """
    seen: list[int] = []
    num_shown = 0
    for token in tokens:
        seen.append(token)
        whole = decode(seen).replace("\ufffd", "")  # what decoders put for bytes that make no character, or not yet
        if len(whole) > num_shown:
            yield whole[num_shown:]
            num_shown = len(whole)
