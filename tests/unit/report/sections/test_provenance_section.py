"""Provenance and cost: digests of every file, price and energy where they are known."""

import hashlib

import pytest

from adder.core.files import read_json
from adder.report.sections import (
    provenance_section,
)
from report_pages import section


def test_cost_has_price_and_energy_only_where_they_are_known(everything, finished):
    cost = read_json(everything / "metrics.json")["cost"]
    assert cost["total_seconds"] == pytest.approx(sum(cost["seconds"].values()))
    assert cost["price"] == {
        "value": pytest.approx(2.4 * cost["total_seconds"] / 3600),
        "per_hour": 2.4,
        "currency": "EUR",
    }
    assert cost["energy"]["joules"] == pytest.approx(45 * cost["total_seconds"])
    assert set(cost["seconds"]) > {"train", "task_base_0", "task_tuned_2", "judge"}
    shown = section(everything, "provenance").replace("\u00a0", " ")
    assert (
        "Price 0.63 EUR at 2.40 EUR an hour" in shown
        and "Energy 11.8 Wh of CPU and memory, recorded by all stages" in shown
    )
    kwh = cost["energy"]["joules"] / 3.6e6
    assert (cost["energy"]["price"], cost["energy"]["co2_grams"]) == pytest.approx((0.3 * kwh, 380 * kwh))
    assert "Price of the energy 0.00353 EUR by report.price_per_kwh CO₂ 4.47 g" in shown
    assert "task_tuned_1 arc_easy" in shown
    cost = read_json(finished / "metrics.json")["cost"]
    assert cost["price"] is None and cost["energy"] is None
    assert "Price" not in section(finished, "provenance") and "Energy" not in section(finished, "provenance")
    amounts = {0.0123: "0.0123 EUR", 0: "0.00 EUR", 1234.5: "1,234.50 EUR"}
    assert {value: provenance_section.money(value, "EUR") for value in amounts} == amounts


def test_every_file_of_model_data_and_adapter_has_its_digest(everything):
    shown = section(everything, "provenance")
    stages = everything.parent / "stages"
    files = [p for stage, name in (("model", "model"), ("train", "adapter"), ("merge", "model"))
             for p in (next((stages / stage).iterdir()) / name).iterdir()]  # fmt: skip
    files.append(next((stages / "data").iterdir()) / "rows.jsonl")
    assert len(files) == 9
    for path in files:
        digest = hashlib.blake2b(path.read_bytes(), digest_size=20).hexdigest()  # what b2sum -l 160 prints
        assert f"{path.as_posix()} " in shown and digest in shown[shown.index(path.as_posix()) :][:200], path
    assert "88bb" * 16 in shown, "the source's own digest, whole"
