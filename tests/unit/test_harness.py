"""lm-eval's adapter against plain computation, and evaluations that repeat and leave no trace."""

import json
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.tokenizer import Tokenizer, train_tokenizer
from datamodules.world.generator import WorldConfig
from datamodules.world.tasks import write_world_tasks
from modules.config import ModelConfig
from modules.errors import InputError
from modules.layers.transformer import Transformer
from modules.moe_config import CapacityConfig, MoEConfig

pytest.importorskip("lm_eval")
HAD_TRANSFORMERS = "transformers" in sys.modules

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.metrics import mean_stderr  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402

from callbacks.evaluation import suites  # noqa: E402
from callbacks.evaluation.harness import Harness  # noqa: E402
from callbacks.evaluation.model import HarnessLM  # noqa: E402
from callbacks.evaluation.results import clean_metrics, headline  # noqa: E402
from callbacks.evaluation.suites import Suite, choose_suite, load_suite, suite_names  # noqa: E402
from callbacks.evaluation.tasks import LoadedTasks, Source, load_tasks, preserved_random_state  # noqa: E402
from callbacks.evaluation.text_side import TextSide  # noqa: E402

IMPORTS_TRANSFORMERS = "transformers" in sys.modules and not HAD_TRANSFORMERS

MAX_LEN = 48
TEXTS = ["Who lives in the red house? Ann. Bob lives by the lake, and Ann likes tea.", "谁住在红房子里？王小明。"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 4, 320)


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> HarnessLM:
    return HarnessLM(make_network(tokenizer, request.param), TextSide(tokenizer), max_batch_tokens=100)


def make_network(tokenizer: Tokenizer, kind: str = "dense", max_seq_len: int = MAX_LEN) -> Transformer:
    """Float64, so that batching and padding cannot hide behind rounding."""
    torch.manual_seed(0)
    tight = CapacityConfig(factor=0.5, at_evaluation=True)  # tasks are dropless all the same
    moe = MoEConfig(num_experts=4, capacity=tight) if kind == "moe" else None
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        dim=16,
        num_layers=2,
        num_heads=2,
        max_seq_len=max_seq_len,
        init_std=0.4,
        moe=moe,
    )
    return Transformer(config).double().eval()


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, argument, 0, ("task", number, 1)) for number, argument in enumerate(arguments)]


@torch.no_grad()
def score(network: Transformer, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """One request by itself: the log-probability of each token after all that is before it, in one plain forward."""
    tokens = [*context, *continuation][-(network.config.max_seq_len + 1) :]
    hidden_BLD, _ = network(torch.tensor([tokens[:-1]]), decoding=True)
    log_probs_LV = network.logits(hidden_BLD[0]).log_softmax(-1)[-len(continuation) :]
    targets_L = torch.tensor(continuation)
    total = log_probs_LV[torch.arange(len(continuation)), targets_L].sum().item()
    return total, bool((log_probs_LV.argmax(-1) == targets_L).all())


PAIRS = [
    ("Who lives in the red house?", " Ann"),
    ("Who lives in the red house?", " Bob lives by the lake"),
    ("Who lives in the red house?", " Bob lives by the river"),
    ("Who lives in the red house? ", "Ann"),  # the space goes to the continuation
    ("谁住在红房子里？", "王小明"),
    ("谁住在红房子里？", "王"),
    ("", "Ann likes tea"),
    ("", "王小明"),
    ("Ann. " * 40, "Bob"),  # longer than the model: loses its beginning
    ("tea", " and Ann likes tea" * 5),
]


def test_loglikelihood_equals_one_forward_per_request(model: HarnessLM, tokenizer: Tokenizer) -> None:
    found = model.loglikelihood(ask("loglikelihood", *PAIRS))
    for (context, continuation), answer in zip(PAIRS, found, strict=True):
        stripped = context.rstrip()
        context_ids = tokenizer.encode(stripped)
        continuation_ids = tokenizer.encode(context + continuation)[len(context_ids) :]
        expected = score(model.network, [tokenizer.eos_id, *context_ids], continuation_ids)
        assert answer[0] == pytest.approx(expected[0], abs=1e-10) and answer[1] == expected[1]


def test_greedy_flag_is_true_for_what_the_model_would_write(model: HarnessLM, tokenizer: Tokenizer) -> None:
    (written,) = model.generate_until(ask("generate_until", ("Who lives", {"until": [], "max_gen_toks": 4})))
    likely = [tokenizer.eos_id, *tokenizer.encode("Who lives")]
    with torch.no_grad():
        hidden_BLD, _ = model.network(torch.tensor([likely]), decoding=True)
    best = int(model.network.logits(hidden_BLD[0, -1]).argmax())
    answers = model._loglikelihood_tokens([(("", ""), likely, [best]), (("", ""), likely, [best - 1])])
    assert [greedy for _, greedy in answers] == [True, False] and written


def test_pairs_are_split_as_lm_eval_splits_them(model: HarnessLM, tokenizer: Tokenizer) -> None:
    for pair, (_, context, continuation) in zip(PAIRS, model._encode_pairs(PAIRS), strict=True):
        assert context[0] == tokenizer.eos_id
        if pair[0]:
            expected = TemplateLM._encode_pair(model, *pair)
            assert (context[1:].tolist(), continuation.tolist()) == expected


def test_requests_with_the_same_input_share_one_row(tokenizer: Tokenizer) -> None:
    network = make_network(tokenizer)
    model = HarnessLM(network, TextSide(tokenizer))
    shapes: list[tuple[int, ...]] = []
    network.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    question = "Who lives in the red house?"
    choices = ["A", "B", "C", "D"]
    assert all(len(tokenizer.encode(question + choice)) == len(tokenizer.encode(question)) + 1 for choice in choices)
    answers = model.loglikelihood(ask("loglikelihood", *[(question, choice) for choice in choices]))
    assert shapes == [(1, len(tokenizer.encode(question)) + 1)]
    assert len({log_prob for log_prob, _ in answers}) == 4


def test_requests_of_one_row_may_be_of_different_lengths(model: HarnessLM) -> None:
    split = [([1, 5], [6, 7, 8]), ([1, 5, 6, 7], [9]), ([1, 5, 6], [7, 8])]
    found = model._loglikelihood_tokens([(("", ""), *pair) for pair in split])
    assert [answer for answer, _ in found] == pytest.approx(
        [score(model.network, *pair)[0] for pair in split], abs=1e-10
    )


def test_rows_are_packed_under_the_budget(model: HarnessLM) -> None:
    shapes: list[tuple[int, ...]] = []
    hook = model.network.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    model.loglikelihood(ask("loglikelihood", *PAIRS))
    hook.remove()
    assert all(rows == 1 and length <= model.max_batch_tokens for rows, length in shapes)
    assert len(shapes) < len(PAIRS) / 2


@pytest.mark.parametrize("max_batch_tokens", [1, 10_000])
def test_padding_does_not_matter(model: HarnessLM, tokenizer: Tokenizer, max_batch_tokens: int) -> None:
    requests = ask("loglikelihood", *PAIRS)
    other = HarnessLM(model.network, TextSide(tokenizer), max_batch_tokens=max_batch_tokens)
    for first, second in zip(model.loglikelihood(requests), other.loglikelihood(requests), strict=True):
        assert first[0] == pytest.approx(second[0], abs=1e-10) and first[1] == second[1]


def test_logits_in_small_chunks_change_nothing(
    model: HarnessLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.loglikelihood(ask("loglikelihood", *PAIRS))
    monkeypatch.setattr("callbacks.evaluation.model.LOGIT_ELEMENTS", 3 * tokenizer.vocab_size)
    chunked = model.loglikelihood(ask("loglikelihood", *PAIRS))
    assert [x for x, _ in chunked] == pytest.approx([x for x, _ in whole], abs=1e-10)
    assert [x for _, x in chunked] == [x for _, x in whole]


def test_empty_continuation_is_certain_and_an_endless_one_refused(model: HarnessLM) -> None:
    assert model.loglikelihood(ask("loglikelihood", ("Ann", ""))) == [(0.0, True)]
    with pytest.raises(InputError, match=f"max_seq_len={MAX_LEN}"):
        model.loglikelihood(ask("loglikelihood", ("Ann", " tea Bob" * 40)))


@pytest.mark.parametrize("repeats", [1, 20])
def test_rolling_predicts_each_token_once_with_all_the_context_there_is(
    model: HarnessLM, tokenizer: Tokenizer, repeats: int
) -> None:
    text = TEXTS[0] * repeats
    (found,) = model.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    tokens = [tokenizer.eos_id, tokenizer.eos_id, *tokenizer.encode(text)]  # what is in front is predicted, too
    expected = 0.0
    for start in range(1, len(tokens), MAX_LEN):
        end = min(start + MAX_LEN, len(tokens))
        # the last window reaches back to a full context
        expected += score(model.network, tokens[max(0, end - MAX_LEN - 1) : start], tokens[start:end])[0]
    assert found == pytest.approx(expected, abs=1e-9)
    (nothing,) = model.loglikelihood_rolling(ask("loglikelihood_rolling", ("",)))
    assert nothing == pytest.approx(score(model.network, tokens[:1], tokens[1:2])[0], abs=1e-10)


def write_greedily(model: HarnessLM, context: str, max_new_tokens: int, stops: Sequence[str]) -> str:
    """One context by itself, without a cache; the text before the first stop string."""
    tokenizer, network = model.tokenizer, model.network
    ids = tokenizer.encode(context)
    tokens = [tokenizer.eos_id, *ids][-(MAX_LEN - max_new_tokens) :]  # one that is too long loses its beginning
    start = len(tokens)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            hidden_BLD, _ = network(torch.tensor([tokens]), decoding=True)
        tokens.append(int(network.logits(hidden_BLD[0, -1]).argmax()))
        if tokens[-1] == tokenizer.eos_id:
            break
    text = tokenizer.decode(tokens[start:])
    return min((text.split(stop)[0] for stop in stops), key=len, default=text)


def test_generation_equals_greedy_writing_up_to_the_stop(model: HarnessLM) -> None:
    contexts = ["Who lives in the red house?", "谁住在红房子里？", "", "Ann likes tea", "Bob. " * 40]
    free = [write_greedily(model, context, 12, []) for context in contexts]
    stops = [free[0][3:5], free[1][-3:]]  # strings that do come up, also across tokens
    settings = [
        {"until": stops, "max_gen_toks": 12},
        {"until": [], "max_gen_toks": 5, "do_sample": False},
        {"until": stops[0], "max_gen_toks": 12, "temperature": 0.0},
    ]
    requests = [(context, dict(chosen)) for context in contexts for chosen in settings]
    found = model.generate_until(ask("generate_until", *requests))
    for (context, chosen), text in zip(requests, found, strict=True):
        until = [chosen["until"]] if isinstance(chosen["until"], str) else chosen["until"]
        assert text == write_greedily(model, context, chosen["max_gen_toks"], until)
    assert found[0] == free[0][:3] != free[0]


def test_a_stop_string_is_seen_across_tokens(model: HarnessLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("tea. 王小明 xyz")
    assert len(ids) > 6
    ends = [end for end in range(len(ids) + 1) if model._has_stopped(ids[:end], ["明 xy"])]
    first = next(end for end in range(len(ids) + 1) if "明 xy" in tokenizer.decode(ids[:end]))
    assert ends[0] == first and not model._has_stopped(ids, ["zebra"]) and not model._has_stopped(ids, [])


def test_generation_leaves_half_the_window_to_the_context(model: HarnessLM) -> None:
    (text,) = model.generate_until(ask("generate_until", ("Who lives " * 30, {"until": [], "max_gen_toks": 256})))
    assert text == write_greedily(model, "Who lives " * 30, MAX_LEN // 2, [])


def test_sampled_generation_repeats_and_uses_no_global_randomness(model: HarnessLM) -> None:
    request = ask(
        "generate_until", ("Who lives", {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0})
    )
    before = torch.get_rng_state()
    first = model.generate_until(request)
    assert (
        model.generate_until(request)
        == first
        != model.generate_until(ask("generate_until", ("Who lives", {"until": []})))
    )
    assert torch.equal(torch.get_rng_state(), before)


# -- whole tasks -------------------------------------------------------------------------------------------------------

CHOICE = """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
num_fewshot: 2
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITE = """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: [Ann], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLL = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: q
metric_list:
  - {metric: bits_per_byte}
"""
FAIL = CHOICE.replace("doc_to_target: gold", 'doc_to_target: "{{1 // (5 - number)}}"')
NUM_DOCUMENTS = 12


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    choices = ["Ann", "Bob", "王小明", "tea"]
    rows = [
        {"q": f"{TEXTS[n % 2]} {n}?", "choices": choices[: 2 + 2 * (n % 2)], "gold": n % 2, "number": n}
        for n in range(NUM_DOCUMENTS)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, body in {"choose": CHOICE, "write": WRITE, "roll": ROLL, "fail": FAIL}.items():
        (folder / f"{name}.yaml").write_text(task_yaml(f"tiny_{name}", folder, "rows.jsonl") + body, encoding="utf-8")
    (folder / "lost.yaml").write_text(task_yaml("tiny_lost", folder, "nothing.jsonl") + CHOICE, encoding="utf-8")
    (folder / "group.yaml").write_text(
        "group: tiny_group\ntask: [tiny_choose, tiny_copy]\naggregate_metric_list: [{metric: acc}]\n", encoding="utf-8"
    )
    mutual = CHOICE + "  - {metric: acc_mutual_info, aggregation: mean, higher_is_better: true}\n"
    (folder / "copy.yaml").write_text(task_yaml("tiny_copy", folder, "rows.jsonl") + mutual, encoding="utf-8")
    return folder


def task_yaml(name: str, folder: Path, file: str) -> str:
    data = {"data_files": {"test": str(folder / file)}}
    return f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {json.dumps(data)}\n"


def evaluate_tasks(
    network: Transformer,
    tokenizer: Tokenizer,
    tasks: Suite | list[str] | LoadedTasks,
    include_path: Path | None = None,
    limit: int | None = None,
    on_failure: Any = None,
) -> dict[str, Any]:
    """Load and evaluate; the record with the headline."""
    if isinstance(tasks, list):
        tasks = Suite("x", tuple(tasks))
    loaded = tasks if isinstance(tasks, LoadedTasks) else load_tasks(tasks, Source(include_path))
    outcome = Harness(loaded, TextSide(tokenizer), limit=limit).evaluate(network, on_failure=on_failure)
    return {**outcome.record(), "headline": outcome.headline}


def random_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own 14,000 tasks take seconds to list; here only the folder counts."""
    import lm_eval.tasks

    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_defaults, include_path: real(None, include_path, include_defaults=False),
    )


def test_evaluations_are_identical_and_leave_no_trace(
    tokenizer: Tokenizer, task_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = make_network(tokenizer, max_seq_len=256).train()
    network.blocks[0].eval()
    network.embedding.weight.grad = torch.ones_like(network.embedding.weight)
    states, loaded_before = random_states(), "transformers" in sys.modules
    names = ["tiny_choose", "tiny_write", "tiny_roll"]
    first = evaluate_tasks(network, tokenizer, names, include_path=task_dir)
    assert random_states() == states
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    states = random_states()
    assert evaluate_tasks(network, tokenizer, names, include_path=task_dir) == first
    assert random_states() == states
    assert network.training and not network.blocks[0].training and network.blocks[1].training
    assert torch.equal(network.embedding.weight.grad, torch.ones_like(network.embedding.weight))
    assert torch.is_grad_enabled()
    assert not IMPORTS_TRANSFORMERS and loaded_before == ("transformers" in sys.modules)
    assert capfd.readouterr() == ("", "")  # neither progress bars nor log lines


def test_compiled_blocks_are_not_compiled_for_evaluation(tokenizer: Tokenizer, task_dir: Path) -> None:
    """Rows of all lengths would use up what torch compiles of a function, and training would then run without."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    network = make_network(tokenizer, max_seq_len=256).float()
    for block in network.blocks:
        block.compile(backend=backend)
    evaluate_tasks(network, tokenizer, ["tiny_choose", "tiny_write"], task_dir)
    assert graphs == []
    network(torch.zeros(2, 8, dtype=torch.long))
    assert len(graphs) > 0


def test_loaded_tasks_give_the_same_results_each_time(tokenizer: Tokenizer, task_dir: Path) -> None:
    network = make_network(tokenizer, max_seq_len=256)
    loaded = load_tasks(Suite("x", ("tiny_choose",)), Source(task_dir))
    first = evaluate_tasks(network, tokenizer, loaded)
    assert first == evaluate_tasks(network, tokenizer, loaded)
    assert first == evaluate_tasks(network, tokenizer, ["tiny_choose"], include_path=task_dir)


def test_network_is_in_eval_mode_and_the_shots_are_always_the_same(
    tokenizer: Tokenizer, task_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network(tokenizer, max_seq_len=256).train()
    modes: set[tuple[bool, bool]] = set()
    network.register_forward_hook(lambda net, _, outputs: modes.add((net.training, outputs[0].requires_grad)))
    prompts: list[list[Any]] = []
    real = HarnessLM.loglikelihood
    monkeypatch.setattr(
        HarnessLM, "loglikelihood", lambda lm, asked: (prompts.append([x.args for x in asked]), real(lm, asked))[1]
    )
    loaded = load_tasks(Suite("x", ("tiny_choose",)), Source(task_dir))
    for _ in range(2):
        evaluate_tasks(network, tokenizer, loaded)
    assert modes == {(False, False)}
    assert prompts[0] == prompts[1] and prompts[0][0][0].count("?") > 3  # two shots before the question


def test_results_name_metrics_chance_and_samples(tokenizer: Tokenizer, task_dir: Path) -> None:
    network = make_network(tokenizer, max_seq_len=256)
    names = ["tiny_group", "tiny_write", "tiny_roll"]
    record = evaluate_tasks(network, tokenizer, names, include_path=task_dir, limit=5)
    results = record["results"]
    assert set(results) == {"tiny_group", "tiny_choose", "tiny_copy", "tiny_write", "tiny_roll"}
    assert set(results["tiny_choose"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "chance"}
    assert results["tiny_choose"]["chance"] == pytest.approx((3 * 1 / 2 + 2 * 1 / 4) / 5)
    assert results["tiny_group"]["chance"] == pytest.approx(results["tiny_choose"]["chance"])
    assert "chance" not in results["tiny_write"] and results["tiny_roll"]["bits_per_byte"] > 0
    assert set(record["headline"]) == set(names)  # not the group's members: a suite stays a few figures
    assert record["num_samples"] == {**dict.fromkeys(results, 5), "tiny_group": 10}
    assert record["num_fewshot"]["tiny_choose"] == 2 and record["num_fewshot"]["tiny_write"] == 0
    assert record["versions"]["lm_eval"]
    json.dumps(record, allow_nan=False)


def test_accuracy_equals_choosing_by_hand(tokenizer: Tokenizer, task_dir: Path) -> None:
    network = make_network(tokenizer, max_seq_len=256)
    suite = Suite("x", ("tiny_choose",), {"tiny_choose": 0})
    found = evaluate_tasks(network, tokenizer, suite, include_path=task_dir)["results"]["tiny_choose"]["acc"]
    rows = [json.loads(line) for line in (task_dir / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    right = []
    for row in rows:
        context = tokenizer.encode(row["q"])
        wholes = [tokenizer.encode(f"{row['q']} {choice}")[len(context) :] for choice in row["choices"]]
        scores = [score(network, [tokenizer.eos_id, *context], whole)[0] for whole in wholes]
        right.append(int(np.argmax(scores) == row["gold"]))
    assert found == pytest.approx(np.mean(right)) and 0 < found < 1


def test_standard_error_is_that_of_lm_eval() -> None:
    answers = [1, 0, 0, 1, 1, 1, 0]
    found = clean_metrics({"acc,none": np.mean(answers), "acc_stderr,none": "N/A", "sample_len": 7, "alias": "x"})
    assert found == {"acc": pytest.approx(4 / 7), "acc_stderr": pytest.approx(mean_stderr(answers))}


def test_metrics_are_plain_and_finite() -> None:
    raw = {"exact_match,strict": 0.5, "perplexity,none": float("inf"), "f1,none": 0.25, "sample_len": 5, "name": "x"}
    found = clean_metrics(raw)
    assert found == {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.25, "perplexity": None, "f1": 0.25}
    assert headline(found) == 0.5 and headline({"bits_per_byte": 1.5}) == 1.5
    assert headline({"acc_norm": 0.1, "acc": 0.2, "chance": 0.25}) == 0.2


def test_a_failing_task_is_reported_and_the_others_go_on(tokenizer: Tokenizer, task_dir: Path) -> None:
    network = make_network(tokenizer, max_seq_len=256).train()
    failures: dict[str, Exception] = {}
    before = torch.get_rng_state()
    record = evaluate_tasks(
        network, tokenizer, ["tiny_fail", "tiny_choose"], include_path=task_dir, on_failure=failures.__setitem__
    )
    assert set(record["results"]) == {"tiny_choose"} and set(failures) == {"tiny_fail"}
    with pytest.raises(ZeroDivisionError):
        evaluate_tasks(network, tokenizer, ["tiny_fail"], include_path=task_dir)
    assert network.training and torch.equal(torch.get_rng_state(), before)


def test_unknown_and_unreadable_tasks_are_input_errors(task_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_registry(monkeypatch)
    with pytest.raises(InputError, match=r"'tiny_chose' .* did you mean tiny_choose"):
        load_tasks(Suite("x", ("tiny_chose",)), Source(task_dir))
    with pytest.raises(InputError, match=r"cannot be loaded from the hub: tiny_lost .*nothing\.jsonl"):
        load_tasks(Suite("x", ("tiny_lost",)), Source(task_dir))


def test_limit_must_be_positive(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="limit=0"):
        Harness(LoadedTasks(Suite("x", ("a",)), {}), TextSide(tokenizer), limit=0)


def test_random_state_returns_after_an_error() -> None:
    states = random_states()
    with pytest.raises(KeyError), preserved_random_state():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        raise KeyError
    assert random_states() == states


def test_synthetic_suite_asks_what_the_embedded_world_knows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_world_tasks(WorldConfig().to_dict(), tmp_path)
    network = make_network(tokenizer, max_seq_len=256)
    suite = load_suite("synthetic")
    record = evaluate_tasks(network, tokenizer, suite, include_path=tmp_path, limit=4)
    assert set(record["results"]) == set(suite.tasks) == set(record["headline"])
    chance = {task: record["results"][task]["chance"] for task in suite.tasks}
    assert chance == {task: 0.25 if "facts" in task else 0.0 for task in suite.tasks}
    assert set(record["num_samples"].values()) == {4} and set(record["num_fewshot"].values()) == {0}


def test_suites_are_read_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {load_suite(name).name for name in suite_names()} == set(suite_names()) >= {"synthetic"}
    synthetic = load_suite("synthetic")
    assert synthetic.embedded and choose_suite("synthetic") == synthetic
    assert choose_suite("arc_easy, piqa") == Suite("arc_easy,piqa", ("arc_easy", "piqa"))
    assert choose_suite([synthetic.tasks[0]]).embedded
    with pytest.raises(InputError, match=r"'nothing'; choose one of .*synthetic"):
        load_suite("nothing")
    for make in (partial(Suite, "x", ()), partial(Suite, "x", ("a", "a")), partial(Suite, "x", ("a",), {"b": 1})):
        with pytest.raises(InputError):
            make()
    (tmp_path / "bad.yaml").write_text("name: bad\ntask: [a]\n", encoding="utf-8")
    monkeypatch.setattr(suites, "SUITE_FOLDER", tmp_path)
    with pytest.raises(InputError, match=r"bad\.yaml is not an evaluation suite"):
        load_suite("bad")
