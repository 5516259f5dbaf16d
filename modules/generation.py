"""Decoding with the key-value cache: greedy or sampled, any number of prompts at once.

Every prompt is conditioned on one end-of-text token, which begins each document in training: it is put before prompts
that do not start with it. Shorter prompts are padded on the left inside the cache, where padding is masked and
positions count from the prompt's own start, so a prompt's continuation does not depend on its neighbours.

Letters: B batch, L sequence, V vocabulary, K candidates.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from modules.errors import InputError
from modules.layers.attention import KVCache
from modules.layers.transformer import Transformer

Stop = Callable[[int, list[int]], bool]
"""Asked after each new token with the prompt's index and its new tokens so far; True ends that continuation."""


def sample(
    logits_BV: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token id per row [B] from softmax(logits / temperature).

    Args:
        logits_BV: scores over the vocabulary.
        temperature: 0 takes the largest logit (the first one of a tie).
        top_k: draw among the k most likely tokens; more than V means all.
        top_p: draw among the most likely tokens that together reach this probability (arXiv 1904.09751), after `top_k`.
        generator: where randomness comes from, on the logits' device; torch's global one when left out.

    Raises:
        InputError: temperature < 0 or not finite, top_k < 1, top_p outside (0, 1].
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    num_candidates = min(top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    # float64 and the largest logit as zero: no temperature above 0 can then overflow
    candidates_BK, ids_BK = logits_BV.double().topk(num_candidates, dim=-1)
    probabilities_BK = ((candidates_BK - candidates_BK[:, :1]) / temperature).softmax(dim=-1)
    if top_p is not None:
        mass_before_BK = probabilities_BK.cumsum(dim=-1) - probabilities_BK
        # the most likely token always stays: rounding may leave a hair of mass before it
        outside_BK = mass_before_BK >= top_p
        outside_BK[:, 0] = False
        probabilities_BK = probabilities_BK.masked_fill(outside_BK, 0.0)
    choice_B1 = torch.multinomial(probabilities_BK, num_samples=1, generator=generator)
    return ids_BK.gather(-1, choice_B1)[:, 0]


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise `InputError` for settings that `sample` cannot use."""
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InputError(f"temperature={temperature} must be a finite number of at least 0; use 0 for greedy decoding")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k={top_k} must be at least 1; leave it out to draw from the whole vocabulary")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p} must be above 0 and at most 1; leave it out to draw from the whole vocabulary")


def generate(
    network: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: Stop | None = None,
) -> Iterator[list[int | None]]:
    """Continue every prompt, one token per step; arguments are checked at once, before the first step is asked for.

    Args:
        network: the model, in eval mode and on the device where it shall run; no gradient is recorded.
        prompts: token ids; `eos_id` is put in front of those that do not begin with it, so a prompt may be empty.
        max_new_tokens: steps at most.
        eos_id: begins every prompt, and ends a continuation when it is drawn.
        temperature: as in `sample`, like `top_k`, `top_p` and `generator`.
        stop: may end a continuation earlier; the token after which it says so still belongs to the continuation.

    Returns:
        An iterator over steps. A step holds the new token of each prompt in the prompts' order, None for those that
        have ended; the end-of-text token is never among them. It ends when all have ended.

    Raises:
        InputError: a prompt and its continuation do not fit into `network.config.max_seq_len`; ids outside the
            vocabulary; sampling settings out of range.
    """
    check_sampling(temperature, top_k, top_p)
    begun = [begin(prompt, eos_id) for prompt in prompts]
    _check_lengths(begun, max_new_tokens, network.config.max_seq_len)
    _check_ids(begun, network.config.vocab_size)
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return _decode(network, begun, max_new_tokens, eos_id, draw, stop) if begun else iter(())


def complete(
    network: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: Stop | None = None,
) -> list[list[int]]:
    """The whole continuation of every prompt, without prompt and end-of-text token; arguments as in `generate`."""
    continuations: list[list[int]] = [[] for _ in prompts]
    steps = generate(
        network,
        prompts,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
        stop=stop,
    )
    for step in steps:
        for continuation, token in zip(continuations, step, strict=True):
            if token is not None:
                continuation.append(token)
    return continuations


def begin(prompt: Sequence[int], eos_id: int) -> list[int]:
    """The prompt as the model sees it: with one end-of-text token in front, unless it begins with one."""
    return list(prompt) if prompt and prompt[0] == eos_id else [eos_id, *prompt]


@torch.no_grad()
def _decode(
    network: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_id: int,
    draw: Callable[[Tensor], Tensor],
    stop: Stop | None,
) -> Iterator[list[int | None]]:
    weight = next(network.parameters())
    longest = max(map(len, prompts))
    start_B = torch.tensor([longest - len(prompt) for prompt in prompts], device=weight.device)
    cache = KVCache(network.config, len(prompts), longest + max_new_tokens, weight.device, weight.dtype, start_B)
    next_BL = [[eos_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    running = list(range(len(prompts)))  # which prompt each row of the cache continues
    written: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        hidden_BLD, _ = network(torch.tensor(next_BL, device=weight.device), cache=cache)
        drawn = draw(network.logits(hidden_BLD[:, -1])).tolist()
        step: list[int | None] = [None] * len(prompts)
        going_on = []
        for place, (row, token) in enumerate(zip(running, drawn, strict=True)):
            if token == eos_id:
                continue
            step[row] = token
            written[row].append(token)
            if stop is None or not stop(row, written[row]):
                going_on.append(place)
        if any(token is not None for token in step):
            yield step
        if not going_on:
            return
        if len(going_on) < len(running):
            cache = cache.select(torch.tensor(going_on, device=weight.device))
            running = [running[place] for place in going_on]
        next_BL = [[drawn[place]] for place in going_on]


def _check_lengths(prompts: list[list[int]], max_new_tokens: int, max_seq_len: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1; ask for one token or more")
    longest = max(map(len, prompts), default=0)
    room = max_seq_len - longest
    if max_new_tokens > room:
        fix = f"set max_new_tokens <= {room}" if room > 0 else f"shorten the prompt below {max_seq_len} tokens"
        raise InputError(
            f"a prompt of {longest} tokens (with its begin token) and max_new_tokens={max_new_tokens} are more than "
            f"the model's max_seq_len={max_seq_len}; {fix}"
        )


def _check_ids(prompts: list[list[int]], vocab_size: int) -> None:
    for prompt in prompts:
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < vocab_size)
            raise InputError(
                f"token id {wrong} of a prompt is outside the model's vocabulary of {vocab_size}; "
                "encode the prompt with the tokenizer that the model was trained with"
            )
