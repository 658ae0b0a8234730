"No result is typed by hand on a page: what was measured is printed by the cell that measured it."
import json
import re

import pytest
from readme import NBS, pages, text

NUMBER = r"\d[\d.,]*(?:\s?[–-]\s?\d[\d.,]*)?"
TYPED = re.compile("|".join([
    rf"{NUMBER}\s?%",                                                        # 20 %
    rf"{NUMBER}\s?(?:×(?!\s?\d)|-fold\b)",                                  # 1.5×, but not 64×64
    r"\b(?:a|one|two|three) (?:half|third|quarter|fifth|tenth)s? of the (?:error|distance|gap|loss)",
    rf"\b(?:RMSE|FID|error|loss|distance)s? (?:of|is|was|falls to|drops to|from|about|by) (?:about )?{NUMBER}"]))
NO_PROSE = re.compile(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\]\([^)]*\)|<!--.*?-->", re.S)

# What may be said in numbers: definitions, and what a publication prints, which no cell of ours can measure.
FACTS = {
    "01_denoise": ("99.5 %",),                # definition of dynamic thresholding (Saharia et al. 2022)
    "learning": ("5 %",),                     # which samples a question is about: the worst 5 %
}


def typed(source: str, facts=()) -> list[str]:
    "Numbers in prose that look like results."
    found = (m[0] for m in TYPED.finditer(NO_PROSE.sub(" ", source)))
    return [f for f in found if f not in ("95 %", *facts)] # the level of all confidence intervals


@pytest.mark.parametrize("path", pages(), ids=lambda p: p.stem)
def test_no_result_is_typed_by_hand(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = [text(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    found = [t for source in prose for t in typed(source, FACTS.get(path.stem, ()))]
    assert not found, f"{path.relative_to(NBS)}: let the cell that measures print it, or explain it in FACTS: {found}"


@pytest.mark.parametrize("prose", ["It takes away 20 % of it.", "that is 1.5× better", "a third of the error",
                                   "the error falls to 0.21", "an FID of 3.73"])
def test_the_search_finds_results(prose): assert typed(prose)


@pytest.mark.parametrize("prose", ["of order 2 at NFE 4", "`--rate 5%`", r"$\times 1.5\%$", "from 40 to 80 steps",
                                   "```\n20 %\n```"])
def test_the_search_leaves_the_rest_alone(prose): assert not typed(prose)
