"""Run the notebooks in order: check profiles, execute what is due, keep what is finished."""

from __future__ import annotations

import io
import json
import linecache
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.paths import notebooks_folder, runs_root
from nbhelpers.runs import at_work, freshness
from nbhelpers.runs.parameters import BASE, declared, problems, unknown, wrong_values


@dataclass(frozen=True)
class Step:
    """A notebook of the chain.

    budget  seconds that it takes in the default profile
    reads   notebooks whose results it reads
    starts  systems whose starting weights it takes from 12_starting_weights
    data    patterns of files in DATA that it reads beside the sets it names
    record  whether it writes a record
    """

    name: str
    budget: int
    reads: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    record: bool = False


WEIGHTS = "12_starting_weights"
SEARCHES = "25_two_stage_search"  # with the model of 23_cfitr
RETRIEVAL_NOTEBOOKS = ("20_pir", "21_pir_clip", "22_pe_rsitr", "23_cfitr")
# whose starting weights that notebook writes; small_clip: a CLIP that public forms can hold
STARTS = ("pir", "pir_clip", "pe_rsitr", "cfitr", "small_clip")
PREPARED = ("10_prepare_data", WEIGHTS)
CHAIN = (
    Step("00_start_here", 20),
    Step("10_prepare_data", 90),
    Step("11_audit_data", 20, reads=("10_prepare_data",), data=("dataset_*.json",)),
    Step(WEIGHTS, 200, reads=("10_prepare_data",)),
    Step("20_pir", 420, reads=PREPARED, starts=("pir",), record=True),
    Step("21_pir_clip", 240, reads=PREPARED, starts=("pir_clip",), record=True),
    Step("22_pe_rsitr", 240, reads=PREPARED, starts=("pe_rsitr",), record=True),
    Step("23_cfitr", 300, reads=PREPARED, starts=("cfitr",), record=True),
    Step("24_bita", 360, reads=PREPARED, starts=("pe_rsitr",)),
    Step(SEARCHES, 90, reads=("10_prepare_data", "23_cfitr")),
    Step("30_evaluate_retrieval", 20, reads=(*RETRIEVAL_NOTEBOOKS, SEARCHES)),
    Step("31_errors_and_significance", 50, reads=RETRIEVAL_NOTEBOOKS),
    Step("32_bring_your_model", 30, reads=PREPARED, starts=("pe_rsitr", "small_clip")),
    Step("33_ideas", 20),
    Step(
        "40_attention_and_belief",
        160,
        reads=(*PREPARED, *RETRIEVAL_NOTEBOOKS, "24_bita"),
        starts=("pir",),
    ),
    Step("50_score_captions", 60, reads=(*PREPARED, "24_bita"), starts=("pir",), record=True),
    Step("60_search", 60, reads=("10_prepare_data", *RETRIEVAL_NOTEBOOKS, "24_bita")),
    Step(
        "90_leaderboard",
        20,
        reads=(
            *RETRIEVAL_NOTEBOOKS,
            "24_bita",
            SEARCHES,
            "30_evaluate_retrieval",
            "50_score_captions",
        ),
    ),
)
# parameter of 12_starting_weights: who reads it
PRETRAINED = {"CLIP": ("21_pir_clip", "22_pe_rsitr"), "VILT": ("23_cfitr",)}
ONLY = "ONLY"  # a line of a profile that names the one notebook that it runs
MOST_JOBS = 64
PROGRESS_EVERY = 60  # seconds between two lines on the cell that a notebook is at
NOTEBOOKS = notebooks_folder()
# For glibc: memory that was freed stays with the process. Large tensors would else come anew from
# the system, page by page, which on
# a CPU is up to a third of a pass (bench_towers).
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def select(upto: str = "", only: str = "") -> tuple[Step, ...]:
    """Return the chain up to the notebook whose name starts with `upto`; all of it for "".

    only  the name of a notebook that runs alone, as `only_of` gives it; "" for none
    UserError if no notebook or several start so, and for both together.
    """
    if only:
        chosen = tuple(step for step in CHAIN if step.name == only)
        if upto or not chosen or chosen[0].reads:
            raise UserError(
                f"This profile runs {only} alone; give no UPTO, and let ONLY name a notebook that"
                " reads no other one."
            )
        return chosen
    if not upto:
        return CHAIN
    found = [position for position, step in enumerate(CHAIN) if step.name.startswith(upto)]
    if len(found) != 1:
        raise UserError(
            f"UPTO is '{upto}', which names {len(found) or 'no'} notebooks of the chain, not "
            f"one; choose among {', '.join(step.name for step in CHAIN)}."
        )
    return CHAIN[: found[0] + 1]


# profiles


def read_profile(name: str, notebooks: Path = NOTEBOOKS) -> dict[str, Any]:
    """Return the values of notebooks/profiles/<name>.yaml; none for "default".

    The default profile is what the notebooks say. A line BASE names another profile, whose values
    hold where this one gives none. UserError for an unknown or broken profile.
    """
    if name == "default":
        return {}
    values = _read_yaml(name, notebooks)
    values.pop(ONLY, None)
    base = values.pop(BASE, None)
    if base is None:
        return values
    below = _read_yaml(str(base), notebooks)
    if BASE in below:
        raise UserError(f"Profile '{base}' is the BASE of '{name}', so it cannot have one itself.")
    return below | values


def only_of(name: str, notebooks: Path = NOTEBOOKS) -> str:
    """Return the one notebook that a profile runs, from its line ONLY; "" if it runs the chain."""
    return "" if name == "default" else str(_read_yaml(name, notebooks).get(ONLY, ""))


def _read_yaml(name: str, notebooks: Path) -> dict[str, Any]:
    path = notebooks / "profiles" / f"{name}.yaml"
    if not path.is_file():
        known = ["default", *sorted(other.stem for other in path.parent.glob("*.yaml"))]
        raise UserError(
            f"There is no profile '{name}' in {path.parent}; choose one of {', '.join(known)}."
        )
    try:
        text = path.read_bytes()
        lines, values = yaml.compose(text), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold lines of the form NAME: value.")
    names = [key.value for key, _ in lines.value]
    if repeated := [name for name in values if names.count(name) > 1]:
        raise UserError(f"{path} gives {', '.join(repeated)} more than once; keep one line each.")
    return values


def check_profile(
    profile: str,
    overrides: dict[str, Any],
    notebooks: Path = NOTEBOOKS,
    steps: Sequence[Step] = CHAIN,
) -> dict[str, dict]:
    """Return the parameters of each notebook: values of the profile, replaced by `overrides`.

    steps  notebooks that will run: for these, also files that parameters name must exist

    Raises one UserError that lists every unknown name and every wrong value.
    """
    missing = [
        f"{step.name}.ipynb" for step in CHAIN if not (notebooks / f"{step.name}.ipynb").is_file()
    ]
    if missing:
        raise UserError(f"{notebooks} lacks {', '.join(missing)}.")
    defaults = {step.name: declared(notebooks / f"{step.name}.ipynb") for step in CHAIN}
    values = {"PROFILE": profile} | read_profile(profile, notebooks)
    wrong = []
    if values["PROFILE"] != profile:
        wrong.append(f"PROFILE must be '{profile}', as the file is named.")
    values |= overrides
    known = set().union(*defaults.values())
    wrong += [unknown(name, known) for name in values if name not in known]
    given = {
        notebook: {name: value for name, value in values.items() if name in own}
        for notebook, own in defaults.items()
    }
    wrong += wrong_values({name: value for name, value in values.items() if name in known})
    for step in steps if not wrong else ():
        wrong += problems(defaults[step.name] | given[step.name], notebooks)
    if wrong:
        sentences = " ".join(dict.fromkeys(wrong))
        raise UserError(f"Profile '{profile}' was refused and nothing was run. {sentences}")
    return given


def profile_seed(profile: str, notebooks: Path = NOTEBOOKS) -> Any:
    """The SEED of a profile; 0 where it gives none, and for runs without a profile."""
    if not (notebooks / "profiles" / f"{profile}.yaml").is_file():
        return 0
    return read_profile(profile, notebooks).get("SEED", 0)


def values_of(profile: str, notebooks: Path = NOTEBOOKS) -> dict[str, Any]:
    """Every parameter of the chain with its value in a profile, or its default where none is given.

    A name without a file, as for runs in JupyterLab, has the defaults.
    """
    values: dict[str, Any] = {}
    for step in CHAIN:
        values |= declared(notebooks / f"{step.name}.ipynb")
    there = (notebooks / "profiles" / f"{profile}.yaml").is_file()
    return values | (read_profile(profile, notebooks) if there else {})


# running


@dataclass(frozen=True)
class Plan:
    """What one call of the chain runs: JSON for the Snakefile and each notebook's process.

    `folder` is the profile's folder of runs; the methods name files relative to it. `made_of` says
    of each notebook what decides its results, by content (see `ingredients`); `due` names the steps
    that Snakemake goes through.
    """

    folder: str
    notebooks: str
    seed: int
    upto: str
    parameters: dict[str, dict[str, Any]]
    made_of: dict[str, dict[str, str]]
    only: str = ""
    due: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path | str) -> Plan:
        """Read the JSON file that `write` wrote."""
        return cls(**json.loads(Path(path).read_text()))

    def write(self) -> Path:
        """Write plan.json into the folder of the profile and return its path."""
        path = Path(self.folder) / "plan.json"
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.__dict__, indent=1))
        return path

    def steps(self) -> tuple[Step, ...]:
        """Its part of the chain.

        In the tiny size BITA takes its image tower from 12_starting_weights; else it need not wait.
        """
        if self.parameters["24_bita"].get("SIZE") == "tiny":
            return select(self.upto, self.only)
        return tuple(
            replace(step, reads=("10_prepare_data",)) if step.name == "24_bita" else step
            for step in select(self.upto, self.only)
        )

    def gates(self) -> list[str]:
        """Return the notebooks that every system waits for; the Snakefile gives them all cores."""
        systems = [step for step in self.steps() if step.name in (*RETRIEVAL_NOTEBOOKS, "24_bita")]
        return [name for name in PREPARED if all(name in step.reads for step in systems)]

    def with_due(self) -> Plan:
        """This plan with the steps that do not hold, or that read from such a step."""
        found: list[str] = []
        for step in self.steps():
            if not self.holds(step) or set(found).intersection(step.reads):
                found.append(step.name)
        return replace(self, due=found)

    def holds(self, step: Step) -> bool:
        """Whether a notebook finished, and what it was made of, read and wrote is the same."""
        note = self.note(step.name)
        if note.get("made_of") != self.made_of[step.name]:
            return False
        found = {"reads": self.reads(step), "wrote": self.wrote(step)}
        lacks = set(note["left_out"]) - set(left_out(self.parameters[step.name]))
        return not lacks and all(note[name] == value for name, value in found.items())

    def note(self, name: str) -> dict[str, Any]:
        """What was noted at the end of a notebook; {} if it has not finished."""
        try:
            return json.loads((Path(self.folder) / self.finished(name)).read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def reads(self, step: Step) -> dict[str, Any]:
        """What a step finds: the content of its starting weights; of other notebooks, which run."""
        found = {name: self.note(name).get("run", "") for name in step.reads if name != WEIGHTS}
        return found | (self._contents(self.starts(step.starts)) if WEIGHTS in step.reads else {})

    def wrote(self, step: Step) -> dict[str, str]:
        """The content of the files of a step that others read."""
        if step.name == WEIGHTS:
            return self._contents(self.starts(STARTS))
        return self._contents([self.record(step.name)] if step.record else [])

    def starts(self, systems: Sequence[str]) -> list[str]:
        """Return the files of the starting weights of these systems."""
        return [f"starting/{system}-seed{self.seed}.json" for system in systems]

    def _contents(self, names: Sequence[str]) -> dict[str, str]:
        paths = {name: Path(self.folder) / name for name in names}
        return {name: freshness.digest(path) for name, path in paths.items() if path.is_file()}

    def marker(self, name: str) -> str:
        """An empty file for Snakemake alone, which removes outputs as it likes."""
        return f"due/{name}-seed{self.seed}"

    def finished(self, name: str) -> str:
        """The note that a notebook ran to its end."""
        return f"finished/{name}-seed{self.seed}.json"

    def record(self, name: str) -> str:
        """Return the file of a notebook's result record."""
        return f"records/{name}-seed{self.seed}.json"

    def executed(self, name: str) -> str:
        """Return the file of the executed notebook."""
        return f"notebooks/{name}-seed{self.seed}.ipynb"

    def seconds(self, name: str) -> float:
        """Return how long a finished notebook took."""
        return self.note(name)["seconds"]


def execute(notebook: Path, executed: Path, parameters: dict[str, Any]) -> float:
    """Run a notebook by papermill in its own folder and return the seconds.

    Until its end the copy is `executed` with ".unfinished" in its name, and stays there where it
    fails: what an earlier run left is only replaced by a whole one.

    Raises UserError, one line with notebook, cell and exception, where a cell fails.
    """
    import papermill

    executed.parent.mkdir(parents=True, exist_ok=True)
    unfinished = executed.with_suffix(".unfinished.ipynb")
    kept = f"(executed copy: {unfinished})"
    began = time.monotonic()
    try:
        papermill.execute_notebook(
            str(notebook),
            str(unfinished),
            parameters,
            progress_bar=False,
            kernel_name="python3",
            cwd=str(notebook.parent),
            engine_name=_announcing_engine(notebook.stem),
        )
    except papermill.PapermillExecutionError as error:
        said = f"{error.ename}: {error.evalue}".splitlines()[0]
        raise UserError(
            f"{notebook.stem} failed in cell [{error.exec_count}]: {said} {kept}"
        ) from error
    except RuntimeError as error:
        raise UserError(f"{notebook.stem} stopped: {error} (too little memory?) {kept}") from error
    os.replace(unfinished, executed)
    return time.monotonic() - began


def _announcing_engine(notebook: str) -> str:
    """Register papermill's engine with a line now and then on where it is; return its name."""
    from papermill.engines import NBClientEngine, papermill_engines

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **options):
            cells = [cell for cell in nb_man.nb.cells if cell.cell_type == "code"]
            with _announced(notebook, cells):
                return super().execute_managed_notebook(nb_man, kernel_name, **options)

    papermill_engines.register("nbhelpers", Engine)
    return "nbhelpers"


@contextmanager
def _announced(notebook: str, cells: Sequence[Any]) -> Iterator[None]:
    """Print "<notebook>: cell n of m" every `PROGRESS_EVERY` seconds.

    Cells are numbered as in JupyterLab: code cells alone.
    """
    ended = threading.Event()

    def announce() -> None:
        while not ended.wait(PROGRESS_EVERY):
            begun = sum(cell.metadata.papermill["start_time"] is not None for cell in cells)
            print(f"{notebook}: cell {begun} of {len(cells)}", flush=True)

    thread = threading.Thread(target=announce, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def run_step(plan: Plan, name: str) -> None:
    """Execute one notebook of the plan and note its end; do nothing if its results hold.

    UserError if it fails or wrote no record.
    """
    step = next(step for step in plan.steps() if step.name == name)
    if plan.holds(step):
        return
    folder, values = Path(plan.folder), plan.parameters[name]
    print(f"{name} ...", flush=True)
    record = folder / plan.record(name)
    reads, before = plan.reads(step), _written(record)
    seconds = execute(Path(plan.notebooks) / f"{name}.ipynb", folder / plan.executed(name), values)
    if step.record and _written(record) == before:
        raise UserError(f"{name} ran to its end, but did not write its record {record}.")
    note = {
        "notebook": name,
        "seconds": round(seconds, 1),
        "run": uuid.uuid4().hex,
        "reads": reads,
        "wrote": plan.wrote(step),
        "made_of": plan.made_of[name],
        "left_out": left_out(values),
    }
    with atomic_write(folder / plan.finished(name)) as temporary:
        temporary.write_text(json.dumps(note, indent=1))
    print(f"{name} finished in {seconds:.0f} s", flush=True)


def _written(path: Path) -> tuple[int, int] | None:
    """Tells one writing of a file from the next; None for no file."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.is_file() else None


def run_chain(
    profile: str = "default",
    data: str = "",
    seeds: Sequence[int] | None = None,
    upto: str = "",
    jobs: int | None = None,
    notebooks: Path = NOTEBOOKS,
    *,
    given: Mapping[str, Any] | None = None,
) -> int:
    """Check the profile, run what is not finished, seed after seed; return the exit code.

    data   folder of the data sets, "" for what the profile says
    seeds  None for what the profile says
    jobs   notebooks at a time, as far as they do not wait for each other; they share the cores.
           None: 2 in the default profile, whose small models train little faster on two cores than
           on one, else 1
    given  values of parameters that count before the profile's
    Raises UserError for what is refused before anything runs.
    """
    only = only_of(profile, notebooks)
    steps = select(upto, only)
    seeds = [profile_seed(profile, notebooks)] if seeds is None else seeds
    if any(seeds.count(seed) > 1 for seed in seeds):
        raise UserError(f"The seeds are {' '.join(map(str, seeds))}; name each once.")
    if jobs is None:
        jobs = 2 if profile == "default" else 1
    if not 1 <= jobs <= MOST_JOBS:
        raise UserError(f"JOBS is {jobs}; let 1 to {MOST_JOBS} notebooks run at a time.")
    over = [dict(given or {}) | _overrides(data, seed) for seed in seeds]
    values_of_seeds = [check_profile(profile, values, notebooks, steps) for values in over]
    folder = runs_root() / profile
    with at_work.at_work(runs_root(), f"make run of profile {profile}", profile):
        if ended := at_work.end_abandoned(folder):
            print(f"{ended} processes of a run that was killed were still there; they were ended.")
        plans = [
            Plan(
                str(folder),
                str(notebooks),
                seed,
                upto,
                spared(values, steps),
                ingredients(values, steps, notebooks),
                only,
            )
            for seed, values in zip(seeds, values_of_seeds, strict=True)
        ]
        code = next((1 for plan in plans if _snakemake(plan.with_due(), jobs)), 0)
        if code == 0:
            _print_summary(plans, steps)
    return code


def ingredients(
    given: dict[str, dict], steps: Sequence[Step], notebooks: Path
) -> dict[str, dict[str, str]]:
    """What decides the results of each notebook: its cells, values, the package, and given files.

    Values are those before `spared`: what 12_starting_weights leaves out is noted apart.
    """
    package = freshness.package()
    known: dict[Any, str] = {}
    found = {}
    for step in steps:
        path, values = notebooks / f"{step.name}.ipynb", given[step.name]
        files = freshness.files(declared(path) | values, notebooks, step.data)
        known |= {file: freshness.digest(file) for file in files if file not in known}
        contents = freshness.digest_of([(file.name, known[file]) for file in files])
        found[step.name] = {
            "cells": freshness.cells(path),
            "values": freshness.digest_of(values),
            "package": package,
            "files": contents,
        }
    return found


def spared(parameters: dict[str, dict], steps: Sequence[Step]) -> dict[str, dict]:
    """Return the parameters, with pre-training that no system of this call reads left out.

    A call that ends before the first system prepares for all of them.
    """
    names = {step.name for step in steps}
    unread = {
        name: ""
        for name, readers in PRETRAINED.items()
        if names.intersection(RETRIEVAL_NOTEBOOKS) and not names.intersection(readers)
    }
    return parameters | {WEIGHTS: parameters[WEIGHTS] | unread}


def left_out(values: dict[str, Any]) -> list[str]:
    """What 12_starting_weights does not pre-train with these values."""
    return [name for name in PRETRAINED if values.get(name) == ""]


def _overrides(data: str, seed: Any) -> dict[str, Any]:
    """What a call says over the profile."""
    if data and not Path(data).expanduser().is_dir():
        raise UserError(
            f"DATA is '{data}', which is not a folder; give the folder of images and captions."
        )
    return {"SEED": seed} | ({"DATA": str(Path(data).expanduser().resolve())} if data else {})


def train(
    system: str,
    profile: str = "default",
    data: str = "",
    seed: int | None = None,
    notebooks: Path = NOTEBOOKS,
) -> list[Path]:
    """Train a system outside Jupyter, or resume its training; return the files of its models.

    The cells of its notebook that are tagged `train` run as plain Python, in each of the processes
    that `accelerate launch` starts, so that the notebook finds the model under its own key. Process
    0 alone prints. Without `seed` the profile's counts. UserError for an unknown system, a profile
    that is refused, and one whose CHECKPOINT leaves nothing to train.
    """
    import nbformat

    from nbhelpers.systems.trained_systems import NOTEBOOK_OF as names
    from nbhelpers.training import device
    from nbhelpers.training.distributed import process_state

    if system not in names:
        raise UserError(f"There is no system '{system}'; choose one of {', '.join(names)}.")
    if read_profile(profile, notebooks).get("CHECKPOINT"):
        raise UserError(
            f"Profile '{profile}' gives CHECKPOINT, so there is nothing to train; take that line"
            " out."
        )
    seed = profile_seed(profile, notebooks) if seed is None else seed
    steps = [step for step in CHAIN if step.name == names[system]]
    values = check_profile(profile, _overrides(data, seed), notebooks, steps)[names[system]]
    cells: dict[str, Any] = {"__name__": "__main__"}
    device.use(values.get("DEVICE", "auto"))
    with (
        at_work.at_work(runs_root(), f"train of {system}"),
        redirect_stdout(sys.stdout if process_state().is_main_process else io.StringIO()),
    ):
        for number, cell in enumerate(
            nbformat.read(notebooks / f"{names[system]}.ipynb", as_version=4).cells
        ):
            tags = cell.metadata.get("tags", [])
            if "parameters" in tags or "train" in tags:
                name = f"{names[system]}[{number}]"
                # keys read the source of what a cell defines
                lines = cell.source.splitlines(keepends=True)
                linecache.cache[name] = len(cell.source), None, lines, name
                exec(compile(cell.source, name, "exec"), cells)
            if "parameters" in tags:
                cells |= values
        files = [cells["run"].folder / file for file in cells["files"].values()]
        print("\n".join(f"The model is {file}." for file in files))
    return files


def _snakemake(plan: Plan, jobs: int) -> int:
    """Runs what is due, `jobs` notebooks at a time; 0, or 1 with one line on stderr on what failed.

    Its messages go into a log. Its lock would outlive a killed process, so `at_work` stands in for
    it.
    """
    if not plan.due:
        return 0
    path = plan.write()
    shutil.rmtree(path.with_name("due"), ignore_errors=True)
    log, failure = path.with_name("snakemake.log"), path.with_name("failure.txt")
    failure.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(NOTEBOOKS / "Snakefile"),
        "--directory",
        plan.folder,
        "--config",
        f"plan={path}",
        f"jobs={jobs}",
        "--cores",
        "all",
        "--nolock",
        "--rerun-incomplete",
    ]
    environment = (
        KEEP_MEMORY | os.environ | {"NBHELPERS_RUNS": str(path.parents[1]), "TQDM_DISABLE": "1"}
    )
    environment |= {at_work.STARTED_BY: at_work.process_name(os.getpid())}
    with open(log, "w") as messages:
        code = at_work.call(command, stderr=messages, env=environment)
    if code:
        said = failure.read_text() if failure.exists() else f"Snakemake stopped; {log} says why."
        print(said, file=sys.stderr)
    return 1 if code else 0


def _print_summary(plans: list[Plan], steps: tuple[Step, ...]) -> None:
    """Print the leaderboard, seconds of each notebook against its budget, and the folders."""
    folder = Path(plans[0].folder)
    if list((folder / "records").glob("*.json")):
        from nbhelpers.results import exports, leaderboard

        print(f"\n{leaderboard.table(exports.read([folder / 'records']))}")
    budgeted = folder.name == "default"
    for plan in plans:
        of = f"notebook, seed {plan.seed}" if len(plans) > 1 else "notebook"
        print(f"\n{of:24}{'seconds':>9}{'budget' if budgeted else '':>9}")
        for step in steps:
            seconds = plan.seconds(step.name)
            budget = f"{step.budget:9}" if budgeted else ""
            over = "   over budget" if budgeted and seconds > step.budget else ""
            print(f"{step.name:24}{seconds:9.0f}{budget}{over}")
        print(f"{'together':24}{sum(plan.seconds(step.name) for step in steps):9.0f}")
    print(f"\nfigures             {folder / 'figures'}\nexecuted notebooks  {folder / 'notebooks'}")


def _step_main(plan_file: str, name: str) -> int:
    """Run one notebook for the Snakefile; write a failure as one sentence beside the plan."""
    at_work.end_with_the_run()
    plan = Plan.read(plan_file)
    folder = Path(plan.folder)
    try:
        with at_work.at_work(folder.parent, f"notebook {name} of {folder.name}", folder.name):
            run_step(plan, name)
    except UserError as error:
        Path(plan_file).with_name("failure.txt").write_text(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_step_main(*sys.argv[1:]))
