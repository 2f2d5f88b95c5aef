"""Loading the base: what it takes of main memory while it is quantised."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import save_tiny_model

ROOT = Path(__file__).resolve().parents[3]
SHARD = 50_000_000  # bytes
LOAD = """
import json, sys, threading, time
from pathlib import Path
import bitsandbytes, torch
from adder.training import base_model

torch.set_num_threads(1)

def held():  # anonymous memory: mapped files can be dropped at any time
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

most, going = [0], True
def watch():
    while going:
        most[0] = max(most[0], held())
        time.sleep(0.002)

base_model.choose_nf4_values = lambda *_: base_model.Choice("dequantised in each product", "test")
thread = threading.Thread(target=watch)
thread.start()
model, _ = base_model.load(Path(sys.argv[1]), "qlora", "bfloat16", "cpu")
going = False
thread.join()
layers = base_model.four_bit_layers(model)
print(json.dumps({"after": held(), "most": most[0], "layers": len(layers)}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_model_is_quantised_shard_by_shard(tmp_path):
    """Six shards of 50 MB in bf16: beside what stays, loading holds less than two of them at any time.

    What a matrix takes while it is quantised counts, some 20 bytes a number, 63 MB for the largest here.
    """
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16}
    source = save_tiny_model(tmp_path / "source", num_key_value_heads=4, **shape)
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder, max_shard_size=SHARD)
    assert len(list(folder.glob("*.safetensors"))) >= 5
    environment = {"PYTHONPATH": str(ROOT / "workflow_scripts"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["layers"] == 12 * 7
    assert found["most"] - found["after"] < 2 * SHARD, found
