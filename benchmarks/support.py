"""Which method trains which family, and which export of its student makes the same samples in stock diffusers.

Every cell is run: the family's tiny random pipeline is read from a folder, the method makes one update with a full or a
LoRA student, the student is exported as a pipeline and as LoRA files, and stock diffusers' latents are compared with
``sample()``. A cell is the largest difference, or the sentence with which it was refused. Cells are kept in
``.matrix/support/`` and not run again until the package changes; an interrupted run goes on where it stopped.

    python benchmarks/support.py [--methods DMD2 VSD] [--families sd15 flux] [--again] [--any-version]
    python benchmarks/make_tables.py        # docs/support_matrix.md
"""

import argparse
import json
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "networks"))

import torch  # noqa: E402
from family_runs import build, train_once  # noqa: E402
from family_settings import settings_of  # noqa: E402
from matrix import key  # noqa: E402
from results import RESULTS, write_result  # noqa: E402
from tiny_pipelines import MAKERS, Tiny  # noqa: E402

from lightning_distill.commands.export import export_module  # noqa: E402
from lightning_distill.commands.methods import method_classes, method_rows  # noqa: E402
from lightning_distill.methods import DistillationModule  # noqa: E402

STATE = ROOT / ".matrix" / "support"
#: largest difference, relative to the largest latent, that counts as the same samples
TOLERANCE = 1e-5
#: one tiny pipeline per pipeline class and kind of embedding
FAMILIES = [name for name in MAKERS if name not in ("cogvideox_wide", "cogvideox_patches")]
EXPORTS = {"pipeline": None, "lora_diffusers": "diffusers", "lora_kohya": "kohya"}


def cell(method: type[DistillationModule], name: str, lora: bool) -> dict[str, Any]:
    """One method, family and kind of student: what became of every export."""
    torch.manual_seed(0)
    tiny, started = MAKERS[name](), time.perf_counter()
    row: dict[str, Any] = {"method": method.__name__, "family": name, "roles": "lora" if lora else "full"}
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary)
        module, row["training"] = _trained(method, tiny, folder, lora)
        for export, style in EXPORTS.items():
            if module is not None and (lora or style is None):
                row[export] = _outcome(module, folder / export, style)
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


def _trained(
    method: type[DistillationModule], tiny: Tiny, folder: Path, lora: bool
) -> tuple[DistillationModule | None, str]:
    try:
        module = build(method, tiny, folder / "base", lora, **settings_of(method, tiny, lora))
        train_once(module, tiny)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        return None, _sentence(error, folder)
    return module, "trained"


def _outcome(module: DistillationModule, out: Path, style: Any) -> str | float:
    try:
        return export_module(module, out, lora=style, fresh=False)[1]
    except (ValueError, RuntimeError) as error:
        return _sentence(error, out.parent)


def _sentence(error: Exception, folder: Path) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    text = re.sub(r"^\w+Pipeline", "the pipeline", text)  # one note for all families
    return f"{kind}{text}".replace(f"{folder}/", "").replace(str(folder), "folder")


def main() -> None:
    """Run what is missing, then write the result of all cells that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="methods (default: all)")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--again", action="store_true", help="run kept cells, too")
    parser.add_argument("--any-version", action="store_true", help="cells of an earlier version of the package count")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    registered = {row.name for row in method_rows()}
    classes = {cls.__name__: cls for cls in method_classes() if cls.__name__ in registered}
    if wrong := set(args.methods or ()) - set(classes):
        parser.error(f"unknown methods {sorted(wrong)}; choose from {', '.join(sorted(classes))}")
    STATE.mkdir(parents=True, exist_ok=True)
    version = key(ROOT / "tests" / "networks" / "tiny_pipelines.py")
    for method in args.methods or sorted(classes):
        for family in args.families:
            for lora in (False, True):
                _keep(classes[method], family, lora, version, args)
    rows = [json.loads(file.read_text()) for file in sorted(STATE.glob("*.json"))]
    if args.any_version and (latest := RESULTS / "latest" / "support.json").is_file():  # cells of other machines
        here = {_name(row) for row in rows}
        rows += [row for row in json.loads(latest.read_text())["rows"] if _name(row) not in here]
    rows = [row for row in rows if row["method"] in classes and (args.any_version or row["version"] == version)]
    rows.sort(key=_name)
    figures = [{k: v for k, v in row.items() if k != "version"} for row in rows]
    write_result("support", {"tolerance": TOLERANCE, "families": FAMILIES, "rows": figures}, seeds=[0])
    same = sum(isinstance(row.get(e), float) and row[e] <= TOLERANCE for row in rows for e in EXPORTS)
    print(f"{len(rows)} cells, {same} exports that make the same samples")


def _name(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["method"], row["family"], row["roles"]


def _keep(method: type[DistillationModule], family: str, lora: bool, version: str, args: argparse.Namespace) -> None:
    file = STATE / f"{method.__name__}.{family}.{'lora' if lora else 'full'}.json"
    if file.is_file() and not args.again:
        kept = json.loads(file.read_text())
        if args.any_version or kept["version"] == version:
            return
    row = {**cell(method, family, lora), "version": version}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(row, indent=1) + "\n")
    part.replace(file)
    said = " ".join(f"{e}={row[e]:.0e}" if isinstance(row[e], float) else f"{e}: no" for e in EXPORTS if e in row)
    print(
        f"{row['method']:16s} {family:14s} {row['roles']} {row['seconds']:5.1f} s  {said or row['training']}",
        flush=True,
    )


if __name__ == "__main__":
    main()
