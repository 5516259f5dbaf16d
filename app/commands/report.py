"""`growmoe report RUN_DIR`: one self-contained HTML page about a run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from modules.errors import InputError

if TYPE_CHECKING:
    from app.report.data import RunData


def report(run_dir: Path, output: Path | None = None, picture: Path | None = None) -> None:
    """Write one HTML page with the numbers, tables and plots of a run, and print its path.

    The page needs no network and no other file. Raises InputError for a folder that is no run directory, and for a file
    in the way that is not a report's.

    Args:
        run_dir: the directory that `growmoe fit` wrote its logs to.
        output: the page to write; `report.html` in the run directory if not given.
        picture: also write loss, bits per byte and accuracy as one PNG, for a README.
    """
    from app.report.data import load_run
    from app.report.page import GENERATOR, render_page
    from modules.files import replace_file

    page_path = run_dir / "report.html" if output is None else output
    data = load_run(run_dir)
    _check_target(page_path, "output", (".html", ".htm"), GENERATOR)
    if picture is not None:
        _check_target(picture, "picture", (".png",), GENERATOR)
    page = render_page(data).encode()
    image = _picture(data) if picture is not None else b""
    replace_file(page_path, page)
    written = [page_path]
    if picture is not None:
        replace_file(picture, image)
        written.append(picture)
    sys.stdout.write("".join(f"{path}\n" for path in written))


def _picture(data: "RunData") -> bytes:
    from app.report.drawing import drawing_style, png_bytes
    from app.report.plots import overview

    with drawing_style():
        figure = overview(data)
        if figure is None:
            raise InputError(
                f"{data.run_dir} has no loss, bits per byte or accuracy to draw yet; leave --picture out or train on"
            )
        return png_bytes(figure)


def _check_target(path: Path, option: str, endings: tuple[str, ...], mark: str) -> None:
    """Refuse a file that is not of this kind, or that someone else wrote."""
    if path.suffix.lower() not in endings:
        raise InputError(
            f"{option}={path} does not end in {endings[0]}; the file is written as {endings[0]}: rename it"
        )
    if not path.parent.is_dir():
        raise InputError(f"{option}={path} lies in a folder that does not exist; create {path.parent} first")
    if path.is_dir():
        raise InputError(f"{option}={path} is a folder; give the name of a file")
    if path.exists():
        with path.open("rb") as file:
            if mark.encode() not in file.read(4096):
                raise InputError(
                    f"{option}={path} exists and is not a {mark}, so it stays; choose another name or move it"
                )
