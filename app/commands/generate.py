"""`growmoe generate MODEL [PROMPT]`: continue a text, shown as it is written, or a file of prompts."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.device import choose_device
from app.outputs import check_new_output
from app.prompts import Prompt, new_file, read_prompts
from modules.errors import InputError, require_positive

if TYPE_CHECKING:
    from app.loading import LoadedModel
    from app.text_stream import TextStream

DEFAULT_NEW_TOKENS = 256
BATCHES_SORTED_TOGETHER = 32
"""of a prompt file: their prompts are sorted by length, and written when they are done"""


def generate(
    model_and_prompt: list[str],
    *,
    prompts: Path | None = None,
    output: Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: str | list[str] = "",
    seed: int = 0,
    special_tokens: bool = False,
    tokenizer: Path | None = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Continue a prompt, shown as it is written, or every prompt of a file, as JSON Lines.

    Args:
        model_and_prompt: MODEL, the directory of a checkpoint such as RUN/checkpoints/step-00000300 or of a Hugging
            Face model, and PROMPT, the text to continue, in any language; it may be "". Without PROMPT, --prompts
            names a file of them.
        prompts: a file of prompts, .txt with one on each line that is not empty, or .jsonl with objects that have a
            "prompt". For each, in the file's order, one line of JSON comes out with prompt, continuation, num_tokens,
            and finish, which is "end", "stop" or "length".
        output: write these lines to this file, which must not exist yet, instead of to standard output.
        batch_size: prompts of a file that are continued together.
        max_new_tokens: tokens at most; when left out, 256 or what the model's window leaves.
        temperature: how much chance decides; 0 always takes the likeliest token.
        top_k: draw among so many of the likeliest tokens only.
        top_p: draw among the likeliest tokens that together reach this probability only.
        stop: end before this string. For several, write --stop A --stop+ B, or a list like '["\\n\\n", "Question:"]',
            where escapes stand for line breaks; in a string by itself the shell makes them, as in $'\\n'. One that is
            a special token of the tokenizer, such as '<|im_end|>', ends the text where the model writes that token.
        seed: the same seed gives the same text. The first prompt of a file draws with it, the next with seed + 1, and
            so on, so that each is continued as it would be alone.
        special_tokens: take special tokens that a prompt spells, such as chat markup, as those tokens, not as text.
        tokenizer: a tokenizer.json to use instead of the model's own.
        device: where the model runs, such as cpu or cuda; auto takes a GPU if there is one.
        dtype: the type of numbers the model computes in.
    """
    import torch

    from app.loading import load_model
    from modules.generation import check_sampling

    stops = tuple(text for text in ([stop] if isinstance(stop, str) else stop) if text)
    settings = _Settings(max_new_tokens, temperature, top_k, top_p, stops, seed)
    check_sampling(temperature, top_k, top_p)
    _check(settings, batch_size)
    path, asked = _read_request(model_and_prompt, prompts, output)
    target = choose_device(device)
    model = load_model(path, getattr(torch, dtype), tokenizer)
    tasks = _encode(asked, model, settings, special_tokens)
    model = _ending_at_special_tokens(model, stops)
    model.network.to(target)
    if prompts is None:
        _show(model, tasks[0], settings)
    else:
        _continue_file(model, tasks, settings, batch_size, output)


@dataclass(frozen=True)
class _Settings:
    """How prompts are continued."""

    max_new_tokens: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    stops: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class _Task:
    """A prompt as the model sees it, and what it draws with."""

    prompt: Prompt
    ids: list[int]
    max_new_tokens: int
    seed: int


def _check(settings: _Settings, batch_size: int) -> None:
    require_positive(batch_size=batch_size)
    if settings.max_new_tokens is not None:
        require_positive(max_new_tokens=settings.max_new_tokens)
    if not 0 <= settings.seed < 2**62:
        raise InputError(f"seed={settings.seed} is out of range; choose a number from 0 to 2^62")


def _read_request(words: list[str], file: Path | None, output: Path | None) -> tuple[Path, list[Prompt]]:
    """The model's directory and the prompts, from PROMPT or from the file."""
    path, *texts = words
    if len(texts) > 1:
        raise InputError(f"{len(texts)} prompts given ({texts[1][:40]!r} is the second); put quotes around a prompt")
    if (file is None) == (not texts):
        count = "both" if texts else "neither"
        raise InputError(f"PROMPT and prompts: {count} given; give a text to continue, or --prompts FILE")
    if file is None:
        if output is not None:
            raise InputError(f"output={output} is for a file of prompts; give --prompts FILE, or redirect with >")
        return Path(path), [Prompt(texts[0], "")]
    if output is not None:
        check_new_output(output)
    return Path(path), read_prompts(file)


def _encode(asked: list[Prompt], model: "LoadedModel", settings: _Settings, special_tokens: bool) -> list[_Task]:
    """Every prompt's ids, begin tokens included, checked before the model runs."""
    from modules.generation import begin, check_prompt

    if model.tokenizer is None:
        raise InputError("the model has no tokenizer of its own; give one with --tokenizer FILE (a tokenizer.json)")
    config, tasks = model.network.config, []
    for index, prompt in enumerate(asked):
        ids = begin(model.tokenizer.encode(prompt.text, special_tokens=special_tokens), model.begin_ids)
        limit = settings.max_new_tokens or max(1, min(DEFAULT_NEW_TOKENS, config.max_seq_len - len(ids)))
        try:
            check_prompt(ids, limit, config)
        except InputError as error:
            raise InputError(f"{prompt.where}{error}") from None
        tasks.append(_Task(prompt, ids, limit, settings.seed + index))
    return tasks


def _ending_at_special_tokens(model: "LoadedModel", stops: tuple[str, ...]) -> "LoadedModel":
    """The model, whose texts end also at the special tokens among the stop strings: decoding leaves these out."""
    assert model.tokenizer is not None, "checked before"
    found = [model.tokenizer.special_id(stop) for stop in stops]
    return replace(model, end_ids=[*model.end_ids, *(index for index in found if index is not None)])


def _show(model: "LoadedModel", task: _Task, settings: _Settings) -> None:
    """Write one continuation to standard output while it is made; what is there stays when it is interrupted."""
    (stream,), steps = _start(model, [task], settings)
    try:
        for _ in steps:
            sys.stdout.write(stream.take())
            sys.stdout.flush()
        sys.stdout.write(stream.close())
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()


def _continue_file(
    model: "LoadedModel", tasks: list[_Task], settings: _Settings, batch_size: int, output: Path | None
) -> None:
    """Write a line of JSON for each prompt, in the order of the prompts."""
    num_sorted = batch_size * BATCHES_SORTED_TOGETHER
    with new_file(output) as file:
        for start in range(0, len(tasks), num_sorted):
            part = tasks[start : start + num_sorted]
            records: dict[int, dict[str, Any]] = {}
            for batch in _batches(part, batch_size):
                streams, steps = _start(model, batch, settings)
                for _ in steps:
                    pass
                records.update({task.seed: _record(task, made) for task, made in zip(batch, streams, strict=True)})
            for task in part:
                file.write(json.dumps(records[task.seed], ensure_ascii=False) + "\n")
            file.flush()


def _batches(tasks: Sequence[_Task], batch_size: int) -> Iterator[list[_Task]]:
    """The longest prompts first, those of a batch of similar length and with the same number of tokens to come."""
    longest_first = sorted(tasks, key=lambda task: -len(task.ids))
    for _, alike in groupby(longest_first, key=lambda task: task.max_new_tokens):
        rest = list(alike)
        yield from (rest[start : start + batch_size] for start in range(0, len(rest), batch_size))


def _start(
    model: "LoadedModel", tasks: Sequence[_Task], settings: _Settings
) -> tuple[list["TextStream"], Iterator[list[int | None]]]:
    """The texts of some prompts, which grow with every step that is taken."""
    import torch

    from app.text_stream import TextStream
    from modules.generation import generate as decode

    assert model.tokenizer is not None, "checked before"
    device = next(model.network.parameters()).device
    streams = [TextStream(model.tokenizer.decode, task.ids, settings.stops) for task in tasks]
    steps = decode(
        model.network,
        [task.ids for task in tasks],
        max_new_tokens=tasks[0].max_new_tokens,
        end_ids=model.end_ids,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        generator=[torch.Generator(device).manual_seed(task.seed) for task in tasks],
        stop=lambda row, new: streams[row].add(new[-1]),
    )
    return streams, steps


def _record(task: _Task, made: "TextStream") -> dict[str, Any]:
    finish = "stop" if made.stopped else "length" if made.num_tokens == task.max_new_tokens else "end"
    return {
        "prompt": task.prompt.text,
        "continuation": made.close(),
        "num_tokens": made.num_tokens,
        "finish": finish,
    }
