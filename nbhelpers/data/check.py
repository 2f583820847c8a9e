"""Report what a caption file and its images hold, and all their problems (`data check`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from nbhelpers.data import catalog, layouts, resplits
from nbhelpers.data.archives import open_images
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError


@dataclass
class CheckReport:
    """Collect lines to print, and one sentence for each kind of problem (none: usable data).

    facts  what the lines say, as fields for programs
    """

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def say(self, topic: str, text: str) -> None:
        """Add a line under a topic."""
        self.lines.append(f"{topic:<12}{text}")


def check(
    captions: Path | str,
    images: Path | str | None = None,
    layout: str | None = None,
    against: Path | str | None = None,
) -> CheckReport:
    """Read the captions and, if named, every image. Bad data is reported, never raised.

    against  another caption file of the set; what moves from its splits to those of `captions`
    """
    report = CheckReport()
    try:
        reading = layouts.scan(captions, layout)
    except UserError as error:
        report.problems.append(str(error))
        return report
    report.problems += reading.problems
    report.say("layout", reading.layout)
    key = catalog.recognise(reading.table)
    table = catalog.name_scenes(reading.table, key)
    report.facts = {
        "layout": reading.layout,
        "known_set": key,
        "splits": table.counts().to_dict("index"),
        "notes": list(reading.notes),
    }
    _check_counts(table, key, report)
    for note in reading.notes:
        report.say("note", note)
    if against:
        _compare(table, against, report)
    _describe_captions(table, report)
    _describe_scenes(table, report)
    if images:
        _check_images(table, images, report)
    else:
        report.say("images", "not looked at: no folder or archive was named")
    return report


def too_small(table: CaptionTable, values: Mapping[str, Any]) -> list[str]:
    """Say in one sentence each which trainings of the notebooks a set is too small for.

    values  name -> value of the notebooks' parameters
    """
    train = table.split("train")
    said = []
    for name, pairs in training_pairs(train, values["CAPTIONS"]).items():
        mend = f"set {name} to at most {pairs}" if pairs > 1 else "add training images or captions"
        if pairs < values[name]:
            said.append(
                f"{name} is {values[name]}, but there are {pairs} training pairs of an "
                f"image and a caption for it, which fill no batch; {mend}."
            )
    owned = train.captions.drop_duplicates().image_id.value_counts()
    if len(owned) and owned.max() == train.captions.text.nunique():
        said.append(
            "A training image has all training captions among its own, so 23_cfitr finds "
            "no false one for it; add training images with captions of their own."
        )
    if values["SIZE"] == "compact" or values["PRIOR"] == "fit":
        said += no_scene_prior(table)
    return said


def training_pairs(train: CaptionTable, captions: int) -> dict[str, int]:
    """Return parameter of a batch's size -> pairs that its system trains on.

    captions  of each image that BITA learns; 0: all
    """
    learned = train.captions.groupby("image_id").cumcount() < (captions or len(train.captions))
    pairs = len(train.captions)
    return {
        "BATCH_SIZE": pairs,
        "PIR_CLIP_BATCH": pairs,
        "PE_RSITR_BATCH": pairs,
        "CFITR_BATCH": len(train.captions.drop_duplicates()),
        "CAPTION_BATCH": int(learned.sum()),
    }


def no_scene_prior(table: CaptionTable) -> list[str]:
    """Say why no scene prior can be fitted to the training classes; [] if one can."""
    from nbhelpers.data.scene_labels import scene_classes  # imports torch

    try:
        scene_classes(table)
    except UserError as error:
        return [str(error)]
    return []


def _compare(table: CaptionTable, against: Path | str, report: CheckReport) -> None:
    """Say which images have another split in another caption file of the set."""
    try:
        counts = resplits.moves(layouts.scan(against, joined=True).table, table)
    except UserError as error:
        report.problems.append(str(error))
        return
    report.say("splits", f"{resplits.sentence(counts)} Compared with {Path(against).name}.")
    report.facts["moves"] = [
        {"from": old, "to": new, "images": count} for (old, new), count in sorted(counts.items())
    ]


def _check_counts(table: CaptionTable, key: str | None, report: CheckReport) -> None:
    for split, row in table.counts().iterrows():
        report.say(split, f"{row.images} images, {row.captions} captions")
    for split in ("train", "test"):
        if len(table) and split not in set(table.images.split):
            report.problems.append(
                f"There is no image in split '{split}'; write the split of each "
                "image in a field or column 'split', or put the file of that "
                f"split beside the others, named like them but with {split}."
            )
    if key is None:
        report.say(
            "set", f"'{table.name}' is not in the catalogue: no published counts to compare with"
        )
        return
    known, split_name = catalog.KNOWN[key], catalog.KNOWN[key].split_name(table)
    published = "; ".join(
        f"{'/'.join(map(str, counts))} ({name})" for name, counts in known.splits.items()
    )
    report.say("set", f"{known.title}: {published}, {known.captions_per_image} captions per image")
    if len(table) != known.images:
        report.problems.append(
            f"{known.title} has {known.images} images but {len(table)} were "
            f"found; take the complete release from {known.captions_source}."
        )
    elif fault := known.caption_fault(table):
        report.problems.append(
            f"{fault.rstrip('.')}; take the complete release from {known.captions_source}."
        )
    elif split_name:
        report.say("", f"the counts of images and captions agree ({split_name})")
    else:
        report.say(
            "", f"all {known.images} images, but another split than these: results do not compare"
        )


def _describe_captions(table: CaptionTable, report: CheckReport) -> None:
    captions = table.captions.merge(table.images[["image_id", "split"]], on="image_id")
    per_image = Counter(captions.groupby("image_id").size())
    listed = ", ".join(f"{n} ({images} images)" for n, images in sorted(per_image.items()))
    report.say("captions", f"per image: {listed or 'none'}")
    by_number = {str(number): images for number, images in sorted(per_image.items())}
    report.facts["images_by_captions"] = by_number
    report.facts["captions"] = {}
    for split in table.counts().index:
        group = captions[captions.split == split]
        own = group[group.duplicated(["image_id", "text"])].image_id.nunique()
        shared = (group.groupby("text").image_id.nunique() > 1).sum()
        distinct = group.text.nunique()
        report.facts["captions"][split] = {
            "captions": len(group),
            "distinct": distinct,
            "images_that_repeat_a_caption": own,
            "captions_of_several_images": int(shared),
        }
        report.say(
            "repeated",
            f"{split}: {distinct} of {len(group)} captions "
            f"distinct; {own} images repeat one of their own; {shared} captions "
            "belong to several images",
        )


def _describe_scenes(table: CaptionTable, report: CheckReport) -> None:
    named = table.images.scene[table.images.scene != table.images.file]
    names = sorted(set(named))
    listed = f": {_first_of(names, 40)}" if names else ""
    report.facts["scenes"] = names
    report.say("scenes", f"{len(names)} classes{listed}")
    if len(named) < len(table):
        report.say(
            "", f"{len(table) - len(named)} images without a known class, each a class of its own"
        )


def _first_of(names: list[str], most: int) -> str:
    return ", ".join([*names[:most], "..."] if len(names) > most else names)


def _listed_sizes(sizes: Counter[str]) -> str:
    """List the most common size of the images, then the others."""
    usual, *others = [f"{size} ({count})" for size, count in sizes.most_common()]
    if not others:
        return usual
    count = sizes.total() - sizes.most_common(1)[0][1]
    return f"{usual}; {count} odd-sized: {_first_of(others, 8)}"


def _check_images(table: CaptionTable, images: Path | str, report: CheckReport) -> None:
    from tqdm import tqdm

    try:
        store = open_images(images)
    except UserError as error:
        report.problems.append(str(error))
        return
    members, missing = store.resolve(table.images.file)
    unreadable: list[str] = []
    sizes: Counter[str] = Counter()
    for member in tqdm(members.values(), desc="images", disable=None, leave=False):
        try:
            height, width = store.read(member).shape[:2]
            sizes[f"{width}x{height}"] += 1
        except UserError as error:
            unreadable.append(str(error))
    renamed = sum(
        PurePosixPath(member).suffix != PurePosixPath(file).suffix
        for file, member in members.items()
    )
    report.facts["images"] = {"read": sizes.total(), "sizes": dict(sizes)}
    report.say("images", f"{sum(sizes.values())} of {len(table)} found and read")
    if renamed:
        report.say(
            "", f"{renamed} have another extension than in the list and were found by their stem"
        )
    if sizes:
        report.say("sizes", _listed_sizes(sizes))
    if missing:
        report.problems.append(
            f"{len(missing)} of {len(table)} listed images have no file of "
            f"their own (first: {missing[0].rstrip('.')})."
        )
    if unreadable:
        report.problems.append(
            f"{len(unreadable)} images cannot be read (first: {unreadable[0].rstrip('.')})."
        )
