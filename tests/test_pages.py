"No result is typed by hand: what was measured is printed by the cell that measured it, or computed for its caption."
import ast
import json
import re

import pytest
from readme import NBS, pages, text

ROOT = NBS.parent
NUMBER = r"\d[\d.,]*(?:\s?[–-]\s?\d[\d.,]*)?"
WORD = r"(?:a|one|two|three|four|five|six|seven|eight|nine|ten|dozens?|hundreds?|thousands?)"
TYPED = re.compile("|".join([
    rf"{NUMBER}\s?(?:%|per ?cent\b)",                                        # 20 %
    rf"{NUMBER}\s?(?:×(?!\s?\d)|-fold\b)",                                   # 1.5×, but not 64×64
    r"(?<![\w.])\d+\.\d+(?!\.?\d)",                                          # 0.21
    rf"\b{WORD} (?:half|thirds?|quarters?|fifths?|tenths?|hundredths?) (?:of|up|less|more|better|worse)\b",
    rf"\b(?:{WORD} times|twice|half) as (?:good|bad|many|much|large|small|long|far|fast|near|close)\b",
    rf"\b{WORD} of (?:the )?{WORD}\b(?! steps)",                             # seven of eight
    rf"\b(?:RMSE|FID|error|loss|distance)s? (?:of|is|was|falls to|drops to|from|about|by) (?:about )?{NUMBER}"]), re.I)
NO_PROSE = re.compile(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\]\([^)]*\)|<!--.*?-->"
                      r"|\b(?:Section|Sec\.|App\.|Appendix|Eq\.|[Vv]ersion|Python|scipy|Apache) [\d.()A-Z]+", re.S)

# What may be said in numbers: definitions, settings, and what a publication prints, which no cell of ours can measure.
FACTS = {
    "00_schedule": ("0.9946",),               # where the cosine schedule ends, by definition
    "01_denoise": ("99.5 %",),                # definition of dynamic thresholding (Saharia et al. 2022)
    "00_checks": ("4.5",),                    # an example of a number that is not whole
    "03_unpickle": ("one of a",),             # functions
    "05_methods": ("half as many",),          # settings of AMED-Plugin
    "10_bespoke": ("6.5",),                   # a guidance scale (Shaul et al. 2024)
    "11_amed_plugin": ("three times as many",), # settings of its teacher
    "00_networks": ("twice as long", "a quarter of"), # sizes of networks
    "01_adm": ("one of three", "one of two"), # kinds of networks
    "07_pipelines": ("998.5", "twice as many"), # a time in bfloat16; channels of a learned variance
    "00_report": ("4.8",),                    # inches
    "03_claims": ("0.8", "1.2"),              # ratios that a demonstration is made with
    "01_scheduler": ("one of a",),            # kinds of schedulers
    "02_search": ("1.5", "1.15", "1.20"),     # a version of Stable Diffusion; coefficients as published
    "guided_teacher": ("three times as many", "two of three"), # steps of a teacher; verdicts that the page asserts
    "local_error": ("one of five", "a fifth of"), # steps
    "train_digits": ("four fifths of",),      # how the digits are split
    "07_layout": ("one of the six",),         # data sets
    "errata": ("1.5", "3.73"),                # a weight of an example; the paper's "3.73 NFE"
    "learning": ("5 %",),                     # which samples a question is about: the worst 5 %
    "index": ("95 %",),
}
PRINTED_ELSEWHERE = {"atlas": "as printed"}   # rows of a table with FIDs that other papers print, which say so


def typed(source: str, facts=()) -> list[str]:
    "Numbers in prose that look like results."
    found = (m[0] for m in TYPED.finditer(NO_PROSE.sub(" ", source)))
    return [f for f in found if f not in ("95 %", *facts)] # the level of all confidence intervals


def sources(path) -> list[str]:
    "The prose of a page; rows that quote other papers only where they say so."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = [text(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    if path.stem not in PRINTED_ELSEWHERE: return prose
    table = next(source for source in prose if PRINTED_ELSEWHERE[path.stem] in source)
    return [re.sub(r"^\|.*\|$", " ", source, flags=re.M) if source == table else source for source in prose]


@pytest.mark.parametrize("path", pages(), ids=lambda p: p.stem)
def test_no_result_is_typed_by_hand(path):
    facts = FACTS.get(path.stem, ())
    if path.stem == "errata": # which names the sections of the paper
        facts += tuple(f"{a}.{b}" for a in range(2, 5) for b in range(1, 4))
    found = [t for source in sources(path) for t in typed(source, facts)]
    assert not found, f"{path.relative_to(NBS)}: let the cell that measures print it, or explain it in FACTS: {found}"


def test_contributing_has_no_result():
    assert not typed((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def captions(path) -> list[str]:
    "The sentences in the strings of a module, without its docstrings."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(n.body[0].value) for n in ast.walk(tree) if hasattr(n, "body") and isinstance(n.body, list) and n.body
            and isinstance(n.body[0], ast.Expr)}
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
            and id(n) not in docs and len(n.value.split()) > 3]


SETTINGS = {"tables": ("7.5",), "printed": ("1 %",), "figures": ("one of the six",)} # scales; a rule; data sets

def test_no_result_is_typed_in_a_caption():
    modules = sorted((ROOT / "s4s_nb" / "paper").glob("*.py"))
    sentences = {path.stem: captions(path) for path in modules}
    assert sum(map(len, sentences.values())) > 150
    found = {name: [t for s in of for t in typed(s, SETTINGS.get(name, ()))] for name, of in sentences.items()}
    assert not any(found.values()), found


@pytest.mark.parametrize("prose", ["It takes away 20 % of it.", "that is 1.5× better", "a third of the error",
                                   "the error falls to 0.21", "an FID of 3.73", "twice as far", "Seven of eight fall",
                                   "by a tenth less", "20 percent"])
def test_the_search_finds_results(prose): assert typed(prose)


@pytest.mark.parametrize("prose", ["of order 2 at NFE 4", "`--rate 5%`", r"$\times 1.5\%$", "from 40 to 80 steps",
                                   "```\n20 %\n```", "Section 4.2 says", "twice the pairs", "one of these"])
def test_the_search_leaves_the_rest_alone(prose): assert not typed(prose)
