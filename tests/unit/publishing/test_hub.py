"""A run goes to a hub and comes back, through `huggingface_hub` and transformers themselves, on a server of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import hub_server
from command_cases import run_command, weights_digest
from zotune.publishing.upload import Upload
from zotune.training import run_folder

#: One process, since the client reads its environment once and its start takes seconds.
SCRIPT = """
import os
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM
from zotune.cli.main import main

print(main(["push", "run", "small-sst2", "--private", "--base_model", "acme/small"]))
AutoModelForCausalLM.from_pretrained("me/small-sst2").save_pretrained("loaded")
snapshot_download("me/small-sst2", local_dir="back")
print(main(["replay", "my-model", "back", "--output_dir", "rebuilt"]))
print(main(["push", "run", "me/branches", "--revision", "draft"]))
words = ["--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--max_steps", "1"]
words += ["--num_train", "8", "--num_dev", "0", "--num_eval", "4", "--method", "mezo", "--learning_rate", "1e-3", "--output_dir", "other"]
print(open("hub/revision.txt").read())
print(main(["train", *words, "--push_to_hub", "--hub_model_id", "me/trained"]))
for token in ("reads-only", "none"):
    os.environ["HF_TOKEN"] = token
    print(main(["push", "run", "me/other"]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that reaches the server, which keeps its repositories in tmp_path/hub."""
    (tmp_path / "hub").mkdir()
    server = hub_server.serve(tmp_path / "hub")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    # Transfers of the hub's own protocol need its servers: the client takes LFS without them.
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    yield {**os.environ, **own, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "writes", "OMP_NUM_THREADS": "1"}
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def trained(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    words = ["--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--max_steps", "2", "--learning_rate", "1e-3"]
    words += ["--num_train", "8", "--num_dev", "0", "--num_eval", "4", "--method", "lozo", "--output_dir", "run"]
    done = run_command(capsys, "train", *words)
    assert done.code == 0, done.err
    return workplace / "run"


def test_a_pushed_run_loads_and_replays(hub: dict[str, str], trained: Path, tmp_path: Path) -> None:
    key = trained / run_folder.PRIVATE_KEY  # as a private run leaves it
    key.parent.mkdir()
    key.write_bytes(b"the noise can be removed by this")
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=hub, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert codes == ["0", "0", "0", "0", "2", "2"], done.stdout + done.stderr
    assert "/me/small-sst2/commit/" in done.stdout
    assert "draft" in done.stdout.splitlines()
    assert json.loads((tmp_path / "hub/created-small-sst2.json").read_text())["visibility"] == "private"
    assert (tmp_path / "hub/branch.txt").read_text() == "draft"
    published = [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    assert published and not any(key.read_bytes() in path.read_bytes() for path in published)
    digest = weights_digest(trained)
    assert (weights_digest(tmp_path / "loaded"), weights_digest(tmp_path / "rebuilt")) == (digest, digest)
    said = [line for line in done.stderr.splitlines() if line.startswith("zotune: ")]
    assert "may not write" in said[0]
    assert "token is missing or wrong" in said[1]
    assert "by zotune" in (tmp_path / "hub/me/trained/README.md").read_text()
    assert not (tmp_path / "hub/me/other").exists()


def test_a_repository_that_is_there_is_not_asked_for_again() -> None:
    """The hub is out of reach here, so that asking would fail."""
    with pytest.raises(ValueError, match=r"keeps the hub out of reach|was not pushed"):
        Upload("me/small").create()
    assert Upload("me/small", address="https://hub/me/small").create() == "https://hub/me/small"
