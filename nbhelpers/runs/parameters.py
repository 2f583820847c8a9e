"""Every parameter of every notebook, declared once: its type, choices and bounds.

Which of them a notebook has, and their defaults, stands in its cell of parameters. `run.start` and
`make run` check values here.
"""

from __future__ import annotations

import ast
import difflib
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from nbhelpers.errors import UserError
from nbhelpers.runs.options import MANY

# How a value of the wrong type may have been meant.
READ_AS = {str: (yaml.safe_load, float), int: (str,), tuple: (list,)}
BASE = "BASE"  # in a profile, not in a notebook: the profile that it builds on
MUST_BE = {  # pydantic's type of an error: what a number must be
    "finite_number": "a finite number",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
}
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80
SHORT.maxlevel = 2


# what a value may be


def _profile(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == "cache":
        raise ValueError("take letters, digits, '_' and '-' only, and not 'cache'")
    return name


def _set(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError("name a set of your own with small letters, digits, '_' and '-' only")
    return name


def _micro_batch(value: str) -> str:
    if value not in ("whole", "auto") and not re.fullmatch(r"0*[1-9][0-9]{0,5}", value):
        raise ValueError("take whole, auto or a number of pairs below a million")
    return value


def _number_of_threads(value: Any) -> Any:
    return 0 if value == "auto" else value


def _number_as_text(value: Any) -> Any:
    return str(max(0, min(value, MANY))) if type(value) is int else value


# "auto" passes as it is to the notebook, where `data.augment.threads` reads it
Threads = Annotated[int, BeforeValidator(_number_of_threads), Field(ge=0, le=256)]
MicroBatch = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_micro_batch)]
SetName = Annotated[str, AfterValidator(_set)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Epochs = Annotated[int, Field(ge=1, le=MANY)]
Batch = Annotated[int, Field(ge=2, le=MANY)]  # one pair alone has no wrong answers beside it
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Choice = TypeVar("Choice")
Several = Annotated[list[Choice], Field(max_length=100)]
# 0 has a meaning of its own, which the notebook's comment says
OrAll = Annotated[int, Field(ge=0, le=10 * MANY)]


class Parameters(BaseModel):
    """One field for each parameter. A notebook has some of them."""

    model_config = ConfigDict(strict=True, extra="forbid")

    # the run
    PROFILE: Annotated[str, AfterValidator(_profile)]
    SET: SetName
    DATA: str
    SEED: Seed
    SIZE: Literal["tiny", "compact", "paper"]
    DEVICE: Literal["auto", "cpu", "cuda", "mps"]
    PRECISION: Literal["fp32", "tf32", "bf16", "fp16"]
    EVAL_PRECISION: Literal["fp32", "bf16"]
    MICRO_BATCH: MicroBatch
    RECOMPUTE: bool
    COMPILE: bool
    WORKERS: Threads
    CHECKPOINT: str
    VIEWS: Annotated[int, Field(ge=0, le=1000)]
    TRIED: Annotated[int, Field(ge=0, le=MANY)]

    # 12_starting_weights
    PRIOR: Literal["", "aid", "imagenet", "fit", "random"]
    WEIGHTS: dict[str, str]
    CLIP: str
    ACTIVATION: Literal["", "quick_gelu", "gelu"]
    INSTRUCTION: str
    VILT: str
    SCENE_EPOCHS: Epochs
    OTHER_WORLD: Annotated[int, Field(ge=3, le=MANY)]
    PRETRAIN_SETS: Several[SetName]
    PRETRAIN_CAPTIONS: OrAll
    PRETRAIN: Epochs
    PRETRAIN_BATCH: Batch
    PRETRAIN_LR: Rate
    PRETRAIN_SEED: Seed

    # 20_pir
    EPOCHS: Epochs
    BATCH_SIZE: Batch
    LR: Rate
    TURNS: bool
    ABLATIONS: bool

    # 21_pir_clip
    PIR_CLIP_EPOCHS: Epochs
    PIR_CLIP_BATCH: Batch
    PIR_CLIP_LR: Rate
    SHARDS: str
    PIR_CLIP_VARIANTS: Several[Literal["zero-shot", "plain", "token", "belief", "by-rank"]]

    # 22_pe_rsitr
    PE_RSITR_EPOCHS: Epochs
    PE_RSITR_BATCH: Batch
    PE_RSITR_LR: Rate
    PE_RSITR_FULL_LR: Rate
    PE_RSITR_METHODS: Several[Literal["zero_shot", "linear_probe", "full", "lora", "adaptformer"]]
    PE_RSITR_VARIANTS: Several[Literal["cross-only", "random-start"]]

    # 23_cfitr
    CFITR_EPOCHS: Epochs
    CFITR_BATCH: Batch
    CFITR_ACCUMULATE: Annotated[int, Field(ge=1, le=MANY)]
    CFITR_LR: Rate
    FALSE_TEXTS: Annotated[int, Field(ge=1, le=MANY)]
    CFITR_VARIANTS: Several[Literal["no_lfem", "bit_balance", "released"]]
    K: Annotated[int, Field(ge=10, le=10 * MANY)]  # R@10 looks at ten candidates

    # 25_two_stage_search
    EXHAUSTIVE: bool

    # 24_bita
    STAGE1_EPOCHS: Epochs
    STAGE2_EPOCHS: Epochs
    FINETUNE_EPOCHS: Epochs
    STAGE1_LR: Rate
    STAGE2_LR: Rate
    FINETUNE_LR: Rate
    CAPTION_BATCH: Batch
    CAPTION_WARMUP: OrAll
    CAPTIONS: OrAll
    VALIDATE: OrAll
    CAPTION_SETS: Several[SetName]
    DECODER: Literal["standin", "smollm2"]
    LANGUAGE_EPOCHS: Epochs
    BEAMS: Annotated[int, Field(ge=1, le=1000)]
    BITA_VARIANTS: Several[Literal["no-stage1", "attention", "none", "two-queries"]]

    # 32_bring_your_model
    MODEL: str

    # 33_ideas
    TRAIN: bool

    # 40_attention_and_belief
    IMAGES: Annotated[int, Field(ge=2, le=MANY)]


# what a notebook has


def declared(notebook: Path) -> dict[str, Any]:
    """Name and default of each line in a notebook's cell of parameters.

    A default that is no literal is None. UserError if there is no such notebook.
    """
    if not notebook.is_file():
        raise UserError(f"There is no notebook {notebook}; name one of that folder, e.g. 20_pir.")
    import nbformat  # slow to import

    cells = nbformat.read(notebook, as_version=4).cells
    sources = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    lines = ast.parse("\n".join(sources)).body
    assigned = [line for line in lines if isinstance(line, (ast.AnnAssign, ast.Assign))]
    return {_target(line): _literal(line.value) for line in assigned}


def _target(line: ast.AnnAssign | ast.Assign) -> str:
    return ast.unparse(line.target if isinstance(line, ast.AnnAssign) else line.targets[0])


def _literal(expression: ast.expr | None) -> Any:
    if expression is None:
        return None
    try:
        return ast.literal_eval(expression)
    except ValueError:
        return None


def of_notebook(
    notebook: Path, namespace: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of a notebook's parameters, in the order of its cell.

    namespace  global variables of the notebook; what is not among them has the default of the cell
    overrides  values that count before those

    UserError with one sentence for each value that is wrong and each name that is not known.
    """
    defaults = declared(notebook)
    injected = _injected(namespace)
    if "PROFILE" in injected:  # a whole profile, which also has what other notebooks read
        others = set(Parameters.model_fields) - set(defaults)
        injected = [name for name in injected if name not in others]
    added = {name: namespace.get(name) for name in injected} | dict(overrides)
    values = {name: namespace.get(name, default) for name, default in defaults.items()} | added
    wrong = [unknown(name, defaults, notebook.stem) for name in values if name not in defaults]
    wrong += problems({name: value for name, value in values.items() if name in defaults})
    if wrong:
        raise UserError(f"{notebook.stem} was not started. {' '.join(wrong)}")
    return values


def _injected(namespace: Mapping[str, Any]) -> list[str]:
    """Names that papermill set: IPython's history holds its cell, which begins so."""
    cells = [cell for cell in namespace.get("In", []) if str(cell).startswith("# Parameters\n")]
    found = re.findall(r"^(\w+) = ", "\n".join(cells), re.M)
    return [name for name in found if name != BASE]


# what is wrong


def problems(values: Mapping[str, Any], here: Path = Path()) -> list[str]:
    """One sentence for each value that is wrong; if none is, for what does not go together.

    here  folder that relative paths start from
    """
    if wrong := wrong_values(values):
        return wrong
    return [*_wrong_data(values, here), *_wrong_sets(values, here), *_missing_files(values, here)]


def unknown(name: Any, known: Iterable[str], where: str = "any notebook") -> str:
    """The sentence on a name that is no parameter."""
    close = difflib.get_close_matches(str(name).upper(), sorted(known), 1, 0.75)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"There is no parameter {SHORT.repr(name)} in {where}{hint}."


def wrong_values(values: Mapping[str, Any]) -> list[str]:
    """One sentence for each value that is wrong by itself."""
    first = {error["loc"][0]: error for error in reversed(_errors(values))}
    return [_sentence(first[name]) for name in values if name in first]


def _errors(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What pydantic finds; that others are missing is no error."""
    try:
        Parameters(**values)
    except ValidationError as error:
        return [found for found in error.errors() if found["type"] != "missing"]
    return []


def _sentence(error: Mapping[str, Any]) -> str:
    """One sentence on the first error of a value."""
    (name, *places), value, context = error["loc"], error["input"], error.get("ctx", {})
    is_now = f"{name} {'holds' if places else 'is'} {_shown(value)}"
    match error["type"]:
        case "extra_forbidden":
            return f"{name} is not declared; add it to Parameters in nbhelpers/runs/parameters.py."
        case "literal_error":
            return f"{is_now}; choose {context['expected']}{_advice(name, value)}."
        case "value_error":
            return f"{is_now}; {context['error']}."
        case "too_long":
            return f"{name} holds {len(value)} values; name at most {context['max_length']}."
        case kind if kind in MUST_BE:
            return f"{is_now}; it must be {MUST_BE[kind].format(**context)}."
    kind = error["type"].removesuffix("_type").replace("string", "str")
    return f"{is_now}, of type {type(value).__name__}, but must be {kind}{_advice(name, value)}."


def _shown(value: Any) -> str:
    """A short form of a value; Python writes no number of over 4300 digits."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"a number of {value.bit_length()} bits"
    return SHORT.repr(value)


def _advice(name: str, value: Any) -> str:
    """How to write what was meant, e.g. 1e-4, which is text to YAML; "" where that is not clear."""
    if isinstance(value, str) and len(value) > 1000:
        return ""
    for read in READ_AS.get(type(value), ()):
        try:
            meant = read(value)
        except (ValueError, OverflowError, RecursionError, yaml.YAMLError):
            continue
        if not _errors({name: meant}):
            text = yaml.safe_dump(meant, default_flow_style=True, width=1000).splitlines()[0]
            return (
                f" (write `{name} = {meant!r}` in a cell, `{name}: {text}` in a profile or "
                "after papermill's -y)"
            )
    return ""


# what does not go together


def _wrong_data(values: Mapping[str, Any], here: Path) -> Iterator[str]:
    """On SET and DATA."""
    name, data, known = values.get("SET", "scenes"), values.get("DATA", ""), _known_sets()
    if data and not os.path.isdir(here / Path(data).expanduser()):
        yield f"DATA is {SHORT.repr(data)}, not a folder; give that of images and captions."
    elif not data and name not in known:
        yield (
            f"SET is '{name}'; choose one of {', '.join(known)}, or name with DATA the folder "
            "of a set of your own."
        )
    elif not data and name != "scenes":
        yield f"SET {name} needs DATA, the folder that holds its images and captions."


def _wrong_sets(values: Mapping[str, Any], here: Path) -> Iterator[str]:
    """On the sets beside the one under study."""
    own, pretraining = values.get("SET", "scenes"), values.get("PRETRAIN_SETS", [])
    if values.get("SIZE") != "paper" and (values.get("CLIP") or values.get("VILT")):
        if not pretraining:
            yield "PRETRAIN_SETS is empty, but CLIP and ViLT learn from one of them; add 'scenes'."
        elif pretraining[0] == own != "scenes":
            yield f"PRETRAIN_SETS begins with '{own}', the set under study; begin with another."
    for name in pretraining:
        if name not in _known_sets() and (why := _not_found(name, values, here)):
            yield f"PRETRAIN_SETS holds '{name}', none of {', '.join(_known_sets())}; {why}"
    for name in values.get("CAPTION_SETS", []):
        if name == own:
            yield f"CAPTION_SETS holds '{name}', the set under study; take it out."
        elif why := _not_found(name, values, here):
            yield f"CAPTION_SETS holds '{name}'; {why}"


def _known_sets() -> list[str]:
    from nbhelpers.data import catalog  # imports pandas

    return ["scenes", *catalog.KNOWN]


def _not_found(name: str, values: Mapping[str, Any], here: Path) -> str:
    """Why the folder DATA has no set of this name; "" if it has."""
    from nbhelpers.data import catalog

    if not values.get("DATA"):
        return "give DATA, the folder that holds it."
    try:
        catalog.find(name, here / Path(values["DATA"]).expanduser())
    except UserError as error:
        return str(error)
    return ""


def _missing_files(values: Mapping[str, Any], here: Path) -> Iterator[str]:
    """On parameters that name a file or a folder."""
    from nbhelpers.towers import public_weights

    yield from public_weights.wrong_paths(values.get("WEIGHTS", {}), here)
    paths = {name: values.get(name, "") for name in ("CHECKPOINT", "SHARDS")}
    if values.get("SIZE") == "paper":  # known names of weights hold no separator
        named = {name: values.get(name, "") for name in ("CLIP", "VILT", "INSTRUCTION")}
        paths |= {name: os.path.expanduser(named[name]) for name in named if os.sep in named[name]}
    for name, path in paths.items():
        if path and not os.path.exists(here / path):
            yield f"{name} is {SHORT.repr(path)}, but there is no such file; check the path."
