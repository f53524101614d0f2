"""The configurations that are shipped."""

import yaml

from lightning_distill.configs import config_path

ROOT = config_path("quickstart.yaml").parent
FILES = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.yaml"))
#: folders whose files are complete runs; the others are added to one
COMPLETE = [f for f in FILES if f.split("/")[0] in ("quickstart.yaml", "method", "teacher", "recipe")]


def load(name):
    return yaml.safe_load(config_path(name).read_text())
