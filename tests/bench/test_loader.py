"""`python -m bench loader`: what the rows deliver, the instruments on known loads, rounds in turn, failures."""

import argparse
import itertools
import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from bench import loader, loader_run, photos, pipelines
from bench.__main__ import main
from bench.loader import Row
from bench.loader_run import Measured
from bench.pipelines import BY_NAME, FOLDERS, PROVIDERS, Job, Provider, Workload
from bench.process_tree import PeakMemory, cpu_seconds, memory, tree
from bench.tables import console
from ssr_fast.data.augment import normalise
from ssr_fast.data.images import read_image
from ssr_fast.data.layouts import find_layout

RIVAL, OURS = (provider.name for provider in PROVIDERS[:2])
WHOLE = Workload(
    photos.Photograph("gta5", 128, 64, 2.0, 0.3), photos.Photograph("cityscapes", 128, 64, 2.0, 0.3),
    (128, 64), (128, 64), (64, 128), 2,
)  # fmt: skip
"""A crop is the whole picture."""
TINY = replace(WHOLE, source_box=(96, 54), crop=(32, 48))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    photos.write_sets(folder, (WHOLE.source, WHOLE.target), 4, 0)
    return folder


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def job_of(name, workload, folder, workers=0):
    roots = {FOLDERS: (str(folder / "gta5"), str(folder / "cityscapes"))}
    return Job(name, workload, roots, str(folder / "index"), workers, 1, 0.1, 2, "cpu")


def test_a_job_survives_json():
    job = Job(OURS, WHOLE, {FOLDERS: ("a", "b")}, "c", 2, 8, 1.5, 4, "cpu", 7)
    assert Job.of(json.loads(json.dumps(asdict(job)))) == job


def test_the_full_workload_is_the_presets():
    work = pipelines.full_workload()
    assert (work.source.width, work.source.height) == (1914, 1052) and work.source_size() == (1280, 704)
    assert (work.target.width, work.target.height) == (2048, 1024) and work.target_size() == (1024, 512)
    assert work.crop == (512, 512) and work.batch == 2


@pytest.mark.parametrize("name", [RIVAL, OURS])
def test_whole_pictures_arrive_as_they_are(name, drawn):
    """Image and label of one file, both mirrored or neither, normalised; every picture comes, and both directions."""
    layout = find_layout(drawn / "gta5")
    sources = []
    for entry in layout.entries("train"):
        sources.append((normalise(read_image(entry.image)), torch.from_numpy(layout.read_label(entry.label))))
    targets = [normalise(read_image(path)) for path in sorted((drawn / "cityscapes").rglob("*.png"))]
    seen = set()
    for batch in itertools.islice(BY_NAME[name].batches(job_of(name, WHOLE, drawn)), 40):
        for image, label, target in zip(*batch, strict=True):
            found = {
                (number, mirrored)
                for number, (one, truth) in enumerate(sources)
                for mirrored in (False, True)
                if torch.allclose(one.flip(-1) if mirrored else one, image, atol=1e-5)
                and torch.equal(truth.flip(-1) if mirrored else truth, label)
            }
            assert len(found) == 1
            seen |= found
            assert any(torch.allclose(each, target, atol=1e-5) for one in targets for each in (one, one.flip(-1)))
    assert {mirrored for _, mirrored in seen} == {False, True}
    assert len({number for number, _ in seen}) == 4


@pytest.mark.parametrize("name", [RIVAL, OURS])
def test_crops_of_resized_pictures(name, drawn):
    job = job_of(name, TINY, drawn)
    batch = next(iter(BY_NAME[name].batches(job)))
    loader_run.check(batch, job)
    assert [tuple(part.shape) for part in batch] == [(2, 3, 32, 48), (2, 32, 48), (2, 3, 32, 48)]
    assert batch[0].dtype == batch[2].dtype == torch.float32 and batch[1].dtype == torch.uint8


def right_batch():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 32, 48, generator=generator) * 3 - 1.5
    return [image, torch.randint(0, 19, (2, 32, 48), generator=generator, dtype=torch.uint8), image.clone()]


@pytest.mark.parametrize(
    ("part", "change", "sentence"),
    [
        (0, lambda image: image[..., 1:], "source images are torch.float32"),
        (2, lambda image: image.double(), "target images are torch.float64"),
        (0, lambda image: image * 50 + 120, "source images lie in"),
        (2, lambda image: image * float("nan"), "target images lie in nan"),
        (2, torch.zeros_like, "target images lie in"),
        (1, lambda label: label[None], "labels are torch.uint8"),
        (1, lambda label: label.long(), "labels are torch.int64"),
        (1, lambda label: label + 7, "labels hold"),
        (1, lambda label: torch.full_like(label, 255), "labels hold [255]"),
    ],
)
def test_a_batch_that_is_not_what_all_rows_deliver(part, change, sentence, tmp_path):
    job, batch = job_of(RIVAL, TINY, tmp_path), right_batch()
    loader_run.check(tuple(batch), job)
    batch[part] = change(batch[part])
    with pytest.raises(ValueError, match=sentence.replace("[", r"\[")):
        loader_run.check(tuple(batch), job)


@pytest.mark.parametrize(("seconds", "least"), [(0.5, 1), (0.0, 20)])
def test_the_measured_part_begins_behind_the_warm_up(seconds, least, monkeypatch, tmp_path):
    """A provider that is slow at the start and burns a known time in each batch."""

    def batches(job):
        batch = tuple(right_batch())
        for number in itertools.count():
            end = loader_run.time.process_time() + (0.3 if number < 4 else 0.02)
            while loader_run.time.process_time() < end:
                pass
            yield batch

    monkeypatch.setitem(BY_NAME, "slow start", Provider("slow start", FOLDERS, "", batches))
    job = replace(job_of("slow start", TINY, tmp_path), warm_up=3, seconds=seconds, least=least)
    found = loader_run.measure(job)
    assert found.batches >= least and found.seconds >= max(seconds, 0.02 * least) and found.first_seconds >= 0.3
    assert found.samples_per_second == pytest.approx(2 * found.batches / found.seconds)
    assert found.cpu_seconds * 2 * found.batches <= found.seconds + 0.05  # one process, one thread
    assert 0.009 < found.cpu_seconds < 0.03  # 0.02 s of each batch of 2; with the start in it, 0.07 and more


BURN = """
import subprocess, sys, time
own = [b"x" * int({megabytes}e6)]
child = subprocess.Popen([sys.executable, "-c", {inner!r}], stdout=subprocess.PIPE) if {inner!r} else None
if child: child.stdout.readline()
while time.process_time() < {seconds}: pass
print(flush=True)
time.sleep(60)
"""


def test_the_instruments_measure_a_known_load():
    """A child that burns 0.5 s and holds 100 MB, and its own child with 0.3 s and 50 MB."""
    inner = BURN.format(megabytes=50, seconds=0.3, inner="")
    command = [sys.executable, "-c", BURN.format(megabytes=100, seconds=0.5, inner=inner)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        try:
            with PeakMemory(child.pid, every=0.02) as peak:
                child.stdout.readline()
                assert len(tree(child.pid)) == 2
                assert 0.75 <= cpu_seconds(child.pid) < 1.0  # two processes, user and system: four numbers cut to ticks
                total, own = memory(child.pid)
                assert 150e6 < own < 200e6 and own < total < own + 60e6
            assert peak.samples > 3 and 150e6 < peak.own < 200e6 and peak.own <= peak.peak
        finally:
            subprocess.run(["kill", *map(str, tree(child.pid))], check=True)
    assert tree(child.pid) == [child.pid] and cpu_seconds(child.pid) == 0 and memory(child.pid) == (0, 0)


def test_pages_that_processes_share_count_once():
    """A process with 100 MB and three copies of it, as workers are."""
    text = "import os, time\nheld = b'x' * 100_000_000\nfor _ in range(3):\n    if not os.fork(): time.sleep(60)\n"
    text += "print(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as child:
        try:
            child.stdout.readline()
            assert len(tree(child.pid)) == 4 and 100e6 < memory(child.pid)[1] <= memory(child.pid)[0] < 150e6
        finally:
            subprocess.run(["kill", *map(str, tree(child.pid))], check=True)


def test_the_time_of_a_child_that_has_ended_counts():
    inner = "import time\nwhile time.process_time() < 0.4: pass"
    outer = f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {inner!r}])\nprint(flush=True)\n"
    outer += "time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert cpu_seconds(child.pid) >= 0.36 and tree(child.pid) == [child.pid]
        child.kill()


def test_rows_take_turns_and_are_compared_within_a_round(monkeypatch, tmp_path):
    turns, speeds = [], {RIVAL: iter([10.0, 20.0, 40.0]), OURS: iter([30.0, 40.0, 200.0])}

    def run_round(row, job, folder):
        assert job.provider == row.name
        turns.append(row.name)
        row.rounds.append(Measured(next(speeds[row.name]), 0.1, 1.0, 5, 1.0, 7, 6))

    monkeypatch.setattr(loader, "_run_round", run_round)
    options = argparse.Namespace(images=2, rounds=3, seconds=1.0, workers=1, device="cpu")
    rows = [Row(RIVAL, ""), Row(OURS, "")]
    facts = loader.run(rows, TINY, options, tmp_path, console())
    assert turns == [RIVAL, OURS, OURS, RIVAL, RIVAL, OURS]
    assert rows[0].spreads["ratio"] == loader.Spread(1.0, 1.0, 1.0)
    assert rows[1].spreads["ratio"] == loader.Spread(3.0, 2.0, 5.0)  # of the medians it would be 2
    assert rows[1].spreads["samples_per_second"] == loader.Spread(40.0, 30.0, 200.0)
    assert facts["workers"] == 1 and facts["files"]["gta5"]["images"] == 2


def test_the_command(monkeypatch, tmp_path, capsys):
    """The rows of this machine, one that raises in its process and one that cannot run here."""
    monkeypatch.setattr(loader, "WORKLOAD", lambda: TINY)
    monkeypatch.setitem(BY_NAME, "broken", Provider("broken", FOLDERS, "", None))  # its process does not know it
    monkeypatch.setitem(BY_NAME, "elsewhere", Provider("elsewhere", FOLDERS, "", None, lambda device: ["no GPU"]))
    file = tmp_path / "loader.json"
    words = ["--device", "cpu", "--images", "3", "--rounds", "1", "--seconds", "0.5", "--workers", "1"]
    assert main(["loader", *words, "--json", str(file)]) == 1
    printed = capsys.readouterr()
    assert printed.err == "broken: KeyError: 'broken'\n"
    assert RIVAL in printed.out and "elsewhere skipped: no GPU" in printed.out and "ERROR" in printed.out
    content = json.loads(file.read_text())
    assert {"date", "device", "versions", "commit", "method", "workload", "setting", "rows"} <= set(content)
    rows = {row["name"]: row for row in content["rows"]}
    skipped = [provider.name for provider in PROVIDERS if provider.reasons(torch.device("cpu"))]
    assert {name: row["status"] for name, row in rows.items()} == {
        **{provider.name: "skipped" if provider.name in skipped else "ok" for provider in PROVIDERS},
        "broken": "error",
        "elsewhere": "skipped",
    }
    assert set(skipped) <= {name for name in rows if "DALI" in name}
    for name in (provider.name for provider in PROVIDERS if provider.name not in skipped):
        (measured,), spreads = rows[name]["rounds"], rows[name]["spreads"]
        assert measured["samples_per_second"] > 0 and measured["cpu_seconds"] > 0 and measured["first_seconds"] > 0
        assert 1e8 < measured["own_bytes"] <= measured["peak_bytes"] < 4e9  # torch alone takes more than 100 MB
        assert spreads["ratio"]["median"] > 0 and set(measured) < set(spreads)
    assert rows["broken"]["rounds"] == [] and rows["broken"]["spreads"] == {}


def test_each_figure_stands_under_its_heading(capsys):
    row = Row(OURS, "", rounds=[Measured(12.0, 0.125, 0.75, 5, 1.0, 900_000_000, 800_000_000)])
    loader._summarise([row])
    facts = {"workers": 1, "files": {}}
    loader.show([row], TINY, facts, console())
    table = [
        [cell.strip() for cell in line.replace("┃", "│").split("│")] for line in capsys.readouterr().out.splitlines()
    ]
    headings = next(line for line in table if "samples/s" in line)
    values = next(line for line in table if OURS in line)
    shown = dict(zip(headings, values, strict=True))
    expected = {"samples/s": "12.0", "vs row 1": "-", "CPU ms a sample": "125.0", "peak MB": "900"}
    expected |= {"without files": "800", "first batch s": "0.75", "result": "ok"}
    assert {name: shown[name] for name in expected} == expected


def test_a_process_that_dies_is_an_error_and_runs_no_more(monkeypatch, tmp_path):
    monkeypatch.setattr(loader.sys, "executable", "/bin/false")
    row = Row(RIVAL, "")
    loader._run_round(row, job_of(RIVAL, TINY, tmp_path), tmp_path)
    assert row.status == "error" and row.error.startswith("its process ended with 1") and not row.rounds


def test_a_mistake_is_one_sentence(capsys):
    for words, hint in (
        (["--rows", "ours, PNG folder"], "did you mean 'ours, PNG folders'?"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--seconds", "nan"], "--seconds must be at least 0"),
        (["--json", "file"], "ends in .json"),
    ):
        assert main(["loader", "--device", "cpu", *words]) == 2
        error = capsys.readouterr().err
        assert hint in error and error.count("\n") == 1
    assert main(["loader", "--list"]) == 0
    listed = capsys.readouterr().out
    assert RIVAL in listed and OURS in listed
