"Every numbered equation of the paper is displayed on a page that says which one it is."
import json
import re

import pytest
from readme import NBS, pages, text

NUMBERED = 11
QUOTED = re.compile(r"\(Eq\. (\d+) of the paper\b")
DISPLAYED = re.compile(r"\$\$.+?\$\$", re.S)
NEAR = 400 # characters between the number and a displayed formula


def quoted(source: str) -> set[int]:
    "Numbers of equations of the paper that stand beside a displayed formula."
    formulas = [m.span() for m in DISPLAYED.finditer(source)]
    beside = lambda m: any(m.start() - end < NEAR and start - m.end() < NEAR for start, end in formulas)
    return {int(m[1]) for m in QUOTED.finditer(source) if beside(m)}


def prose(path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [text(c["source"]) for c in cells if c["cell_type"] == "markdown"]


FOUND = {path.relative_to(NBS).as_posix(): set().union(*map(quoted, prose(path))) for path in pages()}


@pytest.mark.parametrize("number", range(1, NUMBERED + 1))
def test_equation_has_a_page(number):
    assert [page for page, numbers in FOUND.items() if number in numbers], f"no page displays Eq. {number} of the paper"


def test_no_page_quotes_an_equation_that_the_paper_does_not_have():
    odd = {page: numbers - {*range(1, NUMBERED + 1)} for page, numbers in FOUND.items()}
    assert not {page: numbers for page, numbers in odd.items() if numbers}


def test_a_number_counts_only_beside_a_formula():
    far = "(Eq. 3 of the paper)" + NEAR * " " + "$$x$$"
    assert quoted("the flow (Eq. 3 of the paper) is\n\n$$x = y$$") == {3}
    assert quoted("$$x$$ (Eq. 3 of the paper, corrected)") == {3}
    assert quoted(far) == quoted("(Eq. 3 of the paper) is $x$") == set()
