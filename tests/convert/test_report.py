"""The report says which layers are fused and why others are not."""

import pytest
from torch import nn as tnn

from fusedmlp.convert import Report, Row, fuse, report, unfuse


def test_the_report_as_data_and_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    layer = tnn.TransformerEncoderLayer(8, 2, 16)
    model = tnn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    before = report(model)
    assert isinstance(before, Report)
    assert (before.pairs, before.linears, before.sequentials) == (12, 36, 0)
    fuse(model, verbose=True)
    text = capsys.readouterr().out
    assert report(model) == before
    assert text == f"{before}\n"
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) == 10
    assert text.splitlines()[0] == "12 of 36 Linears fused with ReLU, 0 Sequentials fused"
    assert "  layers.*.linear1  8 -> 16  x 12" in text.splitlines()
    unfuse(model, verbose=True)
    assert capsys.readouterr().out == "24 Linears and 0 Sequentials given back their former class\n"
    long = Row(("a" * 100 + ".3",), 10**6, 10**6, "Linear only", "word " * 40)
    lines = str(Report((long, long._replace(names=("b", "c"))), 1)).splitlines()
    assert max(map(len, lines)) == 80
    assert any("..." in line for line in lines)
    assert any("b (and 1 other name)" in line for line in lines)
    assert str(report(tnn.Linear(2, 1))).splitlines()[-1] == "  (the model)  2 -> 1"
    assert str(report(tnn.ReLU())) == "0 of 0 Linears fused with ReLU, 0 Sequentials fused"
