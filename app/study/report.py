from typing import Any


def write_report(study: Any) -> list[Any]:
    return []
