"""`growmoe doctor`: versions, devices, collectives and files, and what is wrong with them."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from app.outputs import check_new_output
from modules.errors import InputError, require_positive

if TYPE_CHECKING:
    from app.doctor.findings import Section
    from app.doctor.place import Place
    from app.doctor.ranks import Facts


def doctor(
    *,
    run_dir: Path = Path("runs"),
    seconds: float = 3.0,
    timeout: float = 60.0,
    config: Path | None = None,
    output: Path | None = None,
) -> None:
    """Look at what a run would stand on, and print a table of it with a remedy for each problem.

    Alone it looks at this process; under torchrun or srun at all processes, and at how they communicate. Ends with 1
    when something is broken.

    Args:
        run_dir: where runs are going to be written; it need not exist, and nothing stays there.
        seconds: for the measurements of collective operations, all together.
        timeout: seconds to wait for the other processes.
        config: a configuration file that must be the same on all ranks.
        output: also write what was found to this JSON file, which must not exist yet.
    """
    from app.doctor.place import place_of

    require_positive(seconds=float(seconds), timeout=float(timeout))
    place = place_of(os.environ)
    if output is not None and place.rank == 0:
        check_new_output(output)
    if config is not None and not config.is_file():
        raise InputError(f"config={config} is no file; give the YAML file of a run")
    sections, everyone = _examine(place, run_dir, float(seconds), float(timeout), config)
    is_broken = any(problem.is_broken for section in sections for problem in section.problems)
    if place.rank == 0:
        _show(sections)
        if output is not None:
            _write(output, sections, everyone)
    if is_broken:
        sys.exit(1)


def _examine(
    place: "Place", run_dir: Path, seconds: float, timeout: float, config: Path | None
) -> tuple[list["Section"], list["Facts"]]:
    """Every check; those that other processes take part in come last."""
    import torch.distributed as dist

    from app.doctor.collectives import check_collectives
    from app.doctor.devices import check_devices, device_of, measure_rates
    from app.doctor.place import meet
    from app.doctor.ranks import check_ranks, gather, own_facts
    from app.doctor.storage import check_storage
    from app.doctor.versions import check_versions

    device = device_of(place.local_rank)
    if place.world_size > 1:
        meet(place, device, timeout)
    rates = measure_rates(device)
    everyone = gather(own_facts(place, device, config, rates))
    sections = [check_versions(), check_devices(device, rates), check_ranks(everyone, place)]
    if place.world_size > 1:
        sections.append(check_collectives(device, [facts.host for facts in everyone], seconds))
    sections.append(check_storage(run_dir, place.world_size, place.rank))
    if place.world_size > 1:
        dist.barrier()  # a launcher that sees the first process gone may end the others
        dist.destroy_process_group()
    return sections, everyone


def _show(sections: list["Section"]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 160
    for section in sections:
        table = Table(*section.columns, title=section.title, title_justify="left", title_style="bold")
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
    problems = sorted((p for section in sections for p in section.problems), key=lambda p: not p.is_broken)
    for problem in problems:
        console.print(f"{'broken' if problem.is_broken else 'note'}: {problem.what}\n  {problem.fix}", markup=False)
    if not problems:
        console.print("nothing is wrong")


def _write(output: Path, sections: list["Section"], everyone: list["Facts"]) -> None:
    import json
    from dataclasses import asdict

    from modules.files import replace_file

    is_broken = any(problem.is_broken for section in sections for problem in section.problems)
    found = {
        "ok": not is_broken,
        "sections": [section.to_dict() for section in sections],
        "ranks": [asdict(facts) for facts in everyone],
    }
    replace_file(output, json.dumps(found, indent=1, ensure_ascii=False).encode() + b"\n")
