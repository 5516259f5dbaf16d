"""`growmoe report DIR`: one self-contained HTML page about a run, or about a study."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from app.outputs import check_report
from modules.errors import InputError

if TYPE_CHECKING:
    from app.report.data import RunData


def report(run_dir: Path, output: Path | None = None, picture: Path | None = None) -> None:
    """Write one HTML page with the numbers, tables and plots of a run or of a study, and print its path.

    The page needs no network and no other file. Raises InputError for a folder that is neither, and for a file in the
    way that is not a report's.

    Args:
        run_dir: the directory that `growmoe fit` wrote its logs to, or the folder of a `growmoe compare`.
        output: the page to write; `report.html` in the run directory if not given.
        picture: also write loss, bits per byte and accuracy as one PNG, for a README.
    """
    from app.study.study import DESIGN

    if (run_dir / DESIGN).is_file():
        _report_study(run_dir, output, picture)
        return
    from app.report.data import load_run
    from app.report.page import render_page
    from modules.files import replace_file

    page_path = run_dir / "report.html" if output is None else output
    data = load_run(run_dir)
    check_report(page_path, "output", (".html", ".htm"))
    if picture is not None:
        check_report(picture, "picture", (".png",))
    page = render_page(data).encode()
    image = _picture(data) if picture is not None else b""
    replace_file(page_path, page)
    written = [page_path]
    if picture is not None:
        replace_file(picture, image)
        written.append(picture)
    sys.stdout.write("".join(f"{path}\n" for path in written))


def _report_study(folder: Path, output: Path | None, picture: Path | None) -> None:
    from app.study.report import write_report
    from app.study.study import Study

    if output is not None or picture is not None:
        raise InputError(f"{folder} is a study, whose page and picture stay in it; leave --output and --picture out")
    sys.stdout.write("".join(f"{path}\n" for path in write_report(Study.read(folder))))


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
