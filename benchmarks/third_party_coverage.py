"""How many models of other packages convert, and whether that is exact: `make thirdparty`.

    python benchmarks/third_party_coverage.py [--jobs N] [--only PART] [--markdown docs/coverage-third-party.md]

Prints the same document as `armour-surgery coverage --json`. The packages of `third_party_hosts.py` have to be
installed, in an environment of their own: they bring versions of many other packages. One that is missing is an error
of its hosts.
"""

import argparse
import json
import sys
from pathlib import Path

from third_party_hosts import HOSTS, load, requirements

from armour_surgery.coverage.summary import Coverage
from armour_surgery.coverage.survey import survey
from armour_surgery.coverage.views import page

LIBRARY = "third-party"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", metavar="PART", help="only hosts whose name has this in it")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    names = [(LIBRARY, name) for name in HOSTS if options.only in name]

    def tell(_: str, done: int, total: int) -> None:
        print(f"{done} of {total}", file=sys.stderr)

    packages = [requirement for requirement in requirements() if "<" not in requirement]
    coverage = Coverage.of(survey(names, load, jobs=options.jobs, progress=tell), packages)
    if options.markdown is not None:
        command = f"python benchmarks/third_party_coverage.py --jobs {options.jobs} --markdown {options.markdown}"
        options.markdown.write_text(page(coverage, command, "Models of other packages"), encoding="utf-8")
    print(json.dumps(coverage.to_dict(), indent=1, allow_nan=False))


if __name__ == "__main__":
    main()
