"""Our adapter against lm-eval's own for transformers, request for request, on official tasks and real data."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from app.loading import load_model, text_side
from callbacks.evaluation.suites import Suite
from callbacks.evaluation.tasks import Source, load_tasks, preserved_random_state

transformers = pytest.importorskip("transformers")
hflm = pytest.importorskip("lm_eval.models.huggingface")
from callbacks.evaluation.harness import Harness  # noqa: E402
from callbacks.evaluation.model import FEWSHOT_SEED, HarnessLM  # noqa: E402

DATA = os.environ.get("GROWMOE_DATA")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(DATA is None, reason="needs the evaluation mirror of GROWMOE_DATA")]
LIMIT = 50
SHOTS = {
    "arc_easy": 0,
    "hellaswag": 0,
    "lambada_openai": 0,
    "triviaqa": 1,
    "mmlu_abstract_algebra": 5,
    "mmlu_anatomy": 5,
    "mmlu_astronomy": 5,
    "gsm8k": 8,
    "cmmlu_agronomy": 5,
    "cmmlu_anatomy": 5,
    "cmmlu_arts": 5,
}
FOLDERS = ("arc", "hellaswag", "lambada", "triviaqa", "mmlu", "gsm8k", "cmmlu")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.fixture(scope="module", params=["begins", "begins not"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model whose tokenizer puts a token in front of texts, and one with experts whose tokenizer does not."""
    path = tmp_path_factory.mktemp("model")
    inner = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{DATA}/tokenizer_16k.json", bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    special = {"bos_token_id": inner.bos_token_id, "eos_token_id": inner.eos_token_id, "pad_token_id": None}
    torch.manual_seed(0)
    model: Any
    if request.param == "begins":
        from tokenizers.processors import TemplateProcessing

        begin = inner.bos_token_id
        front = TemplateProcessing(single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", begin)])
        inner.backend_tokenizer.post_processor = front
        config = transformers.LlamaConfig(**SIZES, **special, vocab_size=len(inner))
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, **special, vocab_size=len(inner))
        model = transformers.Qwen3MoeForCausalLM(config)
    with torch.no_grad():  # the likeliest token is then not always the same
        model.lm_head.weight.normal_(std=0.5)
    model.save_pretrained(path)
    inner.save_pretrained(path)
    return path


def test_every_answer_is_that_of_lm_eval(directory: Path) -> None:
    """The same log-likelihoods, greedy flags and generated texts; scores follow from them.

    In float64 (transformers keeps rotary angles in float32): by chance a long ending has a log-likelihood of -600,
    which float32 knows to 1e-4.
    """
    suite = Suite("parity", tuple(SHOTS), SHOTS, folders=FOLDERS)
    loaded = load_tasks(suite, Source(mirror=Path(str(DATA)) / "eval_mirror"))
    model = load_model(directory, torch.float64)
    ours = HarnessLM(model.network, text_side(model, directory), max_batch_tokens=4096)
    with preserved_random_state():
        theirs = hflm.HFLM(
            pretrained=str(directory), dtype="float64", batch_size=16, device="cpu", experts_implementation="eager"
        )
    seen = set()
    for name, entry in loaded.by_name.items():
        (task,) = entry["tasks"].values()
        task.set_fewshot_seed(FEWSHOT_SEED)
        task.build_all_requests(limit=LIMIT, rank=0, world_size=1)
        kind = task.instances[0].request_type
        seen.add(kind)
        with torch.no_grad():
            found = getattr(ours, kind)(task.instances)
        expected = getattr(theirs, kind)(task.instances, disable_tqdm=True)
        assert len(found) == len(expected) == len(task.instances) >= LIMIT
        if kind == "generate_until":
            assert found == expected, name
            assert len(set(found)) > LIMIT // 2  # no single text for all
        else:
            for (log_prob, greedy), (their_log_prob, their_greedy) in zip(found, expected, strict=True):
                assert log_prob == pytest.approx(their_log_prob, abs=1e-4) and greedy == their_greedy, name
    assert seen == {"loglikelihood", "generate_until"}


def test_scores_are_those_of_lm_eval(directory: Path) -> None:
    from lm_eval import evaluator

    names = ("arc_easy", "triviaqa", "cmmlu_arts")
    suite = Suite("parity", names, {name: SHOTS[name] for name in names}, folders=FOLDERS)
    source = Source(mirror=Path(str(DATA)) / "eval_mirror")
    model = load_model(directory)
    text = text_side(model, directory)
    found = Harness(load_tasks(suite, source), text, limit=LIMIT).evaluate(model.network).results
    theirs = hflm.HFLM(pretrained=str(directory), dtype="float32", batch_size=16, device="cpu")
    for name, entry in load_tasks(suite, source).by_name.items():
        entry["tasks"][name].set_fewshot_seed(FEWSHOT_SEED)
        output = evaluator.evaluate(theirs, entry, limit=LIMIT, bootstrap_iters=0)
        for key, value in output["results"][name].items():
            if "," in key and "_stderr" not in key:
                assert found[name][key.removesuffix(",none")] == pytest.approx(value), (name, key)


def test_long_texts_are_those_of_lm_eval(directory: Path) -> None:
    """Texts longer than the window, whole, behind a continuation, and to be continued; windows are short here."""
    from lm_eval.api.instance import Instance

    record = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**record, "max_position_embeddings": 96}))
    try:
        model = load_model(directory, torch.float64)
        ours = HarnessLM(model.network, text_side(model, directory), max_batch_tokens=512)
        theirs = hflm.HFLM(
            pretrained=str(directory), dtype="float64", batch_size=2, device="cpu", experts_implementation="eager"
        )
    finally:
        (directory / "config.json").write_text(json.dumps(record))
    text = "The red house by the lake belongs to Ann, who likes tea. 王小明住在湖边的红房子里，喜欢喝茶。" * 12

    def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
        return [Instance(kind, {}, argument, 0, ("task", number, 1)) for number, argument in enumerate(arguments)]

    texts = [(text,), (text[:200],), ("Ann",), (text[:600],)]
    pairs = [(text, " Ann"), (text[:50], text[50:190]), ("", "Ann"), ("Ann ", "likes tea"), (text, " Bob and Ann")]
    settings = {"until": ["湖", "lake"], "max_gen_toks": 60, "do_sample": False}
    prompts = [(text, settings), (text[:300], settings), ("Ann", settings), (text, {**settings, "max_gen_toks": 20})]
    with torch.no_grad():
        rolled = ours.loglikelihood_rolling(ask("loglikelihood_rolling", *texts))
        scored = ours.loglikelihood(ask("loglikelihood", *pairs))
        written = ours.generate_until(ask("generate_until", *prompts))
    assert rolled == pytest.approx(
        theirs.loglikelihood_rolling(ask("loglikelihood_rolling", *texts), disable_tqdm=True), abs=1e-4
    )
    for (score, greedy), (their_score, their_greedy) in zip(
        scored, theirs.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True), strict=True
    ):
        assert score == pytest.approx(their_score, abs=1e-4) and greedy == their_greedy
    assert written == theirs.generate_until(ask("generate_until", *prompts), disable_tqdm=True)
