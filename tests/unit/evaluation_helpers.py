"""A mirror of the hub with one tiny data set in the schema of an official task."""

import json
from pathlib import Path

QUESTIONS = [
    "What do people call the part of a plant that grows below the ground and takes up water from the soil?",
    "Which of the planets that go around the sun is known for its large and bright system of rings?",
    "What is the process called in which green plants make sugar from light and water and air?",
    "Which organ of the human body pumps blood through all the vessels day and night without a rest?",
]
ANSWERS = ["root", "Saturn", "photosynthesis", "heart"]


def write_mirror(folder: Path) -> Path:
    """`allenai/sciq`, with so few rows that it is read at once."""
    place = folder / "allenai" / "sciq"
    place.mkdir(parents=True)
    rows = [
        {
            "question": question,
            "correct_answer": ANSWERS[number],
            "support": f"It is the {ANSWERS[number]}.",
            **{f"distractor{n}": ANSWERS[(number + n) % 4] for n in (1, 2, 3)},
        }
        for number, question in enumerate(QUESTIONS)
    ]
    for split in ("train", "validation", "test"):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "MANIFEST.json").write_text(json.dumps({"allenai/sciq": {"rows": 4}}), encoding="utf-8")
    return folder
