"""Checkpoints on the hub, against a folder that stands in for it; offline and without a token, what
is said.
"""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
import yaml
from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

import nbhelpers
from nbhelpers.__main__ import main
from nbhelpers.errors import UserError
from nbhelpers.papers import pir_clip
from nbhelpers.systems import hub
from nbhelpers.systems.trained_systems import NOTEBOOK_OF
from nbhelpers.towers import checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = pir_clip.PIRCLIP(pir_clip.PIRCLIPConfig.tiny())
    history = [{"epoch": 1, "loss": 2.5}, {"epoch": 2, "loss": 1.25}]
    about = {"system": "pir_clip", "model": asdict(model.config), "history": history}
    return checkpoints.save_checkpoint(
        tmp_path_factory.mktemp("hub") / "model.safetensors", model, about
    )


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """The hub as a folder: what `hub` calls of it, with the signatures of the real one."""
    calls = SimpleNamespace(folder=tmp_path / "remote", created=[])

    def refused(repository):
        response = httpx.Response(
            404, request=httpx.Request("GET", f"https://huggingface.co/{repository}")
        )
        raise RepositoryNotFoundError("404", response=response)

    class Api:
        def create_repo(self, repo_id, *, private, exist_ok):
            calls.created.append((repo_id, private, exist_ok))
            (calls.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, calls.folder / repo_id, dirs_exist_ok=True)

    def download(repo_id, *, revision, allow_patterns):
        if not (calls.folder / repo_id).is_dir() or revision not in (None, "main"):
            refused(repo_id)
        return str(calls.folder / repo_id)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "get_token", lambda: "a token")
    return calls


def test_the_stand_in_takes_what_the_hub_takes():
    for function, names in (
        (HfApi.create_repo, {"repo_id", "private", "exist_ok"}),
        (HfApi.upload_folder, {"repo_id", "folder_path", "commit_message"}),
        (snapshot_download, {"repo_id", "revision", "allow_patterns"}),
    ):
        assert names <= set(inspect.signature(function).parameters)


def test_what_was_pushed_is_pulled_and_loads(checkpoint, remote, tmp_path, capsys):
    assert main(["weights", "push", str(checkpoint), "me/mine"]) == 0
    assert capsys.readouterr().out == "The checkpoint is at https://huggingface.co/me/mine.\n"
    assert remote.created == [("me/mine", True, True)]
    assert sorted(path.name for path in (remote.folder / "me/mine").iterdir()) == [
        "README.md",
        "model.safetensors",
    ]
    for _ in range(2):  # pulled again, the file is the same
        assert main(["weights", "pull", "me/mine", "--out", str(tmp_path / "here")]) == 0
    assert checkpoints.sha256(tmp_path / "here/model.safetensors") == checkpoints.sha256(checkpoint)
    one, other = (
        nbhelpers.load("pir_clip", checkpoint),
        nbhelpers.load("pir_clip", tmp_path / "here/model.safetensors"),
    )
    assert (one.encode_texts(["a pond"]) == other.encode_texts(["a pond"])).all()
    hub.push(checkpoint.parent, "me/public", public=True)
    assert remote.created[-1] == ("me/public", False, True)


def test_the_card_says_what_it_is_and_needs(checkpoint):
    about = checkpoints.load_checkpoint(checkpoint)[1]
    card = hub.card(about, "me/mine")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "nbhelpers",
        "tags": ["remote-sensing", "image-text-retrieval"],
    }
    assert (
        "| loss | 1.25 |" in body
        and "stand-in towers (clip_standin" in body
        and "not the authors' weights" in body
    )
    assert "weights pull me/mine" in body
    bare = hub.card({"system": "bita", "model": {"image": "efficientnet_lite0"}}, "me/mine")
    assert (
        "frozen image tower" in bare
        and "stand-in" not in bare
        and "image-captioning" in bare
        and "| figure" not in bare
    )


def test_what_is_not_pushed(checkpoint, remote, tmp_path, monkeypatch):
    toy = checkpoints.save_checkpoint(tmp_path / "toy", {"a": torch.zeros(1)}, {"name": "toy"})
    foreign = tmp_path / "foreign.pt"
    torch.save({"a": torch.zeros(1)}, foreign)
    for file, sentence in (
        (toy, "is not a trained system"),
        (foreign, "not a checkpoint of this project"),
        (tmp_path / "none", "no weight file"),
    ):
        with pytest.raises(UserError, match=sentence):
            hub.push(file, "me/mine")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="No token of the hub is known; run `hf auth login`"):
        hub.push(checkpoint, "me/mine")
    assert remote.created == [] and not remote.folder.exists()


def test_what_is_not_pulled(checkpoint, remote, tmp_path):
    with pytest.raises(UserError, match=r"refuses the pull of me/none \(404\); check its name"):
        hub.pull("me/none", tmp_path / "here")
    (remote.folder / "me/empty").mkdir(parents=True)
    with pytest.raises(UserError, match="me/empty holds no model.safetensors"):
        hub.pull("me/empty", tmp_path / "here")
    checkpoints.save_checkpoint(
        remote.folder / "me/toy/model", {"a": torch.zeros(1)}, {"name": "toy"}
    )
    with pytest.raises(UserError, match="is not a trained system"):
        hub.pull("me/toy", tmp_path / "here")
    assert not (tmp_path / "here").exists()
    hub.push(checkpoint, "me/mine")
    (tmp_path / "here").mkdir()
    (tmp_path / "here/model.safetensors").write_text("mine")
    with pytest.raises(UserError, match="is there and holds something else; choose another folder"):
        hub.pull("me/mine", tmp_path / "here")
    assert (tmp_path / "here/model.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    "argv", [["push", "FILE", "me/mine"], ["pull", "me/mine", "--out", "here"]]
)
def test_offline_is_one_line(argv, checkpoint, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "get_token", lambda: "a token")
    assert main(["weights", *(str(checkpoint) if word == "FILE" else word for word in argv)]) == 1
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.count("\n") == 1
        and "cannot be reached" in err
        and "HF_HUB_OFFLINE" in err
    )
    assert list(Path(tmp_path).iterdir()) == []


def test_a_name_that_cannot_be_is_told(checkpoint, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: "a token")
    with pytest.raises(UserError, match="'a//b' is not a name on the hub; give owner/name"):
        hub.push(checkpoint, "a//b")


# ---- advice that is followed
def refusal(function, *arguments) -> str:
    """The message of a call that must fail."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    """The real look for a token, on a machine that has none."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "get_token", get_token)


def test_advice_the_command_to_log_in_exists():
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "auth", "login", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--token" in done.stdout
    scripts = {script.name: script.value for script in entry_points(group="console_scripts")}
    assert scripts["hf"].startswith("huggingface_hub.cli.hf:")


@pytest.mark.parametrize("way", ["HF_TOKEN", "hf auth login"])
def test_advice_a_token_is_set_or_kept_by_the_login(checkpoint, remote, no_token, monkeypatch, way):
    message = refusal(hub.push, checkpoint, "me/mine")
    assert message.endswith("; run `hf auth login`, or set HF_TOKEN to one that may write.")
    if way == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
    else:
        Path(constants.HF_TOKEN_PATH).write_text("hf_mine")  # as the login does
    assert hub.push(checkpoint, "me/mine") == "https://huggingface.co/me/mine"


def test_advice_a_name_of_owner_and_name_is_taken(checkpoint, remote, monkeypatch):
    with monkeypatch.context() as real:
        real.setattr(hub, "HfApi", HfApi)
        assert refusal(hub.push, checkpoint, "a//b").endswith("; give owner/name.")
    assert hub.push(checkpoint, "owner/name").endswith("/owner/name")


def test_advice_a_repository_that_push_filled_is_pulled(checkpoint, remote, tmp_path):
    (remote.folder / "me/empty").mkdir(parents=True)
    message = refusal(hub.pull, "me/empty", tmp_path / "here")
    assert message.endswith("; name a repository that `weights push` filled.")
    assert main(["weights", "push", str(checkpoint), "me/full"]) == 0
    assert hub.pull("me/full", tmp_path / "here").is_file()


def test_advice_another_folder_is_chosen(checkpoint, remote, tmp_path):
    hub.push(checkpoint, "me/mine")
    (tmp_path / "model.safetensors").write_text("mine")
    assert refusal(hub.pull, "me/mine", tmp_path).endswith("; choose another folder.")
    found = hub.pull("me/mine", tmp_path / "other")
    assert checkpoints.sha256(found) == checkpoints.sha256(checkpoint)


@pytest.mark.parametrize("system", NOTEBOOK_OF)
def test_advice_the_file_of_a_trained_system_is_pushed(system, remote, tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoints.save_checkpoint(path, {"a": torch.zeros(1)}, {"name": "toy"})
    message = refusal(hub.push, path, "me/mine")
    listed = message.split("give the model.safetensors of one of ")[1].removesuffix(".")
    assert system in listed.split(", ")
    checkpoints.save_checkpoint(path, {"a": torch.zeros(1)}, {"system": system})
    assert hub.push(path, "me/mine").endswith("me/mine")


def test_advice_another_name_or_token_is_taken(checkpoint, remote, tmp_path, monkeypatch):
    advice = "check its name, and that your token (`hf auth login` or HF_TOKEN) may do that."
    hub.push(checkpoint, "me/mine")
    assert refusal(hub.pull, "me/mien", tmp_path / "here").endswith(advice)
    assert hub.pull("me/mine", tmp_path / "here").is_file()

    def forbidden(*_, **__):
        request = httpx.Request("POST", "https://huggingface.co/api/repos/create")
        raise HfHubHTTPError("403", response=httpx.Response(403, request=request))

    with monkeypatch.context() as reading:  # a token that may only read
        reading.setattr(hub.HfApi, "create_repo", forbidden)
        assert refusal(hub.push, checkpoint, "me/mine").endswith(advice)
    assert hub.push(checkpoint, "me/mine").endswith("me/mine")


@pytest.mark.parametrize("command", ["push", "pull"])
def test_advice_with_a_network_it_works(checkpoint, remote, tmp_path, command):
    """The message comes from the real client, whose environment says HF_HUB_OFFLINE=1."""
    with pytest.MonkeyPatch.context() as real:
        real.setattr(hub, "HfApi", HfApi)
        real.setattr(hub, "snapshot_download", snapshot_download)
        asked = (checkpoint, "me/mine") if command == "push" else ("me/mine", tmp_path / "here")
        message = refusal(getattr(hub, command), *asked)
    assert message.endswith("; look for a network, and whether HF_HUB_OFFLINE is set.")
    assert constants.HF_HUB_OFFLINE
    hub.push(checkpoint, "me/mine")
    assert hub.pull("me/mine", tmp_path / "here").is_file()


def test_hf_hub_offline_is_what_keeps_the_client_from_the_network():
    """Without it, the client asks the hub: here a local server, which refuses."""
    code = (
        "from nbhelpers.systems import hub; from nbhelpers.errors import UserError\n"
        "try: hub.pull('me/mine', 'here')\n"
        "except UserError as error: print(error)"
    )
    with refusing_hub() as address:
        environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
    assert "refuses the pull of me/mine (404)" in done.stdout, done.stderr


@contextmanager
def refusing_hub():
    """The address of a server that answers 404, as the hub does for a repository it lacks."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
