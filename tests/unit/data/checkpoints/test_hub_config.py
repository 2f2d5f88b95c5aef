"""config.json of a hub model before anything else of it, by the real client from a stand-in hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adder.data.checkpoints.hub_config import folder_with_config
from adder.data.model_types import ModelSettings
from hub_server import serving

ROOT = Path(__file__).resolve().parents[4]
ASK = """
import sys
from adder.data.checkpoints.hub_config import folder_with_config
from adder.data.model_types import ModelSettings
print(folder_with_config(ModelSettings(source=sys.argv[1])))
"""


def ask(home: Path, url: str, source: str, offline: str = "0") -> str:
    """In a process of its own: the client reads its environment when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": str(ROOT / "workflow_scripts"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", ASK, source]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60).stdout.strip()


def test_one_small_file_is_fetched_once(tiny_model_dir, tmp_path):
    with serving({"org/tiny": tiny_model_dir}) as hub:
        folder = ask(tmp_path, hub.url, "org/tiny")
        assert json.loads((Path(folder) / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        assert not any("safetensors" in path for _, path, _ in hub.asked)
        count = len(hub.asked)
        assert ask(tmp_path, hub.url, "org/tiny") == folder and len(hub.asked) == count  # out of the cache
        assert ask(tmp_path, hub.url, "org/absent") == "None"
    assert ask(tmp_path, hub.url, "org/other") == ask(tmp_path, hub.url, "org/other", "1") == "None"


@pytest.mark.parametrize("settings", [{"source": "org/it", "file": "it.gguf"}, {"source": "./no/hub/id"}])
def test_what_is_no_repository_of_safetensors_is_not_asked_for(settings):
    assert folder_with_config(ModelSettings(**settings)) is None
