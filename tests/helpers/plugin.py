"""Write a package of somebody's own with a decoder, a model and a metric, as an installed wheel would lie there.

python tests/helpers/plugin.py FOLDER       then PYTHONPATH=FOLDER sjd2 decoder=halves model=fives evaluation=darkness
"""

from __future__ import annotations

import sys
from pathlib import Path

FILES = {
    "halves/__init__.py": "",
    "halves/decoder.py": """
from sjd2.config import compose, instantiate


def halves(*, name, window):
    '''SCD with half the window that is asked for.'''
    settings = compose(["decoder=scd", f"decoder.window={window // 2}", f"decoder.name={name}"])
    return instantiate(settings.decoder)
""",
    "halves/model.py": """
from sjd2.models.chameleon import ChameleonSpec


class FivesSpec(ChameleonSpec):
    '''The embedded model under another name.'''
""",
    "halves/metric.py": """
from statistics import fmean

from evaluation.run_folder import record_id
from evaluation.score import Metric, MetricInfo, Scores


class Darkness(Metric):
    numbers = (MetricInfo(name="darkness", title="darkness", digits=1, per_image="darkness"),)
    protocol = "darkness: 255 minus the mean pixel value, mean over n_images."

    def start(self, run):
        self.values = {}
        return run.records

    def update(self, images, records):
        for image, record in zip(images, records, strict=True):
            self.values[record_id(record)] = 255 - float(image.mean())

    def compute(self, run):
        return Scores({"darkness": fmean(self.values.values())}, {"darkness": self.values})
""",
    "halves/conf/decoder/halves.yaml": """
_target_: halves.decoder.halves
name: halves
window: 16
""",
    "halves/conf/model/fives.yaml": """
defaults:
  - tiny
  - _self_
_target_: halves.model.FivesSpec
name: fives
""",
    "halves/conf/evaluation/darkness.yaml": """
metrics:
  darkness:
    _target_: halves.metric.Darkness
""",
    "halves-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n",
    "halves-1.0.dist-info/entry_points.txt": "[sjd2.plugins]\nhalves = halves\n",
}


def write_plugin(folder: Path) -> Path:
    """Write the package into `folder`, to be put on PYTHONPATH; returns its conf/ folder."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip("\n"), encoding="utf-8")
    return folder / "halves" / "conf"


if __name__ == "__main__":
    write_plugin(Path(sys.argv[1]))
