"""The documents' tables from recorded results, the verb `bench history`, and the workflow that compares speed.

All results here are made up, but for the committed ones that the committed page is held to.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mvp_fast.cli.bench import history as history_verb
from mvp_fast.cli.bench import run as bench_verb
from mvp_fast.cli.parse import parse
from mvp_fast.errors import DataError
from tests.bench_results import CPU, GPU, NAME, REPO, docs_tables, extra, record

SECTIONS = (
    f"# Page\n\n<!-- results: {CPU} -->\nold\n<!-- end -->\n\nmiddle\n\n<!-- results: {GPU} -->\n<!-- end -->\n\nlast\n"
)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """An empty folder of results."""
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


def section(text: str, device: str) -> str:
    return text.partition(f"<!-- results: {device} -->\n")[2].partition("<!-- end -->")[0]


def test_without_results_the_tables_say_so(results: Path) -> None:
    text = docs_tables.filled(SECTIONS, results)
    assert section(text, CPU) == section(text, GPU) == "Not measured yet.\n"
    record(results, 0, (NAME, extra(1)), rounds=1)
    assert docs_tables.filled(SECTIONS, results) == text


def test_tables_come_from_the_newest_run(results: Path) -> None:
    record(results, 0, (NAME, extra(11)), ("test_x.py::test_gone", extra(12)))
    newest = record(results, 7, (NAME, extra(1234.5, title="Work | two. [case]")))
    record(results, 8, (NAME, extra(13)), rounds=1)
    text = docs_tables.filled(SECTIONS, results)
    table = section(text, CPU)
    row = "| Work \\| two [case] | 1,230 images/s (1,210 to 1,260) | 2.00 (1.80 to 2.20) plain |"
    assert row in table.splitlines()
    assert f"../benchmarks/results/{CPU}/{newest.name}" in table
    assert "a CPU, 2 cores" in table
    assert "copy 1.3 %" in table
    assert "`test_x.py::test_gone`" in table
    assert "| 11" not in table
    assert section(text, GPU) == "Not measured yet.\n"
    assert docs_tables.filled(text, results) == text
    outside = re.compile(r"(<!-- results: \S+ -->\n).*?(<!-- end -->)", re.DOTALL)
    assert outside.sub(r"\1\2", text) == outside.sub(r"\1\2", SECTIONS)


def test_shares_and_memory_are_told(results: Path) -> None:
    copy = {"ratio": 0.91, "low": 0.9, "high": 0.92, "pairs": 5}
    more = {"share_of_limit": {"share": 0.613, "of": "the product's rate"}, "counts": {"ours": {"peak_bytes": 3 << 30}}}
    kernel = extra(1, ratio=None) | {"times_the_peer": {"copy": copy}}
    record(results, 0, (NAME, extra(1, **more)), ("test_k.py::test_k", kernel), device=GPU)
    table = section(docs_tables.filled(SECTIONS, results), GPU)
    assert "NVIDIA H100 (driver 570.1, memory 80 GiB, multiprocessors up to 1980 MHz); a CPU" in table
    assert "| 2.00 (1.80 to 2.20) plain | 61 % of the product's rate | ours 3.00 GiB |" in table
    assert "| what | rate | share of the limit |" in table  # nothing else in this one
    assert "| 91 % (90 to 92) of a copy |" in table


def test_what_takes_seconds_is_told_in_seconds(results: Path) -> None:
    record(results, 0, (NAME, extra(0.08, unit="commands", ratio=None)))
    row = "| Work | 0.0800 commands/s (0.0784 to 0.0816), 12.5 s each |"
    assert row in section(docs_tables.filled(SECTIONS, results), CPU).splitlines()


def test_a_device_without_a_section_gets_one(results: Path) -> None:
    record(results, 0, (NAME, extra(5)), device="nvidia-b200")
    text = docs_tables.filled(SECTIONS, results)
    assert "5.00 images/s" in section(text, "nvidia-b200")
    assert text.index("## `nvidia-b200`") > text.index(GPU)
    assert text.endswith("<!-- end -->\n\nlast\n")
    assert docs_tables.filled(text, results) == text


@pytest.mark.parametrize("text", ["", SECTIONS.replace("<!-- end -->", "", 1), SECTIONS + "<!-- end -->\n"])
def test_a_page_without_whole_markers_is_refused(results: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"page\.md"):
        docs_tables.filled(text, results, "page.md")


def test_the_committed_page_is_what_the_committed_results_give() -> None:
    text = docs_tables.PAGE.read_text()
    assert docs_tables.filled(text, docs_tables.RESULTS) == text, "run `mvp-fast bench history --docs`"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(REPO / "mvp_fast", folder / "mvp_fast", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "benchmarks").mkdir()
    for path in (REPO / "benchmarks").glob("*.py"):
        shutil.copy(path, folder / "benchmarks")
    (folder / "docs").mkdir()
    (folder / "docs" / "performance.md").write_text(SECTIONS)
    return folder


def run_in(checkout: Path, *words: str, script: bool = False) -> subprocess.CompletedProcess[str]:
    command = ["benchmarks/history.py"] if script else ["-m", "mvp_fast", "bench", "history"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.run(
        [sys.executable, *command, *words], cwd=checkout, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_verb_draws_and_writes_in_the_checkout_it_comes_from(checkout: Path) -> None:
    results = checkout / "benchmarks" / "results"
    for script in (False, True):
        nothing = run_in(checkout, script=script)
        assert (nothing.returncode, nothing.stdout) == (3, "")
        assert nothing.stderr.count("\n") == 1
        assert f"data error: There are no recorded results ({results})" in nothing.stderr
    record(results, 0, (NAME, extra(42)))
    drawn = run_in(checkout)
    assert (drawn.returncode, drawn.stderr) == (0, "")
    assert str(checkout / "build" / "history" / "index.html") in drawn.stdout
    assert "42.0 images/s" in (checkout / "build" / "history" / "index.html").read_text()
    page = checkout / "docs" / "performance.md"
    for word in ("wrote", "as it was"):
        done = run_in(checkout, "--docs")
        assert (done.returncode, done.stdout) == (0, f"{word:<9} {page}\n")
        assert "42.0 images/s" in page.read_text()
    (results / CPU / "torn.json").write_text("{")
    before = page.read_text()
    torn = run_in(checkout, "--docs")
    assert (torn.returncode, torn.stderr.count("\n")) == (3, 1)
    assert page.read_text() == before


def test_outside_a_checkout_the_verb_says_where_it_runs(tmp_path: Path) -> None:
    shutil.copytree(REPO / "mvp_fast", tmp_path / "mvp_fast", ignore=shutil.ignore_patterns("__pycache__"))
    done = run_in(tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "Clone the repository" in done.stderr


# The workflow.

WORKFLOW: dict[str, Any] = yaml.safe_load((REPO / ".github" / "workflows" / "throughput.yml").read_text())
JOBS = WORKFLOW["jobs"]


def bench_words(script: str) -> list[str]:
    """The arguments of the `mvp-fast bench` that a script calls."""
    words = shlex.split(script)
    return words[words.index(".venv/bin/mvp-fast") + 2 :]


@pytest.mark.parametrize(("job", "device"), [("cpu", "cpu"), ("gpu", "cuda")])
def test_the_workflow_asks_for_what_the_verb_can_do(job: str, device: str) -> None:
    (script,) = (step["run"] for step in JOBS[job]["steps"] if "mvp-fast" in step.get("run", ""))
    options = parse(bench_verb.Options, bench_words(script), "bench")
    assert options.device == device
    assert options.short == (job == "cpu")
    assert "merge-base" in options.against
    for name, path in (("table", options.markdown), ("upload", options.json)):
        place = path.replace("$RUNNER_TEMP", "${{ runner.temp }}") if name == "upload" else path
        later = [step for step in JOBS[job]["steps"] if place in str(step) and script != step.get("run")]
        assert [step["if"] for step in later] == ["${{ !cancelled() }}"]  # also where a regression was found
    checkout = JOBS[job]["steps"][0]
    assert checkout["with"]["fetch-depth"] == 0


def test_the_workflow_may_read_and_nothing_else() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in JOBS.values())
    assert set(WORKFLOW[True]) == {"pull_request"}  # YAML 1.1 reads `on` as true
    assert all("timeout-minutes" in job for job in JOBS.values())


def test_without_a_gpu_runner_a_notice_takes_its_place(tmp_path: Path) -> None:
    condition = JOBS["gpu"]["if"].removeprefix("${{ ").removesuffix(" }}")
    assert "vars.HAS_GPU_RUNNER == 'true'" in condition
    assert "head.repo.full_name == github.repository" in condition  # code of forks never gets to the runner
    assert JOBS["no-gpu"]["if"] == "${{ !(" + condition + ") }}"
    (step,) = JOBS["no-gpu"]["steps"]
    summary = tmp_path / "summary.md"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", step["run"]],
        env={**os.environ, "GITHUB_STEP_SUMMARY": str(summary)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("::notice ")
    assert "was not compared" in summary.read_text()


@pytest.mark.parametrize("written", [True, False])
def test_the_table_goes_to_the_summary(tmp_path: Path, written: bool) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    for job in ("cpu", "gpu"):
        if written:
            (tmp_path / f"throughput-{job}.md").write_text(f"{job}\n")
        (script,) = (step["run"] for step in JOBS[job]["steps"] if "GITHUB_STEP_SUMMARY" in step.get("run", ""))
        environment = {**os.environ, "RUNNER_TEMP": str(tmp_path), "GITHUB_STEP_SUMMARY": str(summary)}
        subprocess.run(["bash", "-euo", "pipefail", "-c", script], env=environment, check=True)
    assert summary.read_text() == ("before\ncpu\ngpu\n" if written else "before\n")


def test_the_page_tells_of_commands_that_exist() -> None:
    found = re.findall(r"^    mvp-fast bench(.*?)(?:  +#.*)?$", docs_tables.PAGE.read_text(), re.MULTILINE)
    assert len(found) > 5
    for line in found:
        words = shlex.split(line)
        verb: Any = history_verb if words[:1] == ["history"] else bench_verb
        parse(verb.Options, words[1:] if verb is history_verb else words, "bench")
