"""Decoding with the key-value cache: greedy or sampled, any number of prompts at once.

Prompts are token ids and are continued as they are; `begin` puts in front what a model was trained to begin with.
Shorter prompts are padded on the left inside the cache, where padding is masked and positions count from the prompt's
own start, so a prompt's continuation does not depend on its neighbours: neither greedily, nor drawn with a generator of
its own. (Up to rounding: matrix products of other sizes may round differently.)

Letters: B batch, L sequence, V vocabulary, K candidates.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from modules.config import ModelConfig
from modules.errors import InputError
from modules.layers.attention import KVCache
from modules.layers.transformer import Transformer

Stop = Callable[[int, list[int]], bool]
"""Asked after each new token with the prompt's index and its new tokens so far; True ends that continuation."""
Randomness = torch.Generator | Sequence[torch.Generator]
"""One generator that all rows of a batch draw from, or one for each row: then no row's draws depend on another."""
_PADDING = 0  # any id will do: it is masked


def sample(
    logits_BV: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Randomness | None = None,
) -> Tensor:
    """Draw one token id per row [B] from softmax(logits / temperature).

    Args:
        logits_BV: scores over the vocabulary.
        temperature: 0 takes the largest logit (the first one of a tie).
        top_k: draw among the k most likely tokens; more than V means all.
        top_p: draw among the most likely tokens that together reach this probability (arXiv 1904.09751), after `top_k`.
        generator: where randomness comes from, on the logits' device: one for all rows, or one for each row; torch's
            global one when left out.

    Raises:
        InputError: temperature < 0 or not finite, top_k < 1, top_p outside (0, 1]; logits to draw from that are not
            finite.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    num_candidates = min(top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    # float64 and the largest logit as zero: no temperature above 0 can then overflow
    candidates_BK, ids_BK = logits_BV.double().topk(num_candidates, dim=-1)
    if not candidates_BK[:, 0].isfinite().all():
        raise InputError(
            f"the model's logits in {logits_BV.dtype} are not finite; run it in float32, or use a sound checkpoint"
        )
    probabilities_BK = ((candidates_BK - candidates_BK[:, :1]) / temperature).softmax(dim=-1)
    if top_p is not None:
        mass_before_BK = probabilities_BK.cumsum(dim=-1) - probabilities_BK
        # the most likely token always stays: rounding may leave a hair of mass before it
        outside_BK = mass_before_BK >= top_p
        outside_BK[:, 0] = False
        probabilities_BK = probabilities_BK.masked_fill(outside_BK, 0.0)
    return ids_BK.gather(-1, _choose(probabilities_BK, generator))[:, 0]


def _choose(probabilities_BK: Tensor, generator: Randomness | None) -> Tensor:
    """One place [B, 1] per row, drawn by its probability."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.multinomial(probabilities_BK, num_samples=1, generator=generator)
    rows = zip(probabilities_BK, generator, strict=True)
    return torch.stack([torch.multinomial(row_K, num_samples=1, generator=own) for row_K, own in rows])


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
    end_ids: Collection[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Randomness | None = None,
    stop: Stop | None = None,
    before_step: Callable[[], object] | None = None,
) -> Iterator[list[int | None]]:
    """Continue every prompt, one token per step; arguments are checked at once, before the first step is asked for.

    Args:
        network: the model, in eval mode and on the device where it shall run; no gradient is recorded.
        prompts: token ids, at least one each, taken as they are: see `begin`.
        max_new_tokens: steps at most.
        end_ids: each of them ends a continuation when it is drawn; with none, only length and `stop` do.
        temperature: as in `sample`, like `top_k` and `top_p`.
        generator: one for all prompts, or one for each: a prompt then draws the same alone and in any batch.
        stop: may end a continuation earlier; the token after which it says so still belongs to the continuation.
        before_step: called in front of each forward pass, where others run the network in step.

    Returns:
        An iterator over steps. A step holds the new token of each prompt in the prompts' order, None for those that
        have ended; an end token is never among them. It ends when all have ended.

    Raises:
        InputError: what `check_sampling` and `check_prompt` refuse, or another number of generators than of prompts.
    """
    check_sampling(temperature, top_k, top_p)
    for prompt in prompts:
        check_prompt(prompt, max_new_tokens, network.config)
    if isinstance(generator, Sequence) and len(generator) != len(prompts):
        raise InputError(f"{len(generator)} generators for {len(prompts)} prompts; give one for each, or one for all")
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p)
    ends = frozenset(end_ids)
    return _decode(network, prompts, max_new_tokens, ends, draw, generator, stop, before_step) if prompts else iter(())


def complete(
    network: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Collection[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Randomness | None = None,
    stop: Stop | None = None,
    before_step: Callable[[], object] | None = None,
) -> list[list[int]]:
    """The whole continuation of every prompt, without prompt and end token; arguments as in `generate`."""
    continuations: list[list[int]] = [[] for _ in prompts]
    steps = generate(
        network,
        prompts,
        max_new_tokens=max_new_tokens,
        end_ids=end_ids,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
        stop=stop,
        before_step=before_step,
    )
    for step in steps:
        for continuation, token in zip(continuations, step, strict=True):
            if token is not None:
                continuation.append(token)
    return continuations


def begin(prompt: Sequence[int], begin_ids: Sequence[int]) -> list[int]:
    """The prompt as a model expects it: with `begin_ids` in front, unless it begins with them already.

    For growmoe's own models that is one end-of-text token, which begins each document in training; for others what
    their tokenizer puts in front of a text, which may be nothing.
    """
    begins = list(prompt[: len(begin_ids)]) == list(begin_ids)
    return list(prompt) if begins else [*begin_ids, *prompt]


def check_prompt(prompt: Sequence[int], max_new_tokens: int, config: ModelConfig) -> None:
    """Raise `InputError` for a prompt that cannot be continued so far: empty, too long, or with wrong ids."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1; ask for one token or more")
    if not prompt:
        raise InputError(
            "a prompt of 0 tokens has nothing to go on from, and this model puts no token in front; write some text"
        )
    room = config.max_seq_len - len(prompt)
    if max_new_tokens > room:
        fix = f"set max_new_tokens <= {room}" if room > 0 else f"shorten the prompt below {config.max_seq_len} tokens"
        raise InputError(
            f"a prompt of {len(prompt)} tokens (begin tokens included) and max_new_tokens={max_new_tokens} are more "
            f"than the model's max_seq_len={config.max_seq_len}; {fix}"
        )
    wrong = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
    if wrong is not None:
        raise InputError(
            f"token id {wrong} of a prompt is outside the model's vocabulary of {config.vocab_size}; "
            "encode the prompt with the tokenizer that the model was trained with"
        )


@torch.no_grad()
def _decode(
    network: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: frozenset[int],
    draw: Callable[..., Tensor],
    generator: Randomness | None,
    stop: Stop | None,
    before_step: Callable[[], object] | None,
) -> Iterator[list[int | None]]:
    weight = next(network.parameters())
    longest = max(map(len, prompts))
    start_B = torch.tensor([longest - len(prompt) for prompt in prompts], device=weight.device)
    cache = KVCache(network.config, len(prompts), longest + max_new_tokens, weight.device, weight.dtype, start_B)
    next_BL = [[_PADDING] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    running = list(range(len(prompts)))  # which prompt each row of the cache continues
    written: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        if before_step is not None:
            before_step()
        hidden_BLD, _ = network(torch.tensor(next_BL, device=weight.device), cache=cache)
        own = [generator[row] for row in running] if isinstance(generator, Sequence) else generator
        drawn = draw(network.logits(hidden_BLD[:, -1]), generator=own).tolist()
        step: list[int | None] = [None] * len(prompts)
        going_on = []
        for place, (row, token) in enumerate(zip(running, drawn, strict=True)):
            if token in end_ids:
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
