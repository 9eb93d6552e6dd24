"""What the documentation shows runs as it stands there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p) and p.name != "README.md"], ids=lambda page: page.name)
def test_python_in_the_documentation_runs(page):
    """That of the README calls a service: tests/test_serve.py."""
    names: dict = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)
    if page.name == "adapters.md":
        gradients = {name for name, p in names["model"].named_parameters() if p.grad is not None}
        assert gradients and all(".B_" in n or ".A" in n or ".router." in n for n in gradients)
        assert gradients <= set(names["state"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_documentation_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not (page.parent / link).exists()]
