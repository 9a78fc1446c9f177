"""Predict: `python -m ssr_fast.predict MODEL INPUT --out DIR`; INPUT is an image, a video, or a folder of them.

For each image it writes <name>_trainIds.png (uint8), <name>_color.png and <name>_overlay.png at the image's own size,
for a video <name>_overlay.mp4. A folder's structure is kept.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ArgumentParser
from numpy.typing import NDArray

from ssr_fast.commandline import DONE, command_parser, parse, raise_problems, run, tell
from ssr_fast.data.images import BadFile, decode_image
from ssr_fast.errors import UserError
from ssr_fast.eval.inference import InferenceConfig
from ssr_fast.eval.run import evaluating, fit_picture, logits_only, predict_pictures
from ssr_fast.eval.table import progress_bar
from ssr_fast.report.files import Job, plan_jobs, prepare_folder, write_prediction
from ssr_fast.report.video import overlay_video
from ssr_fast.shipped import ShippedModel, given, open_model


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = command_parser("ssr_fast.predict", "Label images, a folder of images, or videos.")
    parser.add_argument("model", type=str, help="run directory, model.safetensors, or another program's checkpoint")
    parser.add_argument("input", type=str, help="image, video, or folder")
    parser.add_argument("--out", default="", type=str, metavar="DIR", help="folder for the results; replaces old ones")
    parser.add_argument(
        "--resize",
        type=tuple[int, int] | None,
        default=None,
        metavar="W H",
        help="box that images are resized into before prediction, keeping their ratio; default: as in training",
    )
    parser.add_argument("--device", default="auto", type=str, help="auto, cpu, cuda or cuda:<number>")
    parser.add_class_arguments(InferenceConfig, "inference")
    return parser


def main(argv: list[str]) -> int:
    """Run the command; the exit code.

    Raises:
        UserError: wrong options, an unreadable model, or inputs that could not be used (after all others are done).
    """
    parser = build_parser()
    options = parser.instantiate(parse(parser, argv))
    problems = options.inference.problems("inference")
    if not options.out:
        problems.append("--out is missing: give the folder for the results")
    if options.resize is not None and min(options.resize) < 1:
        problems.append(f"--resize must be width and height > 0 (it is {list(options.resize)})")
    raise_problems(problems)
    out = Path(options.out).expanduser()
    found = plan_jobs(Path(options.input).expanduser(), out)
    model = open_model(options.model, options.device, tell)
    prepare_folder(out)
    if found.others:
        tell(f"{found.others} files of {options.input} are neither images nor videos and are left out")
    resize = options.resize if given(argv, "resize") else model.resize
    if resize is not None and not given(argv, "resize"):
        tell(f"images are resized to fit {resize}, as the model saw them; --resize null keeps their size")
    inference = options.inference if given(argv, "inference") else model.inference
    _predict_all(Predictor(model, inference, resize), found.jobs, out)
    return DONE


class Predictor:
    """A model with the settings of one command: RGB uint8 [H, W, 3] -> train ids uint8 [H, W]."""

    def __init__(self, model: ShippedModel, inference: InferenceConfig, resize: tuple[int, int] | None) -> None:
        self.model, self.inference, self.resize = model, inference, resize
        self._network = logits_only(model.segmentor)

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        with torch.no_grad():
            pixels = fit_picture(image, self.resize)
            label = predict_pictures(self._network, pixels[None], self.inference, image.shape[:2], self.model.device)[0]
        return label.to(torch.uint8).cpu().numpy()


def _predict_all(predict: Predictor, jobs: tuple[Job, ...], out: Path) -> None:
    """Run the jobs; bad files are named and counted, the others are done."""
    notes: Counter[str] = Counter()
    bad: list[BadFile] = []
    with evaluating(predict.model.segmentor), progress_bar("predicting") as progress:
        for done, job in enumerate(jobs, 1):
            try:
                notes.update(_predict_one(predict, job))
            except BadFile as error:
                bad.append(error)
                tell(f"left out: {error}")
            progress(done, len(jobs))
    for note, count in notes.items():
        tell(f"{count} of {len(jobs)} inputs are {note}")
    tell(f"{len(jobs) - len(bad)} of {len(jobs)} inputs are labelled in {out}")
    if bad:
        raise UserError(f"{len(bad)} of {len(jobs)} inputs could not be used, the first: {bad[0]}")


def _predict_one(predict: Predictor, job: Job) -> tuple[str, ...]:
    """Write the outputs of one input; notes on what was unusual."""
    classes = predict.model.classes
    if job.is_video:
        overlay_video(job.source, job.target, predict, classes)
        return ()
    image, notes = decode_image(job.source)
    write_prediction(job.target, image, predict(image), classes)
    return notes


if __name__ == "__main__":
    run(main)
