"""Checkpoints of this project on the Hugging Face hub: pushed with a model card, pulled by name."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.systems.trained_systems import NOTEBOOK_OF
from nbhelpers.towers import checkpoints

FILE, CARD = "model.safetensors", "README.md"
NEEDS = {
    "pe_rsitr": "It holds the adapter alone: the CLIP below it is needed too.",
    "bita": (
        "It holds what was trained alone: the frozen image tower and language model are needed too."
    ),
}


def push(checkpoint: Path | str, repository: str, public: bool = False) -> str:
    """Upload a checkpoint of this project and a model card to `owner/name`.

    A missing repository is made, private by default.

    Returns the address. UserError for a file that is no such checkpoint, without a network, without
    a token that may write.
    """
    path = checkpoints.weight_file(Path(checkpoint).expanduser())
    about = _about(path)
    with _in_one_sentence(repository, "push"), tempfile.TemporaryDirectory() as folder:
        if get_token() is None:
            raise UserError(
                "No token of the hub is known; run `hf auth login`, or set HF_TOKEN to one that may"
                " write."
            )
        shutil.copyfile(path, Path(folder, FILE))
        Path(folder, CARD).write_text(card(about, repository), encoding="utf-8")
        api = HfApi()
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"Checkpoint of {about['system']}",
        )
    return str(address)


def pull(repository: str, folder: Path | str, revision: str | None = None) -> Path:
    """Fetches what `push` uploaded into `folder`, whole or not at all; returns the model's file.

    UserError where nothing is found or reached, for a repository without such a checkpoint, and if
    another file is there.
    """
    with _in_one_sentence(repository, "pull"):
        fetched = (
            Path(snapshot_download(repository, revision=revision, allow_patterns=[FILE, CARD]))
            / FILE
        )
    if not fetched.is_file():
        raise UserError(
            f"{repository} holds no {FILE}; name a repository that `weights push` filled."
        )
    _about(fetched)
    path = Path(folder).expanduser() / FILE
    if path.exists() and checkpoints.sha256(path) != checkpoints.sha256(fetched):
        raise UserError(f"{path} is there and holds something else; choose another folder.")
    with atomic_write(path) as temporary:
        shutil.copyfile(fetched, temporary)
    return path


def _about(path: Path) -> dict:
    """What a checkpoint says of itself."""
    _, about = checkpoints.load_checkpoint(path)
    if about.get("system") not in NOTEBOOK_OF:
        raise UserError(
            f"{path} is not a trained system; give the model.safetensors of one of"
            f" {', '.join(NOTEBOOK_OF)}."
        )
    return about


def card(about: dict, repository: str) -> str:
    """The model card: which system, how it was trained, what else it needs, how to load it.

    Markdown with a YAML head.
    """
    system, last = about["system"], (about.get("history") or [{}])[-1]
    towers = [
        value
        for value in about.get("model", {}).values()
        if isinstance(value, str) and value.endswith("_standin")
    ]
    notes = [NEEDS[system]] if system in NEEDS else []
    if towers:
        notes += [
            f"It stands on stand-in towers ({', '.join(sorted(set(towers)))}) that this project"
            " trained itself; it needs the `starting` files of its run and is for study only."
        ]
    figures = [
        f"| {name} | {value:.4g} |"
        for name, value in last.items()
        if isinstance(value, int | float)
    ]
    if figures:
        figures = [
            "The last epoch, on training and validation data:",
            "",
            "| figure | value |",
            "|---|---|",
            *figures,
            "",
        ]
    task = "image-captioning" if system == "bita" else "image-text-retrieval"
    return "\n".join(
        [
            "---",
            "library_name: nbhelpers",
            f"tags: [remote-sensing, {task}]",
            "---",
            f"# {system}",
            "",
            (
                f"Trained by `{NOTEBOOK_OF[system]}` of nbhelpers, a reproduction; not the authors'"
                " weights."
            ),
            *notes,
            "",
            "```sh",
            f"python -m nbhelpers weights pull {repository} --out {system}",
            "```",
            "```python",
            f'model = nbhelpers.load("{system}", "{system}/{FILE}")',
            "```",
            "",
            *figures,
            "Its configuration:",
            "",
            "```json",
            json.dumps(about.get("model", {}), indent=1, sort_keys=True),
            "```",
            "",
        ]
    )


@contextmanager
def _in_one_sentence(repository: str, what: str):
    """The hub's errors in a sentence."""
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"'{repository}' is not a name on the hub; give owner/name.") from error
    except (
        OfflineModeIsEnabled,
        LocalEntryNotFoundError,
        httpx.TransportError,
        ConnectionError,
    ) as error:
        raise UserError(
            f"The hub cannot be reached, so there is no {what} of {repository}; look for a network,"
            " and whether HF_HUB_OFFLINE is set."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise UserError(
            f"The hub refuses the {what} of {repository} ({status}); check its name, and that your"
            " token (`hf auth login` or HF_TOKEN) may do that."
        ) from error
