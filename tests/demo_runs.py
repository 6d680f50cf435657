"""Runs of the demo, and what its tests change in a checkpoint."""

import json

from cupy_lora.__main__ import main


def edit_config(path, **changes):
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, **changes}))


def run_demo(*arguments):
    return main(["demo", "--device", "cpu", *arguments])
