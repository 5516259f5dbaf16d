"""Questions about a synthetic world as lm-eval tasks: facts by multiple choice, sums by a generated answer."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

from datamodules.order import derive_key
from datamodules.world.arithmetic import Problem, all_combinations, ask_problem, draw_problem
from datamodules.world.biographies import ATTRIBUTES, LANGUAGES, Attribute, Person, ask_fact
from datamodules.world.generator import WorldConfig
from modules.files import replace_file

NUM_CHOICES = 4
_MAX_FACTS = 2000
_MAX_PROBLEMS = 200
_NUM_DRAWS = 4000
_GROUP = "synthetic"
_METADATA = {"version": 1.0, "synthetic": True}


def write_world_tasks(world: dict[str, Any], directory: str | Path) -> None:
    """Writes the lm-eval tasks of a world: `synthetic_{facts,arithmetic}_{en,zh}` and the group `synthetic`.

    Args:
        world: the parameters of the world, as in `WorldConfig.to_dict()` and in a checkpoint's metadata.
        directory: gets the YAML and JSONL files; the tasks name them by absolute path, so it should stay where it is.
    """
    config = WorldConfig(**world)
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    names = []
    for language in LANGUAGES:
        facts, problems = fact_items(config, language), arithmetic_items(config, language)
        for task, items in ((_facts_task(language), facts), (_arithmetic_task(language), problems)):
            names.append(task["task"])
            data = directory / f"{task['task']}.jsonl"
            source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
            _write_if_new(data, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
            _write_yaml(directory / f"{task['task']}.yaml", {**task, **source, "test_split": "test"})
    _write_yaml(directory / f"{_GROUP}.yaml", {"group": _GROUP, "task": names, "metadata": _METADATA})


def fact_items(config: WorldConfig, language: str) -> list[dict[str, Any]]:
    """Multiple-choice items about the people: `question`, `choices` and the index `answer`.

    Each asks for one attribute of one person; the wrong choices are other values of the same attribute. The items are
    in random order, so that a limited evaluation sees all attributes, and in the same order in every language.
    """
    pairs = [(number, index) for number in range(config.num_people) for index in range(len(ATTRIBUTES))]
    random.Random(derive_key(config.seed, 6)).shuffle(pairs)
    items = []
    for number, index in pairs[:_MAX_FACTS]:
        rng = random.Random(derive_key(config.seed, 7, number, index))
        items.append(_fact_item(config.people.person(number), index, ATTRIBUTES[index], language, rng))
    return items


def _fact_item(person: Person, index: int, attribute: Attribute, language: str, rng: random.Random) -> dict[str, Any]:
    right = person.values[index]
    wrong = [value for value in range(len(attribute.values)) if value != right]
    choices = [right, *rng.sample(wrong, NUM_CHOICES - 1)]
    rng.shuffle(choices)
    gap = " " if language == "en" else ""
    return {
        "attribute": attribute.name,
        "question": ask_fact(person, attribute, language),
        "choices": [gap + attribute.values[value][language] for value in choices],
        "answer": choices.index(right),
    }


def arithmetic_items(config: WorldConfig, language: str) -> list[dict[str, Any]]:
    """Problems that training never tells in these words: `question` and the text `answer`, in random order."""
    rng = random.Random(derive_key(config.seed, 8))
    combinations = all_combinations(config.max_operand)
    found: dict[Problem, None] = {}
    for _ in range(_NUM_DRAWS):
        problem = draw_problem(rng, combinations)
        if problem.is_held_out(config.seed):
            found[problem] = None
    return [
        {"question": ask_problem(problem, language), "answer": str(problem.answer)}
        for problem in list(found)[:_MAX_PROBLEMS]
    ]


def _facts_task(language: str) -> dict[str, Any]:
    return {
        "task": f"{_GROUP}_facts_{language}",
        "task_alias": f"synthetic facts ({language})",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",  # the choices begin with a space where the language has one
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {**_METADATA, "chance": 1 / NUM_CHOICES},
    }


def _arithmetic_task(language: str) -> dict[str, Any]:
    return {
        "task": f"{_GROUP}_arithmetic_{language}",
        "task_alias": f"synthetic arithmetic ({language})",
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "target_delimiter": " " if language == "en" else "",
        "fewshot_delimiter": "\n\n",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 16},
        "filter_list": [
            {
                "name": "number",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(\d+)\s*$"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {**_METADATA, "chance": 0.0},
    }


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    _write_if_new(path, yaml.safe_dump(content, allow_unicode=True, sort_keys=False))


def _write_if_new(path: Path, text: str) -> None:
    # lm-eval's copy of the data is bound to the file's time, so an equal file is left alone
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        replace_file(path, text.encode())
