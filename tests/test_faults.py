"The quick rows of the fault table; all of them: python tests/faults.py --slow"

import pytest
from faults import ROWS, run_row


@pytest.mark.parametrize("name", [n for n, f in ROWS.items() if not f.slow])
def test_fault(name):
    ok, text = run_row(name)
    if ok is None:
        pytest.skip(text)
    assert ok, text
