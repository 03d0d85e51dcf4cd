"""Results as files: a line a row in CSV, and the same with all there is to know of it in JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_records(
    folder: Path, name: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> list[Path]:
    """Writes `rows` to <name>.csv and `facts` to <name>.json; returns both paths, JSON first."""
    folder.mkdir(parents=True, exist_ok=True)
    json_path, csv_path = folder / f"{name}.json", folder / f"{name}.csv"
    json_path.write_text(json.dumps(facts, indent=2) + "\n")
    with csv_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return [json_path, csv_path]
