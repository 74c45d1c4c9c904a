"""The documentation says the same everywhere, and what it is given while it is built is right."""

import importlib.util
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml

import dualview as dv
from dualview import models, train

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted({*DOCS.rglob("*.md"), *ROOT.glob("*.md")})


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "scripts" / "docs_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(name):
    return (DOCS / name).read_text(encoding="utf-8")


def test_all_names_stand_in_one_line(hooks):
    page = hooks.on_page_markdown(text_of("reference/index.md"))
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\[[\w.]+\] \| (.+) \|$", page, re.MULTILINE))
    public = {*dv.__all__, *models.__all__, *dv.testing.__all__, *train.__all__} - {"__version__", "testing"}
    assert rows.keys() == public
    assert all(len(text) < 160 for text in rows.values())


def test_a_name_that_is_new_is_listed(hooks, monkeypatch):
    monkeypatch.setattr(dv, "__all__", [*dv.__all__, "new_name"])
    monkeypatch.setattr(dv, "new_name", type("new_name", (), {"__doc__": "What it is. More."}), raising=False)
    assert "| [`new_name`][dualview.new_name] | What it is. |" in hooks.all_names()


def test_equations_become_mathml(hooks):
    pytest.importorskip("latex2mathml")
    equations = [
        tex for page in PAGES for tex in re.findall(r"```math\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    assert len(equations) >= 4
    for tex in equations:
        root = ET.fromstring(hooks.equation(tex, "block"))
        assert root.tag == "{http://www.w3.org/1998/Math/MathML}math"
    page = hooks.mathml('<p>$<code>a &lt; b_1</code>$</p><pre class="math"><code>\\sqrt{d}</code></pre>')
    assert page.count("<math") == 2
    assert "<msub><mi>b</mi><mn>1</mn></msub>" in page
    assert "<msqrt>" in page
    for unknown in (r"\nosuch{a}", r"\begin{aligned} a &= b \end{aligned}"):
        with pytest.raises(ValueError, match="latex2mathml does not know"):
            hooks.equation(unknown, "block")


def test_drawing_of_the_module_is_well_formed():
    root = ET.parse(DOCS / "assets" / "dem.svg").getroot()
    _, _, width, height = map(float, root.get("viewBox").split())
    names = {"text": "x y", "rect": "x y"}
    for element in root.iter():
        place = [float(element.get(name)) for name in names.get(element.tag.rpartition("}")[2], "").split()]
        assert not place or (0 <= place[0] <= width and 0 <= place[1] <= height)
    words = " ".join("".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text"))
    for part in ("local tiles", "stride tiles", "F_loc", "F_glo", "V_loc", "V_glo", "fusion", "readout"):
        assert part in words


def test_citation_and_bibtex_agree():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = cited["preferred-citation"]
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()
    assert cited["license"] == "Apache-2.0"
    (entry,) = re.findall(r"```bibtex\n(.*?)```", text_of("index.md"), re.DOTALL)
    fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", entry, re.MULTILINE))
    assert entry.count("{") == entry.count("}")
    assert fields["title"] == paper["title"]
    assert fields["author"] == " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    assert (int(fields["year"]), fields["url"]) == (paper["year"], paper["url"])
    assert fields["eprint"] in paper["journal"]


def test_figures_that_stand_on_two_pages_agree():
    (cpu,) = re.findall(
        r"^\| time of the module .* two CPU cores \| (.*?) \| (.*?) \|", text_of("choosing.md"), re.MULTILINE
    )
    first_page = text_of("index.md")
    for preset, time in zip(("released DEM", "paper's DEM"), cpu, strict=True):
        assert f"| {preset}, forward | {time} |" in first_page
    (gpu,) = re.findall(
        r"^\| time of the module .* batch 16, .* \| (.*?) ms \| (.*?) ms \|", text_of("choosing.md"), re.MULTILINE
    )
    for preset, time in zip(("released", "paper"), gpu, strict=True):
        assert re.search(rf"^\| {preset}, forward \| 16 \|.* / {time} \|$", text_of("kernels.md"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_advises_nothing_that_does_not_exist(page):
    """Nothing is published: an index that had the name would have it from a stranger."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"pip install (?!-e )[^\n]*dualview", text)
    assert "labels=tokens)" not in text
    assert not re.search(r"<(your|owner|url|org)[\w-]*>|example\.(com|org)|TODO", text, re.IGNORECASE)
