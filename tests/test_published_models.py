"""Published models, by their config.json and the headers of their weights: each can be planned, at its real size."""

import re
from math import prod

import pytest

from conversion.cli import main
from conversion.families import ALIASES, FAMILIES

from .published_models import BILLIONS, PUBLISHED, write_headers


# Whose fields these families share with others that are there.
OTHERS = {"ministral", "cwm", "minicpm3"}


def test_every_family_is_there():
    assert {values["model_type"] for values in PUBLISHED.values()} | OTHERS == {*FAMILIES, *ALIASES}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_model_is_accepted(tmp_path, capsys, name):
    values = PUBLISHED[name]
    shapes = write_headers(tmp_path, name)
    parameters = sum(map(prod, shapes.values()))
    assert parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)
    family = FAMILIES[ALIASES.get(values["model_type"], values["model_type"])]
    options = ["--upcycle", "copy"] if family.dense else []
    code = main([str(tmp_path), str(tmp_path / "out"), "--dry-run", *options])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "exact at the start" in printed.out
    assert int(re.search(r"total parameters +([\d,]+)", printed.out)[1].replace(",", "")) == parameters
    assert ("are in FP8, scaled by blocks of 128 x 128" in printed.out) == ("quantization_config" in values)
    assert ("predicts further tokens" in printed.out) == (values.get("num_nextn_predict_layers", 0) > 0)
