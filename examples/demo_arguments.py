"""What the demo is told: which text, which model."""

from __future__ import annotations

import argparse
from pathlib import Path

DOCUMENT = Path(__file__).parent.parent / "docs" / "format.md"


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --text and --model to the orchestrator's and to the processes' parser."""
    parser.add_argument("--text", type=_file, default=DOCUMENT, help="a document to ask about")
    parser.add_argument("--model", type=_folder, default=None, help="folder of a model to use")


def _file(value: str) -> Path:
    path = Path(value)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"TEXT={value}: there is no such file")
    return path


def _folder(value: str) -> Path:
    path = Path(value)
    if not (path / "config.json").is_file():
        raise argparse.ArgumentTypeError(
            f"MODEL={value}: takes a folder with config.json, weights and a tokenizer"
        )
    return path
