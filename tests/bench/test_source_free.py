"""The bench of source-free adaptation: what it trains, on what, and its table; without training anything."""

from bench import demo, source_free
from ssr_fast.config import problems


def test_every_row_starts_from_the_seeds_source_model_without_the_source(tmp_path, monkeypatch):
    trained = []

    def recorded(config, row, method, seed, folder):
        if method == "supervised":
            assert config.data.scenes.seed == seed
            for part in ("source", "target", "evaluation"):
                (folder / "scenes" / part).mkdir(parents=True)
        else:
            assert not (tmp_path / f"source-{seed}" / "scenes" / "source").exists()
            assert config.source_free.model == str(tmp_path / f"source-{seed}")
            assert config.data.target.root == str(tmp_path / f"source-{seed}" / "scenes" / "target")
            config.run.stages, config.method.name = None, method
            config.data.segments = config.data.segments if config.reads_segments() else ""
            assert problems(config) == []
        trained.append((row, config.source_free.contrast > 0, config.source_free.vote))
        return {"row": row, "seed": seed, "miou": 20.0 + len(trained), "seconds": 1.0}

    monkeypatch.setattr(source_free, "_train", recorded)
    monkeypatch.setattr(source_free, "_segments", lambda config: None)
    results = source_free.run_seed(7, tmp_path)
    assert trained[1:] == [
        ("self_training_alone", False, False),
        ("contrast", True, False),
        ("contrast_and_vote", True, True),
    ]
    text = demo.summarise(results, ["source_only", *source_free.ROWS], source_free.GAINS)
    assert "contrast - source_only: +2.0" in text and "contrast - self_training_alone: +1.0" in text
