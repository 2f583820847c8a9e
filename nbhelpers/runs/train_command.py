"""The command `train`: one of the five systems, or any CLIP by one of several methods."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from nbhelpers.runs.options import MANY, Data, Device, Profile, Seed, Trainable, in_runs
from nbhelpers.runs.plain_display import plain_display

Method = Literal["full", "linear", "lora", "adapter"]


def train(  # noqa: PLR0913 - each parameter is an option
    *,
    system: Annotated[
        Trainable, typer.Option(help="The system to train; clip: any model, which --model names.")
    ],
    profile: Profile = "default",
    data: Data = "",
    seed: Seed = None,
    model: Annotated[
        str | None, typer.Option(help="clip: a model, by name: NAME,TAG, NAME=FILE, a folder, ...")
    ] = None,
    method: Annotated[Method, typer.Option(help="clip: what of the model is trained.")] = "full",
    activation: Annotated[
        str | None, typer.Option(help="clip: gelu or quickgelu, where no name tells.")
    ] = None,
    set_name: Annotated[
        str | None, typer.Option("--set", help="clip: the data set; by default the profile's.")
    ] = None,
    epochs: Annotated[
        int, typer.Option(max=MANY, help="clip: passes over the training pairs.")
    ] = 10,
    lr: Annotated[
        float | None, typer.Option(help="clip: peak learning rate; by default the method's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(max=MANY, help="clip: pairs in a batch.")] = 64,
    micro_batch: Annotated[
        str,
        typer.Option(help="clip: pairs at once, with cached gradients; whole, auto or a number."),
    ] = "whole",
    precision: Annotated[str, typer.Option(help="clip: fp32, tf32, bf16 or fp16.")] = "fp32",
    rank: Annotated[int, typer.Option(max=4096, help="clip: rank of LoRA.")] = 4,
    bottleneck: Annotated[int, typer.Option(max=4096, help="clip: width inside the adapter.")] = 64,
    device: Device = "auto",
) -> None:
    """Train one system, on one GPU or several; or fine-tune any CLIP.

    On several: accelerate launch -m nbhelpers train ...
    """
    from nbhelpers.runs import batch

    values = batch.read_profile(profile)  # before torch is imported
    if system != "clip":
        if model:
            raise typer.BadParameter(
                f"--model belongs to --system clip; leave it out for {system}."
            )
        with plain_display():
            batch.train(system, profile, data, seed)
        return
    if not model:
        raise typer.BadParameter("--system clip trains the model that --model names; give it, too.")
    from nbhelpers.papers.any_clip import AnyCLIPConfig
    from nbhelpers.tasks.fine_tuning import RATES
    from nbhelpers.training import device as devices
    from nbhelpers.training.loop import TrainConfig

    devices.use(device)
    config = AnyCLIPConfig(model, method, activation, rank, bottleneck)
    training = TrainConfig(
        epochs,
        RATES[method] if lr is None else lr,
        batch_size,
        precision=precision,
        micro_batch=micro_batch,
        seed=batch.profile_seed(profile) if seed is None else seed,
    )
    _fine_tune(config, training, set_name or values.get("SET", "scenes"), data, profile)


def _fine_tune(config: Any, training: Any, set_name: str, data: str, profile: str) -> None:
    """Fine-tune, and print where the model and its record are."""
    from nbhelpers.data.catalog import open_dataset
    from nbhelpers.paths import runs_root
    from nbhelpers.results import records
    from nbhelpers.tasks import fine_tuning
    from nbhelpers.training.distributed import process_state

    with in_runs("train of clip"):
        dataset = open_dataset(set_name, data)
        found = fine_tuning.fine_tune(config, dataset, training, runs_root() / profile, profile)
    if not process_state().is_main_process:
        return
    metrics = records.read_one(found.record)["metrics"]["expectation"]
    print(f"mR on test: {metrics['mR']:.2f}")
    print(f"The record is {found.record}.")
    print(f"The model is {found.checkpoint}; name it clip={found.checkpoint}.")
