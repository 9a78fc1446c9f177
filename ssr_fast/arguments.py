"""The arguments of `python -m ssr_fast.train`: preset, options, configuration file and resume, to a configuration."""

import difflib
import json
from dataclasses import fields
from pathlib import Path

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from ssr_fast.commandline import command_parser, parse, raise_problems, tell
from ssr_fast.config import TrainConfig, problems
from ssr_fast.data.store import is_store
from ssr_fast.engine.ranks import first, launched
from ssr_fast.errors import UserError
from ssr_fast.presets import PRESETS

RUNS = Path("runs")


def build_parser(defaults: TrainConfig) -> ArgumentParser:
    """The command line, with a preset's values as defaults."""
    parser = command_parser(
        "ssr_fast.train [PRESET]", f"Adapt a segmentation network. Presets: {', '.join(PRESETS)}; none: demo."
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with options; later ones win")
    parser.add_argument(
        "--resume", nargs="?", const="", default=None, type=str, help="continue a run directory (default: the newest)"
    )
    for section in fields(TrainConfig):
        parser.add_argument(f"--{section.name}", type=section.type, default=getattr(defaults, section.name))
    return parser


def split_preset(argv: list[str]) -> tuple[str | None, list[str]]:
    """The preset, if the first argument is one, and the other arguments.

    Raises:
        UserError: a first argument that is no preset.
    """
    if not argv or argv[0].startswith("-"):
        return None, argv
    if argv[0] not in PRESETS:
        close = difflib.get_close_matches(argv[0], PRESETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(PRESETS)}"
        raise UserError(f"unknown preset {argv[0]}: {hint}")
    return argv[0], argv[1:]


def configure(argv: list[str]) -> tuple[TrainConfig, str, bool]:
    """The configuration, the preset's name and whether to resume.

    Raises:
        UserError: everything that is wrong with the options, one line each.
    """
    preset, rest = split_preset(argv)
    parser = build_parser(PRESETS[preset or "demo"]())
    options = parse(parser, rest)
    resume = options.resume is not None
    if resume:
        folder = _run_to_resume(options)
        preset = preset or _preset_of(folder)
        parser = build_parser(PRESETS[preset]())
        options = parse(parser, ["--config", str(folder / "config.yaml"), *rest, "--run.dir", str(folder)])
    preset = preset or "demo"
    built = parser.instantiate(options)
    config = TrainConfig(**{section.name: built[section.name] for section in fields(TrainConfig)})
    explicit = frozenset(word[2:].partition("=")[0] for word in rest if word.startswith("--"))
    if "method.name" in explicit and "run.stages" not in explicit:
        config.run.stages = None  # a method that is asked for by name replaces a preset's comparison
    _follow_roots(config)
    if resume:
        _share_again(config, folder / "config.yaml", explicit)
    config.parallel.processes = launched() if "parallel.processes" not in explicit else config.parallel.processes
    raise_problems(problems(config, explicit))
    if not config.run.dir:
        config.run.dir = str(_fresh_folder(preset))
    elif not resume and (Path(config.run.dir) / "config.yaml").exists():
        raise UserError(
            f"--run.dir {config.run.dir} already holds a run: add --resume to continue it, or give another folder"
        )
    return config, preset, resume


def _run_to_resume(options: Namespace) -> Path:
    """The run directory that `--resume [DIR]` means: DIR, else --run.dir, else the newest below runs/."""
    if options.resume or options.run.dir:
        folder = Path(options.resume or options.run.dir)
    else:
        runs = sorted(RUNS.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UserError(f"--resume finds no run below {RUNS}/: give its folder, --resume DIR")
        folder = runs[-1].parent
    if not (folder / "config.yaml").is_file():
        raise UserError(f"--resume {folder} is no run directory: it has no config.yaml")
    return folder


def _share_again(config: TrainConfig, saved: Path, explicit: frozenset[str]) -> None:
    """A run that is resumed by another number of processes keeps its micro-batches: each takes more or fewer of them.

    Args:
        saved: the configuration of the run until now, which the parser has read.

    Raises:
        UserError: they cannot be shared evenly, and the user has not said how many each shall take.
    """
    sections = yaml.safe_load(saved.read_text(encoding="utf-8")) or {}
    before = (sections.get("parallel") or {}).get("processes") or 1
    accumulated = (sections.get("optim") or {}).get("accumulate", 1)
    if "parallel.mode" in explicit and config.parallel.mode != "hsdp" and "parallel.shard" not in explicit:
        config.parallel.shard = 0  # it belonged to the mode until now
    now = launched()
    if before == now:
        return
    processes = f"{now} process{'es' * (now > 1)} in place of {before}"
    if "optim.accumulate" not in explicit and config.optim.accumulate == accumulated:
        shares = before * accumulated
        if shares % now:
            raise UserError(
                f"the run was trained by {before} process{'es' * (before > 1)} with --optim.accumulate {accumulated}, "
                f"and {now} cannot share the {shares} micro-batches of a step evenly: start a divisor of {shares}, or "
                "give --optim.accumulate and with it another number of images in a step"
            )
        config.optim.accumulate = shares // now
        if first():
            tell(f"{processes}: --optim.accumulate is {shares // now}, so that a step sees as many images as before")
    if config.parallel.sync_batchnorm and first():
        tell(f"{processes}: --parallel.sync_batchnorm makes BatchNorm's statistics those of {now} micro-batches")


def _preset_of(folder: Path) -> str:
    try:
        name = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["preset"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--resume {folder}: environment.json does not name the preset; give it first") from error
    return name if name in PRESETS else "folder"


def _fresh_folder(preset: str) -> Path:
    """runs/<preset>, or the first of runs/<preset>-2, -3, ... that does not exist."""
    folder, number = RUNS / preset, 2
    while folder.exists():
        folder, number = RUNS / f"{preset}-{number}", number + 1
    return folder


def _follow_roots(config: TrainConfig) -> None:
    """A root that is not given is that of the domain before it, where both are parts of one data set's folder."""
    data = config.data
    pairs = [(data.source, data.target)]
    if data.evaluation is not None:
        pairs.append((data.target, data.evaluation))
    for before, domain in pairs:
        same_set = domain.layout == before.layout and domain.classes == before.classes
        same_set = same_set and not is_store(Path(before.root))  # which holds one split alone
        if not domain.root and same_set and (domain.split, domain.condition) != (before.split, before.condition):
            domain.root = before.root
