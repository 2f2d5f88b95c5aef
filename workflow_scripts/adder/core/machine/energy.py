"""Energy that this machine's own counters tell: of CPUs and their memory by RAPL, of NVIDIA's cards by NVML.

The counters are the machine's: what other programs use meanwhile is in them. RAPL's can be read by root alone on most
systems (CVE-2020-8694), and not at all on most virtual machines: then nothing is told of these parts.
https://docs.kernel.org/power/powercap/powercap.html, https://docs.nvidia.com/deploy/nvml-api/
"""

import ctypes
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

RAPL = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"
UUID_BYTES = 96
# RAPL's counters begin at zero again, the smallest after 65 kJ: at 1 kW that takes a minute.
READ_EVERY = 20.0

Part = Literal["cpu", "memory", "gpu"]


@dataclass
class Counter:
    """What one counter says.

    card: UUID of the card that it is of. read: joules since whenever. wraps: joules after which it begins again; None
    for never.
    """

    part: Part
    read: Callable[[], float | None]
    wraps: float | None = None
    card: str | None = None
    last: float | None = None
    joules: float = 0.0

    def update(self) -> None:
        """Add what was used since the last call."""
        now = self.read()
        if now is None:
            return
        if self.last is not None:
            used = now - self.last
            if used < 0:  # begun again: at its end, or because the driver was loaded anew
                used = used + self.wraps if self.wraps is not None else now
            self.joules += used
        self.last = now


def rapl_counters(folder: Path | None = None) -> Iterator[Counter]:
    """Those of all CPU packages and of the memory beside each.

    "psys" is left out, which has the packages in it, and so are cores and graphics, which the packages have;
    intel-rapl-mmio has the same packages again. AMD's are called intel-rapl too. folder: RAPL's, where it isn't the
    system's.
    """
    parts: dict[str, Part] = {"package": "cpu", "dram": "memory"}
    for zone in sorted((folder or RAPL).glob("intel-rapl:*")):
        with suppress(OSError, ValueError):
            part = parts.get((zone / "name").read_text().strip().partition("-")[0])
            if part is not None:
                wraps = int((zone / "max_energy_range_uj").read_text()) / 1e6
                yield Counter(part, _reader(zone / "energy_uj"), wraps)


def _reader(file: Path) -> Callable[[], float | None]:
    def read() -> float | None:
        try:
            return int(file.read_text()) / 1e6
        except (OSError, ValueError):
            return None

    return read


def nvml_counters(library: Any = None) -> Iterator[Counter]:
    """Those of all cards; none of one from before Volta. library: NVML, where it isn't the system's."""
    try:
        nvml = library or ctypes.CDLL(NVML)
        count = ctypes.c_uint()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return
    except (OSError, AttributeError):
        return
    for index in range(count.value):
        card, uuid = ctypes.c_void_p(), ctypes.create_string_buffer(UUID_BYTES)
        if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(card)):
            continue
        if not nvml.nvmlDeviceGetUUID(card, uuid, ctypes.c_uint(UUID_BYTES)):
            yield Counter("gpu", _card_reader(nvml, card), card=uuid.value.decode())


def _card_reader(nvml: Any, card: ctypes.c_void_p) -> Callable[[], float | None]:
    def read() -> float | None:
        found = ctypes.c_ulonglong()
        failed = nvml.nvmlDeviceGetTotalEnergyConsumption(card, ctypes.byref(found))
        return None if failed else found.value / 1e3

    return read


def cards_in_use(by_children: bool = False) -> list[str]:
    """UUIDs ("GPU-…") of the cards that torch sees here; none where this process has computed on none.

    by_children: whether processes that it started have.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not (torch.cuda.is_initialized() or by_children):
        return []
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [f"GPU-{card.uuid}" for card in found]  # a part of a card (MIG) has a UUID that no counter has


@dataclass
class Meter:
    """Counters, read one after the other."""

    counters: list[Counter]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def update(self) -> None:
        """Read them."""
        with self.lock:
            for counter in self.counters:
                counter.update()

    def joules(self, cards: Iterable[str] = ()) -> dict[Part, float]:
        """What was used between the first reading and this one, by part; without cards that aren't among `cards`.

        A part of which no counter tells is left out.
        """
        self.update()
        wanted, found = {None, *cards}, dict[Part, float]()
        for counter in self.counters:
            if counter.last is not None and counter.card in wanted:
                found[counter.part] = found.get(counter.part, 0.0) + counter.joules
        return found


@contextmanager
def measured(counters: Iterable[Counter] | None = None) -> Iterator[Meter]:
    """A meter that is read from here on, and often enough not to miss a counter's end."""
    meter = Meter(list(counters) if counters is not None else [*rapl_counters(), *nvml_counters()])
    meter.update()
    over = threading.Event()

    def read_on() -> None:
        while not over.wait(READ_EVERY):
            meter.update()

    reading = threading.Thread(target=read_on, daemon=True)
    if meter.counters:
        reading.start()
    try:
        yield meter
    finally:
        over.set()
