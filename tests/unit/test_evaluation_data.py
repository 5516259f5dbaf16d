"""Official tasks from a mirror, what is missing, requests that are kept, and documents that repeat test items."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from app.cli import main
from app.commands.prepare import prepare
from datamodules.decontamination import Decontaminator, text_fields
from datamodules.tokenizer import Tokenizer, train_tokenizer
from modules.config import ModelConfig
from modules.errors import InputError
from modules.layers.transformer import Transformer
from tests.unit.evaluation_helpers import QUESTIONS, write_mirror

pytest.importorskip("lm_eval")

from callbacks.evaluation import requests as kept
from callbacks.evaluation.harness import Harness
from callbacks.evaluation.results import Outcome
from callbacks.evaluation.suites import Suite, choose_suite, load_suite, load_suites
from callbacks.evaluation.tasks import LoadedTasks, Source, load_tasks
from callbacks.evaluation.text_side import TextSide

SCIQ = Suite("x", ("sciq",), {"sciq": 1}, folders=("sciq", "winogrande"))
BOTH = Suite("x", ("winogrande", "sciq"), {"sciq": 1}, folders=("sciq", "winogrande"))


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mirror(tmp_path_factory.mktemp("mirror"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(QUESTIONS * 3, 320)


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of a test stays in the user's caches."""
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("LM_HARNESS_CACHE_PATH", raising=False)
    return folder / "growmoe" / "requests"


def network(tokenizer: Tokenizer) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(tokenizer.vocab_size, dim=16, num_layers=1, num_heads=2, max_seq_len=512)).eval()


def evaluate(tokenizer: Tokenizer, tasks: LoadedTasks, limit: int | None = None) -> Outcome:
    return Harness(tasks, TextSide(tokenizer), limit=limit, num_examples=2).evaluate(network(tokenizer))


def test_official_tasks_come_from_a_mirror(mirror: Path, tokenizer: Tokenizer) -> None:
    before = (Path.cwd(), os.environ.get("HF_HUB_OFFLINE"))
    loaded = load_tasks(SCIQ, Source(mirror=mirror))
    assert before == (Path.cwd(), os.environ.get("HF_HUB_OFFLINE"))
    outcome = evaluate(tokenizer, loaded, limit=3)
    record = outcome.record()
    assert record["num_samples"] == {"sciq": 3} and record["num_fewshot"] == {"sciq": 1}
    assert record["hashes"]["mirror"] == hashlib.sha256((mirror / "MANIFEST.json").read_bytes()).hexdigest()
    assert record["right"]["sciq"]["acc"].count("1") == pytest.approx(3 * record["results"]["sciq"]["acc"])
    assert [set(example) for example in outcome.examples] == [{"task", "question", "answer", "expected", "right"}] * 2
    assert outcome.examples[0]["expected"] == " root" and "support" not in outcome.examples[0]
    json.dumps(record, allow_nan=False)


def test_the_hash_of_a_task_changes_with_what_is_asked(mirror: Path, tokenizer: Tokenizer) -> None:
    hashes = [
        evaluate(tokenizer, load_tasks(suite, Source(mirror=mirror)), limit).hashes["tasks"]["sciq"]
        for suite, limit in ((SCIQ, 3), (SCIQ, 3), (SCIQ, 2), (Suite("x", ("sciq",), {"sciq": 0}), 3))
    ]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_missing_data_are_named_all_at_once(mirror: Path) -> None:
    three = Suite("x", ("winogrande", "piqa", "sciq"), folders=("sciq", "winogrande", "piqa"))
    with pytest.raises(InputError, match=r"cannot be loaded from data_mirror=.*: winogrande, piqa \(.*missing=skip"):
        load_tasks(three, Source(mirror=mirror))
    loaded = load_tasks(three, Source(mirror=mirror, missing="skip"))
    assert list(loaded.by_name) == ["sciq"] and set(loaded.missing) == {"winogrande", "piqa"}
    with pytest.raises(InputError, match="winogrande"):
        load_tasks(Suite("x", ("winogrande",), folders=("winogrande",)), Source(mirror=mirror, missing="skip"))
    with pytest.raises(InputError, match="is no folder"):
        load_tasks(SCIQ, Source(mirror=mirror / "nothing"))


def test_what_was_left_out_is_recorded(mirror: Path, tokenizer: Tokenizer) -> None:
    record = evaluate(tokenizer, load_tasks(BOTH, Source(mirror=mirror, missing="skip"))).record()
    assert record["missing"] == ["winogrande"] and set(record["results"]) == {"sciq"}


def test_shots_of_webqs_can_be_built(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """lm-eval 0.4.13 cannot: its answers are a list of choices."""
    place = tmp_path / "stanfordnlp" / "web_questions"
    place.mkdir(parents=True)
    rows = [{"url": "", "question": f"who is number {n}?", "answers": [f"Bob {n}", f"Ann {n}"]} for n in range(4)]
    for split in ("train", "test"):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loaded = load_tasks(Suite("x", ("webqs",), {"webqs": 1}, folders=("webqs",)), Source(mirror=tmp_path))
    outcome = evaluate(tokenizer, loaded)
    assert outcome.num_fewshot == {"webqs": 1} and "chance" not in outcome.results["webqs"]
    assert "Answer: Ann" in outcome.examples[0]["question"]  # the task itself has put them in order


def test_requests_are_kept_and_damaged_ones_built_again(
    mirror: Path, tokenizer: Tokenizer, own_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "WORTH_KEEPING_S", 0.0)
    first = evaluate(tokenizer, load_tasks(SCIQ, Source(mirror=mirror)), 3).record()
    (path,) = own_caches.iterdir()
    loaded = load_tasks(SCIQ, Source(mirror=mirror))
    task = loaded.by_name["sciq"]["tasks"]["sciq"]
    with monkeypatch.context() as patched:
        patched.setattr(type(task), "build_all_requests", None)  # it must not be asked
        assert evaluate(tokenizer, loaded, 3).record() == first
    path.write_bytes(b"no pickle")
    assert evaluate(tokenizer, load_tasks(SCIQ, Source(mirror=mirror)), 3).record() == first


def test_other_data_shots_and_limits_are_kept_apart(
    mirror: Path, tmp_path: Path, tokenizer: Tokenizer, own_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "WORTH_KEEPING_S", 0.0)
    other = write_mirror(tmp_path / "other")
    path = other / "allenai" / "sciq" / "test.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("Saturn", "Jupiter"), encoding="utf-8")
    for suite, source, limit in (
        (SCIQ, mirror, 3),
        (SCIQ, mirror, 2),
        (Suite("x", ("sciq",), {"sciq": 0}), mirror, 3),
        (SCIQ, other, 3),
    ):
        evaluate(tokenizer, load_tasks(suite, Source(mirror=source)), limit)
    assert len(list(own_caches.iterdir())) == 4


def test_suites_include_others_and_can_be_joined() -> None:
    paper = load_suite("paper")
    assert paper.tasks == (*load_suite("core_en").tasks, "mmlu", "gsm8k")
    assert paper.num_fewshot["mmlu"] == 5 and paper.num_fewshot["gsm8k"] == 8 and paper.num_fewshot["triviaqa"] == 1
    assert list(paper.num_fewshot.values()).count(0) == 9
    joined = load_suites("core_en,zh")
    assert joined.name == "core_en,zh" and joined.tasks[-2:] == ("ceval-valid", "cmmlu")
    assert choose_suite("zh,arc_easy").tasks == ("ceval-valid", "cmmlu", "arc_easy")
    with pytest.raises(InputError, match="'arc_easy'; choose one of"):
        load_suites("zh,arc_easy")


def test_official_definitions_know_all_suites() -> None:
    """Every name is a task, group or tag where the suite says that lm-eval keeps it."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    for name in ("core_en", "mmlu", "gsm8k", "gsm8k_cot", "zh", "paper"):
        suite = load_suite(name)
        folders = [str(root / folder) for folder in suite.folders]
        manager: Any = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)
        assert all(task in manager.task_index for task in suite.tasks), name


# -- decontamination ---------------------------------------------------------------------------------------------------


def test_long_runs_of_words_are_found_in_both_languages() -> None:
    chinese = "下列关于水的循环的说法中，哪一项是正确的并且与气候有关？"
    sieve = Decontaminator({"a": [QUESTIONS[0], "Which of these animals is not a mammal?", "Who?"], "z": [chinese]})
    assert sieve.num_items == 3  # one is too short
    run = " ".join(QUESTIONS[0].split()[2:15])  # thirteen words
    assert sieve.repeats(f"He asked: {run.upper().replace(' ', ', ')}... and left.") == "a"
    assert sieve.repeats(" ".join(QUESTIONS[0].split()[2:14])) is None  # twelve
    assert sieve.repeats("So which of these animals is not a mammal, then") == "a"
    assert sieve.repeats("which of these animals is not a bird") is None
    assert sieve.repeats(f"前面的话。{chinese.replace('，', '')}后面的话。") == "z"
    assert sieve.repeats(chinese[:20]) is None and sieve.repeats("") is None
    assert sieve.found == {"a": 2, "z": 1}
    with pytest.raises(InputError, match="decontaminate_words=7"):
        Decontaminator({}, words=7)


def test_all_texts_of_a_row_count() -> None:
    row = {"question": "a", "choices": {"text": ["b", "c"], "label": ["A"]}, "number": 3, "none": None}
    assert list(text_fields(row)) == ["a", "b", "c", "A"]


def test_prepare_leaves_out_documents_that_repeat_test_items(
    mirror: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"Number {n} of the lake houses has {n} red doors and a garden." for n in range(200)]
    lines[20] += " " + QUESTIONS[1]
    lines[70] = f"Quiz: {QUESTIONS[2].lower()}"
    (tmp_path / "en.txt").write_text("\n".join(lines), encoding="utf-8")
    options: dict[str, Any] = {"train_tokenizer": 300, "text_unit": "line", "validation_fraction": 0.1}
    options |= {"decontaminate": "sciq", "data_mirror": mirror}
    prepare([f"en={tmp_path / 'en.txt'}"], output=tmp_path / "clean", **options, max_dropped_fraction=0.0)
    manifest = json.loads((tmp_path / "clean" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["corpora"]["en"]["dropped"] == {"contaminated": 2}
    splits = manifest["corpora"]["en"]["splits"]
    assert sum(split["documents"] for split in splits.values()) == 198
    record = manifest["extra"]["decontaminated"]
    assert record["dropped"] == {"sciq": 2} and record["suite"] == "sciq" and record["words"] == 13
    assert "2 documents repeat one of" in capsys.readouterr().out


def test_decontaminating_from_what_is_not_there_writes_nothing(
    mirror: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "en.txt").write_text("a\n\nb", encoding="utf-8")
    words = ["prepare", f"en={tmp_path / 'en.txt'}", "--output", str(tmp_path / "out"), "--train_tokenizer", "300"]
    for extra, told in ((["core_en"], "winogrande"), (["synthetic"], "embedded world"), (["nothing"], "'nothing'")):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--decontaminate", *extra, "--data_mirror", str(mirror)])
        assert ended.value.code == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
