"""Energy by a made-up RAPL folder and a made-up NVML; what is told by neither is told by nothing."""

import ctypes
from types import SimpleNamespace

import pytest

from adder.core.machine import energy

RANGE = 65_532_610_987  # microjoules, as an Intel client's counter has it


def zone(folder, place, name, microjoules):
    """A zone of RAPL as Linux shows it."""
    path = folder / place
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path / "energy_uj"


@pytest.fixture
def rapl(tmp_path):
    names = {
        "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0",
    }  # fmt: skip
    return {place: zone(tmp_path, place, name, 5_000_000) for place, name in names.items()}


def test_packages_and_memory_are_counted_once(tmp_path, rapl):
    with energy.measured(energy.rapl_counters(tmp_path)) as meter:
        for file in rapl.values():
            file.write_text("12_000_000".replace("_", ""))
        assert meter.joules() == {"cpu": 14.0, "memory": 7.0}


def test_a_counter_that_begins_again_goes_on(tmp_path, rapl):
    with energy.measured(energy.rapl_counters(tmp_path)) as meter:
        rapl["intel-rapl:0"].write_text(str(RANGE - 1_000_000))
        meter.update()
        rapl["intel-rapl:0"].write_text("2000000")
        assert meter.joules()["cpu"] == pytest.approx(RANGE / 1e6 - 6 + 3)


def test_counters_that_may_not_be_read_tell_nothing(tmp_path, rapl):
    for file in rapl.values():  # root reads whatever its mode
        file.unlink()
        file.mkdir()
    with energy.measured(energy.rapl_counters(tmp_path)) as meter:
        assert meter.joules() == {}
    assert list(energy.rapl_counters(tmp_path / "nowhere")) == []


class Nvml:
    """Two cards, of which the second is too old to tell."""

    def __init__(self):
        self.millijoules = 1000

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, card):
        card._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetUUID(self, card, text, room):
        text.value = f"GPU-{card.value}".encode()
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, card, found):
        found._obj.value = self.millijoules
        return 0 if card.value == 1 else 3  # NVML_ERROR_NOT_SUPPORTED


def test_a_card_counts_where_torch_uses_it():
    library = Nvml()
    with energy.measured(energy.nvml_counters(library)) as meter:
        library.millijoules = 51_000
        assert meter.joules(["GPU-1", "GPU-2"]) == {"gpu": 50.0}
        assert meter.joules(["GPU-2"]) == meter.joules() == {}


def test_without_nvml_no_card_is_counted(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert list(energy.nvml_counters()) == []


def test_the_cards_in_use_are_those_that_torch_sees_once_something_has_computed_there(monkeypatch):
    begun: list[str] = []
    cuda = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: bool(begun), device_count=lambda: 2,
        get_device_properties=lambda index: SimpleNamespace(uuid=f"ab-{index}"),
    )  # fmt: skip
    monkeypatch.setitem(energy.sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert energy.cards_in_use() == []
    assert energy.cards_in_use(by_children=True) == ["GPU-ab-0", "GPU-ab-1"]
    begun.append("a context")
    assert energy.cards_in_use() == ["GPU-ab-0", "GPU-ab-1"]
    monkeypatch.delitem(energy.sys.modules, "torch")
    assert energy.cards_in_use() == []
