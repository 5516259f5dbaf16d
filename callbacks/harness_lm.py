"""A network as lm-eval sees a model: the adapter that answers its requests.

Importing this file imports lm-eval (seconds): do it where an evaluation begins, not at a program's start.
`transformers` is not needed and not imported.

Letters: B batch, L sequence, D model, N scored positions, Q asked tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from modules.errors import InputError
from modules.generation import begin, complete
from modules.layers.transformer import Transformer

FEWSHOT_SEED = 1234
"""lm-eval's own default: the shots are the same in every evaluation"""
LOGIT_ELEMENTS = 2**24
"""numbers in the logits that exist at one time (64 MiB in float32)"""
ENCODE_CHUNK = 4096
"""requests that are tokenized together"""

Request = tuple[tuple[str, ...], Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]
"""Texts, and the ids of context and continuation: lm-eval's own order."""


@dataclass
class _Row:
    """One forward row: its input ids, how many of its last predictions are asked for, and by which requests."""

    inputs: np.ndarray
    num_scored: int = 0
    requests: list[tuple[int, np.ndarray]] = field(default_factory=list)


class HarnessLM(TemplateLM):
    """A network and its tokenizer as lm-eval sees a model.

    Every context begins with one token: end-of-text, as every document does in training, unless told another. Requests
    that share context and continuation up to its last token share one forward row: the answers A, B, C, D of a question
    cost one. A context that is too long loses its beginning, as in lm-eval's own models.

    Args:
        network: a `Transformer` in eval mode.
        tokenizer: with `encode`, `encode_batch`, `decode`, `eos_id` and `sha256`.
        max_batch_tokens: tokens of one forward pass, padding included; a single longer row is still evaluated.
        begin_id: what begins every context; the tokenizer's end-of-text token when left out.
        end_ids: each of them ends a generated text; likewise.
    """

    def __init__(
        self,
        network: Transformer,
        tokenizer: Any,
        max_batch_tokens: int = 8192,
        begin_id: int | None = None,
        end_ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if max_batch_tokens < 1:
            raise InputError(f"max_batch_tokens={max_batch_tokens} must be at least 1; 8192 is a good start")
        self.network = network
        self.tokenizer = tokenizer
        self.max_batch_tokens = max_batch_tokens
        self._device = next(network.parameters()).device
        self._begin_id = tokenizer.eos_id if begin_id is None else begin_id
        self._end_ids = [tokenizer.eos_id] if end_ids is None else list(end_ids)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What begins every context."""
        return self._begin_id

    @property
    def max_length(self) -> int:
        """Tokens that the network accepts."""
        return self.network.config.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        """A name that changes with the tokenizer."""
        return self.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would produce it."""
        encoded = []
        for start in range(0, len(requests), ENCODE_CHUNK):
            encoded += self._encode_pairs([request.args for request in requests[start : start + ENCODE_CHUNK]])
        return self._loglikelihood_tokens(encoded)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each whole text, in windows of the model's length; each token is predicted once."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((request.args, *make_disjoint_window(pair)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_prob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continue each context until a stop string, the end of text or its number of tokens; the stop is cut off."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        texts = [""] * len(requests)
        for indices in groups.values():
            contexts = [requests[index].args[0] for index in indices]
            for index, text in zip(indices, self._continue(contexts, requests[indices[0]].args[1]), strict=True):
                texts[index] = text
        return texts

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Ids of contexts and continuations, split as `TemplateLM._encode_pair` does: spaces go to the continuation.

        Held as uint32: the requests of MMLU with shots are 59 million tokens.
        """
        contexts = [context.rstrip() for context, _ in pairs]
        wholes = [context + continuation for context, continuation in pairs]
        texts = list(dict.fromkeys([*contexts, *wholes]))
        ids = dict(zip(texts, (np.asarray(x, np.uint32) for x in self.tokenizer.encode_batch(texts)), strict=True))
        begin = np.asarray([self.prefix_token_id], np.uint32)
        return [
            (pair, np.concatenate([begin, ids[context]]), ids[whole][len(ids[context]) :])
            for pair, context, whole in zip(pairs, contexts, wholes, strict=True)
        ]

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Score continuations after contexts that already hold their begin token."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # what an empty continuation scores
        rows = _shared_rows(requests, self.max_length)
        rows.sort(key=lambda row: -len(row.inputs))
        start = 0
        while start < len(rows):
            count = max(1, self.max_batch_tokens // len(rows[start].inputs))
            self._score_rows(rows[start : start + count], answers)
            start += count
        return answers

    def _score_rows(self, rows: Sequence[_Row], answers: list[tuple[float, bool]]) -> None:
        """One forward pass over rows padded on the right (which causal attention does not see); fills `answers`."""
        padded_BL = np.full((len(rows), max(len(row.inputs) for row in rows)), self.eot_token_id, np.int64)
        for place, row in enumerate(rows):
            padded_BL[place, : len(row.inputs)] = row.inputs
        hidden_BLD, _ = self.network(torch.from_numpy(padded_BL).to(self.device), decoding=True)
        scored = [
            hidden_BLD[place, len(row.inputs) - row.num_scored : len(row.inputs)] for place, row in enumerate(rows)
        ]
        positions, targets, lengths = [], [], []
        end = 0
        for row in rows:
            end += row.num_scored
            for index, continuation in row.requests:
                positions.append(np.arange(end - len(continuation), end))
                targets.append(continuation.astype(np.int64))
                lengths.append((index, len(continuation)))
        log_prob_Q, greedy_Q = self._head(
            torch.cat(scored), torch.from_numpy(np.concatenate(positions)), torch.from_numpy(np.concatenate(targets))
        )
        start = 0
        for index, length in lengths:
            asked = slice(start, start + length)
            answers[index] = (log_prob_Q[asked].sum().item(), bool(greedy_Q[asked].all()))
            start += length

    def _head(self, hidden_ND: Tensor, positions_Q: Tensor, targets_Q: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability (float64) of each target at its position, and whether it is the likeliest token there."""
        log_prob_Q = torch.zeros(len(targets_Q), dtype=torch.float64)
        greedy_Q = torch.zeros(len(targets_Q), dtype=torch.bool)
        chunk = max(1, LOGIT_ELEMENTS // self.network.config.vocab_size)
        for start in range(0, len(hidden_ND), chunk):
            logits = self.network.logits(hidden_ND[start : start + chunk])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            here_Q = (positions_Q >= start) & (positions_Q < start + chunk)
            rows = (positions_Q[here_Q] - start).to(logits.device)
            targets = targets_Q[here_Q].to(logits.device)
            log_prob_Q[here_Q] = (logits[rows, targets] - logits.logsumexp(dim=-1)[rows]).double().cpu()
            greedy_Q[here_Q] = (logits.argmax(dim=-1)[rows] == targets).cpu()
        return log_prob_Q, greedy_Q

    def _continue(self, contexts: Sequence[str], gen_kwargs: dict[str, Any]) -> list[str]:
        """Texts generated after contexts with the same settings, longest contexts first, batched under the budget."""
        settings = normalize_gen_kwargs(gen_kwargs)
        stops = [stop for stop in settings["until"] if stop]
        # half of a short window stays for the context: a task may ask for more tokens than the model has
        max_new_tokens = min(settings["max_gen_toks"], self.max_length // 2)
        room = self.max_length - max_new_tokens - 1
        prompts = [ids[max(0, len(ids) - room) :] for ids in self.tokenizer.encode_batch(list(contexts))]
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        texts = [""] * len(prompts)
        start = 0
        while start < len(order):
            count = max(1, self.max_batch_tokens // (len(prompts[order[start]]) + 1 + max_new_tokens))
            chosen = order[start : start + count]
            continuations = complete(
                self.network,
                [begin(prompts[index], [self.prefix_token_id]) for index in chosen],
                max_new_tokens=max_new_tokens,
                end_ids=self._end_ids,
                temperature=settings["temperature"] if settings["do_sample"] else 0.0,
                top_k=settings.get("top_k") or None,
                top_p=settings.get("top_p"),
                generator=torch.Generator(self.device).manual_seed(FEWSHOT_SEED + start),
                stop=lambda _, tokens: self._has_stopped(tokens, stops),
            )
            for index, tokens in zip(chosen, continuations, strict=True):
                texts[index] = postprocess_generated_text(self.tokenizer.decode(tokens), stops, None)
            start += count
        return texts

    def _has_stopped(self, tokens: Sequence[int], stops: Sequence[str]) -> bool:
        """Whether a stop string ends in the last token. A token spells a byte or more, so the tail is long enough."""
        longest = max((len(stop.encode()) for stop in stops), default=0)
        tail = self.tokenizer.decode(list(tokens[-longest - 4 :])) if stops else ""
        return any(stop in tail for stop in stops)


def _shared_rows(requests: Sequence[Request], max_length: int) -> list[_Row]:
    """One row per distinct input; a request's answers come from the last positions of its row."""
    rows: dict[bytes, _Row] = {}
    for index, (_, context, continuation) in enumerate(requests):
        if len(continuation) == 0:
            continue
        if len(continuation) > max_length:
            raise InputError(
                f"a continuation of {len(continuation)} tokens is longer than the model's max_seq_len={max_length}; "
                "leave this task out, or evaluate a model with a longer window"
            )
        asked = np.asarray(continuation, np.uint32)
        inputs = np.concatenate([np.asarray(context, np.uint32), asked[:-1]])[-max_length:]
        row = rows.setdefault(inputs.tobytes(), _Row(inputs))
        row.num_scored = max(row.num_scored, len(asked))
        row.requests.append((index, asked))
    return list(rows.values())
