"Data sets as they are found in practice: every row of the table that `python tests/cases.py` prints."

import pytest
from cases import ROWS, run_row


@pytest.mark.parametrize("name", ROWS)
def test_case(name):
    ok, text = run_row(name)
    if ok is None:
        pytest.skip(text)
    assert ok, text
