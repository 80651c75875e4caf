"""The page by the rules of axe-core, which `npm install --no-save axe-core` puts into the folder of the project."""

import pytest
from browser import ROOT

AXE = ROOT / "node_modules/axe-core/axe.min.js"
pytestmark = pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed: npm install --no-save axe-core")
RUN = """
const [rules, done] = arguments;
const said = ({id, help, nodes}) => nodes.map(node => `${id}: ${help}: ${node.html.slice(0, 150)}`);
axe.run(document, {resultTypes: ["violations"], ...rules && {runOnly: rules}})
  .then(({violations}) => done(violations.flatMap(said)), error => done([String(error)]));
"""


def violations(visit):
    """What axe-core finds: by all its rules in light, and by that of contrast in dark."""
    found = visit.driver.execute_async_script(RUN, None)
    visit.colours(dark=True)
    found += visit.driver.execute_async_script(RUN, ["color-contrast"])
    visit.colours(dark=False)
    return found


def test_no_rule_of_axe_core_is_violated(visit):
    visit.run(AXE.read_text())
    assert violations(visit) == []
    visit.example("fish").run("at('details').click(); at('select').click(); list.querySelector('.photo').click()")
    assert violations(visit) == []
    visit.run("select(false); open(0)")
    visit.until("return view.naturalWidth === 128")
    assert violations(visit) == []
    visit.run("viewer.close(); at('help').click()")
    assert violations(visit) == []
    visit.run("at('guide').close(); showMessage('No answer', true); at('help').ariaLabel = ''; at('help').title = ''")
    (found,) = violations(visit)
    assert found.startswith("button-name")
