"""The command `bench`: any models, or outputs of any model, on any sets, under any protocol."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nbhelpers.errors import UserError, printable, reason
from nbhelpers.runs.options import (
    AsJson,
    Data,
    Device,
    Split,
    check_paths,
    check_places,
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
    asked.check({"--name": name, "--activation": activation, "--data": data})
    check_places(files={"csv": csv, "latex": latex}, folders={"trec": trec, "mteb": mteb})
    check_places(files={}, folders={"card": card, "out": out})
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
            raise UserError(f"{path} is no YAML ({reason(error)}); mend it.") from error
        unknown = [key for key in found if key not in LISTED] if isinstance(found, dict) else None
        if unknown is None or unknown:
            wrong = f"the key {printable(str(unknown[0]))}" if unknown else "no keys"
            raise UserError(f"{path} has {wrong}; it may have {', '.join(LISTED)}.")
        self.models += _texts(found, "models", path)
        self.sets += _texts(found, "sets", path)
        self.protocols += _texts(found, "protocols", path)
        self.prompt = "".join(_texts(found, "prompt", path)) or self.prompt
        self.split = "".join(_texts(found, "split", path)) or self.split
        if self.split not in list(Split):
            raise UserError(
                f"{path} has the split {printable(self.split)}; choose one of {', '.join(Split)}."
            )

    def check(self, more: dict[str, str | None]) -> None:
        """Raise UserError unless the options name one kind of source, whole.

        more  further options, by their names
        """
        given = [option for option, path in self.outputs.items() if path]
        kinds = sorted(
            {"embeddings" if option in ("images", "texts") else option for option in given}
        )
        if bool(self.models) + len(kinds) != 1:
            raise UserError(
                "Give one of --model with --set, --images and --texts, --similarity, and --run;"
                " the last three with --captions."
            )
        if kinds == ["embeddings"] and len(given) == 1:
            other = "texts" if given == ["images"] else "images"
            raise UserError(f"--{given[0]} are compared with --{other}; give both.")
        if self.models and not self.sets:
            raise UserError("A model is evaluated on a set; give --set, too.")
        if not self.models and not self.captions:
            raise UserError("The outputs are of a caption file; give it with --captions.")
        of_models: dict[str, Any] = {"--set": self.sets, "--prompt": self.prompt}
        of_models |= {name: more[name] for name in ("--activation", "--data")}
        of_outputs: dict[str, Any] = {"--captions": self.captions, "--name": more["--name"]}
        refuse = of_outputs if self.models else of_models
        if wrong := [name for name, value in refuse.items() if value]:
            kind, other = ("outputs", "--model") if self.models else ("--model", "outputs")
            raise UserError(f"{wrong[0]} belongs to {kind}; leave it out for {other}.")
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


def _texts(found: dict[str, Any], key: str, path: str) -> list[str]:
    """Return the value of a key of a list as texts; UserError for another one."""
    value = found.get(key)
    value = [] if value is None else value
    values = value if isinstance(value, list) else [value]
    wrong = [one for one in values if not isinstance(one, str)]
    if wrong or (len(values) > 1 and key in ("prompt", "split")):
        shown = printable(str(wrong[0] if wrong else value))
        raise UserError(f"{path} has {shown} under {key}; write names there, each in quotes.")
    return values


@dataclass(frozen=True, eq=False)
class _Source:
    """One model, or its outputs, on one split; `outputs` gives those under a protocol."""

    table: CaptionTable
    outputs: Callable[[str], Given]
    encodes: bool


def _sources(asked: _Asked, data: str, name: str | None, options: dict[str, Any]) -> list[_Source]:
    if asked.models:
        tables = [_set(one, data, asked.split) for one in dict.fromkeys(asked.sets)]
        options = options | {"prompt": asked.prompt}
        sources: list[_Source] = []
        for found in tables:
            sources += [_of_model(one, *found, options) for one in dict.fromkeys(asked.models)]
        return sources
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

        if not captions or not pictures:
            raise UserError(f"--set has '{named}'; write CAPTIONS=IMAGES, two paths.")
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

        print("".join(f"{printable(note)}\n" for note in self.notes), end="", file=sys.stderr)
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
