"""The command `bench`: any models, or outputs of any model, on any sets, under any protocol."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nbhelpers.errors import UserError, printable
from nbhelpers.runs.options import (
    AsJson,
    Data,
    Device,
    Split,
    check_paths,
    in_runs,
    print_json,
    rows_of,
)

if TYPE_CHECKING:
    import pandas as pd

    from nbhelpers.data.table import CaptionTable
    from nbhelpers.metrics.protocols import Scores
    from nbhelpers.systems.bench import Result
    from nbhelpers.systems.given_outputs import Given

LISTED = ("models", "sets", "protocols", "prompt", "split")  # keys of --list


def bench(  # noqa: PLR0913 - each parameter is an option
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model by its name, as for open_clip: NAME,TAG or NAME=FILE; repeat."),
    ] = None,
    set_name: Annotated[
        list[str] | None,
        typer.Option("--set", help="A set of --data, or CAPTIONS=IMAGES, two paths; repeat."),
    ] = None,
    data: Data = "",
    images: Annotated[
        str | None, typer.Option(help="Embeddings of the images: npy, npz, safetensors, parquet.")
    ] = None,
    texts: Annotated[str | None, typer.Option(help="Embeddings of the captions.")] = None,
    similarity: Annotated[
        str | None, typer.Option(help="Scores, images x captions, in the place of embeddings.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="A TREC run of both directions in their place.")
    ] = None,
    captions: Annotated[
        str | None, typer.Option(help="Caption file of the outputs, in any published layout.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What the outputs are called; by default their file.")
    ] = None,
    split: Split = Split.test,
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="expectation (default), another protocol, or all; repeat."),
    ] = None,
    normalise: Annotated[
        bool, typer.Option(help="Bring embeddings to unit length, so that scores are cosines.")
    ] = True,
    prompt: Annotated[
        str, typer.Option(help='Template of the captions, as "an aerial photograph of {}".')
    ] = "",
    activation: Annotated[
        str | None, typer.Option(help="gelu or quickgelu, where no name tells.")
    ] = None,
    device: Device = "auto",
    listed: Annotated[
        str | None, typer.Option("--list", help="YAML with models, sets, protocols, prompt, split.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Compare CLIP ViT-B/32 with the field's numbers.")
    ] = False,
    out: Annotated[
        str | None, typer.Option(help="Folder for the records; by default runs/bench/records.")
    ] = None,
    csv: Annotated[str | None, typer.Option(help="CSV file to write.")] = None,
    latex: Annotated[str | None, typer.Option(help="LaTeX file to write.")] = None,
    trec: Annotated[str | None, typer.Option(help="Folder for TREC runs and qrels.")] = None,
    mteb: Annotated[str | None, typer.Option(help="Folder for JSON as MTEB writes it.")] = None,
    card: Annotated[
        str | None, typer.Option(help="Folder for model-index blocks and .eval_results.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate any models, or what they put out, on any sets: one table, one record each."""
    asked = _Asked(
        models=list(model or ()),
        sets=list(set_name or ()),
        outputs={"images": images, "texts": texts, "similarity": similarity, "run": run},
        captions=captions,
        protocols=list(protocol or ()),
        split=split.value,
        prompt=prompt,
    )
    if listed:
        asked.add(listed)
    asked.check()
    from nbhelpers.systems import bench as benches

    wanted, bridged = asked.wanted()
    options = {"activation": activation, "device": device}
    results, bridges = [], {}
    with in_runs("bench"):
        for source in _sources(asked, data, name, options):
            results += [
                benches.evaluate(source.outputs(one), source.table, one, normalise)
                for one in wanted
            ]
            if bridged:
                bridges[f"{results[-1].given.name} on {source.table.name}"] = _bridge(
                    source, results[-1]
                )
    report = _Report(results, bridges, calibrate)
    report.write(out, {"csv": csv, "latex": latex, "trec": trec, "mteb": mteb, "card": card})
    if as_json:
        print_json(report.plain())
    else:
        report.show()


@dataclass
class _Asked:
    """What the options ask for."""

    models: list[str]
    sets: list[str]
    outputs: dict[str, str | None]
    captions: str | None
    protocols: list[str]
    split: str
    prompt: str

    def add(self, path: str) -> None:
        """Add what a YAML list names; UserError for one that cannot be read."""
        import yaml

        check_paths(list=path)
        try:
            found = yaml.safe_load(Path(path).expanduser().read_text("utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
            raise UserError(f"{path} is no YAML ({printable(str(error))}); mend it.") from error
        unknown = [key for key in found if key not in LISTED] if isinstance(found, dict) else None
        if unknown is None or unknown:
            wrong = f"the key {printable(str(unknown[0]))}" if unknown else "no keys"
            raise UserError(f"{path} has {wrong}; it may have {', '.join(LISTED)}.")
        for key, own in (
            ("models", self.models),
            ("sets", self.sets),
            ("protocols", self.protocols),
        ):
            value = found.get(key) or []
            own += [str(one) for one in (value if isinstance(value, list) else [value])]
        self.split = Split(found.get("split", self.split)).value
        self.prompt = str(found.get("prompt", self.prompt))

    def check(self) -> None:
        """Raise UserError unless the options name one kind of source, whole."""
        given = [option for option, path in self.outputs.items() if path]
        kinds = sorted(
            {"embeddings" if option in ("images", "texts") else option for option in given}
        )
        if bool(self.models) + len(kinds) != 1:
            raise UserError(
                "Give one of --model with --set, --images and --texts, --similarity, and --run;"
                " the last three with --captions."
            )
        if self.models and not self.sets:
            raise UserError("A model is evaluated on a set; give --set, too.")
        if kinds == ["embeddings"] and len(given) == 1:
            other = "texts" if given == ["images"] else "images"
            raise UserError(f"--{given[0]} are compared with --{other}; give both.")
        if not self.models and not self.captions:
            raise UserError("The outputs are of a caption file; give it with --captions.")
        if not self.models and (self.sets or self.prompt):
            raise UserError("--set and --prompt belong to --model; outputs have --captions.")
        check_paths(captions=self.captions, **self.outputs)

    def wanted(self) -> tuple[list[str], bool]:
        """(protocols of the tables, whether the bridge is asked for)."""
        from nbhelpers.metrics import protocols

        named = [one for one in self.protocols if one != "all"]
        wanted = [protocols.name_of(one) for one in dict.fromkeys(named)] or ["expectation"]
        again = [one for one in wanted if one in protocols.AGAIN]
        if again and not self.models:
            raise UserError(
                f"Protocol {again[0]} changes the captions, so a model must encode them again; give"
                " --model, or embeddings of the changed captions with --name."
            )
        return wanted, "all" in self.protocols


@dataclass(frozen=True, eq=False)
class _Source:
    """One model, or its outputs, on one split; `outputs` gives those under a protocol."""

    table: CaptionTable
    outputs: Callable[[str], Given]
    encodes: bool


def _sources(asked: _Asked, data: str, name: str | None, options: dict[str, Any]) -> list[_Source]:
    if asked.models:
        tables = [_set(one, data, asked.split) for one in asked.sets]
        return [
            _of_model(model, *found, options | {"prompt": asked.prompt})
            for found in tables
            for model in asked.models
        ]
    from dataclasses import replace

    from nbhelpers.data import layouts
    from nbhelpers.systems import given_outputs

    reading = layouts.scan(asked.captions or "", joined=True)
    table = reading.usable().split(asked.split)
    outputs = {option: path for option, path in asked.outputs.items() if path}
    if "run" in outputs:
        given = given_outputs.run(outputs["run"], table)
    elif "similarity" in outputs:
        given = given_outputs.similarity(outputs["similarity"], table)
    else:
        given = given_outputs.embeddings(outputs["images"], outputs["texts"], table)
    given = replace(given, name=name or given.name)
    return [_Source(table, lambda _: given, False)]


def _set(named: str, data: str, split: str) -> tuple[CaptionTable, CaptionTable, Any]:
    """(the split, the whole table, its images) of a set's name or of CAPTIONS=IMAGES."""
    captions, equals, pictures = named.partition("=")
    if equals:
        from nbhelpers.data import layouts

        check_paths(set=captions)
        check_paths(set=pictures)
        whole = layouts.scan(captions, joined=True).usable()
        return whole.split(split), whole, pictures
    from nbhelpers.data.catalog import open_dataset

    found = open_dataset(named, data)
    return found.table.split(split), found.table, found.pixels


def _of_model(
    model: str, table: CaptionTable, whole: CaptionTable, pictures: Any, options: dict[str, Any]
) -> _Source:
    def outputs(protocol: str) -> Given:
        from nbhelpers.systems import bench, bench_models
        from nbhelpers.systems.given_outputs import Given

        settings = bench_models.Options(pictures, list(whole.images.file), **options)
        found = bench_models.encode(model, bench.changed(table, protocol), settings)
        return Given(found.name, found.digest, found.images, found.texts, None, list(found.notes))

    return _Source(table, outputs, True)


def _bridge(source: _Source, result: Result) -> pd.DataFrame | str:
    """Return the table of all protocols, or a sentence where there are too many scores."""
    from nbhelpers.metrics import protocols
    from nbhelpers.systems import bench

    plain = bench.evaluate(source.outputs("expectation"), source.table)
    if plain.scores is None:
        return "There are too many scores to keep; name single protocols."
    again: dict[str, Scores] = {}
    for protocol in protocols.AGAIN if source.encodes else ():
        scores = bench.evaluate(source.outputs(protocol), source.table).scores
        if scores is not None:
            again[protocol] = scores
    texts = list(source.table.captions.text)
    return protocols.bridge(plain.scores, texts, source.table.owner(), again)


@dataclass
class _Report:
    """The tables of all results: one for each set and protocol."""

    results: list[Result]
    bridges: dict[str, Any]
    calibrate: bool
    rows: list[dict[str, float]] = field(init=False)
    records: list[Path] = field(init=False, default_factory=list)
    notes: list[str] = field(init=False)

    def __post_init__(self) -> None:
        from nbhelpers.systems import bench

        self.rows = [result.row() for result in self.results]
        self.notes = []
        for result in self.results:
            said = [f"{result.given.name}: {note}." for note in result.given.notes]
            self.notes += said + bench.warnings(result)
            self.notes += [bench.calibrate(result)] if self.calibrate else []
        self.notes = list(dict.fromkeys(self.notes))

    def groups(self) -> dict[tuple[str, str, str, str], list[int]]:
        """Numbers of the results that may stand in one table."""
        found: dict[tuple[str, str, str, str], list[int]] = {}
        for number, result in enumerate(self.results):
            table = result.table
            key = (table.name, table.images.split.iloc[0], result.protocol, table.fingerprint())
            found.setdefault(key, []).append(number)
        return found

    def table(self, numbers: list[int]) -> pd.DataFrame:
        """Return rows of models and bounds, in percent."""
        import pandas as pd

        from nbhelpers.systems import bench

        frame = pd.DataFrame([self.rows[number] for number in numbers])
        frame.index = pd.Index([self.results[number].given.name for number in numbers])
        frame = frame.sort_values("mR", ascending=False, kind="stable")
        first = self.results[numbers[0]]
        if first.protocol in ("expectation", "prefix", "capitalize"):
            bounds = pd.DataFrame.from_dict(bench.bounds(first.table), orient="index")
            frame = pd.concat([frame, bounds.reindex(columns=frame.columns)])
        return frame.rename_axis("model").dropna(axis=1, how="all")

    def write(self, out: str | None, files: dict[str, str | None]) -> None:
        """Write one record each, and what else is asked for."""
        from nbhelpers.files import atomic_write
        from nbhelpers.metrics import trec
        from nbhelpers.paths import runs_root
        from nbhelpers.results import bench_exports, records
        from nbhelpers.systems import bench

        if files["trec"] and any(result.scores is None for result in self.results):
            raise UserError("There are too many scores for a TREC run; leave --trec out.")
        folder = Path(out) if out else runs_root() / "bench" / "records"
        self.records = [bench.write_record(result, folder) for result in self.results]
        texts = {"csv": self.csv, "latex": self.latex}
        for form, text in texts.items():
            if path := files[form]:
                with atomic_write(path) as temporary:
                    temporary.write_text(text(), encoding="utf-8")
        for result in self.results if files["trec"] else ():
            assert result.scores is not None  # refused above
            name = records.safe_name(result.given.name)
            place = Path(files["trec"] or "") / records.safe_name(result.table.name)
            trec.write(place, name, result.names(), result.scores)
        written = [records.read_one(path) for path in self.records]
        rankings = [_ranking(row) for row in self.rows]
        bench_exports.write_all(written, rankings, files["mteb"], files["card"])

    def csv(self) -> str:
        """Return all tables as one CSV; set, split and protocol are columns."""
        import pandas as pd

        parts = []
        for (name, split, protocol, _), numbers in self.groups().items():
            frame = self.table(numbers).reset_index()
            parts.append(frame.assign(set=name, split=split, protocol=protocol))
        return pd.concat(parts).round(6).to_csv(index=False, lineterminator="\n")

    def latex(self) -> str:
        """Return one LaTeX table for each set and protocol."""
        from nbhelpers.results import bench_exports

        return "\n".join(
            bench_exports.latex(_shown(self.table(numbers)), _heading(key))
            for key, numbers in self.groups().items()
        )

    def plain(self) -> dict[str, Any]:
        """Return everything as plain values."""
        from nbhelpers.systems import bench

        tables = []
        for (name, split, protocol, data), numbers in self.groups().items():
            rows = rows_of(self.table(numbers).reset_index())
            pairs = rows_of(bench.tests([self.results[number] for number in numbers]))
            tables.append(
                {"set": name, "split": split, "protocol": protocol, "data": data[:12]}
                | {"rows": rows, "tests": pairs}
            )
        bridges = {
            name: found if isinstance(found, str) else rows_of(found.reset_index(names="protocol"))
            for name, found in self.bridges.items()
        }
        paths = [str(path) for path in self.records]
        return {"tables": tables, "bridges": bridges, "records": paths, "notes": self.notes}

    def show(self) -> None:
        """Print everything as text."""
        from nbhelpers.metrics.protocols import RESPLIT
        from nbhelpers.systems import bench

        print("\n".join(map(printable, self.notes)), file=sys.stderr)
        for key, numbers in self.groups().items():
            print(_heading(key))
            print(printable(_shown(self.table(numbers)).to_string()))
            pairs = bench.tests([self.results[number] for number in numbers])
            if len(pairs):
                print("Differences of mR in points, paired over images, p corrected by Holm:")
                print(printable(pairs.round(3).to_string(index=False)))
        for name, found in self.bridges.items():
            print(f"\n{printable(name)}, one set of scores under each protocol:")
            print(found if isinstance(found, str) else _bridge_text(found))
            print(RESPLIT)
        print("\n".join(f"The record is {path}." for path in self.records))


def _ranking(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if "nDCG" in name or "MRR" in name}


def _heading(key: tuple[str, str, str, str]) -> str:
    name, split, protocol, data = key
    return f"{name}, {split} split, protocol {protocol}, data {data[:6]}; percent"


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table to read: mR with its interval, two decimals."""
    shown = table.map(lambda value: f"{value:.2f}" if math.isfinite(value) else "")
    if "mR low" in table:
        ends = [
            f" [{low}, {high}]" if low else ""
            for low, high in zip(shown["mR low"], shown["mR high"], strict=True)
        ]
        shown["mR"] = [mean + end for mean, end in zip(shown["mR"], ends, strict=True)]
        shown = shown.drop(columns=["mR low", "mR high"])
    return shown


def _bridge_text(found: pd.DataFrame) -> str:
    numbers = found.drop(columns="what it does")
    said = [f"- {name}: {text}" for name, text in found["what it does"].items()]
    return numbers.to_string(float_format="{:.2f}".format, na_rep="") + "\n" + "\n".join(said)
