"""Training on increments under URLs is training on the same files here."""

from pathlib import Path

from tiny_job import TinyData, command, launch, results


def test_a_run_on_urls_is_the_run_on_the_files_here(data: TinyData, tmp_path: Path):
    data = data.first(1)
    assert launch(command(data, tmp_path / "here")) == 0
    far = TinyData(
        tuple(f"file://{prefix}" for prefix in data.increments), tuple(f"file://{prefix}" for prefix in data.held_out)
    )
    cache = tmp_path / "cache"
    assert launch(command(far, tmp_path / "there", "--data-cache-path", str(cache))) == 0
    here, there = results(tmp_path / "here"), results(tmp_path / "there")
    assert here["metrics"] and here["metrics"] == there["metrics"]
    assert len(list(cache.glob("*/increment.bin"))) == len(far.increments) + len(far.held_out)


def test_a_url_without_a_cache_is_refused(data: TinyData, tmp_path: Path, capsys):
    far = TinyData(tuple(f"file://{prefix}" for prefix in data.increments), ())
    assert launch(command(far, tmp_path / "there")) == 2
    assert "add --data-cache-path" in capsys.readouterr().err
