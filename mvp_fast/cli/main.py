"""`mvp-fast VERB ...`: finds the verb, imports its module, and turns errors into one paragraph and an exit code.

Nothing heavy is imported here: `mvp-fast --help` must answer at once.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys

from mvp_fast import __version__
from mvp_fast.errors import EnvironmentProblem, UserError

# verb -> (module, one line for the help). A module has main(argv) -> exit code.
VERBS = {
    "train": ("mvp_fast.cli.train", "pre-train a student against a frozen teacher"),
    "finetune": ("mvp_fast.cli.finetune", "train a classifier from a pre-trained network, and test it"),
    "segment": ("mvp_fast.cli.segment", "train UPerNet on a pre-trained network, and judge it on masks"),
    "visualize": (
        "mvp_fast.cli.visualize",
        "draw attention, features as colour, similarity, and where a text is found",
    ),
    "teacher fit": ("mvp_fast.cli.teacher.fit", "train a small CLIP on images and their captions, to be a teacher"),
    "export": ("mvp_fast.cli.export", "write a run's student in a format that other tools load"),
    "probe": ("mvp_fast.cli.probe", "measure what a frozen network's features are worth: k-NN and linear classifiers"),
    "study": ("mvp_fast.cli.study.run", "pre-train students on different targets, and compare what they are worth"),
    "data scenes": ("mvp_fast.cli.data.scenes", "draw a synthetic set of JPEG images with labels, captions and masks"),
    "data index": ("mvp_fast.cli.data.index", "write the Parquet index of a folder of images"),
    "data convert": ("mvp_fast.cli.data.convert", "write a data set anew in a form that loads faster"),
    "data plan": ("mvp_fast.cli.data.plan", "write the samples, boxes and masks of an epoch as a table"),
    "data render": ("mvp_fast.cli.data.render", "write one batch as the student sees it, as a picture and as arrays"),
    "data bench": ("mvp_fast.cli.data.bench", "measure how many images a second each backend loads, of your data"),
    "doctor": ("mvp_fast.cli.doctor", "try out what training runs on here, and say what is missing"),
    "bench": ("mvp_fast.cli.bench.run", "run the benchmarks, or compare their speed with another revision's"),
    "bench history": ("mvp_fast.cli.bench.history", "draw recorded benchmark results over commits"),
}

EXIT_CODES = (
    "0 done, 1 bench found a regression, 2 usage or configuration, 3 data, 4 environment, 5 training diverged, "
    "75 preempted with a checkpoint written (try again)"
)

# What a user can mend although no room of the program foresaw it where it came up. Other errors show a traceback.
_SPACE = "Free some space, or write to another disk; what was finished before is whole"
_RIGHTS = "Mend the rights of the place, or choose another"
_LIMIT = "Raise the limit (ulimit -a), or take fewer threads or ranks"
MACHINE_TROUBLE = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.EMFILE: _LIMIT,
    errno.ENFILE: _LIMIT,
    errno.ENOMEM: _LIMIT,
    errno.EIO: "The disk or the network file system has a fault: see the system's log",
}


def usage(prefix: str = "") -> str:
    """The help text: all verbs, or those that begin with `prefix`."""
    rows = [(verb, line) for verb, (_, line) in VERBS.items() if verb.startswith(prefix)]
    width = max(len(verb) for verb, _ in rows)
    lines = [f"usage: mvp-fast {prefix + ' ' if prefix else ''}VERB ...", ""]
    lines += [f"  {verb:<{width}}  {line}" for verb, line in rows]
    lines += ["", "mvp-fast VERB --help shows a verb's options.", f"Exit codes: {EXIT_CODES}."]
    return "\n".join(lines)


def find_verb(argv: list[str]) -> tuple[str, list[str]] | None:
    """The verb that `argv` begins with and the arguments after it; None where there is no such verb."""
    for words in (2, 1):
        verb = " ".join(argv[:words])
        if len(argv) >= words and verb in VERBS:
            return verb, argv[words:]
    return None


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code; prints errors meant for users as one paragraph on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"mvp-fast {__version__}")
        return 0
    found = find_verb(argv)
    if found is None:
        return _no_such_verb(argv)
    verb, rest = found
    try:
        code = int(importlib.import_module(VERBS[verb][0]).main(rest))
        sys.stdout.flush()  # here, where a reader that is gone can be told from an error
        return code
    except UserError as error:
        return _tell(verb, error)
    except KeyboardInterrupt:
        print(f"mvp-fast {verb}: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe (head, less) went away: no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in MACHINE_TROUBLE:
            raise
        where = " and ".join(str(name) for name in (error.filename, error.filename2) if name)
        problem = f"The machine refused to go on: {os.strerror(error.errno)}"
        return _tell(verb, EnvironmentProblem(problem, where=where, fix=MACHINE_TROUBLE[error.errno]))


def _tell(verb: str, error: UserError) -> int:
    print(f"mvp-fast {verb}: {error.kind}: {error.paragraph()}", file=sys.stderr, flush=True)
    return error.exit_code


def _no_such_verb(argv: list[str]) -> int:
    """Help for a group such as `data`, or the nearest verb's name, on stderr."""
    group = any(verb.startswith(argv[0] + " ") for verb in VERBS)
    if group and (len(argv) == 1 or argv[1].startswith("-")):
        asked = argv[1:2] in (["-h"], ["--help"])
        print(usage(argv[0]), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    import difflib

    tried = " ".join(argv[:2]) if group else argv[0]
    near = difflib.get_close_matches(tried, VERBS, n=1) or difflib.get_close_matches(" ".join(argv[:2]), VERBS, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    print(
        f"mvp-fast: usage error: there is no verb `{tried}`.{hint} `mvp-fast --help` lists them all.", file=sys.stderr
    )
    return 2
