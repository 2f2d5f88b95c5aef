"""What is read of the machine is what it has."""

import os

import psutil
import torch

from adder.core import hardware


def test_threads_are_all_cores_of_the_process_or_those_that_are_asked_for():
    assert hardware.threads("auto") == hardware.available_cores()
    assert not hasattr(os, "sched_getaffinity") or hardware.available_cores() == len(os.sched_getaffinity(0))
    assert hardware.threads(3) == 3
    before = torch.get_num_threads()
    try:
        assert hardware.use_threads(2) == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_memory_is_that_of_the_machine():
    assert hardware.total_memory("cpu") == psutil.virtual_memory().total
    assert 0 < hardware.free_memory("cpu") <= hardware.total_memory("cpu")


def test_a_part_of_a_gpu_can_stand_for_all_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70e9, 80e9))
    monkeypatch.setenv("ADDER_MEMORY_LIMIT_GB", "24")
    assert hardware.total_memory("cuda") == 24e9


def test_provenance_names_cpu_memory_and_system():
    found = hardware.describe()
    assert found["cpu"] and found["cores"] >= 1 and found["memory_bytes"] > 1e8 and found["system"]
