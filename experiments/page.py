"""Draw the pictures of a study and fill the tables of its pages; the sentences between them are written by hand.

python -m experiments.page              # RESULTS.md and experiments/results/tables.md, from experiments/results/demo/
python -m experiments.page mine/demo    # pictures and tables.md of records of your own, beside them
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.analysis import Study
from experiments.figures import draw_all
from experiments.sites import RECORDS, site_tables
from experiments.tables import all_tables, markdown
from hf_selortho.utils.command_line import run_script

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "experiments" / "results" / "demo"  # records of the pages that are kept in the repository
DETAILS = ROOT / "experiments" / "results" / "tables.md"
PAGES = [ROOT / "RESULTS.md", DETAILS]
_TABLE = re.compile(r"(<!-- table: (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, tables: Mapping[str, str]) -> str:
    """Put tables between their markers: `<!-- table: NAME -->` and `<!-- end -->`; all other text stays as it is."""
    return _TABLE.sub(lambda match: f"{match[1]}{tables.get(match['name'], '(not measured)')}\n{match[3]}", page)


def tables_of(study: Study) -> dict[str, str]:
    """Write all tables in Markdown, by name: those of a study, and those of other sites that are in the repository."""
    sites = site_tables(json.loads(RECORDS.read_text(encoding="utf-8"))) if RECORDS.is_file() else {}
    return {name: markdown(table) for name, table in {**all_tables(study), **sites}.items()}


def write_pages(records: Path) -> list[Path]:
    """Write pictures and pages from the records in a folder.

    The pages of the repository are filled from its own records. For a folder of other records, the page of details is
    written beside them, with their numbers.

    Returns:
        the pages.
    """
    study = Study.read(records)
    draw_all(study, records / "figures")
    tables = tables_of(study)
    if records.resolve() == PUBLISHED:
        for page in PAGES:
            page.write_text(fill(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
        return PAGES
    page = records / DETAILS.name
    details = DETAILS.read_text(encoding="utf-8").replace("](demo/figures/", "](figures/")
    page.write_text(fill(details, tables), encoding="utf-8")
    return [page]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pages of the folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="?", type=Path, default=PUBLISHED, help="folder of the records of one plan")
    for page in write_pages(parser.parse_args(argv).records):
        sys.stdout.write(f"{page}\n")


if __name__ == "__main__":
    run_script(main)
