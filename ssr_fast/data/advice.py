"""What to do when training waits for its data, as only the loader's side can know."""

from dataclasses import dataclass

_FEW_IMAGES = 1000  # a GB or two when decoded at 1024 x 512
_PASSES = 3  # after which a cache that is filled at random lacks 5 % of the images


@dataclass(frozen=True)
class Advice:
    """For the warning that training waits for its data.

    Attributes:
        cure: what the user can do, as the end of a sentence; empty if nothing is known.
        settled: batches after the start, or after a resume, from which on the waiting says something about the rest
            of the run; before, a cache is being filled.
    """

    cure: str = ""
    settled: int = 0


def advise(
    *, workers: int, cores: int, batch_size: int, images: tuple[int, ...], cached: bool, from_files: bool, dali: bool
) -> Advice:
    """The advice for a run.

    Args:
        workers: processes that read (--data.workers).
        cores: of this machine that the run may use.
        batch_size: images of each data set in a batch.
        images: number of images in each data set that training reads.
        cached: whether decoded images stay in memory (--data.cache), in each worker's for itself.
        dali: whether DALI reads, which keeps no images.
        from_files: whether samples are decoded and resized from the original files.
    """
    cures = []
    if workers == 0 and cores > 1:
        cures.append(f"read in processes of their own (--data.workers {min(4, cores)})")
    elif 0 < workers < cores:
        cures.append(f"raise --data.workers (it is {workers}, and there are {cores} cores)")
    if sum(images) <= _FEW_IMAGES and not cached and not dali:
        cures.append(f"keep the {sum(images)} images in memory (--data.cache true)")
    if from_files and not cached:
        cures.append("read prepared files (`python -m ssr_fast.prepare store`)")
    settled = _PASSES * max(1, workers) * max(images) // batch_size if cached else 0
    return Advice(", or ".join(cures) or "no option is left that helps, only more cores or a faster disk", settled)
