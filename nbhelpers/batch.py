"""The chain of notebooks without a browser: profiles checked, notebooks executed, finished ones kept."""
from __future__ import annotations

import argparse
import difflib
import fcntl
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from nbhelpers.errors import UserError, atomic_write
from nbhelpers.run import repository_root, runs_root


@dataclass(frozen=True)
class Step:
    """A notebook of the chain: its seconds by default, what it reads from, whether it writes a record."""

    name: str
    budget: int
    reads: tuple[str, ...] = ()
    record: bool = False


SYSTEMS = ("20_pir", "21_pir_clip", "22_pe_rsitr", "23_cfitr")
CHAIN = (
    Step("00_start_here", 20),
    Step("10_prepare_data", 90),
    Step("11_audit_data", 20, reads=("10_prepare_data",)),
    Step("12_starting_weights", 150, reads=("10_prepare_data",)),
    Step("20_pir", 270, reads=("10_prepare_data", "12_starting_weights"), record=True),
    Step("21_pir_clip", 190, reads=("10_prepare_data", "12_starting_weights"), record=True),
    Step("22_pe_rsitr", 200, reads=("10_prepare_data", "12_starting_weights"), record=True),
    Step("23_cfitr", 210, reads=("10_prepare_data", "12_starting_weights"), record=True),
    Step("24_bita", 220, reads=("10_prepare_data", "12_starting_weights")),
    Step("30_evaluate_retrieval", 20, reads=SYSTEMS),
    Step("31_errors_and_significance", 50, reads=SYSTEMS),
    Step("40_attention_and_belief", 110, reads=("10_prepare_data", "12_starting_weights", *SYSTEMS, "24_bita")),
    Step("50_score_captions", 60, reads=("10_prepare_data", "12_starting_weights", "24_bita"), record=True),
    Step("60_search", 60, reads=("10_prepare_data", *SYSTEMS, "24_bita")),
    Step("90_leaderboard", 20, reads=(*SYSTEMS, "24_bita", "30_evaluate_retrieval", "50_score_captions")),
)
PRETRAINED = {"CLIP": ("21_pir_clip", "22_pe_rsitr"), "VILT": ("23_cfitr",)}  # parameter of 12_starting_weights: who reads it
NOTEBOOKS = repository_root() / "notebooks"
# For glibc: memory that was freed stays with the process. Large tensors would else come anew from the system, page by page, which on
# a CPU is up to a third of a pass (bench_towers).
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
KINDS = {"int": int, "float": (float, int), "str": str, "bool": bool, "list": list, "dict": dict}


def select(upto: str = "") -> tuple[Step, ...]:
    """The chain up to and with the one notebook whose name starts with `upto`; the whole chain for ""."""
    if not upto:
        return CHAIN
    found = [position for position, step in enumerate(CHAIN) if step.name.startswith(upto)]
    if len(found) != 1:
        raise UserError(f"UPTO is '{upto}', which names {len(found) or 'no'} notebooks of the chain, not "
                        f"one; choose among {', '.join(step.name for step in CHAIN)}.")
    return CHAIN[:found[0] + 1]


# profiles ---------------------------------------------------------------------------------------------------

def known_parameters(notebook: Path) -> dict[str, str]:
    """Name and annotated kind ("int", "str", ...) of each line in the notebook's parameters cell."""
    import papermill
    found = papermill.inspect_notebook(str(notebook))
    return {name: entry["inferred_type_name"] for name, entry in found.items()}


def read_profile(name: str, notebooks: Path = NOTEBOOKS) -> dict[str, Any]:
    """The values of notebooks/profiles/<name>.yaml; none for "default", which is what the notebooks say."""
    if name == "default":
        return {}
    path = notebooks / "profiles" / f"{name}.yaml"
    if not path.is_file():
        known = ["default", *sorted(other.stem for other in path.parent.glob("*.yaml"))]
        raise UserError(f"There is no profile '{name}' in {path.parent}; choose one of {', '.join(known)}.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold lines of the form NAME: value.")
    return values


def check_profile(profile: str, overrides: dict[str, Any], notebooks: Path = NOTEBOOKS) -> dict[str, dict]:
    """What each notebook of the chain is given: the profile's values, then `overrides`, as far as known.

    Raises one UserError that lists every unknown name and every wrong type of the profile.
    """
    missing = [f"{step.name}.ipynb" for step in CHAIN if not (notebooks / f"{step.name}.ipynb").is_file()]
    if missing:
        raise UserError(f"{notebooks} lacks {', '.join(missing)}.")
    known = {step.name: known_parameters(notebooks / f"{step.name}.ipynb") for step in CHAIN}
    values = {"PROFILE": profile} | read_profile(profile, notebooks)
    problems = [] if values["PROFILE"] == profile else [f"PROFILE must be '{profile}', as the file is named"]
    values |= overrides
    for name, value in values.items():
        problems += _problems(name, value, known)
    if problems:
        raise UserError(f"Profile '{profile}' was refused and nothing was run: {'; '.join(problems)}.")
    return {notebook: {name: value for name, value in values.items() if name in kinds}
            for notebook, kinds in known.items()}


def _problems(name: str, value: Any, known: dict[str, dict[str, str]]) -> list[str]:
    """What is wrong with one value, given the parameters that each notebook knows."""
    wanted = {notebook: kinds[name] for notebook, kinds in known.items() if name in kinds}
    if not wanted:
        close = difflib.get_close_matches(str(name), sorted(set().union(*known.values())), 1)
        return [f"no notebook has a parameter {name}" + (f" (did you mean {close[0]}?)" if close else "")]
    is_now = f"{name} is {value!r}, a {type(value).__name__}"
    return [f"{is_now}, but {notebook} wants {kind}{_advice(value, kind)}"
            for notebook, kind in wanted.items() if not fits(value, kind)]


def fits(value: Any, kind: str) -> bool:
    """Whether a value is of an annotated kind; a float may be written as an int, a bool only as a bool."""
    return isinstance(value, KINDS.get(kind, ())) and (kind == "bool" or not isinstance(value, bool))


def _advice(value: Any, kind: str) -> str:
    """How to write a number such as 1e-4, which YAML takes for text."""
    try:
        return f" (write {float(value):.1e})" if kind == "float" and isinstance(value, str) else ""
    except ValueError:
        return ""


# running ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Plan:
    """What one call of the chain runs, kept as JSON for the Snakefile and for the process of each notebook.

    `folder` is the profile's folder of runs; the methods name files relative to it.
    """

    folder: str
    notebooks: str
    seed: int
    upto: str
    sources: list[str]
    parameters: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path | str) -> Plan:
        return cls(**json.loads(Path(path).read_text()))

    def write(self) -> Path:
        path = Path(self.folder) / "plan.json"
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.__dict__, indent=1))
        return path

    def steps(self) -> tuple[Step, ...]:
        """Its part of the chain. BITA shares stand-ins with the other systems; its real towers need not wait for theirs."""
        if self.parameters["24_bita"].get("SIZE", "tiny") == "tiny":
            return select(self.upto)
        return tuple(replace(step, reads=("10_prepare_data",)) if step.name == "24_bita" else step for step in select(self.upto))

    def gates(self) -> list[str]:
        """Notebooks that every system waits for, so that they may have all cores also where JOBS share these."""
        systems = [step for step in self.steps() if step.name in (*SYSTEMS, "24_bita")]
        return [name for name in ("10_prepare_data", "12_starting_weights") if all(name in step.reads for step in systems)]

    def finished(self, name: str) -> str:
        """The note that a notebook ran to its end, with its seconds."""
        return f"finished/{name}-seed{self.seed}.json"

    def record(self, name: str) -> str:
        return f"records/{name}-seed{self.seed}.json"

    def executed(self, name: str) -> str:
        return f"notebooks/{name}-seed{self.seed}.ipynb"

    def seconds(self, name: str) -> float:
        return json.loads((Path(self.folder) / self.finished(name)).read_text())["seconds"]


def sources() -> list[str]:
    """The package's files that a notebook may use: where one changes, notebooks run again (and load what they
    trained, as far as its checkpoint still fits)."""
    unused = {"batch.py", "stored.py", "cache.py", "hub.py", "__main__.py"}
    return sorted(str(path) for path in Path(__file__).parent.rglob("*.py") if path.name not in unused)


def execute(notebook: Path, executed: Path, parameters: dict[str, Any]) -> float:
    """Runs a notebook by papermill in its own folder, returns the seconds; the copy is kept in any case.

    Raises UserError, one line with notebook, cell and exception, where a cell fails.
    """
    import papermill
    executed.parent.mkdir(parents=True, exist_ok=True)
    kept = f"(executed copy: {executed})"
    began = time.monotonic()
    try:
        papermill.execute_notebook(str(notebook), str(executed), parameters, kernel_name="python3",
                                   cwd=str(notebook.parent), progress_bar=False)
    except papermill.PapermillExecutionError as error:
        said = f"{error.ename}: {error.evalue}".splitlines()[0]
        raise UserError(f"{notebook.stem} failed in cell [{error.exec_count}]: {said} {kept}") from error
    except RuntimeError as error:
        raise UserError(f"{notebook.stem} stopped: {error} (too little memory?) {kept}") from error
    return time.monotonic() - began


def run_step(plan: Plan, name: str) -> None:
    """Executes one notebook of the plan and notes its end. UserError if it fails or wrote no record."""
    step = next(step for step in CHAIN if step.name == name)
    folder = Path(plan.folder)
    print(f"{name} ...", flush=True)
    notebook = Path(plan.notebooks) / f"{name}.ipynb"
    seconds = execute(notebook, folder / plan.executed(name), plan.parameters[name])
    if step.record and not (folder / plan.record(name)).is_file():
        raise UserError(f"{name} ran to its end, but did not write its record {folder / plan.record(name)}.")
    with atomic_write(folder / plan.finished(name)) as temporary:
        temporary.write_text(json.dumps({"notebook": name, "seconds": round(seconds, 1)}))
    print(f"{name} finished in {seconds:.0f} s", flush=True)


def run_chain(profile: str = "default", data: str = "", seeds: Sequence[int] = (0,), upto: str = "",
              jobs: int | None = None, notebooks: Path = NOTEBOOKS) -> int:
    """Checks the profile, then runs through Snakemake what is not finished, seed after seed; the exit code.

    data  folder of the data sets, "" for what the profile says
    jobs  notebooks at a time, as far as they do not wait for each other; they share the cores. None: 2 in the default profile, whose
          small models train little faster on two cores than on one, else 1
    Raises UserError for what is refused before anything runs.
    """
    steps = select(upto)
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"The seeds are {' '.join(map(str, seeds))}; each must be at least 0 and stand there once.")
    jobs = (2 if profile == "default" else 1) if jobs is None else jobs
    if jobs < 1:
        raise UserError(f"JOBS is {jobs}; at least one notebook must run at a time.")
    parameters = {seed: check_profile(profile, _overrides(data, seed), notebooks) for seed in seeds}
    folder = runs_root() / profile
    with locked(folder):
        plans = [Plan(str(folder), str(notebooks), seed, upto, sources(), spared(parameters[seed], steps)) for seed in seeds]
        code = next((1 for plan in plans if _snakemake(plan, jobs)), 0)
        if code == 0:
            _print_summary(plans, steps)
    return code


def spared(parameters: dict[str, dict], steps: tuple[Step, ...]) -> dict[str, dict]:
    """The parameters, where `12_starting_weights` pre-trains nothing that no system of this call reads.

    A call that ends before the first system prepares for all of them.
    """
    names = {step.name for step in steps}
    unread = {name: "" for name, readers in PRETRAINED.items() if names.intersection(SYSTEMS) and not names.intersection(readers)}
    return parameters | {"12_starting_weights": parameters["12_starting_weights"] | unread}


def _overrides(data: str, seed: int) -> dict[str, Any]:
    """What a call says over the profile."""
    if data and not Path(data).expanduser().is_dir():
        raise UserError(f"DATA is '{data}', which is not a folder; give the folder of images and captions.")
    return {"SEED": seed} | ({"DATA": str(Path(data).expanduser().resolve())} if data else {})


def train(system: str, profile: str = "default", data: str = "", seed: int = 0, notebooks: Path = NOTEBOOKS) -> list[Path]:
    """Trains a system outside Jupyter, or goes on with it; the files of its models.

    The cells of its notebook that are tagged `train` run as plain Python, in each of the processes that `accelerate launch`
    starts, so that the notebook finds the model under its own key. Process 0 alone prints.
    UserError for an unknown system, a profile that is refused, and one whose CHECKPOINT leaves nothing to train.
    """
    import nbformat
    from nbhelpers import device
    from nbhelpers.distributed import process_state
    from nbhelpers.systems import NOTEBOOKS as names
    if system not in names:
        raise UserError(f"There is no system '{system}'; choose one of {', '.join(names)}.")
    values = check_profile(profile, _overrides(data, seed), notebooks)[names[system]]
    if values.get("CHECKPOINT"):
        raise UserError(f"Profile '{profile}' gives CHECKPOINT, so there is nothing to train; take that line out.")
    cells: dict[str, Any] = {"__name__": "__main__"}
    device.use(values.get("DEVICE", "auto"))
    with redirect_stdout(sys.stdout if process_state().is_main_process else io.StringIO()):
        for number, cell in enumerate(nbformat.read(notebooks / f"{names[system]}.ipynb", as_version=4).cells):
            tags = cell.metadata.get("tags", [])
            if "parameters" in tags or "train" in tags:
                exec(compile(cell.source, f"{names[system]}[{number}]", "exec"), cells)
            if "parameters" in tags:
                cells |= values
        files = [cells["run"].folder / file for file in cells["files"].values()]
        print("\n".join(f"The model is {file}." for file in files))
    return files


def _snakemake(plan: Plan, jobs: int) -> int:
    """Runs the Snakefile, `jobs` notebooks at a time; 0 or 1, then with one line on stderr that says what failed.

    Its messages go into a log. Its lock would outlive a killed process, so `locked` stands in for it.
    """
    path = plan.write()
    log, failure = path.with_name("snakemake.log"), path.with_name("failure.txt")
    failure.unlink(missing_ok=True)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(NOTEBOOKS / "Snakefile"),
               "--directory", plan.folder, "--config", f"plan={path}", f"jobs={jobs}", "--cores", "all", "--nolock",
               "--rerun-incomplete", "--rerun-triggers", "mtime", "input", "params"]
    environment = KEEP_MEMORY | os.environ | {"NBHELPERS_RUNS": str(path.parents[1]), "TQDM_DISABLE": "1"}
    with open(log, "w") as messages:
        code = subprocess.run(command, stderr=messages, env=environment).returncode
    if code:
        said = failure.read_text() if failure.exists() else f"Snakemake stopped; {log} says why."
        print(said, file=sys.stderr)
    return 1 if code else 0


@contextmanager
def locked(folder: Path):
    """Holds the profile's folder for this process; the system frees it even when the process is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another run is busy in {folder}; wait for it or change PROFILE.") from None
        yield


def _print_summary(plans: list[Plan], steps: tuple[Step, ...]) -> None:
    """Leaderboard, seconds of each notebook against its budget (warns, never fails), and where things lie."""
    folder = Path(plans[0].folder)
    if list((folder / "records").glob("*.json")):
        from nbhelpers import exports, leaderboard
        print(f"\n{leaderboard.table(exports.read([folder / 'records']))}")
    budgeted = folder.name == "default"
    for plan in plans:
        of = f"notebook, seed {plan.seed}" if len(plans) > 1 else "notebook"
        print(f"\n{of:24}{'seconds':>9}{'budget' if budgeted else '':>9}")
        for step in steps:
            seconds = plan.seconds(step.name)
            note = f"{step.budget:9}{'   over budget' if seconds > step.budget else ''}" if budgeted else ""
            print(f"{step.name:24}{seconds:9.0f}{note}")
        print(f"{'together':24}{sum(plan.seconds(step.name) for step in steps):9.0f}")
    print(f"\nfigures             {folder / 'figures'}\nexecuted notebooks  {folder / 'notebooks'}")


# the command line -------------------------------------------------------------------------------------------

def main(arguments: argparse.Namespace) -> int:
    """`python -m nbhelpers run`: arguments profile, data, seeds, upto, jobs."""
    return run_chain(arguments.profile, arguments.data, arguments.seeds, arguments.upto, arguments.jobs)


def train_main(arguments: argparse.Namespace) -> int:
    """`python -m nbhelpers train`: arguments system, profile, data, seed."""
    train(arguments.system, arguments.profile, arguments.data, arguments.seed)
    return 0


def notebooks_main(arguments: argparse.Namespace) -> int:
    """`python -m nbhelpers notebooks store|verify`: arguments action and names; 1 where a form differs."""
    from nbhelpers import stored
    if arguments.action == "store":
        stored.store(arguments.names)
    problems = stored.verify(arguments.names)
    print("\n".join(problems) or "The notebooks are in their stored form.")
    return 1 if problems else 0


def _step_main(plan_file: str, name: str) -> int:
    """What the Snakefile calls for each notebook; a failure is left as a sentence beside the plan."""
    try:
        run_step(Plan.read(plan_file), name)
    except UserError as error:
        Path(plan_file).with_name("failure.txt").write_text(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_step_main(*sys.argv[1:]))
