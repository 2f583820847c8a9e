"""`python -m nbhelpers`: what is not a notebook."""
from __future__ import annotations

import argparse
import os
import sys

from nbhelpers.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Runs one command: 0 on success, 1 and a sentence on stderr if not, 2 for a wrong command line."""
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
        required=True, metavar="check|prepare|shards")
    check = data.add_parser("check", help="what captions and images hold, and what is wrong with them")
    check.add_argument("--captions", required=True, help="file, or folder of a layout of several files")
    check.add_argument("--images", help="folder, zip or tar of the images; left away, they are not looked at")
    check.add_argument("--layout", help="karpathy, precomp, rows, lavis, nwpu, shards or arrow; recognised if left away")
    check.set_defaults(command=_check)
    prepare = data.add_parser("prepare", help="decode the images of a set once, into the cache")
    prepare.add_argument("--set", default="scenes", help="ucm, rsicd, ...; scenes (default) is generated")
    prepare.add_argument("--data", default="", help="folder that holds the set; none for scenes")
    prepare.set_defaults(command=_prepare)
    shards = data.add_parser("shards", help="write images and captions as WebDataset shards")
    shards.add_argument("--captions", required=True, help="file, or folder of a layout of several files")
    shards.add_argument("--images", required=True, help="folder, zip or tar of the images")
    shards.add_argument("--out", required=True, help="new folder for the shards")
    shards.add_argument("--split", nargs="+", default=["train"], help="train (default), val, test; several may be named")
    shards.add_argument("--size", type=int, default=1000, help="most captions in a shard (default 1000)")
    shards.set_defaults(command=_shards)

    retrieve = commands.add_parser("retrieve", help="evaluate a trained system on images and captions")
    retrieve.add_argument("--system", required=True, help="pir, pir_clip, pe_rsitr or cfitr")
    retrieve.add_argument("--checkpoint", required=True, help="a file of this project or of the system's authors")
    retrieve.add_argument("--captions", required=True, help="file of captions, such as dataset_rsicd.json, or folder")
    retrieve.add_argument("--images", required=True, help="folder, zip or tar of the images")
    retrieve.add_argument("--split", default="test", help="train, val or test (default)")
    retrieve.add_argument("--ties", default="expectation", choices=("expectation", "released"),
                          help="who wins among equal scores (default: expectation)")
    retrieve.add_argument("--start", help="what 12_starting_weights noted, if it lies outside the checkpoint's run")
    retrieve.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    retrieve.add_argument("--out", help="folder for a result record; left away, none is written")
    retrieve.set_defaults(command=_retrieve)

    score = commands.add_parser("score", help="score generated captions against references")
    score.add_argument("--captions", required=True, help="COCO's results, or a file of captions that a notebook wrote")
    score.add_argument("--references", required=True, help="COCO's ground truth, a file of ours, or captions of a data set")
    score.add_argument("--split", default="test", help="of a data set: train, val or test (default)")
    score.add_argument("--metrics", nargs="+", help="Bleu, METEOR, ROUGE_L, CIDEr, SPICE; all that can be computed if left away")
    score.add_argument("--samples", type=int, default=2000, help="of the bootstrap over images (default 2000)")
    score.set_defaults(command=_score)

    run = commands.add_parser("run", help="run the notebooks in order, headlessly")
    run.add_argument("--profile", default="default", help="a file of notebooks/profiles, without .yaml")
    run.add_argument("--data", default="", help="folder that holds the data sets")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--upto", default="", help="stop after the notebook that starts so, e.g. 20")
    run.set_defaults(command=_run)

    notebooks = commands.add_parser("notebooks", help="make or verify the stored form of the notebooks")
    notebooks.add_argument("action", choices=("store", "verify"))
    notebooks.add_argument("names", nargs="*", help="beginnings of notebook names; all if left away")
    notebooks.set_defaults(command=_notebooks)

    records = commands.add_parser("records", help="read result records", add_help=False)
    records.set_defaults(command=_records)
    return parser


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
    from nbhelpers.data.images import ImageStore
    table = layouts.read(arguments.captions)
    written = shards.write(table, ImageStore.open(arguments.images), arguments.out, tuple(arguments.split), arguments.size)
    print(f"{sum(written.values())} samples in {len(written)} shards lie in {arguments.out}.")


def _retrieve(arguments: argparse.Namespace) -> None:
    from nbhelpers import systems
    system = systems.load(arguments.system, arguments.checkpoint, arguments.start, arguments.device)
    found = systems.retrieve(system, arguments.captions, arguments.images, arguments.split)
    record = found.write_record(arguments.out, arguments.ties) if arguments.out else None
    for note in found.notes:
        print(note)
    print(f"{arguments.split}: {len(found.table)} images, {len(found.table.captions)} captions; recalls in percent, ties by "
          f"{arguments.ties}")
    print(found.recalls(arguments.ties).to_string(float_format="{:.2f}".format, na_rep=""))
    if record:
        print(f"The record is {record}.")


def _score(arguments: argparse.Namespace) -> None:
    from nbhelpers import captioning
    captions = captioning.read_captions(arguments.captions)
    references = captioning.read_references(arguments.references, arguments.split)
    scores = captioning.score_captions(captions, references, arguments.metrics)
    intervals = captioning.bootstrap(scores, arguments.samples)
    print(f"{len(references)} images, {sum(map(len, references.values()))} references, tokens by {scores.tokenizer}; in brackets "
          "the 95 % interval over images")
    for name, value in scores.corpus.items():
        print("{:8} {:.4f}   x 100: {:6.2f} [{:.2f}, {:.2f}]".format(name, value, *(100 * x for x in (value, *intervals[name]))))
    for name, reason in scores.skipped.items():
        print(f"{name} was not computed: {reason}")
    poor = captioning.degenerate(captions)
    print(f"{int(poor.degenerate.sum())} captions are empty or repeat themselves.")


def _run(arguments: argparse.Namespace) -> int:
    from nbhelpers import batch
    return batch.main(arguments)


def _notebooks(arguments: argparse.Namespace) -> int:
    from nbhelpers import batch
    return batch.notebooks_main(arguments)


def _records(arguments: argparse.Namespace) -> int:
    from nbhelpers import records
    return records.main(arguments.rest)


if __name__ == "__main__":
    sys.exit(main())
