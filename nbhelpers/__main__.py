"""`python -m nbhelpers`: what is not a notebook."""

from __future__ import annotations

import argparse
import os
import sys

from nbhelpers.data.archives import open_images
from nbhelpers.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Runs one command: 0 on success, 1 and a sentence on stderr if not, 2 for a wrong command
    line.
    """
    parser = _parser()
    arguments, arguments.rest = parser.parse_known_args(argv)
    if arguments.rest and arguments.command is not _records:
        parser.error(f"unrecognized arguments: {' '.join(arguments.rest)}")
    try:
        return arguments.command(arguments) or 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nbhelpers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    data = commands.add_parser("data", help="look at a data set, or decode it").add_subparsers(
        required=True, metavar="check|prepare|shards"
    )
    check = data.add_parser(
        "check", help="what captions and images hold, and what is wrong with them"
    )
    check.add_argument(
        "--captions", required=True, help="file, or folder of a layout of several files"
    )
    check.add_argument(
        "--images", help="folder, zip or tar of the images; left away, they are not looked at"
    )
    check.add_argument(
        "--layout",
        help=(
            "karpathy, precomp, rows, lavis, nwpu, shards, arrow, hub or csv; recognised if left"
            " away"
        ),
    )
    check.set_defaults(command=_check)
    prepare = data.add_parser("prepare", help="decode the images of a set once, into the cache")
    prepare.add_argument(
        "--set",
        default="scenes",
        help="ucm, rsicd, ..., a name of your own; scenes (default) is generated",
    )
    prepare.add_argument("--data", default="", help="folder that holds the set; none for scenes")
    prepare.set_defaults(command=_prepare)
    shards = data.add_parser("shards", help="write images and captions as WebDataset shards")
    shards.add_argument(
        "--captions", required=True, help="file, or folder of a layout of several files"
    )
    shards.add_argument("--images", required=True, help="folder, zip or tar of the images")
    shards.add_argument("--out", required=True, help="new folder for the shards")
    shards.add_argument(
        "--split",
        nargs="+",
        default=["train"],
        help="train (default), val, test; several may be named",
    )
    shards.add_argument(
        "--size", type=int, default=1000, help="most captions in a shard (default 1000)"
    )
    shards.set_defaults(command=_shards)

    train = commands.add_parser(
        "train", help="train one system; on several GPUs: accelerate launch -m nbhelpers train ..."
    )
    train.add_argument("--system", required=True, help="pir, pir_clip, pe_rsitr, cfitr or bita")
    train.add_argument(
        "--profile", default="default", help="a file of notebooks/profiles, without .yaml"
    )
    train.add_argument("--data", default="", help="folder that holds the data sets")
    train.add_argument("--seed", type=int, help="the profile's SEED if left away")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser(
        "eval", help="evaluate a trained retrieval system on images and captions"
    )
    _add_system(evaluate, "pir, pir_clip, pe_rsitr or cfitr")
    evaluate.add_argument(
        "--captions", required=True, help="file of captions, such as dataset_rsicd.json, or folder"
    )
    evaluate.add_argument("--images", required=True, help="folder, zip or tar of the images")
    evaluate.add_argument("--split", default="test", help="train, val or test (default)")
    evaluate.add_argument(
        "--ties",
        default="expectation",
        choices=("expectation", "released"),
        help="who wins among equal scores (default: expectation)",
    )
    evaluate.add_argument(
        "--k", type=int, help="of cfitr: candidates to rerank (default: as its run did, else 70)"
    )
    evaluate.add_argument(
        "--ppsr",
        choices=("online", "transductive", "none"),
        help=(
            "of cfitr: which queries give PPSR its column means: of training "
            "(online, default), or all evaluated ones (transductive, as released)"
        ),
    )
    evaluate.add_argument("--out", help="folder for a result record; left away, none is written")
    evaluate.set_defaults(command=_eval)

    search = commands.add_parser(
        "search", help="find the images of a folder that fit a sentence or resemble an image"
    )
    _add_system(search, "pir, pir_clip, pe_rsitr or cfitr")
    search.add_argument("--images", required=True, help="folder, zip or tar of the images")
    query = search.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="a sentence that says what is seen")
    query.add_argument("--image", help="a file; similar images are found")
    search.add_argument("--top", type=int, default=10, help="how many images to show (default 10)")
    search.set_defaults(command=_search)

    caption = commands.add_parser("caption", help="write a caption for every image")
    _add_system(caption, "bita", default="bita")
    caption.add_argument("--images", required=True, help="folder, zip or tar of the images")
    caption.add_argument(
        "--captions",
        help="file of captions of a data set: only the images of its split, by its ids",
    )
    caption.add_argument(
        "--split", default="test", help="of --captions: train, val or test (default)"
    )
    caption.add_argument(
        "--beams",
        type=int,
        default=5,
        help="sentences that the search keeps at each step (default 5)",
    )
    caption.add_argument(
        "--out",
        help="file of the captions, which `score` reads; left away, they are printed as JSON",
    )
    caption.set_defaults(command=_caption)

    score = commands.add_parser("score", help="score generated captions against references")
    score.add_argument(
        "--captions",
        required=True,
        help="COCO's results, or a file of captions that a notebook wrote",
    )
    score.add_argument(
        "--references",
        required=True,
        help="COCO's ground truth, a file of ours, or captions of a data set",
    )
    score.add_argument(
        "--split", default="test", help="of a data set: train, val or test (default)"
    )
    score.add_argument(
        "--metrics",
        nargs="+",
        help="Bleu, METEOR, ROUGE_L, CIDEr, SPICE; all that can be computed if left away",
    )
    score.add_argument(
        "--samples", type=int, default=2000, help="of the bootstrap over images (default 2000)"
    )
    score.set_defaults(command=_score)

    run = commands.add_parser("run", help="run the notebooks in order, headlessly")
    run.add_argument(
        "--profile", default="default", help="a file of notebooks/profiles, without .yaml"
    )
    run.add_argument("--data", default="", help="folder that holds the data sets")
    run.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="one or several, one after the other; the profile's SEED if left away",
    )
    run.add_argument("--upto", default="", help="stop after the notebook that starts so, e.g. 20")
    run.add_argument(
        "--jobs",
        type=int,
        help="notebooks at a time, which share the cores (default: 1; 2 in the default profile)",
    )
    run.set_defaults(command=_run)

    notebooks = commands.add_parser(
        "notebooks", help="make or verify the stored form of the notebooks"
    )
    notebooks.add_argument("action", choices=("store", "verify"))
    notebooks.add_argument(
        "names", nargs="*", help="beginnings of notebook names; all if left away"
    )
    notebooks.set_defaults(command=_notebooks)

    cache = commands.add_parser(
        "cache", help="show or clear what runs keep in runs/cache to be faster"
    )
    cache.add_argument("action", choices=("show", "clear"))
    cache.add_argument(
        "--kind", nargs="+", help="images, features, sets, weights, unfinished; all if left away"
    )
    cache.add_argument(
        "--days", type=float, default=0.0, help="clear only what was not used for so many days"
    )
    cache.set_defaults(command=_cache)

    weights = commands.add_parser(
        "weights", help="exchange checkpoints with the Hugging Face hub, or make one small"
    ).add_subparsers(required=True, metavar="push|pull|heads")
    push = weights.add_parser("push", help="upload a checkpoint of this project with a model card")
    push.add_argument("checkpoint", help="its model.safetensors or folder")
    push.add_argument("repository", help="owner/name; made if there is none")
    push.add_argument(
        "--public", action="store_true", help="make a new repository public; private if left away"
    )
    push.set_defaults(command=_push)
    pull = weights.add_parser("pull", help="fetch such a checkpoint")
    pull.add_argument("repository", help="owner/name")
    pull.add_argument("--out", required=True, help="folder for model.safetensors")
    pull.add_argument("--revision", help="branch, tag or commit; the newest if left away")
    pull.set_defaults(command=_pull)

    heads = weights.add_parser(
        "heads", help="write a compact PIR without the towers that packages bring"
    )
    heads.add_argument("checkpoint", help="its model.safetensors or folder")
    heads.add_argument("--out", required=True, help="the new file, .safetensors")
    heads.set_defaults(command=_heads)

    records = commands.add_parser("records", help="read result records", add_help=False)
    records.set_defaults(command=_records)
    return parser


def _add_system(parser: argparse.ArgumentParser, names: str, default: str | None = None) -> None:
    """The options that name a trained system."""
    parser.add_argument("--system", required=default is None, default=default, help=names)
    parser.add_argument(
        "--checkpoint",
        help="a file of this project or of the system's authors; left away, what a run trained",
    )
    parser.add_argument(
        "--start", help="what 12_starting_weights noted, if it lies outside the checkpoint's run"
    )
    parser.add_argument("--profile", default="default", help="of the run, without --checkpoint")
    parser.add_argument(
        "--seed", type=int, help="of the run, without --checkpoint; the profile's SEED if left away"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or mps; auto: a GPU where there is one"
    )


def _system(arguments: argparse.Namespace):
    from nbhelpers.paths import runs_root
    from nbhelpers.runs import batch
    from nbhelpers.systems import trained_systems

    if arguments.checkpoint:
        return trained_systems.load(
            arguments.system, arguments.checkpoint, arguments.start, arguments.device
        )
    if arguments.start:
        raise UserError("--start belongs to a --checkpoint; name that too.")
    seed = batch.profile_seed(arguments.profile) if arguments.seed is None else arguments.seed
    return trained_systems.trained(
        runs_root() / arguments.profile, arguments.system, seed, arguments.device
    )


def _check(arguments: argparse.Namespace) -> int:
    from nbhelpers.data.check import check

    report = check(arguments.captions, arguments.images, arguments.layout)
    for line in report.lines:
        print(line)
    for problem in report.problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if report.problems else 0


def _prepare(arguments: argparse.Namespace) -> None:
    from nbhelpers.data.catalog import open_dataset

    dataset = open_dataset(arguments.set, arguments.data)
    print("\n".join(dataset.where))
    print(dataset.table.counts().to_string())
    print(f"The decoded images lie in {dataset.pixels.folder}.")


def _shards(arguments: argparse.Namespace) -> None:
    from nbhelpers.data import layouts, shards

    table = layouts.read(arguments.captions)
    written = shards.write(
        table, open_images(arguments.images), arguments.out, tuple(arguments.split), arguments.size
    )
    print(f"{sum(written.values())} samples in {len(written)} shards lie in {arguments.out}.")


def _train(arguments: argparse.Namespace) -> int:
    from nbhelpers.runs import batch

    return batch.train_main(arguments)


def _eval(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from nbhelpers.systems import evaluation

    system = _system(arguments)
    options = {"k": arguments.k, "ppsr": arguments.ppsr}
    given = {name: value for name, value in options.items() if value is not None}
    two_stages = replace(evaluation.two_stages_of(system), **given) if given else None
    found = evaluation.evaluate(
        system, arguments.captions, arguments.images, arguments.split, two_stages=two_stages
    )
    record = found.write_record(arguments.out, arguments.ties) if arguments.out else None
    for note in found.notes:
        print(note)
    print(
        f"{arguments.split}: {len(found.table)} images, {len(found.table.captions)} captions;"
        f" recalls in percent, ties by {arguments.ties}"
    )
    if found.how:
        print(f"{system.name}: {found.how}")
    print(found.recalls(arguments.ties).to_string(float_format="{:.2f}".format, na_rep=""))
    if record:
        print(f"The record is {record}.")


def _search(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from nbhelpers.systems import image_folder
    from nbhelpers.systems.gallery import reading

    system, query = (
        _system(arguments),
        (arguments.text if arguments.image is None else Path(arguments.image)),
    )
    notes = reading(query, system.tokenizer) if isinstance(query, str) else []
    found = image_folder.search(system, arguments.images, query, arguments.top)
    if isinstance(query, str) and (how := image_folder.searched(system, arguments.top)):
        notes.append(how)
    for note in notes:
        print(note)
    for place, (file, score) in enumerate(found.itertuples(index=False), 1):
        print(f"{place:3}  {score:8.4f}  {file}")


def _caption(arguments: argparse.Namespace) -> None:
    import json

    from nbhelpers.files import atomic_write
    from nbhelpers.systems import image_folder

    found = image_folder.caption_folder(
        _system(arguments),
        arguments.images,
        arguments.captions,
        arguments.split,
        beams=arguments.beams,
    )
    text = json.dumps({"captions": found}, indent=1, ensure_ascii=False)
    if not arguments.out:
        print(text)
        return
    with atomic_write(arguments.out) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"{len(found)} captions are in {arguments.out}.")


def _score(arguments: argparse.Namespace) -> None:
    from nbhelpers.metrics import caption_scores

    notes: list[str] = []
    captions = caption_scores.read_captions(arguments.captions, notes)
    references = caption_scores.read_references(
        arguments.references, arguments.split, captions, notes
    )
    scores = caption_scores.score_captions(captions, references, arguments.metrics)
    intervals = caption_scores.bootstrap(scores, arguments.samples)
    print(*notes, sep="\n", end="\n" if notes else "")
    print(
        f"{len(references)} images, {sum(map(len, references.values()))} references, tokens by"
        f" {scores.tokenizer}; in brackets the 95 % interval over images"
    )
    for name, value in scores.corpus.items():
        print(
            "{:8} {:.4f}   x 100: {:6.2f} [{:.2f}, {:.2f}]".format(
                name, value, *(100 * x for x in (value, *intervals[name]))
            )
        )
    if "CIDEr" in scores.corpus and (reason := caption_scores.weightless(references)):
        print(reason)
    for name, reason in scores.skipped.items():
        print(f"{name} was not computed: {reason}")
    poor = caption_scores.degenerate(captions)
    print(f"{int(poor.degenerate.sum())} captions are empty or repeat themselves.")


def _run(arguments: argparse.Namespace) -> int:
    from nbhelpers.runs import batch

    return batch.main(arguments)


def _notebooks(arguments: argparse.Namespace) -> int:
    from nbhelpers.runs import batch

    return batch.notebooks_main(arguments)


def _cache(arguments: argparse.Namespace) -> None:
    from nbhelpers.paths import runs_root
    from nbhelpers.runs import cache

    if arguments.action == "clear":
        print(cache.cleared(cache.clear(runs_root(), arguments.kind, arguments.days)))
    print(cache.table(cache.entries(runs_root())))


def _push(arguments: argparse.Namespace) -> None:
    from nbhelpers.systems import hub

    print(
        "The checkpoint is at"
        f" {hub.push(arguments.checkpoint, arguments.repository, arguments.public)}."
    )


def _pull(arguments: argparse.Namespace) -> None:
    from nbhelpers.systems import hub

    print(f"The checkpoint is {hub.pull(arguments.repository, arguments.out, arguments.revision)}.")


def _heads(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from nbhelpers.papers import pir
    from nbhelpers.towers import checkpoints

    path = pir.write_heads(
        *pir.read(checkpoints.weight_file(Path(arguments.checkpoint).expanduser())), arguments.out
    )
    print(
        f"{path} holds what was trained, {path.stat().st_size / 1e6:.2f} MB; its towers come with"
        " their packages."
    )


def _records(arguments: argparse.Namespace) -> int:
    from nbhelpers.runs import record_commands

    return record_commands.main(arguments.rest)


if __name__ == "__main__":
    sys.exit(main())
