"""A network as lm-eval sees a model: the adapter that answers its requests, on any number of processes.

Importing this file imports lm-eval (seconds): do it where an evaluation begins, not at a program's start.
`transformers` is not needed and not imported.

Letters: L sequence, D model, N scored positions, Q asked tokens.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from callbacks.evaluation.batching import Batch, Plans, Request, distinct_rows, plan_batches
from callbacks.evaluation.company import Company
from callbacks.evaluation.lending import Lender, Scored
from callbacks.evaluation.text_side import TextSide
from modules.errors import InputError
from modules.generation import complete
from modules.layers.transformer import Transformer

FEWSHOT_SEED = 1234
"""lm-eval's own default: the shots are the same in every evaluation"""
LOGIT_ELEMENTS = 2**24
"""numbers in the logits that exist at one time (64 MiB in float32)"""
ENCODE_CHUNK = 4096
"""requests that are tokenized together"""

Progress = Callable[[float], None]
"""Told which part of a kind of requests is answered, from 0 to 1."""


class HarnessLM(TemplateLM):
    """A network and its tokenizer as lm-eval sees a model.

    Rows are shared and batched as `batching` says; a context that is too long loses its beginning, as in lm-eval's own
    models. Several processes share batches out, stay in step, and have all answers in the end; lm-eval itself believes
    that there is one process.

    Args:
        network: a `Transformer` in eval mode.
        text: its tokenizer, and what it expects in front of a text.
        max_batch_tokens: tokens of a forward pass, a single longer row excepted; with padding and what is lent to them,
            rows take up to `KEYS_PER_TOKEN` times as many keys.
        company: the processes that evaluate together; only this one when left out.
        plans: of former evaluations.
        on_progress: told how far this process is.
    """

    def __init__(
        self,
        network: Transformer,
        text: TextSide,
        max_batch_tokens: int = 8192,
        company: Company | None = None,
        plans: Plans | None = None,
        on_progress: Progress = lambda part: None,
    ) -> None:
        super().__init__()
        if max_batch_tokens < 1:
            raise InputError(f"max_batch_tokens={max_batch_tokens} must be at least 1; 8192 is a good start")
        self.network = network
        self.text = text
        self.tokenizer = text.tokenizer
        self.max_batch_tokens = max_batch_tokens
        self.company = company or Company(network)
        self.plans = plans or Plans()
        self.on_progress = on_progress
        self._device = next(network.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        return self.text.prefix

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
        pairs = [request.args for request in requests]
        text = (self.tokenizer_name, self.text.begins, self.prefix_token_id)
        key = (text, self.max_batch_tokens, self.max_length)
        return self._answers(len(pairs), self.plans.get(key, pairs, lambda: self._plan(self._encode_pairs(pairs))))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each whole text, in windows of the model's length; each token is predicted once.

        What stands in front of a text is predicted too, behind itself, as by lm-eval's own models.
        """
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = [*self.text.begins, *self.tok_encode(request.args[0])]
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

    # -- likelihoods ---------------------------------------------------------------------------------------------------

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Ids of contexts and continuations, split as `TemplateLM._encode_pair` does: spaces go to the continuation.

        Held as uint32: the requests of MMLU with shots are 59 million tokens.
        """
        encoded: list[Request] = []
        for start in range(0, len(pairs), ENCODE_CHUNK):
            encoded += self._encode_some(pairs[start : start + ENCODE_CHUNK])
        return encoded

    def _encode_some(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        contexts = [context.rstrip() for context, _ in pairs]
        wholes = [context + continuation for context, continuation in pairs]
        texts = list(dict.fromkeys([*contexts, *wholes]))
        ids = dict(zip(texts, (np.asarray(x, np.uint32) for x in self.tokenizer.encode_batch(texts)), strict=True))
        begins = np.asarray(self.text.begins, np.uint32)
        empty = np.asarray([self.prefix_token_id], np.uint32)
        begun = {text: np.concatenate([begins, ids[text]]) if len(ids[text]) else empty for text in set(contexts)}
        return [
            (pair, begun[context], ids[whole][len(ids[context]) :])
            for pair, context, whole in zip(pairs, contexts, wholes, strict=True)
        ]

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Score continuations after contexts that already hold their begin token."""
        return self._answers(len(requests), self._plan(requests))

    def _plan(self, requests: Sequence[Request]) -> list[Batch]:
        return plan_batches(distinct_rows(requests, self.max_length), self.max_batch_tokens)

    def _answers(self, number: int, batches: Sequence[Batch]) -> list[tuple[float, bool]]:
        """What so many requests score; an empty continuation is certain."""
        answer_2Q = torch.zeros(2, number, dtype=torch.float64)
        world = self.company.world
        mine = batches[world.data_rank :: world.data_ranks]
        total, done = sum(batch.num_tokens for batch in mine), 0
        lender = Lender(self.network, self.company, self._device)
        for batch in mine:
            self._score(batch, lender, answer_2Q)
            done += batch.num_tokens
            self.on_progress(done / total)
        self.company.finish()
        log_probs, wrong = world.sum_over_data(answer_2Q.to(self._device)).cpu()
        return list(zip(log_probs.tolist(), (wrong == 0).tolist(), strict=True))

    def _score(self, batch: Batch, lender: Lender, answer_2Q: Tensor) -> None:
        """Fill in, for each request of a batch, its log-probability, and 1 where greedy decoding would differ."""
        begun_TD, own_TD = lender.run(batch)
        scored = Scored(batch)
        positions, targets, requests = [], [], []
        for row, places in zip(batch.rows, scored.places_of_row, strict=True):
            for index, continuation in row.requests:
                positions.append(places[len(places) - len(continuation) :])
                targets.append(continuation.astype(np.int64))
                requests.append((index, len(continuation)))
        log_prob_Q, greedy_Q = self._head(
            scored.pick(begun_TD, own_TD),
            torch.from_numpy(np.concatenate(positions)),
            torch.from_numpy(np.concatenate(targets)),
        )
        start = 0
        for index, length in requests:
            asked = slice(start, start + length)
            answer_2Q[0, index] = log_prob_Q[asked].sum()
            answer_2Q[1, index] = float(not greedy_Q[asked].all())
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
            greedy_Q[here_Q] = (logits.max(dim=-1).indices[rows] == targets).cpu()
            log_prob_Q[here_Q] = logits.log_softmax(dim=-1)[rows, targets].double().cpu()
        return log_prob_Q, greedy_Q

    # -- generation ----------------------------------------------------------------------------------------------------

    def _continue(self, contexts: Sequence[str], gen_kwargs: dict[str, Any]) -> list[str]:
        """Texts generated after contexts with the same settings, longest contexts first, batched under the budget."""
        settings = normalize_gen_kwargs(gen_kwargs)
        stops = [stop for stop in settings["until"] if stop]
        max_new_tokens = settings["max_gen_toks"]
        if max_new_tokens >= self.max_length:  # a task may ask for more than the model has
            max_new_tokens = self.max_length // 2
        room = self.max_length - max_new_tokens
        encoded = self.tokenizer.encode_batch(list(contexts))
        prompts = [[*self.text.begins, *ids][-room:] or [self.prefix_token_id] for ids in encoded]
        tokens_QL = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64)  # ids + 1; 0: no token
        world = self.company.world
        batches = list(self._prompt_batches(prompts, max_new_tokens))
        mine = batches[world.data_rank :: world.data_ranks]
        for number, chosen in enumerate(mine, start=1):
            continuations = complete(
                self.network,
                [prompts[index] for index in chosen],
                max_new_tokens=max_new_tokens,
                end_ids=self.text.ends,
                temperature=settings["temperature"] if settings["do_sample"] else 0.0,
                top_k=settings.get("top_k") or None,
                top_p=settings.get("top_p"),
                generator=[torch.Generator(self._device).manual_seed(FEWSHOT_SEED + index) for index in chosen],
                stop=lambda _, tokens: self._has_stopped(tokens, stops),
                before_step=self.company.before_forward,
            )
            for index, tokens in zip(chosen, continuations, strict=True):
                tokens_QL[index, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64) + 1
            self.on_progress(number / len(mine))
        self.company.finish()
        rows = world.sum_over_data(tokens_QL.to(self._device)).tolist()
        texts = (self.tokenizer.decode([token - 1 for token in row if token]) for row in rows)
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _prompt_batches(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[list[int]]:
        """The places of prompts that are continued together, the longest first."""
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        start = 0
        while start < len(order):
            count = max(1, self.max_batch_tokens // (len(prompts[order[start]]) + max_new_tokens))
            yield order[start : start + count]
            start += count

    def _has_stopped(self, tokens: Sequence[int], stops: Sequence[str]) -> bool:
        """Whether a stop string ends in the last token. A token spells a byte or more, so the tail is long enough."""
        longest = max((len(stop.encode()) for stop in stops), default=0)
        tail = self.tokenizer.decode(list(tokens[-longest - 4 :])) if stops else ""
        return any(stop in tail for stop in stops)
