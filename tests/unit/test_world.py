"""The synthetic world: deterministic, bilingual, split without leaks, and asked by lm-eval tasks that fit its texts."""

import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datamodules import SyntheticWorld
from datamodules.manifest import read_manifest
from datamodules.shards import open_split
from datamodules.world.arithmetic import all_combinations
from datamodules.world.biographies import ATTRIBUTES, LANGUAGES, People
from datamodules.world.generator import Document, WorldConfig, generate_documents
from datamodules.world.stories import _ANIMALS, _KINDS
from datamodules.world.tasks import arithmetic_items, fact_items, write_world_tasks
from modules.errors import InputError

SMALL = WorldConfig(seed=3, num_people=32, num_documents=1500)
OPTIONS: dict[str, Any] = {"num_people": 32, "num_documents": 300, "vocab_size": 640, "seq_len": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(generate_documents(SMALL))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("worlds")
    SyntheticWorld(root, **OPTIONS).prepare_data()
    return root


def test_a_seed_makes_one_world(documents: list[Document]) -> None:
    assert list(generate_documents(SMALL)) == documents
    others = list(generate_documents(replace(SMALL, seed=4)))
    assert not {d.texts["en"] for d in documents if d.kind == "biography"} & {d.texts["en"] for d in others}


def test_kinds_have_their_shares(documents: list[Document]) -> None:
    kinds = Counter(document.kind for document in documents)
    assert len(documents) == 1500
    for kind, share in (("biography", 0.55), ("arithmetic", 0.35), ("story", 0.1)):
        assert abs(kinds[kind] / 1500 - share) < 0.05
    assert {d.kind for d in generate_documents(replace(SMALL, biographies=0.0, arithmetic=1.0))} == {"arithmetic"}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("language", LANGUAGES)
def test_held_out_documents_never_occur_in_training(seed: int, language: str) -> None:
    documents = list(generate_documents(replace(SMALL, seed=seed, num_documents=3000)))
    training = {document.texts[language] for document in documents if not document.held_out}
    held_out = {document.texts[language] for document in documents if document.held_out}
    assert len(held_out) > 50
    assert not training & held_out


def test_every_kind_has_held_out_documents_and_every_person_training_ones(documents: list[Document]) -> None:
    assert {document.kind for document in documents if document.held_out} == {"biography", "arithmetic", "story"}
    told = " ".join(d.texts["en"] for d in documents if d.kind == "biography" and not d.held_out)
    assert all(SMALL.people.person(number).name["en"] in told for number in range(SMALL.num_people))


def test_biographies_state_every_fact_in_both_languages(documents: list[Document]) -> None:
    by_name = {SMALL.people.person(n).name["en"]: SMALL.people.person(n) for n in range(SMALL.num_people)}
    for document in documents:
        if document.kind != "biography":
            continue
        person = by_name[re.match(r"(\w+ \w+)", document.texts["en"])[1]]  # type: ignore[index]
        assert person.name["zh"] in document.texts["zh"]
        for attribute, value in zip(ATTRIBUTES, person.values, strict=True):
            for language in LANGUAGES:
                assert attribute.values[value][language] in document.texts[language]


def test_people_have_names_of_their_own_and_even_values() -> None:
    people = [People(0, 1000).person(number) for number in range(1000)]
    for language in LANGUAGES:
        assert len({person.name[language] for person in people}) == 1000
    for index, attribute in enumerate(ATTRIBUTES):
        counts = Counter(person.values[index] for person in people)
        assert len(counts) == len(attribute.values)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_there_are_names_for_any_number_of_people() -> None:
    people = People(0, 10**6)
    names = {people.person(number).name["zh"] for number in range(0, 10**6, 997)}
    assert len(names) == len(range(0, 10**6, 997))


def test_arithmetic_is_right_and_alike_in_both_languages(documents: list[Document]) -> None:
    found = 0
    for document in documents:
        if document.kind == "arithmetic":
            worked = [re.search(r"(\d+) ([+-]) (\d+) = (\d+)$", document.texts[lang]) for lang in LANGUAGES]
            assert worked[0] and worked[1] and worked[0].groups() == worked[1].groups()
            left, sign, right, answer = worked[0].groups()
            assert int(answer) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
            found += 1
    assert found > 200
    assert len(all_combinations(9)) == len(set(all_combinations(9))) == 128


def test_texts_of_the_two_languages_correspond_one_to_one(documents: list[Document]) -> None:
    pairs = {tuple(document.texts.values()) for document in documents}
    assert len({english for english, _ in pairs}) == len({chinese for _, chinese in pairs}) == len(pairs)


def test_indefinite_articles_fit() -> None:
    assert not any(word[0] in "aeiou" for word in (*_ANIMALS, *_KINDS))


# Tasks


def test_facts_have_one_right_choice_of_four(documents: list[Document]) -> None:
    for language in LANGUAGES:
        items = fact_items(SMALL, language)
        assert len(items) == 32 * len(ATTRIBUTES)
        assert all(len(set(item["choices"])) == 4 for item in items)
        places = Counter(item["answer"] for item in items)
        assert all(places[place] > len(items) / 4 * 0.6 for place in range(4))
        assert {item["attribute"] for item in items[:25]} == {attribute.name for attribute in ATTRIBUTES}


def test_facts_are_asked_in_words_that_training_uses(documents: list[Document]) -> None:
    """The right answer completes sentences of the training text; a wrong one never does."""
    for language in LANGUAGES:
        training = "\n".join(d.texts[language] for d in documents if d.kind == "biography" and not d.held_out)
        hits = 0
        for item in fact_items(SMALL, language):
            for number, choice in enumerate(item["choices"]):
                said = f"{item['question']}{choice}{'.' if language == 'en' else '。'}" in training
                assert not said or number == item["answer"]
                hits += said
        assert hits > 100


def test_facts_are_the_same_in_both_languages() -> None:
    """The value that is right in English is the one that is right in Chinese."""
    chinese_of: dict[str, set[str]] = defaultdict(set)
    for english, chinese in zip(fact_items(SMALL, "en"), fact_items(SMALL, "zh"), strict=True):
        assert english["answer"] == chinese["answer"]
        for first, second in zip(english["choices"], chinese["choices"], strict=True):
            chinese_of[first].add(second)
    assert all(len(values) == 1 for values in chinese_of.values())


def test_guessing_by_frequency_is_no_better_than_chance() -> None:
    """Who picks the choice that is most often right overall stays near one in four."""
    config = replace(SMALL, num_people=64)
    items = fact_items(config, "en")
    often = Counter((item["attribute"], item["choices"][item["answer"]]) for item in items)
    right = 0.0
    for item in items:
        counts = [often[item["attribute"], choice] for choice in item["choices"]]
        best = [number for number, count in enumerate(counts) if count == max(counts)]
        right += (item["answer"] in best) / len(best)
    assert abs(right / len(items) - 0.25) < 0.05


def test_sums_are_asked_in_words_that_training_never_uses(documents: list[Document]) -> None:
    for language in LANGUAGES:
        items = arithmetic_items(SMALL, language)
        assert len(items) > 100
        training = {
            d.texts[language].rsplit("\n", 1)[0] for d in documents if d.kind == "arithmetic" and not d.held_out
        }
        assert not training & {item["question"].rsplit("\n", 1)[0] for item in items}


class _Oracle:
    """Answers from the items themselves, so that every task must come out at 1; built on lm-eval's base class."""

    @staticmethod
    def make(config: WorldConfig, *, right: bool) -> Any:
        from lm_eval.api.model import LM

        answers, choices = {}, {}
        for language in LANGUAGES:
            answers |= {item["question"]: item["answer"] for item in arithmetic_items(config, language)}
            choices |= {item["question"]: item["choices"][item["answer"]] for item in fact_items(config, language)}

        class Oracle(LM):
            def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
                return [
                    (0.0 if (choices[context] == continuation) == right else -9.0, False)
                    for context, continuation in (request.args for request in requests)
                ]

            def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
                assert all(request.args[1]["until"] == ["\n"] for request in requests)
                return [f" 1 + 1 = {answers[request.args[0]]}" if right else " none" for request in requests]

            def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
                raise AssertionError("no task asks for it")

        return Oracle()


@pytest.mark.parametrize("right", [True, False])
def test_lm_eval_runs_the_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: bool) -> None:
    import datasets
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    write_world_tasks(json.loads(json.dumps(SMALL.to_dict())), tmp_path / "tasks")
    manager = TaskManager(include_defaults=False, include_path=[str(tmp_path / "tasks")])
    tasks = manager.load_task_or_group("synthetic")
    results = evaluator.evaluate(_Oracle.make(SMALL, right=right), tasks, bootstrap_iters=0, log_samples=False)
    assert results is not None
    scores = {
        name: value
        for name, metrics in results["results"].items()
        for key, value in metrics.items()
        if key.split(",")[0] in ("acc", "exact_match")
    }
    names = {f"synthetic_{kind}_{language}" for kind in ("facts", "arithmetic") for language in LANGUAGES}
    assert scores == dict.fromkeys(names, 1.0 if right else 0.0)
    assert all(results["configs"][name]["metadata"]["synthetic"] for name in names)


# The data module


def test_a_world_is_prepared_once_and_labelled(root: Path) -> None:
    data = SyntheticWorld(root, **OPTIONS)
    (folder,) = root.iterdir()
    assert data.folder == folder
    assert read_manifest(folder).extra["synthetic"] is True
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    data.prepare_data()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert data.task_dir is not None and (data.task_dir / "synthetic.yaml").is_file()


def test_the_prepared_world_is_the_generated_one(root: Path) -> None:
    data = SyntheticWorld(root, **OPTIONS)
    data.setup("fit")
    assert data.languages == ["en", "zh"]
    assert data.tokenizer.vocab_size <= data.vocab_size == 640
    for language in LANGUAGES:
        expected = [d.texts[language] for d in generate_documents(data.world) if not d.held_out]
        stream = open_split(data.folder, data.manifest, language, "train")
        tokens = stream.read(0, len(stream)).tolist()
        assert data.manifest.corpora[language].splits["train"].documents == len(expected)
        assert data.tokenizer.decode(tokens) == "".join(expected)


def test_questions_are_tokenized_alike_with_and_without_answers(root: Path) -> None:
    """Otherwise a choice would be scored on tokens that training never puts there."""
    data = SyntheticWorld(root, **OPTIONS)
    for language in LANGUAGES:
        for item in fact_items(data.world, language):
            question = data.tokenizer.encode(item["question"])
            for choice in item["choices"]:
                assert data.tokenizer.encode(item["question"] + choice)[: len(question)] == question


def test_metadata_makes_the_same_questions_again(root: Path, tmp_path: Path) -> None:
    data = SyntheticWorld(root, **OPTIONS)
    assert data.task_dir is not None
    write_world_tasks(json.loads(json.dumps(data.metadata()["world"])), tmp_path)
    for path in data.task_dir.glob("*.jsonl"):
        assert (tmp_path / path.name).read_text() == path.read_text()
    assert str(tmp_path) in (tmp_path / "synthetic_facts_zh.yaml").read_text()


def test_other_parameters_make_another_folder_and_the_order_seed_does_not(root: Path) -> None:
    folder = SyntheticWorld(root, **OPTIONS).folder
    assert SyntheticWorld(root, **{**OPTIONS, "seed": 9, "batch_size": 2}).folder == folder
    for change in ({"world_seed": 1}, {"num_people": 33}, {"vocab_size": 700}, {"max_operand": 5}):
        assert SyntheticWorld(root, **{**OPTIONS, **change}).folder != folder


def test_a_damaged_world_is_not_reused(root: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(root, tmp_path / "worlds")
    data = SyntheticWorld(tmp_path / "worlds", **OPTIONS)
    shard = next((data.folder / "zh/train").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"shard .* bytes, manifest\.json says"):
        data.setup("fit")
    (data.folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no manifest\.json"):
        data.prepare_data()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_people": 3}, "num_people=3"),
        ({"num_documents": 0}, "num_documents=0"),
        ({"max_operand": 1}, "max_operand=1"),
        ({"world_seed": -1}, "seed=-1"),
        ({"biographies": 0.9, "arithmetic": 0.2}, "no shares"),
        ({"biographies": -0.1}, "no shares"),
        ({"vocab_size": 100}, "data.vocab_size=100"),
        ({"weights": {"en": -1}}, "must be a positive number"),
    ],
)
def test_wrong_worlds(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SyntheticWorld(tmp_path, **{**OPTIONS, **change})


def test_a_world_of_another_version_is_refused() -> None:
    with pytest.raises(InputError, match="synthetic world of version 999"):
        WorldConfig(**{**SMALL.to_dict(), "version": 999})


@pytest.mark.slow
def test_a_prepared_world_starts_without_the_datasets_library(root: Path) -> None:
    """Its import costs more than a second at every start."""
    import subprocess
    import sys

    code = (
        "import sys; from datamodules import SyntheticWorld\n"
        f"data = SyntheticWorld({str(root)!r}, **{OPTIONS!r}); data.prepare_data(); data.setup('fit')\n"
        "assert 'datasets' not in sys.modules and 'lm_eval' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
